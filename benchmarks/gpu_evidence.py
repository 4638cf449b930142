"""Measure on a bare node: a GPU, torch, no network, and not much time.

    python -m benchmarks.gpu_evidence --out runs/gpu --wheels wheelhouse
    python -m benchmarks.gpu_evidence --out runs/gpu --stages run,bench --until 700

Notable:
- Four stages of at most nine minutes, the most telling first: correctness, bench,
  trial, run. Each is useful alone, and one that fails or is cut off leaves what it
  had, with the error; the next one still runs.
- What comes back is at most 8 files in one folder, each under 16 MiB. Weights stay
  behind; their size and SHA-256 come along.
- `--until` ends the whole command after so many seconds; `--out` then has a file
  `done`, written last. A signal to terminate ends it as well, in order.
- The timed run measures a step first, unless it is told the pace, and lays its
  schedule over the minutes there are. What it plans stands in a file; a later call
  on the same disk goes on. Where the clock stops it, what there is is evaluated.
- `--rehearse` takes the same way with a tiny model on the CPU. Its files say so.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch

from albor.artifacts import digest, read_json, read_jsonl, sha256_file, write_json
from albor.config import load_recipe
from benchmarks.machine import ROOT, about

MINUTES = 9.0  # of a stage, at most: bare nodes are often lent for ten at a time
LOOK = 10.0  # seconds from one look at what a stage has to the next
LARGEST, ALL, FILES = 16 * 2**20, 64 * 2**20, 8  # of what comes back
PROBLEMS = ("evals/python-intermediate.jsonl", "evals/infilling.jsonl")
BENCHES = (  # the most telling first; one that is there already is not run again
    # Arms side by side on a card of 139 GiB. A graph needs five steps to warm up.
    "--preset 350m-medium --ablate --together --rounds 2 --warm-up 5 --timed 5"
    " --after 1 --timeout 120 --micro-batch 32 --micro-batch-of 'ours at 64=64'"
    " --inside ours 'ours at 64' --order ours 'ours at 64' 'attention: flash'"
    " 'one CUDA graph' 'logits all at once' 'activations computed again'"
    " 'not compiled'",
    "--preset 350m-large --rounds 2 --warm-up 2 --timed 2 --after 1 --timeout 120"
    " --inside ours --micro-batch 32 --micro-batch-of transformers-eager=16"
    " --order ours transformers-compiled transformers-eager plain",
    "--preset 350m --rounds 2 --warm-up 10 --timed 30 --after 10 --timeout 120"
    " --micro-batch 4 --order ours 'no CUDA graph' transformers-graphs"
    " transformers-compiled transformers-eager plain",
)
STEPS = 500  # of the timed run, or as near as may be
TINY = (
    "--preset tiny --ablate --order ours --warm-up 1 --timed 1 --after 0 --rounds 1"
)
ORIGINAL = (  # what its later documents say; other data, and no run of ours
    {"what": "the original's PyTorch canary, 131M tokens", "perplexity": 6.07},
    {"what": "entrenar, its best", "perplexity": 38.5},
)
Found = dict[str, Any]


@dataclass
class Place:
    """Where a call writes and reads, and how it runs."""

    out: Path  # what comes back
    work: Path  # what stays: states, weights, plans
    rehearse: bool
    minutes: float
    problems: tuple[str, ...] = PROBLEMS
    benches: tuple[str, ...] = BENCHES
    train_minutes: float = 0.0  # of the timed run, over all calls; 0: what is left
    pace: float = 0.0  # of the timed run, tokens per second; 0: measure it
    unisolated: bool = False
    site: Path | None = None  # of packages that the node lacks
    until: float = math.inf  # end of the command, on the monotonic clock
    end: float = field(default=0.0)  # of the stage, on that clock

    @property
    def evaluating(self) -> float:
        """Seconds that the evaluation of the timed run takes."""
        return 15.0 if self.rehearse else 90.0

    @property
    def left(self) -> float:
        """Seconds until this stage must be done."""
        return self.end - time.monotonic()

    def environment(self) -> dict[str, str]:
        """What every process of a stage sees."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if self.site:
            paths.insert(0, str(self.site))
        found = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONUNBUFFERED": "1",
            "MATPLOTLIBRC": str(ROOT / "notebooks"),
        }
        found.pop("ALBOR_TEST", None)  # the real thing, also when tests call
        return found | ({"CUDA_VISIBLE_DEVICES": ""} if self.rehearse else {})


