# Generated from book/muon.md: edit the chapter, not this file.
"""Muon: momentum, made orthogonal, for the matrices of the blocks; AdamW elsewhere.

Notable:
- one optimizer object; a group's `rule` says which of the two moves it
- five Newton-Schulz steps in place of a singular value decomposition, many matrices
  at once, in bf16 on a GPU that has it
- updates have the size of AdamW's, so one learning rate serves both
- a step that is not finite changes nothing, and nobody waits to find out

Shapes: a matrix is (R, C), a stack of them (N, R, C).
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from albor.config import OptimizerConfig
from albor.optimizer import build_optimizer

__all__ = [
    "COEFFICIENTS",
    "SIZE",
    "STACK",
    "Muon",
    "block_matrices",
    "make_optimizer",
    "orthogonalize",
]


COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pull all singular values of matrices (..., R, C) to about one (0.7 to 1.2).

    The quintic Newton-Schulz iteration of Jordan (2024), computed in `dtype`; the
    result has the type of the input. Zeros stay zeros; a singular value below about
    a hundredth of the Frobenius norm is lifted 3.44-fold a step and may fall short.
    """
    if matrices.dim() < 2:
        raise ValueError(
            f"a tensor of shape {tuple(matrices.shape)} has no singular values; "
            "give Muon matrices, and AdamW the rest"
        )
    a, b, c = COEFFICIENTS
    x = matrices.reshape(-1, *matrices.shape[-2:])
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the products of the shorter side are cheaper
    size = torch.linalg.matrix_norm(x, keepdim=True)  # no singular value is above
    x = (x / size.clamp(min=1e-7)).to(dtype)
    for _ in range(steps):  # baddbmm rounds a sum and its product once, not twice
        gram = x @ x.mT
        slope = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, slope, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


SIZE = 0.2  # root mean square of an update, in learning rates: about AdamW's
STACK = 8  # matrices handled at once: many small products, bounded memory


class Muon(torch.optim.Optimizer):
    """Muon for the matrices named in `names`, the given AdamW for all the rest.

    The groups of `adam` are shared out: what moves by Muon has `rule: "muon"` and a
    `momentum`, and keeps rate and decay; the others have `rule: "adamw"`. The state
    of a matrix is its `momentum_buffer` alone. `found_inf`, set to a tensor above
    zero, makes `step` change nothing, without waiting for the device.
    """

    def __init__(
        self,
        adam: torch.optim.AdamW,
        names: set[str],
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        groups: list[dict[str, Any]] = []
        for group in adam.param_groups:
            pairs = list(zip(group["param_names"], group["params"], strict=True))
            matrices = [(name, p) for name, p in pairs if name in names]
            others = [(name, p) for name, p in pairs if name not in names]
            if odd := [name for name, p in matrices if p.dim() != 2]:
                raise ValueError(f"{odd[0]} is not a matrix; leave it to AdamW")
            own = {key: group[key] for key in ("lr", "weight_decay")}
            own |= {"rule": "muon", "momentum": momentum, "params": matrices}
            groups += [own, {**group, "rule": "adamw", "params": others}]
        groups = [group for group in groups if group["params"]]
        known = {name for group in groups for name, _ in group["params"]}
        if not names <= known:
            raise ValueError(f"AdamW does not hold {sorted(names - known)[0]}")
        for group in groups:
            group.pop("param_names", None)  # made anew from the pairs
        super().__init__(groups, {})
        self.adam, self.dtype = adam, dtype
        # PyTorch's mark of an optimizer that heeds `found_inf`; fused AdamW has it.
        mark = "_step_supports_amp_scaling"
        self._step_supports_amp_scaling = getattr(adam, mark, False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one update from the gradients that are there."""
        if closure is not None:
            raise ValueError("Muon takes no closure; compute the gradients before")
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError("gradients are scaled; call scaler.unscale_ before")
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["rule"] == "muon":
                alike: dict[torch.Size, list[Tensor]] = {}
                for p in group["params"]:
                    if p.grad is not None:
                        alike.setdefault(p.shape, []).append(p)
                for some in alike.values():
                    for i in range(0, len(some), STACK):
                        self.move(some[i : i + STACK], group, bad)
        # AdamW works on our groups and state: there is no second copy of either.
        adam: Any = self.adam
        adam.param_groups = [g for g in self.param_groups if g["rule"] == "adamw"]
        adam.state, adam.found_inf = self.state, bad
        adam.step()

    def move(
        self, some: list[Tensor], group: dict[str, Any], bad: Tensor | None
    ) -> None:
        """Apply Muon's rule to matrices of one shape, stacked to (N, R, C)."""
        for p in some:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mu, lr = group["momentum"], group["lr"]
        buffers = [self.state[p]["momentum_buffer"] for p in some]
        old, weights = torch.stack(buffers), torch.stack(some)
        new = torch.stack([p.grad for p in some if p.grad is not None])
        mean = mu * old + (1 - mu) * new
        ahead = mu * mean + (1 - mu) * new  # Nesterov's
        turned = orthogonalize(ahead, dtype=self.dtype)
        size = SIZE * math.sqrt(max(weights.shape[1:]))
        moved = (1 - lr * group["weight_decay"]) * weights - lr * size * turned
        if bad is not None:  # a choice on the device: the host need not know
            mean = torch.where(bad > 0, old, mean)
            moved = torch.where(bad > 0, weights, moved)
        for p, buffer, m, w in zip(some, buffers, mean, moved, strict=True):
            buffer.copy_(m)
            p.copy_(w)


def block_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices inside the blocks: no embedding, no norm."""
    named = model.named_parameters()
    return {name for name, p in named if p.dim() == 2 and "layers." in name}


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, bf16: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that the recipe names: AdamW, or Muon with AdamW.

    `bf16`: whether Newton-Schulz computes in bf16, as a run does whose matrix
    products are in bf16; otherwise in float32.
    """
    adam = build_optimizer(model, dataclasses.replace(config, name="adamw"))
    if config.name == "adamw":
        return adam
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Muon(adam, block_matrices(model), config.momentum, dtype)
