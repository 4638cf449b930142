"""Run one arm of `benchmarks.training` in this process, and say what it took.

    python -m benchmarks.measure ARM JOB

Builds and compiles the arm and prints a line of JSON with its status. Then it takes
one turn for every line that it reads, and prints what it measured, as JSON again.
Arms on one GPU compile side by side. One at a time has the use of the device, for
its first step or its turn: there is a lock for that, and then it frees its memory.
"""

import ctypes
import dataclasses
import faulthandler
import fcntl
import gc
import json
import math
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from albor.ceilings import ceilings as measured_ceilings
from albor.config import ModelConfig
from albor.hardware import free_memory, keep_freed_memory
from albor.profiling import GPU, collect, sort_events, sort_parts
from albor.resident import collection_paused
from albor.shapes import memory_estimate, parameter_shapes
from benchmarks.arms import ARMS, Job, Loop, Unavailable


def wait(device: str) -> None:
    """Until the device has done all that it was asked to."""
    if device != "cpu":
        torch.cuda.synchronize()


class Clock:
    """Marks in time: on a GPU in its own queue, where nobody waits for them."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Here ends one step and begins the next."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between one mark and the next."""
        pairs = pairwise(self.marks)
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1000 * (b - a) for a, b in pairs]


class Lock:
    """The GPU, for one process at a time, while others compile.

    Who has it for more than `hold` seconds is ended, also when it hangs in C, and
    so lets it go; the stack it hung with is in its errors. 0: no limit.
    """

    def __init__(self, device: str, hold: float = 0.0) -> None:
        self.file, self.hold, self.waited = None, hold, 0.0  # seconds
        if device != "cpu":
            number = torch.device(device).index or 0
            name = f"albor-{os.getuid()}-cuda-{number}.lock"
            self.file = (Path(tempfile.gettempdir()) / name).open("w")

    def take(self) -> None:
        """Wait for it; again, it is ours already."""
        began = time.perf_counter()
        if self.file:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            if self.hold:
                faulthandler.dump_traceback_later(self.hold, exit=True)
        self.waited += time.perf_counter() - began

    def give_back(self) -> None:
        """Free the memory that we do not use, and let the next one have it."""
        if self.file:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            faulthandler.cancel_dump_traceback_later()
            fcntl.flock(self.file, fcntl.LOCK_UN)


def end_with_parent() -> None:
    """Let Linux end this process when the one that began it ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def use_device(name: str) -> None:
    """Make the job's GPU the one that events and counters of memory are about."""
    if name != "cpu":
        torch.cuda.set_device(torch.device(name).index or 0)


def compile_backward_early() -> bool:
    """Compile the backward pass with the forward, and not when it is first run."""
    config = torch._functorch.config
    found = hasattr(config, "force_non_lazy_backward_lowering")
    if found:
        config.force_non_lazy_backward_lowering = True
    return found


def first_step(loop: Loop, device: str) -> float:
    """Seconds of step 0, which compiles what is to be compiled."""
    began = time.perf_counter()
    loop.step(0)
    wait(device)
    return time.perf_counter() - began


def candidates(job: Job) -> list[int]:
    """Micro-batches worth a trial: divisors of a step's sequences, downwards.

    Those that need half as much again as is free, by our estimate, are not.
    """
    if job.micro_batch:
        return [job.micro_batch]
    if job.device == "cpu":
        return [job.sequences]
    config, free = ModelConfig(**job.model), free_memory(torch.device(job.device))
    divisors = [n for n in range(job.sequences, 0, -1) if job.sequences % n == 0]

    def needed(n: int) -> int:
        return memory_estimate(config, n, job.seq_len, job.precision)["total"]

    return [n for n in divisors if n == 1 or needed(n) <= 1.5 * (free or 2**60)]


def best_micro_batch(build: Callable[[Job], Loop], job: Job) -> tuple[int, list]:
    """The fastest of the micro-batches that fit, and what every trial took.

    From the largest downwards, three timed steps each. The first that is slower
    than the one before ends the search: smaller ones only launch more.
    """
    trials: list[dict[str, Any]] = []
    sizes, best = candidates(job), (float("inf"), 0)
    if len(sizes) == 1:
        return sizes[0], trials
    for size in sizes:
        job.micro_batch, loop = size, None
        trial: dict[str, Any] = {"micro_batch": size}
        trials.append(trial)
        try:
            loop = build(job)
            trial["first_step_seconds"] = first_step(loop, job.device)
            for number in range(1, 7):  # a CUDA graph is recorded in the first
                if number == 4:
                    wait(job.device)
                    began = time.perf_counter()
                loop.step(number % len(job.rates))
            wait(job.device)
            trial["ms"] = 1000 * (time.perf_counter() - began) / 3
        except torch.OutOfMemoryError:
            trial["ms"] = None  # does not fit
        del loop
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        if trial["ms"] is None:
            continue
        if trial["ms"] > best[0]:
            break
        best = trial["ms"], size
    if not best[1]:
        raise Unavailable("out of memory: not even one sequence at a time fits")
    return best[1], trials


