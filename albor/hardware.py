# Generated from book/hardware.md: edit the chapter, not this file.
"""What the machine can do: device, precision, attention kernel, memory.

Notable here:
- what cannot be served is refused by name, with the way out;
- on Linux, glibc is told to keep the memory that the next step will ask for again;
- when memory runs out, the error says what was asked, was free, and may change.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from albor.shapes import ConfigError, suggest

__all__ = [
    "KERNELS",
    "UNITS",
    "OutOfMemory",
    "attention_kernel",
    "bytes_asked",
    "free_memory",
    "has_bf16",
    "keep_freed_memory",
    "make_deterministic",
    "memory_explained",
    "pick_device",
    "pick_precision",
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
    # PyTorch's own questions, private ones: where one is gone, the answer is no.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


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


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernel(name: str = "auto") -> AbstractContextManager[None]:
    """A `with` block in which attention runs on one kernel; "auto": PyTorch picks.

    If that kernel cannot take the shapes, PyTorch raises inside the block.
    """
    if name == "auto":
        return nullcontext()
    if name not in KERNELS:
        known = ["auto", *KERNELS]
        raise ConfigError(f"attention = {name!r}: unknown; {suggest(name, known)}")
    return sdpa_kernel(KERNELS[name])


def make_deterministic() -> None:
    """Ask for kernels that give the same bits every time, for this process.

    On a CPU ours do anyway. On CUDA some kernels add in the order in which threads
    arrive; the others cost time. To be called before the first product on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory helps to find reads of it; we have none, and it costs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore


class OutOfMemory(RuntimeError):
    """The device has no room for what a step asked for."""


UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bytes_asked(error: BaseException) -> int | None:
    """The bytes that a failed allocation asked for; None for any other error.

    PyTorch says it in words: an error of its own on CUDA, a `RuntimeError` itself
    on a CPU. A Python `MemoryError` does not say: 0. Errors of other classes that
    quote one have their own advice to give.
    """
    if isinstance(error, MemoryError):
        return 0
    if type(error) not in (RuntimeError, torch.OutOfMemoryError):
        return None
    found = re.search(
        r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)",
        str(error),
        re.IGNORECASE,
    )
    return int(float(found[1]) * UNITS[found[2]]) if found else None


@contextmanager
def memory_explained(device: torch.device, mend: str) -> Iterator[None]:
    """Turn a failed allocation in the block into an `OutOfMemory` that helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        asked = bytes_asked(error)
        if asked is None:
            raise
        free = free_memory(device)
        there = "unknown" if free is None else f"{free:,}"
        wanted = f"{asked:,} bytes" if asked else "how much is not said"
        raise OutOfMemory(
            f"no memory left on {device}: wanted: {wanted}; free: {there}. {mend}"
        ) from error
