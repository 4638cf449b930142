# Generated from book/falsify.md: edit the chapter, not this file.
"""The card's predictions as tests of a run's folder, and a test of its weights.

Notable:
- a verdict is one of four words, and it carries the figures that it rests on;
- too little data is a verdict of its own: no prediction is corroborated by a run
  that could not have contradicted it;
- nothing is trained or repaired here: all is read from what a run has left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from albor.artifacts import read_json, read_jsonl, sha256_file
from albor.model import Albor
from albor.train import METRICS
from albor.weights import read_config

__all__ = [
    "SAME",
    "Status",
    "Validation",
    "Verdict",
    "falsify",
    "loss_falls",
    "norms_bounded",
    "read_log",
    "run_settings",
    "runs_agree",
    "smoothed",
    "validate_checkpoint",
]


Status = Literal["CORROBORATED", "FALSIFIED", "INSUFFICIENT DATA", "NOT RUN"]


@dataclass(frozen=True)
class Verdict:
    """What the data say of a prediction, and which data."""

    prediction: str  # e.g. "FALSIFY-ALBOR-001"
    statement: str
    status: Status
    evidence: str


def smoothed(losses: Sequence[float], span: int = 100) -> list[float]:
    """Exponential moving average: weight 2 / (span + 1) on the newest loss."""
    means: list[float] = []
    for loss in losses:
        last = means[-1] if means else loss
        means.append(last + 2 / (span + 1) * (loss - last))
    return means


def read_log(run: str | Path) -> list[dict[str, Any]] | None:
    """The log of a run, one record per step from step 0; None if there is none.

    A log with a step missing or out of place is refused: it proves nothing.
    """
    path = Path(run) / METRICS
    if not path.exists():
        return None
    log = read_jsonl(path)
    for place, record in enumerate(log):
        if record.get("step") != place:
            raise ValueError(
                f"{path}, line {place + 1}: step {record.get('step')!r} where "
                f"{place} is due; restore the log, or judge another run"
            )
    return log


def loss_falls(
    run: str | Path,
    warmup_steps: int,
    *,
    span: int = 100,
    window: int = 500,
    tolerance: float = 0.05,
) -> Verdict:
    """FALSIFY-ALBOR-001: the smoothed loss falls after the warm-up.

    Falsified if it does not end lower than it was at the end of the warm-up, by
    more than three standard errors of the difference; or if it lies more than
    `tolerance` above its value of `window` steps ago for `span` steps on end. Needs
    warmup_steps + window + span steps.
    """
    name = "FALSIFY-ALBOR-001"
    statement = (
        f"the mean loss over {span} steps falls after {warmup_steps} steps of "
        f"warm-up, and no {window} steps raise it by more than {tolerance:.0%}"
    )
    log = read_log(run)
    if log is None:
        return Verdict(name, statement, "NOT RUN", f"no {METRICS} in the folder")
    losses = [record["loss"] for record in log]
    means = smoothed(losses, span)
    if len(log) < warmup_steps + window + span:
        why = f"{len(log)} steps, and {warmup_steps + window + span} are the least"
        return Verdict(name, statement, "INSUFFICIENT DATA", why)
    late = range(warmup_steps, len(log))
    fall = means[warmup_steps] - means[-1]
    # The mean of `span` independent losses has their variance over `span`.
    spread = sum((losses[t] - means[t]) ** 2 for t in late) / len(late)
    error = (2 * spread / span) ** 0.5
    rises = [means[t] / means[t - window] - 1 for t in late[window:]]
    lasting = [min(rises[i : i + span]) for i in range(len(rises) - span + 1)]
    worst = max(range(len(lasting)), key=lasting.__getitem__)
    evidence = (
        f"the mean falls from {means[warmup_steps]:.3f} by {fall:.3f}, with a "
        f"standard error of {error:.3f}; its worst lasting change over {window} "
        f"steps is {lasting[worst]:+.1%}, at step {warmup_steps + window + worst}"
    )
    held = fall > 3 * error and lasting[worst] <= tolerance
    status: Status = "CORROBORATED" if held else "FALSIFIED"
    return Verdict(name, statement, status, evidence)


def norms_bounded(
    run: str | Path, warmup_steps: int, *, bound: float = 10.0
) -> Verdict:
    """FALSIFY-ALBOR-002: gradient norms stay under `bound`.

    After clipping at every step; before clipping at every step after the warm-up. A
    step that fp16 skipped has no norm: it is counted and not judged.
    """
    name = "FALSIFY-ALBOR-002"
    statement = (
        f"global gradient norms stay under {bound:g}: clipped ones at every step, "
        f"unclipped ones after {warmup_steps} steps of warm-up"
    )
    log = read_log(run)
    if log is None:
        return Verdict(name, statement, "NOT RUN", f"no {METRICS} in the folder")
    judged = [record for record in log if record["grad_norm"] is not None]
    late = [record for record in judged if record["step"] >= warmup_steps]
    if not late:
        why = f"{len(log)} steps, none of them with a norm after the warm-up"
        return Verdict(name, statement, "INSUFFICIENT DATA", why)
    clipped = max(judged, key=lambda record: record["grad_norm"] * record["clip"])
    free = max(late, key=lambda record: record["grad_norm"])
    highest = clipped["grad_norm"] * clipped["clip"]
    evidence = (
        f"{len(judged)} steps judged, {len(log) - len(judged)} skipped; the "
        f"largest norm is {highest:.3g} at step {clipped['step']} when clipped, "
        f"{free['grad_norm']:.3g} at step {free['step']} after the warm-up when not"
    )
    held = highest < bound and free["grad_norm"] < bound
    status: Status = "CORROBORATED" if held else "FALSIFIED"
    return Verdict(name, statement, status, evidence)


SAME = ("recipe", "seed", "corpus", "tokenizer", "micro_batch", "versions")


def run_settings(run: str | Path) -> dict[str, Any]:
    """What decides the weights of a run, by the names in `SAME`."""
    record = read_json(Path(run) / "provenance.json")
    recipe, corpus = record["recipe"], record["corpus"]
    plan = recipe["training"] | {"output_dir": ""}  # where it lies decides nothing
    return {
        "recipe": recipe | {"training": plan},
        "seed": record["seed"],
        "corpus": corpus["digest"],
        "tokenizer": record["tokenizer"],
        "micro_batch": record["micro_batch"],
        "versions": [session["versions"] for session in record["sessions"]][-1:],
    }


def runs_agree(
    run: str | Path, again: str | Path | None, *, seed: int = 42
) -> Verdict:
    """FALSIFY-ALBOR-003: two runs with one seed end in the same bytes.

    `model.safetensors` of both folders must have one SHA-256. Folders that differ
    in what decides the weights, or in their number of steps, are no evidence.
    """
    name = "FALSIFY-ALBOR-003"
    statement = f"two runs with seed {seed} end in weights with the same SHA-256"
    if again is None:
        return Verdict(name, statement, "NOT RUN", "there is no second run")
    both = Path(run), Path(again)
    if both[0].resolve() == both[1].resolve():
        raise ValueError(f"{run} is given twice: a run always agrees with itself")
    files = ("model.safetensors", "provenance.json", "final_model.json")
    paths = [folder / file for folder in both for file in files]
    if missing := [f"{p.parent.name}/{p.name}" for p in paths if not p.exists()]:
        return Verdict(name, statement, "NOT RUN", f"missing: {', '.join(missing)}")
    ours, theirs = (run_settings(folder) for folder in both)
    differ = [key for key in SAME if ours[key] != theirs[key]]
    ends = [read_json(folder / "final_model.json")["steps"] for folder in both]
    if ends[0] != ends[1]:
        differ.append(f"steps ({ends[0]} and {ends[1]})")
    if ours["seed"] != seed:
        differ.append(f"the seed asked for ({seed}, not {ours['seed']})")
    if differ:
        why = f"not the same run: they differ in {', '.join(differ)}"
        return Verdict(name, statement, "INSUFFICIENT DATA", why)
    hashes = [sha256_file(folder / "model.safetensors") for folder in both]
    evidence = f"after {ends[0]} steps {hashes[0][:16]} and {hashes[1][:16]}"
    status: Status = "CORROBORATED" if hashes[0] == hashes[1] else "FALSIFIED"
    return Verdict(name, statement, status, evidence)


@dataclass(frozen=True)
class Validation:
    """What a file of weights shows about its training."""

    tensors: int
    unmoved: tuple[str, ...]  # equal to the seeded initial weights, every bit
    partly: tuple[str, ...]  # less than half of their numbers have moved
    equal_layers: tuple[str, ...]  # the same bytes as in an earlier layer
    not_finite: tuple[str, ...]
    least_moved: float  # the smallest share of moved numbers in any tensor

    @property
    def passed(self) -> bool:
        """All tensors moved, layers distinct, nothing infinite or not a number."""
        return not (self.unmoved or self.equal_layers or self.not_finite)

    def __str__(self) -> str:
        if len(self.unmoved) == self.tensors:
            return f"FAIL: all {self.tensors} tensors are the initial weights"
        words = ("not moved", "equal to an earlier layer", "not finite")
        names = (self.unmoved, self.equal_layers, self.not_finite)
        faults = [
            f"{w}: {', '.join(n)}" for w, n in zip(words, names, strict=True) if n
        ]
        if faults:
            return f"FAIL: {'; '.join(faults)}"
        return (
            f"PASS: all {self.tensors} tensors moved, in each at least "
            f"{self.least_moved:.0%} of the numbers; layers distinct; all finite"
        )


def validate_checkpoint(folder: str | Path, seed: int | None = None) -> Validation:
    """Compare a folder's weights with the initial ones of `seed`, tensor by tensor.

    Without `seed` it is the one in `provenance.json`. Weights of another origin
    have moved in every tensor: the test is for runs of this package.
    """
    folder = Path(folder)
    if seed is None:
        try:
            seed = int(read_json(folder / "provenance.json")["seed"])
        except (OSError, KeyError) as error:
            raise ValueError(
                f"{folder}: no seed in provenance.json; give the one of the run"
            ) from error
    config, _ = read_config(folder / "config.json")
    weights = load_file(folder / "model.safetensors")
    initial = {
        name: p.detach() for name, p in Albor(config, seed).named_parameters()
    }
    if weights.keys() != initial.keys():
        odd = sorted(weights.keys() ^ initial.keys())
        raise ValueError(f"{folder}: other tensors than the model's: {odd[:4]}")
    twins: list[str] = []
    earlier: dict[str, list[torch.Tensor]] = {}
    for name, tensor in weights.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        if any(torch.equal(tensor, other) for other in earlier.get(kind, [])):
            twins.append(name)
        earlier.setdefault(kind, []).append(tensor)
    shares = {
        name: float((tensor != initial[name]).float().mean())
        for name, tensor in weights.items()
    }
    bad = [name for name, x in weights.items() if not x.isfinite().all()]
    return Validation(
        tensors=len(weights),
        unmoved=tuple(name for name, share in shares.items() if share == 0),
        partly=tuple(name for name, share in shares.items() if 0 < share < 0.5),
        equal_layers=tuple(twins),
        not_finite=tuple(bad),
        least_moved=min(shares.values()),
    )


def falsify(run: str | Path, again: str | Path | None = None) -> list[Verdict]:
    """Judge a run by the predictions 001 to 003; `again` is the same run repeated.

    The warm-up is taken from the run's own recipe.
    """
    path = Path(run) / "provenance.json"
    plan = read_json(path)["recipe"]["training"] if path.exists() else {}
    warmup = int(plan.get("warmup_steps", 0))
    falls, bounded = loss_falls(run, warmup), norms_bounded(run, warmup)
    return [falls, bounded, runs_agree(run, again)]
