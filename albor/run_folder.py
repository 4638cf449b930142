# Generated from book/run_folder.md: edit the chapter, not this file.
"""The folder of a finished run, read whole; refused if it contradicts itself.

Notable:
- a value is computed again wherever another file of the folder allows it; two that
  differ are refused, with both;
- the log is held to the recipe step by step, the summary to the log, the scores to
  the line of each program, and everything to the bytes of the weights;
- nothing is repaired and nothing has a default.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.artifacts import digest, read_json, read_jsonl, sha256_file
from albor.config import Recipe
from albor.falsify import read_log
from albor.likelihood import Perplexity
from albor.model import Albor
from albor.problems import Problem, summarize
from albor.provenance import by_distribution, verify
from albor.shapes import build, count_parameters, parameter_shapes
from albor.tokenizer import Tokenizer
from albor.train import METRICS, scheduled_rate
from albor.weights import hf_config, load_model

__all__ = [
    "FILES",
    "NEEDS",
    "FolderError",
    "Held",
    "agree",
    "marks_of",
    "read_evaluation",
    "read_part",
    "read_run",
    "refused",
    "shares",
    "step_time",
]


class FolderError(ValueError):
    """A folder that contradicts itself, or lacks something; the text says what."""


def agree(what: str, recorded: Any, found: Any) -> None:
    """Refuse two values for one thing; floats may differ in the tenth digit."""
    numbers = isinstance(recorded, int | float) and isinstance(found, int | float)
    if recorded != found and not (numbers and math.isclose(recorded, found)):
        raise FolderError(
            f"{what}: recorded {recorded}, but the folder gives {found}; one of "
            "the two is not this run's. Restore the file, or measure again"
        )


@contextlib.contextmanager
def refused(run: Path) -> Iterator[None]:
    """Whatever is missing or malformed inside is a `FolderError` that names it."""
    try:
        yield
    except FolderError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise FolderError(f"{run}: no run of this package: {why}") from error
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise FolderError(f"{run}: {error}") from error


NEEDS: dict[str, dict[str, type]] = {  # what must be there, and its type
    "final_model.json": {
        **{"name": str, "parameters": int, "tensors": int, "steps": int},
        **{"finished": bool, "tokens": int, "seed": int, "precision": str},
        **{"train_loss": float, "val_loss": float, "val_perplexity": float},
        **{"val_tokens": int, "unigram_cross_entropy": float},
        **{"val_unigram_entropy": float, "ln_vocabulary": float},
        **{"model_sha256": str},
    },
    "provenance.json": {
        **{"recipe": dict, "seed": int, "corpus": dict, "tokenizer": str},
        **{"data": str, "micro_batch": int, "sessions": list},
    },
    "config.json": {},
}
FILES = (*NEEDS, METRICS, "tokenizer.json", "model.safetensors")


@dataclass(frozen=True)
class Held:
    """What the folder of a finished run holds, its parts agreeing."""

    folder: Path
    recipe: Recipe
    final: dict[str, Any]  # final_model.json
    made: dict[str, Any]  # provenance.json
    log: list[dict[str, Any]]  # metrics.jsonl
    model: Albor
    tokenizer: Tokenizer
    evaluation: dict[str, Any] | None  # evaluation/results.json

    @property
    def scores(self) -> dict[str, Any]:
        """What each set of problems gave; empty if none was run."""
        return dict(self.evaluation["problems"]) if self.evaluation else {}

    @property
    def record(self) -> dict[str, Any] | None:
        """The verified record of the corpus; None for token rows by others."""
        return self.made["corpus"].get("record")

    def stream(self, split: str) -> int | None:
        """How many tokens the shards of a split hold, copies and ends included."""
        if self.record is None:
            return None
        shards = self.record["shards"]
        return sum(x["tokens"] for x in shards if x["split"] == split)


def step_time(held: Held) -> tuple[float, int]:
    """Seconds spent in steps by the paces in the log, and the steps they cover.

    A pace is the mean since the one before it; a session's first is its own alone.
    """
    starts = [session.get("start_step") for session in held.made["sessions"]]
    seconds, covered, since = 0.0, 0, 0
    for record in held.log:
        since = record["step"] if record["step"] in starts else since
        if pace := record.get("tokens_per_second"):
            steps = record["step"] + 1 - since
            seconds += steps * record["tokens"] / pace
            covered, since = covered + steps, record["step"] + 1
    return seconds, covered


def shares(held: Held) -> list[tuple[str, str, int, str]]:
    """Licences of the training text: share of its tokens, tokens, packages."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in by_distribution(held.record) if held.record else ():
        if one["split"] == "train":
            groups.setdefault(one["licence"], []).append(one)
    rows = []
    for name, some in groups.items():
        which = (f"{x['distribution']} {x['version']}".strip() for x in some)
        rows.append((name, sum(x["tokens"] for x in some), ", ".join(which)))
    whole = max(1, sum(tokens for _, tokens, _ in rows))
    rows.sort(key=lambda row: (-row[1], row[0]))
    return [(name, f"{n / whole:.1%}", n, which) for name, n, which in rows]


