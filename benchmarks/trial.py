"""The card's trial on a CPU: 50 steps of the 350M model, in three ways.

    python -m benchmarks.trial [--arms albor transformers sequences] [--steps 50]

Three arms from the same weights, on the same rows, with the card's recipe in bf16:
Albor's step; `transformers` in a plain loop; and Albor's step with one sequence at
a time, 4 updates for each step of the others, as the card's trainer worked. It
takes an hour on two cores. An arm's curve is kept as soon as it ends. Losses
are the results; the times are not, if the machine is shared.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from albor.artifacts import write_json
from albor.batches import Batches
from albor.config import Recipe, load_recipe
from albor.model import Albor
from albor.optimizer import build_optimizer, scheduled_rate
from albor.shards import TokenStream
from albor.step import keep_freed_memory, train_step
from albor.texts import find_texts, open_batches
from albor.train import evaluate_loss
from benchmarks.machine import commit, processor, versions

RECIPE = "pretrain-350m-cuda-test"
ARMS = ("albor", "transformers", "sequences")
Rows = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, float], float]


def albor(recipe: Recipe, seed: int) -> tuple[nn.Module, Step]:
    """Our model and step."""
    model = Albor(recipe.model, seed=seed)
    optimizer = build_optimizer(model, recipe.optimizer)
    clip = recipe.training.grad_clip

    def step(inputs: Tensor, targets: Tensor, lr: float) -> float:
        how = {"lr": lr, "grad_clip": clip, "precision": "bf16"}
        return train_step(model, optimizer, inputs, targets, **how).loss

    return model, step


def peer(recipe: Recipe, seed: int) -> tuple[nn.Module, Step]:
    """`transformers` with the same weights, in the loop that people write."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**vars(recipe.model), "tie_word_embeddings": True, "use_cache": False}
    known = LlamaConfig().to_dict()
    model = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in shape.items() if k in known})
    )
    ours = dict(Albor(recipe.model, seed=seed).named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(ours[name])
    del ours
    optimizer = build_optimizer(model, recipe.optimizer)

    def step(inputs: Tensor, targets: Tensor, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=inputs).logits
            loss = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten()
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.training.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return model, step


def rows_of(
    batches: Batches, recipe: Recipe, one: bool
) -> Iterator[tuple[int, Rows]]:
    """The number of the step and its rows; with `one`, row by row."""
    for number in range(recipe.training.max_steps):
        inputs, targets = batches.step(number)
        size = 1 if one else len(inputs)
        for i in range(0, len(inputs), size):
            yield number, (inputs[i : i + size], targets[i : i + size])


def run(
    arm: str, recipe: Recipe, batches: Batches, val: TokenStream, seed: int
) -> dict[str, Any]:
    """Losses and seconds of every update of one arm; its loss on held-out text."""
    model, step = (peer if arm == "transformers" else albor)(recipe, seed)
    losses, seconds = [], []
    for number, rows in rows_of(batches, recipe, one=arm == "sequences"):
        began = time.perf_counter()
        losses.append(step(*rows, scheduled_rate(recipe, number)))
        seconds.append(time.perf_counter() - began)
        last = f"{losses[-1]:.3f}, {seconds[-1]:.1f} s"
        print(f"{arm} {len(losses)}: {last}", flush=True)
    judged = None
    if isinstance(model, Albor):
        how = {"sequences": 16, "precision": "bf16"}
        judged = evaluate_loss(model, val, recipe.data.seq_len, **how)[0]
    return {"losses": losses, "seconds": seconds, "val_loss": judged}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--steps", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/trial-cpu.json")
    options = parser.parse_args()
    keep_freed_memory()
    recipe = load_recipe(options.recipe).with_training(mixed_precision="bf16")
    if options.steps:
        recipe = recipe.with_training(max_steps=options.steps)
    about, tokenizer, tokens = find_texts(recipe, None, None)
    train = TokenStream.open(tokens, "train", vocab_size=tokenizer.vocab_size)
    val = TokenStream.open(tokens, "val", vocab_size=tokenizer.vocab_size)
    batches = open_batches(recipe, train, torch.device("cpu"), seed=options.seed)
    out = Path(options.out)
    kept = json.loads(out.read_text()) if out.exists() else {"arms": {}}
    kept |= {
        "recipe": recipe.to_dict(),
        "seed": options.seed,
        "corpus": about["digest"],
        "tokenizer": tokenizer.digest,
        "about": {
            "hardware": processor(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "note": "a shared machine: the losses are results, the seconds are not",
        },
    }
    for arm in options.arms:
        kept["arms"][arm] = run(arm, recipe, batches, val, options.seed)
        write_json(out, kept)


if __name__ == "__main__":
    main()
