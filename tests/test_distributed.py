"""Two processes make the run of one: curve, weights, states, refusals, faults."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from albor import setup
from albor.artifacts import read_json, read_jsonl
from albor.checkpoint import latest_state, load_model
from albor.config import ConfigError, load_recipe
from albor.distributed import main
from albor.ranks import Loss, World, joined, refuse_ranks, shared_loss
from albor.train import NonFiniteError

ROOT = Path(__file__).resolve().parents[1]

# All dimensions different; ten sequences a step, two or five ranks, one a slice.
RECIPE = """
model:
  architecture:
    vocab_size: 331
    hidden_size: 18
    intermediate_size: 28
    num_hidden_layers: 2
    num_attention_heads: 6
    num_key_value_heads: 3
    head_dim: 10
    max_position_embeddings: 96
data:
  train: source
  batch_size: 2
  seq_len: 24
optimizer:
  lr: 1.0e-2
  weight_decay: 0.1
training:
  epochs: 9
  max_steps: 9
  warmup_steps: 1
  gradient_accumulation: 5
  mixed_precision: PRECISION
  save_interval: 4
  eval_interval: 6
"""
MODULES = ["bisect", "heapq", "textwrap", "queue", "sched", "cmd", "shlex", "stat"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of its own, with a recipe, a corpus, and a run of one process."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "_toc.yml").touch()
    recipes = folder / "configs" / "train"
    recipes.mkdir(parents=True)
    for name, precision in (("small", "fp32"), ("half", "fp16")):
        text = RECIPE.replace("PRECISION", precision)
        (recipes / f"{name}.yaml").write_text(text)
    library = Path(os.__file__).parent
    for name in MODULES:
        place = folder / "source" / name / "__init__.py"
        place.parent.mkdir(parents=True)
        place.write_bytes((library / f"{name}.py").read_bytes())
    before = Path.cwd()
    os.chdir(folder)
    main(["small", "--device", "cpu", "--output-dir", "whole"])
    yield folder
    os.chdir(before)


def weights(folder):
    return {name: p.detach() for name, p in load_model(folder).named_parameters()}


def near(a, b):
    """The largest difference of two runs' weights."""
    a, b = weights(a), weights(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def losses(folder):
    log = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(9))  # once per step
    return [line["loss"] for line in log]


def child(rank, size, port, folder, arguments, fault, answers):
    """One rank, as torchrun would start it; `fault` is planted into it first."""
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if fault:
            fault(rank)
        main([*arguments, "--device", "cpu"])
        answers.put((rank, None, None))
    except BaseException as error:
        step = getattr(error, "step", None)
        answers.put((rank, type(error).__name__, step))
        answers.close()
        answers.join_thread()
        raise


