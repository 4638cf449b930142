# Generated from book/checkpoint.md: edit the chapter, not this file.
"""The full training state: a killed run goes on from it as if nothing had been.

Notable:
- it holds weights, all that the optimizer keeps for each of them, random generators
- it is written beside, flushed, and renamed: it is there whole or not at all
- a load checks everything first and changes the model afterwards, or not at all
- safetensors and JSON alone: nothing here can run code from a file
"""

import dataclasses
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from albor import artifacts
from albor.model import Albor
from albor.moments import moment_shapes, moment_tensors, restore_moments
from albor.weights import (
    CheckpointError,
    disk_errors,
    read_tensors,
    refuse_nonfinite,
)
from albor.weights import load_model as load_model  # both halves of the subject
from albor.weights import save_model as save_model  # can be had from this module

__all__ = [
    "FORMAT",
    "Snapshot",
    "latest_state",
    "load_state",
    "random_states",
    "remove_state",
    "save_state",
    "saved_states",
    "sound_state",
    "state_bytes",
    "take_state",
    "verify_state",
    "write_files",
    "write_state",
]


FORMAT = 1  # of the state folder


def state_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that a state takes; e.g. `state_bytes(parameter_shapes(config))`.

    Float32 weights and AdamW's two moments are 12 bytes a parameter, the rest is
    headers. Muon's matrices have one moment: for them this is an upper bound.
    """
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    return 12 * values + sum(4 * len(name) + 512 for name in shapes) + 65536


def saved_states(folder: str | Path) -> dict[int, Path]:
    """States in `folder`, sound or not, by the step in their name, last first."""
    paths = (Path(folder) / "state").glob("step-*")
    named = {path: re.fullmatch(r"step-(0|[1-9]\d*)", path.name) for path in paths}
    found = {int(match[1]): path for path, match in named.items() if match}
    return dict(sorted(found.items(), reverse=True))


def verify_state(path: str | Path, hashes: bool = True) -> dict[str, Any]:
    """Read `state.json` and hold every file to its SHA-256; return the record.

    Without `hashes` the files need only be there: quick, and no proof.
    """
    path = Path(path)
    try:
        record = artifacts.read_json(path / "state.json")
        if record.pop("digest") != artifacts.digest(record):
            raise ValueError("state.json was changed or damaged")
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}; only {FORMAT} is read")
        for name, expected in record["files"].items():
            (path / name).stat()
            if hashes and artifacts.sha256_file(path / name) != expected:
                raise ValueError(f"{name} does not have its recorded SHA-256")
        return record
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no sound state: {error}") from error


def sound_state(path: str | Path) -> dict[str, Any] | None:
    """The record of a state, or None if it is missing, incomplete or damaged."""
    try:
        return verify_state(path)
    except CheckpointError:
        return None


def latest_state(folder: str | Path) -> Path | None:
    """The newest sound state in `folder`, if any; warns about those passed over."""
    for step, path in saved_states(folder).items():
        try:
            if (inside := verify_state(path)["step"]) == step:
                return path
            raise CheckpointError(f"{path} holds step {inside}, against its name")
        except CheckpointError as error:
            warnings.warn(f"{error}; trying an older one", stacklevel=2)
    return None


def random_states() -> dict[str, Tensor]:
    """The states of PyTorch's random generators: the CPU's, CUDA's if in use."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = torch.cuda.get_rng_state_all() if used else []
    cuda = {f"cuda:{index}": state for index, state in enumerate(states)}
    return {"cpu": torch.get_rng_state()} | cuda


def write_files(
    folder: Path, tensors: Mapping[str, dict[str, Tensor]], record: dict[str, Any]
) -> dict[str, str]:
    """Write and flush the files of a state; return their SHA-256 by file name."""
    folder.mkdir()
    files = {}
    for name, named in tensors.items():
        path = folder / f"{name}.safetensors"
        whole = {key: tensor.cpu().contiguous() for key, tensor in named.items()}
        save_file(whole, path, {"format": "pt"})
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = artifacts.sha256_file(path)
    record = {**record, "format": FORMAT, "files": files}
    digest = artifacts.digest(record)
    artifacts.write_json(folder / "state.json", {**record, "digest": digest})
    artifacts.sync_folder(folder)
    return files


