# Generated from book/profiling.md: edit the chapter, not this file.
"""Where a step's time goes, what it copies, and how often the host waits.

Notable here:
- one source: the trace file that PyTorch's profiler writes. What is sorted and
  counted here, anybody can sort and count again from that file;
- sorting takes plain records, so that a GPU's names are tested without a GPU;
- a profiler that saw nothing is an error, and not a count of zero.
"""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from albor.step import count_copies

__all__ = [
    "CALLS",
    "GPU",
    "HOST",
    "MARK",
    "PARTS",
    "RULES",
    "WAITS",
    "WITHIN",
    "Events",
    "Parts",
    "Record",
    "collect",
    "count_events",
    "own_times",
    "part_of",
    "read_trace",
    "refuse_waits",
    "sort_events",
    "sort_parts",
    "step_parts",
    "window",
]


MARK = "albor: the work"  # what is timed lies between its beginning and its end
HOST = ("cpu_op", "user_annotation")
GPU = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")


class Record(NamedTuple):
    """One event of a trace; times in microseconds."""

    name: str
    kind: str  # one of HOST, GPU or CALLS
    start: float = 0.0
    duration: float = 0.0
    size: int = 0  # bytes, of a copy
    thread: str = ""  # of the host, or stream of the GPU
    link: int = 0  # from a kernel to the operation that launched it

    @property
    def end(self) -> float:
        return self.start + self.duration


def read_trace(path: str | Path) -> list[Record]:
    """The events of a trace in Chrome's format, as `export_chrome_trace` writes."""
    records = []
    for event in json.loads(Path(path).read_text())["traceEvents"]:
        if event.get("ph") != "X" or event.get("cat") not in HOST + GPU + CALLS:
            continue
        args, thread = event["args"], f"{event['pid']}/{event['tid']}"
        size, link = int(args.get("bytes", 0)), int(args.get("External id", 0))
        start, duration = float(event["ts"]), float(event["dur"])
        record = (event["name"], event["cat"], start, duration, size, thread, link)
        records.append(Record(*record))
    return records


def collect(
    work: Callable[[], object], device: torch.device, keep: str | Path = ""
) -> list[Record]:
    """Call `work` once under the profiler; `keep` is a path for the trace file.

    Let it warm up before: a first call also compiles, allocates and loads.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no chatter on the terminal
    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)  # what was queued before is not of this work
    with profile(activities=kinds, acc_events=True) as seen, record_function(MARK):
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(keep or Path(folder) / "trace.json")
        seen.export_chrome_trace(str(path))
        records = read_trace(path)
    if device.type == "cuda" and not any(record.kind in GPU for record in records):
        raise RuntimeError(
            f"the profiler saw nothing on {device}: the work does not use it, or "
            "the driver lets only administrators profile; nothing can be counted"
        )
    return records


def window(records: Iterable[Record]) -> Record:
    """The stretch of time in which the work was done."""
    for record in records:
        if record.name == MARK and record.kind == "user_annotation":
            return record
    raise ValueError(f"no event {MARK!r} in the trace: make it with `collect`")


RULES = (  # the first that is found in the name decides
    ("other", r"^(torch::)?autograd::|^[A-Z]\w*Backward\d*$|^Optimizer\.zero_grad"),
    ("matrix products", r"^triton_(tem|mm)_"),
    ("softmax and loss", r"^triton_\w*(softmax|logsumexp|nll_loss|cross_entropy)"),
    ("optimizer and clip", r"^triton_for_|^triton_\w*foreach"),
    ("elementwise and norms", r"^triton_|[Cc]ompiled"),
    ("attention", r"[Ff]lash|fmha|sdpa|scaled_dot_product|cudnn.*fusion|^Block"),
    ("optimizer and clip", r"multi_tensor|[Aa]dam|_foreach_|^Optimizer\.step"),
    ("matrix products", r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK|^mkl.*linear"),
    ("matrix products", r"^aten::(mm|bmm|addmm|baddbmm|mv|addmv|dot|_scaled_mm)$"),
    ("communication", r"nccl|gloo|c10d"),
    ("softmax and loss", r"[Ss]oft[Mm]ax|nll_loss|cross_entropy|CrossEntropy"),
    ("memory set", r"[Mm]emset|[Ff]ill|^aten::zero"),
    ("copies and casts", r"[Mm]emcpy|[Cc]opy|^aten::(cat|clone|contiguous)$"),
    ("other", r"^aten::(\w*view|reshape|slice|narrow|as_strided|t(ranspose)?|to)$"),
    ("other", r"^aten::(expand|select|split|detach|empty\w*|item|linear|matmul)$"),
    ("elementwise and norms", r"^aten::|at::native|elementwise|reduce_kernel"),
)
WITHIN = (  # what a caller's name says of the small operations that it calls
    ("attention", r"scaled_dot_product|ScaledDotProduct|BlockAttention"),
    ("optimizer and clip", r"Optimizer\.step|_foreach_"),
    ("softmax and loss", r"cross_entropy|CrossEntropy|log_softmax|nll_loss"),
)
PARTS = (*dict.fromkeys(part for part, _ in RULES if part != "other"), "other")


def part_of(name: str, callers: str = "") -> str:
    """The part of a step to which an operation or a kernel of this name belongs.

    Callers decide for the small ones: a cast within the loss counts as loss. A
    matrix product stays one there, and within attention counts as attention.
    """
    part = next((part for part, rule in RULES if re.search(rule, name)), "other")
    for other, rule in WITHIN[:1] if part == "matrix products" else WITHIN:
        if re.search(rule, callers):
            return other
    return part


def own_times(records: Iterable[Record]) -> list[tuple[Record, float, str]]:
    """Host events, each with its time less that of events within, and callers."""
    host = [record for record in records if record.kind in HOST]
    host.sort(key=lambda r: (r.thread, r.start, -r.duration))
    own, callers = [record.duration for record in host], [""] * len(host)
    stack: list[int] = []  # the events that are open
    for i, record in enumerate(host):
        while stack and (
            host[stack[-1]].thread != record.thread
            or host[stack[-1]].end <= record.start
        ):
            stack.pop()
        if stack:
            own[stack[-1]] -= record.duration
            callers[i] = f"{host[stack[-1]].name} < {callers[stack[-1]]}"
        stack.append(i)
    return list(zip(host, own, callers, strict=True))


@dataclass(frozen=True)
class Parts:
    """Where the time of some work went. On a GPU: its time, not the host's."""

    seconds: float  # from the first event to the end of the last
    parts: dict[str, tuple[float, int]]  # part: seconds, operations or kernels
    gaps: float  # seconds in which nothing ran: Python, or an idle GPU
    attention_kernels: tuple[str, ...]  # the names of those that ran

    def rates(self, flops: dict[str, int]) -> dict[str, float]:
        """FLOPs a second of those parts whose FLOPs, of all the work, are given."""
        return {k: n / self.parts[k][0] for k, n in flops.items()}

    def table(self) -> str:
        """One line for each part: milliseconds, share of the whole, number."""
        rows = {**self.parts, "gaps": (self.gaps, 0), "in all": (self.seconds, 0)}
        return "\n".join(
            f"{name:22} {1e3 * seconds:9.2f} ms {seconds / self.seconds:7.1%} "
            f"{number or '':>6}"
            for name, (seconds, number) in rows.items()
        )


