# Generated from book/model.md: edit the chapter, not this file.
"""The decoder: embedding, L equal blocks, a final norm, and the embedding again.

Notable:
- Parameters carry the names, the shapes and the order of `parameter_shapes`, which
  are Llama's in `transformers`: a checkpoint needs no conversion. The head has no
  tensor of its own; it reads the embedding.
- Initial weights depend on the seed alone: not on the device, nor the precision,
  nor the random numbers that others have drawn.
- The loss comes with its gradient out of `linear_cross_entropy`, a chunk of tokens
  at a time. The (B * T, V) logits never exist as a whole.

Shapes: B batch, T time, D width, V vocabulary, N = B * T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from albor.attention import Attention, KVCache
from albor.layers import RMSNorm, SwiGLU, rope_table
from albor.shapes import LOSS_ROWS, ModelConfig

__all__ = ["IGNORED", "Albor", "Block", "Decoder", "linear_cross_entropy"]


class Block(nn.Module):
    """One layer: look around, then think. Each half adds to the stream it reads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Ids (B, T) to hidden vectors (B, T, D): all of the model but its head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            Block(config) for _ in range(config.num_hidden_layers)
        )
        self.rope: tuple[Tensor, Tensor] | None = None  # no buffer: stays wide
        self.recompute = (
            False  # keep the blocks' inputs, and compute the rest again
        )

    def rotations(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Rows start to end of the rotary table, on the weights' device."""
        weight, c = self.embed_tokens.weight, self.config
        dtype = torch.promote_types(weight.dtype, torch.float32)
        old = self.rope[0] if self.rope else None
        if old is None or old.device != weight.device or old.dtype != dtype:
            length = c.max_position_embeddings
            with torch.inference_mode(False):  # or training could not use it later
                table = rope_table(c.head_dim, length, c.rope_theta, dtype)
                self.rope = table[0].to(weight.device), table[1].to(weight.device)
        assert self.rope is not None
        return self.rope[0][start:end], self.rope[1][start:end]

    def check(self, ids: Tensor, caches: Sequence[KVCache] | None) -> int:
        """Refuse ids that are not (B, T) integers within vocabulary and context.

        Returns the tokens seen before. Values of ids are read on a CPU alone, where
        nothing waits for them, and not in a compiled function.
        """
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"ids must be (B, T) of int64 or int32, got {tuple(ids.shape)} of "
                f"{ids.dtype}"
            )
        if ids.numel() == 0:
            raise ValueError(f"ids are empty: their shape is {tuple(ids.shape)}")
        if caches is not None and len(caches) != len(self.layers):
            raise ValueError(
                f"{len(caches)} caches for {len(self.layers)} layers: give each one"
            )
        seen = caches[0].length if caches else 0
        longest = self.config.max_position_embeddings
        if seen + ids.shape[1] > longest:
            raise ValueError(
                f"{ids.shape[1]} tokens after {seen} cached ones are more than "
                f"max_position_embeddings = {longest}: shorten the input"
            )
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"ids run from {low} to {high}, the vocabulary from 0 to "
                    f"{self.config.vocab_size - 1}: is it another tokenizer's text?"
                )
        return seen

    def forward(
        self, ids: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        seen = self.check(ids, caches)
        cos, sin = self.rotations(seen, seen + ids.shape[1])
        x = self.embed_tokens(ids)  # (B, T, D)
        for i, block in enumerate(self.layers):
            if self.recompute and not caches and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, caches[i] if caches else None)
        return self.norm(x)


