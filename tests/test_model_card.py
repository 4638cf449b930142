"""The page: its rows, its front matter, and that no figure in it is typed."""

import ast
import dataclasses
import inspect
import json
import math
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import albor.model_card
from albor.artifacts import read_jsonl, sha256_file, write_json
from albor.model_card import (
    ABSENT,
    SETS,
    UNSTATED,
    about_rows,
    benchmark_rows,
    front_matter,
    loss_rows,
    model_card,
    recipe_rows,
    table,
    write_model_card,
)
from albor.run_folder import FolderError, Held, read_run
from albor.train import METRICS

ROOT = Path(__file__).parents[1]
TINY = runpy.run_path(str(ROOT / "book/tiny_run.py"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def whole(work: Path) -> Path:
    return TINY["finished_run"](work / "run", work / "data", TINY["tiny_recipe"]())


@pytest.fixture(scope="module")
def held(whole: Path) -> Held:
    return read_run(whole)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def values(page: str) -> dict[str, list[str]]:
    """The tables of a page: what stands after the first cell of each row."""
    rows = [
        line.strip("| ").split(" | ")
        for line in page.splitlines()
        if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in rows}


def front(page: str) -> dict:
    start, matter, _ = page.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(matter)


def test_every_row_of_the_originals_card_has_an_answer(whole: Path) -> None:
    found = values(model_card(whole))
    for name in (
        *("Name", "Type", "Parameters", "Architecture", "Vocabulary", "Context"),
        *("Training data", "Fill in the middle", "Held out", "Training time"),
        *("Framework", "Hardware", "Optimizer", "Schedule", "Batch", "Precision"),
        *("Steps", "Tokens trained on", "Passes over the data", "Seed"),
        *("Training loss", "Validation loss", "Perplexity"),
        *("Checkpoint validation: trained?", "Inference: loads, generates?"),
        *("HumanEval, pass@1", "python-intermediate, pass@1"),
    ):
        assert all(found[name]), name
    for number in (1, 2, 3):
        assert any(f"FALSIFY-ALBOR-00{number}" in name for name in found)
    assert found["Parameters"][0] == "91,920 in 29 tensors"
    assert found["Batch"][0] == "3 x 2 x 32 = 192 tokens"
    assert found["Tokens trained on"][0] == "5,760"
    assert found["Checkpoint validation: trained?"][0] == "PASS"
    for name in ("model.safetensors", METRICS, "provenance.json"):
        assert found[name][1] == sha256_file(whole / name)


def test_without_an_evaluation_all_of_it_is_not_measured(whole: Path) -> None:
    page = model_card(whole)
    expected = 1 + sum(map(len, SETS.values()))
    assert page.count(ABSENT) == expected == 5
    (only,) = front(page)["model-index"][0]["results"]
    assert {one["type"] for one in only["metrics"]} == {"loss", "perplexity"}


def test_measured_rows_replace_the_unmeasured_ones(run: Path, work: Path) -> None:
    TINY["evaluated"](run, next((work / "data").iterdir()))
    for kind in ("settings.json", "results.jsonl"):  # as if it were a known set
        shutil.move(
            run / f"evaluation/toy_{kind}", run / f"evaluation/HumanEval_{kind}"
        )
    path = run / "evaluation/results.json"
    told = json.loads(path.read_text())
    told["problems"] = {"HumanEval": told["problems"]["toy"]}
    write_json(path, told)
    page = model_card(run)
    found = values(page)
    assert page.count(ABSENT) == 3
    assert found["HumanEval, pass@1"][0].startswith(
        "0.750; 95%: 0.301 to 0.954; 4 "
    )
    assert found["HumanEval, pass@1"][1] == "evaluation/HumanEval_results.jsonl"
    bits = told["perplexity"]["bits_per_byte"]
    assert f"{bits:.3f} bits per byte" in found["Perplexity, evaluated"][0]
    results = front(page)["model-index"][0]["results"]
    assert results[1]["dataset"] == {"type": "humaneval", "name": "HumanEval"}
    assert results[1]["metrics"] == [{"type": "pass@1", "value": 0.75}]


def test_the_hubs_own_reader_finds_the_results(whole: Path, held: Held) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(model_card(whole)).data
    assert data.license == "other" and data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation" and data.language == ["code"]
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    expected = {key: held.final[f"val_{key}"] for key in ("loss", "perplexity")}
    assert found == expected and data.model_name == "card-example"


def test_licences_of_the_packages_are_listed(whole: Path, held: Held) -> None:
    assert held.record is not None
    files = [row for row in held.record["files"] if row["split"] == "train"]
    licences = {row["licence"] for row in files}
    page = model_card(whole)
    assert set(front(page)["corpus_licenses"]) == licences and len(licences) > 1
    found = values(page)
    for name in licences:
        tokens = sum(row["tokens"] for row in files if row["licence"] == name)
        assert found[name][1] == f"{tokens:,}"


@settings(deadline=None, max_examples=50)
@given(
    loss=st.floats(0.01, 12), best=st.floats(0.01, 12), final=st.floats(0.01, 12)
)
def test_another_loss_in_the_folder_is_another_loss_on_the_page(
    held: Held, loss: float, best: float, final: float
) -> None:
    log = [{"loss": 13.0}, {"loss": best}, {"loss": final}]
    told = {**held.final, "val_loss": loss, "val_perplexity": math.exp(loss)}
    changed = dataclasses.replace(held, final=told, log=log)
    rows = {row[0]: row[1] for row in loss_rows(changed)}
    assert rows["Validation loss"].startswith(f"{loss:.3f} on ")
    assert rows["Perplexity"] == f"{math.exp(loss):,.1f}"
    least = min(best, final)
    assert rows["Training loss"].startswith(
        f"13.000 → {final:.3f} (best {least:.3f}"
    )
    metrics = yaml.safe_load(front_matter(changed))["model-index"][0]["results"][0]
    assert [x["value"] for x in metrics["metrics"]] == [loss, math.exp(loss)]


CHANGES: dict[str, dict[str, object]] = {
    "model": {
        **{"vocab_size": 421, "hidden_size": 54, "intermediate_size": 113},
        **{"num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 12},
        **{"num_key_value_heads": 3, "max_position_embeddings": 65},
    },
    "data": {"batch_size": 4, "seq_len": 31, "upsample": 2, "fim_rate": 0.5},
    "optimizer": {
        **{"lr": 1e-3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-7},
        **{"weight_decay": 0.2, "decay": "all"},
    },
    "training": {
        **{"epochs": 8, "max_steps": 31, "grad_clip": 2.0, "warmup_steps": 4},
        **{"lr_scheduler": "constant", "min_lr_ratio": 0.2},
        **{"gradient_accumulation": 3, "mixed_precision": "bf16"},
    },
}


@pytest.mark.parametrize("part", CHANGES)
def test_each_field_of_the_recipe_is_seen_in_a_row(held: Held, part: str) -> None:
    before = about_rows(held) + recipe_rows(held)
    value = getattr(held.recipe, part)
    for name, new in CHANGES[part].items():
        one = dataclasses.replace(value, **{name: new})
        recipe = dataclasses.replace(held.recipe, **{part: one})
        changed = dataclasses.replace(held, recipe=recipe)
        assert about_rows(changed) + recipe_rows(changed) != before, name


def test_no_figure_is_typed_in_the_module() -> None:
    """No text that reaches a page holds a digit; names of scores aside."""
    tree = ast.parse(inspect.getsource(albor.model_card))
    formats = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.FormattedValue) and node.format_spec
        for part in ast.walk(node.format_spec)
    }
    scopes = (ast.Module, ast.FunctionDef)
    docs = {
        ast.get_docstring(x, clean=False)
        for x in ast.walk(tree)
        if isinstance(x, scopes)
    }
    typed = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value not in docs
        and id(node) not in formats
        and re.search(r"\d", node.value)
    }
    assert typed == {
        *("pass@1", "perplexity_95", "utf-8", "SHA-256"),  # names
        *("; 95%: ", ", beta1=", ", beta2=", "them in tier 1, which is read "),
    }


