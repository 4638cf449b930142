# Generated from book/step.md: edit the chapter, not this file.
"""One optimizer step: a batch goes in, the weights change, four numbers come out.

Notable here:
- the gradient of many micro-batches equals that of the one big batch;
- weights stay float32; matrix products run in bf16 or fp16 where that is fast;
- a step that is not finite changes no weight, no moment and no count of steps;
- nothing in a step waits for the device, and a counter proves it, GPU or no GPU.

Shapes: N sequences per step, in slices of `micro_batch`; T tokens each.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from albor.config import ConfigError
from albor.hardware import free_memory as free_memory  # what a step needs to
from albor.hardware import has_bf16 as has_bf16  # know of the machine can be had
from albor.hardware import keep_freed_memory as keep_freed_memory  # from here
from albor.hardware import pick_device as pick_device
from albor.hardware import pick_precision as pick_precision
from albor.model import IGNORED, Albor
from albor.optimizer import clip_by_global_norm

__all__ = [
    "MIN_SCALE",
    "Copies",
    "CopyCounter",
    "MetaAdamW",
    "StepResult",
    "count_copies",
    "enqueue_step",
    "make_scaler",
    "train_step",
]


MIN_SCALE = 1.0  # below it, fp16's loss scale is not what is wrong


def make_scaler(
    precision: str, device: torch.device
) -> torch.amp.GradScaler | None:
    """A loss scale for fp16, starting at 65,536; None where none is needed."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


@dataclass(frozen=True)
class StepResult:
    """What one step did, in plain numbers."""

    loss: float  # mean over all tokens of the step, in nats, before the update
    grad_norm: float  # global norm, before clipping
    clip: float  # what the gradients were multiplied by: 1.0 if left alone
    finite: bool  # False: nothing was changed
    scale: float  # fp16's loss scale after the step; 1.0 without one

    @classmethod
    def of(cls, numbers: Sequence[float], grad_clip: float) -> "StepResult":
        """From the four numbers of `enqueue_step`, on the host."""
        loss, norm, finite, scale = numbers
        clip = min(1.0, grad_clip / norm) if finite and norm else 1.0
        return cls(loss, norm, clip, bool(finite), scale)

    @property
    def skipped(self) -> bool:
        """Only the scaled gradients overflowed: fp16 is looking for its scale."""
        loss_is_sound = math.isfinite(self.loss)
        return not self.finite and loss_is_sound and self.scale > MIN_SCALE


def enqueue_step(
    model: Albor,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    grad_clip: float = 1.0,
    micro_batch: int = 0,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Put one step on inputs and targets (N, T) into the device's queue.

    Returns loss, gradient norm, finite (1 or 0) and loss scale: float64 (4,) on the
    device. The loss is the mean over the N * T targets (ignored ones left out),
    however they are sliced: `micro_batch` rows at a time, 0 means all. `loss`
    stands in for `model.loss`: a compiled one, or one that shares gradients with
    other ranks, and then `reduce` sums a tensor over them, in place.

    Nothing changes if loss or gradient is not finite. Nothing waits, but for an
    optimizer that has no `found_inf`: there the flag comes to the host.
    """
    micro_batch = micro_batch or len(inputs)
    if len(inputs) % micro_batch:
        raise ConfigError(
            f"micro_batch = {micro_batch}: does not divide the {len(inputs)} "
            "sequences of a step; take a divisor"
        )
    loss = loss or model.loss
    share = (targets != IGNORED).sum(dim=1).double()  # (N,): targets that count
    count, total = share.sum(), torch.zeros_like(share[0])
    if reduce:
        reduce(count)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    kind = inputs.device.type
    optimizer.zero_grad(set_to_none=True)
    for i in range(0, len(inputs), micro_batch):
        now, last = slice(i, i + micro_batch), i + micro_batch == len(inputs)
        quiet = nullcontext() if last else getattr(loss, "no_sync", nullcontext)()
        narrow = torch.autocast(kind, dtype=half) if half else nullcontext()
        with quiet, narrow:
            part = loss(inputs[now], targets[now])
        part = part * (share[now].sum() / count)  # its share of the mean
        (scaler.scale(part) if scaler else part).backward()
        total += part.detach()
    if reduce:
        reduce(total)
    if scaler:
        scaler.unscale_(optimizer)
    norm = clip_by_global_norm(model.parameters(), grad_clip)
    finite = torch.isfinite(total) & torch.isfinite(norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # PyTorch's own way to tell it, on the device: no wait.
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()
    scale = torch.ones_like(total)
    if scaler:
        scaler.update()  # halves after an overflow, doubles after a long calm
        scale = scaler.scale(scale)
    return torch.stack([total, norm.double(), finite.double(), scale.double()])


def train_step(
    model: Albor,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    lr: float,
    grad_clip: float = 1.0,
    **options: Any,
) -> StepResult:
    """Take one step at the rate `lr`, and wait. `options`: of `enqueue_step`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    row = enqueue_step(
        model, optimizer, inputs, targets, grad_clip=grad_clip, **options
    )
    return StepResult.of(row.tolist(), grad_clip)


@dataclass
class Copies:
    """How often, and how many bytes, went to a device and came back from it."""

    up: int = 0
    down: int = 0
    up_bytes: int = 0
    down_bytes: int = 0


class CopyCounter(TorchDispatchMode):
    """Sees every operation inside its `with` block; counts those that cross over.

    On the device "meta", whose tensors have shapes and no numbers, zeros come down:
    a dry run of any size on any machine. Not seen: what an operation copies inside
    itself, such as an index on the host into a tensor on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = Copies()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, aten, copies = kwargs or {}, torch.ops.aten, self.copies
        source = target = None
        if func is aten._to_copy.default:
            source, target = (
                args[0],
                torch.device(kwargs.get("device") or args[0].device),
            )
        elif func is aten.copy_.default:
            source, target = args[1], args[0].device
        elif func is aten._local_scalar_dense.default:
            source, target = args[0], torch.device("cpu")
        if source is None or target is None or source.device.type == target.type:
            return func(*args, **kwargs)
        size = source.numel() * source.element_size()
        if target.type != "cpu":
            copies.up, copies.up_bytes = copies.up + 1, copies.up_bytes + size
            return func(*args, **kwargs)
        copies.down, copies.down_bytes = copies.down + 1, copies.down_bytes + size
        if source.device.type != "meta":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=source.dtype).item()
        if func is aten.copy_.default:
            return args[0].zero_()
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)


def count_copies(work: Callable[[], object]) -> Copies:
    """Call `work` and count the copies between host and device that it asks for."""
    with CopyCounter() as counter:
        work()
    return counter.copies


class MetaAdamW(torch.optim.AdamW):
    """AdamW for rehearsals on "meta", which lacks the fused kernel.

    Like that one it asks for no value: not of the flag, nor of a rate in a tensor.
    """

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> Any:
        self.found_inf, rates = None, [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