def marks_of(told: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The scores, with their intervals, in what `summarize` gives."""
    return {k: told[k] for k in sorted(told) if k == "exact" or k[:5] == "pass@"}


def read_part(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder with all that it needs, each of its type."""
    part = read_json(folder / name)
    for key, kind in NEEDS[name].items():
        if type(value := part.get(key)) is not kind:
            why = f"expected {kind.__name__}; it is not what a run writes"
            raise FolderError(f"{name}: {key} = {value!r:.60}: {why}")
    return dict(part)


def read_run(run: str | Path) -> Held:
    """Read a run's folder; FolderError at the first two values that differ."""
    folder = Path(run)
    for name in FILES:
        if not (folder / name).is_file():
            why = "the run is not finished: resume it, or name another folder"
            raise FolderError(f"{folder} has no {name}; {why}")
    with refused(folder):
        parts = {name: read_part(folder, name) for name in NEEDS}
        final, made = parts["final_model.json"], parts["provenance.json"]
        recipe, log = build(Recipe, made["recipe"]), read_log(folder) or []
        plan, shape = recipe.training, recipe.model
        agree("config.json", parts["config.json"], hf_config(shape))
        weights = sha256_file(folder / "model.safetensors")
        batch = recipe.data.batch_size * plan.gradient_accumulation
        found = {
            "model_sha256": weights,
            "name": recipe.name,
            "parameters": count_parameters(shape),
            "tensors": len(parameter_shapes(shape)),
            "steps": len(log),
            "finished": len(log) == plan.max_steps,
            "tokens": len(log) * batch * recipe.data.seq_len,
            "seed": made["seed"],
            "precision": plan.mixed_precision,
            "train_loss": log[-1]["loss"],
            "val_perplexity": math.exp(min(final["val_loss"], 700)),
            "ln_vocabulary": math.log(shape.vocab_size),
        }
        for key, value in found.items():
            agree(f"final_model.json, {key}", final[key], value)
        for record in log:
            step, norm = record["step"], record["grad_norm"]
            at = f"{METRICS}, step {step}"
            agree(f"{at}, lr", record["lr"], scheduled_rate(recipe, step))
            agree(f"{at}, tokens", record["tokens"], batch * recipe.data.seq_len)
            clip = min(1.0, plan.grad_clip / norm) if norm else 1.0
            agree(f"{at}, clip", record["clip"], clip)
        hashed = sha256_file(folder / "tokenizer.json")
        agree("provenance.json, tokenizer", made["tokenizer"], hashed)
        if "record" in made["corpus"]:
            verify(made, tokenizer=folder)
            inputs = made["corpus"]["record"]["data"]["inputs"]
            for key in ("fim_rate", "upsample"):
                value = getattr(recipe.data, key)
                agree(f"provenance.json, recipe, {key}", value, inputs[key])
        else:  # rows of tokens from files, by their hashes
            named = digest(made["corpus"]["report"]["files"])
            agree("provenance.json, corpus", made["corpus"]["digest"], named)
        model, tokenizer = load_model(folder), Tokenizer.load(folder)
        results = read_evaluation(folder, weights, tokenizer)
        held = Held(folder, recipe, final, made, log, model, tokenizer, results)
        if (size := held.stream("val")) is not None:
            length = min(recipe.data.seq_len, size - 1)  # as evaluate_loss cuts it
            whole = (size - 1) // length * length
            agree("final_model.json, val_tokens", final["val_tokens"], whole)
        return held


def read_evaluation(
    folder: Path, weights: str, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    """`evaluation/results.json`, scored again from its lines; None if not there."""
    place = folder / "evaluation" / "results.json"
    if not place.exists():
        return None
    results, at = read_json(place), "evaluation/results.json"
    agree(f"{at}, weights", results["weights"], weights)
    if told := results["perplexity"]:
        names = ("loss", "standard_error", "tokens", "rows", "seq_len", "bytes")
        again = Perplexity(*(told[name] for name in names)).record()
        again["tokens"] = told["rows"] * told["seq_len"]
        for key, value in again.items():
            agree(f"{at}, perplexity, {key}", told[key], value)
    for name, told in results["problems"].items():
        settings = read_json(place.with_name(f"{name}_settings.json"))
        lines = read_jsonl(place.with_name(f"{name}_results.jsonl"))
        known = {"weights": weights, "tokenizer": tokenizer.digest}
        for key, value in {**known, "n": told["samples"]}.items():
            agree(f"{name}_settings.json, {key}", settings[key], value)
        for number, line in enumerate(lines, start=1):
            passed = line["result"] == "passed"
            agree(f"{name}_results.jsonl, line {number}", line["passed"], passed)
        samples = {(line["task_id"], line["sample"]) for line in lines}
        agree(f"{name}_results.jsonl, different samples", len(samples), len(lines))
        blank = ("", "", "", "")  # of a problem, scores need the kind alone
        kinds = {x["task_id"]: "" if "exact" in x else None for x in lines}
        problems = {key: Problem(key, *blank, gap) for key, gap in kinds.items()}
        ks = [int(key[5:]) for key in told if key.startswith("pass@")] or [1]
        again = summarize(problems, lines, ks)
        for key in sorted({*told, *again}):
            agree(f"{at}, {name}, {key}", told.get(key), again.get(key))
    return dict(results)