def test_two_runs_share_no_results(whole: Path, work: Path) -> None:
    """What stands the same on cards of two different runs is no measurement."""
    recipe = TINY["tiny_recipe"]("another", steps=12)
    second = TINY["finished_run"](work / "second", work / "data", recipe, seed=7)
    one, two = values(model_card(whole)), values(model_card(second))
    for name in ("Training loss", "Validation loss", "Perplexity", "Steps"):
        assert one[name][0] != two[name][0]
    for name in ("model.safetensors", METRICS, "final_model.json"):
        assert one[name][1] != two[name][1]


def test_the_same_run_again_corroborates_003(whole: Path, work: Path) -> None:
    again = TINY["finished_run"](
        work / "again", work / "data", TINY["tiny_recipe"]()
    )
    page = model_card(whole, again)
    (row,) = [x for x in page.splitlines() if x.startswith("| FALSIFY-ALBOR-003")]
    assert "| CORROBORATED |" in row
    assert "| NOT RUN |" in model_card(whole)


def test_a_run_that_stopped_early_says_so(run: Path) -> None:
    log = read_jsonl(run / METRICS)[:20]
    (run / METRICS).write_text("".join(json.dumps(x) + "\n" for x in log))
    final = json.loads((run / "final_model.json").read_text())
    final |= {"steps": 20, "tokens": 20 * 192, "train_loss": log[-1]["loss"]}
    write_json(run / "final_model.json", {**final, "finished": False})
    assert values(model_card(run))["Steps"][0] == "20 of 30: NOT FINISHED"
    write_json(run / "final_model.json", final)
    with pytest.raises(FolderError, match="finished: recorded True"):
        model_card(run)


