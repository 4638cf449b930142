# Generated from book/model_card.md: edit the chapter, not this file.
"""The model card of a run: a page made from its folder alone.

Notable:
- a figure is computed again wherever another file of the folder allows it; two
  values that differ are refused, with both;
- every row names the files that it stems from;
- what the folder does not hold is "not measured" or "not stated": no row has a
  default, and no function here takes a figure as an argument.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from albor.artifacts import atomic_path, digest, read_json, read_jsonl, sha256_file
from albor.config import Recipe
from albor.falsify import falsify, read_log, validate_checkpoint
from albor.generate import complete
from albor.likelihood import Perplexity
from albor.model import Albor
from albor.problems import Problem, summarize
from albor.provenance import by_distribution, verify
from albor.shapes import build, count_parameters, parameter_shapes
from albor.tokenizer import Tokenizer
from albor.train import METRICS, scheduled_rate
from albor.weights import hf_config, load_model

__all__ = [
    "ABSENT",
    "FILES",
    "NEEDS",
    "SETS",
    "UNSTATED",
    "CardError",
    "Held",
    "Rows",
    "about_rows",
    "agree",
    "benchmark_rows",
    "check_rows",
    "front_matter",
    "licence_rows",
    "limits",
    "loss_rows",
    "model_card",
    "read_evaluation",
    "read_part",
    "read_run",
    "recipe_rows",
    "refused",
    "step_time",
    "table",
    "write_model_card",
]


class CardError(ValueError):
    """A folder that no card can be made of; the text says what differs or lacks."""


def agree(what: str, recorded: Any, found: Any) -> None:
    """Refuse two values for one thing; floats may differ in the tenth digit."""
    numbers = isinstance(recorded, int | float) and isinstance(found, int | float)
    if recorded != found and not (numbers and math.isclose(recorded, found)):
        raise CardError(
            f"{what}: recorded {recorded}, but the folder gives {found}; one of the "
            "two is not this run's. Restore the file, or measure again"
        )


@contextlib.contextmanager
def refused(run: Path) -> Iterator[None]:
    """Whatever is missing or malformed inside is a `CardError` that names it."""
    try:
        yield
    except CardError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CardError(
            f"{run}: no record of a run of this package: {why}"
        ) from error
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise CardError(f"{run}: {error}") from error


NEEDS: dict[str, dict[str, type]] = {  # what a card is made of, and its types
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
    def record(self) -> dict[str, Any] | None:
        """The verified record of the corpus; None for token rows by others."""
        return self.made["corpus"].get("record")

    def stream(self, split: str) -> int | None:
        """How many tokens the shards of a split hold, copies and ends included."""
        if self.record is None:
            return None
        return sum(
            x["tokens"] for x in self.record["shards"] if x["split"] == split
        )


def read_part(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder with all that it needs, each of its type."""
    part = read_json(folder / name)
    for key, kind in NEEDS[name].items():
        if type(value := part.get(key)) is not kind:
            why = f"expected {kind.__name__}; it is not what a run writes"
            raise CardError(f"{name}: {key} = {value!r:.60}: {why}")
    return dict(part)


def read_run(run: str | Path) -> Held:
    """Read a run's folder; CardError at the first two values that differ."""
    folder = Path(run)
    for name in FILES:
        if not (folder / name).is_file():
            why = "a card needs a finished run: resume it, or name another folder"
            raise CardError(f"{folder} has no {name}; {why}")
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
        ks = [int(key[5:]) for key in told if key.startswith("pass@")]
        again = summarize(problems, lines, ks)
        for key in sorted({*told, *again}):
            agree(f"{at}, {name}, {key}", told.get(key), again.get(key))
    return dict(results)


ABSENT, UNSTATED = "not measured", "not stated"
Rows = list[tuple[Any, ...]]


