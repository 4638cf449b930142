"""States: whole after any kill, equal after any resume, refused when damaged."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import albor.checkpoint
from albor.checkpoint import (
    CheckpointError,
    latest_state,
    load_state,
    save_state,
    saved_states,
    state_bytes,
    verify_state,
)
from albor.config import OptimizerConfig
from albor.model import Albor
from albor.optimizer import build_optimizer, clip_by_global_norm, lr_at
from albor.shapes import PRESETS, ModelConfig, parameter_shapes
from albor.states import StateWriter, forget_states_after

SHAPE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=32,
)
NAMES = [*parameter_shapes(SHAPE)]
FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
)


def fresh(decay="matrices", seed=0):
    model = Albor(SHAPE, seed=seed)
    recipe = OptimizerConfig(lr=1e-2, beta1=0.9, beta2=0.95, decay=decay)
    return model, build_optimizer(model, recipe)


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        dice = torch.Generator().manual_seed(step)
        ids = torch.randint(97, (2, 13), generator=dice).to(
            next(model.parameters()).device
        )
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, peak=1e-2, warmup_steps=3, max_steps=50)
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        clip_by_global_norm(model.parameters(), 1.0)
        optimizer.step()


def everything(model, optimizer):
    """Weights and optimizer state by name, as clones."""
    values = {}
    for name, p in model.named_parameters():
        values[name] = p.detach().clone()
        for key, value in optimizer.state[p].items():
            values[f"{name}.{key}"] = value.clone()
    return values


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def content(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def run(tmp_path):
    """A run with states at 4 and 7, and its model and optimizer at 7."""
    model, optimizer = fresh()
    train(model, optimizer, 0, 4)
    save_state(tmp_path, 4, model, optimizer, {"note": "four"})
    train(model, optimizer, 4, 7)
    save_state(tmp_path, 7, model, optimizer, {"note": "seven"})
    return tmp_path, model, optimizer


# ----------------------------------------------------------------- the same run


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_two_halves_equal_the_whole_bit_for_bit(tmp_path, decay):
    whole = fresh(decay)
    train(*whole, 0, 10)
    first = fresh(decay)
    train(*first, 0, 5)
    path = save_state(
        tmp_path, 5, *first, {"loss": 1.25, "nested": {"a": [1, None]}}
    )
    assert path == tmp_path / "state" / "step-5"
    second = fresh(decay, seed=99)  # other weights, to be overwritten
    train(*second, 0, 1)  # and moments of its own
    found = load_state(path, *second)
    assert found == {"step": 5, "extra": {"loss": 1.25, "nested": {"a": [1, None]}}}
    assert_equal(everything(*first), everything(*second))
    train(*second, 5, 10)
    assert_equal(everything(*whole), everything(*second))


RESUME = """
import sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
from pathlib import Path
pair = fresh(seed=5)
done = load_state(latest_state(sys.argv[2]), *pair)["step"]
train(*pair, done, 12)
save_state(Path(sys.argv[2]) / "end", 12, *pair, {})
"""


def test_another_process_goes_on_the_same(run):
    folder, model, optimizer = run
    here = os.path.dirname(__file__)
    code = [sys.executable, "-c", RESUME, here, str(folder)]
    subprocess.run(code, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    train(model, optimizer, 7, 12)
    end = fresh()
    load_state(folder / "end" / "state" / "step-12", *end)
    assert_equal(everything(model, optimizer), everything(*end))


def test_moments_and_count_of_every_parameter_are_saved(run):
    folder, model, optimizer = run
    saved = load_file(folder / "state" / "step-7" / "optimizer.safetensors")
    parts = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(saved) == sorted(f"{n}.{part}" for n in NAMES for part in parts)
    for name, p in model.named_parameters():
        assert saved[f"{name}.step"] == 7
        for part in parts[:2]:
            assert torch.equal(saved[f"{name}.{part}"], optimizer.state[p][part])
            assert saved[f"{name}.{part}"].any(), name


def test_a_state_before_the_first_update(tmp_path):
    save_state(tmp_path, 0, *fresh(), {})
    start, resumed = fresh(), fresh(seed=3)
    assert load_state(tmp_path / "state" / "step-0", *resumed)["step"] == 0
    train(*start, 0, 3)
    train(*resumed, 0, 3)
    assert_equal(everything(*start), everything(*resumed))


def test_random_numbers_go_on_where_they_were(tmp_path):
    pair = fresh()
    torch.manual_seed(11)
    torch.rand(5)
    path = save_state(tmp_path, 1, *pair, {})
    expected = torch.rand(4)
    torch.manual_seed(12)
    load_state(path, *pair)
    assert torch.equal(torch.rand(4), expected)


def test_the_optimizer_keeps_the_recipes_numbers(run):
    folder, *_ = run
    model = Albor(SHAPE, seed=0)
    recipe = OptimizerConfig(lr=5e-4, beta1=0.7, beta2=0.9, weight_decay=0.5)
    optimizer = build_optimizer(model, recipe)
    load_state(folder / "state" / "step-7", model, optimizer)
    for group, decay in zip(optimizer.param_groups, (0.5, 0.0), strict=True):
        assert group["lr"] == 5e-4 and group["betas"] == (0.7, 0.9)
        assert group["weight_decay"] == decay and group["fused"]


def test_the_loaded_values_live_in_memory(run):
    folder, *_ = run
    pair = fresh(seed=3)
    load_state(folder / "state" / "step-7", *pair)
    before = everything(*pair)
    for file in (folder / "state" / "step-7").iterdir():
        with open(file, "rb+") as raw:  # in place: a mapped file would show through
            raw.write(bytes(file.stat().st_size))
    shutil.rmtree(folder / "state")
    assert_equal(before, everything(*pair))
    train(*pair, 7, 8)


def test_a_frozen_parameter_has_no_moments_and_a_forgotten_one_is_refused(tmp_path):
    model = Albor(SHAPE, seed=0)
    model.model.norm.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    path = save_state(tmp_path, 1, model, optimizer, {})
    assert not any(
        n.startswith("model.norm")
        for n in load_file(path / "optimizer.safetensors")
    )
    assert load_state(path, model, optimizer)["step"] == 1
    model.model.norm.weight.requires_grad_(True)
    for action in (
        lambda: save_state(tmp_path, 2, model, optimizer, {}),
        lambda: load_state(path, model, optimizer),
    ):
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not in"):
            action()


@pytest.mark.parametrize("kind", ["amsgrad", "sgd", "mixed"])
def test_whatever_an_optimizer_keeps_comes_back(tmp_path, kind):
    def pair(seed):
        model = Albor(SHAPE, seed=seed)
        parameters = [*model.parameters()]
        if kind == "amsgrad":
            return model, torch.optim.AdamW(parameters, amsgrad=True)
        if kind == "sgd":
            return model, torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        return model, Mixed(parameters)

    whole, first, second = pair(0), pair(0), pair(9)
    train(*whole, 0, 5)
    train(*first, 0, 2)
    load_state(save_state(tmp_path, 2, *first, {}), *second)
    assert_equal(everything(*first), everything(*second))
    train(*second, 2, 5)
    assert_equal(everything(*whole), everything(*second))


class Mixed(torch.optim.Optimizer):
    """Momentum for matrices, AdamW for the rest, and one memory, as Muon has."""

    def __init__(self, parameters):
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        self.adam = torch.optim.AdamW(others, lr=1e-2)
        groups = [{"params": matrices, "rule": "momentum", "lr": 1e-2}]
        groups += [{**group, "rule": "adamw"} for group in self.adam.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                kept = self.state[p].setdefault(
                    "momentum_buffer", p.new_zeros(p.shape)
                )
                p -= 0.01 * kept.mul_(0.9).add_(p.grad)
        self.adam.param_groups, self.adam.state = self.param_groups[1:], self.state
        self.adam.step()


@pytest.mark.parametrize("first, second", [("AdamW", "Mixed"), ("Mixed", "AdamW")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, first, second):
    kinds = {"AdamW": torch.optim.AdamW, "Mixed": Mixed}
    model = Albor(SHAPE, seed=0)
    optimizer = kinds[first]([*model.parameters()])
    train(model, optimizer, 0, 1)
    path = save_state(tmp_path, 1, model, optimizer, {})
    other = kinds[second]([*model.parameters()])
    before = everything(model, other)
    with pytest.raises(CheckpointError, match=f"optimizer {first}, here {second}"):
        load_state(path, model, other)
    # The same without the name, as states were before it was recorded.
    reseal(path, lambda record: record.pop("optimizer"))
    with pytest.raises(
        CheckpointError, match=r"optimizer\.safetensors does not fit.*missing"
    ):
        load_state(path, model, other)
    assert_equal(before, everything(model, other))


def test_a_memory_that_could_not_be_read_again_is_not_written(run):
    folder, model, optimizer = run
    kept = optimizer.state[model.model.norm.weight]
    good = dict(kept)
    for harm in (
        {"exp_avg": torch.zeros(47)},
        {"exp_avg": torch.zeros(48, dtype=torch.bfloat16)},
        {"step": 7},
        {"more": torch.zeros(48)},
    ):
        kept |= harm
        with pytest.raises(
            CheckpointError, match=r"model\.norm\.weight has .*AdamW"
        ):
            save_state(folder, 8, model, optimizer, {})
        kept.clear()
        kept |= good
    assert [*saved_states(folder)] == [7, 4]


def test_no_pickle_anywhere(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("pickle was used")

    names = ["torch.save", "torch.load", "pickle.dump", "pickle.dumps"]
    for name in [*names, "pickle.load", "pickle.loads"]:
        monkeypatch.setattr(name, forbidden)
    pair = fresh()
    train(*pair, 0, 1)
    load_state(save_state(tmp_path, 1, *pair, {}), *pair)
    assert sorted(content(tmp_path / "state" / "step-1")) == sorted(FILES)


@given(st.integers(1, 400), st.integers(1, 90), st.integers(1, 9))
@settings(max_examples=12, deadline=None)
def test_the_estimate_is_an_upper_bound_and_close(
    tmp_path_factory, vocab, ffn, layers
):
    shape = dataclasses.replace(
        SHAPE, vocab_size=vocab, intermediate_size=ffn, num_hidden_layers=layers
    )
    model = Albor(shape, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    path = save_state(tmp_path_factory.mktemp("size"), 1, model, optimizer, {})
    real = sum(len(data) for data in content(path).values())
    slack = 65536 + 1024 * len(parameter_shapes(shape))
    assert real <= state_bytes(parameter_shapes(shape)) <= real + slack


def test_the_estimate_for_the_card():
    card = state_bytes(parameter_shapes(PRESETS["albor-base-350m"]))
    assert 12 * 398_509_056 < card < 12.01 * 398_509_056


# -------------------------------------------------------------- never rewritten


def test_a_resume_does_not_rewrite_the_state_it_came_from(run):
    folder, *_ = run
    path = folder / "state" / "step-7"
    before, inodes = content(path), [file.stat().st_ino for file in path.iterdir()]
    pair = fresh(seed=3)
    load_state(path, *pair)
    torch.rand(3)  # the generators have gone on, the training has not
    assert save_state(folder, 7, *pair, {"other": 1}) == path
    assert content(path) == before
    assert [file.stat().st_ino for file in path.iterdir()] == inodes


@pytest.mark.parametrize("harm", ["weights", "moments"])
def test_a_half_restored_model_does_not_overwrite_its_source(run, harm):
    folder, model, optimizer = run
    before = content(folder / "state" / "step-7")
    if harm == "weights":
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-7
    else:
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    with pytest.raises(
        CheckpointError, match="step-7 has other weights or moments"
    ):
        save_state(folder, 7, model, optimizer, {})
    assert content(folder / "state" / "step-7") == before
    assert sorted(os.listdir(folder / "state")) == ["step-4", "step-7"]


def test_going_on_from_an_older_state_drops_the_later_ones(run):
    folder, *_ = run
    pair = fresh()
    load_state(folder / "state" / "step-4", *pair)
    train(*pair, 4, 5)
    with pytest.raises(
        CheckpointError, match=r"step-7 is later.*forget_states_after"
    ):
        save_state(folder, 5, *pair, {})
    assert [path.name for path in forget_states_after(folder, 4)] == ["step-7"]
    save_state(folder, 5, *pair, {})
    assert [*saved_states(folder)] == [5, 4]
    assert forget_states_after(folder, 5) == []


def test_a_damaged_state_of_the_same_or_a_later_step_is_no_obstacle(run):
    folder, model, optimizer = run
    (folder / "state" / "step-7" / "model.safetensors").write_bytes(b"")
    pair = fresh()
    load_state(folder / "state" / "step-4", *pair)
    train(*pair, 4, 6)
    save_state(folder, 6, *pair, {})
    train(*pair, 6, 7)
    path = save_state(folder, 7, *pair, {})
    assert verify_state(path)["step"] == 7 and latest_state(folder) == path
    assert_equal(everything(*pair), everything(model, optimizer))


def test_an_impossible_step_is_refused(run):
    folder, model, optimizer = run
    with pytest.raises(CheckpointError, match="step is -1"):
        save_state(folder, -1, model, optimizer, {})


@pytest.mark.parametrize(
    "value", [float("nan"), torch.ones(1), {1: 2}, {"a": {3, 4}}]
)
def test_extra_must_be_json(run, value):
    folder, model, optimizer = run
    with pytest.raises(CheckpointError, match=r"record of step 8.*thing"):
        save_state(folder, 8, model, optimizer, {"thing": value})
    assert [*saved_states(folder)] == [7, 4]


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_state_that_is_not_finite_is_not_saved(run, where):
    folder, model, optimizer = run
    p = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        (p if where == "weight" else optimizer.state[p]["exp_avg_sq"])[2, 3] = (
            torch.inf
        )
    with pytest.raises(
        CheckpointError, match=r"step 8: 1 of 3840 .*up_proj\.weight"
    ):
        save_state(folder, 8, model, optimizer, {})
    assert [*saved_states(folder)] == [7, 4]


# ------------------------------------------------------------------------ damage


def damage(path, kind):
    if kind == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) * 2 // 3] ^= 16
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_named_and_passed_over(run, name, kind):
    folder, *_ = run
    path = folder / "state" / "step-7"
    damage(path / name, kind)
    pair = fresh(seed=3)
    train(*pair, 0, 1)
    before = everything(*pair)
    with pytest.raises(CheckpointError, match="step-7 is no sound state") as caught:
        load_state(path, *pair)
    assert name in str(caught.value)
    assert_equal(before, everything(*pair))
    with pytest.warns(UserWarning, match=r"step-7.*trying an older one"):
        assert latest_state(folder) == folder / "state" / "step-4"


def reseal(path, change):
    """Change the record and sign it anew, as no accident would."""
    from albor.artifacts import digest

    record = json.loads((path / "state.json").read_text())
    del record["digest"]
    change(record)
    record["digest"] = digest(record)
    (path / "state.json").write_text(json.dumps(record))


def test_the_step_comes_from_inside_and_the_name_must_agree(run):
    folder, *_ = run
    os.rename(folder / "state" / "step-7", folder / "state" / "step-14500")
    with pytest.warns(
        UserWarning, match="step-14500 holds step 7, against its name"
    ):
        assert latest_state(folder) == folder / "state" / "step-4"
    assert load_state(folder / "state" / "step-14500", *fresh())["step"] == 7


def test_a_state_of_another_format_is_refused(run):
    folder, *_ = run
    reseal(folder / "state" / "step-7", lambda record: record.update(format=2))
    with pytest.raises(CheckpointError, match="format 2; only 1 is read"):
        verify_state(folder / "state" / "step-7")


def test_no_state_and_no_sound_state(tmp_path):
    assert latest_state(tmp_path) is None and latest_state(tmp_path / "no") is None
    save_state(tmp_path, 1, *fresh(), {})
    damage(tmp_path / "state" / "step-1" / "model.safetensors", "flip")
    with pytest.warns(UserWarning, match="step-1"):
        assert latest_state(tmp_path) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"num_attention_heads": 2, "head_dim": 30},
            "num_attention_heads 6, here 2",
        ),
        ({"rope_theta": 5000.0}, "rope_theta 10000.0, here 5000.0"),
        ({"vocab_size": 98}, "vocab_size 97, here 98"),
    ],
)
def test_a_state_of_another_model_is_refused(run, changes, words):
    """The first two have tensors of the very same shapes."""
    folder, *_ = run
    model = Albor(dataclasses.replace(SHAPE, **changes), seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=f"does not fit: {words}"):
        load_state(folder / "state" / "step-7", model, optimizer)
    assert_equal(before, everything(model, optimizer))


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_tensors_that_do_not_fit_are_named_and_nothing_changes(run, name):
    from safetensors.torch import save_file

    from albor.artifacts import sha256_file

    folder, *_ = run
    path = folder / "state" / "step-7"
    file = path / f"{name}.safetensors"
    tensors = load_file(file)
    ending = "" if name == "model" else ".exp_avg"
    wrong = f"model.layers.2.mlp.down_proj.weight{ending}"
    tensors[wrong] = tensors[wrong].T.contiguous()
    del tensors[f"model.norm.weight{ending}"]
    save_file(tensors, file)
    reseal(
        path, lambda record: record["files"].update({file.name: sha256_file(file)})
    )
    pair = fresh(seed=3)
    before = everything(*pair)
    with pytest.raises(
        CheckpointError, match=r"is missing.*\(48, 80\).*\(80, 48\)"
    ):
        load_state(path, *pair)
    assert_equal(before, everything(*pair))


# ------------------------------------------------------------------------- disks


def broken_save(after):
    """A `save_file` that writes part of the given file and finds the disk full."""
    calls = []

    def save(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > after:
            path.write_bytes(b"only a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    real = albor.checkpoint.save_file
    return save


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_disk_that_fills_up_costs_nothing_but_the_new_state(
    run, monkeypatch, after
):
    folder, model, optimizer = run
    before = {path: content(path) for path in saved_states(folder).values()}
    train(model, optimizer, 7, 8)
    monkeypatch.setattr(albor.checkpoint, "save_file", broken_save(after))
    with pytest.raises(
        CheckpointError, match=r"No space left.* bytes are needed, .* are free"
    ):
        save_state(folder, 8, model, optimizer, {})
    assert {path: content(path) for path in saved_states(folder).values()} == before
    assert sorted(os.listdir(folder / "state")) == ["step-4", "step-7"]
    monkeypatch.undo()
    save_state(folder, 8, model, optimizer, {})
    assert [*saved_states(folder)] == [8, 7, 4]


def test_too_little_room_is_seen_before_anything_is_written(run, monkeypatch):
    folder, model, optimizer = run

    class Usage:
        free = 4321

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match=r"not enough space.*4,321 are free"):
        save_state(folder, 8, model, optimizer, {})
    assert sorted(os.listdir(folder / "state")) == ["step-4", "step-7"]


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
pair = fresh()
train(*pair, 0, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    save_state(sys.argv[2], 9, *pair, {})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_write_that_the_system_cuts_off(run):
    folder, *_ = run
    code = [sys.executable, "-c", FULL, os.path.dirname(__file__), str(folder)]
    done = subprocess.run(code, check=True, capture_output=True, text=True)
    assert "File too large" in done.stdout and "bytes are needed" in done.stdout
    assert sorted(os.listdir(folder / "state")) == ["step-4", "step-7"]
    assert latest_state(folder).name == "step-7"


def test_a_read_only_folder_is_named(run, monkeypatch):
    folder, model, optimizer = run

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"state: .*Read-only.*writable"):
        save_state(folder, 8, model, optimizer, {})


def test_files_in_the_way_are_named(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot write .*state"):
        save_state(tmp_path, 1, *fresh(), {})
    assert latest_state(tmp_path) is None


def test_links_are_followed_and_never_destroyed(tmp_path):
    """The folder `state` elsewhere, and one state moved to another disk."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (elsewhere / "states").mkdir(parents=True)
    (run / "state").symlink_to(elsewhere / "states")
    pair = fresh()
    save_state(run, 1, *pair, {})
    shutil.move(elsewhere / "states" / "step-1", elsewhere / "moved")
    (run / "state" / "step-1").symlink_to(elsewhere / "moved")
    assert latest_state(run) == run / "state" / "step-1"
    for step in (2, 3):
        train(*pair, step - 1, step)
        StateWriter(run, asynchronous=False).save(step, *pair, {})
    assert [*saved_states(run)] == [3, 2]  # the link is gone, what it meant is not
    assert verify_state(elsewhere / "moved")["step"] == 1


