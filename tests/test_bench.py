"""The benchmark of training, rehearsed: what it measures, compares and admits."""

import dataclasses
import fcntl
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from albor.artifacts import read_json
from albor.ceilings import flops_per_token
from albor.config import ModelConfig
from albor.model import Albor
from albor.shapes import count_parameters
from benchmarks import measure, rounds, training
from benchmarks.arms import ABLATIONS, ARMS, REFERENCE, Job
from benchmarks.plain import Plain

ROOT = Path(__file__).resolve().parents[1]
# All dimensions different: vocabulary, width, feed-forward, layers, heads, shared.
CONFIG = ModelConfig(70, 24, 40, 3, 6, 2, 32, head_dim=10)


def rehearse(tmp_path: Path, *more: str) -> dict[str, Any]:
    """The whole command on tiny settings; returns what it wrote."""
    out = tmp_path / "result.json"
    usual = ["--preset", "tiny", "--random", "--device", "cpu", "--threads", "1"]
    usual += ["--warm-up", "1", "--timed", "2", "--out", str(out)]
    training.main([*usual, *more])
    return read_json(out)


def job(**changes: Any) -> Job:
    usual = {
        "folder": "",
        "model": {},
        "optimizer": {},
        "rates": [1.0] * 9,
        "sequences": 4,
    }
    return Job(**usual | {"seq_len": 8} | changes)


# ---- The peers compute what we compute ----


def test_the_plain_model_has_our_loss_and_gradients() -> None:
    ours, plain = Albor(CONFIG, seed=1), Plain(CONFIG)
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(70, (5, 13), generator=torch.Generator().manual_seed(2))
    targets = ids.roll(-1, dims=1)
    losses = ours.loss(ids, targets), plain(ids, targets)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for (name, a), (other, b) in zip(
        sorted(ours.named_parameters()),
        sorted(plain.named_parameters()),
        strict=True,
    ):
        assert name == other
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_operations_are_those_that_torch_counts() -> None:
    model = Plain(CONFIG)
    ids = torch.zeros(5, 13, dtype=torch.int64)
    plainly = sdpa_kernel(SDPBackend.MATH)  # a fused kernel is not looked into
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plainly:
        model(ids, ids)
    palm, causal = (flops_per_token(CONFIG, 13, causal=c) for c in (False, True))
    # Forward is a third; attention is counted as if all looked at all.
    assert counter.get_total_flops() == pytest.approx(palm * 5 * 13 / 3)
    assert palm - causal == 12 * 3 * 60 * 13 / 2


# ---- The summary ----


def arm(ms: list[float], loss: float = 3.0) -> dict[str, Any]:
    return {
        "status": "measured",
        "settings": {},
        "micro_batch": 4,
        "ms": ms,
        "losses": {"1": loss},
        "compile_seconds": 0.0,
        "peak_bytes": 1,
        "freed_memory_kept": True,
        "faults_per_step": 0.0,
        "events": None,
    }


def in_rounds(*times: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "order": list(one),
            "load": 0.0,
            "arms": {k: arm(v) for k, v in one.items()},
        }
        for one in times
    ]


