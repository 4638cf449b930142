"""Measure a training step beside what people would use instead.

    make bench                                     # the small preset
    make bench ARGS="--preset 350m --rounds 5"
    make bench ARGS="--ablate"                     # our own choices, one at a time

Every arm is a process of its own that starts from the same weights and reads the
same tokens. The arms take turns, round after round, so that a busy machine slows
them all; a ratio is taken within a round. For a GPU they compile side by side. The
result lands in `benchmarks/results/training-PRESET-DEVICE.json`, with `-ablation`
behind it for the second kind. What a run has so far is beside it, in `.part`, until
it ends.
"""

import argparse
import dataclasses
import platform
import statistics
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from albor.artifacts import digest, write_json
from albor.batches import Batches
from albor.ceilings import flops_per_token
from albor.config import ModelConfig, Recipe, load_recipe, project_path
from albor.corpus import build_corpus
from albor.data import prepare
from albor.hardware import free_memory, pick_device, pick_precision
from albor.model import Albor
from albor.resident import GRAPH_TOKENS
from albor.shapes import count_parameters
from albor.shards import TokenStream
from albor.tokenizer import Tokenizer, TokenizerError
from albor.train import scheduled_rate
from benchmarks.arms import ABLATIONS, ARMS, REFERENCE, Job
from benchmarks.machine import commit, processor, source_digest
from benchmarks.rounds import run_rounds

# A recipe each, and the steps of an arm: (warm-up, timed, afterwards) on a CPU and
# on a GPU. Those afterwards reach step 50, and on a GPU their copies are counted.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"recipe": "pretrain-tiny", "cpu": (2, 2, 0), "cuda": (10, 30, 10)},
    "small": {
        "recipe": "pretrain-small",
        "cpu": (10, 30, 10),
        "cuda": (10, 30, 10),
    },
    "350m": {
        "recipe": "pretrain-350m-cuda-test",
        "cpu": (4, 3, 0),  # up to then eager arms still fault in fresh memory
        "cuda": (10, 30, 10),
    },
    "350m-medium": {
        "recipe": "pretrain-350m-timed",
        "cpu": (1, 1, 0),
        "cuda": (10, 30, 10),
    },
    "350m-large": {
        "recipe": "pretrain-350m",
        "cpu": (1, 1, 0),
        "cuda": (10, 30, 2),
    },
}
NOMINAL = {"H100": 989.5e12, "H200": 989.5e12}  # dense bf16 FLOP/s, by the makers
# Nats between the arms' losses at a step. 16 bits round in another order in every
# program, and fifty updates carry that on.
TOLERANCE = {"1": 1e-2, "10": 1e-2, "50": 2e-2}
TEXT = 12_000_000  # bytes of source: for a vocabulary, and steps that differ


# ---- The job ----


def corpus_tokens(recipe: Recipe) -> TokenStream:
    """The Python on this machine in the recipe's vocabulary, prepared once."""
    data = recipe.data
    limit = min(data.max_bytes or TEXT, TEXT)
    found = build_corpus(data.train, max_bytes=limit, val_bytes=data.val_bytes)
    size = recipe.model.vocab_size
    name = digest([found.digest, size, version("tokenizers")])[:16]
    cached = project_path(f"models/tokenizer-{name}")
    try:
        tokenizer = Tokenizer.load(cached)
    except TokenizerError:
        tokenizer = Tokenizer.train((one.text for one in found.train), size)
        tokenizer.save(cached)
    return TokenStream.open(
        prepare(found, tokenizer, project_path("data")), "train"
    )