def table(head: Sequence[str], rows: Rows) -> str:
    """A Markdown table; no text can leave its cell."""

    def cell(value: Any) -> str:
        text = " ".join(str(UNSTATED if value in (None, "") else value).split())
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def step_time(held: Held) -> str:
    """Seconds spent in steps, from the paces in the log: of the steps they cover.

    A pace is the mean since the one before it; a session's first stands for itself.
    """
    starts = {session.get("start_step") for session in held.made["sessions"]}
    seconds, covered, since = 0.0, 0, 0
    for record in held.log:
        since = record["step"] if record["step"] in starts else since
        if pace := record.get("tokens_per_second"):
            steps = record["step"] + 1 - since
            seconds += steps * record["tokens"] / pace
            covered, since = covered + steps, record["step"] + 1
    if not covered:
        return ABSENT
    return f"{seconds:,.1f} s in {covered} of {len(held.log)} steps"


def about_rows(held: Held) -> Rows:
    """What the model is and what it was made of."""
    final, made, data = held.final, held.made, held.recipe.data
    shape, last, record = held.recipe.model, held.made["sessions"][-1], held.record
    known = last.get("versions", {})
    inputs = record["data"]["inputs"] if record else {}
    files = record["files"] if record else []
    text: str | None = None
    if record:
        some = [row for row in files if row["split"] == "train"]
        first = sum(row["tier"] == 1 for row in some)
        text = (
            f"{held.stream('train'):,} tokens: {len(some):,} files, {first:,} of them "
            f"in tier 1, read {inputs['upsample']}x; "
            f"infilling in {data.fim_rate:.0%} of fragments ({data.fim_style})"
        )
    held_out = {row["package"] for row in files if row["split"] == "val"}
    unit = record["corpus"]["report"]["split_by"] if record else UNSTATED
    apart = f"{held.stream('val'):,} tokens of {len(held_out)} packages, by {unit}"
    architecture = (
        f"hidden={shape.hidden_size}, layers={shape.num_hidden_layers}, "
        f"heads={shape.num_attention_heads} of {shape.head_dim}, "
        f"kv_heads={shape.num_key_value_heads}, ffn={shape.intermediate_size}"
    )
    longest, trained = shape.max_position_embeddings, data.seq_len
    size, origin = held.tokenizer.vocab_size, "provenance.json"
    where = [last.get(key) for key in ("device", "gpu", "cpu", "platform")]
    tools = ", ".join(f"{name} {known[name]}" for name in sorted(known))
    return [
        ("Name", final["name"], "final_model.json"),
        (
            "Type",
            "decoder-only Transformer, Llama layout, tied head",
            "config.json",
        ),
        (
            "Parameters",
            f"{final['parameters']:,} in {final['tensors']} tensors",
            "config.json, model.safetensors",
        ),
        ("Architecture", architecture, "config.json"),
        ("Vocabulary", f"{shape.vocab_size:,}", "config.json"),
        ("Tokenizer", f"byte-level BPE, {size:,} entries", "tokenizer.json"),
        ("Context", f"{longest:,} tokens; trained on {trained:,}", "config.json"),
        ("Training data", text, origin),
        ("Held out", apart if record else None, origin),
        ("Corpus", made["corpus"]["digest"], origin),
        ("Training time", step_time(held), METRICS),
        ("Framework", tools, origin),
        ("Hardware", ", ".join(x for x in where if x), origin),
        ("Commit", last.get("commit"), origin),
        ("Sessions", len(made["sessions"]), origin),
        ("Licence of the weights", None, ""),
    ]