def test_ratios_are_taken_within_a_round() -> None:
    # The second round met a busy machine: everything took ten times as long.
    found = in_rounds(
        {"ours": [9.0, 10.0, 50.0], REFERENCE: [20.0, 20.0, 20.0]},
        {"ours": [100.0], REFERENCE: [300.0]},
        {"ours": [10.0], REFERENCE: [25.0]},
    )
    flops, peaks = {"palm": 7}, {"nominal": None, "measured": 70_000.0}
    table = training.summarize(found, 40, REFERENCE, flops, peaks)
    assert table["ours"]["ratio"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert table[REFERENCE]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    speed = table["ours"]["tokens_per_second"]
    assert speed == {"median": 4000.0, "low": 400.0, "high": 4000.0}
    assert table["ours"]["mfu"] == {"palm / measured": 4000 * 7 / 70_000}
    assert table["ours"]["ms_per_step"]["high"] == 100.0


def test_an_arm_that_fails_later_has_no_figures() -> None:
    found = in_rounds({"ours": [1.0], REFERENCE: [1.0]}, {"ours": [1.0]})
    found[1]["arms"][REFERENCE] = {"status": "failed: killed"}
    table = training.summarize(found, 1, REFERENCE, {}, {})
    assert table[REFERENCE] == {"status": "failed: killed"}
    assert table["ours"]["ratio"] is None, "nothing to compare with"


@pytest.mark.parametrize("loss", [3.011, 2.989, float("nan"), float("inf")])
def test_another_loss_is_an_error(loss: float) -> None:
    found = in_rounds({REFERENCE: [1.0], "ours": [1.0]})
    assert training.compare_losses(found, REFERENCE)["errors"] == []
    found[0]["arms"]["ours"] = arm([1.0], loss)
    (error,) = training.compare_losses(found, REFERENCE)["errors"]
    assert error.startswith("ours: loss ")
    assert "step 1" in error


# ---- The search for a micro-batch ----


class Fake:
    """A loop of known speed; what is above 8 does not fit."""

    ms = {1: 30, 2: 20, 4: 5, 8: 15}  # noqa: RUF012
    now = 0.0  # of a clock that only steps move

    def __init__(self, size: int) -> None:
        if size > 8:
            raise torch.OutOfMemoryError
        self.size = size

    def step(self, number: int) -> None:
        Fake.now += self.ms[self.size] / 1000


def test_the_fastest_micro_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [32, 16, 8, 4, 2, 1]
    free = 2**40
    monkeypatch.setattr(measure, "free_memory", lambda device: free)
    one = job(sequences=32, device="cuda", model=dataclasses.asdict(CONFIG))
    assert measure.candidates(one) == sizes
    free = 1
    assert measure.candidates(one) == [1], "the rest cannot fit"
    free = 2**40
    assert measure.candidates(job(sequences=32)) == [32], "no search on a CPU"
    monkeypatch.setattr(measure, "wait", lambda device: None)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: Fake.now)
    best, trials = measure.best_micro_batch(lambda j: Fake(j.micro_batch), one)
    assert best == 4
    assert [trial["micro_batch"] for trial in trials] == [32, 16, 8, 4, 2]
    assert [bool(trial["ms"]) for trial in trials] == [False, False, *[True] * 3]
    assert measure.candidates(job(micro_batch=2, device="cuda")) == [2]


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "candidates", lambda job: [64, 32])
    with pytest.raises(measure.Unavailable, match="out of memory"):
        measure.best_micro_batch(lambda j: Fake(j.micro_batch), job())


# ---- The command ----


def test_rehearsal_in_another_order(tmp_path: Path) -> None:
    order = ["liger", "plain", "transformers-eager", "ours"]
    found = rehearse(tmp_path, "--rounds", "1", "--order", *order)
    assert found["errors"] == []
    assert found["rounds"][0]["order"] == order
    assert found["losses_agree"]["reference"] == REFERENCE
    assert 0 <= found["losses_agree"]["worst"] < min(training.TOLERANCE.values())
    assert set(found["about"]) == {
        "hardware",
        "versions",
        "python",
        "date",
        "commit",
        "source",
    }
    assert found["claims"].startswith("ratios alone")
    assert set(found["ceilings"]) == {"start", "end"}
    for name in order[1:]:
        row = found["arms"][name]
        assert row["status"] == "measured"
        assert row["ratio"]["low"] > 0
        assert row["tokens_per_second"]["median"] > 0
        assert row["peak_bytes"] > 1e8
        assert row["faults_per_step"] >= 0
        assert row["losses"].keys() == {"1"}
        assert len(found["rounds"][0]["arms"][name]["ms"]) == 2
    liger = found["arms"]["liger"]["status"]
    assert liger.startswith(("not installed", "needs a GPU"))


@pytest.mark.slow
def test_rehearsal_of_every_arm_and_of_rounds(tmp_path: Path) -> None:
    found = rehearse(tmp_path, "--rounds", "2", "--shuffle", "3", "--after", "8")
    assert set(found["arms"]) == set(ARMS)
    assert len(found["rounds"]) == 2
    for name, row in found["arms"].items():
        said = row["status"]
        assert said == "measured" or said.startswith(
            ("not installed", "needs a GPU")
        )
        if said == "measured":
            assert row["losses"].keys() == {"1", "10"}
            assert len(found["rounds"][1]["arms"][name]["ms"]) == 2


@pytest.mark.slow
def test_rehearsal_of_the_ablations(tmp_path: Path) -> None:
    found = rehearse(tmp_path, "--rounds", "1", "--ablate")
    here = {name for name, (devices, _) in ABLATIONS.items() if "cpu" in devices}
    assert set(found["arms"]) == {"ours", *here}
    assert found["reference"] == "ours"
    assert all(row["status"] == "measured" for row in found["arms"].values())


