# Generated from book/resident.md: edit the chapter, not this file.
"""Many steps in a row without a wait: rates and results live on the device.

Notable here:
- the learning rate of every step goes up once, before the first;
- results are rows of a ring on the device, read in one copy when there is a log;
- small steps on a GPU can be recorded once and launched as one CUDA graph;
- Python's garbage collector and Ctrl-C are kept out of the middle of a step.
"""

import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from albor.config import Recipe
from albor.model import Albor
from albor.step import StepResult, enqueue_step

__all__ = [
    "GRAPH_TOKENS",
    "GraphedStep",
    "History",
    "Stepper",
    "collection_paused",
    "compiled_loss",
    "compiles",
    "records_graph",
    "signals_held_back",
]


class History:
    """The results since the last read, on the device: four numbers a step."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.rows = torch.zeros(size, 4, dtype=torch.float64, device=device)
        pinned = device.type == "cuda"
        self.landed = torch.zeros(size, 4, dtype=torch.float64, pin_memory=pinned)
        self.count = 0

    def add(self, row: Tensor) -> None:
        """Keep what `enqueue_step` returned; nothing waits."""
        if self.count == len(self.rows):
            raise IndexError(f"{self.count} results are unread: read() them first")
        self.rows[self.count].copy_(row)
        self.count += 1

    def read(self) -> list[list[float]]:
        """All rows since the last read, in one copy: the only place that waits."""
        count, self.count = self.count, 0
        self.landed[:count].copy_(self.rows[:count], non_blocking=True)
        if self.rows.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
            arrived.synchronize()
        return self.landed[:count].tolist()


class GraphedStep:
    """A step as one CUDA graph: recorded after a few calls, then launched whole.

    `step(inputs, targets)` queues its work and waits for nothing; all batches have
    the shape of the first. `forget()` drops the gradients, so that those of the
    graph get a place of their own.
    """

    WARM_UP = 3  # calls that run as usual

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], forget: Callable[[], object]
    ) -> None:
        self.step, self.forget, self.calls = step, forget, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            now, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(now)
            with torch.cuda.stream(side):
                row = self.step(inputs, targets)
            now.wait_stream(side)
            return row
        if self.graph is None:
            self.inputs, self.targets = inputs.clone(), targets.clone()
            self.forget()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # recorded, and not run
                self.row = self.step(self.inputs, self.targets)
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.row


GRAPH_TOKENS = 16_384  # per step: above, a GPU computes longer than it is launched


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether a run compiles its loss, for about a minute; "auto": on a GPU."""
    return {"auto": device.type == "cuda", "always": True, "never": False}[
        recipe.training.compile
    ]


def records_graph(recipe: Recipe, device: torch.device) -> bool:
    """Whether a run's steps are small enough to be launched as one CUDA graph.

    Not with fp16: its loss scaler keeps notes on the host in every step.
    """
    tokens = (
        recipe.data.batch_size
        * recipe.training.gradient_accumulation
        * recipe.data.seq_len
    )
    small = tokens <= GRAPH_TOKENS and recipe.training.mixed_precision != "fp16"
    return small and device.type == "cuda"


def compiled_loss(model: Albor, **how: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """`model.loss` through `torch.compile`, as one graph of fixed shapes.

    The first call compiles: seconds for a small model, minutes for a deep one on a
    CPU. Errors of the compiler come from there. `how`: more for `torch.compile`.
    """
    model.model.rotations(0, 1)  # the table is made before the trace, not in it
    return torch.compile(model.loss, fullgraph=True, dynamic=False, **how)


class Stepper:
    """Queues steps whose rates are known, and reads their results now and then.

    `rates`: the learning rate of step 0, 1, 2, ... `capacity`: steps between two
    reads, at most. `graph`: whether to launch a step as one CUDA graph. `options`:
    of `enqueue_step`.
    """

    def __init__(
        self,
        model: Albor,
        optimizer: torch.optim.Optimizer,
        rates: Sequence[float],
        *,
        capacity: int = 64,
        graph: bool = False,
        grad_clip: float = 1.0,
        **options: Any,
    ) -> None:
        device = next(model.parameters()).device
        self.rates = torch.tensor(rates, dtype=torch.float32).to(device)
        self.rate = torch.zeros((), device=device)  # where the optimizer looks
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        self.history, self.grad_clip = History(capacity, device), grad_clip

        def step(inputs: Tensor, targets: Tensor) -> Tensor:
            how = {"grad_clip": grad_clip, **options}
            return enqueue_step(model, optimizer, inputs, targets, **how)

        self.step: Callable[[Tensor, Tensor], Tensor] = step
        if graph:
            self.step = GraphedStep(step, optimizer.zero_grad)

    def queue(self, number: int, inputs: Tensor, targets: Tensor) -> None:
        """Put step `number` into the device's queue, and wait for nothing."""
        self.rate.copy_(self.rates[number])
        self.history.add(self.step(inputs, targets))

    def read(self) -> list[StepResult]:
        """What the steps since the last read have done; waits for the last."""
        rows = self.history.read()
        return [StepResult.of(row, self.grad_clip) for row in rows]


@contextmanager
def collection_paused() -> Iterator[Callable[[], object]]:
    """No garbage collection inside the block, unless what it yields is called."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is alive now is not looked at again
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


@contextmanager
def signals_held_back() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, to be obeyed where it does no damage.

    A second signal interrupts at once. Outside the main thread, where Python allows
    no handlers, nothing is held back.
    """
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    held = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, hold) for number in held}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