def test_leftovers_are_ignored_and_swept_away(run):
    folder, model, optimizer = run
    for name in (".step-9.new", ".step-2.old"):
        (folder / "state" / name).mkdir()
        (folder / "state" / name / "model.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_state(folder).name == "step-7"
    train(model, optimizer, 7, 8)
    save_state(folder, 8, model, optimizer, {})
    assert sorted(os.listdir(folder / "state")) == ["step-4", "step-7", "step-8"]


# ------------------------------------------------------------------------- kills

# Forks before each attempt and kills the child at its n-th event: an operation on a
# file that Python reports, a flush, or half a file written.
KILLS = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
from pathlib import Path

torch.set_num_threads(1)
root, instant, status = Path(sys.argv[2]), 0, 1
pair = fresh()
for step in (1, 2):
    train(*pair, step - 1, step)
    save_state(root / "start", step, *pair, {})
states = {2: everything(*pair)}
train(*pair, 2, 3)
states[3] = everything(*pair)

def count_down(folder, left):
    def event(path):
        if str(folder) in str(path):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(name, arguments):
        if name != "object.__getattr__" and arguments:
            event(arguments[0])

    real_fsync, real_save = os.fsync, albor.checkpoint.save_file

    def save(tensors, path, metadata):
        real_save(tensors, path, metadata)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        event(path)
        path.write_bytes(whole)

    os.fsync = lambda handle: (event(folder), real_fsync(handle))
    albor.checkpoint.save_file = save
    sys.addaudithook(audit)

while status != 0:
    folder = root / f"run-{instant}"
    shutil.copytree(root / "start", folder)
    child = os.fork()
    if child == 0:
        count_down(folder, [instant])
        StateWriter(folder, asynchronous=False).save(3, *pair, {})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = latest_state(folder)
    other = fresh(seed=8)
    step = load_state(found, *other)["step"]
    assert_equal(states[step], everything(*other))
    train(*other, step, 3)
    StateWriter(folder, asynchronous=False).save(3, *other, {})
    assert_equal(states[3], everything(*other))
    assert sorted(os.listdir(folder / "state")) == ["step-2", "step-3"]
    shutil.rmtree(folder)
    print(step, flush=True)
    instant += 1
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_operation_leaves_a_sound_state(tmp_path):
    code = [sys.executable, "-c", KILLS, os.path.dirname(__file__), str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = done.stdout.split()
    assert steps == sorted(steps) and set(steps) == {"2", "3"}
    assert steps.count("2") > 20 and steps.count("3") > 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_travel_between_devices(tmp_path):
    model = Albor(SHAPE, seed=0).cuda()
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    train(model, optimizer, 0, 3)
    torch.cuda.manual_seed(5)
    path = save_state(tmp_path, 3, model, optimizer, {})
    expected = torch.rand(3, device="cuda")
    pair = fresh(seed=3)
    torch.cuda.manual_seed(6)
    load_state(path, *pair)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    for name, value in everything(model, optimizer).items():
        assert torch.equal(value.cpu(), everything(*pair)[name])
    again = Albor(SHAPE, seed=9).cuda()
    its_optimizer = build_optimizer(again, OptimizerConfig(lr=1e-2))
    load_state(path, again, its_optimizer)
    train(again, its_optimizer, 3, 4)
    train(model, optimizer, 3, 4)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