def test_side_by_side_only_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 2 * 3 * (16 * count_parameters(CONFIG) + 600_000_000)  # twice 3 arms
    monkeypatch.setattr(training, "free_memory", lambda device: free)
    one = job(device="cuda", model=dataclasses.asdict(CONFIG))
    assert training.room_for_all(one, 3) and not training.room_for_all(one, 4)
    assert not training.room_for_all(job(model=one.model), 1), "not on a CPU"
    monkeypatch.setattr(training, "free_memory", lambda device: None)
    assert not training.room_for_all(one, 1)


@pytest.mark.slow
def test_arms_side_by_side(tmp_path: Path) -> None:
    order = ["ours", "plain", "liger"]
    told = ["--together", "--inside", "plain", "--micro-batch-of", "plain=2"]
    found = rehearse(
        tmp_path, "--rounds", "2", "--after", "8", *told, "--order", *order
    )
    assert found["errors"] == [] and not list(tmp_path.glob("*.part"))
    first, second = (one["arms"] for one in found["rounds"])
    assert found["rounds"][0]["order"] == order
    assert {*first} == {*order} and {*second} == {*order[:2]}
    assert len(first["ours"]["ms"]) == len(second["ours"]["ms"]) == 2
    # Asked for steps afterwards was the plain arm alone, and in its first turn.
    assert first["plain"]["losses"].keys() == {"1", "10"}
    assert first["ours"]["losses"].keys() == {"1"}
    assert first["plain"]["micro_batch"] == 2
    assert first["ours"]["micro_batch"] == found["job"]["sequences"]
    assert set(found["ceilings"]) == {"start", "end"}


class Noisy:
    """A loop that prints, as libraries do, and whose loss is what it was told."""

    def __init__(self, job: Job) -> None:
        self.loss, self.steps = job.settings["loss"], 0
        print("a word from a library")

    def step(self, number: int) -> None:
        self.steps += 1

    def losses(self) -> list[float]:
        return [self.loss] * self.steps


def test_a_loss_that_is_no_number_fails_the_arm_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARMS, "noisy", (Noisy, {}))
    for loss, status in ((3.0, "measured"), (math.nan, "failed: the loss is nan")):
        made = job(micro_batch=4, warm_up=1, timed=2, settings={"loss": loss})
        found = measure.Arm("noisy", made).turn()
        assert found["status"].startswith(status)


def test_what_a_library_prints_is_no_answer(tmp_path: Path) -> None:
    told = job(micro_batch=4, warm_up=1, timed=2, settings={"loss": 3.0})
    path = tmp_path / "job.json"
    path.write_text(json.dumps(dataclasses.asdict(told)))
    program = f"""
import sys
from benchmarks import measure
from tests.test_bench import Noisy
measure.ARMS["noisy"] = Noisy, {{}}
sys.argv = ["measure", "noisy", {str(path)!r}]
measure.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="turn\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    ready, turn = map(json.loads, done.stdout.splitlines())
    assert ready == {"status": "ready"} and turn["losses"] == {"1": 3.0}
    assert "a word from a library" in done.stderr


def test_what_does_not_run_is_told_before_anything_runs() -> None:
    for told, why in {
        "--inside plane": r"--inside.*\['plane'\] do not run",
        "--micro-batch-of plane=2": r"--micro-batch-of.*\['plane'\] do not run",
        "--rounds 0": "--rounds 0: at least one",
        "--micro-batch 3": "a micro-batch of 3: does not divide",
        "--micro-batch-of ours=5": "a micro-batch of 5: does not divide",
    }.items():
        with pytest.raises(SystemExit, match=why):
            usual = ["--preset", "tiny", "--random", "--device", "cpu"]
            training.main([*usual, "--order", "ours", *told.split()])


def test_losses_are_compared_at_the_steps_that_two_arms_share() -> None:
    found = in_rounds({REFERENCE: [1.0], "ours": [1.0]})
    found[0]["arms"]["ours"]["losses"]["10"] = 9.0  # the reference has none
    assert training.compare_losses(found, REFERENCE)["errors"] == []
    found[0]["arms"][REFERENCE]["losses"]["10"] = 9.1
    (error,) = training.compare_losses(found, REFERENCE)["errors"]
    assert "at step 10" in error


def test_a_micro_batch_of_one_arm() -> None:
    found = training.own_micro_batches(["plain=4", "transformers-eager=16"])
    assert found == {"plain": 4, "transformers-eager": 16}
    for bad in ("plain", "plain=", "plain=four"):
        with pytest.raises(SystemExit, match=r"--micro-batch-of.*say ARM=N"):
            training.own_micro_batches([bad])


# ---- One device, many processes ----


def test_the_lock_lets_one_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(measure.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("freed"))
    mine, other = measure.Lock("cuda:0"), measure.Lock("cuda:0")
    mine.take()
    mine.take()  # again is no wait
    at_once = fcntl.LOCK_EX | fcntl.LOCK_NB
    with pytest.raises(BlockingIOError):
        fcntl.flock(other.file, at_once)
    fcntl.flock(measure.Lock("cuda:1").file, at_once)  # another device
    mine.give_back()
    assert done == ["waited", "freed"], "what the next one needs is there"
    other.take()
    assert measure.Lock("cpu").file is None


HANGS = """
import ctypes, json, threading, time
from benchmarks.measure import Lock

