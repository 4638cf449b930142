"""A very small finished run, laid out as the chapter on pretraining does it."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch

import albor
from albor.artifacts import read_jsonl, sha256_file, write_json
from albor.batches import Batches
from albor.config import DataConfig, OptimizerConfig, Recipe, TrainingConfig
from albor.corpus import build_corpus
from albor.data import prepare
from albor.likelihood import perplexity
from albor.model import Albor
from albor.optimizer import build_optimizer
from albor.problems import Problem, evaluate_problems
from albor.provenance import record
from albor.shapes import ModelConfig, count_parameters, parameter_shapes
from albor.shards import TokenStream, unigram_cross_entropy
from albor.tokenizer import Tokenizer
from albor.train import METRICS, evaluate_loss, train
from albor.weights import load_model, save_model

SHAPE = ModelConfig(
    vocab_size=420,
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=10,
)


def tiny_recipe(name: str = "card-example", steps: int = 30) -> Recipe:
    """A model of three blocks; two packages to learn from, one held out."""
    data = DataConfig(
        train=os.pathsep.join(("yaml", "safetensors", "json")),
        batch_size=3,
        seq_len=32,
        max_bytes=200_000,
        val_bytes=20_000,
    )
    plan = TrainingConfig(
        epochs=9,
        max_steps=steps,
        warmup_steps=3,
        gradient_accumulation=2,
        mixed_precision="fp32",
        eval_interval=10,
        eval_sequences=16,
    )
    adamw = OptimizerConfig(lr=4e-3)
    return Recipe(name=name, model=SHAPE, data=data, optimizer=adamw, training=plan)


def finished_run(folder: Path, work: Path, recipe: Recipe, seed: int = 42) -> Path:
    """Train `recipe` on prepared data in `work`, and lay out the run's folder."""
    data, plan, size = recipe.data, recipe.training, recipe.model.vocab_size
    amounts = {"max_bytes": data.max_bytes, "val_bytes": data.val_bytes}
    corpus = build_corpus(data.train, **amounts, workers=1)
    tokenizer = Tokenizer.train((one.text for one in corpus.train), size)
    tokens = prepare(corpus, tokenizer, work, workers=1)
    learned = TokenStream.open(tokens, "train")
    held_out = TokenStream.open(tokens, "val")
    rows = data.batch_size * plan.gradient_accumulation
    about = {"digest": corpus.digest, "report": corpus.report}
    about["record"] = record(corpus, tokenizer, tokens)
    tools = {"albor": albor, "numpy": numpy, "torch": torch}
    versions = {name: str(tool.__version__) for name, tool in tools.items()}
    made = {"recipe": recipe.to_dict(), "seed": seed, "corpus": about}
    made |= {"tokenizer": tokenizer.digest, "data": tokens.name}
    made["micro_batch"] = data.batch_size
    made["sessions"] = [{"start_step": 0, "device": "cpu", "versions": versions}]
    write_json(folder / "provenance.json", made)
    model, length = Albor(recipe.model, seed=seed), data.seq_len
    how = {"sequences": plan.eval_sequences}
    summary = train(
        model,
        build_optimizer(model, recipe.optimizer),
        Batches(learned, length, rows, seed=seed),
        recipe,
        output_dir=folder,
        micro_batch=data.batch_size,
        evaluate=lambda: evaluate_loss(model, held_out, length, **how)[0],
    )
    save_model(folder, model, tokenizer)
    loss, count = evaluate_loss(model, held_out, length)
    own = unigram_cross_entropy(held_out, held_out, size, smoothing=0)
    final = {
        "name": recipe.name,
        "parameters": count_parameters(recipe.model),
        "tensors": len(parameter_shapes(recipe.model)),
        "steps": summary.steps,
        "finished": summary.finished,
        "tokens": summary.steps * rows * length,
        "seed": seed,
        "precision": plan.mixed_precision,
        "train_loss": read_jsonl(folder / METRICS)[-1]["loss"],
        "val_loss": loss,
        "val_perplexity": math.exp(loss),
        "val_tokens": count,
        "unigram_cross_entropy": unigram_cross_entropy(learned, held_out, size),
        "val_unigram_entropy": own,
        "ln_vocabulary": math.log(size),
        "model_sha256": sha256_file(folder / "model.safetensors"),
    }
    write_json(folder / "final_model.json", final)
    return folder


def evaluated(run: Path, data: Path) -> Path:
    """Add an evaluation: a perplexity that is real, and programs that we wrote.

    The programs pass for a count of three problems in four, by no merit of the
    model, which did not write them. For trying a card, and nothing else.
    """
    model, tokenizer = load_model(run), Tokenizer.load(run)
    weights, output = sha256_file(run / "model.safetensors"), run / "evaluation"
    problems = {}
    for number in range(4):
        test = f"def check(f):\n    assert f(2) == {2 * number}"
        text = ("def f(x):\n    return ", "f", f"{number} * x", test)
        problems[f"toy/{number}"] = Problem(f"toy/{number}", *text)

    def answers(some, sample):
        return [p.canonical_solution.replace("3 *", "7 *") for p in some]

    def run_all(jobs):
        for program, test in jobs:
            try:
                exec(program + test, {})
                yield SimpleNamespace(status="passed", detail="")
            except AssertionError as error:
                yield SimpleNamespace(status="failed", detail=repr(error))

    told = perplexity(model, tokenizer, TokenStream.open(data, "val"), 32)
    settings = {"weights": weights, "tokenizer": tokenizer.digest}
    scores = evaluate_problems(
        problems, answers, lambda jobs: [*run_all(jobs)], output, "toy", settings
    )
    results = {"weights": weights, "perplexity": told.record()}
    write_json(output / "results.json", {**results, "problems": {"toy": scores}})
    return run
