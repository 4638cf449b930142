"""The run: what it refuses, writes, survives, and hands to others."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from albor.artifacts import read_json, read_jsonl, sha256_file
from albor.checks import CheckError
from albor.config import ConfigError, project_path
from albor.provenance import verify
from albor.shards import DataError
from albor.sources import CorpusError

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "book" / "pretrain.md"
pytestmark = [
    pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive"),
    pytest.mark.filterwarnings("ignore:.*its writer was cut off"),
]

# All dimensions different; three micro-batches a step; a state after every fourth.
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
  train: {corpus}
  batch_size: 2
  seq_len: 24
optimizer:
  lr: 1.0e-2
  weight_decay: 0.1
training:
  epochs: 9
  max_steps: 14
  warmup_steps: 1
  gradient_accumulation: 3
  mixed_precision: {precision}
  save_interval: 4
  eval_interval: 6
"""
MODULES = ["bisect", "heapq", "textwrap", "queue", "sched", "cmd", "shlex", "stat"]


def cells():
    """Code and tags of the notebook's cells, from the text that it is made of."""
    notebook = jupytext.read(TEXT)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [(cell.source, cell.metadata.get("tags", [])) for cell in code]


def run(until=None, **parameters):
    """Run the cells as papermill does, without a kernel; return their variables.

    `until` ends it before the first cell in which that text stands.
    """
    values = {"__name__": "__main__"}
    for source, tags in cells():
        if until is not None and until in source:
            break
        exec(compile(source, "pretrain", "exec"), values)
        if "parameters" in tags:
            values.update(parameters)
    plt.close("all")
    return values


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project with a recipe and a corpus; we are in a folder of it."""
    (tmp_path / "_toc.yml").touch()
    (tmp_path / "book").mkdir()
    example = (ROOT / "book" / "example.py").read_text()
    (tmp_path / "book" / "example.py").write_text(example)
    recipes = tmp_path / "configs" / "train"
    recipes.mkdir(parents=True)
    for name, precision in (("small", "fp32"), ("half", "fp16")):
        text = RECIPE.format(corpus="source", precision=precision)
        (recipes / f"{name}.yaml").write_text(text)
    library = Path(os.__file__).parent
    for name in MODULES:
        place = tmp_path / "source" / name / "__init__.py"
        place.parent.mkdir(parents=True)
        place.write_bytes((library / f"{name}.py").read_bytes())
    monkeypatch.chdir(tmp_path / "book")
    return tmp_path


def files(folder):
    """Path, size and time of everything below a folder."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def weights(folder):
    return sha256_file(folder / "model.safetensors")


def test_a_run_and_its_folder(project, capsys):
    values = run(config="small", output_dir="runs/a")
    out = capsys.readouterr().out
    folder = project / "runs" / "a"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("model.safetensors", "config.json", "tokenizer.json", "state"),
        *("tokenizer_config.json", "final_model.json", "metrics.jsonl"),
        "provenance.json",
    }
    for path in folder.rglob("*"):
        if path.is_file():  # the closing table
            assert f"{path.stat().st_size:,}  {sha256_file(path)}" in out
    log = read_jsonl(folder / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(14))
    assert [i for i, line in enumerate(log) if "val_loss" in line] == [5, 11, 13]
    # Before the run, after step 0, before the states of steps 4, 8, 12 and 14.
    assert "guards: 6 full looks, " in out
    assert "step 14/14" in out and "tokens/s" in out and "left" in out

    final = read_json(folder / "final_model.json")
    assert final["steps"] == 14 and final["finished"] and final["seed"] == 0
    assert final["tokens"] == 14 * 6 * 24 and final["tensors"] == 20
    assert final["val_loss"] == values["val_loss"] < math.log(331)
    assert final["val_perplexity"] == math.exp(final["val_loss"])
    assert final["ln_vocabulary"] == math.log(331)
    assert final["val_unigram_entropy"] <= final["unigram_cross_entropy"]
    assert final["model_sha256"] == weights(folder)
    for number in (final["val_loss"], final["unigram_cross_entropy"]):
        assert f"{number:.3f}" in out

    story = read_json(folder / "provenance.json")
    assert story["recipe"]["training"]["max_steps"] == 14 and story["seed"] == 0
    assert story["corpus"]["digest"] and story["corpus"]["report"]["splits"]
    assert story["corpus"]["report"]["spec"] == "source"
    data = project / "data" / story["data"]
    checked = verify(folder / "provenance.json", tokenizer=folder, data=data)
    assert checked["shards"] == 2
    session = story["sessions"][0]
    assert session["versions"]["torch"] == version("torch")
    assert session["device"] == "cpu" and session["threads"] > 0
    assert str(project) not in json.dumps(story)


