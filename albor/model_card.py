# Generated from book/model_card.md: edit the chapter, not this file.
"""The model card of a run: a page made from its folder alone.

Notable:
- every row names the files that it stems from, and these agree with each other;
- what the folder does not hold is "not measured" or "not stated": no row has a
  default, and no function here takes a figure as an argument;
- the front matter is what the Hugging Face Hub reads; its results are measured.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from albor.artifacts import atomic_path, sha256_file
from albor.falsify import falsify, validate_checkpoint
from albor.generate import complete
from albor.run_folder import (
    FILES,
    Held,
    marks_of,
    read_run,
    refused,
    shares,
    step_time,
)
from albor.train import METRICS

__all__ = [
    "ABSENT",
    "BOTH",
    "RUN",
    "SETS",
    "SUMMARY",
    "UNSTATED",
    "Rows",
    "about_rows",
    "benchmark_rows",
    "front_matter",
    "limits",
    "loss_rows",
    "model_card",
    "recipe_rows",
    "table",
    "text_rows",
    "write_model_card",
]


ABSENT, UNSTATED = "not measured", "not stated"  # of a result; of a fact
Rows = list[tuple[Any, ...]]
RUN, SUMMARY = "provenance.json", "final_model.json"
BOTH = f"{RUN}, {METRICS}"


def table(head: Sequence[str], rows: Rows) -> str:
    """A Markdown table; no text can leave its cell, and no cell is empty."""

    def cell(value: Any) -> str:
        text = " ".join(str(UNSTATED if value in (None, "") else value).split())
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def text_rows(held: Held) -> Rows:
    """What it has read; token rows that others made have no record of that."""
    digest = ("Corpus", held.made["corpus"]["digest"], RUN)
    if not held.record:
        return [("Training data", None, RUN), ("Held out", None, RUN), digest]
    report, data = held.record["corpus"]["report"], held.recipe.data
    some = [row for row in held.record["files"] if row["split"] == "train"]
    first = sum(row["tier"] == 1 for row in some)
    read = f"{held.stream('train'):,} tokens of {len(some):,} files, {first:,} of "
    read += f"them in tier 1, which is read {data.upsample}x"
    infill = f"{data.fim_rate:.0%} of fragments"
    infill += f", {data.fim_style.upper()}" if data.fim_rate else ""
    packages = report["splits"]["val"]["packages"]
    held_out = f"{held.stream('val'):,} tokens of {packages} packages"
    return [
        ("Training data", read, RUN),
        ("Fill in the middle", infill, RUN),
        ("Held out", f"{held_out}, split by {report['split_by']}", RUN),
        digest,
    ]


def about_rows(held: Held) -> Rows:
    """What the model is, and where it was made."""
    final, shape, sessions = held.final, held.recipe.model, held.made["sessions"]
    last = sessions[-1]
    form = f"hidden={shape.hidden_size}, layers={shape.num_hidden_layers}, "
    form += f"heads={shape.num_attention_heads}x{shape.head_dim}, "
    form += f"kv_heads={shape.num_key_value_heads}, ffn={shape.intermediate_size}"
    size = f"{final['parameters']:,} in {final['tensors']} tensors"
    vocabulary = f"{shape.vocab_size:,}; the tokenizer, a byte-level BPE, has "
    context = f"{shape.max_position_embeddings:,} tokens; trained on rows of "
    context += f"{held.recipe.data.seq_len:,}"
    seconds, covered = step_time(held)
    time = f"{seconds:,.1f} s in {covered:,} of {len(held.log):,} steps"
    where = [last.get(key) for key in ("device", "gpu", "cpu", "platform")]
    tools = sorted(last.get("versions", {}).items())
    return [
        ("Name", final["name"], SUMMARY),
        ("Type", "decoder-only Transformer, Llama layout, tied", "config.json"),
        ("Parameters", size, "config.json, model.safetensors"),
        ("Architecture", form, "config.json"),
        ("Vocabulary", f"{vocabulary}{held.tokenizer.vocab_size:,}", "config.json"),
        ("Context", context, f"config.json, {RUN}"),
        *text_rows(held),
        ("Training time", time if covered else ABSENT, METRICS),
        ("Framework", ", ".join(f"{name} {tool}" for name, tool in tools), RUN),
        ("Hardware", ", ".join(x for x in where if x), RUN),
        ("Commit", last.get("commit"), RUN),
        ("Sessions", len(sessions), RUN),
        ("Licence of the weights", None, "a decision, not a measurement"),
    ]


def recipe_rows(held: Held) -> Rows:
    """How it was trained."""
    recipe, tokens, stream = held.recipe, held.final["tokens"], held.stream("train")
    data, adam, plan = recipe.data, recipe.optimizer, recipe.training
    turns, length = plan.gradient_accumulation, data.seq_len
    adamw = "AdamW, "
    if adam.name == "muon":
        adamw = (
            f"Muon (momentum={adam.momentum:g}) on matrices of blocks, else AdamW, "
        )
    adamw += f"lr={adam.lr:g}, beta1={adam.beta1:g}, beta2={adam.beta2:g}, "
    adamw += f"eps={adam.eps:g}, wd={adam.weight_decay:g} on {adam.decay}"
    rate = f"{plan.lr_scheduler} to {plan.min_lr_ratio:g} of the peak"
    batch = f"{data.batch_size} x {turns} x {length}"
    each = data.batch_size * turns * length
    steps = f"{held.final['steps']:,} of {plan.max_steps:,}"
    steps += "" if held.final["finished"] else ": NOT FINISHED"
    passes = f"{tokens / stream:.3g} of {plan.epochs} allowed" if stream else None
    return [
        ("Optimizer", f"{adamw}; clipped at {plan.grad_clip:g}", RUN),
        ("Schedule", f"{rate}; warm-up {plan.warmup_steps} steps", BOTH),
        ("Batch", f"{batch} = {each:,} tokens", BOTH),
        ("Precision", plan.mixed_precision, RUN),
        ("Steps", steps, BOTH),
        ("Tokens trained on", f"{tokens:,}", BOTH),
        ("Tokens per parameter", f"{tokens / held.final['parameters']:.3g}", BOTH),
        ("Passes over the data", passes, BOTH),
        ("Seed", held.final["seed"], RUN),
    ]


def loss_rows(held: Held) -> Rows:
    """Losses in nats per token, the marks on their scale, perplexities."""
    final, losses = held.final, [record["loss"] for record in held.log]
    best, later = min(losses), ABSENT
    course = f"{losses[0]:.3f} → {losses[-1]:.3f} (best {best:.3f}"
    marks = f"{final['unigram_cross_entropy']:.3f} unigram, "
    marks += f"{final['ln_vocabulary']:.3f} ln V"
    if told := held.evaluation and held.evaluation["perplexity"]:
        later = f"{told['perplexity']:,.1f} on {told['tokens']:,} tokens in rows "
        later += f"of {told['seq_len']}; {told['bits_per_byte']:.3f} bits per byte"
        if reach := told["perplexity_95"]:
            later += f"; 95%: {reach[0]:,.1f} to {reach[1]:,.1f}"
    judged = f"{final['val_loss']:.3f} on {final['val_tokens']:,} tokens"
    return [
        ("Training loss", f"{course} at step {losses.index(best)})", METRICS),
        ("Validation loss", judged, SUMMARY),
        ("Perplexity", f"{final['val_perplexity']:,.1f}", f"{SUMMARY}: exp(loss)"),
        ("For comparison", marks, SUMMARY),
        ("Perplexity, evaluated", later, "evaluation/results.json"),
    ]


SETS = {  # rows that every card has, measured or not
    "HumanEval": ("pass@1",),
    "python-intermediate": ("pass@1",),
    "infilling": ("pass@1", "exact"),
}


def benchmark_rows(held: Held) -> Rows:
    """A row for each score, and for each of `SETS` that has none."""
    rows: Rows = []
    for name in sorted({*SETS, *held.scores}, key=str.lower):
        told = held.scores.get(name, {})
        found = marks_of(told)
        for key in found or SETS[name]:
            value, source = ABSENT, "evaluation/results.json"
            if mark := found.get(key):
                source = f"evaluation/{name}_results.jsonl"
                value = f"{mark['value']:.3f}; 95%: {mark['low']:.3f} to "
                value += f"{mark['high']:.3f}; {told['problems']} problems, "
                value += f"{told['samples']} samples of each"
            rows.append((f"{name}, {key}", value, source))
    return rows


def front_matter(held: Held) -> str:
    """YAML for the Hugging Face Hub; `model-index` holds measured results alone."""
    corpus = f"albor-corpus-{held.made['corpus']['digest'][:16]}"
    measured = {key: held.final[f"val_{key}"] for key in ("loss", "perplexity")}
    found = [(corpus, "held-out part of the corpus", measured)]
    for name, told in held.scores.items():
        marks = {key: mark["value"] for key, mark in marks_of(told).items()}
        found.append((name.lower(), name, marks))
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": kind, "name": name},
            "metrics": [{"type": k, "value": v} for k, v in marks.items()],
        }
        for kind, name, marks in found
    ]
    content = {
        **{"license": "other", "license_name": "not-stated"},
        "corpus_licenses": [row[0] for row in shares(held)] or [UNSTATED],
        **{"language": ["code"], "library_name": "transformers"},
        "pipeline_tag": "text-generation",
        "tags": ["code", "python", "llama", "albor"],
        "model-index": [{"name": held.final["name"], "results": results}],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def limits(held: Held) -> Iterable[str]:
    """What the record admits."""
    report = held.made["corpus"]["report"]
    yield from (" ".join(note.split()) for note in report.get("notes", ()))
    problems = (report.get("benchmarks") or {}).get("problems", 0)
    looked = f"searched for {problems} problems" if problems else "not searched"
    yield f"benchmark texts: the corpus was {looked}"
    yield "trained on Python alone; a base model, which follows no instructions"


def model_card(run: str | Path, again: str | Path | None = None) -> str:
    """The Markdown page of a run, with front matter for the Hub.

    Read from the run's folder alone; `again` is the folder of the same run
    repeated, for prediction 003. FolderError if files are missing or disagree.
    """
    held, three = read_run(run), ("field", "value", "from")
    judged = ("what", "verdict", "evidence")
    with refused(held.folder):
        checks: Rows = [
            (f"{one.prediction}: {one.statement}", one.status, one.evidence)
            for one in falsify(held.folder, again)
        ]
        verdict, _, why = str(validate_checkpoint(held.folder)).partition(": ")
        checks.append(("Checkpoint validation: trained?", verdict, why))
        text = complete(held.model, held.tokenizer, "def ", max_new_tokens=32)
        done = f"{len(held.tokenizer.encode(text))} tokens"
        checks.append(("Inference: loads, generates?", done, "under Benchmarks"))
        files = [held.folder / name for name in sorted(FILES)]
        files += sorted((held.folder / "evaluation").glob("*.json*"))
        hashes: Rows = [
            (str(x.relative_to(held.folder)), x.stat().st_size, sha256_file(x))
            for x in files
        ]
        written = "".join(f"\n    {line}" for line in f"def {text}".splitlines())
        rows = [(*row[:2], f"{row[2]:,}", row[3]) for row in shares(held)]
        sections = {
            "The model": table(three, about_rows(held)),
            "Recipe": table(three, recipe_rows(held)),
            "Loss, in nats per token": table(three, loss_rows(held)),
            "Predictions and checks": table(judged, checks),
            "Benchmarks": table(three, benchmark_rows(held))
            + f"\n\nWhat it writes after `def `, greedily:\n{written}",
            "Licences of the training text": table(
                ("licence", "share", "tokens", "whose"), rows or [(None,) * 4]
            ),
            "Limitations": "\n".join(f"- {line}" for line in limits(held)),
            "Files": table(("file", "bytes", "SHA-256"), hashes),
        }
    page = f"---\n{front_matter(held)}---\n\n# {held.final['name']}\n\nMade from "
    page += "the run's folder; a row names the files that its value is from.\n"
    return page + "".join(f"\n## {name}\n\n{x}\n" for name, x in sections.items())


def write_model_card(run: str | Path, again: str | Path | None = None) -> Path:
    """Write the card into the run's folder as README.md, whole or not at all."""
    page, path = model_card(run, again), Path(run) / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
