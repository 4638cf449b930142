"""Half of the backward pass of a matrix product, tiled, in Triton.

Of c (m, n) = a (m, k) @ b (k, n) it makes grad_a (m, k) = grad_c (m, n) @ b^T.

Notable:
- The kernel is right. It is built for one shape, as the original's was: N and K of
  the builder become strides in the code, m, n and k of the launch are its guards.
- Nothing checks the one against the other. `BackwardA(m, k, n)`, launched with m, n
  and k, is the bug ALB-059: every guard holds, and rows land at wrong addresses.
- Where there is no GPU, Triton interprets the kernel on the CPU, slowly. It must be
  told so before it is imported.
"""

import os

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl


@triton.jit
def backward_a(
    grad_c,  # (m, n), rows N apart
    b,  # (k, n), rows N apart
    grad_a,  # (m, k), rows K apart
    m,
    n,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program makes one TILE x TILE piece of grad_a."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, N, TILE):
        across = start + tl.arange(0, TILE)[None, :]
        down = start + tl.arange(0, TILE)[:, None]
        left = tl.load(
            grad_c + row * N + across, mask=(row < m) & (across < n), other=0.0
        )
        right = tl.load(b + col * N + down, mask=(col < k) & (down < n), other=0.0)
        total += tl.dot(left, right, input_precision="ieee")
    tl.store(grad_a + row * K + col, total, mask=(row < m) & (col < k))


class BackwardA:
    """Built once for a shape, launched many times. The order is m, n, k."""

    def __init__(self, m: int, n: int, k: int, tile: int = 16) -> None:
        self.N, self.K, self.tile = n, k, tile

    def __call__(
        self, grad_c: Tensor, b: Tensor, grad_a: Tensor, m: int, n: int, k: int
    ) -> None:
        """Write grad_a; the launch is for m, n, k, whatever it was built for."""
        grid = triton.cdiv(m, self.tile), triton.cdiv(k, self.tile)
        backward_a[grid](
            grad_c, b, grad_a, m, n, k, N=self.N, K=self.K, TILE=self.tile
        )