def test_a_run_that_a_guard_stops_leaves_no_folder(project, capsys):
    values = run(config="small", output_dir="runs/a", until="summary = train(")
    up = values["model"].model.layers[1].mlp.up_proj.weight
    up.data.copy_(values["model"].model.layers[0].mlp.up_proj.weight)
    with pytest.raises(
        CheckError, match=r"step 0: .*layers\.1\.mlp\.up.* one of its shape"
    ):
        values["guards"].begin()
    assert not (project / "runs").exists()


def test_what_was_made_is_llama_to_others(project):
    """Logits of `transformers` from the folder as it is; its tokenizer."""
    transformers = pytest.importorskip("transformers")
    values = run(config="small", output_dir="made")
    theirs = transformers.LlamaForCausalLM.from_pretrained(project / "made").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(project / "made")
    text = (project / "book" / "example.py").read_text()
    ids = values["tokenizer"].encode(text)[:90]
    assert tokenizer(text, add_special_tokens=False)["input_ids"][:90] == ids
    batch = torch.tensor([ids])
    with torch.no_grad():
        ours, reference = values["model"](batch), theirs(batch).logits
    assert (ours - reference).abs().max() < 1e-5 * reference.abs().max()


def test_the_same_again_and_another_seed(project):
    first = run(config="small", output_dir="a")
    run(
        config=str(project / "configs/train/small.yaml"),
        output_dir=str(project / "b"),
    )
    other = run(config="configs/train/small.yaml", output_dir="c", seed=5)
    assert (
        weights(project / "a") == weights(project / "b") != weights(project / "c")
    )
    assert first["tokens"] == other["tokens"]  # judged on the same text
    assert len(list((project / "data").iterdir())) == 1
    assert len(list((project / "models").iterdir())) == 1


def test_max_steps_keeps_the_share_of_the_warmup(project):
    values = run(config="small", output_dir="a", max_steps=28)
    log = read_jsonl(project / "a" / "metrics.jsonl")
    assert len(log) == 28 and values["recipe"].training.warmup_steps == 2
    assert log[0]["lr"] == 0.005 and log[-1]["lr"] == pytest.approx(0.001)


SLIPS = {
    "max_steps": [-1, 1.0, "10", True, None, 2**63, math.nan],
    "max_minutes": [-0.5, math.inf, math.nan, "1", False, None],
    "save_minutes": [-1, math.nan, "5", True, [5]],
    "seed": [-1, 0.0, "0", True, None],
    "config": [None, 3, "nowhere", "", "configs/train", "a\0b"],
    "corpus": [None, 5, True, ["a"], "no_such_package", "_toc.yml"],
    "output_dir": [None, 5, True, "_toc.yml", "_toc.yml/below"],
    "device": ["mps", "gpu", "cuda:99", None, 0],
    "precision": ["fp8", "float16", None, 16],
    "resume": [None, 1, 0, "", "nowhere", "source", ["x"]],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in SLIPS.items() for value in values],
)
def test_ill_typed_and_impossible_values_are_refused_before_work(
    project, name, value
):
    before = files(project)
    parameters = {"config": "small", "output_dir": "out"} | {name: value}
    with pytest.raises((ConfigError, CorpusError)) as caught:
        run(until="def choose_micro_batch", **parameters)
    message = str(caught.value)
    assert name in message and (repr(value) in message or str(value) in message)
    assert files(project) == before