def make_job(given: argparse.Namespace, folder: Path) -> Job:
    """Write weights and tokens to `folder`; return what every arm is told."""
    preset = PRESETS[given.preset]
    recipe, device = load_recipe(preset["recipe"]), pick_device(given.device)
    steps = [*preset[device.type]]
    for place, wish in enumerate((given.warm_up, given.timed, given.after)):
        steps[place] = steps[place] if wish is None else wish
    if steps[0] < 1 or steps[1] < 1:
        raise SystemExit("--warm-up and --timed: at least one step each")
    count, length = sum(steps), recipe.data.seq_len
    sequences = recipe.data.batch_size * recipe.training.gradient_accumulation
    for size in (given.micro_batch, *given.micro_batch_of.values()):
        if size and sequences % size:
            raise SystemExit(
                f"a micro-batch of {size}: does not divide the step's {sequences} "
                "sequences; take a divisor"
            )
    if given.random:
        draw, size = np.random.default_rng(given.seed), recipe.model.vocab_size
        flat = draw.integers(
            size, size=count * sequences * length + 1, dtype=np.uint16
        )
    else:
        flat = np.concatenate(list(corpus_tokens(recipe).pieces()))
    np.save(folder / "stream.npy", flat)
    batches = Batches(flat, length, sequences, seed=given.seed)
    rows = np.empty((count, sequences, length + 1), dtype=np.uint16)
    for step in range(count):
        inputs, targets = batches.step(step)
        rows[step, :, :-1], rows[step, :, -1] = inputs, targets[:, -1]
    np.save(folder / "rows.npy", rows)
    model = Albor(recipe.model, seed=given.seed)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return Job(
        folder=str(folder),
        model=dataclasses.asdict(recipe.model),
        optimizer=dataclasses.asdict(recipe.optimizer),
        rates=[scheduled_rate(recipe, step) for step in range(count)],
        sequences=sequences,
        seq_len=length,
        seed=given.seed,
        grad_clip=recipe.training.grad_clip,
        precision=pick_precision(given.precision, device),
        device=str(device),
        threads=given.threads,
        micro_batch=given.micro_batch,
        warm_up=steps[0],
        timed=steps[1],
        after=steps[2],
    )


# ---- The summary ----