class Arm:
    """An arm that is built and compiled, and has taken its first step."""

    def __init__(self, name: str, job: Job) -> None:
        build, settings = ARMS[name]
        self.job, self.lock, self.done = job, Lock(job.device, job.hold), 1
        job.settings = {**settings, **job.settings}
        if job.settings.get("compile") == "on GPU":
            job.settings["compile"] = "never" if job.device == "cpu" else "always"
        torch.set_num_threads(job.threads)
        use_device(job.device)
        self.kept = None
        if job.device == "cpu":
            self.kept = job.settings.get("keep_freed", True) and keep_freed_memory()
        else:
            torch.set_float32_matmul_precision("high")
        if job.device != "cpu" and not job.micro_batch:
            self.lock.take()  # what is free, and how fast it is, will decide
        job.micro_batch, self.trials = best_micro_batch(build, job)
        if whole := compile_backward_early():
            job.ready_to_run = self.lock.take
        self.loop = build(job)
        if whole and job.settings.get("compile", "never") == "never":
            self.lock.take()
        waited = self.lock.waited
        self.first = first_step(self.loop, job.device) - self.lock.waited + waited
        self.lock.give_back()

    def take(self, steps: int, marks: Clock | None = None) -> None:
        """So many steps; after the last of those that are prepared, the first."""
        for _ in range(steps):
            self.loop.step(self.done % len(self.job.rates))
            self.done += 1
            if marks:
                marks.mark()

    def turn(self) -> dict[str, Any]:
        """Warm up, be timed; and in the first turn, count what is copied."""
        job, clock, first = self.job, Clock(self.job.device), self.done == 1
        self.lock.take()
        if job.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        with collection_paused():
            again = 0 if job.device == "cpu" else 1  # memory, given back above
            self.take(max(again, job.warm_up - 1) if first else 1)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            clock.mark()
            self.take(job.timed, clock)
        ms = clock.milliseconds()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if job.device != "cpu":
            peak = torch.cuda.max_memory_allocated()
        seen: dict[str, Any] = {"events": None, "events_steps": None}
        if first and job.after and job.device == "cpu":
            self.take(job.after)
        elif first and job.after:
            seen = self.look_inside()
        losses = self.loop.losses()
        told = {str(n): losses[n - 1] for n in (1, 10, 50) if n <= self.done}
        firsts = [t["first_step_seconds"] for t in self.trials if t["ms"]]
        compiling = max(self.first, *firsts, 0.0) - statistics.median(ms) / 1000
        self.lock.give_back()
        for step, loss in told.items():
            if not math.isfinite(loss):
                return {"status": f"failed: the loss is {loss} at step {step}"}
        return {
            "status": "measured",
            "settings": job.settings,
            "micro_batch": job.micro_batch,
            "micro_batch_trials": self.trials,
            "ms": ms,
            "losses": told,
            "compile_seconds": max(0.0, compiling),
            "peak_bytes": peak,
            "freed_memory_kept": self.kept,
            "faults_per_step": faults / job.timed if job.device == "cpu" else None,
            **seen,
        }

    def look_inside(self) -> dict[str, Any]:
        """Copies, waits, and where time goes, in the steps after the timed ones.

        The times are the profiler's, which slows what it watches.
        """
        device, number = torch.device(self.job.device), self.job.after
        records = collect(lambda: self.take(number), device)
        kernels: dict[str, list[float]] = {}
        for one in (one for one in records if one.kind in GPU):
            sums = kernels.setdefault(one.name[:80], [0.0, 0])
            sums[0], sums[1] = sums[0] + one.duration / 1000, sums[1] + 1
        longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:100]
        return {
            "events": dataclasses.asdict(sort_events(records)),
            "events_steps": number,
            "profile": dataclasses.asdict(sort_parts(records)),
            "kernels": {name: sums for name, sums in longest},  # ms, how many
        }


class Limits:
    """What the machine gives at most, in the place of an arm."""

    def __init__(self, name: str, job: Job) -> None:
        self.job, self.lock = job, Lock(job.device, job.hold)
        use_device(job.device)

    def turn(self) -> dict[str, Any]:
        """Measure them."""
        self.lock.take()
        found = ceilings(self.job)
        self.lock.give_back()
        return found


def ceilings(job: Job) -> dict[str, Any]:
    """What the machine gives at most: matrix products, and a copy of memory.

    `step_products_seconds` is what the products of one step take, forward and
    backward, when nothing else is done between them.
    """
    torch.set_num_threads(job.threads)
    device, config = torch.device(job.device), ModelConfig(**job.model)
    sequences = job.sequences if job.device == "cpu" else min(job.sequences, 16)
    tokens, slices = sequences * job.seq_len, job.sequences / sequences
    matrices = Counter(
        (tokens, shape[1], shape[0])
        for shape in parameter_shapes(config).values()
        if len(shape) == 2
    )
    sizes = (512, 1024) if job.device == "cpu" else (4096, 8192)
    shapes = {*matrices, *((n, n, n) for n in sizes)}
    best = measured_ceilings(device, job.precision, shapes=shapes)
    seconds = 0.0
    for rows, inner, outer in matrices:
        size = f"{rows} x {inner} x {outer}"
        rates = [
            r for form, r in best.products.items() if form.endswith(f" {size}")
        ]
        each = sum(2 * rows * inner * outer / rate for rate in rates)
        seconds += matrices[rows, inner, outer] * slices * each
    found = {"status": "measured", **dataclasses.asdict(best)}
    return found | {"step_products_seconds": seconds}


def main() -> None:
    """Prepare the arm that the command line names; a turn for every line read."""
    end_with_parent()
    name, path = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        arm = (Limits if name == "ceilings" else Arm)(name, job)
        say({"status": "ready"})
        for _ in sys.stdin:
            say(arm.turn())
    except Unavailable as error:
        say({"status": str(error)})


if __name__ == "__main__":
    main()
