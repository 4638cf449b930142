"""`make gpu-evidence` rehearsed on a CPU: stages end, files say what they are."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from albor.artifacts import append_jsonl, read_json, write_json
from albor.config import load_recipe
from benchmarks import gpu_checks, gpu_evidence, gpu_keep, machine, training
from benchmarks.gpu_evidence import (
    FILES,
    STAGES,
    Place,
    StageError,
    family,
    keep_limits,
    lay_plan,
    limited,
    main,
    need,
    parse,
    run_limited,
    run_stage,
    schedule,
    seconds_in,
    seconds_of_steps,
    timed_recipe,
)

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    made = Place(tmp_path / "out", tmp_path / "work", True, 1.0)
    made.end = time.monotonic() + 60
    return made


# ------------------------------------------------------------------- processes


def alive(process: int) -> bool:
    try:
        state = (
            Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        )
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_at_its_limit_a_command_ends_with_children_of_other_sessions(place: Place):
    child = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}],"
        " start_new_session=True)\n"
        "print('child', p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    done = run_limited("one", [sys.executable, "-c", code], place, 5)
    assert done["code"] is None and 5 <= done["seconds"] < 30
    process = int(done["tail"][-1].split()[1])
    for _ in range(50):
        if not alive(process):
            break
        time.sleep(0.1)
    assert not alive(process)
    with pytest.raises(StageError, match=r"it was cut off after \d+ s"):
        need(done, "it")


def test_family_begins_with_the_process_itself():
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
    )
    try:
        assert family(os.getpid())[0] == os.getpid()
        if sys.platform == "linux":
            assert child.pid in family(os.getpid())
    finally:
        child.communicate(b"\n")


def test_a_command_sees_the_project_and_no_gpu_when_rehearsing(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ALBOR_TEST", "short")
    code = (
        "import os, albor; print(os.environ['CUDA_VISIBLE_DEVICES'] == '',"
        " 'ALBOR_TEST' in os.environ, albor.__file__); raise SystemExit(3)"
    )
    done = run_limited("one", [sys.executable, "-c", code], place, 60)
    assert done["code"] == 3
    assert done["tail"] == [f"True False {ROOT / 'albor' / '__init__.py'}"]
    with pytest.raises(StageError, match="it ended with 3:\nTrue False"):
        need(done, "it")


# ---------------------------------------------------------------------- stages


def test_a_stage_that_fails_leaves_what_it_had_and_the_next_one_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def bad(place: Place, record: dict) -> None:
        record["had"] = 1
        raise ValueError("no such luck")

    def good(place: Place, record: dict) -> None:
        during = read_json(place.out / "gpu-good.json")
        assert (during["finished"], during["error"]) == (False, "it was cut off")
        record["had"] = 2

    monkeypatch.setattr(gpu_evidence, "STAGES", {"bad": bad, "good": good})
    out = tmp_path / "out"
    told = ["--out", str(out), "--work", str(tmp_path / "work"), "--rehearse"]
    assert main(told) == 1
    failed, fine = (read_json(out / f"gpu-{name}.json") for name in ("bad", "good"))
    assert failed["error"] == "ValueError: no such luck" and failed["had"] == 1
    assert not failed["finished"] and fine["finished"] and fine["error"] is None
    for record in (failed, fine):
        assert (record["device"], record["rehearsal"]) == ("cpu", True)
        assert record["gpu"] is None and len(record["source"]) == 64
    assert "bad: a rehearsal, ValueError: no such luck" in capsys.readouterr().out
    assert (out / "done").exists()
    assert main([*told, "--stage", "2"]) == 0


def test_what_comes_back_keeps_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_evidence, "LARGEST", 100)
    for number in range(FILES + 1):
        (tmp_path / f"gpu-{number}.json").write_bytes(b"x" * (10 + number))
    (tmp_path / "gpu-run.ipynb").write_bytes(b"x" * 101)
    (tmp_path / "mine").write_bytes(b"x" * 1000)
    dropped = keep_limits(tmp_path)
    assert dropped == [f"gpu-{FILES}.json, 18 bytes", "gpu-run.ipynb, 101 bytes"]
    assert len([*tmp_path.glob("gpu-*")]) == FILES and (tmp_path / "mine").exists()


def test_slips_on_the_command_line_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    told = ["--out", str(tmp_path), "--rehearse"]
    numbers = [parse([*told, "--stage", str(n)]).stages for n in (1, 2, 3, 4)]
    assert numbers == [[name] for name in STAGES]
    assert (
        parse(told).stages == parse([*told, "--stage", "all"]).stages == [*STAGES]
    )
    some = parse([*told, "--stages", "run,2,correctness"]).stages
    assert some == ["run", "bench", "correctness"]
    for slip, reason in (
        (["--stage", "5"], "there are correctness, bench, trial, run and all"),
        (
            ["--stages", "run,all"],
            "there are correctness, bench, trial, run and all",
        ),
        (["--until", "0"], "--until 0: more than 0"),
        (["--pace", "inf"], "--pace inf: tokens per second"),
        (["--pace", "nan"], "--pace nan: tokens per second"),
        (["--minutes", "10"], "more than 0, at most 9"),
        (["--minutes", "nan"], "more than 0, at most 9"),
    ):
        with pytest.raises(SystemExit):
            parse([*told, *slip])
        assert reason in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            parse(["--out", str(tmp_path)])
        assert "torch sees no GPU here; --rehearse" in capsys.readouterr().err


def test_wheels_are_unpacked_where_every_process_finds_them(
    place: Place, tmp_path: Path
):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(SystemExit, match="no wheels there; run `make wheelhouse`"):
        gpu_evidence.install(wheels, place.work / "site")
    with zipfile.ZipFile(wheels / "lacking-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("lacking.py", "answer = 42\n")
        info = "lacking-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Name: lacking\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    place.site = place.work / "site"
    gpu_evidence.install(wheels, place.site)
    code = "import lacking; print(lacking.answer)"
    done = run_limited("one", [sys.executable, "-c", code], place, 60)
    assert done["tail"] == ["42"]


# --------------------------------------------------------------- the timed run


def test_the_schedule_fits_the_time_with_a_margin():
    assert schedule(100, 1.0) == (95, 9)
    assert schedule(5, 1.0) == (4, 1)
    with pytest.raises(StageError, match=r"4 s are left for steps of 1.00 s"):
        schedule(4, 1.0)


def test_seconds_of_steps_are_read_where_the_log_tells_the_pace():
    pace = {"tokens": 10, "tokens_per_second": 5.0}
    lines = [
        pace,
        {"tokens": 10},
        pace | {"tokens_per_second": 10.0},
        {"tokens": 10},
    ]
    assert seconds_of_steps(lines) == [2.0, 1.0, 1.0]  # of the last none is known


def test_the_table_of_an_executed_notebook_is_read(tmp_path: Path):
    text = (
        "imports              2.5 s   10.0%\ntokenizer           20.0 s   80.0%\n"
    )
    text += (
        "tokens               1.5 s    6.0%\neverything          25.0 s  100.0%\n"
    )
    cells = [{"outputs": [{"text": text}]}, {"source": "no outputs"}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert seconds_in(tmp_path / "a.ipynb", ("tokenizer", "tokens")) == 21.5


@pytest.mark.parametrize(
    ("seconds", "turns", "steps"),
    [(1000, 4, 950), (400, 2, 760), (200, 1, 760), (2, 1, 7)],
)
def test_a_short_run_takes_smaller_steps(seconds, turns, steps):
    plan = lay_plan(seconds, 1.0, 8192, 4)
    assert plan["gradient_accumulation"] == turns
    assert plan["steps"] == steps and plan["warmup_steps"] == max(1, steps // 10)
    assert plan["tokens_per_step"] == 8192 * turns // 4
    assert plan["tokens"] == plan["steps"] * plan["tokens_per_step"]
    assert plan["steps"] * plan["seconds_per_step"] <= plan["seconds_of_steps"]


def test_a_trial_reads_as_much_text_as_the_timed_run(tmp_path: Path):
    place = Place(tmp_path, tmp_path, rehearse=False, minutes=1)
    made = load_recipe(limited(place, "pretrain-350m-cuda-test"))
    whole = load_recipe("pretrain-350m-cuda-test")
    text = load_recipe("pretrain-350m-timed").data
    assert made.data.max_bytes == text.max_bytes > 0
    assert made.data.val_bytes == text.val_bytes
    same = dataclasses.replace(
        made.data, max_bytes=whole.data.max_bytes, val_bytes=whole.data.val_bytes
    )
    assert dataclasses.replace(made, data=same) == whole


@pytest.mark.parametrize("rehearse", [True, False])
def test_the_recipe_gets_a_schedule_and_stays_as_it_is(
    place: Place, rehearse: bool
):
    place.rehearse = rehearse
    path = timed_recipe(place, 57, 5)
    recipe, before = load_recipe(path), load_recipe(path.stem)
    assert recipe == before.with_training(
        max_steps=57, warmup_steps=5, save_interval=0, eval_interval=7
    )
    turns = load_recipe(timed_recipe(place, 57, 5, 1)).training
    assert turns.gradient_accumulation == 1 < recipe.training.gradient_accumulation
    if not rehearse:
        data, plan = recipe.data, recipe.training
        sequences = data.batch_size * plan.gradient_accumulation
        assert sequences * data.seq_len == 131_072
        assert data.fim_rate == 0.5 and plan.mixed_precision == "bf16"


class Notebooks:
    """Stands for papermill: writes what the two notebooks would leave behind."""

    def __init__(self, place: Place, ends: list[int]) -> None:
        self.place, self.ends, self.calls = place, ends, []

    def __call__(self, notebook, to, place, so_far=lambda: None, **told):
        self.calls.append((notebook, told))
        folder = Path(told["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        text = "tokens 1.0 s 9.0%\ntraining 6.0 s 9.0%\nguards 2.0 s 9.0%\n"
        cells = [{"outputs": [{"text": text}]}]
        to.write_text(json.dumps({"cells": cells}))
        if notebook == "evaluate":
            write_json(folder / "results.json", {"perplexity": {"loss": 1.5}})
            return {"code": 0, "seconds": 1.0, "tail": []}
        log = folder / "metrics.jsonl"
        begin = len(log.read_text().splitlines()) if log.exists() else 0
        steps = load_recipe(told["config"]).training.max_steps
        end = steps if folder.name == "measure" else min(steps, self.ends.pop(0))
        for step in range(begin, end):
            line = {"step": step, "loss": 9.0 - step / 99, "tokens": 512}
            line["tokens_per_second"] = 512 / 0.5
            append_jsonl(log, line)
        so_far()
        recipe = load_recipe(told["config"]).to_dict()
        write_json(folder / "provenance.json", {"data": "abc", "recipe": recipe})
        made = {"finished": end == steps, "steps": end}
        write_json(folder / "final_model.json", made)
        return {"code": 0, "seconds": 13.0, "tail": []}


def test_a_run_is_planned_once_stopped_resumed_and_evaluated(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    notebooks = Notebooks(place, [30, 999])
    monkeypatch.setattr(gpu_evidence, "papermill", notebooks)
    first = run_stage("run", place)
    plan = first["plan"]
    assert first["finished"]
    # Measured: 0.5 s for two micro-batches. So few fit that a step takes one.
    assert plan["gradient_accumulation"] == 1 and plan["seconds_per_step"] == 0.25
    assert plan["tokens_per_step"] == 256
    assert plan["seconds_beside_steps"] == 13.0 - 1.0 - 6 * 0.5
    assert plan["seconds_outside_training"] == 13.0 - 1.0 - 6.0 - 2.0
    seconds = plan["seconds_of_steps"]
    assert 30 < seconds < 60 - 9 - 15 + 0.1
    assert plan["steps"] == int(0.95 * seconds / 0.25)
    assert first["note"] == f"30 of {plan['steps']} steps; call again to go on"
    assert first["evaluation"] == {"perplexity": {"loss": 1.5}}, "always"
    assert first["complete"] is False and len(first["metrics"]) == 30
    assert not (place.work / "measure").exists()

    second = run_stage("run", place)
    assert second["finished"] and second["complete"] and second["plan"] == plan
    assert len(second["metrics"]) == plan["steps"] and "note" not in second
    assert second["evaluation"] == {"perplexity": {"loss": 1.5}}
    figures = {one["perplexity"] for one in second["original"]["figures"]}
    assert figures == {6.07, 38.5} and "other data" in second["original"]["note"]
    assert (place.out / "gpu-run.png").stat().st_size > 1000

    names = [name for name, _ in notebooks.calls]
    assert names == ["pretrain", "pretrain", "evaluate", "pretrain", "evaluate"]
    _, one, before, two, told = (told for _, told in notebooks.calls)
    assert one["resume"] is two["resume"] is True
    assert one["config"] == two["config"]
    # Until then all must be done but what follows the training, and the evaluation.
    assert 60 - 4 - 15 - 5 < 60 * two["max_minutes"] < 60 - 4 - 15 + 0.1
    assert before["output_dir"] != told["output_dir"], "other weights"
    assert told["val"] == "data/abc" and told["checkpoint"] == str(
        place.work / "run"
    )

    for path in place.out.iterdir():  # as a node that gives back an empty folder
        path.unlink()
    third = run_stage("run", place)
    assert third["finished"] and len(third["metrics"]) == plan["steps"]
    assert [name for name, _ in notebooks.calls][5:] == ["evaluate"]
    assert (place.out / "gpu-run.ipynb").exists()


def test_a_given_pace_is_not_measured(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    notebooks = Notebooks(place, [999])
    monkeypatch.setattr(gpu_evidence, "papermill", notebooks)
    place.pace = 1024.0
    record = run_stage("run", place)
    assert record["finished"] and record["complete"]
    plan = record["plan"]
    assert plan["pace_given"] == 1024 and "measured_in" not in plan
    assert plan["tokens_per_step"] == 256 and plan["seconds_per_step"] == 0.25
    assert 20 < plan["seconds_of_steps"] < 60 - 20 - 15 + 0.1
    assert [name for name, _ in notebooks.calls] == ["pretrain", "evaluate"]
    assert Path(notebooks.calls[0][1]["output_dir"]).name == "run"


def test_what_a_run_has_logged_comes_back_before_it_ends(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def papermill(notebook, to, place, so_far, **told):
        folder = Path(told["output_dir"])
        folder.mkdir()
        (folder / "metrics.jsonl").touch()
        so_far()  # nothing is there yet
        append_jsonl(folder / "metrics.jsonl", {"loss": 7.5, "tokens": 512})
        so_far()
        raise Killed

    monkeypatch.setattr(gpu_evidence, "papermill", papermill)
    place.pace = 1024.0
    for stage in ("run", "trial"):
        with pytest.raises(Killed):
            run_stage(stage, place)
        record = read_json(place.out / f"gpu-{stage}.json")
        assert record["loss"]["last"] == 7.5 and len(record["metrics"]) == 1
        assert record["error"] == "it was cut off" and record["parameters"]


def test_a_command_is_looked_at_while_it_runs(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    looks = []

    def so_far():
        looks.append(time.monotonic())

    monkeypatch.setattr(gpu_evidence, "LOOK", 0.1)
    done = run_limited("one", ["sleep", "9"], place, 0.5, so_far)
    assert done["code"] is None and 2 <= len(looks) <= 5
    assert run_limited("two", ["echo", "well"], place, 9, so_far)["code"] == 0
    logs = {path.name: path.read_text() for path in place.work.iterdir()}
    assert logs == {"one.txt": "", "two.txt": "well\n"}


# ------------------------------------------------------------- the whole command

TERMINATED = """
import sys, time
from benchmarks import gpu_evidence