IGNORED = -100  # a target that does not count, as in F.cross_entropy


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        grad: bool,
    ) -> Tensor:
        low = (hidden[:1] @ weight[:1].T).dtype  # of products: autocast's, if on
        wide = torch.promote_types(low, torch.float32)  # of softmax and sums
        matrix, counted = weight.to(low), targets != IGNORED
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if grad else None
        d_weight = torch.empty_like(weight, dtype=wide) if grad else None
        for i in range(0, len(hidden), chunk):
            rows = hidden[i : i + chunk].to(low)  # (n, D)
            keep = counted[i : i + chunk, None]  # (n, 1)
            target = targets[i : i + chunk, None].masked_fill(~keep, 0)
            logits = rows @ matrix.T  # (n, V)
            # Summed in `wide`, rounded once. With no type named, autocast on CUDA
            # would keep this matrix, as wide as the vocabulary, in float32.
            slope = logits.softmax(dim=-1, dtype=low)
            # The largest entry is exp(largest logit) / Z: no second sum for log Z.
            log_top = slope.amax(dim=-1, keepdim=True).to(wide).log()
            log_z = logits.amax(dim=-1, keepdim=True).to(wide) - log_top
            loss += (log_z - logits.gather(1, target)).masked_fill(~keep, 0.0).sum()
            if d_hidden is not None and d_weight is not None:
                # Not scatter_add_: in 16 bits it copies the whole matrix.
                slope[
                    torch.arange(len(rows), device=rows.device), target[:, 0]
                ] -= 1
                d_hidden[i : i + chunk] = (slope @ matrix) * keep
                part = slope.T @ (rows * keep)
                d_weight.copy_(part) if i == 0 else d_weight.add_(part)
        # Gradients of the sum. The division by the count waits for backward, where
        # the loss scale comes in: before, 16 bits could not hold the quotient.
        ctx.save_for_backward(d_hidden, d_weight, counted.sum())
        ctx.weight_dtype = weight.dtype
        return loss / counted.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, count = ctx.saved_tensors
        scale = d_loss / count
        d_weight = (d_weight * scale).to(ctx.weight_dtype)
        return d_hidden * scale.to(d_hidden.dtype), d_weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0
) -> Tensor:
    """Mean cross-entropy of softmax(hidden @ weight.T), `chunk` tokens at a time.

    hidden is (N, D), weight (V, D), targets (N,) of ids, or -100 for a token that
    does not count; where none counts the mean is NaN. The gradient is computed on
    the way forward, (chunk, V) numbers at a time. Products are in autocast's type;
    softmax sums in float32 or wider and is rounded to that type once. A chunk of 0
    suits the device: the larger, the fewer passes over the (V, D) gradient.
    """
    chunk = chunk or LOSS_ROWS["cuda" if hidden.device.type == "cuda" else "cpu"]
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1")
    grad = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad
    )
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, grad)


class Albor(nn.Module):
    """The language model: a `Decoder`, and its embedding again as the head.

    Matrices and embedding start as N(0, initializer_range), norms as ones, all from
    one generator with the given seed (None: one that the operating system picks).
    Under `torch.device("meta")` nothing is drawn and no memory is taken.
    """

    def __init__(
        self, config: ModelConfig, seed: int | None = 0, scaled_init: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        home = torch.get_default_device()
        with torch.device("meta"):  # names and shapes, without a first drawing
            self.model = Decoder(config)
        self.to_empty(device=home)
        if home.type != "meta":
            self.initialize(seed, scaled_init)
        self.register_load_state_dict_pre_hook(self.drop_tied_head)

    @torch.no_grad()
    def initialize(self, seed: int | None, scaled_init: bool = False) -> None:
        """Draw every weight anew, in the order of `parameter_shapes`.

        `scaled_init` divides what adds to the residual stream by sqrt(2 L), as
        GPT-2 does: L layers add 2 L terms to it, whose variances add up.
        """
        generator = torch.Generator(device="cpu")
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        spread = self.config.initializer_range
        depth = 2 * self.config.num_hidden_layers
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                drawn = torch.empty_like(
                    parameter, dtype=torch.float32, device="cpu"
                )
                drawn.normal_(0.0, spread, generator=generator)
                if scaled_init and name.endswith(
                    ("o_proj.weight", "down_proj.weight")
                ):
                    drawn /= depth**0.5
                parameter.copy_(drawn)

    @staticmethod
    def drop_tied_head(
        module: nn.Module, state: dict, prefix: str, *_: Any
    ) -> None:
        """Accept `lm_head.weight` in a state dict if it equals the embedding."""
        head = state.pop(f"{prefix}lm_head.weight", None)
        embedding = state.get(f"{prefix}model.embed_tokens.weight")
        if head is None:
            return
        if embedding is None or not torch.equal(head, embedding):
            raise ValueError(
                "lm_head.weight differs from model.embed_tokens.weight: the head "
                "of this model is its embedding, so no other head can be loaded"
            )

    def forward(
        self, ids: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Logits (B, T, V) for the token after each of ids (B, T)."""
        return F.linear(self.model(ids, caches), self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (B, T), in nats; a -100 does not count."""
        if targets.shape != ids.shape or targets.dtype != torch.int64:
            raise ValueError(
                f"targets must be int64 of the shape of ids, {tuple(ids.shape)}, "
                f"got {tuple(targets.shape)} of {targets.dtype}"
            )
        hidden, weight = self.model(ids), self.model.embed_tokens.weight
        return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())

    def new_caches(self, max_length: int | None = None) -> list[KVCache]:
        """An empty cache per layer; without max_length, as long as the context."""
        longest = self.config.max_position_embeddings
        length = longest if max_length is None else max_length
        return [KVCache(length) for _ in self.model.layers]