def recipe_rows(held: Held) -> Rows:
    """How it was trained."""
    data, adam, plan = held.recipe.data, held.recipe.optimizer, held.recipe.training
    steps, tokens = held.final["steps"], held.final["tokens"]
    stream, unfinished = (
        held.stream("train"),
        "" if held.final["finished"] else "NOT ",
    )
    turns, length = plan.gradient_accumulation, data.seq_len
    each = data.batch_size * turns * length
    adamw = (
        f"AdamW, lr={adam.lr:g}, beta1={adam.beta1:g}, beta2={adam.beta2:g}, "
        f"wd={adam.weight_decay:g} on {adam.decay}, eps={adam.eps:g}, "
        f"gradients clipped at {plan.grad_clip:g}"
    )
    decay = f"{plan.lr_scheduler}, to {plan.min_lr_ratio:g} of the peak"
    passes = f"{tokens / stream:.2f} of {plan.epochs} allowed" if stream else None
    both = f"provenance.json, {METRICS}"
    rows: Rows = [
        ("Optimizer", adamw, "provenance.json"),
        ("Schedule", f"{decay}, after {plan.warmup_steps} steps of warm-up", both),
        (
            "Batch",
            f"{data.batch_size} x {turns} x {length} = {each:,} tokens",
            both,
        ),
        ("Precision", plan.mixed_precision, "provenance.json"),
        ("Steps", f"{steps:,} of {plan.max_steps:,}: {unfinished}finished", both),
        ("Tokens trained on", f"{tokens:,}", both),
        ("Tokens per parameter", f"{tokens / held.final['parameters']:.3g}", both),
        ("Passes over the data", passes, both),
        ("Seed", held.final["seed"], "provenance.json"),
    ]
    return rows


def loss_rows(held: Held) -> Rows:
    """Losses in nats per token, the marks on their scale, perplexities."""
    final, losses = held.final, [record["loss"] for record in held.log]
    best, summary = min(losses), "final_model.json"
    course = f"{losses[0]:.3f} → {losses[-1]:.3f} (best {best:.3f}"
    loss, tokens = final["val_loss"], final["val_tokens"]
    told = (held.evaluation or {}).get("perplexity")
    later: str = ABSENT
    if told:
        low, high = told["perplexity_95"] or (math.nan, math.nan)
        later = (
            f"{told['perplexity']:,.1f} (95%: {low:,.1f} to {high:,.1f}), "
            f"{told['bits_per_byte']:.3f} bits per byte, {told['tokens']:,} tokens"
        )
    course += f" at step {losses.index(best)})"
    marks = (
        f"{final['unigram_cross_entropy']:.3f}, ln V {final['ln_vocabulary']:.3f}"
    )
    return [
        ("Training loss", course, METRICS),
        ("Validation loss", f"{loss:.3f} on {tokens:,} tokens", summary),
        ("Perplexity", f"{final['val_perplexity']:,.1f}", f"{summary}: exp(loss)"),
        ("For comparison", f"unigram {marks}", summary),
        ("Perplexity, evaluated", later, "evaluation/results.json"),
    ]


SETS = {  # the rows that a card has, whether measured or not
    "HumanEval": ["pass@1"],
    "python-intermediate": ["pass@1"],
    "infilling": ["pass@1", "exact"],
}


def benchmark_rows(held: Held) -> Rows:
    """One row for each score, and for each of `SETS` that has none."""
    found, rows = (held.evaluation or {}).get("problems", {}), []
    for name in sorted({*SETS, *found}):
        told = found.get(name, {})
        keys = [
            key
            for key in told
            if isinstance(told[key], dict) and "low" in told[key]
        ]
        for key in keys or SETS[name]:
            label, value, source = f"{name}, {key}", ABSENT, ""
            if score := told.get(key):
                source = f"evaluation/{name}_results.jsonl"
                interval = f"{score['low']:.3f} to {score['high']:.3f}"
                how = f"{told['problems']} problems, {told['samples']} samples each"
                value = f"{score['value']:.3f} (95%: {interval}); {how}"
            rows.append((label, value, source))
    return rows


def licence_rows(held: Held) -> Rows:
    """The licences of the training text, by their share of its tokens."""
    if held.record is None:
        return []
    some = [x for x in by_distribution(held.record) if x["split"] == "train"]
    whole, rows = max(1, sum(x["tokens"] for x in some)), []
    for licence in {x["licence"]: None for x in some}:
        mine = [x for x in some if x["licence"] == licence]
        tokens = sum(x["tokens"] for x in mine)
        names = ", ".join(
            f"{x['distribution']} {x['version']}".strip() for x in mine
        )
        share = f"{tokens / whole:.1%}"
        rows.append((licence, share, f"{tokens:,}", len(mine), names))
    return sorted(rows, key=lambda row: -int(row[2].replace(",", "")))


