"""A run's folder: accepted as it was left, refused after every edit that shows."""

import json
import math
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from albor.artifacts import digest, read_jsonl, sha256_file, write_json
from albor.model import Albor
from albor.run_folder import (
    FILES,
    NEEDS,
    FolderError,
    Held,
    read_run,
    shares,
    step_time,
)
from albor.shapes import ModelConfig
from albor.tokenizer import Tokenizer
from albor.train import METRICS
from albor.weights import save_model

ROOT = Path(__file__).parents[1]
TINY = runpy.run_path(str(ROOT / "book/tiny_run.py"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("whole")
    run = TINY["finished_run"](work / "run", work / "data", TINY["tiny_recipe"]())
    return TINY["evaluated"](run, next((work / "data").iterdir()))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(path: Path, change: Callable[[list[dict]], object]) -> None:
    lines = read_jsonl(path)
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def at(value: Any, path: list) -> Any:
    for key in path:
        value = value[key]
    return value


def paths_in(value: Any, path: tuple = ()) -> list[tuple]:
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    found = [path] if path else []
    for key, part in parts:
        found += paths_in(part, (*path, key))
    return found


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 1.001 + 1e-6
    return f"{value}x" if isinstance(value, str) else ["x"]


def test_the_folder_is_accepted_as_it_was_left(run: Path) -> None:
    held = read_run(run)
    assert len(held.log) == held.final["steps"] == 30
    assert held.scores["toy"]["pass@1"]["value"] == 0.75
    assert held.record is not None


@pytest.mark.parametrize("name", FILES)
def test_each_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(FolderError, match=f"no {name}"):
        read_run(run)


ALONE = {"unigram_cross_entropy", "val_unigram_entropy"}  # no second witness


@pytest.mark.parametrize("key", NEEDS["final_model.json"])
def test_each_value_of_the_summary_is_held_to_another(run: Path, key: str) -> None:
    edit(run / "final_model.json", lambda x: x.update({key: other(x[key])}))
    if key in ALONE:
        read_run(run)
        return
    word = "val_perplexity" if key == "val_loss" else key
    with pytest.raises(FolderError, match=f"final_model.json, {word}: recorded"):
        read_run(run)


@pytest.mark.parametrize("key", NEEDS["final_model.json"])
@pytest.mark.parametrize("value", [None, True, "1", [1]])
def test_a_summary_of_other_types_is_refused(
    run: Path, key: str, value: object
) -> None:
    right = NEEDS["final_model.json"][key]
    if type(value) is right:
        value = {}
    edit(run / "final_model.json", lambda x: x.update({key: value}))
    with pytest.raises(FolderError, match=f"{key} = .*expected {right.__name__}"):
        read_run(run)


def test_the_cards_two_figures_are_refused_with_both_values(run: Path) -> None:
    edit(
        run / "final_model.json",
        lambda x: x.update(val_loss=5.92, val_perplexity=31926.0),
    )
    with pytest.raises(FolderError, match=r"recorded 31926.0, .* gives 372\.41"):
        read_run(run)


def test_every_key_of_the_configuration_counts(run: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    for key in content:
        changed = {**content, key: other(content[key])}
        (run / "config.json").write_text(json.dumps(changed))
        with pytest.raises(FolderError, match=r"config\.json"):
            read_run(run)
    (run / "config.json").write_text(json.dumps(content))
    read_run(run)


@pytest.mark.parametrize("step", [0, 14, 29])
@pytest.mark.parametrize("key", ["lr", "tokens", "clip", "step"])
def test_the_log_is_held_to_the_recipe_at_every_step(
    run: Path, step: int, key: str
) -> None:
    rewrite(run / METRICS, lambda x: x[step].update({key: other(x[step][key])}))
    with pytest.raises(FolderError, match="step"):
        read_run(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.pop(),
        lambda x: x.pop(7),
        lambda x: x.append({**x[-1], "step": 30}),
        lambda x: x.append(x[-1]),
        lambda x: x.clear(),
        lambda x: x[-1].update(loss=x[-1]["loss"] - 0.01),
        lambda x: x[3].pop("lr"),
        lambda x: x[3].update(grad_norm="2"),
    ],
)
def test_a_log_of_another_run_is_refused(run: Path, change: Callable) -> None:
    rewrite(run / METRICS, change)
    with pytest.raises(FolderError):
        read_run(run)


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_a_log_with_a_torn_end_is_refused(run: Path) -> None:
    log = (run / METRICS).read_bytes()
    (run / METRICS).write_bytes(log[:-20])
    with pytest.raises(FolderError, match=r"steps: recorded 30, .* gives 29"):
        read_run(run)


def seal(run: Path) -> None:
    """Make the summary and the evaluation speak of the weights that lie there."""
    weights = sha256_file(run / "model.safetensors")
    edit(run / "final_model.json", lambda x: x.update(model_sha256=weights))
    for name in ("results", "toy_settings"):
        edit(run / f"evaluation/{name}.json", lambda x: x.update(weights=weights))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def unknown_tensor(path: Path) -> None:
    weights = load_file(path)
    weights["lm_head.bias"] = weights["model.norm.weight"].clone()
    save_file(weights, path)


def narrower(path: Path) -> None:
    shape = ModelConfig(420, 36, 112, 3, 6, 2, 64, 10)
    save_model(path.parent / "other", Albor(shape, seed=1))
    shutil.copy(path.parent / "other" / path.name, path)


@pytest.mark.parametrize(
    "spoil", [lambda p: flip(p, -3), cut, unknown_tensor, narrower]
)
@pytest.mark.parametrize("sealed", [False, True])
def test_other_weights_are_refused_even_with_their_hash(
    run: Path, spoil: Callable, sealed: bool
) -> None:
    spoil(run / "model.safetensors")
    if sealed:
        seal(run)
    with pytest.raises(FolderError) as caught:
        read_run(run)
    assert ("model_sha256: recorded" in str(caught.value)) is not sealed


def test_another_tokenizer_is_refused(run: Path) -> None:
    Tokenizer.train(["def f(x):\n    return x\n" * 9], 270).save(run)
    with pytest.raises(FolderError, match="tokenizer"):
        read_run(run)


@pytest.mark.parametrize(
    "path",
    [
        "seed",
        "tokenizer",
        "data",
        "recipe/name",
        "recipe/optimizer/lr",
        "recipe/data/batch_size",
        "recipe/data/seq_len",
        "recipe/data/fim_rate",
        "recipe/data/upsample",
        "recipe/training/max_steps",
        "recipe/training/gradient_accumulation",
        "recipe/training/warmup_steps",
        "recipe/training/min_lr_ratio",
        "recipe/training/grad_clip",
        "recipe/model/architecture/hidden_size",
        "recipe/model/architecture/rope_theta",
        "corpus/digest",
        "corpus/report/splits/train/bytes",
        "corpus/record/digest",
        "corpus/record/files/0/licence",
        "corpus/record/files/0/tokens",
        "corpus/record/shards/0/tokens",
        "corpus/record/corpus/report/split_by",
    ],
)
def test_provenance_that_differs_is_refused(run: Path, path: str) -> None:
    *way, last = [int(x) if x.isdigit() else x for x in path.split("/")]

    def change(value: Any) -> None:
        part = at(value, way)
        part[last] = other(part[last])

    edit(run / "provenance.json", change)
    with pytest.raises(FolderError):
        read_run(run)


def test_a_tamperer_who_seals_the_record_again_meets_the_run(run: Path) -> None:
    """With the record's own digest mended, its tokens still belong to a summary."""

    def change(value: Any) -> None:
        record = value["corpus"]["record"]
        for shard in record["shards"]:
            shard["tokens"] += 40
        del record["digest"]
        record["digest"] = digest(record)

    edit(run / "provenance.json", change)
    with pytest.raises(FolderError, match="val_tokens"):
        read_run(run)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_junk_anywhere_is_accepted_or_refused_and_nothing_else(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(NEEDS)))
    value = json.loads((whole / name).read_text())
    *way, last = data.draw(st.sampled_from(paths_in(value)))
    junk = [None, [], {}, "", -1, 0, 1e308, True, "\N{BOM}", [[]], {"a": []}]
    at(value, way)[last] = data.draw(st.sampled_from(junk))
    copy = tmp_path / "junk"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    write_json(copy / name, value)
    try:
        assert isinstance(read_run(copy), Held)
    except FolderError as error:
        assert len(str(error)) > 20


@pytest.mark.filterwarnings("ignore:.*cut off")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_files_that_are_none_are_refused(
    run: Path, name: str, content: bytes
) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(FolderError):
        read_run(run)


@pytest.mark.parametrize(
    "name, change",
    [
        ("results", lambda x: x.update(weights="0" * 64)),
        ("results", lambda x: x["problems"]["toy"]["pass@1"].update(value=0.8)),
        ("results", lambda x: x["problems"]["toy"]["pass@1"].update(low=0.7)),
        ("results", lambda x: x["problems"]["toy"].update(problems=5)),
        ("results", lambda x: x["problems"]["toy"].update(samples=2)),
        ("results", lambda x: x["problems"]["toy"]["passed"].update({"toy/3": 1})),
        ("results", lambda x: x["problems"]["toy"].pop("pass@1")),
        ("results", lambda x: x["problems"].update(HumanEval=x["problems"]["toy"])),
        ("results", lambda x: x["problems"]["toy"].update({"pass@x": 1})),
        ("results", lambda x: x["perplexity"].update(perplexity=2.0)),
        ("results", lambda x: x["perplexity"].update(loss=2.0)),
        ("results", lambda x: x["perplexity"].update(tokens=99)),
        ("results", lambda x: x["perplexity"].update(bytes=99)),
        ("results", lambda x: x["perplexity"].update(standard_error=None)),
        ("results", lambda x: x["perplexity"].pop("rows")),
        ("results", lambda x: x.pop("perplexity")),
        ("toy_settings", lambda x: x.update(weights="0" * 64)),
        ("toy_settings", lambda x: x.update(tokenizer="0" * 64)),
        ("toy_settings", lambda x: x.update(n=2)),
    ],
)
def test_scores_that_differ_are_refused(
    run: Path, name: str, change: Callable
) -> None:
    edit(run / f"evaluation/{name}.json", change)
    with pytest.raises(FolderError):
        read_run(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.pop(),
        lambda x: x.append(x[0]),
        lambda x: x[3].update(passed=True),
        lambda x: x[3].update(passed=True, result="passed"),
        lambda x: x[0].update(task_id="toy/9"),
        lambda x: x[0].pop("result"),
        lambda x: x[0].update(result="failed: not 0"),
        lambda x: x.extend([dict(line) for line in x]),
        lambda x: x.clear(),
    ],
)
def test_lines_that_do_not_give_the_score_are_refused(
    run: Path, change: Callable
) -> None:
    rewrite(run / "evaluation/toy_results.jsonl", change)
    with pytest.raises(FolderError):
        read_run(run)


