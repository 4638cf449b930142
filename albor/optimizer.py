# Generated from book/optimizer.md: edit the chapter, not this file.
"""Learning rate, AdamW, gradient clipping: what turns gradients into updates.

Notable:
- the schedule is a pure function of the step; its horizon is the run's real length
- every parameter is in exactly one group, and the groups keep the parameters' names
- AdamW is PyTorch's own, fused where the device has a fused kernel
- clipping measures one norm over all gradients and never waits for the device
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from albor.config import OptimizerConfig, Recipe

__all__ = [
    "build_optimizer",
    "clip_by_global_norm",
    "lr_at",
    "parameter_groups",
    "scheduled_rate",
]


def lr_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    max_steps: int,
    min_ratio: float = 0.1,
    scheduler: str = "cosine",
) -> float:
    """The learning rate of update number `step`; the first update is number 0.

    `peak` is the highest rate, `max_steps` the number of updates that the run will
    really make, `min_ratio * peak` the floor, reached exactly at the last update.
    """
    if scheduler not in ("cosine", "linear", "constant"):
        raise ValueError(
            f"scheduler is {scheduler!r}; use 'cosine', 'linear' or 'constant'"
        )
    if step < 0 or max_steps < 1 or not 0 <= warmup_steps <= max_steps:
        raise ValueError(
            "need step >= 0, max_steps >= 1, 0 <= warmup_steps <= max_steps; got "
            f"step={step}, max_steps={max_steps}, warmup_steps={warmup_steps}"
        )
    # 1. Warm-up: a straight line, never zero, at the peak on its last update.
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    # 2. A constant rate stays at the peak.
    if scheduler == "constant":
        return peak
    # 3. The last update, and whatever is asked for after it, is at the floor.
    floor = min_ratio * peak
    if step >= max_steps - 1:
        return floor
    # 4. In between, half a cosine wave or a line runs from the peak to the floor.
    progress = (step - warmup_steps) / (max_steps - 1 - warmup_steps)
    wave = (1 + math.cos(math.pi * progress)) / 2
    share = 1 - progress if scheduler == "linear" else wave
    return share * peak + (1 - share) * floor


def scheduled_rate(recipe: Recipe, step: int) -> float:
    """The learning rate that a recipe asks for at a step."""
    plan = recipe.training
    return lr_at(
        step,
        peak=recipe.optimizer.lr,
        warmup_steps=plan.warmup_steps,
        max_steps=plan.max_steps,
        min_ratio=plan.min_lr_ratio,
        scheduler=plan.lr_scheduler,
    )


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: str = "matrices"
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into a decayed and an undecayed group.

    `decay="matrices"` decays what has two dimensions: the projections, and the
    embedding, which is the output matrix too. `decay="all"` decays everything, as
    the model card does. Each group holds `(name, parameter)` pairs, a form that
    `torch.optim` takes; a tied tensor appears once, an empty group not at all.
    """
    if decay not in ("matrices", "all"):
        raise ValueError(f"decay is {decay!r}; use 'matrices' or 'all'")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no parameter that requires a gradient")
    decayed = [(name, p) for name, p in named if decay == "all" or p.dim() == 2]
    kept = [(name, p) for name, p in named if not (decay == "all" or p.dim() == 2)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, every hyper-parameter taken from `config`.

    The fused kernel reads and writes a weight and its moments once an update; the
    default makes a pass over memory for every arithmetic operation.
    """
    if config.name != "adamw":
        raise ValueError(
            f"optimizer.name is {config.name!r}, and this builds 'adamw'; "
            "albor.muon.make_optimizer builds what the recipe names"
        )
    groups = parameter_groups(model, config.weight_decay, config.decay)
    devices = {p.device.type for group in groups for _, p in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=devices <= {"cpu", "cuda"},
        capturable=devices == {"cuda"},  # a CUDA graph may record the update
    )


@torch.no_grad()
def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], max_norm: float
) -> Tensor:
    """Shrink all gradients by one factor, to a joint norm of at most `max_norm`.

    Returns the norm from before, a scalar on the gradients' device; nothing here
    reads it back, so nothing waits. `math.inf` measures, never clips. If the norm
    is not finite, the gradients are left alone: look at it, and do not step.
    """
    if not max_norm > 0:
        raise ValueError(
            f"max_norm is {max_norm}, but must be above 0 (math.inf: no clip)"
        )
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # The factor is min(1, max_norm / norm). Zero in place of a norm that is not
    # finite makes it 1, decided on the device.
    usable = torch.where(torch.isfinite(norm), norm, torch.zeros_like(norm))
    clip_grads_with_norm_(parameters, max_norm, usable)
    return norm