def front_matter(held: Held) -> str:
    """YAML for the Hugging Face Hub; `model-index` holds measured results alone."""
    final, digest16 = held.final, held.made["corpus"]["digest"][:16]
    task = {"type": "text-generation"}

    def result(kind: str, name: str, metrics: dict[str, float]) -> dict[str, Any]:
        listed = [{"type": k, "name": k, "value": v} for k, v in metrics.items()]
        return {
            "task": task,
            "dataset": {"type": kind, "name": name},
            "metrics": listed,
        }

    measured = {"loss": final["val_loss"], "perplexity": final["val_perplexity"]}
    kind = f"albor-corpus-{digest16}"
    results = [result(kind, "held-out part of the corpus", measured)]
    for name, told in (held.evaluation or {}).get("problems", {}).items():
        scores = {
            k: v["value"] for k, v in told.items() if k[:5] in ("pass@", "exact")
        }
        results.append(result(name.lower(), name, scores))
    content = {
        "license": "other",
        "license_name": "not-stated",
        "corpus_licenses": [row[0] for row in licence_rows(held)] or [UNSTATED],
        "language": ["code"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["code", "python", "llama", "albor"],
        "model-index": [{"name": final["name"], "results": results}],
    }
    return (
        f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"
    )


def check_rows(held: Held, again: str | Path | None) -> Rows:
    """Predictions 001 to 003, and what the weights themselves show."""
    rows: Rows = [
        (f"{one.prediction}: {one.statement}", one.status, one.evidence)
        for one in falsify(held.folder, again)
    ]
    verdict, _, evidence = str(validate_checkpoint(held.folder)).partition(": ")
    rows.append(("The weights were trained", verdict, evidence))
    return rows


def limits(held: Held) -> str:
    """What the record admits, as a list."""
    report = held.made["corpus"]["report"]
    problems = (report.get("benchmarks") or {}).get("problems", 0)
    lines = [*report.get("notes", ())]
    lines.append(
        f"kept clear of {problems} benchmark problems when the corpus was built"
        if problems
        else "benchmark problems were not looked for in the corpus"
    )
    lines.append(
        "trained on Python alone; a base model, which follows no instructions"
    )
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def model_card(run: str | Path, again: str | Path | None = None) -> str:
    """The Markdown page of a finished run, with front matter for the Hub.

    Read from the run's folder alone; `again` is the folder of the same run repeated,
    for prediction 003. CardError if files are missing or disagree.
    """
    held = read_run(run)
    three, checked = ("", "", "from"), ("", "verdict", "evidence")
    licences = licence_rows(held)
    shares = ("licence", "share", "tokens", "packages", "which")
    with refused(held.folder):
        checks = check_rows(held, again)
        written = complete(held.model, held.tokenizer, "def ", max_new_tokens=32)
        paths = [held.folder / name for name in sorted(FILES)]
        paths += sorted((held.folder / "evaluation").glob("*.json*"))
        hashes = [
            (
                p.relative_to(held.folder).as_posix(),
                p.stat().st_size,
                sha256_file(p),
            )
            for p in paths
        ]
        sample = "\n".join(f"    {line}" for line in f"def {written}".splitlines())
        parts = [
            front_matter(held),
            f"# {held.final['name']}\n",
            "Made from the folder of the run. Every figure was read from the file that "
            "its row names, and held to the others.\n",
            table(three, about_rows(held)),
            "\n## Recipe\n",
            table(three, recipe_rows(held)),
            "\n## Loss\n",
            table(three, loss_rows(held)),
            "\n## Predictions and checks\n",
            table(checked, checks),
            "\n## Benchmarks\n",
            table(three, benchmark_rows(held)),
            "\nWhat it writes after `def `, always the most probable token:\n",
            sample,
            "\n## Licences of the training text\n",
            table(shares, licences) if licences else UNSTATED,
            "\n## Limitations\n",
            limits(held),
            "\n## Files\n",
            table(("file", "bytes", "SHA-256"), hashes),
        ]
    return "\n".join(parts) + "\n"


def write_model_card(run: str | Path, again: str | Path | None = None) -> Path:
    """Write the card into the run's folder as README.md, whole or not at all."""
    page, path = model_card(run, again), Path(run) / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
