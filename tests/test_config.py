"""Recipes: strict reading, the contract C-TRAINCFG-001, the micro-batch."""

import ast
import dataclasses
import math
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from albor.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainingConfig,
    fit_micro_batch,
    load_recipe,
    memory_estimate,
    preflight,
    project_path,
    sequences,
    steps_per_epoch,
)
from albor.shapes import FULL_TOKENS, PRESETS

TRAIN = project_path("configs/train")
ALBOR = project_path("albor")
NAMES = sorted(path.stem for path in TRAIN.glob("*.yaml"))
TINY = (TRAIN / "pretrain-tiny.yaml").read_text(encoding="utf-8")


def recipe(**training):
    plan = {"epochs": 1, "max_steps": 10} | training
    return Recipe(
        name="test",
        model=PRESETS["albor-tiny"],
        data=DataConfig(batch_size=3, seq_len=5),
        optimizer=OptimizerConfig(lr=0.001),
        training=TrainingConfig(**plan),
    )


@pytest.fixture
def broken(tmp_path):
    """Load the text of a recipe, expecting a refusal; return what it says."""

    def load(text):
        path = tmp_path / "broken.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as refused:
            load_recipe(path)
        message = str(refused.value)
        assert message.startswith("broken.yaml: "), message
        return message.removeprefix("broken.yaml: ")

    return load


# The recipes that come with the project.


def test_the_card_s_recipes_are_there():
    assert set(NAMES) >= {
        "pretrain-tiny",
        "pretrain-small",
        "pretrain-50m",
        "pretrain-350m-cuda-test",
        "pretrain-350m",
        "pretrain-350m-v2",
        "pretrain-small-modern",
        "pretrain-350m-modern",
    }


@pytest.mark.parametrize("name", NAMES)
def test_recipes_come_back_from_yaml_unchanged(name, tmp_path):
    loaded = load_recipe(name)
    assert loaded.name == name and loaded == load_recipe(TRAIN / f"{name}.yaml")
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(loaded.to_dict()), encoding="utf-8")
    assert load_recipe(copy) == loaded


@pytest.mark.parametrize("name", NAMES)
def test_recipes_open_by_saying_what_they_are_for(name):
    first = (TRAIN / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 30


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "pretrain-350m": (4, 1024, "truncate", 128, 2000, 5000, 117),
        "pretrain-350m-v2": (4, 1024, "truncate", 128, 500, 5000, 38),
        "pretrain-350m-cuda-test": (4, 512, "pack", 1, 10, 50, None),
    }.items(),
)
def test_the_card_s_figures(name, expected):
    found = load_recipe(name)
    data, plan, adam = found.data, found.training, found.optimizer
    assert found.model == PRESETS["albor-base-350m"]
    assert expected == (
        data.batch_size,
        data.seq_len,
        data.rows,
        plan.gradient_accumulation,
        plan.warmup_steps,
        plan.max_steps,
        plan.epochs if expected[-1] else None,
    )
    assert (adam.lr, adam.beta1, adam.beta2) == (3e-4, 0.9, 0.95)
    assert (adam.weight_decay, plan.mixed_precision) == (0.1, "fp16")
    assert plan.lr_scheduler == "cosine"


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("-modern")])
def test_modern_recipes_differ_from_the_faithful_ones(name):
    found, faithful = load_recipe(name), load_recipe(name.removesuffix("-modern"))
    plan, adam = found.training, found.optimizer
    assert found.model == faithful.model and adam.name == "muon"
    assert 0 < plan.warmup_steps <= plan.max_steps / 10
    sizes = found.data.batch_size, plan.gradient_accumulation, found.data.seq_len
    if name == "pretrain-350m-modern":
        assert (plan.lr_scheduler, plan.min_lr_ratio) == ("linear", 0.0)
        assert 2**17 <= math.prod(sizes) <= 2**18
        assert math.prod(sizes) * plan.max_steps <= 5000 * 524_288 / 2
    assert preflight(found, 4_000 * sizes[0], strict_warmup=True).warnings == ()


@pytest.mark.parametrize("name", NAMES)
def test_every_modern_option_is_off_unless_a_recipe_asks(name):
    found = load_recipe(name)
    if not name.endswith("-modern"):
        assert (found.optimizer.name, found.training.lr_scheduler) == (
            "adamw",
            "cosine",
        )
        assert found.training.scaled_init is False