def spread(numbers: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, lowest and highest."""
    three = {
        "median": statistics.median(numbers),
        "low": min(numbers),
        "high": max(numbers),
    }
    return {name: round(value, digits) for name, value in three.items()}


def compare_losses(rounds: list[dict[str, Any]], reference: str) -> dict[str, Any]:
    """Whether all arms trained the same model: their losses beside one arm's."""
    first = {
        k: v for k, v in rounds[0]["arms"].items() if v["status"] == "measured"
    }
    if not first:
        return {
            "reference": None,
            "tolerance": TOLERANCE,
            "worst": None,
            "errors": [],
        }
    against = reference if reference in first else next(iter(first))
    wrong, worst = [], 0.0
    for name, one in first.items():
        shared = one["losses"].keys() & first[against]["losses"].keys()
        for step in sorted(shared, key=int):
            loss, other = one["losses"][step], first[against]["losses"][step]
            gap = abs(loss - other)
            worst = max(worst, gap)
            if not gap <= TOLERANCE[step]:  # nor is NaN
                wrong.append(
                    f"{name}: loss {loss:.4f} at step {step}, "
                    f"where {against} has {other:.4f}"
                )
    return {
        "reference": against,
        "tolerance": TOLERANCE,
        "worst": round(worst, 5),
        "errors": wrong,
    }


def summarize(
    rounds: list[dict[str, Any]],
    tokens: int,
    reference: str,
    flops: dict[str, int],
    peaks: dict[str, float | None],
) -> dict[str, Any]:
    """One row per arm, over its rounds; `flops` per token, `peaks` in FLOP/s."""
    table: dict[str, Any] = {}
    for name, first in rounds[0]["arms"].items():
        runs = [r["arms"][name] for r in rounds if name in r["arms"]]
        sound = [one for one in runs if one["status"] == "measured"]
        bad = [one["status"] for one in runs if one["status"] != "measured"]
        if not sound or bad:
            table[name] = {"status": bad[0]}
            continue
        pace = [1000 * tokens / statistics.median(one["ms"]) for one in sound]
        pairs = [
            statistics.median(r["arms"][reference]["ms"])
            / statistics.median(r["arms"][name]["ms"])
            for r in rounds
            if all(
                one["arms"].get(reference, {}).get("status") == "measured"
                for one in rounds
            )
        ]
        speed = statistics.median(pace)
        table[name] = {
            "status": "measured",
            "settings": first["settings"],
            "micro_batch": first["micro_batch"],
            "tokens_per_second": spread(pace, 1),
            "ms_per_step": spread([x for one in sound for x in one["ms"]]),
            "ratio": spread(pairs) if pairs else None,
            "mfu": {
                f"{kind} / {peak}": round(speed * flops[kind] / value, 4)
                for kind in flops
                for peak, value in peaks.items()
                if value
            },
            "peak_bytes": max(one["peak_bytes"] for one in sound),
            "compile_seconds": round(max(x["compile_seconds"] for x in sound), 2),
            "freed_memory_kept": first["freed_memory_kept"],
            "faults_per_step": first["faults_per_step"],
            "events": first["events"],
            "losses": first["losses"],
        }
    return table


def about(job: Job) -> dict[str, Any]:
    """What must be known of where and when to read the figures."""
    versions = {}
    for package in ("torch", "transformers", "liger-kernel", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    units = torch.backends.cpu.get_cpu_capability()
    hardware = f"{processor()}, {job.threads} threads, {units}"
    if job.device != "cpu":
        hardware = f"{torch.cuda.get_device_name(job.device)}; {hardware}"
    return {
        "hardware": hardware,
        "versions": versions,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit() or "",
        "source": source_digest(),
    }


# ---- The command ----


def room_for_all(job: Job, arms: int) -> bool:
    """Whether a GPU holds so many arms at once, in half of its free memory.

    When it is not its turn an arm keeps weights, gradients and moments, 16 bytes a
    parameter, and what CUDA takes for a process.
    """
    if job.device == "cpu":
        return False
    each = 16 * count_parameters(ModelConfig(**job.model)) + 600_000_000
    return arms * each <= (free_memory(torch.device(job.device)) or 0) // 2


def choose_arms(given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Name -> (arm, settings), in order; and the arm that ratios are taken to."""
    device = pick_device(given.device).type
    known: dict[str, tuple[str, dict[str, Any]]]
    slow: set[str] = set()  # minutes to compile: by --order alone
    if given.ablate:
        known = {"ours": ("ours", {})}
        recipe = load_recipe(PRESETS[given.preset]["recipe"])
        plan = recipe.data.batch_size * recipe.training.gradient_accumulation
        graph = plan * recipe.data.seq_len <= GRAPH_TOKENS  # as ours does already
        for name, (devices, settings) in ABLATIONS.items():
            if device in devices and settings.get("graph") is not graph:
                known[name] = ("ours", settings)
    else:
        known = {name: (name, {}) for name in ARMS}
        if device != "cpu":
            del known["transformers-untuned"]  # its allocator is PyTorch's own
            del known["ours-compiled"]  # there "ours" is
        if given.preset.startswith("350m"):
            slow = {"ours-compiled"}
    names = given.order or [name for name in known if name not in slow]
    known |= {name: ("ours", settings) for name, (_, settings) in ABLATIONS.items()}
    if unknown := set(names) - set(known):
        raise SystemExit(f"--order: no {sorted(unknown)}; there are {list(known)}")
    named = {*given.inside, *given.micro_batch_of}
    if unknown := named - set(names):
        raise SystemExit(
            f"--inside, --micro-batch-of: {sorted(unknown)} do not run; "
            f"there are {list(names)}"
        )
    if given.rounds < 1:
        raise SystemExit(f"--rounds {given.rounds}: at least one")
    arms = {name: known[name] for name in names}
    return arms, "ours" if given.ablate else REFERENCE


def own_micro_batches(given: Sequence[str]) -> dict[str, int]:
    """From ARM=N to what it says."""
    pairs = [one.rpartition("=") for one in given]
    if bad := [f"{name}={size}" for name, _, size in pairs if not size.isdecimal()]:
        raise SystemExit(f"--micro-batch-of: {bad}: say ARM=N, with a whole number")
    return {name: int(size) for name, _, size in pairs}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small")
    add(
        "--ablate",
        action="store_true",
        help="our choices, one switched off at a time",
    )
    add("--order", nargs="+", metavar="ARM", help="these arms, in this order")
    add("--shuffle", type=int, metavar="SEED", help="a new order in every round")
    add("--rounds", type=int, default=5)
    add("--warm-up", type=int, help="steps before the timed ones")
    add("--timed", type=int, help="steps")
    add("--after", type=int, help="steps after them, in the first round")
    add(
        "--together",
        action="store_true",
        help="compile arms side by side, as on a GPU with room for all",
    )
    add("--micro-batch", type=int, default=0, help="for all arms; 0: search")
    add(
        "--micro-batch-of",
        nargs="+",
        default=[],
        metavar="ARM=N",
        help="for these arms another",
    )
    add(
        "--inside",
        nargs="+",
        default=[],
        metavar="ARM",
        help="steps after the timed ones, to count copies: these arms; else all",
    )
    add("--device", default="auto")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0, help="of weights and order of the text")
    add("--random", action="store_true", help="random tokens: no corpus to prepare")
    add("--timeout", type=float, default=3600, help="seconds for one run of an arm")
    add("--out", type=Path, help="file to write instead")
    given = parser.parse_args(arguments)
    given.micro_batch_of = own_micro_batches(given.micro_batch_of)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, summarize, write."""
    given = parse(arguments)
    arms, reference = choose_arms(given)
    device = pick_device(given.device).type
    kind = "-ablation" if given.ablate else ""
    path = given.out or project_path(
        f"benchmarks/results/training-{given.preset}-{device}{kind}.json"
    )
    part = path.with_suffix(".part")  # what there is after every turn
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(given, Path(folder))
        rounds, limits = run_rounds(
            arms,
            job,
            given.rounds,
            shuffle=given.shuffle,
            timeout=given.timeout,
            together=given.together or room_for_all(job, len(arms)),
            inside=given.inside,
            sizes=given.micro_batch_of,
            keep=part,
        )
    name = torch.cuda.get_device_name(job.device) if device == "cuda" else ""
    nominal = next((rate for card, rate in NOMINAL.items() if card in name), None)
    if job.precision == "fp32":
        nominal = None
    reached = [one["flops"] for one in limits.values() if "flops" in one]
    measured = max(reached, default=None)  # the fastest product, start or end
    config = ModelConfig(**job.model)
    flops = {
        kind: flops_per_token(config, job.seq_len, causal=kind == "causal")
        for kind in ("palm", "causal")
    }
    tokens = job.sequences * job.seq_len
    peaks = {"nominal": nominal, "measured": measured}
    losses = compare_losses(rounds, reference)
    table = summarize(rounds, tokens, reference, flops, peaks)
    everything = table | {f"ceilings at the {k}": one for k, one in limits.items()}
    broken = [
        f"{arm}: {row['status']}"
        for arm, row in everything.items()
        if row["status"].startswith("failed")
    ]
    shared = dataclasses.asdict(job)
    private = ("folder", "settings", "rates", "hold", "micro_batch", "ready_to_run")
    for key in private:
        del shared[key]
    ratios = "ratios alone: the machine is shared, so its speed is its own affair"
    result = {
        "about": about(job),
        "claims": ratios if device == "cpu" else "ratios and tokens per second",
        "preset": given.preset,
        "kind": "ablation" if given.ablate else "arms",
        "tokens": "random" if given.random else "Python source",
        "reference": reference,
        "job": {**shared, "rounds": given.rounds, "tokens_per_step": tokens},
        "flops_per_token": flops,
        "peaks": peaks,
        "ceilings": limits,
        "losses_agree": losses,
        "errors": broken + losses["errors"],
        "arms": table,
        "rounds": rounds,
    }
    write_json(path, result)
    part.unlink(missing_ok=True)
    print(f"wrote {path.name}; losses differ by at most {losses['worst']} nats")
    if result["errors"]:
        raise SystemExit("\n".join(["this run has errors:", *result["errors"]]))


if __name__ == "__main__":
    main()