def remove_state(path: Path) -> None:
    """Remove a state: out of sight in one rename, then file by file."""
    if path.is_symlink():
        path.unlink()
    else:
        trash = path.with_name(f".{path.name}.old")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        shutil.rmtree(trash)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A state that is not on the disk yet."""

    folder: Path  # of the run
    record: dict[str, Any]  # what `state.json` will say
    tensors: dict[str, dict[str, Tensor]]  # by file, then by name


def take_state(
    folder: str | Path,
    step: int,
    model: Albor,
    optimizer: Optimizer,
    extra: dict[str, Any],
    val_loss: float | None = None,
) -> Snapshot:
    """Gather all that training needs to go on; refuse what must not be kept.

    `extra` is the caller's, in JSON, `val_loss` in nats. The tensors are still the
    model's and the optimizer's own: the next update changes them.
    """
    if step < 0:
        raise CheckpointError(f"step is {step}; the first state is that of step 0")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = moment_tensors(model, optimizer)
    refuse_nonfinite(weights | moments, f"step {step}")
    record = {"step": step, "extra": extra, "val_loss": val_loss}
    record["model"] = dataclasses.asdict(model.config)
    record["optimizer"] = type(optimizer).__name__
    try:
        artifacts.to_json(record)
    except artifacts.ArtifactError as error:
        raise CheckpointError(f"record of step {step}: {error}") from error
    for at, path in saved_states(folder).items():
        if at > step and sound_state(path):
            raise CheckpointError(
                f"{path} is later than step {step}: go on from there, give another "
                f"folder, or drop it with forget_states_after(folder, {step})"
            )
    tensors = {"model": weights, "optimizer": moments, "rng": random_states()}
    return Snapshot(Path(folder), record, tensors)


def write_state(snapshot: Snapshot) -> Path:
    """Write a state to `folder/state/step-N`, whole or not at all; return that.

    A sound state is never rewritten: for the same weights and moments it stays, for
    others the call is refused. A folder has one writer.
    """
    states, step = snapshot.folder / "state", snapshot.record["step"]
    final, beside = states / f"step-{step}", states / f".step-{step}.new"
    tensors = [t for named in snapshot.tensors.values() for t in named.items()]
    needed = sum(128 + len(name) + t.nbytes for name, t in tensors) + 65536
    with disk_errors(states, needed):
        for leftover in states.glob(".step-*"):
            shutil.rmtree(leftover)
        try:
            files = write_files(beside, snapshot.tensors, snapshot.record)
            if found := sound_state(final):
                names = ("model.safetensors", "optimizer.safetensors")
                if any(found["files"][name] != files[name] for name in names):
                    raise CheckpointError(
                        f"{final} has other weights or moments, and stays; give "
                        "another folder, or drop it with "
                        f"forget_states_after(folder, {step - 1})"
                    )
            else:
                if final.exists() or final.is_symlink():
                    remove_state(final)
                os.rename(beside, final)
                artifacts.sync_folder(states)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return final


def save_state(
    folder: str | Path,
    step: int,
    model: Albor,
    optimizer: Optimizer,
    extra: dict[str, Any],
    val_loss: float | None = None,
) -> Path:
    """Take a state and write it, as the two above say; return its path."""
    return write_state(take_state(folder, step, model, optimizer, extra, val_loss))


def load_state(
    path: str | Path, model: Albor, optimizer: Optimizer
) -> dict[str, Any]:
    """Put a state into `model`, `optimizer` and the random generators.

    Returns the `step` and the `extra` that were saved. The optimizer keeps its own
    learning rate, betas and decay, for they come from the recipe. All is verified
    before the first value changes.
    """
    path = Path(path)
    record, kind = verify_state(path), {"optimizer": type(optimizer).__name__}
    here = dataclasses.asdict(model.config) | kind
    # States from before it was recorded do not name their optimizer.
    saved = kind | record | record["model"]
    if differ := [key for key in here if here[key] != saved.get(key)]:
        pairs = [f"{key} {saved.get(key)}, here {here[key]}" for key in differ]
        raise CheckpointError(f"{path} does not fit: {'; '.join(pairs)}")
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    weights = read_tensors(path / "model.safetensors", shapes, ("F32",))
    shapes = moment_shapes(model, optimizer)
    moments = read_tensors(path / "optimizer.safetensors", shapes, ("F32",))
    generators = load_file(path / "rng.safetensors")
    # All is well: from here on the model changes.
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    restore_moments(model, optimizer, moments)
    torch.set_rng_state(generators["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in generators:
            torch.cuda.set_rng_state(generators[f"cuda:{index}"], index)
    return {"step": record["step"], "extra": record["extra"]}