@pytest.mark.parametrize(
    "name", ["max_step", "Seed", "_seed", "print", "In", "torch", "found", "time"]
)
def test_unknown_parameters_are_refused_first(project, name):
    """Before the imports of the notebook: torch need not even be there."""
    with pytest.raises(ConfigError, match=rf"{name} = .*: unknown.*max_steps"):
        run(until="import torch", **{name: 3})


def test_papermills_own_names_are_no_mistake(project):
    paths = {"PAPERMILL_INPUT_PATH": "x", "PAPERMILL_OUTPUT_PATH": "y"}
    run(until="import torch", **paths, _i3="what IPython keeps", _=5)


def test_a_folder_in_use_is_refused(project):
    (project / "full").mkdir()
    (project / "full" / "thesis.txt").write_text("mine")
    before = files(project)
    with pytest.raises(
        ConfigError, match=r"output_dir = 'full'.*not empty.*resume"
    ):
        run(config="small", output_dir="full")
    (project / "checkpoints" / "small").mkdir(parents=True)
    (project / "checkpoints" / "small" / "x").touch()
    assert before.items() <= files(project).items()


def test_resume_without_a_state_begins_at_the_beginning(project, capsys):
    (project / "a").mkdir()
    (project / "a" / "metrics.jsonl").write_text('{"step": 0}\n{"step"')
    run(config="small", output_dir="a", resume=True)
    out = capsys.readouterr().out
    assert "no saved state yet, so this run starts at step 0" in out
    run(config="small", output_dir="b")
    assert weights(project / "a") == weights(project / "b")
    log = read_jsonl(project / "a" / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(14))


def test_a_finished_run_is_left_alone(project, capsys):
    run(config="small", output_dir="a")
    before = files(project)
    capsys.readouterr()
    run(config="small", output_dir="a", resume=True)
    assert "finished, with 14 steps: nothing is done" in capsys.readouterr().out
    assert files(project) == before


@pytest.mark.parametrize("precision", ["small", "half"])
def test_stopped_by_the_clock_then_resumed(project, precision):
    run(config=precision, output_dir="whole")
    values = run(config=precision, output_dir="parts", max_minutes=1e-9)
    assert values["summary"].steps == 1 and not values["summary"].finished
    assert not read_json(project / "parts" / "final_model.json")["finished"]
    assert weights(project / "parts") != weights(project / "whole")
    values = run(config=precision, output_dir="parts", resume=True)
    assert values["start"] == 1 and values["summary"].finished
    assert read_json(project / "parts" / "final_model.json")["finished"]
    assert weights(project / "parts") == weights(project / "whole")
    sessions = read_json(project / "parts" / "provenance.json")["sessions"]
    assert [session["start_step"] for session in sessions] == [0, 1]


def test_resume_from_a_state_in_place_and_elsewhere(project):
    run(config="small", output_dir="a")
    state = project / "a" / "state" / "step-12"
    before = files(project / "a")
    values = run(config="small", output_dir="b", resume=str(state))
    assert values["start"] == 12 and files(project / "a") == before
    log = read_jsonl(project / "b" / "metrics.jsonl")
    assert [line["step"] for line in log] == list(range(14))
    assert weights(project / "a") == weights(project / "b")
    with pytest.raises(ConfigError, match="not empty"):
        run(config="small", output_dir="b", resume=str(state))
    (project / "a" / "final_model.json").unlink()
    values = run(config="small", resume="a/state/step-12")
    assert values["start"] == 12 and values["folder"] == project / "a"
    assert weights(project / "a") == weights(project / "b")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "seed 0, now 4"),
        ({"max_steps": 20}, "training.max_steps 14, now 20"),
        ({"config": "half"}, "save"),
        ({"precision": "bf16"}, "training.mixed_precision 'fp32', now 'bf16'"),
        ({"corpus": "json"}, "data.train 'source', now 'json'"),
    ],
)
def test_another_run_may_not_go_on(project, changes, words):
    run(config="small", output_dir="a", max_minutes=1e-9)
    before = files(project)
    if words == "save":  # what may differ: where and how often it saves
        assert run(**{"config": "half", "output_dir": "a", "resume": True})[
            "half"
        ] == ("fp32")
        return
    with pytest.raises(
        ConfigError, match=rf"resume = True.*{words}.*Give the same"
    ):
        run(**{"config": "small", "output_dir": "a", "resume": True} | changes)
    assert files(project) == before