# Strict reading.


@pytest.mark.parametrize(
    ("good", "bad", "start", "words"),
    [
        ("lr: 3.0e-3", "lr: 3e-4", "optimizer.lr = '3e-4'", "write 3.0e-4"),
        ("lr: 3.0e-3", "lr: 3E4", "optimizer.lr = '3E4'", "write 3.0e+4"),
        ("lr: 3.0e-3", "lr: high", "optimizer.lr = 'high'", "number"),
        ("lr: 3.0e-3", "lr: -1.0", "optimizer.lr = -1.0", "at least 1e-09"),
        ("lr: 3.0e-3", "lr: .inf", "optimizer.lr = inf", "finite"),
        ("lr: 3.0e-3", "lr:", "optimizer.lr = None", "number"),
        ("lr: 3.0e-3", "learning_rate: 1.0", "optimizer.learning_rate", "known"),
        ("  lr: 3.0e-3", "  # none", "optimizer.lr", "missing"),
        ("beta1: 0.9\n", "beta1: 1\n", "optimizer.beta1 = 1.0", "at most 0.99"),
        ("name: adamw", "name: sgd", "optimizer.name = 'sgd'", "known: adamw"),
        ("name: adamw", "name: on", "optimizer.name = True", "known: adamw"),
        ("batch_size: 4", "batch_size: 4.5", "data.batch_size = 4.5", "whole"),
        ("batch_size: 4", "batch_size: '4'", "data.batch_size = '4'", "write 4"),
        ("batch_size: 4", "batch_size: yes", "data.batch_size = True", "bool"),
        ("batch_size: 4", "batch_size: 0", "data.batch_size = 0", "at least 1"),
        ("batch_size: 4", "batch_size: 1:30", "data.batch_size = '1:30'", "plain"),
        ("batch_size: 4", "batch_size: 0x10", "data.batch_size = '0x10'", "plain"),
        ("batch_size: 4", "batch_size: 017", "data.batch_size = '017'", "plain"),
        ("batch_size: 4", "Batch_Size: 4", "data.Batch_Size", "mean batch_size"),
        ("seq_len: 64", "seq_len: 257", "data.seq_len = 257", "= 256"),
        ("rows: pack", "rows: [pack]", "data.rows = ['pack']", "truncate"),
        ("epochs: 50", "epochs: 0", "training.epochs = 0", "at least 1"),
        ("max_steps: 30", "max_steps: 3", "training.warmup_steps = 3", "= 3"),
        ("max_steps: 30", "max_steps: 3e1", "training.max_steps = '3e1'", "whole"),
        ("max_steps: 30", "max_steps: 1,000", "training.max_steps", "write 1000"),
        (
            "save_interval: 10",
            "save_interval: 31",
            "training.save_inter",
            "write 0",
        ),
        (
            "eval_interval: 15",
            "eval_interval: 31",
            "training.eval_inter",
            "write 0",
        ),
        ("grad_clip: 1.0", "grad_clip: 0", "training.grad_clip = 0.0", "at least"),
        (
            "mixed_precision: fp32",
            "mixed_precision: int8",
            "training.mixed",
            "bf16",
        ),
        ("cosine", "square", "training.lr_scheduler = 'square'", "constant"),
        ("mode: pretrain", "mode: finetune", "training.mode", "known: pretrain"),
        ("preset: albor-tiny", "presets: albor-tiny", "model = ", "preset: NAME"),
        ("data:", "dataset:", "dataset = ", "did you mean data?"),
        ("data:", "7: {}\ndata:", "7 = {}", "unknown"),
        ("data:", "name: ../up\ndata:", "name = '../up'", "folder"),
        ("data:", "name: 2026-01-01\ndata:", "name = datetime.date", "quotes"),
        ("rows: pack", "rows: pack\n  rows: pack", "data.rows", "lines 11 and 12"),
        ("training:", "data: {}\ntraining:", "data = ", "given twice"),
    ],
)
def test_a_broken_recipe_is_refused_by_key_value_and_mend(
    broken, good, bad, start, words
):
    assert good in TINY
    message = broken(TINY.replace(good, bad, 1))
    assert message.startswith(start) and words in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "recipe = None"),
        ("just words", "expected keys"),
        ("- a\n- b", "expected keys"),
        ("name: x\n", "model = None: missing"),
        (TINY.partition("training:")[0], "training = None: missing"),
        (
            TINY.partition("training:")[0] + "training:\n",
            "training = None: expected",
        ),
        ("a: [", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("a: &x {b: *x}", "not YAML"),
        ("? [1]\n: 2", "not YAML"),
        ("a: !!python/object:os.system {}", "not YAML"),
        (b"a: \xff\xfe", "not YAML in UTF-8"),
        ("a: \x00", "not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(broken, text, words):
    assert words in broken(text)


def test_recipes_that_are_not_there_are_named_with_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match="did you mean pretrain-small"):
        load_recipe("pretrain-smal")
    with pytest.raises(ConfigError, match=r"none\.yaml.*No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError):
        load_recipe("")


def test_paths_start_at_the_project(tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert project_path("x") == inner / "x"  # no project: the working directory
    (tmp_path / "_toc.yml").touch()
    assert project_path("x") == tmp_path / "x"
    assert project_path(inner) == inner
    assert project_path("~/x") == Path(os.path.expanduser("~/x"))


def test_a_recipe_is_read_from_inside_the_notebooks_folder(monkeypatch):
    monkeypatch.chdir(project_path("notebooks"))
    assert load_recipe("configs/train/pretrain-tiny.yaml").name == "pretrain-tiny"


@given(
    st.integers(1, 10**6),
    st.floats(1e-9, 1),
    st.floats(0, 1),
    st.integers(1, 2**40),
    st.sampled_from(["pack", "truncate"]),
)
@settings(max_examples=50)
def test_any_recipe_survives_yaml(steps, lr, ratio, size, rows):
    made = dataclasses.replace(
        recipe(max_steps=steps, min_lr_ratio=ratio),
        optimizer=OptimizerConfig(lr=lr),
        data=DataConfig(batch_size=1, seq_len=7, rows=rows, max_bytes=size),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.yaml"
        path.write_text(yaml.safe_dump(made.to_dict()), encoding="utf-8")
        assert load_recipe(path) == made


# Other training values.


@given(st.integers(1, 10**6), st.data())
def test_a_shorter_run_keeps_its_share_of_warm_up(steps, data):
    old_steps = data.draw(st.integers(1, 10**6))
    warmup = data.draw(st.integers(0, old_steps - 1))
    saves = data.draw(st.integers(0, old_steps))
    old = recipe(max_steps=old_steps, warmup_steps=warmup, save_interval=saves)
    plan = old.with_training(max_steps=steps).training
    assert plan.max_steps == steps and plan.save_interval == min(saves, steps)
    assert plan.warmup_steps < steps
    if warmup == 0:
        assert plan.warmup_steps == 0
    elif steps > 1:
        assert plan.warmup_steps >= 1
        assert abs(plan.warmup_steps - warmup * steps / old_steps) <= 1


def test_a_warm_up_that_is_rounded_up_still_ends_before_the_run():
    plan = recipe(max_steps=10, warmup_steps=9).with_training(max_steps=5).training
    assert plan.warmup_steps == 4  # nine tenths of five, rounded up, would be five


def test_other_training_values_are_checked_and_explicit_ones_win():
    old = recipe(max_steps=100, warmup_steps=20)
    assert (
        old.with_training(max_steps=10, warmup_steps=7).training.warmup_steps == 7
    )
    assert old.with_training(epochs=9).training.warmup_steps == 20
    assert old.training.max_steps == 100  # the original is untouched
    for changes, words in [
        (
            {"max_step": 3},
            r"training\.max_step = 3: unknown; did you mean max_steps",
        ),
        ({"max_steps": 0}, r"training\.max_steps = 0: .*at least 1"),
        ({"max_steps": "50"}, r"training\.max_steps = '50': .*write 50"),
        ({"max_steps": True}, r"training\.max_steps = True"),
        ({"warmup_steps": 100}, r"training\.warmup_steps = 100: "),
    ]:
        with pytest.raises(ConfigError, match=words):
            old.with_training(**changes)


def test_a_recipe_s_parts_must_be_what_they_are_called():
    with pytest.raises(ConfigError, match="model = "):
        dataclasses.replace(recipe(), model={"preset": "albor-tiny"})


def test_every_key_is_read_by_somebody():
    """ALB-079: a key that is accepted and changes nothing is a lie."""
    sources = [path.read_text(encoding="utf-8") for path in ALBOR.glob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    run = project_path("book/pretrain.md").read_text(encoding="utf-8")
    read |= set(re.findall(r"\b(?:data|training)\.(\w+)", run))
    parts = (ModelConfig, DataConfig, OptimizerConfig, TrainingConfig)
    keys = {field.name for part in parts for field in dataclasses.fields(part)}
    assert keys - read == {"mode"}  # it has one value, which says what all of it is


# The contract C-TRAINCFG-001.


def count_by_running(total, batch, accumulation, epochs, max_steps):
    """Steps that a training loop takes, one sequence after another."""
    steps = 0
    for _ in range(epochs):
        gathered = 0
        for _ in range(total):
            gathered += 1
            if gathered == batch * accumulation and steps < max_steps:
                steps, gathered = steps + 1, 0
    return steps


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 9))
def test_steps_per_epoch_are_those_of_a_loop(total, batch, accumulation):
    expected = count_by_running(total, batch, accumulation, 1, 10**9)
    assert steps_per_epoch(total, batch, accumulation) == expected


@given(st.integers(0, 30), st.integers(1, 20), st.integers(1, 20))
def test_sequences_are_those_cut_from_rows(rows, row_tokens, seq_len):
    stream = [(row, i) for row in range(rows) for i in range(row_tokens)]
    packed = [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
    whole = sum(len(piece) == seq_len for piece in packed)
    assert sequences(rows, row_tokens, seq_len, "pack") == whole
    if seq_len > row_tokens:
        with pytest.raises(ConfigError, match="rows: pack"):
            sequences(rows, row_tokens, seq_len, "truncate")
    else:
        assert sequences(rows, row_tokens, seq_len, "truncate") == rows


@given(
    st.integers(0, 300),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_the_contract_passes_exactly_the_runs_that_arrive(
    total, batch, accumulation, epochs, max_steps
):
    made = recipe(
        epochs=epochs, max_steps=max_steps, gradient_accumulation=accumulation
    )
    data = dataclasses.replace(made.data, batch_size=batch)
    made = dataclasses.replace(made, data=data)
    run = count_by_running(total, batch, accumulation, epochs, max_steps)
    if run == max_steps:
        found = preflight(made, total)
        assert found.total_steps >= max_steps
        assert found.tokens_per_step == batch * accumulation * data.seq_len
        seen = found.tokens_per_parameter * 195_392
        assert math.isclose(seen, max_steps * found.tokens_per_step)
        assert found.passes <= epochs
        return
    with pytest.raises(ConfigError) as refused:
        preflight(made, total)
    message = str(refused.value)
    assume("write epochs: " in message)
    needed = int(message.split("write epochs: ")[1].split(",")[0])
    assert preflight(made.with_training(epochs=needed), total)
    with pytest.raises(ConfigError):
        preflight(made.with_training(epochs=needed - 1), total)


def test_the_card_s_two_runs_pass_and_the_original_s_does_not():
    v1, v2 = load_recipe("pretrain-350m"), load_recipe("pretrain-350m-v2")
    first, second = preflight(v1, 22_079), preflight(v2, 67_977)
    assert (first.steps_per_epoch, first.total_steps) == (43, 5031)
    assert (second.steps_per_epoch, second.total_steps) == (132, 5016)
    assert first.tokens_per_step == second.tokens_per_step == 524_288
    assert first.warmup_share == 0.4 and second.warmup_share == 0.1
    assert round(first.tokens_per_parameter, 2) == 6.58
    with pytest.raises(
        ConfigError, match=r"= 1: 43 .*43 of max_steps = 5000.*: 117,"
    ):
        preflight(v1.with_training(epochs=1), 22_079)
    with pytest.raises(ConfigError, match="write epochs: 38,"):
        preflight(v2.with_training(epochs=37), 67_977)


def test_a_long_warm_up_warns_and_is_refused_on_request():
    v1, v2 = load_recipe("pretrain-350m"), load_recipe("pretrain-350m-v2")
    (warning,) = preflight(v1, 22_079).warnings
    assert (
        "warmup_steps = 2000" in warning and "40%" in warning and "500" in warning
    )
    with pytest.raises(ConfigError, match=r"training\.warmup_steps = 2000.*40%"):
        preflight(v1, 22_079, strict_warmup=True)
    assert preflight(v2, 67_977, strict_warmup=True).warnings == ()  # just a tenth


@pytest.mark.parametrize("total", [0, 511])
def test_too_little_data_for_a_step_is_refused(total):
    v1 = load_recipe("pretrain-350m")
    words = rf"gradient_accumulation = 128: .*512 sequences.*only {total}"
    with pytest.raises(ConfigError, match=words):
        preflight(v1, total)


def test_rows_of_the_card():
    assert sequences(22_079, 2048, 1024, "truncate") == 22_079
    assert sequences(22_079, 2048, 1024, "pack") == 44_158
    assert steps_per_epoch(44_158, 4, 128) == 86
    with pytest.raises(ConfigError, match="did you mean pack"):
        sequences(3, 8, 4, "packed")
    with pytest.raises(ConfigError, match="seq_len = 0"):
        sequences(3, 8, 0, "pack")
    with pytest.raises(ConfigError, match="batch_size = 0"):
        steps_per_epoch(3, 0, 1)


# The micro-batch.


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(7_000_000, 60_000_000),
    st.sampled_from(["fp16", "bf16", "fp32", "auto"]),
)
def test_the_largest_micro_batch_that_fits(batch, accumulation, room, precision):
    made = recipe(gradient_accumulation=accumulation, mixed_precision=precision)
    data = dataclasses.replace(made.data, batch_size=batch, seq_len=250)
    made = dataclasses.replace(made, data=data)
    kinds = ["fp32", "bf16"] if precision == "auto" else [precision]

    def fits(micro):
        need = [memory_estimate(made.model, micro, 250, k)["total"] for k in kinds]
        return max(need) <= room

    together = batch * accumulation
    choices = [m for m in range(1, batch + 1) if together % m == 0 and fits(m)]
    if choices:
        micro, times = fit_micro_batch(made, room)
        assert micro == max(choices) and micro * times == together
    else:
        with pytest.raises(ConfigError, match=f"available_bytes = {room:,}"):
            fit_micro_batch(made, room)


@given(
    batch=st.integers(1, 12),
    accumulation=st.integers(1, 12),
    full=st.integers(0, 40),
    seq_len=st.integers(1, 8),
)
def test_on_a_gpu_a_micro_batch_may_fill_it(batch, accumulation, full, seq_len):
    plan = recipe(gradient_accumulation=accumulation)
    data = dataclasses.replace(plan.data, batch_size=batch, seq_len=seq_len)
    made, together = dataclasses.replace(plan, data=data), batch * accumulation
    with mock.patch.dict(FULL_TOKENS, cuda=full):
        micro, times = fit_micro_batch(made, 10**15, "cuda")
    most = max(batch, full // seq_len)
    assert micro == max(m for m in range(1, most + 1) if together % m == 0)
    assert micro * times == together, "the step stays the recipe's"
    assert fit_micro_batch(made, 10**15)[0] == batch, "a CPU keeps to the recipe"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_recipe_can_bound_the_micro_batch(device):
    made = recipe(gradient_accumulation=8)
    data = dataclasses.replace(made.data, batch_size=6)
    made = dataclasses.replace(made, data=data)
    for most, micro in ((1, 1), (5, 4), (6, 6), (7, 6), (8, 8), (100, 48)):
        bounded = made.with_training(micro_batch=most)
        assert fit_micro_batch(bounded, 10**15, device) == (micro, 48 // micro)
    with pytest.raises(ConfigError, match="micro_batch = -1"):
        made.with_training(micro_batch=-1)


def test_memory_that_just_suffices_suffices():
    made = recipe(mixed_precision="bf16")
    need = memory_estimate(made.model, 3, 5, "bf16")["total"]
    assert fit_micro_batch(made, need) == (3, 1)
    assert fit_micro_batch(made, need - 1) == (1, 3)  # 2 does not divide 3
