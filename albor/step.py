# Generated from book/step.md: edit the chapter, not this file.
"""One optimizer step: a batch goes in, the weights change, three numbers come out.

Notable here:
- the gradient of many micro-batches equals that of the one big batch;
- weights stay float32; matrix products run in bf16 or fp16 where that is fast;
- a step that is not finite changes no weight and no moment;
- one copy to the host per step, and a counter to prove it, GPU or no GPU.

Shapes: N sequences per step, in slices of `micro_batch`; T tokens each.
"""

import ctypes
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from albor.config import ConfigError
from albor.model import IGNORED, Albor
from albor.optimizer import clip_by_global_norm

__all__ = [
    "MIN_SCALE",
    "Copies",
    "CopyCounter",
    "StepResult",
    "count_copies",
    "free_memory",
    "has_bf16",
    "keep_freed_memory",
    "make_scaler",
    "pick_device",
    "pick_precision",
    "train_step",
]


def pick_device(name: str = "auto") -> torch.device:
    """The device to train on: "auto", "cpu", "cuda" or "cuda:N"."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    if name == "mps":
        raise ConfigError(
            "device = 'mps': Apple's GPUs are not supported; use 'cpu'"
        )
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(name)):
        raise ConfigError(
            f"device = {name!r}: unknown; use 'auto', 'cpu', 'cuda' or 'cuda:1'"
        )
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(
            f"device = {name!r}: {found} CUDA devices found; use "
            f"{'a lower number' if found else repr('cpu')}"
        )
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware itself multiplies bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def pick_precision(name: str, device: torch.device) -> str:
    """The type of the matrix products: "fp32", "bf16" or "fp16"; "auto" chooses.

    bf16 where the hardware has it, fp16 on a GPU with tensor cores but without bf16
    (Volta, Turing), fp32 elsewhere. What is asked for by name is done, slow or not;
    only a GPU that lacks bf16 refuses it.
    """
    if name not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(
            f"precision = {name!r}: unknown; use 'auto', 'fp32', 'bf16' or 'fp16'"
        )
    bf16 = has_bf16(device)
    if name == "bf16" and device.type == "cuda" and not bf16:
        raise ConfigError(
            f"precision = 'bf16': not on {device}; use 'fp16' or 'fp32'"
        )
    if name != "auto":
        return name
    if bf16:
        return "bf16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return "fp16"
    return "fp32"


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks for the next step; True if it obeyed.

    By default glibc maps a large block afresh and unmaps it on free, so every step
    pays the kernel for zeroed pages again. A process-wide setting; elsewhere (musl,
    macOS, Windows) nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers from <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No block gets a mapping of its own, and the heap is never handed back.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may still take on `device`; None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        table = dict(row.split(":", 1) for row in rows)
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:  # a container may be allowed less than the machine has
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        rows = (group / "memory.stat").read_text().splitlines()
        used = int(dict(row.split() for row in rows)["anon"])
        return max(0, min(free, limit - used))
    except (OSError, ValueError, KeyError):
        return free


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

    @property
    def skipped(self) -> bool:
        """Only the scaled gradients overflowed: fp16 is looking for its scale."""
        loss_is_sound = math.isfinite(self.loss)
        return not self.finite and loss_is_sound and self.scale > MIN_SCALE


def train_step(
    model: Albor,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    *,
    lr: float,
    grad_clip: float = 1.0,
    micro_batch: int = 0,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> StepResult:
    """Take one step on inputs and targets (N, T), `micro_batch` rows at a time.

    The loss is the mean over the N * T targets (those marked as ignored left out),
    however it is sliced; 0 means one slice. The step is refused if N is not a whole
    number of slices. Nothing changes if the loss or the gradient is not finite.
    """
    micro_batch = micro_batch or len(inputs)
    if len(inputs) % micro_batch:
        raise ConfigError(
            f"micro_batch = {micro_batch}: does not divide the {len(inputs)} "
            "sequences of a step; take a divisor"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    kind = inputs.device.type
    counted = (targets != IGNORED).sum(dim=1).double()  # (N,)
    loss = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for i in range(0, len(inputs), micro_batch):
        now = slice(i, i + micro_batch)
        with torch.autocast(kind, dtype=half) if half else nullcontext():
            part = model.loss(inputs[now], targets[now])
        part = part * (counted[now].sum() / counted.sum())  # its share of the mean
        (scaler.scale(part) if scaler else part).backward()
        loss += part.detach()
    if scaler:
        scaler.unscale_(optimizer)
    norm = clip_by_global_norm(model.parameters(), grad_clip)
    # The only wait in the step: two numbers come to the host in one copy.
    loss_now, norm_now = torch.stack([loss, norm.double()]).tolist()
    finite = math.isfinite(loss_now) and math.isfinite(norm_now)
    if finite:
        optimizer.step()
    else:
        optimizer.zero_grad(set_to_none=True)
    if scaler:
        scaler.update()  # halves after an overflow, doubles after a long calm
    clip = min(1.0, grad_clip / norm_now) if finite and norm_now else 1.0
    scale = scaler.get_scale() if scaler else 1.0
    return StepResult(loss_now, norm_now, clip, finite, scale)


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
