# Generated from book/model.md: edit the chapter, not this file.
"""The decoder: embedding, L equal blocks, a final norm, and the embedding again.

Notable:
- Parameters carry the names, the shapes and the order of `parameter_shapes`, which are
  Llama's in `transformers`: a checkpoint needs no conversion. The head has no tensor
  of its own; it reads the embedding.
- Initial weights depend on the seed alone, not on the device, the precision or the
  random numbers that others have drawn.
- The loss comes out of `linear_cross_entropy` together with its gradient, a chunk of
  tokens at a time, and the (B * T, V) logits never exist as a whole.

Shapes: B batch, T time, D width, V vocabulary, N = B * T tokens.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from albor.attention import Attention, KVCache
from albor.config import ModelConfig
from albor.layers import RMSNorm, SwiGLU, rope_table

__all__ = ["IGNORED", "Albor", "Block", "Decoder", "linear_cross_entropy"]


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
        kind, wide = (
            hidden.device.type,
            torch.promote_types(hidden.dtype, torch.float32),
        )
        known = torch.amp.is_autocast_available(kind)  # not for "meta" tensors
        mixed = known and torch.is_autocast_enabled(kind)
        low = torch.get_autocast_dtype(kind) if mixed else None
        matrix = weight.to(low or weight.dtype)  # (V, D)
        counted = targets != IGNORED
        count = counted.sum()
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden) if grad else None
        d_weight = torch.zeros_like(weight, dtype=wide) if grad else None
        with torch.autocast(kind, enabled=False) if mixed else nullcontext():
            for i in range(0, len(hidden), chunk):
                rows = hidden[i : i + chunk].to(matrix.dtype)  # (n, D)
                keep = counted[i : i + chunk, None].to(wide)  # (n, 1)
                target = targets[i : i + chunk, None].clamp(min=0)
                logits = (rows @ matrix.T).to(wide)  # (n, V)
                log_z = logits.logsumexp(dim=-1, keepdim=True)
                loss += ((log_z - logits.gather(1, target)) * keep).sum()
                if d_hidden is not None and d_weight is not None:
                    slope = logits.sub_(
                        log_z
                    ).exp_()  # softmax, in place of the logits
                    slope.scatter_add_(1, target, -torch.ones_like(log_z)).mul_(
                        keep
                    )
                    low_slope = slope.to(matrix.dtype)
                    d_hidden[i : i + chunk] = low_slope @ matrix
                    d_weight += low_slope.T @ rows
        # Gradients of the sum, in a range that 16 bits can hold: dividing by the count
        # waits for the backward pass, where the loss scale comes in as well.
        ctx.save_for_backward(d_hidden, d_weight, count)
        ctx.weight_dtype = weight.dtype
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, count = ctx.saved_tensors
        scale = d_loss / count
        d_hidden, d_weight = d_hidden * scale, d_weight * scale
        return d_hidden, d_weight.to(ctx.weight_dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 512
) -> Tensor:
    """Mean cross-entropy of softmax(hidden @ weight.T), `chunk` tokens at a time.

    hidden is (N, D), weight (V, D), targets (N,) of ids, or -100 where a token does not
    count. The forward pass computes the gradient too, so only (chunk, V) numbers are
    alive at once. Matrices multiply in autocast's type, softmax is at least float32.
    """
    grad = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad
    )
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, grad)


class Block(nn.Module):
    """One layer: attend, then think. Each half adds to the stream that it reads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps
        )
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
        self.rope: tuple[Tensor, Tensor] | None = (
            None  # no buffer: never cast to 16 bits
        )

    def rotations(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Rows start to end of the rotary table, beside the weights, at least float32."""
        weight = self.embed_tokens.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if (
            self.rope is None
            or self.rope[0].device != weight.device
            or self.rope[0].dtype != dtype
        ):
            c = self.config
            table = rope_table(
                c.head_dim, c.max_position_embeddings, c.rope_theta, dtype
            )
            self.rope = table[0].to(weight.device), table[1].to(weight.device)
        cos, sin = self.rope
        return cos[start:end], sin[start:end]

    def forward(
        self, ids: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        self.check(ids, caches)
        start = caches[0].length if caches else 0
        cos, sin = self.rotations(start, start + ids.shape[1])
        x = self.embed_tokens(ids)
        for i, block in enumerate(self.layers):
            x = block(x, cos, sin, caches[i] if caches else None)
        return self.norm(x)

    def check(self, ids: Tensor, caches: Sequence[KVCache] | None = None) -> None:
        """Refuse ids that are not (B, T) integers within vocabulary and context.

        Values are looked at on a CPU only; CUDA would have to wait for the answer, and
        its embedding kernel refuses them by itself.
        """
        c = self.config
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"ids must be a (B, T) tensor of int64 or int32, got shape "
                f"{tuple(ids.shape)} of {ids.dtype}"
            )
        if ids.numel() == 0:
            raise ValueError(f"ids are empty: their shape is {tuple(ids.shape)}")
        if caches is not None and len(caches) != len(self.layers):
            raise ValueError(
                f"{len(caches)} caches for {len(self.layers)} layers: give one to each"
            )
        seen = caches[0].length if caches else 0
        if seen + ids.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens after {seen} cached ones are more than "
                f"max_position_embeddings = {c.max_position_embeddings}: shorten the "
                "input"
            )
        if ids.device.type == "cpu":
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= c.vocab_size:
                raise ValueError(
                    f"ids run from {low} to {high}, but the vocabulary is 0 to "
                    f"{c.vocab_size - 1}: was the text encoded by another tokenizer?"
                )


class Albor(nn.Module):
    """The language model: a `Decoder`, and a head that is its embedding, transposed.

    Matrices and embedding start as N(0, initializer_range), norms as ones, all drawn
    from one generator with the given seed (None: one from the operating system).
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        home = torch.get_default_device()
        with torch.device("meta"):  # shapes alone: nothing is drawn twice
            self.model = Decoder(config)
        self.to_empty(device=home)
        if home.type != "meta":
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int | None) -> None:
        """Draw every weight anew, in the order of `parameter_shapes`."""
        generator = torch.Generator(device="cpu")
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                drawn = torch.empty(
                    parameter.shape, dtype=torch.float32, device="cpu"
                )
                drawn.normal_(
                    0.0, self.config.initializer_range, generator=generator
                )
                parameter.copy_(drawn)

    def forward(
        self, ids: Tensor, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Logits (B, T, V) for the token after each of ids (B, T)."""
        return F.linear(self.model(ids, caches), self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of targets (B, T); those of -100 do not count."""
        if targets.shape != ids.shape or targets.dtype != torch.int64:
            raise ValueError(
                f"targets must be int64 of the shape of ids, {tuple(ids.shape)}, got "
                f"{tuple(targets.shape)} of {targets.dtype}"
            )
        hidden = self.model(ids)  # (B, T, D)
        weight = self.model.embed_tokens.weight  # (V, D)
        return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())

    def new_caches(self, max_length: int | None = None) -> list[KVCache]:
        """An empty cache per layer; without max_length, as long as the context."""
        length = (
            self.config.max_position_embeddings
            if max_length is None
            else max_length
        )
        return [KVCache(length) for _ in self.model.layers]