class StageError(RuntimeError):
    """A stage could not do what it is for; what it had is kept."""


# ---- Processes with an end ----


def family(process: int) -> list[int]:
    """A process and all that it began, kernels of notebooks among them."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone in between
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += parents.get(one, [])
    return found


def run_limited(
    name: str,
    command: list[str],
    place: Place,
    seconds: float,
    so_far: Callable[[], None] = lambda: None,
) -> Found:
    """Run a command, and end it with all its children after so many seconds.

    What it prints goes to a log of that name. `so_far` is called now and then, to
    keep what there is in case that we are ended as well.
    """
    began, log = time.monotonic(), place.work / f"{name}.txt"
    code: int | None = None
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=place.environment(),
        )
        try:
            while code is None and (left := began + seconds - time.monotonic()) > 0:
                try:
                    code = process.wait(min(left, LOOK))
                except subprocess.TimeoutExpired:
                    so_far()
        finally:
            if process.poll() is None:
                for one in family(process.pid):
                    try:
                        os.kill(one, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    return {
        "code": code,  # None: it was cut off
        "seconds": round(time.monotonic() - began, 1),
        "tail": text.strip().splitlines()[-30:],
    }


def need(done: Found, what: str) -> None:
    """Raise unless the process ended well."""
    if done["code"] is None:
        raise StageError(f"{what} was cut off after {done['seconds']:.0f} s")
    if done["code"]:
        tail = "\n".join(done["tail"])
        raise StageError(f"{what} ended with {done['code']}:\n{tail}")


def papermill(
    notebook: str,
    to: Path,
    place: Place,
    so_far: Callable[[], None] = lambda: None,
    **parameters: Any,
) -> Found:
    """Execute a notebook of the project; what it printed is in the copy as well."""
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--log-output",
        "--no-progress-bar",
    ]
    command += ["--kernel", "python3", "--parameters_yaml", json.dumps(parameters)]
    command += [f"notebooks/{notebook}.ipynb", str(to)]
    return run_limited(to.stem, command, place, place.left, so_far)


def bring(name: str, place: Place) -> Path:
    """The file's place in `out`; there already, if an earlier call wrote it."""
    kept, here = place.work / name, place.out / name
    if here.exists():
        shutil.copy(here, kept)
    elif kept.exists():
        shutil.copy(kept, here)
    return here


def within(path: Path) -> str:
    """A path as the notebooks may print it: from the project's folder, if in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# ---- The stages ----


def correctness(place: Place, record: Found) -> None:
    """What the device computes, copies, repeats: see benchmarks.gpu_checks."""
    file = place.work / "checks.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--to", str(file)]
    command += ["--rehearse"] * place.rehearse
    done = run_limited("checks", command, place, place.left)
    if file.exists():
        checks = read_json(file)["checks"]
        record["checks"] = checks
        record["failed"] = [
            name for name, one in checks.items() if one["ok"] is False
        ]
        record["not_run"] = [
            name for name, one in checks.items() if one["ok"] is None
        ]
    need(done, "the checks")


def bench(place: Place, record: Found) -> None:
    """Our step beside its peers, and its own choices: see benchmarks.training."""
    results = record["benches"] = {}
    for arguments in place.benches:
        name = re.sub(r"[^a-z0-9]+", "-", arguments.lower()).strip("-")
        name = f"{name[:40]}-{digest([arguments])[:8]}"
        file = place.work / f"bench-{name}.json"
        told: Found = {"code": None, "seconds": 0.0, "tail": []}
        so_far = partial(keep_bench, told, file, record, place)
        if file.exists():
            told["tail"] = ["from an earlier call"]
            told["code"] = int(bool(read_json(file)["errors"]))
        else:
            if place.left < (5 if place.rehearse else 60):
                results[arguments] = {"not_run": "no time was left"}
                continue
            command = [sys.executable, "-m", "benchmarks.training"]
            command += [*shlex.split(arguments), "--out", str(file)]
            results[arguments] = told
            told |= run_limited(file.stem, command, place, place.left, so_far)
        results[arguments] = told
        so_far()
    if bad := [name for name, one in results.items() if one.get("code", 0) != 0]:
        raise StageError(f"not sound or not done: {'; '.join(bad)}")


def keep_bench(told: Found, file: Path, record: Found, place: Place) -> None:
    """Write down what a benchmark has, or had when it was cut off."""
    part = file.with_suffix(".part")
    if file.exists():
        told["result"] = read_json(file)
    elif part.exists():
        told["rounds"] = read_json(part)
    write_json(place.out / "gpu-bench.json", record)


def limited(place: Place, name: str) -> Path:
    """A recipe on as much text as the timed run: all there is takes too long."""
    text = (ROOT / f"configs/train/{name}.yaml").read_text(encoding="utf-8")
    limit = load_recipe("pretrain-350m-timed").data
    lines = f"  max_bytes: {limit.max_bytes}\n  val_bytes: {limit.val_bytes}\n"
    path = place.work / f"{name}.yaml"
    text, count = re.subn(r"(?m)^(data:.*\n)", rf"\g<1>{lines}", text)
    assert count == 1, name
    path.write_text(text, encoding="utf-8")
    load_recipe(path)
    return path


def trial(place: Place, record: Found) -> None:
    """The card's trial of 50 steps, as papermill runs it for anybody."""
    folder = place.work / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    told = {"output_dir": within(folder)}
    told |= {"precision": "fp16", "save_minutes": 0}  # the card's own
    if not place.rehearse:
        told["config"] = within(limited(place, "pretrain-350m-cuda-test"))
    else:
        told |= {"config": "pretrain-tiny", "precision": "fp32", "max_steps": 5}
        told |= {"corpus": "json"}
    notebook = place.out / "gpu-trial.ipynb"
    record["parameters"] = told
    so_far = partial(keep_log, folder, record, place)
    done = papermill("pretrain", notebook, place, so_far, **told)
    record["seconds_in_all"] = done["seconds"]
    record |= made(folder)
    need(done, "the trial")
    shutil.rmtree(folder)  # some gigabytes


