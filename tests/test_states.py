"""Many states: which stay, room on the disk, a thread that writes, random kills."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import (
    SHAPE,
    assert_equal,
    content,
    damage,
    everything,
    fresh,
    train,
)

import albor.checkpoint
import albor.states
from albor.checkpoint import (
    CheckpointError,
    latest_state,
    load_state,
    save_state,
    saved_states,
    state_bytes,
    verify_state,
)
from albor.shapes import parameter_shapes
from albor.states import (
    StateWriter,
    best_state,
    disk_needed,
    refuse_small_disk,
    remove_surplus,
    steps_to_keep,
    val_losses,
)

both = pytest.mark.parametrize("asynchronous", [True, False])

# -------------------------------------------------------------------- which stay


@given(
    st.dictionaries(
        st.integers(0, 30),
        st.none() | st.floats(0, 20, allow_nan=False),
        max_size=9,
    ),
    st.integers(1, 4),
)
def test_the_last_and_the_best_stay(losses, keep):
    stay = steps_to_keep(losses, keep)
    assert stay <= losses.keys()
    gone = losses.keys() - stay
    judged = [loss for loss in losses.values() if loss is not None]
    for step in gone:
        assert sum(later > step for later in losses) >= keep
        assert losses[step] is None or losses[step] >= min(judged)
    assert len(stay) <= keep + 1
    if judged:
        assert min(judged) in [losses[step] for step in stay]


@both
def test_a_run_keeps_the_last_and_the_best(tmp_path, asynchronous):
    pair = fresh()
    losses = {1: 4.0, 2: 2.5, 3: 3.0, 4: None, 5: 2.75, 6: 9.0}
    with StateWriter(tmp_path, keep=2, asynchronous=asynchronous) as states:
        for step, loss in losses.items():
            train(*pair, step - 1, step)
            states.save(step, *pair, {}, val_loss=loss)
    assert [*saved_states(tmp_path)] == [6, 5, 2]
    assert val_losses(tmp_path) == {6: 9.0, 5: 2.75, 2: 2.5}
    assert best_state(tmp_path).name == "step-2"
    with StateWriter(tmp_path, keep=1, asynchronous=asynchronous) as states:
        train(*pair, 6, 7)
        states.save(7, *pair, {}, val_loss=2.0)  # a new best: the old one may go
    assert [*saved_states(tmp_path)] == [7]


def test_of_equally_good_states_the_first_is_the_best(tmp_path):
    pair = fresh()
    for step in (3, 1, 2):
        save_state(tmp_path / str(step), step, *pair, {}, val_loss=1.5)
        (tmp_path / "all" / "state").mkdir(parents=True, exist_ok=True)
        shutil.move(
            saved_states(tmp_path / str(step))[step], tmp_path / "all/state"
        )
    assert best_state(tmp_path / "all").name == "step-1"


def test_a_damaged_best_is_passed_over_and_damage_pushes_none_out(
    tmp_path,
):
    pair = fresh()
    for step, loss in ((1, 1.0), (2, 2.0), (3, None), (4, None)):
        save_state(tmp_path, step, *pair, {}, val_loss=loss)
    damage(tmp_path / "state/step-1/optimizer.safetensors", "flip")
    with pytest.warns(UserWarning, match=r"step-1.*trying the next best"):
        assert best_state(tmp_path).name == "step-2"
    damage(tmp_path / "state/step-4/state.json", "cut")
    assert remove_surplus(tmp_path, keep=2) == []  # 2 and 3 are the last sound ones
    assert [*saved_states(tmp_path)] == [4, 3, 2, 1]
    os.rename(tmp_path / "state/step-3", tmp_path / "state/step-33")
    assert 33 not in val_losses(tmp_path)


@both
def test_a_resumed_run_keeps_the_state_it_came_from(tmp_path, asynchronous):
    pair = fresh()
    train(*pair, 0, 4)
    path = save_state(tmp_path, 4, *pair, {})
    before = content(path)
    again = fresh(seed=7)
    load_state(path, *again)
    with StateWriter(tmp_path, keep=2, asynchronous=asynchronous) as states:
        states.save(4, *again, {"the same": True})  # right after the load
        states.wait()
        assert content(path) == before
        train(*again, 4, 5)
        states.save(5, *again, {})
        states.wait()
        assert content(path) == before  # one later state of its own is not enough
        train(*again, 5, 6)
        states.save(6, *again, {})
    assert [*saved_states(tmp_path)] == [6, 5]


def test_going_on_in_another_folder_leaves_the_first_alone(tmp_path):
    pair = fresh()
    for step in (1, 2, 3):
        train(*pair, step - 1, step)
        save_state(tmp_path / "a", step, *pair, {})
    before = {path: content(path) for path in saved_states(tmp_path / "a").values()}
    load_state(tmp_path / "a/state/step-2", *pair)
    with StateWriter(tmp_path / "b", keep=1) as states:
        for step in (3, 4, 5):
            train(*pair, step - 1, step)
            states.save(step, *pair, {})
    after = {path: content(path) for path in saved_states(tmp_path / "a").values()}
    assert after == before
    assert [*saved_states(tmp_path / "b")] == [5]


# ---------------------------------------------------------------------- the disk


def test_the_disk_holds_what_is_asked_for_and_no_more(tmp_path, monkeypatch):
    """The largest size of the folder at any time, watched at every operation."""
    pair = fresh()
    peak, real = 0, albor.checkpoint.artifacts.sync_folder

    def watch(path):
        nonlocal peak
        files = [*(tmp_path / "state").glob("*/*")]
        peak = max(peak, sum(file.stat().st_size for file in files))
        real(path)

    monkeypatch.setattr(albor.checkpoint.artifacts, "sync_folder", watch)
    with StateWriter(tmp_path, keep=3, asynchronous=False) as states:
        for step in range(8):
            states.save(step, *pair, {}, val_loss=1.0 + step)
    need = disk_needed(parameter_shapes(SHAPE), keep=3)
    assert need == 5 * state_bytes(parameter_shapes(SHAPE))
    assert 0.7 * need < peak <= need
    assert disk_needed({}, keep=2, best=False) == 3 * state_bytes({})


def test_a_small_disk_is_refused_before_the_run(tmp_path, monkeypatch):
    asked = []

    class Usage:
        free = 10_000

    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: asked.append(path) or Usage
    )
    refuse_small_disk(tmp_path / "a" / "b", 10_000)
    assert asked == [tmp_path] and not (tmp_path / "a").exists()
    words = r"a/b: .*need 10,001 bytes.*10,000 are free.*output_dir"
    with pytest.raises(CheckpointError, match=words):
        refuse_small_disk(tmp_path / "a" / "b", 10_001)
    older = tmp_path / "a" / "b" / "state" / "step-3"
    older.mkdir(parents=True)
    (older / "model.safetensors").write_bytes(bytes(500))
    refuse_small_disk(tmp_path / "a" / "b", 10_500)
    with pytest.raises(CheckpointError, match="500 are held"):
        refuse_small_disk(tmp_path / "a" / "b", 10_501)


# -------------------------------------------------------------------- the thread


def test_it_returns_before_the_write_and_saves_the_moment_of_the_call(
    tmp_path, monkeypatch
):
    gate, writers = threading.Event(), []
    real = albor.checkpoint.save_file

    def slow(*arguments):
        writers.append(threading.current_thread())
        assert gate.wait(60)
        real(*arguments)

    monkeypatch.setattr(albor.checkpoint, "save_file", slow)
    pair = fresh()
    with StateWriter(tmp_path) as states:
        train(*pair, 0, 3)
        torch.manual_seed(5)
        at_save = everything(*pair)
        states.save(3, *pair, {"a": [1]}, val_loss=2.0)
        expected = torch.rand(3)
        train(*pair, 3, 6)  # while nothing is written yet
        assert latest_state(tmp_path) is None
        gate.set()
    assert threading.main_thread() not in writers
    other = fresh(seed=4)
    found = load_state(latest_state(tmp_path), *other)
    assert found == {"step": 3, "extra": {"a": [1]}}
    assert_equal(at_save, everything(*other))
    assert torch.equal(torch.rand(3), expected)
    train(*other, 3, 6)
    assert_equal(everything(*pair), everything(*other))


def test_the_files_are_those_of_a_save_that_waits(tmp_path):
    pair = fresh()
    train(*pair, 0, 2)
    for name, asynchronous in (("a", True), ("b", False)):
        with StateWriter(tmp_path / name, asynchronous=asynchronous) as states:
            states.save(2, *pair, {"x": 1}, val_loss=0.5)
    save_state(tmp_path / "c", 2, *pair, {"x": 1}, val_loss=0.5)
    a, b, c = (content(tmp_path / name / "state/step-2") for name in "abc")
    assert a == b == c


def test_one_write_at_a_time_and_one_set_of_buffers(tmp_path, monkeypatch):
    under_way, most = 0, 0
    real = albor.states.write_state

    def watched(snapshot):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.05)
        path = real(snapshot)
        under_way -= 1
        return path

    monkeypatch.setattr(albor.states, "write_state", watched)
    pair = fresh()
    with StateWriter(tmp_path, keep=9) as states:
        for step in range(1, 5):
            train(*pair, step - 1, step)
            states.save(step, *pair, {})
            if step == 1:
                first = states.buffers["model"]["model.norm.weight"].data_ptr()
        last = states.buffers["model"]["model.norm.weight"].data_ptr()
    assert most == 1 and first == last
    whole = fresh()
    for step in range(1, 5):
        train(*whole, step - 1, step)
        other = fresh(seed=3)
        load_state(tmp_path / f"state/step-{step}", *other)
        assert_equal(everything(*whole), everything(*other))


def test_without_a_thread_there_is_no_copy(tmp_path):
    pair = fresh()
    before = threading.active_count()
    with StateWriter(tmp_path, asynchronous=False) as states:
        states.save(1, *pair, {})
        assert latest_state(tmp_path).name == "step-1"
        assert not states.buffers and threading.active_count() == before


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["save", "wait", "close", "with"])
def test_an_error_of_the_thread_is_raised_once_and_never_lost(
    tmp_path, monkeypatch, where
):
    pair = fresh()
    states = StateWriter(tmp_path)
    states.save(1, *pair, {})
    states.wait()
    before = content(tmp_path / "state/step-1")
    monkeypatch.setattr(albor.checkpoint, "save_file", full)
    states.save(2, *pair, {})
    with pytest.raises(CheckpointError, match=r"No space left.*bytes are needed"):
        if where == "save":
            states.save(3, *pair, {})
        elif where == "with":
            with states:
                pass
        else:
            getattr(states, where)()
    monkeypatch.undo()
    if where in ("save", "wait"):
        states.save(4, *pair, {})
    states.close()
    kept = [4, 1] if where in ("save", "wait") else [1]
    assert [*saved_states(tmp_path)] == kept
    assert content(tmp_path / "state/step-1") == before
    assert not [*(tmp_path / "state").glob(".*")]


def test_an_error_of_the_body_is_not_hidden_by_one_of_the_thread(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(albor.checkpoint, "save_file", full)
    with (
        pytest.raises(ZeroDivisionError) as caught,
        StateWriter(tmp_path) as states,
    ):
        states.save(1, *fresh(), {})
        _ = 1 / 0
    assert "No space left" in caught.value.__notes__[0]


@both
@pytest.mark.parametrize("harm", ["weight", "moment", "extra", "loss", "later"])
def test_what_must_not_be_kept_is_refused_at_once(tmp_path, asynchronous, harm):
    pair = model, optimizer = fresh()
    train(*pair, 0, 2)
    extra, loss, step = {}, 1.0, 3
    with StateWriter(tmp_path, asynchronous=asynchronous) as states:
        states.save(2, *pair, {})
        states.wait()
        p = model.model.norm.weight
        if harm in ("weight", "moment"):
            values = (
                p.detach() if harm == "weight" else optimizer.state[p]["exp_avg"]
            )
            values[4] = float("nan")
        extra = {"x": {1, 2}} if harm == "extra" else {}
        loss = float("nan") if harm == "loss" else 1.0
        step = 1 if harm == "later" else 3
        with pytest.raises(CheckpointError, match=r"step 3|later than step 1"):
            states.save(step, *pair, extra, val_loss=loss)
        assert states.pending is None
    assert sorted(os.listdir(tmp_path / "state")) == ["step-2"]


def test_impossible_numbers_and_a_closed_writer(tmp_path):
    with pytest.raises(CheckpointError, match="keep is 0"):
        StateWriter(tmp_path, keep=0)
    with StateWriter(tmp_path) as states:
        pass
    with pytest.raises(RuntimeError, match="shutdown"):
        states.save(1, *fresh(), {})


def test_no_memory_for_the_copy_names_the_way_out(tmp_path, monkeypatch):
    def empty(*_, **__):
        raise RuntimeError("can't allocate memory")

    pair = fresh()
    with StateWriter(tmp_path) as states:
        monkeypatch.setattr(torch, "empty", empty)
        with pytest.raises(CheckpointError, match="asynchronous=False"):
            states.save(1, *pair, {})
    assert not (tmp_path / "state").exists()


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_states import *
torch.set_num_threads(1)
pair = fresh()
train(*pair, 0, 2)
states = StateWriter(sys.argv[2])
states.save(2, *pair, {})
states.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
states.save(3, *pair, {})
try:
    states.close()
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_write_in_the_thread_that_the_system_cuts_off(tmp_path):
    code = [sys.executable, "-c", LIMITED, os.path.dirname(__file__), str(tmp_path)]
    done = subprocess.run(code, check=True, capture_output=True, text=True)
    assert "File too large" in done.stdout and "bytes are needed" in done.stdout
    assert sorted(os.listdir(tmp_path / "state")) == ["step-2"]
    assert verify_state(tmp_path / "state/step-2")["step"] == 2


@both
def test_a_folder_that_cannot_be_written(tmp_path, asynchronous):
    """A real one where the user can be refused; root needs a file in the way."""
    if os.name == "posix" and os.geteuid() != 0:
        (tmp_path / "run").mkdir(mode=0o500)
    else:
        (tmp_path / "run").write_text("a file")
    states = StateWriter(tmp_path / "run", asynchronous=asynchronous)
    with pytest.raises(CheckpointError, match=r"cannot write .*run.*writable"):
        states.save(1, *fresh(), {})
        states.close()


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_really_full(tmp_path):
    """Room for two states and a half: the third fails, and both others stay."""
    size = 5 * state_bytes(parameter_shapes(SHAPE)) // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        pair = fresh()
        states = StateWriter(tmp_path, keep=2)
        for step in (1, 2, 3):
            states.save(step, *pair, {})
        with pytest.raises(CheckpointError, match=r"space.*bytes are needed"):
            states.close()
        assert sorted(os.listdir(tmp_path / "state")) == ["step-1", "step-2"]
        assert latest_state(tmp_path).name == "step-2"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_next_updates_do_not_reach_the_copy(tmp_path):
    model, optimizer = fresh()
    model = model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    train(model, optimizer, 0, 3)
    at_save = {k: v.cpu() for k, v in everything(model, optimizer).items()}
    with StateWriter(tmp_path) as states:
        states.save(3, model, optimizer, {})
        for _ in range(20):
            train(model, optimizer, 3, 4)
        assert states.buffers["model"]["model.norm.weight"].is_pinned()
    other = fresh(seed=5)
    load_state(latest_state(tmp_path), *other)
    assert_equal(at_save, everything(*other))


# ------------------------------------------------------------------------- kills

KILLED = """
import random, signal, sys, warnings
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from albor.artifacts import sha256_file
from test_states import *