def test_resume_on_a_machine_that_has_changed(project, capsys):
    run(config="small", output_dir="a", max_minutes=1e-9)
    run(config="small", output_dir="whole")
    (project / "source" / "new").mkdir()
    (project / "source" / "new" / "code.py").write_text("words = [str]\n" * 40)
    state = project / "a" / "state" / "step-1"
    values = run(config="small", output_dir="b", resume=str(state))
    assert weights(project / "b") == weights(project / "whole")  # its own data
    for path in values["tokens"].iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"the text found now is .*Restore data/"):
        run(config="small", output_dir="a", resume=True)
    (project / "source" / "new" / "code.py").unlink()
    capsys.readouterr()
    run(config="small", output_dir="a", resume=True)
    assert "they are made again" in capsys.readouterr().out
    assert weights(project / "a") == weights(project / "whole")


def test_memory_decides_the_micro_batch_and_a_resumed_run_keeps_it(
    project, monkeypatch
):
    from albor import hardware
    from albor.config import load_recipe, memory_estimate

    recipe = load_recipe("small")
    room = memory_estimate(recipe.model, 1, 24, "fp32")["total"] / 0.9 + 64
    values = run(config="small", output_dir="a", max_minutes=1e-9)
    assert values["micro_batch"] == 2
    monkeypatch.setattr(hardware, "free_memory", lambda device: int(room))
    values = run(config="small", output_dir="b", max_minutes=1e-9)
    assert values["micro_batch"] == 1
    monkeypatch.setattr(hardware, "free_memory", lambda device: None)
    assert run(config="small", output_dir="b", resume=True)["micro_batch"] == 1
    monkeypatch.setattr(hardware, "free_memory", lambda device: 1000)
    with pytest.raises(ConfigError, match="available_bytes"):
        run(config="small", output_dir="c")
    assert not (project / "c").exists()


def test_the_best_state_stays_and_a_small_disk_is_refused(project, monkeypatch):
    from albor.shapes import parameter_shapes
    from albor.states import best_state, disk_needed, val_losses

    values = run(config="small", output_dir="a")
    losses = val_losses(project / "a")  # saved after 4, 8, 12 and 14; judged at 12
    logged = {line["step"] + 1: line.get("val_loss") for line in values["log"]}
    assert losses == {step: logged[step] for step in (12, 14)}
    best = min((loss, step) for step, loss in losses.items())[1]
    assert best_state(project / "a").name == f"step-{best}"

    need = disk_needed(parameter_shapes(values["recipe"].model), keep=2)

    class Usage:
        free = need - 1

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(RuntimeError, match=rf"need {need:,} bytes.*output_dir"):
        run(config="small", output_dir="b")
    assert not (project / "b").exists()
    run(config="small", output_dir="a", resume=True)  # finished: it writes nothing


def test_fp16_recipe_on_a_cpu(project):
    """`auto` does what suits a CPU; asked for by name, fp16 is done."""
    values = run(until="def choose_micro_batch", config="half", output_dir="a")
    assert values["half"] in ("fp32", "bf16")
    values = run(config="half", output_dir="b", precision="fp16")
    assert values["half"] == "fp16" and values["summary"].finished
    assert {"scale", "grad_norm"} <= values["log"][0].keys()


def test_other_corpora(project):
    five = project / "five"
    five.mkdir()
    for i, name in enumerate(MODULES[:5]):
        (five / f"{name}.py").write_text(
            f"# {i}\n" + "def f(x):\n    return x\n" * 60
        )
    values = run(config="small", corpus="five", output_dir="a")
    assert values["summary"].finished
    values = run(config="small", corpus="json", output_dir="b", max_steps=3)
    report = values["about"]["report"]
    assert report["split_by"] == "file" and report["notes"]
    pair = os.pathsep.join(["json", str(five)])
    assert run(config="small", corpus=pair, output_dir="c")["summary"].finished