def logged(folder: Path) -> Found:
    """What a run has logged up to now."""
    found: Found = {}
    log = folder / "metrics.jsonl"
    if log.exists() and (lines := read_jsonl(log)):
        losses = [line["loss"] for line in lines]
        found["loss"] = {
            "first": losses[0],
            "best": min(losses),
            "last": losses[-1],
        }
        found["stepping_seconds"] = sum(seconds_of_steps(lines))
        found["metrics"] = lines
    return found


def keep_log(folder: Path, record: Found, place: Place) -> None:
    """Write down what a run has logged up to now."""
    record |= logged(folder)
    write_json(place.out / f"gpu-{record['stage']}.json", record)


def made(folder: Path) -> Found:
    """What a run left in its folder: metrics, record, sizes and hashes."""
    found = logged(folder)
    if (folder / "final_model.json").exists():
        found["final_model"] = read_json(folder / "final_model.json")
        found["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.glob("*"))
            if path.is_file()
        }
    return found


def seconds_of_steps(lines: list[Found]) -> list[float]:
    """How long each step took, where the log tells the pace of the steps before."""
    found, waiting = [], []
    for line in lines:
        waiting.append(line["tokens"])
        if pace := line.get("tokens_per_second"):
            found += [tokens / pace for tokens in waiting]
            waiting = []
    return found


# ---- The timed run ----


