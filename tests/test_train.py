"""The loop: its log, its ends, and resuming to the same bits after any kill."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from albor.artifacts import append_jsonl, read_jsonl
from albor.batches import Batches
from albor.checkpoint import latest_state, load_state, save_state
from albor.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainingConfig,
)
from albor.model import Albor
from albor.optimizer import build_optimizer
from albor.shards import DataError
from albor.step import make_scaler
from albor.train import (
    METRICS,
    NonFiniteError,
    evaluate_loss,
    next_log,
    progress_line,
    resume_metrics,
    scheduled_rate,
    signals_held_back,
    train,
)

CONFIG = ModelConfig(  # all dimensions different
    vocab_size=53,
    hidden_size=16,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=11,
)
T, ROWS, STEPS = 9, 6, 12


def recipe(**training):
    plan = {
        "epochs": 99,
        "max_steps": STEPS,
        "warmup_steps": 3,
        "gradient_accumulation": 3,
        "mixed_precision": "fp32",
        "save_interval": 4,
        "eval_interval": 5,
        **training,
    }
    return Recipe(
        name="test",
        model=CONFIG,
        data=DataConfig(batch_size=ROWS // 3, seq_len=T),
        optimizer=OptimizerConfig(lr=2e-2, weight_decay=0.1),
        training=TrainingConfig(**plan),
    )


def stream(count=2000, seed=0):
    return np.random.default_rng(seed).integers(0, 53, count).astype(np.uint16)


class Run:
    """A model, its optimizer and all that `train` is called with."""

    def __init__(self, folder, seed=0, precision="fp32", **training):
        self.recipe = recipe(**training)
        self.model = Albor(CONFIG, seed=seed)
        self.optimizer = build_optimizer(self.model, self.recipe.optimizer)
        self.scaler = make_scaler(precision, torch.device("cpu"))
        self.batches = Batches(stream(), T, ROWS, seed=7)
        self.folder, self.saved, self.told = folder, [], []
        self.options = {
            "output_dir": folder,
            "micro_batch": ROWS // 3,
            "precision": precision,
            "scaler": self.scaler,
            "evaluate": lambda: evaluate_loss(self.model, stream(99, 1), T)[0],
            "save": self.save,
            "on_log": lambda record, left: self.told.append((record["step"], left)),
            "log_seconds": 0.0,
        }

    def save(self, done):
        scaler = self.scaler.state_dict() if self.scaler else None
        self.saved.append(done)
        save_state(
            self.folder, done, self.model, self.optimizer, {"scaler": scaler}
        )

    def resume(self):
        state = load_state(latest_state(self.folder), self.model, self.optimizer)
        if self.scaler:
            self.scaler.load_state_dict(state["extra"]["scaler"])
        return self.go(start_step=state["step"])

    def go(self, **more):
        options = self.options | more
        return train(
            self.model, self.optimizer, self.batches, self.recipe, **options
        )

    @property
    def log(self):
        return read_jsonl(self.folder / METRICS)

    @property
    def bits(self):
        kept = [p.detach().clone() for p in self.model.parameters()]
        for p in self.model.parameters():
            moments = self.optimizer.state[p]
            kept += [moments[name].clone() for name in sorted(moments)]
        return kept

    def die_in(self, step):
        """Let the loop die, as abruptly as a kill, when it asks for this batch."""
        alive = self.batches.step

        def until(number):
            if number == step:
                raise Cut
            return alive(number)

        self.batches.step = until


class Cut(BaseException):
    """Nothing in the loop catches it."""


def what_happened(log, without=()):
    """The log but for its timings."""
    drop = {"tokens_per_second", *without}
    return [{k: v for k, v in line.items() if k not in drop} for line in log]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end."""
    run = Run(tmp_path_factory.mktemp("whole"))
    run.summary = run.go()
    return run


def test_a_line_per_step(whole):
    log = whole.log
    assert [line["step"] for line in log] == list(range(STEPS))
    assert [i for i, line in enumerate(log) if "val_loss" in line] == [4, 9, 11]
    for i, line in enumerate(log):
        assert {"step", "loss", "lr", "grad_norm", "clip", "tokens"} <= line.keys()
        assert line["lr"] == scheduled_rate(whole.recipe, i)
        assert line["tokens"] == ROWS * T and math.isfinite(line["loss"])
        assert line["clip"] == min(1.0, 1.0 / line["grad_norm"])
    assert log[0]["lr"] == pytest.approx(2e-2 / 3) and log[2]["lr"] == 2e-2
    assert log[-1]["lr"] == pytest.approx(2e-3)
    assert log[-1]["val_loss"] == evaluate_loss(whole.model, stream(99, 1), T)[0]


