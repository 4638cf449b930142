"""The evaluation job: what it refuses, what it records, and how it goes on."""

import gzip
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import tokenizers

import albor.completion
from albor.artifacts import read_json, read_jsonl, sha256_file
from albor.completion import complete_batch
from albor.config import ConfigError
from albor.corpus import build_corpus
from albor.data import prepare
from albor.fim import infill_prompt
from albor.likelihood import LikelihoodError, perplexity, to_stream
from albor.model import Albor
from albor.problems import STOPS, ProblemError, read_problems
from albor.shapes import ModelConfig
from albor.shards import DataError, TokenStream
from albor.tokenizer import EOS, Tokenizer
from albor.weights import CheckpointError, load_model, save_model

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "book" / "evaluate.md"
pytestmark = [
    pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive"),
    pytest.mark.filterwarnings("ignore:.*its writer was cut off"),
]
SHAPE = ModelConfig(  # all dimensions different
    vocab_size=331,
    hidden_size=18,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    max_position_embeddings=700,
    initializer_range=0.3,
)
QUICK = {"limit": 2, "max_new_tokens": 5, "device": "cpu"}
SETS = ("python-intermediate", "infilling")


def run(**parameters):
    """Run the cells as papermill does, without a kernel; return their variables."""
    values = {"__name__": "__main__"}
    for cell in jupytext.read(TEXT).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "evaluate", "exec"), values)
            if "parameters" in cell.metadata.get("tags", []):
                values.update(parameters)
    plt.close("all")
    return values


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with our problems, text in two packages, and a checkpoint."""
    (tmp_path / "_toc.yml").touch()
    shutil.copytree(ROOT / "evals", tmp_path / "evals")
    for name in ("heapq", "queue"):
        place = tmp_path / "source" / name / "__init__.py"
        place.parent.mkdir(parents=True)
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), place)
    texts = [path.read_text() for path in sorted(tmp_path.rglob("*.py"))]
    tokenizer = Tokenizer.train(texts, vocab_size=300)
    save_model(tmp_path / "made", Albor(SHAPE, seed=5), tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------- the record


def test_a_run_and_its_record(project, capsys):
    run(checkpoint="made", val="source", seq_len=90, **QUICK)
    found = read_json(project / "made" / "evaluation" / "results.json")
    weights = sha256_file(project / "made" / "model.safetensors")
    assert found["weights"] == found["settings"]["weights"] == weights
    assert datetime.fromisoformat(found["date"]).tzinfo is not None
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["python"] == platform.python_version()
    assert found["device"] == "cpu"
    wanted = {"n": 1, "limit": 2, "temperature": 0.0, "seed": 0, "timeout": 5.0}
    wanted |= {"precision": "fp32", "max_new_tokens": 5, "batch_size": 16}
    assert wanted.items() <= found["settings"].items()

    model, tokenizer = load_model("made"), Tokenizer.load("made")
    assert found["settings"]["tokenizer"] == tokenizer.digest
    files = sorted(project.glob("source/*/*.py"))
    stream = to_stream(tokenizer, [path.read_text() for path in files])
    again = perplexity(model, tokenizer, stream, 90).record()
    text = found["perplexity"].pop("text")
    assert found["perplexity"] == again and text["files"] == 2
    for name in SETS:
        lines = read_jsonl(project / f"made/evaluation/{name}_results.jsonl")
        problems = list(read_problems(project / f"evals/{name}.jsonl").values())[:2]
        assert [line["task_id"] for line in lines] == [p.task_id for p in problems]
        mean = sum(line["passed"] for line in lines) / 2
        assert found["problems"][name]["pass@1"]["value"] == mean
        if name == "python-intermediate":  # the figures are of what is written
            how = {"max_new_tokens": 5, "stop": STOPS}
            prompts = [p.prompt for p in problems]
            written = complete_batch(model, tokenizer, prompts, **how)
            assert [x["completion"] for x in lines] == [x.text for x in written]
    assert "HumanEval                not measured" in capsys.readouterr().out


def test_what_was_not_asked_is_not_measured(project):
    run(checkpoint="made", problems="evals/infilling.jsonl", **QUICK)
    found = read_json(project / "made" / "evaluation" / "results.json")
    assert found["perplexity"] is None and [*found["problems"]] == ["infilling"]


def test_a_prepared_folder(project):
    tokenizer = Tokenizer.load("made")
    corpus = build_corpus(str(project / "source"), val_bytes=9000)
    folder = prepare(corpus, tokenizer, project / "data")
    run(checkpoint="made", val=f"data/{folder.name}", seq_len=80, **QUICK)
    found = read_json(project / "made/evaluation/results.json")["perplexity"]
    assert found.pop("text") == {"prepared": folder.name}
    stream = TokenStream.open(folder, "val")
    model = load_model("made")
    assert found == perplexity(model, tokenizer, stream, 80).record()


def test_bf16_is_near_and_said(project):
    losses = {}
    for precision in ("fp32", "bf16"):
        how = {"checkpoint": "made", "output_dir": precision, "val": "source"}
        run(**how, seq_len=400, precision=precision, **QUICK)
        found = read_json(project / precision / "results.json")
        assert found["settings"]["precision"] == precision
        losses[precision] = found["perplexity"]["loss"]
    assert 0 < abs(losses["bf16"] - losses["fp32"]) < 0.05


def test_right_completions_pass(project, monkeypatch):
    """Prompts, order of the gap, stops and draws; and that a score can be 1."""
    tokenizer, known, rows = Tokenizer.load("made"), {}, []
    for name in SETS:
        for p in read_problems(project / f"evals/{name}.jsonl").values():
            prompt = [EOS, *tokenizer.encode(p.prompt)]
            if p.suffix is not None:
                prompt = infill_prompt(tokenizer, p.prompt, p.suffix)
            known[tuple(prompt)] = p

    def oracle(model, tokenizer, prompts, *, stop, **how):
        problems = [known[tuple(prompt)] for prompt in prompts]
        assert stop == (STOPS if problems[0].suffix is None else ())
        rows.extend(how["rows"])
        return [SimpleNamespace(text=p.canonical_solution) for p in problems]

    monkeypatch.setattr(albor.completion, "complete_prompts", oracle)
    how = {"n": 2, "k": "1,2", "temperature": 0.8}
    run(checkpoint="made", **how, **QUICK | {"limit": 3})
    found = read_json(project / "made" / "evaluation" / "results.json")
    for name in SETS:
        for key in ("pass@1", "pass@2"):
            assert found["problems"][name][key]["value"] == 1
    assert found["problems"]["infilling"]["exact"]["value"] == 1
    assert sorted(rows) == sorted([*range(6)] * 2)  # each draw its own


def test_a_gzipped_file_and_a_prompt_without_room(project):
    value = {"task_id": "HumanEval/0", "prompt": "x = 1  # " + "word " * 900}
    value |= {"entry_point": "f", "canonical_solution": "", "test": "x"}
    more = {**value, "task_id": "HumanEval/1", "prompt": "def f(x):\n    return 1#"}
    more["test"] = "def check(f):\n    pass"
    with gzip.open(project / "HumanEval.jsonl.gz", "wt") as file:
        file.write(f"{json.dumps(value)}\n{json.dumps(more)}\n")
    run(checkpoint="made", problems="HumanEval.jsonl.gz", max_new_tokens=3)
    lines = read_jsonl("made/evaluation/HumanEval_results.jsonl")
    assert lines[0]["completion"] == "" and not lines[0]["passed"]
    assert lines[1]["completion"] != "" and len(lines) == 2


# --------------------------------------------------------------------- going on


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_killed_evaluation_goes_on(project, kept):
    how = {"checkpoint": "made", "n": 2, "temperature": 0.8, **QUICK}
    run(**how, output_dir="whole")
    run(**how, output_dir="part", batch_size=1)  # the same, one by one
    for name in SETS:
        whole = (project / f"whole/{name}_results.jsonl").read_bytes()
        part = project / f"part/{name}_results.jsonl"
        assert part.read_bytes() == whole
        lines = whole.splitlines(keepends=True)
        assert len(lines) == 4
        part.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])  # torn
    run(**how, output_dir="part")
    for name in SETS:
        whole = (project / f"whole/{name}_results.jsonl").read_bytes()
        assert (project / f"part/{name}_results.jsonl").read_bytes() == whole
    with pytest.raises(ProblemError, match="seed 0, now 1"):
        run(**how, output_dir="part", seed=1)
    save_model("made", Albor(SHAPE, seed=6), Tokenizer.load("made"))
    with pytest.raises(ProblemError, match="begun with weights"):
        run(**how, output_dir="part")


# ---------------------------------------------------------------------- refusals

SLIPS = [
    ({"temprature": 0.5}, "temprature = 0.5: unknown; there are checkpoint"),
    ({"n": "3"}, r"n = '3' \(str\): give a whole number from 1"),
    ({"n": True}, r"n = True \(bool\): give a whole number"),
    ({"n": 0}, "n = 0: give a whole number from 1"),
    ({"n": 5}, "n = 5, temperature = 0: all samples would be the same"),
    ({"k": "1,10", "n": 5}, "n = 5: give n from 1, and no k above it"),
    ({"k": "1;2"}, "k = '1;2': give .*numbers from 1"),
    ({"temperature": math.nan}, "temperature = nan"),
    ({"temperature": -1.0}, "temperature = -1.0"),
    ({"top_p": 0}, "top_p = 0: give a number: more than 0, up to 1"),
    ({"top_p": 2.0}, "top_p = 2.0: give a number: more than 0, up to 1"),
    ({"timeout": 0}, "timeout = 0: give a number: more than 0"),
    ({"batch_size": 0}, "batch_size = 0: give a whole number from 1"),
    ({"max_new_tokens": 0}, "max_new_tokens = 0: give a whole number from 1"),
    ({"allow_unisolated": 1}, r"allow_unisolated = 1 \(int\): give True or False"),
    ({"device": "gpu"}, "device = 'gpu': unknown"),
    ({"precision": "fp16"}, "precision = 'fp16': give fp32 or bf16"),
    ({"checkpoint": "nowhere"}, "nowhere has no config.json, model.safetensors"),
    ({"checkpoint": "source"}, "checkpoint = 'source': .*has no config.json"),
    ({"problems": "nope.jsonl"}, "cannot read .*nope.jsonl"),
    ({"problems": "source/queue/__init__.py"}, "__init__.py, line 1"),
    ({"problems": f"made/a.jsonl{os.pathsep}made/a.jsonl"}, "made/a.jsonl"),
    ({"val": "nowhere"}, "val = 'nowhere': neither meta.json nor Python"),
    ({"val": "binary.py"}, "binary.py is no UTF-8"),
]


@pytest.mark.parametrize(("slip", "message"), SLIPS)
def test_slips(project, slip, message):
    (project / "binary.py").write_bytes(b"x = '\xff'\n")
    errors = (ConfigError, ProblemError, LikelihoodError, DataError)
    with pytest.raises(errors, match=message):
        run(**{"checkpoint": "made"} | slip)
    assert not (project / "made" / "evaluation").exists()


def test_two_files_of_one_name(project):
    shutil.copytree("evals", "copy")
    both = os.pathsep.join(["evals/infilling.jsonl", "copy/infilling.jsonl"])
    with pytest.raises(ConfigError, match="two files named infilling"):
        run(checkpoint="made", problems=both)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_checkpoint(project, name):
    path = project / "made" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=name):
        run(checkpoint="made")


def test_a_tokenizer_of_another_family(project):
    backend = tokenizers.ByteLevelBPETokenizer()
    texts = [path.read_text() for path in project.glob("source/*/*.py")]
    backend.train_from_iterator(texts, 300, special_tokens=["<|endoftext|>"])
    backend.save("made/tokenizer.json")
    with pytest.raises(ConfigError, match=r"'made': (?s:.*)likelihood\.judge"):
        run(checkpoint="made")


def test_the_data_of_another_tokenizer(project):
    other = Tokenizer.train(["import os\n" * 9], vocab_size=264)
    corpus = build_corpus(str(project / "source"), val_bytes=9000)
    folder = prepare(corpus, other, project / "data")
    with pytest.raises(DataError, match="tokenizer of this model"):
        run(checkpoint="made", val=str(folder))


# ------------------------------------------------------------------- as a program


def papermill(folder, *options):
    """Run the notebook, made from its text, in a process of its own."""
    nbformat.write(jupytext.read(TEXT), folder / "evaluate.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    return subprocess.run(
        [*command, "evaluate.ipynb", "out.ipynb", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_papermill(project):
    options = ["-p", "checkpoint", "made", "-p", "limit", "1", "-p", "n", "2"]
    options += ["-p", "temperature", "0.8", "-p", "k", "1,2"]
    done = papermill(project, *options, "-p", "max_new_tokens", "4")
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_json(project / "made" / "evaluation" / "results.json")
    assert {"pass@1", "pass@2"} <= found["problems"]["infilling"].keys()


@pytest.mark.slow
def test_papermill_with_a_slip(project):
    done = papermill(project, "-p", "checkpoint", "made", "-p", "sed", "1")
    assert done.returncode != 0 and "sed = 1: unknown" in done.stderr
    assert not (project / "made" / "evaluation").exists()