def timed_recipe(place: Place, steps: int, warmup: int, turns: int = 0) -> Path:
    """The recipe with that schedule, in the work folder; comments and all.

    Of a run's states the clock decides; its held-out text is judged about 8 times.
    `turns`: micro-batches in a step; 0 leaves the recipe's.
    """
    changes = {"max_steps": steps, "warmup_steps": warmup, "save_interval": 0}
    changes |= {"eval_interval": steps // 8}
    changes |= {"gradient_accumulation": turns} if turns else {}
    name = "pretrain-tiny" if place.rehearse else "pretrain-350m-timed"
    text = (ROOT / f"configs/train/{name}.yaml").read_text(encoding="utf-8")
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^(  {key}: )\d+", rf"\g<1>{value}", text)
        assert count == 1, key
    path = place.work / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    load_recipe(path)  # refuses a schedule that cannot be
    return path


def schedule(seconds: float, per_step: float) -> tuple[int, int]:
    """Steps, and those of the warm-up, that fit the seconds; a margin is kept."""
    steps = math.floor(0.95 * seconds / per_step)
    if steps < 4:
        raise StageError(
            f"{seconds:.0f} s are left for steps of {per_step:.2f} s: give more "
            "--minutes, or call again"
        )
    return steps, max(1, steps // 10)


def lay_plan(seconds: float, per_step: float, tokens: int, turns: int) -> Found:
    """A schedule of steps that take so long, of so many tokens in so many turns.

    Where few of them fit, a step is halved, and again: a short run learns more from
    many small steps.
    """
    while turns % 2 == 0 and seconds / per_step < STEPS:
        turns, tokens, per_step = turns // 2, tokens // 2, per_step / 2
    steps, warmup = schedule(seconds, per_step)
    return {
        "steps": steps,
        "warmup_steps": warmup,
        "gradient_accumulation": turns,
        "tokens_per_step": tokens,
        "tokens": steps * tokens,
        "seconds_per_step": per_step,
        "seconds_of_steps": seconds,
    }


def seconds_in(notebook: Path, stages: tuple[str, ...]) -> float:
    """What the table at the end of an executed pretrain.ipynb says of stages."""
    cells = read_json(notebook)["cells"]
    outputs = [one for cell in cells for one in cell.get("outputs", [])]
    text = "".join("".join(one.get("text", [])) for one in outputs)
    found = re.findall(r"(?m)^(\w[\w ]*?) +([\d.]+) s +[\d.]+%$", text)
    return sum(float(seconds) for name, seconds in found if name in stages)


def common(place: Place) -> Found:
    """Parameters that the measuring run and the run share."""
    told = {"corpus": "json" if place.rehearse else ""}
    return told | {"precision": "fp32" if place.rehearse else "bf16"}


def make_plan(place: Place) -> Found:
    """Take a few steps as the run will; lay the schedule over the time left.

    They also prepare tokenizer and tokens, which the run then finds. Where the pace
    is given nothing is measured, and the run prepares them itself.
    """
    if place.pace:
        beside, outside = (20.0, 12.0) if place.rehearse else (190.0, 125.0)
        seconds = place.train_minutes * 60 or place.left - beside - place.evaluating
        usual = load_recipe(timed_recipe(place, STEPS, 1))
        turns = usual.training.gradient_accumulation
        tokens = turns * usual.data.batch_size * usual.data.seq_len
        return lay_plan(seconds, tokens / place.pace, tokens, turns) | {
            "seconds_beside_steps": beside,
            "seconds_outside_training": outside,
            "pace_given": place.pace,
        }
    few = 6 if place.rehearse else 24
    folder = place.work / "measure"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = timed_recipe(place, few, 1)
    told = common(place) | {"config": within(recipe), "output_dir": within(folder)}
    told |= {"save_minutes": 0}
    copy = place.work / "measure.ipynb"
    done = papermill("pretrain", copy, place, **told)
    need(done, "measuring")
    lines = read_jsonl(folder / "metrics.jsonl")
    shutil.rmtree(folder)
    # The first steps compile, allocate, and choose kernels.
    per_step = statistics.median(seconds_of_steps(lines)[few // 2 :])
    once = seconds_in(copy, ("tokenizer", "tokens"))  # the run will find those
    beside = max(0.0, done["seconds"] - few * per_step - once)
    inside = seconds_in(copy, ("training", "guards"))
    seconds = place.train_minutes * 60 or place.left - beside - place.evaluating
    turns = load_recipe(recipe).training.gradient_accumulation
    return lay_plan(seconds, per_step, lines[0]["tokens"], turns) | {
        "seconds_beside_steps": beside,
        "seconds_outside_training": max(0.0, done["seconds"] - inside - once),
        "measured_in": done["seconds"],
    }


def run(place: Place, record: Found) -> None:
    """The timed run: plan, train or go on, and evaluate what there is."""
    file, folder = place.work / "plan.json", place.work / "run"
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_json(file, make_plan(place))
    plan = record["plan"] = read_json(file)
    write_json(place.out / "gpu-run.json", record)
    sizes = ("steps", "warmup_steps", "gradient_accumulation")
    recipe = timed_recipe(place, *(plan[size] for size in sizes))
    ended = folder / "final_model.json"
    if not (ended.exists() and read_json(ended)["finished"]):
        left = place.left - place.evaluating
        spare = left - plan["seconds_beside_steps"]
        if spare < 4 * plan["seconds_per_step"]:
            raise StageError(
                f"{place.left:.0f} s are left, and a run spends "
                f"{place.left - spare:.0f} s beside its steps; call again"
            )
        told = common(place) | {
            "config": within(recipe),
            "output_dir": within(folder),
            "resume": True,
            # Of a call of `train`, which compiles first, judges and saves.
            "max_minutes": (left - plan["seconds_outside_training"]) / 60,
            "save_minutes": 3,
        }
        record["parameters"] = told
        so_far = partial(keep_log, folder, record, place)
        copy = place.out / "gpu-run.ipynb"
        done = papermill("pretrain", copy, place, so_far, **told)
        record["seconds_of_call"] = done["seconds"]
        record |= made(folder)
        write_json(place.out / "gpu-run.json", record)
        need(done, "the run")
    record |= made(folder)
    bring("gpu-run.ipynb", place)
    draw_curve(record, place.out / "gpu-run.png")
    record["complete"] = record["final_model"]["finished"]
    if not record["complete"]:
        steps = record["final_model"]["steps"]
        record["note"] = f"{steps} of {plan['steps']} steps; call again to go on"
    write_json(place.out / "gpu-run.json", record)
    if not place.rehearse and place.left < 60:
        raise StageError("no time was left for the evaluation; call again")
    evaluate(place, record, folder)


def evaluate(place: Place, record: Found, folder: Path) -> None:
    """The evaluation job on what the run made; it goes on where it was cut off."""
    judged = place.work / f"evaluation-{record['final_model']['steps']}"
    provenance = read_json(folder / "provenance.json")
    told = {
        "checkpoint": within(folder),
        "problems": os.pathsep.join(place.problems),
        "val": f"data/{provenance['data']}",
        "seq_len": provenance["recipe"]["data"]["seq_len"],
        "output_dir": within(judged),
        "precision": "fp32" if place.rehearse else "bf16",
        "batch_size": 4 if place.rehearse else 64,
        "allow_unisolated": place.unisolated,
    }
    if place.rehearse:
        told |= {"limit": 1, "max_new_tokens": 4, "problems": PROBLEMS[1]}
    notebook = place.out / "gpu-evaluate.ipynb"
    done = papermill("evaluate", notebook, place, **told)
    record["evaluation_parameters"] = told
    results = judged / "results.json"
    if results.exists():
        record["evaluation"] = read_json(results)
    record["original"] = {
        "note": "history, on other data and another tokenizer: not to be compared "
        "with `evaluation` token by token",
        "figures": list(ORIGINAL),
    }
    need(done, "the evaluation")


def draw_curve(record: Found, to: Path) -> None:
    """Loss against tokens: each step, a running mean, the held-out text."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = record["metrics"]
    losses = [line["loss"] for line in lines]
    tokens = [(line["step"] + 1) * line["tokens"] for line in lines]
    width = max(1, len(losses) // 40)
    means = [
        statistics.fmean(losses[max(0, i - width) : i + 1])
        for i in range(len(losses))
    ]
    judged = [
        (x, line["val_loss"])
        for x, line in zip(tokens, lines, strict=True)
        if "val_loss" in line
    ]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(
        tokens, losses, color="#56B4E9", linewidth=0.7, label="training, each step"
    )
    ax.plot(tokens, means, color="#0072B2", label=f"training, mean of {width + 1}")
    if judged:
        ax.plot(*zip(*judged, strict=True), "o", color="#D55E00", label="held out")
    where = (
        "a rehearsal on the CPU" if record["rehearsal"] else record["gpu"]["name"]
    )
    ax.set(
        xlabel="tokens",
        ylabel="nats per token",
        title=f"Loss of the timed run, {where}",
    )
    ax.legend()
    fig.savefig(to, dpi=120)
    plt.close(fig)


# ---- The command ----

STAGES: dict[str, Callable[[Place, Found], None]] = {
    one.__name__: one for one in (correctness, bench, trial, run)
}


def run_stage(name: str, place: Place) -> Found:
    """Run a stage and write its file, whatever happens."""

    def terminate(*_: Any) -> None:
        place.until = time.monotonic()  # for what would come after
        raise StageError("it was told to terminate")

    place.end = min(time.monotonic() + place.minutes * 60, place.until)
    began, device = time.monotonic(), "cpu" if place.rehearse else "cuda"
    record: Found = {"stage": name} | about(torch.device(device))
    record |= {"finished": False, "error": "it was cut off"}
    path = place.out / f"gpu-{name}.json"
    write_json(path, record)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        STAGES[name](place, record)
        record |= {"finished": True, "error": None}
    except Exception as error:  # the next stage still runs
        record["error"] = f"{type(error).__name__}: {error}"
    finally:
        signal.signal(signal.SIGTERM, before)
    record["seconds"] = round(time.monotonic() - began, 1)
    write_json(path, record)
    return record


def keep_limits(out: Path) -> list[str]:
    """Take away what is too large to come back; say what that was."""
    ours = [path for path in out.glob("gpu-*") if path.is_file()]
    dropped, files = [], sorted(ours, key=lambda path: path.stat().st_size)
    total = 0
    for number, path in enumerate(files):
        size = path.stat().st_size
        if size > LARGEST or total + size > ALL or number >= FILES:
            dropped.append(f"{path.name}, {size:,} bytes")
            path.unlink()
        else:
            total += size
    return dropped


def install(wheels: Path, site: Path) -> None:
    """Unpack the wheels beside what the node has; nothing is fetched."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    if not found:
        raise SystemExit(
            f"--wheels {wheels}: no wheels there; run `make wheelhouse`"
        )
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    command += ["--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*command, *found], check=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of what comes back")
    add(
        "--stage",
        "--stages",
        dest="stages",
        default="all",
        help=f"{', '.join(STAGES)}, 1 to 4, several with commas, or all",
    )
    add("--minutes", type=float, default=MINUTES, help="of each stage, at most 9")
    add("--until", type=float, default=math.inf, help="seconds of all stages")
    add(
        "--train-minutes",
        type=float,
        default=0.0,
        help="of the timed run, all calls",
    )
    add("--pace", type=float, default=0.0, help="of its steps, in tokens/s")
    add("--wheels", type=Path, help="folder of `make wheelhouse`")
    add("--work", type=Path, default=ROOT / "runs/gpu-work", help="what stays")
    add("--problems", action="append", help="a file of problems more, as HumanEval")
    add("--bench", action="append", help="arguments of benchmarks.training instead")
    add(
        "--unisolated", action="store_true", help="run solutions without namespaces"
    )
    add("--rehearse", action="store_true", help="tiny, on the CPU")
    given = parser.parse_args(arguments)
    known = {str(i): name for i, name in enumerate(STAGES, 1)}
    asked = ",".join(STAGES) if given.stages == "all" else given.stages
    given.stages = [known.get(name, name) for name in asked.split(",")]
    if wrong := [name for name in given.stages if name not in STAGES]:
        parser.error(f"--stage {wrong[0]}: there are {', '.join(STAGES)} and all")
    if not given.until > 0:
        parser.error(f"--until {given.until:g}: more than 0")
    if not 0 <= given.pace < math.inf:
        parser.error(
            f"--pace {given.pace:g}: tokens per second, or 0 to measure it"
        )
    if not 0 < given.minutes <= MINUTES:
        parser.error(
            f"--minutes {given.minutes:g}: more than 0, at most {MINUTES:g}"
        )
    if not given.rehearse and not torch.cuda.is_available():
        parser.error(
            "torch sees no GPU here; --rehearse takes the same way without"
        )
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; 0 if all of them finished."""
    began, given = time.monotonic(), parse(arguments)
    out, work = given.out.resolve(), given.work.resolve()
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    (out / "done").unlink(missing_ok=True)
    place = Place(out, work, given.rehearse, given.minutes)
    place.problems += tuple(given.problems or ())
    place.until, place.pace = began + given.until, given.pace
    place.train_minutes, place.unisolated = given.train_minutes, given.unisolated
    if given.bench or given.rehearse:
        place.benches = tuple(given.bench or [f"{TINY} --random --device cpu"])
    if given.wheels:
        place.site = work / "site"
        install(given.wheels, place.site)
    sound = True
    for name in given.stages:
        print(f"{name}: {'a rehearsal, ' * given.rehearse}", end="", flush=True)
        if time.monotonic() >= place.until:
            print("not begun, no time is left", flush=True)
            sound = False
            continue
        record = run_stage(name, place)
        sound = sound and record["finished"] and record.get("complete", True)
        said = "finished" if record["finished"] else record["error"]
        if "note" in record:
            said += f", stopped by the clock: {record['note']}"
        print(f"{said} ({record['seconds']:.0f} s)", flush=True)
    for line in keep_limits(out):
        print(f"too large to come back, removed: {line}")
    for path in sorted(out.glob("gpu-*")):
        print(f"{path.stat().st_size:>12,}  {path.name}")
    (out / "done").touch()  # who waits for this finds all the others
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