def test_facts_that_a_session_does_not_state(run: Path) -> None:
    path = run / "provenance.json"
    made = json.loads(path.read_text())
    write_json(path, {**made, "sessions": [{"start_step": 0}]})
    found = values(model_card(run))
    for name in ("Framework", "Hardware", "Commit", "Licence of the weights"):
        assert found[name][0] == UNSTATED
    for junk in ([], [5], [{"versions": 5}], [{"gpu": 5, "start_step": 0}]):
        write_json(path, {**made, "sessions": junk})
        with pytest.raises(FolderError):
            model_card(run)


def test_a_pace_that_was_not_logged_is_not_measured(run: Path) -> None:
    log = read_jsonl(run / METRICS)
    for line in log:
        line.pop("tokens_per_second", None)
    (run / METRICS).write_text("".join(json.dumps(x) + "\n" for x in log))
    assert values(model_card(run))["Training time"][0] == ABSENT


def test_benchmarks_have_their_rows_in_a_fixed_order(held: Held) -> None:
    rows = benchmark_rows(held)
    assert [row[0] for row in rows] == [
        "HumanEval, pass@1",
        "infilling, pass@1",
        "infilling, exact",
        "python-intermediate, pass@1",
    ]


@settings(max_examples=50)
@given(st.text("|\\<\n ab"), st.text("|\\<\n ab"))
def test_no_text_leaves_its_cell(one: str, two: str) -> None:
    page = table(("a", "b"), [(one, two)])
    lines = page.splitlines()
    assert len(lines) == 3
    bars = re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])
    assert len(bars) == 3 and "<" not in page


def test_the_card_is_written_whole_or_not_at_all(run: Path) -> None:
    path = write_model_card(run)
    page = path.read_text()
    assert path == run / "README.md" and page == model_card(run)
    assert write_model_card(run).read_text() == page  # it does not read itself
    (run / "tokenizer.json").unlink()
    with pytest.raises(FolderError):
        write_model_card(run)
    assert path.read_text() == page
    assert not list(run.glob(".*"))


@pytest.mark.slow
def test_the_real_jobs_folder_has_a_card(tmp_path: Path) -> None:
    papermill = pytest.importorskip("papermill")
    papermill.execute_notebook(
        ROOT / "notebooks/pretrain.ipynb",
        tmp_path / "out.ipynb",
        {
            "config": "tour",
            "max_steps": 6,
            "corpus": os.pathsep.join(("yaml", "safetensors", "json")),
            "output_dir": str(tmp_path / "run"),
        },
        progress_bar=False,
    )
    found = values(write_model_card(tmp_path / "run").read_text())
    assert found["Name"][0] == "tour" and found["Steps"][0] == "6 of 6"