def sort_parts(records: list[Record]) -> Parts:
    """Sort a trace into parts: GPU events where there are any, else the host's.

    Times of kernels that overlap on two streams add up to more than the whole.
    """
    spans, whole = own_times(records), window(records)
    begin, end = whole.start, whole.end
    if gpu := [record for record in records if record.kind in GPU]:
        begin, end = min(r.start for r in gpu), max(r.end for r in gpu)
        by = {r.link: f"{r.name} < {c}" for r, _, c in spans if r.link}
        timed = [(r, r.duration, by.get(r.link, "")) for r in gpu]
    else:
        timed = [s for s in spans if s[0].thread == whole.thread and MARK in s[2]]
    found, kernels = {part: (0.0, 0) for part in PARTS}, set()
    for record, duration, callers in timed:
        seconds, number = found[part := part_of(record.name, callers)]
        found[part] = seconds + duration * 1e-6, number + 1
        if part_of(record.name) == "attention":
            kernels.add(record.name)
    busy, reached = 0.0, begin  # the union of intervals that may overlap
    for start, stop in sorted((record.start, record.end) for record, _, _ in timed):
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    found = {part: had for part, had in found.items() if had[1]}
    length, gaps = (end - begin) * 1e-6, (end - begin - busy) * 1e-6
    return Parts(length, found, gaps, tuple(sorted(kernels)))


def step_parts(work: Callable[[], object], device: torch.device) -> Parts:
    """Run `work` once under the profiler and sort its time into parts.

    On CUDA take a few steps as the work: the GPU's idle time between two steps is
    seen only where there are two.
    """
    return sort_parts(collect(work, device))


WAITS = r"^cu\w*Synchronize|^cudaMemcpy$|^cudaFree(Host)?$"


@dataclass(frozen=True)
class Events:
    """What some work copied, and how often the host stood still for the device."""

    copies: dict[str, tuple[int, int]] = field(default_factory=dict)  # see `number`
    waits: dict[str, int] = field(default_factory=dict)  # call: how often
    launches: int = 0  # of kernels, and of graphs of them

    def number(self, kind: str) -> int:
        """How many copies of a kind: "HtoD", "DtoH", "DtoD" or "PtoP"."""
        return self.copies.get(kind, (0, 0))[0]


def sort_events(records: list[Record]) -> Events:
    """Count the copies of a trace by kind, and the calls for which its host waited.

    Calls outside the marked stretch do not count: there the profiler waits itself.
    """
    whole = window(records)
    copies: dict[str, tuple[int, int]] = {}
    for record in (record for record in records if record.kind == "gpu_memcpy"):
        found = re.search(r"\wto\w", record.name)  # as in "Memcpy HtoD (..."
        kind = found[0] if found else record.name
        number, size = copies.get(kind, (0, 0))
        copies[kind] = number + 1, size + record.size
    inside = (r for r in records if whole.start <= r.start <= whole.end)
    calls = Counter(record.name for record in inside if record.kind in CALLS)
    waits = {name: n for name, n in calls.items() if re.search(WAITS, name)}
    launches = sum(n for name, n in calls.items() if re.search("Launch", name))
    return Events(dict(sorted(copies.items())), waits, launches)


def count_events(work: Callable[[], object], device: torch.device) -> Events:
    """Run `work` once and count its copies and waits; warm it up before.

    On CUDA by the profiler. Elsewhere `count_copies` says what PyTorch was asked
    to copy, on the device "meta" too; waits and launches remain unknown: empty.
    """
    if device.type == "cuda":
        return sort_events(collect(work, device))
    seen = count_copies(work)
    both = {"DtoH": (seen.down, seen.down_bytes), "HtoD": (seen.up, seen.up_bytes)}
    return Events({kind: pair for kind, pair in both.items() if pair[0]})


def refuse_waits(work: Callable[[], object], device: torch.device) -> None:
    """Run `work`; on CUDA, PyTorch raises an error at the first wait in it.

    It knows the waits of its own operations, not a `torch.cuda.synchronize()`.
    """
    if device.type != "cuda":
        work()
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
