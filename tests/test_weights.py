"""The model's folder: strangers load it, we load theirs, and faults are named."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from albor.config import project_path
from albor.model import Albor
from albor.shapes import ModelConfig, parameter_shapes
from albor.step import count_copies
from albor.tokenizer import Tokenizer
from albor.weights import (
    CheckpointError,
    hf_config,
    load_model,
    refuse_nonfinite,
    save_model,
)

SHAPE = ModelConfig(  # no two dimensions are equal, and no default is used
    vocab_size=301,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    rms_norm_eps=3e-4,
    rope_theta=5000.0,
    initializer_range=0.3,
)
EXAMPLE = project_path("book/example.py").read_text()
IDS = torch.randint(301, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return Albor(SHAPE, seed=7)


@pytest.fixture
def folder(tmp_path, model):
    save_model(tmp_path / "model", model)
    return tmp_path / "model"


def rewrite(folder, **changes):
    """Change `config.json`; a value of ... removes the key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(config))


@torch.no_grad()
def logits(model):
    found = model(IDS)
    return getattr(found, "logits", found)


def close(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


# ------------------------------------------------------------------- round trips


def test_transformers_loads_the_folder_with_no_conversion(folder, model):
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(theirs) is transformers.LlamaForCausalLM
    assert theirs.config.rope_parameters["rope_theta"] == 5000.0
    assert theirs.config.rms_norm_eps == 3e-4 and theirs.config.head_dim == 10
    assert theirs.lm_head.weight.data_ptr() == (
        theirs.model.embed_tokens.weight.data_ptr()
    )
    assert close(logits(model), logits(theirs))


def test_the_file_holds_every_tensor_once_in_float32(folder, model):
    tensors = load_file(folder / "model.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == parameter_shapes(
        SHAPE
    )
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(tensors[name], p)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["pad_token_id"] == 3 and config["tie_word_embeddings"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_our_own_load_gives_the_same_logits(folder, model):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == SHAPE
    assert torch.equal(logits(loaded), logits(model))
    loaded.loss(IDS[:, :-1], IDS[:, 1:]).backward()  # and it can be trained on
    assert all(p.grad is not None for p in loaded.parameters())
    shutil.rmtree(folder)  # the weights live in memory, not in the file
    assert torch.equal(logits(loaded), logits(model))


def test_what_transformers_writes_comes_back(tmp_path, folder, model):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(load_model(tmp_path / "theirs")), logits(model))


def test_a_foreign_llama_with_defaults_of_its_own(tmp_path):
    """Keys that its writer left out mean what they mean to transformers."""
    config = transformers.LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    left_out = (
        "rms_norm_eps",
        "rope_parameters",
        "head_dim",
        "num_key_value_heads",
    )
    rewrite(tmp_path, **dict.fromkeys(left_out, ...))
    loaded = load_model(tmp_path)
    assert loaded.config.rms_norm_eps == 1e-6
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert close(loaded(ids), theirs(ids).logits)


def test_a_configuration_in_the_words_of_transformers_4(folder, model):
    rewrite(folder, rope_parameters=..., dtype=..., head_dim=10, pretraining_tp=1)
    assert torch.equal(logits(load_model(folder)), logits(model))
    rewrite(folder, rope_theta=..., rope_parameters={"rope_theta": 5000.0})
    assert torch.equal(logits(load_model(folder)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(folder, dtype):
    path = folder / "model.safetensors"
    halves = {n: t.to(dtype) for n, t in load_file(path).items()}
    save_file(halves, path, {"format": "pt"})
    loaded = load_model(folder)
    for name, p in loaded.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, halves[name].float())


def test_equal_weights_give_equal_bytes_in_every_process(tmp_path, folder, model):
    original = (folder / "model.safetensors").read_bytes()
    for _ in range(
        8
    ):  # the library's own order of metadata changes from call to call
        save_model(tmp_path / "again", model)
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == original
    code = (
        "import sys; from albor.weights import load_model, save_model; "
        "save_model(sys.argv[2], load_model(sys.argv[1]))"
    )
    other = [sys.executable, "-c", code, str(folder), str(tmp_path / "other")]
    subprocess.run(other, check=True, env=os.environ | {"PYTHONHASHSEED": "77"})
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == original


def test_the_tokenizer_travels_along(tmp_path, model):
    tokenizer = Tokenizer.train([EXAMPLE], vocab_size=290)
    save_model(tmp_path, model, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(y):\n\treturn y + 1  # </s>\n"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(
        text
    )
    assert Tokenizer.load(tmp_path).digest == tokenizer.digest


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    small = ModelConfig(265, 12, 20, 1, 2, 1, 8)
    tokenizer = Tokenizer.train(["a b a b c d c d"] * 9, vocab_size=267)
    with pytest.raises(
        CheckpointError, match=f"{tokenizer.vocab_size} entries.* 265"
    ):
        save_model(tmp_path, Albor(small, seed=0), tokenizer)
    assert not list(tmp_path.iterdir())


def test_no_pickle_anywhere(tmp_path, model, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("torch.save", "torch.load", "pickle.dump", "pickle.dumps"):
        monkeypatch.setattr(name, forbidden)
    monkeypatch.setattr("pickle.load", forbidden)
    monkeypatch.setattr("pickle.loads", forbidden)
    save_model(tmp_path, model)
    load_model(tmp_path)


# -------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_dropout": 0.1},
        {"hidden_act": "gelu"},
        {"model_type": "qwen2"},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_scaling": {"type": "dynamic"}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 4999.0}},
        {"partial_rotary_factor": 0.5},
        {"sliding_window": 8},
        {"quantization_config": {"bits": 4}},
        {"logit_scale": 2.0},
        {"vocab_size": ...},
        {"hidden_size": "48"},
        {"hidden_size": 48.5},
        {"num_key_value_heads": 4},
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_model(folder)
    key = next(iter(changes))
    inner = changes[key] if isinstance(changes[key], dict) else {}
    assert any(word in str(caught.value) for word in (key, *inner))


def test_empty_unknown_keys_are_harmless(folder, model):
    rewrite(
        folder, sliding_window=None, some_flag=False, quirks={}, _name_or_path="x"
    )
    assert torch.equal(logits(load_model(folder)), logits(model))


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "null", '{"a": NaN}'])
def test_a_broken_configuration_is_refused(folder, text):
    path = folder / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


# --------------------------------------------------------------------- tensors


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(DOWN), f"{DOWN} is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra is unknown"),
        (
            lambda t: t.update({DOWN: t[DOWN].T.contiguous()}),
            r"\(48, 80\).*\(80, 48\)",
        ),
        (lambda t: t.update({NORM: t[NORM].double()}), "F64"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), "I8"),
        (lambda t: t[DOWN].__setitem__((0, 0), float("nan")), f"1 of 3840.*{DOWN}"),
        (lambda t: t[NORM].fill_(float("inf")), f"48 of 48.*{NORM}"),
        (lambda t: t.update({HEAD: t[EMBED] + 1e-3}), "lm_head.weight is not"),
        (lambda t: t.clear(), "and 23 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, message):
    changed(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "model.safetensors" in str(caught.value)


def test_an_equal_head_is_accepted_and_a_missing_one_is_not(folder, model):
    changed(folder, lambda t: t.update({HEAD: t[EMBED].clone()}))
    for tied in (True, False):
        rewrite(folder, tie_word_embeddings=tied)
        assert torch.equal(logits(load_model(folder)), logits(model))
    changed(folder, lambda t: t.pop(HEAD))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load_model(folder)
    rewrite(folder, tie_word_embeddings=...)  # to Llama, no key means untied
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load_model(folder)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.integers(0, 7), st.booleans())
def test_no_damaged_byte_and_no_lost_end_goes_unseen(
    tmp_path_factory, at, bit, cut
):
    folder = tmp_path_factory.mktemp("damage")
    save_model(folder, Albor(SHAPE, seed=7))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = min(int(at * len(content)), len(content) - 1)
    if cut:
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << bit
        path.write_bytes(content)
    try:
        loaded = load_model(folder)
    except CheckpointError:
        return
    # What is accepted must be sound: a flip in the name of the metadata, say.
    assert not cut
    assert torch.equal(logits(loaded), logits(Albor(SHAPE, seed=7)))


@pytest.mark.parametrize(
    "other", ["pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_a_folder_with_weights_of_another_kind_says_what_is_read(folder, other):
    (folder / "model.safetensors").rename(folder / other)
    with pytest.raises(
        CheckpointError, match="never in shards, and never as a pickle"
    ):
        load_model(folder)


# ------------------------------------------------------------------------ disks


def test_a_device_is_asked_once_whether_all_is_finite():
    here = {"a": torch.zeros(3), "b": torch.zeros(5), "c": torch.zeros(7)}
    there = {name: tensor.to("meta") for name, tensor in here.items()}
    asked = count_copies(lambda: refuse_nonfinite(there, "step 3"))
    assert (asked.up, asked.down) == (0, 1)
    refuse_nonfinite(here, "step 3")
    here["c"][2:4] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(CheckpointError, match="step 3: 2 of 7 values of c are"):
        refuse_nonfinite(here, "step 3")


def test_a_model_that_is_not_finite_is_not_saved(folder, model):
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.model.norm.weight[2] = float("nan")
    with pytest.raises(CheckpointError, match=r"1 of 48 values of model\.norm"):
        save_model(folder, model)
    assert (folder / "model.safetensors").read_bytes() == before


FULL = """
import resource, sys
from albor.weights import *
model = load_model(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_model(sys.argv[1], model)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_up_leaves_the_old_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    run = [sys.executable, "-c", FULL, str(folder)]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert "bytes are needed" in printed and "make room" in printed
    assert (folder / "model.safetensors").read_bytes() == before
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_too_little_room_is_seen_before_anything_is_written(
    tmp_path, model, monkeypatch
):
    class Usage:
        free = 1234

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(
        CheckpointError, match=r"\d{3},\d{3} bytes are needed, 1,234"
    ):
        save_model(tmp_path / "new", model)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(30, "Read-only file system"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path, model, monkeypatch, error
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(CheckpointError, match=f"{error.strerror}.*writable"):
        save_model(tmp_path / "new", model)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, model):
    (tmp_path / "model").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write .*model"):
        save_model(tmp_path / "model", model)


def test_a_linked_folder_is_written_through(tmp_path, model):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_model(tmp_path / "link", model)
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(logits(load_model(tmp_path / "real")), logits(model))
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="nowhere"):
        save_model(tmp_path / "nowhere", model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_saved_the_same(tmp_path, folder, model):
    save_model(tmp_path / "gpu", model.cuda())
    first, second = (f / "model.safetensors" for f in (folder, tmp_path / "gpu"))
    assert first.read_bytes() == second.read_bytes()


def test_the_original_lie_is_not_in_our_layout():
    """Inputs first or outputs first: the file's rows are outputs (ALB-037)."""
    shapes = parameter_shapes(SHAPE)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (80, 48)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (20, 48)
    assert hf_config(SHAPE)["intermediate_size"] == 80