threading.Thread(target=time.sleep, args=[99], daemon=True).start()
Lock("cuda:0", hold=1).take()
print(json.dumps({"status": "ready"}), flush=True)
ctypes.PyDLL(None).sleep(99)  # in C, with the interpreter's own lock
"""


def test_who_hangs_with_the_lock_ends_itself_and_the_next_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, program = subprocess.Popen, tmp_path / "hangs.py"
    program.write_text(HANGS)

    def other_program(command: list[str], **how: Any) -> subprocess.Popen:
        return begin([sys.executable, str(program)], **how)

    monkeypatch.setattr(rounds.subprocess, "Popen", other_program)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(measure.tempfile, "gettempdir", lambda: str(tmp_path))
    one = job(folder=str(tmp_path))
    with closing(rounds.Worker("hangs", "hangs", one, 60)) as worker:
        worker.prepare()
        assert worker.status == "ready"
        measure.Lock("cuda:0").take()  # waits for the other's end
        told = worker.turn()
    said = 'failed: Timeout (0:00:01)! File "hangs.py", line 8 in <module>'
    assert told["status"] == said


def test_the_lock_of_one_that_is_quick_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(measure.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("waited"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    dog = measure.faulthandler
    monkeypatch.setattr(
        dog, "dump_traceback_later", lambda s, exit: said.append((s, exit))
    )
    monkeypatch.setattr(
        dog, "cancel_dump_traceback_later", lambda: said.append("cancelled")
    )
    lock = measure.Lock("cuda:0", hold=7)
    lock.take()
    lock.give_back()
    assert said == [(7, True), "waited", "cancelled"], "a wait may hang as well"
    measure.Lock("cpu", hold=7).take()
    assert len(said) == 3


SLEEPS = """
import os, sys, time
from benchmarks import measure


def Path(_):  # stands for an arm at work: it reads no standard input
    print(os.getpid(), file=sys.stderr, flush=True)
    time.sleep(99)