def slow(place, record):
    record["had"] = 1
    print("under way", flush=True)
    gpu_evidence.run_limited("slow", ["sleep", "99"], place, 99)


gpu_evidence.STAGES = {"slow": slow, "next": slow}
sys.exit(gpu_evidence.main(sys.argv[1:]))
"""


def test_told_to_terminate_it_writes_what_it_has_and_stops(tmp_path: Path):
    out = tmp_path / "out"
    told = ["--out", str(out), "--work", str(tmp_path / "work"), "--rehearse"]
    command = [sys.executable, "-c", TERMINATED, *told]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    assert "under way" in process.stdout.readline()
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    record = read_json(out / "gpu-slow.json")
    assert record["had"] == 1 and not record["finished"]
    assert record["error"] == "StageError: it was told to terminate"
    assert "next: a rehearsal, not begun, no time is left" in printed
    assert not (out / "gpu-next.json").exists() and (out / "done").exists()


def test_the_whole_command_has_an_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    ends = []

    def slow(place: Place, record: dict) -> None:
        ends.append(place.left)
        time.sleep(min(place.left, 9))

    def stopped(place: Place, record: dict) -> None:
        assert not (place.out / "done").exists(), "of an earlier call"
        record |= {"complete": False, "note": "3 of 9 steps; call again to go on"}

    table = {"stopped": stopped, "slow": slow, "late": slow}
    monkeypatch.setattr(gpu_evidence, "STAGES", table)
    out = tmp_path / "out"
    out.mkdir()
    (out / "done").touch()
    told = ["--out", str(out), "--work", str(tmp_path / "work"), "--rehearse"]
    assert main([*told, "--stages", "stopped"]) == 1
    note = (
        "stopped: a rehearsal, finished, stopped by the clock: 3 of 9 steps; call"
    )
    assert note in capsys.readouterr().out
    assert main([*told, "--until", "2", "--stages", "slow,late"]) == 1
    assert len(ends) == 1 and 0 < ends[0] <= 2
    assert "late: a rehearsal, not begun" in capsys.readouterr().out
    assert (out / "done").exists() and not (out / "gpu-late.json").exists()


def test_the_benches_can_be_read_and_leave_time_for_others():
    for arguments in gpu_evidence.BENCHES:
        given = training.parse(shlex.split(arguments))
        arms, _ = training.choose_arms(given)
        assert list(arms) == given.order and given.timeout <= 120


def test_no_time_for_a_step_is_said_and_nothing_is_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_evidence, "papermill", Notebooks(place, [30]))
    run_stage("run", place)
    place.minutes = 24.5 / 60  # 9 go beside the steps, 15 for the evaluation
    late = run_stage("run", place)
    assert not late["finished"] and "call again" in late["error"]
    assert late["plan"]["steps"] == read_json(place.work / "plan.json")["steps"]


def test_benches_are_not_run_twice_and_a_bad_one_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    logs = set()

    def limited(name, command, place, seconds, so_far):
        seen.append(command)
        logs.add(name)
        out = Path(command[command.index("--out") + 1])
        if "two" in command:
            write_json(out.with_suffix(".part"), ["a round"])
            so_far()  # as every ten seconds: what there is comes back
            had = read_json(place.out / "gpu-bench.json")["benches"]
            assert had["--preset two"]["rounds"] == ["a round"]
            assert had["--preset two"]["code"] is None
            return {"code": None, "seconds": 1.0, "tail": ["cut off"]}
        errors = ["the losses differ"] * ("three" in command)
        write_json(out, {"arms": len(seen), "errors": errors})
        return {"code": int(bool(errors)), "seconds": 1.0, "tail": []}

    monkeypatch.setattr(gpu_evidence, "run_limited", limited)
    place.benches = ("--preset one", "--preset two", "--preset three")
    record = run_stage("bench", place)
    assert record["benches"]["--preset one"]["result"]["arms"] == 1
    assert record["benches"]["--preset two"]["rounds"] == ["a round"]
    bad = "not sound or not done: --preset two; --preset three"
    assert record["error"].endswith(bad)
    assert len(logs) == 3, "each has a log of its own"
    again = run_stage("bench", place)
    assert [command[4] for command in seen] == ["one", "two", "three", "two"]
    assert again["benches"]["--preset one"]["result"]["arms"] == 1
    assert again["error"].endswith(bad), "errors of an earlier call stay errors"
    place.minutes = 1 / 60
    short = run_stage("bench", place)
    assert short["benches"]["--preset two"] == {"not_run": "no time was left"}


# ------------------------------------------------------------------ the checks


def test_a_check_that_breaks_or_is_not_for_here_is_a_result(
    monkeypatch: pytest.MonkeyPatch,
):
    def broken(device):
        raise ValueError("a reason")

    def elsewhere(device):
        raise gpu_checks.NotHere("no such thing")

    table = {"broken": broken, "elsewhere": elsewhere}
    monkeypatch.setattr(gpu_checks, "CHECKS", table)
    found = gpu_checks.check("broken", CPU)
    assert found["ok"] is False and found["error"].endswith("ValueError: a reason")
    found = gpu_checks.check("elsewhere", CPU)
    assert (found["ok"], found["not_run"]) == (None, "no such thing")


def test_a_wrong_device_fails_the_comparison(monkeypatch: pytest.MonkeyPatch):
    """The yardstick sees a device whose norm is off by a hundredth of a percent."""
    assert gpu_checks.agreement(CPU)["ok"]
    sound = torch.rsqrt
    monkeypatch.setattr(
        torch,
        "rsqrt",
        lambda x: sound(x) * (1.0001 if x.dtype == torch.float32 else 1),
    )
    found = gpu_checks.agreement(CPU)
    assert not found["ok"] and found["gradient_worst"] > 1e-5


def test_the_profilers_own_list_is_read_by_time_and_kind(
    monkeypatch: pytest.MonkeyPatch,
):
    def event(name, start, end, kind="CPU"):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, time_range=span, device_type=f"DeviceType.{kind}"
        )

    events = [
        event("the work", 10, 20),
        event("cudaMemcpyAsync", 11, 12),
        event("cudaStreamSynchronize", 12, 13),
        event("cudaDeviceSynchronize", 21, 25),  # the profiler's own
        event("Memcpy HtoD (Pageable -> Device)", 12, 13, "CUDA"),
        event("Memcpy DtoH (Device -> Pinned)", 22, 23, "CUDA"),  # ends late
        event("Memcpy DtoD (Device -> Device)", 14, 15, "CUDA"),
        event("the work", 11, 19, "CUDA"),
    ]

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def events(self):
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gpu_checks.read_again(lambda: None)
    assert found == {"up": 1, "down": 1, "waits": 1}


def test_the_machine_is_told_with_a_digest_of_the_program():
    found = machine.about(CPU)
    plain = torch.__version__.split("+")[0]  # a build's own mark may be missing
    assert found["versions"]["torch"].split("+")[0] == plain
    assert found["rehearsal"] and found["source"] == machine.source_digest()


@pytest.mark.slow
def test_every_stage_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The whole way with a tiny model; no file can pass for a GPU's."""
    out, work = tmp_path / "out", tmp_path / "work"
    told = ["--out", str(out), "--work", str(work), "--rehearse"]
    code = main([*told, "--minutes", "4", "--train-minutes", "0.02"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert (out / "done").exists()
    files = sorted(path.name for path in out.glob("gpu-*"))
    assert files == sorted(
        [f"gpu-{name}.json" for name in STAGES]
        + ["gpu-trial.ipynb", "gpu-run.ipynb", "gpu-evaluate.ipynb", "gpu-run.png"]
    )
    assert len(files) <= FILES
    for name in STAGES:
        record = read_json(out / f"gpu-{name}.json")
        assert record["finished"] and record["error"] is None
        assert record["device"] == "cpu" and record["rehearsal"] is True
        assert f"{name}: a rehearsal, finished" in printed
    checks = read_json(out / "gpu-correctness.json")
    assert checks["failed"] == []
    ran = {name for name, one in checks["checks"].items() if one["ok"]}
    assert {"agreement", "halves", "overflow", "determinism", "resume"} <= ran
    trial = read_json(out / "gpu-trial.json")
    assert len(trial["metrics"]) == 5 and trial["final_model"]["finished"]
    assert trial["files"]["model.safetensors"]["bytes"] > 0
    run = read_json(out / "gpu-run.json")
    assert len(run["metrics"]) == run["plan"]["steps"]
    assert run["evaluation"]["perplexity"]["bits_per_byte"] > 0
    assert run["evaluation"]["weights"] == run["final_model"]["model_sha256"]


def test_a_rehearsal_is_not_kept_and_a_bench_gets_its_usual_name(tmp_path: Path):
    source, results = tmp_path / "out", tmp_path / "results"
    source.mkdir()
    results.mkdir()
    with pytest.raises(SystemExit, match="no gpu-"):
        gpu_keep.keep(source, results)
    head = {"rehearsal": False, "gpu": {"name": "a card"}}
    arms, ablation = (
        {"kind": kind, "preset": "350m"} for kind in ("arms", "ablation")
    )
    benches = {
        "a": {"result": arms},
        "b": {"result": ablation},
        "c": {"code": None},
    }
    write_json(source / "gpu-bench.json", head | {"benches": benches})
    (source / "gpu-run.png").write_bytes(b"x")
    names = ["gpu-bench.json", "gpu-run.png"]
    names += ["training-350m-cuda.json", "training-350m-cuda-ablation.json"]
    assert gpu_keep.keep(source, results) == names
    assert read_json(results / "training-350m-cuda.json") == arms
    assert sorted(path.name for path in results.iterdir()) == sorted(names)
    for rehearsal in (
        {"rehearsal": True, "gpu": None},
        {"rehearsal": False, "gpu": None},
    ):
        write_json(source / "gpu-run.json", rehearsal)
        with pytest.raises(SystemExit, match="json: a rehearsal on a CPU"):
            gpu_keep.keep(source, results)
    assert not (results / "gpu-run.json").exists()