def test_log_says_what_a_plain_loop_would_see(whole):
    """Loss and norm of the first steps, against cross-entropy and autograd."""
    model = Albor(CONFIG, seed=0)
    optimizer = build_optimizer(model, whole.recipe.optimizer)
    for i, line in enumerate(whole.log[:3]):
        inputs, targets = Batches(stream(), T, ROWS, seed=7).step(i)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (i + 1) / 3
        optimizer.step()


def test_summary_states_and_progress(whole):
    assert whole.summary.finished and whole.summary.steps == STEPS
    assert whole.summary.tokens == STEPS * ROWS * T and whole.summary.seconds > 0
    assert whole.saved == [4, 8, 12]
    steps, left = zip(*whole.told, strict=True)
    assert steps == (0, 4, 9, 11) and left[-1] == 0 < left[0]
    rated = [i for i, line in enumerate(whole.log) if "tokens_per_second" in line]
    assert rated == [0, 4, 9, 11]
    line = progress_line(whole.log[9], STEPS, 61.4)
    assert "step 10/12" in line and "1m01s left" in line and "validation" in line
    assert "validation" not in progress_line(whole.log[0], STEPS, 1.0)


def test_two_runs_are_the_same(whole, tmp_path):
    again = Run(tmp_path)
    again.go()
    assert same(again.bits, whole.bits)
    other = Run(tmp_path / "other", seed=1)
    other.go()
    assert not same(other.bits, whole.bits)


def test_resuming_a_finished_run_touches_nothing(whole):
    def stamp():
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in whole.folder.rglob("*")
        }

    before = stamp()
    again = Run(whole.folder, seed=5)
    summary = again.resume()
    assert summary.finished and summary.tokens == 0
    assert stamp() == before and same(again.bits, whole.bits)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("at", [4, 7, 11])
def test_resumes_to_the_same_bits(tmp_path, precision, at):
    reference = Run(tmp_path / "reference", precision=precision)
    run = Run(tmp_path / "cut", precision=precision)
    if reference.scaler:  # so that scales move, and skipped steps occur
        for one in (reference, run):
            one.scaler = torch.amp.GradScaler(
                "cpu", init_scale=2.0**30, growth_interval=2
            )
            one.options["scaler"] = one.scaler
    reference.go()
    run.die_in(at)
    with pytest.raises(Cut):
        run.go()
    assert len(run.log) == at
    resumed = Run(tmp_path / "cut", seed=99, precision=precision)
    resumed.resume()
    assert same(resumed.bits, reference.bits)
    assert what_happened(resumed.log) == what_happened(reference.log)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_train import Run