def start(folder, *arguments, size=2, fault=None):
    """Run `size` ranks to their end; what each of them ended with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["albor.distributed", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    processes = [
        context.Process(
            target=child,
            args=(rank, size, port, folder, arguments, fault, answers),
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a rank hangs"
    found = [answers.get(timeout=9) for _ in range(answers.qsize())]
    return {rank: (name, step) for rank, name, step in found}


def test_two_make_the_run_of_one(project):
    assert start(project, "small", "--output-dir", "pair") == {
        0: (None, None),
        1: (None, None),
    }
    one, two = losses(project / "whole"), losses(project / "pair")
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    norms = [
        [line["grad_norm"] for line in read_jsonl(project / name / "metrics.jsonl")]
        for name in ("whole", "pair")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert near(project / "whole", project / "pair") < 1e-4
    assert one[-1] < one[0] - 0.5  # it has learned
    a, b = (read_json(project / n / "final_model.json") for n in ("whole", "pair"))
    assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)
    assert a["tokens"] == b["tokens"] == 9 * 10 * 24 and b["finished"]
    story = read_json(project / "pair" / "provenance.json")
    assert [session["processes"] for session in story["sessions"]] == [2]
    assert a.keys() == b.keys()


class Stop(Exception):
    """The plug is pulled."""


def stop_after_six(rank):
    """Every rank dies in its seventh step."""
    plain = Loss.forward
    seen = []

    def forward(self, ids, targets):
        seen.append(len(ids))
        if len(seen) * len(ids) > 6 * 5:
            raise Stop
        return plain(self, ids, targets)

    Loss.forward = forward


def test_saved_by_two_and_resumed_by_one(project):
    ends = start(project, "small", "--output-dir", "cut", fault=stop_after_six)
    assert ends[0][0] == ends[1][0] == "Stop"
    assert latest_state(project / "cut").name == "step-4"
    state = str(project / "cut" / "state" / "step-4")
    main(["small", "--device", "cpu", "--output-dir", "one", "--resume", state])
    assert near(project / "whole", project / "one") < 1e-4
    pairs = zip(losses(project / "whole"), losses(project / "one"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5
    story = read_json(project / "one" / "provenance.json")
    assert [one["start_step"] for one in story["sessions"]] == [0, 4]


def test_saved_by_one_and_resumed_by_two(project):
    state = str(project / "whole" / "state" / "step-8")
    start(project, "small", "--output-dir", "later", "--resume", state)
    assert near(project / "whole", project / "later") < 1e-4
    assert len(losses(project / "later")) == 9


def nan_on_rank_1(rank):
    """The loss of one rank is no number in the sixth step."""
    plain, seen = Loss.forward, []

    def forward(self, ids, targets):
        seen.append(len(ids))
        bad = rank == 1 and sum(seen[:-1]) == 5 * 5
        return plain(self, ids, targets) * (float("nan") if bad else 1)

    Loss.forward = forward


def test_what_is_not_finite_on_one_rank_ends_all_in_that_step(project):
    ends = start(project, "small", "--output-dir", "nan", fault=nan_on_rank_1)
    assert ends == {
        0: (NonFiniteError.__name__, 5),
        1: (NonFiniteError.__name__, 5),
    }
    assert latest_state(project / "nan").name == "step-4"
    assert not (project / "nan" / "final_model.json").exists()


def overflow_on_rank_1(rank):
    """The scaled gradient of one rank overflows in the third step, its loss not."""
    plain, seen = Loss.forward, []

    class Blow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def forward(self, ids, targets):
        seen.append(len(ids))
        loss = plain(self, ids, targets)
        return Blow.apply(loss) if rank and sum(seen[:-1]) == 2 * 5 else loss

    Loss.forward = forward
    setup.pick_precision = lambda wanted, target: "fp16"  # also on a CPU


def test_an_overflow_on_one_rank_is_skipped_by_all(project):
    ends = start(project, "half", "--output-dir", "half", fault=overflow_on_rank_1)
    assert ends == {0: (None, None), 1: (None, None)}
    log = read_jsonl(project / "half" / "metrics.jsonl")
    assert [line["step"] for line in log if line["grad_norm"] is None] == [2]
    assert log[2]["scale"] == log[1]["scale"] / 2


def die(rank):
    """Rank 1 is killed in its sixth step."""
    plain, seen = Loss.forward, []

    def forward(self, ids, targets):
        seen.append(len(ids))
        if rank == 1 and sum(seen) > 5 * 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, ids, targets)

    Loss.forward = forward


def test_a_rank_that_dies_ends_all_and_the_state_stays(project):
    ends = start(project, "small", "--output-dir", "died", fault=die)
    assert ends.keys() == {0} and ends[0][0] not in (None, "Stop")
    assert latest_state(project / "died").name == "step-4"
    assert not (project / "died" / "final_model.json").exists()


def test_refusals(project, capsys, monkeypatch):
    recipe = load_recipe("small")
    assert refuse_ranks(recipe, 5) == 2
    with pytest.raises(ConfigError, match=r"world size = 3: .*10 seq.*1, 2, 5 pro"):
        refuse_ranks(recipe, 3)
    for arguments, message in (
        (["small", "--output-dir", "whole"], "not empty"),
        (["nowhere"], "no such recipe"),
        (["small", "--output-dir", "whole", "--resume", "--seed", "3"], "seed 0"),
    ):
        with pytest.raises(SystemExit, match=f"refused: .*{message}"):
            main([*arguments, "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"refused: device = 'mps': .*not"):
        main(["small", "--output-dir", "other", "--device", "mps"])
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(SystemExit, match=r"refused: .*need [0-9,]+ bytes"):
            main(["small", "--output-dir", "other", "--device", "cpu"])
    assert not (project / "other").exists()
    assert start(project, "small", "--output-dir", "three", size=3) == {
        rank: ("SystemExit", None) for rank in range(3)
    }
    assert not (project / "three").exists()
    main(["small", "--device", "cpu", "--output-dir", "whole", "--resume"])
    assert "this run is finished" in capsys.readouterr().out


def test_torchrun_and_sigterm(project):
    """The command itself; a signal lets rank 0 finish its step and save."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "albor.distributed", "small"]
    command += ["--device", "cpu", "--output-dir", "stopped", "--max-steps", "400"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True
    )
    log = project / "stopped" / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 6:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    steps = [line["step"] for line in read_jsonl(log)]
    assert steps == list(range(len(steps))) and len(steps) < 400
    assert latest_state(project / "stopped").name == f"step-{len(steps)}"


def test_alone_without_torchrun():
    with joined("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert shared_loss(None, world) is None