def test_corpora_that_cannot_be_used(project):
    (project / "empty").mkdir()
    with pytest.raises(CorpusError, match="0 usable"):
        run(config="small", corpus="empty", output_dir="a")
    (project / "little").mkdir()
    for name in "ab":
        text = f"{name} = 1  # {name * 60}\n"
        (project / "little" / f"{name}.py").write_text(text)
    with pytest.raises((ConfigError, DataError), match=r"rows|sequences"):
        run(config="small", corpus="little", output_dir="a")
    with pytest.raises(ConfigError, match=r"epochs.*max_steps = 100000"):
        run(config="small", output_dir="a", max_steps=100_000)
    assert not (project / "a").exists()


def test_recipe_keys_that_the_run_does_not_read(project):
    text = RECIPE.format(corpus="source", precision="fp32")
    path = project / "configs" / "train" / "other.yaml"
    for key in ("val: json", "input_column: code"):
        path.write_text(text.replace("  batch_size", f"  {key}\n  batch_size"))
        with pytest.raises(ConfigError, match=r"leave both keys out"):
            run(until="def choose_micro_batch", config="other", output_dir="a")


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_pretrain import run
print("ready", flush=True)
run(config="small", output_dir="killed", resume=True, max_steps=120)
"""


@pytest.mark.slow
def test_killed_at_random_and_resumed(project):
    """SIGKILL while the notebook runs; the end is that of a run left alone."""
    torch.set_num_threads(1)
    chance = random.Random(os.urandom(8))
    metrics = project / "killed" / "metrics.jsonl"
    (project / "killed").mkdir()
    for _ in range(2):
        before = metrics.stat().st_size if metrics.exists() else 0
        command = [sys.executable, "-W", "ignore", "-c", CHILD, str(ROOT / "tests")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        while not metrics.exists() or metrics.stat().st_size <= before:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(chance.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (project / "killed" / "final_model.json").exists()
    values = run(config="small", output_dir="killed", resume=True, max_steps=120)
    assert 0 < values["start"] < 120
    run(config="small", output_dir="whole", max_steps=120)
    assert weights(project / "killed") == weights(project / "whole")
    log = read_jsonl(metrics)
    assert [line["step"] for line in log] == list(range(120))


def papermill(folder, notebook, *options):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--log-output",
        "--no-progress-bar",
    ]
    return subprocess.run(
        [*command, str(notebook), "out.ipynb", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def notebook(tmp_path):
    """The notebook, made from its text."""
    path = tmp_path / "pretrain.ipynb"
    nbformat.write(jupytext.read(TEXT), path)
    return path


@pytest.mark.slow
def test_papermill_from_any_folder(project, notebook, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    recipe = (project / "configs" / "train" / "small.yaml").read_text()
    recipe = recipe.replace("train: source", f"train: {project / 'source'}")
    (folder / "mine.yaml").write_text(recipe)
    (folder / "_toc.yml").touch()
    (folder / "book").mkdir()
    (folder / "book" / "example.py").write_text("def f():\n    if 1: pass\n")
    options = ["-p", "config", "mine.yaml", "-p", "output_dir", "made"]
    done = papermill(project / "book", notebook, "--cwd", str(folder), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 14/14" in done.stdout + done.stderr  # live progress
    assert read_json(folder / "made" / "final_model.json")["finished"]
    record = nbformat.read(project / "book" / "out.ipynb", as_version=4)
    assert "injected-parameters" in str(record.cells)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "max_step", "5"], "max_step = 5: unknown"),
        (
            ["-p", "max_steps", "ten"],
            "max_steps = 'ten' (str): give a whole number",
        ),
    ],
)
def test_papermill_with_a_slip(project, notebook, options, message):
    done = papermill(project, notebook, "-p", "output_dir", "made", *options)
    assert done.returncode != 0 and message in done.stderr
    assert not (project / "made").exists()


def test_help_lists_the_parameters(notebook):
    """papermill reads names and comments of the parameters' cell."""
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(notebook)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in SLIPS:
        assert f"  {name}: " in textwrap.dedent(done.stdout)


