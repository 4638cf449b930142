"""Run one arm of `benchmarks.training` in this process, and say what it took.

python -m benchmarks.measure ARM JOB        # prints one line of JSON
"""

import dataclasses
import gc
import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from albor.ceilings import ceilings as measured_ceilings
from albor.config import ModelConfig, parameter_shapes
from albor.hardware import free_memory, keep_freed_memory
from albor.profiling import count_events
from albor.resident import collection_paused
from albor.shapes import memory_estimate
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


def measure(name: str, job: Job) -> dict[str, Any]:
    """Build an arm, take its steps, and tell what they took."""
    build, settings = ARMS[name]
    job.settings = {**settings, **job.settings}
    if job.settings.get("compile") == "on GPU":
        job.settings["compile"] = "never" if job.device == "cpu" else "always"
    torch.set_num_threads(job.threads)
    if job.device == "cpu":
        kept = job.settings.get("keep_freed", True) and keep_freed_memory()
    else:
        kept = None
        torch.set_float32_matmul_precision("high")
    micro_batch, trials = best_micro_batch(build, job)
    job.micro_batch = micro_batch
    if job.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    loop, clock = build(job), Clock(job.device)
    first = first_step(loop, job.device)
    with collection_paused():
        for number in range(1, job.warm_up):
            loop.step(number)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        clock.mark()
        for number in range(job.warm_up, job.warm_up + job.timed):
            loop.step(number)
            clock.mark()
    ms = clock.milliseconds()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job.device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    reached = job.warm_up + job.timed
    events = None
    if job.after:
        more = range(reached, reached + job.after)
        reached += job.after

        def rest() -> None:
            for number in more:
                loop.step(number)

        if job.device == "cpu":
            rest()
        else:
            events = dataclasses.asdict(
                count_events(rest, torch.device(job.device))
            )
    losses = loop.losses()
    firsts = [first, *(t["first_step_seconds"] for t in trials if t["ms"])]
    return {
        "status": "measured",
        "settings": job.settings,
        "micro_batch": micro_batch,
        "micro_batch_trials": trials,
        "ms": ms,
        "losses": {str(n): losses[n - 1] for n in (1, 10, 50) if n <= reached},
        "compile_seconds": max(0.0, max(firsts) - statistics.median(ms) / 1000),
        "peak_bytes": peak,
        "freed_memory_kept": kept,
        "faults_per_step": faults / job.timed if job.device == "cpu" else None,
        "events": events,
        "events_steps": job.after if events else None,
    }


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
    """Run the arm that the command line names."""
    name, path = sys.argv[1:]
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        found = ceilings(job) if name == "ceilings" else measure(name, job)
    except Unavailable as error:
        found = {"status": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
