# Generated from book/setup.md: edit the chapter, not this file.
"""What is decided, refused and written down before the first step of a run.

Notable here:
- parameters, recipe, folder and state are looked at before anything is written;
- a state knows its recipe, seed and digests: only the same run goes on from it;
- the record of a run is there before its first step.
"""

import dataclasses
import math
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import albor
from albor.artifacts import read_json, sha256_file, write_json
from albor.checkpoint import (
    CheckpointError,
    latest_state,
    verify_state,
)
from albor.config import ConfigError, Recipe, load_recipe, project_path, suggest
from albor.corpus import resolve
from albor.hardware import pick_precision
from albor.shapes import count_parameters, parameter_shapes
from albor.shards import TokenStream, unigram_cross_entropy
from albor.states import forget_states_after
from albor.texts import Texts, find_home
from albor.train import METRICS

__all__ = [
    "begin_folder",
    "check_parameters",
    "choose_folder",
    "choose_recipe",
    "commit",
    "describe_result",
    "describe_run",
    "describe_session",
    "fits",
    "flat",
    "processor",
    "refuse_other_run",
]


def fits(value: Any, expected: str) -> bool:
    """Whether a parameter is of a kind that the words `expected` speak of."""
    kinds: set[type] = {str} if "text" in expected else set()
    kinds |= {bool} if "True" in expected else set()
    kinds |= {int} if "number" in expected else set()
    kinds |= {float} if "a number" in expected else set()
    if type(value) not in (kinds or {str}):
        return False
    if isinstance(value, str):
        return "\0" not in value
    return bool(0 <= value < (math.inf if type(value) is float else 2**63))


def check_parameters(
    found: set[str], values: dict[str, Any], choices: dict[str, str]
) -> None:
    """Refuse names that are no parameters, then values of the wrong kind.

    `found`: the names that have appeared. `choices`: what each parameter may be:
    "a whole number", "a number" (both from 0), "True", "text", or a list of words.
    """
    papermill = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}  # --inject-paths
    for name in sorted(found - {*choices, *papermill, "names_before"}):
        if not re.fullmatch(r"_+|_i+|_i?\d+", name):  # IPython's own
            known = ", ".join(choices)
            raise ConfigError(
                f"{name} = {values[name]!r}: unknown; there are {known}"
            )
    for name, expected in choices.items():
        value, kind = values[name], type(values[name]).__name__
        if not fits(value, expected):
            raise ConfigError(f"{name} = {value!r} ({kind}): give {expected}")


def choose_recipe(
    name: str,
    target: torch.device,
    *,
    corpus: str = "",
    max_steps: int = 0,
    precision: str = "auto",
) -> Recipe:
    """The recipe of that name or file with a run's wishes in it; writes nothing."""
    home = find_home()
    files = [project_path(name), home / name, home / f"configs/train/{name}.yaml"]
    files = [file for file in files if file.is_file()]
    if not files:
        known = {path.stem for path in home.glob("configs/train/*.yaml")}
        raise ConfigError(
            f"config = {name!r}: no such recipe; {suggest(name, known)}"
        )
    recipe = load_recipe(files[0])
    data = dataclasses.replace(recipe.data, train=corpus or recipe.data.train)
    if data.train.endswith(".parquet"):  # rows of tokens that others have made
        for key in ("train", "val", "tokenizer"):
            path = getattr(data, key)
            if not path or not project_path(path).exists():
                why = "token rows need a file of each, and their tokenizer"
                raise ConfigError(f"data.{key} = {path!r}: not there; {why}")
    elif data.val or data.input_column != "text":
        raise ConfigError(
            f"data.val = {data.val!r}, data.input_column = {data.input_column!r}: "
            "this run holds out packages and reads files; leave both keys out, or "
            "name .parquet files of token rows in data.train and data.val"
        )
    else:
        resolve(data.train)  # refuses what is not there
    wanted = recipe.training.mixed_precision if precision == "auto" else precision
    if precision == "auto" and wanted == "fp16" and target.type == "cpu":
        wanted = "auto"
    changes: dict[str, Any] = {"mixed_precision": pick_precision(wanted, target)}
    changes |= {"max_steps": max_steps} if max_steps else {}
    return dataclasses.replace(recipe, data=data).with_training(**changes)


