# Generated from book/attention.md: edit the chapter, not this file.
"""Causal grouped-query attention, and the cache that makes decoding cheap.

Notable:
- H query heads share K heads of keys and values, each of them H / K times. The
  cache holds K heads, so it is H / K times smaller than with a key per query head.
- PyTorch's fused kernels do the work, and where one applies no (T, T) matrix is
  kept for the backward pass. `grouped_kernel` says which kernel takes what. For
  training on a CPU, where they are slow, `BlockAttention` is our own.
- One rule gives the mask, with a cache or without: a token sees its own position
  and those before it, and positions count from the start of the cache.

Shapes: B batch, T new tokens, S tokens to look at (cached and new), D width, H
heads, K key/value heads, Dh width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from albor.layers import apply_rope
from albor.shapes import BLOCK_LIMIT, BLOCK_ROWS, ModelConfig

__all__ = [
    "Attention",
    "BlockAttention",
    "KVCache",
    "all_kernels_allowed",
    "attend",
    "causal_mask",
    "grouped_kernel",
    "grouped_kernel_allowed",
    "in_blocks",
]


class KVCache:
    """Rotated keys and values of the tokens seen so far, for one layer.

    `length` counts them; there is room for `max_length`. The first `append` fixes
    batch, heads, device and precision, and makes both buffers at full size, (B, K,
    max_length, Dh). For decoding alone: a gradient through it is refused.
    """

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: it must be at least 1")
        self.max_length = max_length
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, (B, K, T, Dh) each; return all that is stored, up to S."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "a key/value cache passes no gradient back: decode under "
                "torch.no_grad(), or call the model without caches"
            )
        B, K, T, Dh = k.shape
        end = self.length + T
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.length} of at most {self.max_length} "
                f"tokens: {T} more do not fit"
            )
        if self.keys is None or self.values is None:
            self.keys = k.new_zeros(B, K, self.max_length, Dh)
            self.values = v.new_zeros(B, K, self.max_length, Dh)
        if self.keys.shape[:2] != (B, K):
            raise ValueError(
                f"the cache was begun with (batch, key/value heads) = "
                f"{tuple(self.keys.shape[:2])} and now gets {(B, K)}"
            )
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class BlockAttention(torch.autograd.Function):
    """Causal attention for short rows: `BLOCK_ROWS` queries at a time.

    q is (B, H, T, Dh), k and v are (B, K, T, Dh). The blocks' weights are kept for
    the backward pass: half of a (T, T) matrix per head.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, H, T, Dh), K = q.shape, k.shape[1]
        n, ctx.scale = B * K, Dh**-0.5  # n matrices: sequences times key heads
        q = (q * ctx.scale).unflatten(1, (K, H // K))  # (B, K, H / K, T, Dh)
        k, v = k.reshape(n, T, Dh), v.reshape(n, T, Dh)
        # In memory (B, T, H, Dh), as the next projection wants to read it.
        y = q.new_empty(B, T, K, H // K, Dh).permute(0, 2, 3, 1, 4)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        kept = []
        for start in range(0, T, BLOCK_ROWS):
            now = slice(start, min(start + BLOCK_ROWS, T))
            rows = q[..., now, :].reshape(n, -1, Dh)  # (n, H / K * block, Dh)
            scores = rows @ k[:, : now.stop].mT  # (n, H / K * block, now.stop)
            by_head = scores.unflatten(1, (H // K, -1))
            by_head[..., start:].masked_fill_(future[now, now], -math.inf)
            kept.append(scores.softmax(dim=-1))
            part = kept[-1] @ v[:, : now.stop]
            y[..., now, :] = part.view(B, K, H // K, -1, Dh)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        q, k, v, y, *kept = ctx.saved_tensors
        (B, K, G, T, Dh), n = q.shape, len(k)
        dy = dy.unflatten(1, (K, G))
        row_sum = (dy * y).sum(dim=-1)  # (B, K, H / K, T)
        dq = torch.empty_like(q)
        wide = torch.promote_types(k.dtype, torch.float32)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for start, weights in zip(range(0, T, BLOCK_ROWS), kept, strict=True):
            now = slice(start, min(start + BLOCK_ROWS, T))
            rows, d_rows = (x[..., now, :].reshape(n, -1, Dh) for x in (q, dy))
            dv[:, : now.stop] += weights.mT @ d_rows
            d_scores = d_rows @ v[:, : now.stop].mT
            d_scores -= row_sum[..., now].reshape(n, -1, 1)
            d_scores *= weights
            dk[:, : now.stop] += d_scores.mT @ rows
            dq[..., now, :] = (d_scores @ k[:, : now.stop]).view(B, K, G, -1, Dh)
        dq = dq.mul_(ctx.scale).flatten(1, 2)
        return (
            dq,
            dk.to(k.dtype).view(B, K, T, Dh),
            dv.to(v.dtype).view(B, K, T, Dh),
        )


@torch.compiler.assume_constant_result
def all_kernels_allowed() -> bool:
    """False within `torch.nn.attention.sdpa_kernel`, which chooses one by name."""
    sdp = torch.backends.cuda  # where the switches for a CPU are, too
    return sdp.flash_sdp_enabled() and sdp.math_sdp_enabled()


@torch.compiler.assume_constant_result
def grouped_kernel_allowed() -> bool:
    """Whether `sdpa_kernel` leaves CUDA a kernel that takes K < H heads of keys."""
    sdp = torch.backends.cuda
    return sdp.flash_sdp_enabled() or sdp.cudnn_sdp_enabled()


def in_blocks(q: Tensor) -> bool:
    """Whether `BlockAttention` takes causal rows of queries q, being faster."""
    suits = q.device.type == "cpu" and q.shape[2] <= BLOCK_LIMIT
    return suits and all_kernels_allowed()


def causal_mask(new: int, seen: int, device: torch.device) -> Tensor:
    """(T, S) of booleans: may new token t look at token s? T = new, S = seen + new.

    New token t stands at position seen + t, and looks at every s <= seen + t.
    """
    positions = torch.arange(seen + new, device=device)
    return positions <= positions[seen:, None]


def grouped_kernel(q: Tensor, masked: bool) -> bool:
    """Whether a fused kernel takes K < H heads of keys as they are, for queries q.

    As of torch 2.13. On a CPU the flash kernel does, with a mask or without. On
    CUDA it does so for 16-bit numbers without a mask, from compute capability 8.0
    on, and so does cuDNN's; the rest falls to kernels that want H heads. A wrong
    guess costs memory and time, since the plain formula takes anything; where that
    is not allowed, PyTorch refuses.
    """
    if q.device.type != "cuda":
        return True
    able = torch.cuda.get_device_capability(q.device) >= (8, 0)
    half = q.dtype in (torch.float16, torch.bfloat16)
    return able and half and not masked and grouped_kernel_allowed()


def attend(q: Tensor, k: Tensor, v: Tensor, seen: int = 0) -> Tensor:
    """Averages of v for queries q (B, H, T, Dh), of which `seen` stand before.

    k and v are (B, K, S, Dh) with S = seen + T. Gives (B, H, T, Dh).
    """
    T, mask = q.shape[2], None
    causal = seen == 0 and T > 1
    if causal and in_blocks(q):
        return BlockAttention.apply(q, k, v)
    if seen and T > 1:  # a lone new token looks at everything: no mask
        mask = causal_mask(T, seen, q.device)
    grouped = grouped_kernel(q, mask is not None)
    if not grouped:  # query heads 0 to H / K - 1 share key head 0, and so on
        share = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(share, dim=1)  # (B, H, S, Dh)
        v = v.repeat_interleave(share, dim=1)  # (B, H, S, Dh)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


class Attention(nn.Module):
    """Causal self-attention over rotated queries and keys. (B, T, D) -> (B, T, D)

    Vaswani et al. (2017), https://arxiv.org/abs/1706.03762, equation 1, with
    heads shared as in Ainslie et al. (2023), https://arxiv.org/abs/2305.13245.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * self.head_dim, bias=False)
        self.k_proj = nn.Linear(D, K * self.head_dim, bias=False)
        self.v_proj = nn.Linear(D, K * self.head_dim, bias=False)
        self.o_proj = nn.Linear(H * self.head_dim, D, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """cos and sin are (T, Dh): the rows of the table for these T positions."""
        B, T, _ = x.shape
        heads = B, T, -1, self.head_dim
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, Dh)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)

        seen = 0
        if cache is not None:
            seen = cache.length
            k, v = cache.append(k, v)  # (B, K, S, Dh)
        y = attend(q, k, v, seen)  # (B, H, T, Dh)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
