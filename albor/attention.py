# Generated from book/attention.md: edit the chapter, not this file.
"""Causal grouped-query attention, and the cache that makes decoding cheap.

Notable:
- H query heads share K heads of keys and values, each of them H / K times. The
  cache holds K heads, so it is H / K times smaller than with a key per query head.
- PyTorch's fused kernels do the work, and where one applies no (T, T) matrix is
  kept for the backward pass. `grouped_kernel` says which kernel takes what.
- One rule gives the mask, with a cache or without: a token sees its own position
  and those before it, and positions count from the start of the cache.

Shapes: B batch, T new tokens, S tokens to look at (cached and new), D width, H
heads, K key/value heads, Dh width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albor.layers import apply_rope
from albor.shapes import ModelConfig

__all__ = ["Attention", "KVCache", "causal_mask", "grouped_kernel"]


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
    on; the rest falls to kernels that want H heads. Either way the result is right:
    a wrong guess costs memory and time, since the plain formula takes anything.
    """
    if q.device.type != "cuda":
        return True
    flash = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return flash and not masked and q.dtype in (torch.float16, torch.bfloat16)


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

        seen, mask = 0, None
        if cache is not None:
            seen = cache.length
            k, v = cache.append(k, v)  # (B, K, S, Dh)
            if seen and T > 1:  # a lone new token looks at everything: no mask
                mask = causal_mask(T, seen, x.device)

        grouped = grouped_kernel(q, mask is not None)
        if not grouped:  # query heads 0 to H / K - 1 share key head 0, and so on
            share = q.shape[1] // k.shape[1]
            k = k.repeat_interleave(share, dim=1)  # (B, H, S, Dh)
            v = v.repeat_interleave(share, dim=1)  # (B, H, S, Dh)
        causal = seen == 0 and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )  # (B, H, T, Dh)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