torch.set_num_threads(1)  # a process that forks must not have threads
root, kills, chance = Path(sys.argv[2]), int(sys.argv[3]), random.Random(20)

def life(folder, end, tell=None):
    pair = fresh(seed=0)
    found = latest_state(folder)
    done = load_state(found, *pair)["step"] if found else 0
    with StateWriter(folder, keep=2, asynchronous=sys.argv[4] == "True") as states:
        while done < end:
            train(*pair, done, done + 1)
            done += 1
            if tell:
                os.write(tell, b".")
                states.save(done, *pair, {}, val_loss=1 + (done % 7) / 7)
    return pair

warnings.simplefilter("error")
os.fsync = lambda handle: None  # what a kill cannot harm need not be waited for
life(root / "warm", 1)  # what is imported late is imported here, before any fork
found, number, halves = None, 0, 0
# So many deaths; and then as many as it takes for one of them to interrupt a write.
while number < kills or not halves and number < 10 * kills:
    number += 1
    ears, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        life(root / "killed", 10**9, mouth)
    os.read(ears, 1)  # it has taken an update; it may die from now on
    time.sleep(chance.uniform(0, 0.12))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(ears), os.close(mouth)
    found = latest_state(root / "killed")
    half = len([*(root / "killed" / "state").glob(".*")])
    halves += half
    print(int(found.name[5:]) if found else 0, half, flush=True)

end = (int(found.name[5:]) if found else 0) + 3
for name in ("killed", "whole"):
    save_state(root / "end" / name, end, *life(root / name, end), {})
for file in ("model.safetensors", "optimizer.safetensors"):
    path = f"state/step-{end}/{file}"
    ends = [root / "end" / name / path for name in ("killed", "whole")]
    assert sha256_file(ends[0]) == sha256_file(ends[1]), file
best = best_state(root / "killed")
print(int(best.name[5:]) % 7)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("asynchronous, kills", [(True, 30), (False, 12)])
def test_killed_dozens_of_times_and_still_the_same_run(
    tmp_path, asynchronous, kills
):
    """Two runs, one seed, equal SHA-256: FALSIFY-ALBOR-003, with deaths in one."""
    here = os.path.dirname(__file__)
    ours = [here, str(tmp_path), str(kills), str(asynchronous)]
    code = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, *ours]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, best = [line.split() for line in done.stdout.splitlines()]
    steps = [int(step) for step, _ in lines]
    assert len(steps) >= kills and steps == sorted(steps) and steps[-1] > 3
    assert sum(int(half) for _, half in lines) > 0  # one died while it wrote
    if steps[-1] > 8:
        assert best == ["0"]  # the best was never removed
