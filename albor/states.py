# Generated from book/states.md: edit the chapter, not this file.
"""The states of a run: the last ones and the best, written beside the training.

Notable:
- a state is copied to the host's memory; a thread writes while training goes on
- an error of that thread is raised at the next save or at the end, never lost
- the `keep` last states stay, and the best by validation loss
- what a run will need on the disk is known before its first step
"""

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from albor.checkpoint import (
    Snapshot,
    remove_state,
    saved_states,
    state_bytes,
    take_state,
    verify_state,
    write_state,
)
from albor.model import Albor
from albor.weights import CheckpointError, disk_errors

__all__ = [
    "StateWriter",
    "best_first",
    "best_state",
    "disk_needed",
    "forget_states_after",
    "refuse_small_disk",
    "remove_surplus",
    "steps_to_keep",
    "val_losses",
]


def best_first(losses: Mapping[int, float | None]) -> list[int]:
    """The steps that have a validation loss, from the lowest loss on."""
    judged = [(loss, step) for step, loss in losses.items() if loss is not None]
    return [step for _, step in sorted(judged)]


def steps_to_keep(losses: Mapping[int, float | None], keep: int) -> set[int]:
    """Of the steps in `losses`, the `keep` last and the best by validation loss."""
    return {*sorted(losses)[-keep:], *best_first(losses)[:1]}


def val_losses(folder: str | Path) -> dict[int, float | None]:
    """Validation loss (nats; None: not judged) of the states in `folder`, by step.

    States whose record is damaged, or is of another step, are left out. Quick: the
    tensors are not read.
    """
    losses = {}
    for step, path in saved_states(folder).items():
        try:
            record = verify_state(path, hashes=False)
        except CheckpointError:
            continue
        if record["step"] == step:
            losses[step] = record.get("val_loss")
    return losses


def best_state(folder: str | Path) -> Path | None:
    """The sound state with the lowest validation loss, if any has one.

    A damaged one is passed over, with a warning.
    """
    for step in best_first(val_losses(folder)):
        try:
            verify_state(path := saved_states(folder)[step])
            return path
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the next best", stacklevel=2)
    return None


def remove_surplus(folder: str | Path, keep: int) -> list[Path]:
    """Remove what is older than the `keep` last and not the best; return it."""
    losses = val_losses(folder)
    stay, recent = steps_to_keep(losses, keep), sorted(losses)[-keep:]
    states = saved_states(folder).items()
    old = [(at, path) for at, path in states if recent and at < recent[0]]
    surplus = [path for at, path in old if at not in stay]
    for path in surplus:
        remove_state(path)
    return surplus


def forget_states_after(folder: str | Path, step: int) -> list[Path]:
    """Remove the states of later steps, and return what they were.

    To be called before a run goes on from an older state: `latest_state` would find
    the later ones, which belong to a future that is not going to happen.
    """
    later = [path for at, path in saved_states(folder).items() if at > step]
    for path in later:
        remove_state(path)
    return later


def disk_needed(
    shapes: Mapping[str, tuple[int, ...]], keep: int = 2, best: bool = True
) -> int:
    """Bytes for the `keep` last states, the best one, and one being written."""
    return (keep + best + 1) * state_bytes(shapes)


def refuse_small_disk(folder: str | Path, need: int) -> None:
    """Refuse to begin where `need` bytes of states will not fit."""
    folder = Path(folder)
    places = (folder / "state", folder, *folder.parents)
    free = shutil.disk_usage(next(path for path in places if path.exists())).free
    taken = sum(file.stat().st_size for file in folder.glob("state/*/*"))
    if free + taken < need:
        raise CheckpointError(
            f"{folder}: the states of this run need {need:,} bytes at once; "
            f"{free:,} are free and {taken:,} are held by its older states. Make "
            "room, or set output_dir to a folder on a larger disk, or keep fewer"
        )


class StateWriter:
    """Saves the states of a run, beside the training; keeps the last and the best.

    `save` copies the state into buffers on the host (12 bytes a parameter, held as
    long as this lives) and returns; a thread writes them, one state at a time. An
    error of a write is raised by the next `save`, `wait` or `close`. With
    `asynchronous=False` there is no copy and no thread. A folder has one writer.
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, asynchronous: bool = True
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}; the last state must stay")
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self.buffers: dict[str, dict[str, torch.Tensor]] = {}
        self.pool = ThreadPoolExecutor(1, "states")
        self.pending: Future[None] | None = None

    def save(
        self,
        step: int,
        model: Albor,
        optimizer: Optimizer,
        extra: dict[str, Any],
        val_loss: float | None = None,
    ) -> None:
        """Save the state after `step` updates, as `take_state` describes it."""
        self.wait()  # for the buffers, and for bad news
        snapshot = take_state(self.folder, step, model, optimizer, extra, val_loss)
        if not self.asynchronous:
            self.write(snapshot, [])
            return
        copied, events = self.copy(snapshot)
        self.pending = self.pool.submit(self.write, copied, events)

    def copy(self, snapshot: Snapshot) -> tuple[Snapshot, list[torch.cuda.Event]]:
        """The snapshot on the host, and the events that tell when it is there."""
        copies: dict[str, dict[str, torch.Tensor]] = {}
        devices = set()
        for file, named in snapshot.tensors.items():
            buffers = self.buffers.setdefault(file, {})
            for name, tensor in named.items():
                if name not in buffers or buffers[name].shape != tensor.shape:
                    buffers[name] = self.buffer(tensor)
                buffers[name].copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    devices.add(tensor.device)
            copies[file] = {name: buffers[name] for name in named}
        events = [torch.cuda.current_stream(one).record_event() for one in devices]
        return Snapshot(snapshot.folder, snapshot.record, copies), events

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory for a tensor: pinned for a GPU's, or its copy would block."""
        try:
            size, pinned = like.shape, like.is_cuda
            return torch.empty(size, dtype=like.dtype, pin_memory=pinned)
        except RuntimeError as error:
            raise CheckpointError(
                f"no memory on the host for a copy of {like.nbytes:,} bytes: "
                f"{error}. Give StateWriter asynchronous=False, which needs none"
            ) from error

    def write(self, snapshot: Snapshot, events: list[torch.cuda.Event]) -> None:
        """Write the state once it is there, then remove what is surplus."""
        for event in events:
            event.synchronize()
        write_state(snapshot)
        with disk_errors(self.folder / "state", 0):
            remove_surplus(self.folder, self.keep)

    def wait(self) -> None:
        """Wait for the write under way, if any; raise the error that it met."""
        if self.pending:
            self.pending.exception()  # an interrupted wait leaves it pending
            done, self.pending = self.pending, None
            done.result()

    def close(self) -> None:
        """Wait for the last write and raise its error; then save no more."""
        try:
            self.wait()
        finally:
            self.pool.shutdown()

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as late:
            if error is None:
                raise
            error.add_note(f"Besides, the last state was not saved: {late}")
