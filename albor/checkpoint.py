# Generated from book/checkpoint.md: edit the chapter, not this file.
"""The full training state: a killed run goes on from it as if nothing had been.

Notable:
- it holds weights, both moments of every tensor, step counts and random generators
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
from torch import Tensor, nn
from torch.optim import Optimizer

from albor import artifacts
from albor.model import Albor
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
    "MOMENTS",
    "forget_states_after",
    "latest_state",
    "load_state",
    "moment_tensors",
    "random_states",
    "remove_state",
    "save_state",
    "saved_states",
    "sound_state",
    "state_bytes",
    "trained",
    "verify_state",
    "write_files",
]


FORMAT = 1  # of the state folder
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter


def state_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that a state takes; e.g. `state_bytes(parameter_shapes(config))`.

    Float32 weights and two moments are 12 bytes a parameter; the rest is headers. A
    new state is written before an old one goes: to keep 2, a run needs room for 3.
    """
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    return 12 * values + sum(4 * len(name) + 512 for name in shapes) + 65536


def saved_states(folder: str | Path) -> dict[int, Path]:
    """States in `folder`, sound or not, by the step in their name, last first."""
    paths = (Path(folder) / "state").glob("step-*")
    named = {path: re.fullmatch(r"step-(0|[1-9]\d*)", path.name) for path in paths}
    found = {int(match[1]): path for path, match in named.items() if match}
    return dict(sorted(found.items(), reverse=True))


def verify_state(path: str | Path) -> dict[str, Any]:
    """Read `state.json` and hold every file to its SHA-256; return the record."""
    path = Path(path)
    try:
        record = artifacts.read_json(path / "state.json")
        if record.pop("digest") != artifacts.digest(record):
            raise ValueError("state.json was changed or damaged")
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}; only {FORMAT} is read")
        for name, expected in record["files"].items():
            if artifacts.sha256_file(path / name) != expected:
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


def trained(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer holds, by name; none may be left out."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and p not in held:
            raise CheckpointError(f"{name} is not in the optimizer")
    return {name: p for name, p in model.named_parameters() if p in held}


def moment_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """`NAME.exp_avg`, `NAME.exp_avg_sq` and `NAME.step` of every trained parameter.

    A parameter that was never updated has none yet; to AdamW, zeros mean the same.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in trained(model, optimizer).items():
        fresh = (torch.zeros_like(p), torch.zeros_like(p), torch.zeros(()))
        state = optimizer.state.get(p) or dict(zip(MOMENTS, fresh, strict=True))
        if sorted(state) != sorted(MOMENTS):
            raise CheckpointError(f"{name} has {[*state]}; AdamW has {[*MOMENTS]}")
        tensors |= {f"{name}.{part}": state[part].detach() for part in MOMENTS}
    return tensors


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


def forget_states_after(folder: str | Path, step: int) -> list[Path]:
    """Remove the states of later steps, and return what they were.

    To be called before a run goes on from an older state: `latest_state` would find
    the later ones, which belong to a future that is not going to happen.
    """
    later = [path for at, path in saved_states(folder).items() if at > step]
    for path in later:
        remove_state(path)
    return later


def save_state(
    folder: str | Path,
    step: int,
    model: Albor,
    optimizer: Optimizer,
    extra: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write all that training needs to go on to `folder/state/step-N`; return that.

    `extra` is the caller's, in JSON. Once this is complete, all but the `keep` last
    are removed. A sound state is never rewritten: for the same weights and moments
    it stays, for others the call is refused. A folder has one writer.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"need step >= 0 and keep > 0, got {step} and {keep}")
    states = Path(folder) / "state"
    final, beside = states / f"step-{step}", states / f".step-{step}.new"
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = moment_tensors(model, optimizer)
    refuse_nonfinite(weights | moments, f"step {step}")
    tensors = {"model": weights, "optimizer": moments, "rng": random_states()}
    shape = dataclasses.asdict(model.config)
    record = {"step": step, "extra": extra, "model": shape}
    try:
        artifacts.to_json(extra)
    except artifacts.ArtifactError as error:
        raise CheckpointError(f"extra of step {step}: {error}") from error
    for at, path in saved_states(folder).items():
        if at > step and sound_state(path):
            raise CheckpointError(
                f"{path} is later than step {step}: go on from there, give another "
                f"folder, or drop it with forget_states_after(folder, {step})"
            )
    with disk_errors(states, state_bytes({n: t.shape for n, t in weights.items()})):
        for leftover in states.glob(".step-*"):
            shutil.rmtree(leftover)
        try:
            files = write_files(beside, tensors, record)
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
        older = [path for at, path in saved_states(folder).items() if at < step]
        for path in older[keep - 1 :]:
            remove_state(path)
    return final


def load_state(
    path: str | Path, model: Albor, optimizer: Optimizer
) -> dict[str, Any]:
    """Put a state into `model`, `optimizer` and the random generators.

    Returns the `step` and the `extra` that were saved. The optimizer keeps its own
    learning rate, betas and decay, for they come from the recipe. All is verified
    before the first value changes.
    """
    path = Path(path)
    record, config = verify_state(path), dataclasses.asdict(model.config)
    saved = record["model"]
    if differ := [key for key in config if config[key] != saved.get(key)]:
        pairs = [f"{key} {saved.get(key)}, here {config[key]}" for key in differ]
        raise CheckpointError(f"{path} is of another model: {'; '.join(pairs)}")
    parameters, held = dict(model.named_parameters()), trained(model, optimizer)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    weights = read_tensors(path / "model.safetensors", shapes, ("F32",))
    shapes = {
        f"{name}.{part}": () if part == "step" else tuple(p.shape)
        for name, p in held.items()
        for part in MOMENTS
    }
    moments = read_tensors(path / "optimizer.safetensors", shapes, ("F32",))
    generators = load_file(path / "rng.safetensors")
    # All is well: from here on the model changes.
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    names = {p: name for name, p in held.items()}
    state = optimizer.state_dict()
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {
        index: {part: moments[f"{name}.{part}"].clone() for part in MOMENTS}
        for index, name in enumerate(order)
    }
    optimizer.load_state_dict(state)
    torch.set_rng_state(generators["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in generators:
            torch.cuda.set_rng_state(generators[f"cuda:{index}"], index)
    return {"step": record["step"], "extra": record["extra"]}