def test_the_recipe_of_the_project_is_the_default(monkeypatch):
    """Under ALBOR_TEST, or without a GPU, `auto` is pretrain-small."""
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("ALBOR_TEST", "1")
    values = run(until="def choose_micro_batch")
    assert values["recipe"].name == "pretrain-small"
    assert values["folder"] == Path(values["scratch"].name)
    steps = {}
    for mode in ("1", "short"):
        monkeypatch.setenv("ALBOR_TEST", mode)
        steps[mode] = run(until="def choose_micro_batch")[
            "recipe"
        ].training.max_steps
    assert steps == {"1": 900, "short": 60}, "only among tests is the run cut short"
    monkeypatch.setenv("ALBOR_TEST", "0")
    monkeypatch.chdir(ROOT.parent)
    values = run(until='with stage("checks")')
    newest = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: newest)
    recipe, _ = values["this_run"](torch.device("cuda"))
    assert recipe.name == "pretrain-350m-cuda-test"
    assert values["home"] == ROOT
    assert project_path("x") == ROOT.parent / "x"


# ----------------------------------------------------------- token rows of others


def table_recipe(project, **data):
    """The small recipe with other keys in `data`, under the name "rows"."""
    text = RECIPE.format(corpus="rows.parquet", precision="fp32")
    lines = "".join(f"  {key}: {value}\n" for key, value in data.items())
    text = text.replace("  seq_len", f"{lines}  seq_len")
    (project / "configs" / "train" / "rows.yaml").write_text(text)


def test_token_rows_need_all_three_files(project):
    table_recipe(project, val="held.parquet", tokenizer="runs/a")
    with pytest.raises(
        ConfigError, match=r"data.train = 'rows.parquet': not there"
    ):
        run(config="rows", until="def choose_micro_batch")


def test_a_run_on_token_rows(project):
    """The same tokens from Parquet give the same run as from text."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    first = run(config="small", output_dir="runs/a")
    for name in ("train", "val"):
        stream = first[f"{name}_tokens"]
        ids = stream.read(0, len(stream)).tolist()
        table = arrow.table(
            {"input_ids": arrow.array([ids], arrow.list_(arrow.int32()))}
        )
        parquet.write_table(table, project / f"{name}.parquet")
    (project / "train.parquet").rename(project / "rows.parquet")
    rows = {
        "val": "val.parquet",
        "tokenizer": "runs/a",
        "input_column": "input_ids",
    }
    table_recipe(project, **rows)
    second = run(config="rows", output_dir="runs/b")
    assert len(second["train_tokens"]) == len(first["train_tokens"])
    assert weights(project / "runs" / "a") == weights(project / "runs" / "b")
    third = run(config="rows", output_dir="runs/b", resume=True)
    assert third["start"] == third["recipe"].training.max_steps


def test_a_run_that_learns_to_infill(project):
    """Samples fill rows of their own, and the recipe's keys reach the data."""
    text = RECIPE.format(corpus="source", precision="fp32")
    keys = "  fim_rate: 0.7\n  fim_style: spm\n  upsample: 2\n  seq_len"
    path = project / "configs" / "train" / "infill.yaml"
    path.write_text(text.replace("  seq_len", keys))
    values = run(config="infill", output_dir="runs/a")
    inputs = values["train_tokens"].meta["inputs"]
    assert (inputs["fim_rate"], inputs["style"], inputs["row_tokens"]) == (
        0.7,
        "spm",
        25,
    )
    assert values["train_tokens"].meta["splits"]["train"]["samples"] > 20
    assert values["batches"].stride == 25 and len(values["train_tokens"]) % 25 == 0
    val = values["val_tokens"].read(0, len(values["val_tokens"]))
    assert set(val.tolist()) & set(range(7)) == {2}, "held-out text is as it is"
