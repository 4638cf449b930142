# Generated from book/decode.md: edit the chapter, not this file.
"""Many texts at once: one step of the model gives each of them its next token.

Notable here:
- every slot of the cache keeps its own clock: no text is padded, and a row attends
  to the places of its own text alone, so that its neighbours do not matter;
- a text that ends gives its slot to the next one that waits;
- the step computes what the model's `Block` does; products of one input are joined,
  and on a CPU bfloat16 weights are laid out for the multiplication beforehand.

Shapes: B rows, D width, L layers, H heads, K key/value heads, Dh width of a head,
S places in the cache, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from albor.attention import KVCache
from albor.generate import GenerateError, check_request
from albor.layers import apply_rope, rms_norm
from albor.model import Albor
from albor.sampling import Sampling, choose
from albor.tokenizer import EOS

__all__ = ["GREEDY", "New", "Slots", "decode", "never", "product"]


def product(weights: Sequence[Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    """A function of x (B, D): its products with all weights (., D), side by side.

    For bfloat16 on a CPU that multiplies it, the weights are copied once, into the
    order in which oneDNN reads them for `rows` rows. Elsewhere nothing is copied.
    """
    first, onednn = weights[0], torch.ops.mkldnn
    if (
        first.dtype == torch.bfloat16
        and first.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and onednn._is_mkldnn_bf16_supported()
    ):
        packed = onednn._reorder_linear_weight(torch.cat([*weights]), rows)
        return lambda x: onednn._linear_pointwise(x, packed, None, "none", [], "")
    if len(weights) == 1:
        return lambda x: F.linear(x, first)
    return lambda x: torch.cat([F.linear(x, weight) for weight in weights], dim=-1)


class Slots:
    """Room for `count` texts of up to `length` tokens, and the step over them.

    The key of token t of a text lies at place t of its slot, whatever the others
    hold. `compiled` sends the step through `torch.compile`. On CUDA it is captured
    as a graph and replayed. Weights that change later need new slots.
    """

    def __init__(
        self, model: Albor, count: int, length: int, compiled: bool = False
    ) -> None:
        c, decoder = model.config, model.model
        self.model, self.count, self.length = model, count, length
        self.heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.table = decoder.embed_tokens.weight.detach()  # (V, D)
        self.rope = decoder.rotations(0, length)
        shape = c.num_hidden_layers, count, self.heads[1], length, self.heads[2]
        self.keys, self.values = self.table.new_zeros(2, *shape)  # (L, B, K, S, Dh)
        self.places = torch.arange(max(count, length), device=self.table.device)
        self.layers = []
        for block in decoder.layers:
            a, m = block.self_attn, block.mlp
            joined = (
                (a.q_proj, a.k_proj, a.v_proj),
                (a.o_proj,),
                (m.gate_proj, m.up_proj),
                (m.down_proj,),
            )
            weights = ([part.weight.detach() for part in some] for some in joined)
            self.layers.append([product(some, count) for some in weights])
        self.head = product([self.table], count)
        self.last: tuple[list[int], list[KVCache], Tensor] | None = None
        cuda = self.table.device.type == "cuda"
        self.fixed = compiled or cuda  # compilers and graphs want one shape
        self.run = torch.compile(self.forward) if compiled else self.forward
        if cuda:
            self.run = self.captured()

    def read(self, slot: int, ids: list[int]) -> Tensor:
        """Put a text into a slot; logits (V,) for its next token.

        The model's own forward pass reads it. The same text again is only copied.
        """
        if self.last is None or self.last[0] != ids:
            caches = self.model.new_caches(len(ids))
            batch = torch.tensor([ids], device=self.table.device)  # (1, T)
            hidden = self.model.model(batch, caches)[0, -1]  # (D,)
            self.last = ids[:], caches, F.linear(hidden, self.table)
        for layer, cache in enumerate(self.last[1]):
            self.keys[layer, slot, :, : len(ids)] = cache.keys
            self.values[layer, slot, :, : len(ids)] = cache.values
        return self.last[2]

    def move(self, source: int, target: int) -> None:
        """Copy the text of one slot into another."""
        for buffer in (self.keys, self.values):
            buffer[:, target] = buffer[:, source]

    def forward(self, ids: Tensor, at: Tensor, end: int) -> Tensor:
        """Logits (B, V) after tokens ids (B,), each at its own place at (B,) < end."""
        B, (H, K, Dh) = len(ids), self.heads
        rows, eps = self.places[:B], self.model.config.rms_norm_eps
        cos, sin = (angles[at, None] for angles in self.rope)  # (B, 1, Dh)
        x = F.embedding(ids, self.table)  # (B, D)
        unseen = self.places[:end] > at[:, None]  # (B, S)
        mask = torch.zeros(unseen.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(unseen, -math.inf)[:, None, None]  # (B, 1, 1, S)
        blocks = zip(self.model.model.layers, self.layers, strict=True)
        for layer, (block, (qkv, out, gate_up, down)) in enumerate(blocks):
            y = qkv(rms_norm(x, block.input_layernorm.weight, eps))
            y = y.view(B, H + 2 * K, Dh)
            turned = apply_rope(y[:, : H + K], cos, sin)  # queries and keys at once
            keys, values = self.keys[layer, :B], self.values[layer, :B]
            keys[rows, :, at] = turned[:, H:]
            values[rows, :, at] = y[:, H + K :]
            q = turned[:, :H].reshape(
                B, K, H // K, Dh
            )  # the heads that share a key
            y = F.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )  # (B, K, H / K, Dh)
            x = x + out(y.reshape(B, H * Dh))
            y = gate_up(rms_norm(x, block.post_attention_layernorm.weight, eps))
            gate, up = y.chunk(2, dim=-1)
            x = x + down(F.silu(gate) * up)
        return self.head(rms_norm(x, self.model.model.norm.weight, eps))

    def captured(self) -> Callable[[Tensor, Tensor, int], Tensor]:
        """The step as a CUDA graph over all slots: one launch for all kernels."""
        ids, at = torch.zeros(2, self.count, dtype=torch.int64, device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(3):  # compile, and let libraries take their workspaces
                self.run(ids, at, self.length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            logits = self.run(ids, at, self.length)

        def replay(new_ids: Tensor, new_at: Tensor, end: int) -> Tensor:
            ids.copy_(new_ids)
            at.copy_(new_at)
            graph.replay()
            return logits

        return replay

    def step(self, ids: Sequence[int], at: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token for each of the first B slots."""
        idle = [0] * (self.count - len(ids) if self.fixed else 0)
        end = self.length if self.fixed else max(at) + 1
        both = torch.tensor([[*ids, *idle], [*at, *idle]], device=self.table.device)
        return self.run(both[0], both[1], end)[: len(ids)]