from albor.checkpoint import latest_state
folder = Path(sys.argv[2])
run = Run(folder, save_interval=1, max_steps=400)
print("ready", flush=True)
run.resume() if latest_state(folder) else run.go()
print("done", flush=True)
"""


def child(folder):
    command = [sys.executable, "-W", "ignore", "-c", CHILD]
    here = os.path.dirname(__file__)
    return subprocess.Popen(
        [*command, here, str(folder)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_sigkill_at_random_instants(tmp_path):
    """Killed while it saves after every step, resumed, killed again, finished."""
    torch.set_num_threads(1)
    chance = random.Random(os.urandom(8))
    reached = []
    for _ in range(3):
        process = child(tmp_path / "killed")
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + chance.random() * 0.8)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it finished: kill it sooner"
        state = latest_state(tmp_path / "killed")
        reached.append(int(state.name.removeprefix("step-")) if state else 0)
    assert reached == sorted(reached) and 0 < reached[-1] < 400, reached
    assert len(set(reached)) > 1, reached
    end = reached[-1] + 5
    resumed = Run(tmp_path / "killed", seed=3, save_interval=1, max_steps=400)
    reference = Run(tmp_path / "whole", save_interval=0, max_steps=400)
    for run, start in ((resumed, resumed.resume), (reference, reference.go)):
        run.die_in(end)
        with pytest.raises(Cut):
            start()
    assert same(resumed.bits, reference.bits)
    assert [line["step"] for line in resumed.log] == list(range(end))
    assert what_happened(resumed.log) == what_happened(reference.log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_is_obeyed(tmp_path, number, whole):
    run = Run(tmp_path, save_interval=0, eval_interval=0)
    step = run.batches.step
    obeyed = []

    def interrupted(i):
        if i == 6:
            signal.raise_signal(number)
        return step(i)

    # A job in the background of a shell is born deaf to Ctrl-C.
    deaf = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, lambda *_: obeyed.append(signal.SIGTERM))
    try:
        run.batches.step = interrupted
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                run.go()
        else:
            assert not run.go().finished
            assert obeyed == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, deaf)
    assert run.saved == [7] and len(run.log) == 7
    assert "val_loss" not in run.log[-1]  # no time for that
    resumed = Run(tmp_path, seed=4)
    resumed.resume()
    assert same(resumed.bits, whole.bits)


def test_sigterm_from_outside_leaves_a_state(tmp_path):
    process = child(tmp_path)
    assert process.stdout.readline() == "ready\n"
    while latest_state(tmp_path) is None:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    done = int(latest_state(tmp_path).name.removeprefix("step-"))
    assert [line["step"] for line in read_jsonl(tmp_path / METRICS)] == [
        *range(done)
    ]


def test_signals_outside_the_block_are_as_before():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with signals_held_back() as came:
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers == [
        signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
    ]
    seen = []
    thread = threading.Thread(
        target=lambda: seen.append(signals_held_back().__enter__())
    )
    thread.start()
    thread.join()
    assert seen == [[]]


def test_a_bad_step_stops_the_run_and_names_it(tmp_path, whole):
    run = Run(tmp_path)
    reference = Run(tmp_path / "reference", max_steps=STEPS)
    loss = run.model.loss
    calls = []

    def poisoned(ids, targets):
        calls.extend([1] * torch.is_grad_enabled())  # not when it evaluates
        return loss(ids, targets) * (math.nan if len(calls) == 3 * 9 + 2 else 1.0)

    run.model.loss = poisoned
    with pytest.raises(
        NonFiniteError, match=r"step 9 .*loss nan.*step-8"
    ) as caught:
        run.go()
    error = caught.value
    assert error.step == 9 and error.rows == run.batches.rows_of(9)
    assert str(error.rows) in str(error) and error.last_state == latest_state(
        tmp_path
    )
    assert len(run.log) == 9 and run.saved == [4, 8]
    reference.die_in(9)
    with pytest.raises(Cut):
        reference.go()
    assert same(run.bits, reference.bits)  # as nine good steps left them
    mended = Run(tmp_path, seed=8)
    mended.resume()
    assert same(mended.bits, whole.bits)


def test_a_bad_first_step_has_no_state_to_name(tmp_path):
    run = Run(tmp_path)
    run.model.model.norm.weight.data[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"step 0 .*none is saved") as caught:
        run.go()
    assert caught.value.last_state is None and not (tmp_path / METRICS).exists()


def test_an_overflow_in_fp16_is_skipped_and_logged(tmp_path):
    run = Run(tmp_path, precision="fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    assert run.go(scaler=scaler, save=None).finished
    log = run.log
    assert log[0]["grad_norm"] is None and log[0]["scale"] == 2.0**39
    assert math.isfinite(log[0]["loss"]) and len(log) == STEPS


def test_a_scale_that_is_spent_stops_the_run(tmp_path):
    run = Run(tmp_path, precision="fp16")
    weight = run.model.model.norm.weight
    weight.register_hook(lambda grad: torch.full_like(grad, math.inf))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    with pytest.raises(NonFiniteError, match="gradient norm inf") as caught:
        run.go(scaler=scaler, save=None)
    assert caught.value.step == 3 and len(run.log) == 3


def test_inspect_sees_every_step_with_its_gradients_and_can_end_the_run(tmp_path):
    run, seen = Run(tmp_path), []

    def inspect(step, result):
        norm = math.sqrt(
            sum(float(p.grad.norm()) ** 2 for p in run.model.parameters())
        )
        assert norm == pytest.approx(min(result.grad_norm, 1.0), rel=1e-3)
        assert len(run.log if (tmp_path / METRICS).exists() else []) == step
        seen.append(step)
        if step == 6:
            raise Cut

    with pytest.raises(Cut):
        run.go(inspect=inspect)
    assert seen == list(range(7))
    assert [line["step"] for line in run.log] == list(range(7)), "all were taken"
    assert run.saved == [4]


@pytest.mark.parametrize("where", ["inspect", "evaluate", "on_log"])
def test_no_line_of_a_look_is_lost_with_what_raises(tmp_path, where):
    run = Run(tmp_path, save_interval=0)

    def fail(*_):
        if (tmp_path / METRICS).exists():  # after the first look, which is one step
            raise Cut

    with pytest.raises(Cut):
        run.go(log_interval=4, **{where: fail})
    assert [line["step"] for line in run.log] == [0, 1, 2, 3, 4]


def test_a_signal_between_two_looks_still_saves(tmp_path, monkeypatch):
    run, plan = Run(tmp_path, save_interval=0, eval_interval=0), next_log

    def late(done, *rest):  # the look is over, and its save is not due
        if done == 5:
            signal.raise_signal(signal.SIGTERM)
        return plan(done, *rest)

    monkeypatch.setattr("albor.train.next_log", late)
    obeyed = []
    before = signal.signal(signal.SIGTERM, lambda *_: obeyed.append(1))
    try:
        summary = run.go()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert obeyed and summary.steps == 6 and run.saved == [6]


def test_max_minutes_stops_saves_and_judges(tmp_path, whole):
    run = Run(tmp_path, save_interval=0)
    summary = run.go(max_minutes=1e-9)
    assert not summary.finished and summary.steps == 1 and run.saved == [1]
    assert "val_loss" in run.log[0]
    resumed = Run(tmp_path, seed=2)
    assert resumed.resume().finished
    assert same(resumed.bits, whole.bits)


def test_saves_by_the_clock(tmp_path):
    run = Run(tmp_path, save_interval=0)
    run.go(save_minutes=1e-9)
    assert run.saved == list(range(1, STEPS + 1))
    run = Run(tmp_path / "never", save_interval=0)
    run.go(save_minutes=0)
    assert run.saved == [STEPS]


def test_lines_reach_the_disk_before_the_state(tmp_path):
    run = Run(tmp_path, save_interval=1)
    run.go(save=lambda done: run.saved.append((done, len(run.log))))
    assert run.saved == [(done, done) for done in range(1, STEPS + 1)]


def test_batches_must_be_the_recipes(tmp_path):
    run = Run(tmp_path)
    for rows, length in ((ROWS - 1, T), (ROWS, T - 1), (ROWS // 3, T)):
        batches = Batches(stream(), length, rows)
        with pytest.raises(ConfigError, match=rf"{rows} x {length} .*{ROWS} x {T}"):
            train(
                run.model, run.optimizer, batches, run.recipe, output_dir=tmp_path
            )
    for start in (-1, STEPS + 1):
        with pytest.raises(ConfigError, match=f"start_step = {start}"):
            run.go(start_step=start)
    assert not list(tmp_path.iterdir())


def test_a_log_with_a_gap_is_refused(tmp_path):
    path = tmp_path / METRICS
    resume_metrics(path, 3)  # none yet
    assert not path.exists()
    for step in range(6):
        append_jsonl(path, {"step": step})
    with pytest.raises(
        ConfigError, match="steps from 0 to 5, with gaps before step 8"
    ):
        resume_metrics(path, 8)
    resume_metrics(path, 4)
    assert [line["step"] for line in read_jsonl(path)] == [0, 1, 2, 3]
    resume_metrics(path, 0)
    assert read_jsonl(path) == []


@pytest.mark.filterwarnings("ignore:.*dropped")
def test_a_torn_line_is_dropped_on_resume(tmp_path, whole):
    run = Run(tmp_path)
    run.die_in(10)
    with pytest.raises(Cut):
        run.go()
    with open(tmp_path / METRICS, "a") as log:
        log.write(json.dumps({"step": 10, "loss": 3.0})[:-4])
    resumed = Run(tmp_path, seed=2)
    resumed.resume()
    assert [line["step"] for line in resumed.log] == list(range(STEPS))
    assert same(resumed.bits, whole.bits)


def test_evaluation_judges_rows_evenly():
    model, tokens = Albor(CONFIG, seed=0), stream(100)
    rows = [tokens[i * T : i * T + T + 1].astype(np.int64) for i in range(11)]
    each = []
    for row in map(torch.from_numpy, rows):
        each.append(F.cross_entropy(model(row[None, :-1])[0], row[1:]).item())
    loss, count = evaluate_loss(model, tokens, T, micro_batch=4)
    assert count == 11 * T and loss == pytest.approx(np.mean(each), abs=1e-6)
    loss, count = evaluate_loss(model, tokens, T, sequences=3, micro_batch=2)
    assert count == 3 * T
    assert loss == pytest.approx(np.mean([each[i] for i in (0, 3, 7)]), abs=1e-6)
    assert evaluate_loss(model, tokens, T, sequences=50)[1] == 11 * T
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_of_very_little():
    model = Albor(CONFIG, seed=0)
    loss, count = evaluate_loss(model, stream(5), T)
    assert count == 4 and math.isfinite(loss)
    for size in (0, 1):
        with pytest.raises(DataError, match=f"{size} validation tokens"):
            evaluate_loss(model, stream(size), T)


def test_training_learns(tmp_path):
    """A stream that repeats is learned: the loop really minimizes its loss."""
    run = Run(
        tmp_path, max_steps=40, warmup_steps=4, eval_interval=0, save_interval=0
    )
    repeating = np.tile(np.arange(0, 50, 7, dtype=np.uint16), 200)
    run.batches = Batches(repeating, T, ROWS, seed=1)
    run.go(evaluate=None, save=None)
    assert run.log[-1]["loss"] < 0.5 < 3.5 < run.log[0]["loss"]