def choose_folder(
    recipe: Recipe, output_dir: str = "", resume: bool | str = False
) -> tuple[Path, Path | None]:
    """Where the run writes, and the state that it goes on from, or None."""
    given = output_dir or recipe.training.output_dir
    folder = project_path(given or f"checkpoints/{recipe.name}")
    state = latest_state(folder) if resume is True and folder.is_dir() else None
    if isinstance(resume, str):
        state = project_path(resume)
        folder = project_path(output_dir) if output_dir else state.parent.parent
        try:
            verify_state(state)
        except CheckpointError as error:
            why = f"{error}; give the folder state/step-N of a run, or True"
            raise ConfigError(f"resume = {resume!r}: {why}") from None
    refusal = f"output_dir = {output_dir or folder.name!r}: "
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        raise ConfigError(f"{refusal}cannot write to {exists}; name another folder")
    elsewhere = state is not None and state.parent.parent != folder
    if (elsewhere or not resume) and exists == folder and any(folder.iterdir()):
        raise ConfigError(
            f"{refusal}it is not empty; go on from what is there with "
            "resume = True, or name another folder"
        )
    return folder, state


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted name: value}."""
    if not isinstance(value, dict):
        return {name: value}
    parts = (flat(value[key], f"{name}.{key}".lstrip(".")) for key in value)
    return {key: leaf for part in parts for key, leaf in part.items()}


def refuse_other_run(
    recipe: Recipe, seed: int, before: dict[str, Any], free: set[str] | None = None
) -> None:
    """Refuse to go on with other settings than a state's `extra`, `before`, tells.

    Where and how often it saves may differ, how it slices, and the keys in `free`.
    """
    now, then = flat(recipe.to_dict()), flat(before["recipe"])
    free = {"name", "training.output_dir", "training.save_interval", *(free or ())}
    free.add("training.micro_batch")
    now["seed"], then["seed"] = seed, before["seed"]
    differ = [key for key in now if key not in free and now[key] != then.get(key)]
    if differ:
        changes = (f"{key} {then.get(key)!r}, now {now[key]!r}" for key in differ)
        raise ConfigError(
            f"resume = True: the run was started with {'; '.join(changes)}. Give "
            "the same parameters, or start anew in another output_dir"
        )


def commit() -> str:
    """The commit of the project, if git is there and knows it."""
    command = ["git", "-C", str(find_home()), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")


def describe_session(target: torch.device, start: int) -> dict[str, Any]:
    """Who computes here, since when, from which step on."""
    packages = ("torch", "numpy", "tokenizers", "safetensors")
    cuda = target.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "start_step": start,
        "device": str(target),
        "gpu": torch.cuda.get_device_name(target) if cuda else "",
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version(), "albor": albor.__version__},
        "commit": commit(),
    }


def describe_run(
    recipe: Recipe, seed: int, texts: Texts, micro_batch: int
) -> dict[str, Any]:
    """What goes into every state, and must hold of a run that goes on from it."""
    about, tokenizer, tokens = texts
    return {
        "recipe": recipe.to_dict(),
        "seed": seed,
        "corpus": about["digest"],
        "tokenizer": tokenizer.digest,
        "data": tokens.name,
        "micro_batch": micro_batch,
    }


def begin_folder(
    folder: Path,
    settings: dict[str, Any],
    texts: Texts,
    session: dict[str, Any],
    state: Path | None = None,
) -> None:
    """Lay out the folder of the run: its tokenizer, its provenance, its log."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier: list[Any] = []
    if state:
        origin = state.parent.parent
        if (origin / "provenance.json").exists():
            earlier = read_json(origin / "provenance.json")["sessions"]
        forget_states_after(folder, session["start_step"])
        if origin != folder and (origin / METRICS).exists():
            shutil.copy(origin / METRICS, folder / METRICS)
    texts[1].save(folder)
    story = {**settings, "corpus": texts[0], "sessions": [*earlier, session]}
    write_json(folder / "provenance.json", story)


def describe_result(
    recipe: Recipe,
    steps: int,
    *,
    seed: int,
    train_loss: float,
    judged: tuple[float, int],
    streams: tuple[TokenStream, TokenStream],
    weights: Path,
) -> dict[str, Any]:
    """What was made: `judged` are the held-out loss in nats and its tokens."""
    plan, (loss, count), (seen, held_out) = recipe.training, judged, streams
    vocabulary = recipe.model.vocab_size
    own = unigram_cross_entropy(held_out, held_out, vocabulary, smoothing=0)
    together = recipe.data.batch_size * plan.gradient_accumulation
    return {
        "name": recipe.name,
        "parameters": count_parameters(recipe.model),
        "tensors": len(parameter_shapes(recipe.model)),
        "steps": steps,
        "finished": steps == plan.max_steps,
        "tokens": steps * together * recipe.data.seq_len,
        "seed": seed,
        "precision": plan.mixed_precision,
        "train_loss": train_loss,
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        "val_tokens": count,
        "unigram_cross_entropy": unigram_cross_entropy(seen, held_out, vocabulary),
        "val_unigram_entropy": own,
        "ln_vocabulary": math.log(vocabulary),
        "model_sha256": sha256_file(weights),
    }