def test_without_summary_an_evaluation_counts_for_nothing(run: Path) -> None:
    (run / "evaluation/results.json").unlink()
    held = read_run(run)
    assert held.evaluation is None and held.scores == {}


def test_a_run_on_token_rows_has_no_record_of_text(run: Path) -> None:
    files = {"train": "a" * 64, "val": "b" * 64}
    report = {"splits": {}, "files": files, "notes": ["rows by others"]}
    about = {"digest": digest(files), "report": report}
    edit(run / "provenance.json", lambda x: x.update(corpus=about))
    held = read_run(run)
    assert held.record is None and held.stream("val") is None and shares(held) == []
    files["val"] = "c" * 64
    edit(
        run / "provenance.json", lambda x: x["corpus"]["report"].update(files=files)
    )
    with pytest.raises(FolderError, match="corpus"):
        read_run(run)


def test_time_in_steps_is_the_sum_over_paces(whole: Path) -> None:
    """Two sessions; the second starts at 5, after a kill that left 3, 4 untimed."""
    held = read_run(whole)
    durations = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    log = [{"step": step, "tokens": 10} for step in range(8)]
    for first, last in ((0, 0), (1, 2), (5, 5), (6, 7)):
        spent = sum(durations[first : last + 1])
        log[last]["tokens_per_second"] = 10 * (last - first + 1) / spent
    made = {"sessions": [{"start_step": 0}, {"start_step": 5}]}
    some = Held(*(made if key == "made" else log if key == "log" else value
                  for key, value in vars(held).items()))  # fmt: skip
    seconds, covered = step_time(some)
    assert math.isclose(seconds, sum(durations) - 8 - 16) and covered == 6


def test_shares_are_those_of_the_files(whole: Path) -> None:
    held = read_run(whole)
    assert held.record is not None
    sums: dict[str, int] = {}
    for row in held.record["files"]:
        if row["split"] == "train":
            sums[row["licence"]] = sums.get(row["licence"], 0) + row["tokens"]
    assert {row[0]: row[2] for row in shares(held)} == sums and len(sums) > 1
    for name, share, _, _ in shares(held):
        assert share == f"{100 * sums[name] / sum(sums.values()):.1f}%"
