# Generated from book/ranks.md: edit the chapter, not this file.
"""Processes that compute one gradient together.

Notable here:
- DDP: each rank has the whole model; gradients are added up during the backward;
- what rank 0 decides, or refuses, is so for all;
- a signal is for rank 0 to obey: the others go on until it has saved.
"""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from albor.config import ConfigError, Recipe
from albor.hardware import pick_device
from albor.model import Albor

__all__ = [
    "PATIENCE",
    "Loss",
    "LossFunction",
    "World",
    "add_gradients",
    "add_up",
    "follow",
    "from_rank_0",
    "joined",
    "refuse_ranks",
    "shared_loss",
]


def refuse_ranks(recipe: Recipe, ranks: int) -> int:
    """The sequences of a rank in a step; refused if not a whole number."""
    together = recipe.data.batch_size * recipe.training.gradient_accumulation
    if together % ranks:
        fitting = [n for n in range(1, together + 1) if together % n == 0]
        near = ", ".join(map(str, [n for n in fitting if n <= 2 * ranks]))
        raise ConfigError(
            f"world size = {ranks}: does not divide the {together} sequences of a "
            "step (data.batch_size x training.gradient_accumulation); start "
            f"{near} processes, or change training.gradient_accumulation"
        )
    return together // ranks


PATIENCE = timedelta(hours=1)  # of ranks that wait while rank 0 reads a corpus


@dataclass(frozen=True)
class World:
    """This process among its like."""

    rank: int
    size: int
    target: torch.device


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """Join the group that torchrun has started; without torchrun, be alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield World(0, 1, pick_device(device))
        return
    target = pick_device(device)
    if target.type == "cuda":  # a card for each process of this machine
        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            raise ConfigError(
                f"process {local + 1} of this machine has no GPU: there are "
                f"{cards}; start at most {cards} here (--nproc-per-node {cards})"
            )
        target = torch.device("cuda", local)
        torch.cuda.set_device(target)
    dist.init_process_group(
        "nccl" if target.type == "cuda" else "gloo",
        timeout=PATIENCE,
        device_id=target if target.type == "cuda" else None,
    )
    try:
        yield World(dist.get_rank(), dist.get_world_size(), target)
    finally:
        dist.destroy_process_group()


def from_rank_0(world: World, make: Callable[[], Any]) -> Any:
    """What `make()` returns on rank 0, on every rank; if it fails, all end."""
    if world.size == 1:
        return make()
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if world.rank == 0:
        try:
            box[0] = make()
        except Exception as error:
            failure, box[1] = error, str(error)
    dist.broadcast_object_list(box, src=0)
    if failure:
        raise failure
    if box[1] is not None:  # rank 0 says why; once is enough
        raise SystemExit(1)
    return box[0]


def follow(world: World, work: Callable[[], Any]) -> Any:
    """Do `work` deaf to Ctrl-C and SIGTERM, which are for rank 0 to obey.

    All ranks get the signal, but perhaps in different steps. If each stopped after
    its own, rank 0 could wait in the next one for gradients that never come, and
    would not save. Python gives signals to the main thread alone, so the work goes
    to another, where `train` holds none back.
    """
    ours = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ours}

    def there() -> Any:
        if world.target.type == "cuda":
            torch.cuda.set_device(world.target)  # is a setting of each thread
        return work()

    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(there).result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


LossFunction = Callable[[Tensor, Tensor], Tensor]  # (B, T) ids, targets -> mean


class Loss(nn.Module):
    """The loss of a model as a module, for DDP wraps what has a forward."""

    def __init__(self, model: Albor, loss: LossFunction | None = None) -> None:
        super().__init__()
        self.model, self.loss = model, loss or model.loss

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of (B, T) ids against (B, T) targets, in nats."""
        return self.loss(ids, targets)


def add_gradients(
    state: None, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over the ranks, while the backward goes on."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def shared_loss(
    model: Albor, world: World, loss: LossFunction | None = None
) -> LossFunction | None:
    """`model.loss`, or another, whose backward adds up over all ranks.

    Alone there is nothing to share, and `loss` comes back as it is.
    """
    if world.size == 1:
        return loss
    cards = [world.target] if world.target.type == "cuda" else None
    shared = DistributedDataParallel(
        Loss(model, loss),
        device_ids=cards,
        broadcast_buffers=False,  # tables of angles, equal everywhere
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )
    shared.register_comm_hook(None, add_gradients)
    return shared


def add_up(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all ranks, on the device, without a wait."""
    dist.all_reduce(tensor)