GREEDY = Sampling()


class New(NamedTuple):
    """One more token of one text."""

    text: int  # which of the prompts it goes on from
    token: int
    logprob: float  # the model's own, in nats
    ended: str = ""  # why this is the last one: "stop", "length" or "context"


def never(text: int, token: int) -> bool:
    """End no text."""
    return False


@torch.inference_mode()
def decode(
    model: Albor,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (EOS,),
    ended: Callable[[int, int], bool] = never,
    rows: Sequence[int] | None = None,
    slots: int = 16,
    compiled: bool = False,
) -> Iterator[New]:
    """Go on with every prompt; give each new token as soon as it is chosen.

    At most `slots` texts are in work at a time. A text ends as in `generate`, or
    where `ended(text, token)`, asked once for each token, says so. Draws of prompt i
    depend on (seed, `rows[i]`, position); without `rows`, on i.
    """
    rows = range(len(prompts)) if rows is None else rows
    if len(rows) != len(prompts):
        raise GenerateError(f"{len(rows)} rows for {len(prompts)} prompts")
    if type(slots) is not int or slots < 1:
        raise GenerateError(f"slots must be a whole number from 1, got {slots!r}")
    how = sampling
    for i, prompt in enumerate(prompts):
        try:
            check_request(
                model,
                prompt,
                max_new_tokens,
                how.temperature,
                how.top_p,
                stop,
                how.seed,
            )
        except GenerateError as error:
            raise GenerateError(f"prompts[{i}]: {error}") from None
    if not prompts:
        return
    context = model.config.max_position_embeddings
    longest = min(max(map(len, prompts)) + max_new_tokens, context)
    room = Slots(model, min(slots, len(prompts)), longest, compiled)
    waiting = deque(range(len(prompts)))
    live: list[int] = []  # the text in each slot
    texts = {
        i: [int(token) for token in prompt] for i, prompt in enumerate(prompts)
    }
    while True:
        logits = []
        if live:
            newest = [texts[i][-1] for i in live]
            logits.append(room.step(newest, [len(texts[i]) - 1 for i in live]))
        while waiting and len(live) < room.count:
            live.append(waiting.popleft())
            logits.append(room.read(len(live) - 1, texts[live[-1]])[None])
        if not live:
            return
        tokens, logprobs = choose(
            torch.cat(logits),
            [texts[i] for i in live],
            [rows[i] for i in live],
            how,
        )
        for slot in reversed(range(len(live))):
            i, token = live[slot], tokens[slot]
            texts[i].append(token)
            why = ""
            if ended(i, token) or token in stop:
                why = "stop"
            elif len(texts[i]) == len(prompts[i]) + max_new_tokens:
                why = "length"
            elif len(texts[i]) == context:
                why = "context"
            yield New(i, token, logprobs[slot], why)
            if why:  # the last slot's text moves into the gap
                last = live.pop()
                if slot < len(live):
                    live[slot] = last
                    room.move(len(live), slot)