measure.Path = Path
sys.argv = ["measure", "ours", "job.json"]
measure.main()
"""
STARTS = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]], start_new_session=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a request to Linux")
def test_an_arm_dies_with_the_process_that_began_it() -> None:
    command = [sys.executable, "-c", STARTS, SLEEPS]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stderr
    with parent.stderr:
        arm = int(parent.stderr.readline())
        # Ends when the arm, which holds the other end, is gone.
        reader = threading.Thread(target=parent.stderr.read)
        reader.start()
        parent.kill()
        parent.wait()
        reader.join(20)
        lives_on = reader.is_alive()
        if lives_on:
            os.kill(arm, signal.SIGKILL)
        reader.join()
    assert not lives_on


class Waits:
    """Stands for a worker; tells who was begun and asked, and how patient it is."""

    said: list[Any] = []  # noqa: RUF012

    def __init__(self, name: str, kind: str, job: Job, timeout: float) -> None:
        self.name = name
        self.said.append(("began", name, job.hold, timeout))

    def prepare(self) -> None:
        self.said.append(("prepared", self.name))

    def turn(self) -> dict[str, Any]:
        self.said.append(("turn", self.name))
        return {"status": "measured", "micro_batch": 4, "ms": [1.0]}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("together", [True, False])
def test_who_waits_for_others_waits_longer_than_they_may_take(
    monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.setattr(rounds, "Worker", Waits)
    monkeypatch.setattr(Waits, "said", [])
    arms = {"a": ("ours", {}), "b": ("plain", {})}
    rounds.run_rounds(arms, job(), 1, timeout=10.0, together=together)
    began = [one for one in Waits.said if one[0] == "began"]
    patience = 30.0 if together else 10.0
    names = ("ceilings", "a", "b")
    assert began == [("began", name, 10.0, patience) for name in names]
    if together:  # all compile while the ceilings are measured
        assert Waits.said[3] == ("turn", "ceilings")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "transformers-compiled"])
def test_the_device_is_asked_for_when_all_is_compiled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where nothing is locked: when would it be, and how often?"""
    compile_fx = importlib.import_module("torch._inductor.compile_fx")
    said: list[str] = []
    compile_inner = compile_fx._compile_fx_inner

    def compiling(*args: Any, **kwargs: Any) -> Any:
        said.append("compiled")
        return compile_inner(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", compiling)
    monkeypatch.setattr(measure.Lock, "take", lambda self: said.append("taken"))
    monkeypatch.setattr(measure.Lock, "give_back", lambda self: said.append("free"))
    told = ["--preset", "tiny", "--random", "--device", "cpu", "--threads", "1"]
    given = training.parse([*told, "--warm-up", "2", "--timed", "1"])
    made = training.make_job(given, tmp_path)
    made.settings = {"compile": "always"}
    early = {"force_non_lazy_backward_lowering": False}  # a setting of the process
    cold = torch._inductor.config.patch(force_disable_caches=True)
    with torch._functorch.config.patch(early), cold:
        arm = measure.Arm(name, made)
        assert said == ["compiled", "compiled", "taken", "free"]  # backward as well
        found = arm.turn()
    assert said == ["compiled", "compiled", "taken", "free", "taken", "free"]
    assert found["losses"]["1"] == pytest.approx(math.log(1024), abs=0.1)


def test_a_failing_arm_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"broken": ("no-such-arm", {}), "plain": ("plain", {})}
    monkeypatch.setattr(training, "choose_arms", lambda given: (arms, REFERENCE))
    with pytest.raises(SystemExit, match="broken: failed: KeyError: 'no-such-arm'"):
        rehearse(tmp_path, "--rounds", "2")
    found = read_json(tmp_path / "result.json")
    assert found["arms"]["plain"]["status"] == "measured"
    assert found["arms"]["plain"]["ratio"] is None, "nothing to compare with"
    assert "broken" not in found["rounds"][1]["arms"], "once is enough"


def test_an_arm_that_hangs_is_ended(tmp_path: Path) -> None:
    one = job(folder=str(tmp_path))
    with closing(rounds.Worker("ours", "ours", one, 0.2)) as worker:
        told = worker.turn()
    assert told["status"].startswith("failed: not done")


def test_which_arms_run_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cpu"
    monkeypatch.setattr(training, "pick_device", lambda _: torch.device(device))

    def names(*told: str) -> list[str]:
        arms, _ = training.choose_arms(training.parse(told))
        return list(arms)

    assert names("--preset", "small") == list(ARMS)
    large = names("--preset", "350m")
    assert large == [name for name in ARMS if name != "ours-compiled"]
    asked = ["--order", "ours", "ours-compiled"]
    assert names("--preset", "350m", *asked) == asked[1:]
    device = "cuda"
    alone = {"transformers-untuned", "ours-compiled"}
    assert names() == [name for name in ARMS if name not in alone]
    with pytest.raises(SystemExit, match="no \\['ours-compiled'\\]"):
        names(*asked)
    # What ours does anyway is no ablation of it: large steps have no graph.
    graphs = {"one CUDA graph", "no CUDA graph", "AdamW not fused, no CUDA graph"}
    many = names("--ablate", "--preset", "350m-medium")
    few = names("--ablate", "--preset", "350m")
    assert graphs - {*many} == graphs - {"one CUDA graph"}
    assert graphs - {*few} == {"one CUDA graph"}
    assert "ours at 64" not in {*many, *few}
    told = ["--order", "ours at 64", "--micro-batch-of", "ours at 64=64"]
    assert names("--ablate", *told) == ["ours at 64"]


def test_unknown_arms_are_named() -> None:
    with pytest.raises(SystemExit, match="no \\['nanogpt'\\]; there are \\['ours'"):
        training.main(["--order", "nanogpt"])
