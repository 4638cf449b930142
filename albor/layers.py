# Generated from book/layers.md: edit the chapter, not this file.
"""The three small layers of a block: RMSNorm, rotary embedding, SwiGLU.

Notable:
- The computation is Llama's, operation for operation, so that weights and logits
  can be exchanged with `transformers`.
- Norms and rotations compute in float32 where their input is narrower, and in
  float64 where it is float64. They give back the type that they got.
- Nothing here has a bias. The only vector of weights is the norm's.

Shapes: B batch, T time, D width, F width inside the feed-forward network, Dh width
of a head. A dot stands for any leading dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albor.shapes import ModelConfig

__all__ = ["RMSNorm", "SwiGLU", "apply_rope", "rms_norm", "rope_table"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide every vector by its root mean square, then scale its coordinates.

    x is (., D) and weight (D,). eps sits under the root and keeps a vector of zeros
    finite. Zhang and Sennrich (2019), https://arxiv.org/abs/1910.07467, equation 4.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)  # (., 1)
    return weight * (wide * torch.rsqrt(mean_square + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight to learn, which starts at one. (., D) -> (., D)"""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_table(
    head_dim: int, length: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, (length, Dh) each, on the CPU.

    Coordinate i and coordinate i + Dh / 2 form a pair. At position t the pair turns
    by t * theta ** (-2i / Dh) radians, so both of its columns hold the same angle.
    Su et al. (2021), https://arxiv.org/abs/2104.09864, section 3.2, with the halves
    paired as in Llama's checkpoints. float32 rounds where `transformers` rounds.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"head_dim is {head_dim}: rotations turn pairs of coordinates, "
            "so it must be even and at least 2"
        )
    pairs = torch.arange(0, head_dim, 2, device="cpu").to(dtype) / head_dim
    positions = torch.arange(length, device="cpu").to(dtype)
    angles = torch.outer(positions, 1.0 / theta**pairs)  # (T, Dh / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, Dh)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of coordinates of x by its angle.

    x is (., T, Dh); cos and sin are (T, Dh), rows of a `rope_table`. The lengths of
    the vectors stay as they were, and so do dot products between equal positions.
    """
    low, high = x.chunk(2, dim=-1)
    quarter_turn = torch.cat((-high, low), dim=-1)  # each pair turned by 90 degrees
    return (x * cos + quarter_turn * sin).to(x.dtype)  # computed as wide as cos is


class SwiGLU(nn.Module):
    """Two projections up, one of them the gate of the other, and one down.

    (., D) -> (., D), by way of F = intermediate_size. Shazeer (2020),
    https://arxiv.org/abs/2002.05202, equation 6.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
