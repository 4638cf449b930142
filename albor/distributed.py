# Generated from book/distributed.md: edit the chapter, not this file.
"""The run of the pretrain notebook in N processes, each with a part of every batch.

    python -m torch.distributed.run --nproc-per-node N -m albor.distributed RECIPE

Notable here:
- DDP: each rank has the whole model; gradients are added up during the backward;
- rank 0 prepares, logs, evaluates, saves; the others compute, and obey rank 0;
- a run may go on with another number of processes, on the same stream of samples;
- without torchrun it is the same program in one process.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record as elastic

from albor.artifacts import read_jsonl, write_json
from albor.checkpoint import load_state, save_model, verify_state
from albor.config import ConfigError, Recipe, fit_micro_batch, preflight
from albor.guards import Guards
from albor.hardware import (
    attention_kernel,
    free_memory,
    keep_freed_memory,
    make_deterministic,
)
from albor.model import Albor
from albor.muon import make_optimizer
from albor.ranks import (
    World,
    add_up,
    follow,
    from_rank_0,
    joined,
    refuse_ranks,
    shared_loss,
)
from albor.resident import compiled_loss, compiles
from albor.setup import (
    begin_folder,
    choose_folder,
    choose_recipe,
    describe_result,
    describe_run,
    describe_session,
    refuse_other_run,
)
from albor.shapes import parameter_shapes
from albor.shards import TokenStream
from albor.states import StateWriter, disk_needed, refuse_small_disk
from albor.step import make_scaler
from albor.texts import Texts, find_texts, open_batches
from albor.train import METRICS, Summary, evaluate_loss, progress_line, train
from albor.weights import CheckpointError

__all__ = [
    "Plan",
    "Ready",
    "get_ready",
    "main",
    "make_plan",
    "run",
    "run_beside",
    "run_lead",
]


@dataclass(frozen=True)
class Plan:
    """All that a rank must know to take its part."""

    recipe: Recipe
    folder: Path
    state: Path | None
    start: int
    tokens: Path
    micro_batch: int


def make_plan(options: argparse.Namespace, world: World) -> tuple[Plan, Texts]:
    """Everything that is decided, refused or prepared before the first step."""
    recipe = choose_recipe(
        options.recipe,
        world.target,
        corpus=options.corpus,
        max_steps=options.max_steps,
    )
    share = refuse_ranks(recipe, world.size)
    folder, state = choose_folder(recipe, options.output_dir, options.resume)
    before = verify_state(state) if state else None
    extra = before["extra"] if before else None
    if extra:
        refuse_other_run(recipe, options.seed, extra, {"training.mixed_precision"})
        kept = extra["recipe"]["training"]["mixed_precision"]
        recipe = recipe.with_training(mixed_precision=kept)
    micro, free = recipe.data.batch_size, free_memory(world.target)
    if free is not None:  # on a CPU all processes of the machine live in one memory
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = int(0.9 * free) // (1 if world.target.type == "cuda" else local)
        micro, _ = fit_micro_batch(recipe, room, world.target.type)
    micro = min(micro, extra["micro_batch"]) if extra else micro
    start = before["step"] if before else 0
    if start < recipe.training.max_steps:
        try:
            refuse_small_disk(folder, disk_needed(parameter_shapes(recipe.model)))
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
    texts = find_texts(recipe, state, extra)
    micro = math.gcd(micro, share)  # each rank takes a whole number of slices
    return Plan(recipe, folder, state, start, texts[2], micro), texts


@dataclass(frozen=True)
class Ready:
    """What a rank has built when the steps begin, and how it takes them."""

    model: Albor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    streams: tuple[TokenStream, TokenStream]  # to train on, and held out
    go: Callable[..., Summary]  # `train`, less what rank 0 alone does beside it


def get_ready(plan: Plan, seed: int, world: World) -> Ready:
    """Model, optimizer and batches of this rank, from the state if there is one."""
    recipe, target = plan.recipe, world.target
    half = recipe.training.mixed_precision
    parts = (
        TokenStream.open(plan.tokens, "train"),
        TokenStream.open(plan.tokens, "val"),
    )
    batches = open_batches(
        recipe, parts[0], target, seed=seed, rank=world.rank, ranks=world.size
    )
    preflight(recipe, batches.sequences)
    if recipe.training.deterministic:
        make_deterministic()
    scaled = recipe.training.scaled_init
    model = Albor(recipe.model, seed=seed, scaled_init=scaled).to(target)
    model.model.recompute = recipe.training.recompute
    optimizer = make_optimizer(model, recipe.optimizer, bf16=half == "bf16")
    scaler = make_scaler(half, target)
    if plan.state:
        extra = load_state(plan.state, model, optimizer)["extra"]
        if scaler:
            scaler.load_state_dict(extra["scaler"])
    loss = compiled_loss(model) if compiles(recipe, target) else None
    how: dict[str, Any] = {
        "start_step": plan.start,
        "micro_batch": plan.micro_batch,
        "precision": half,
        "scaler": scaler,
        "loss": shared_loss(model, world, loss),
        "reduce": add_up if world.size > 1 else None,
    }

    def go(**more: Any) -> Summary:
        with attention_kernel(recipe.training.attention):
            return train(model, optimizer, batches, recipe, **how, **more)

    return Ready(model, optimizer, scaler, parts, go)


def run_beside(ready: Ready, world: World) -> None:
    """What the other ranks do: the same steps, and nothing that stays."""
    from_rank_0(world, lambda: None)  # until it has begun the folder, or could not
    with tempfile.TemporaryDirectory(prefix="albor-") as scratch:

        def part() -> None:
            ready.go(output_dir=scratch)
            dist.barrier()  # rank 0 judges and writes what was made

        follow(world, part)


def run_lead(
    plan: Plan, seed: int, ready: Ready, texts: Texts, world: World
) -> None:
    """What rank 0 does: the steps, and the folder of the run."""
    recipe, folder, start = plan.recipe, plan.folder, plan.start
    model, scaler = ready.model, ready.scaler
    settings = describe_run(recipe, seed, texts, plan.micro_batch)
    place: dict[str, Any] = {"folder": folder, "start_step": start}
    guards = Guards(model, ready.optimizer, recipe, scaled=bool(scaler), **place)
    writer = StateWriter(folder, asynchronous=world.target.type == "cuda")
    losses: dict[int, float | None] = {}  # of validation, after so many steps

    def begin() -> None:
        session = describe_session(world.target, start) | {"processes": world.size}
        guards.begin()
        begin_folder(folder, settings, texts, session, plan.state)

    def save(done: int) -> None:
        guards.before_save(done)
        extra = settings | {"scaler": scaler.state_dict() if scaler else None}
        writer.save(done, model, ready.optimizer, extra, losses.get(done))

    def judge(sequences: int) -> tuple[float, int]:
        width, half = recipe.data.seq_len, recipe.training.mixed_precision
        return evaluate_loss(
            model, ready.streams[1], width, sequences=sequences, precision=half
        )

    def show(line: dict[str, Any], seconds_left: float) -> None:
        losses[line["step"] + 1] = line.get("val_loss")
        end = recipe.training.max_steps
        print(progress_line(line, end, seconds_left), flush=True)

    from_rank_0(world, begin)
    with writer:
        summary = ready.go(
            output_dir=folder,
            evaluate=lambda: judge(recipe.training.eval_sequences)[0],
            save=save,
            settle=writer.wait,
            inspect=guards.inspect,
            on_log=show,
        )
    judged = judge(0)
    save_model(folder, model, texts[1])
    result = describe_result(
        recipe,
        summary.steps,
        seed=seed,
        train_loss=read_jsonl(folder / METRICS)[-1]["loss"],
        judged=judged,
        streams=ready.streams,
        weights=folder / "model.safetensors",
    )
    write_json(folder / "final_model.json", result)
    print("validation loss {:.3f} nats per token, on {:,} tokens".format(*judged))
    if world.size > 1:
        dist.barrier()


def run(options: argparse.Namespace, world: World) -> None:
    """Train, alone or with others; rank 0 writes the folder of the run."""
    texts: list[Texts] = []  # on rank 0 alone

    def prepare() -> Plan:
        plan, found = make_plan(options, world)
        texts.append(found)
        return plan

    plan: Plan = from_rank_0(world, prepare)
    say: Callable[..., None] = print if texts else lambda *words: None
    recipe, end = plan.recipe, plan.recipe.training.max_steps
    how = f"{recipe.training.mixed_precision}, {world.size} ranks"
    say(f"recipe {recipe.name}, {end} steps, {world.target}, {how}")
    if plan.start == end and (plan.folder / "final_model.json").exists():
        say(f"this run is finished, with {end} steps: nothing is done or written")
        return
    ready = get_ready(plan, options.seed, world)
    if texts:
        run_lead(plan, options.seed, ready, texts[0], world)
    else:
        run_beside(ready, world)


@elastic  # torchrun repeats the error of the process that failed first
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="albor.distributed")
    parser.add_argument("recipe", help="name or file of a recipe")
    parser.add_argument("--max-steps", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--output-dir", default="", help="'': checkpoints/RECIPE")
    parser.add_argument("--corpus", default="", help="folders or packages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    resume = "from the newest state in the output folder, or from a state's folder"
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, help=resume
    )
    options = parser.parse_args(arguments)
    try:
        with joined(options.device) as world:
            if world.target.type == "cpu":
                keep_freed_memory()
            run(options, world)
    except ConfigError as error:
        raise SystemExit(f"refused: {error}") from None


if __name__ == "__main__" and __spec__:  # python -m, and not this page
    main()
