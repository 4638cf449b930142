"""The decoder again, as one would write it on an afternoon: an arm to compare with.

Plain `torch` modules in the manner of nanoGPT and with Llama's parameter names: one
fused attention call, all logits at once, cross-entropy from `torch`. The
mathematics is Albor's; none of its choices for speed are here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albor.shapes import ModelConfig


class Norm(nn.Module):
    """Root-mean-square norm in float32."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.weight, self.eps = (
            nn.Parameter(torch.ones(c.hidden_size)),
            c.rms_norm_eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + Dh / 2) of x, (B, H, T, Dh)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention; keys and values are repeated for their query heads."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.shared = c.num_attention_heads, c.num_key_value_heads
        D, Dh = c.hidden_size, c.head_dim
        self.q_proj = nn.Linear(D, self.heads * Dh, bias=False)
        self.k_proj = nn.Linear(D, self.shared * Dh, bias=False)
        self.v_proj = nn.Linear(D, self.shared * Dh, bias=False)
        self.o_proj = nn.Linear(self.heads * Dh, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.shared, -1).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.shared, -1).transpose(1, 2)
        share = self.heads // self.shared
        q, k = turn(q, cos, sin), turn(k, cos, sin).repeat_interleave(share, dim=1)
        v = v.repeat_interleave(share, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward network, each added to what it reads."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(c), Norm(c)
        self.self_attn, self.mlp = SelfAttention(c), FeedForward(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Plain(nn.Module):
    """Ids and targets (B, T) to the mean cross-entropy."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.model = nn.Module()  # for the names that the weights have
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.norm = Norm(c)
        self.model.layers = nn.ModuleList(
            Layer(c) for _ in range(c.num_hidden_layers)
        )
        rates = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings), rates)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        model: Any = self.model
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = model.embed_tokens(ids)
        for layer in model.layers:
            x = layer(x, cos, sin)
        logits = F.linear(model.norm(x), model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
