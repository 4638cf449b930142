"""The size of a model: shapes, counts, refusals, memory."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albor.model import Albor
from albor.shapes import (
    PRESETS,
    ConfigError,
    ModelConfig,
    build_model,
    count_parameters,
    memory_estimate,
    parameter_shapes,
)

ODD = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=136,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
)


@st.composite
def shapes(draw):
    shared = draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 65536)),
        hidden_size=draw(st.integers(1, 500)),
        intermediate_size=draw(st.integers(1, 500)),
        num_hidden_layers=draw(st.integers(1, 9)),
        num_attention_heads=shared * draw(st.integers(1, 4)),
        num_key_value_heads=shared,
        head_dim=2 * draw(st.integers(1, 40)),
        max_position_embeddings=draw(st.integers(1, 4096)),
    )


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("albor-tiny", 195_392, 20),
        ("albor-50m", 62_403_072, 110),
        ("albor-base-350m", 398_509_056, 218),
    ],
)
def test_presets_have_the_sizes_of_the_original(name, parameters, tensors):
    assert count_parameters(PRESETS[name]) == parameters
    assert len(parameter_shapes(PRESETS[name])) == tensors


@given(shapes())
def test_count_follows_the_formula(config):
    V, D, F = config.vocab_size, config.hidden_size, config.intermediate_size
    H, K, Dh = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    block = 2 * D + 2 * D * H * Dh + 2 * D * K * Dh + 3 * D * F
    L = config.num_hidden_layers
    assert count_parameters(config) == V * D + L * block + D
    assert len(parameter_shapes(config)) == 2 + 9 * L


def test_shapes_are_those_of_the_built_model_in_the_order_of_the_original():
    built = {name: tuple(p.shape) for name, p in Albor(ODD).named_parameters()}
    assert built == parameter_shapes(ODD)
    names = list(parameter_shapes(ODD))
    assert names[:4] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ]
    order = [name.split(".")[-2] for name in names[4:11]]
    assert order == [
        *["q_proj", "k_proj", "v_proj", "o_proj"],
        *["gate_proj", "up_proj", "down_proj"],
    ]
    assert names[11].startswith("model.layers.1.")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_key_value_heads", 4, "must divide the 6 heads"),
        ("num_key_value_heads", 12, "must divide the 6 heads"),
        ("head_dim", 7, "even"),
        ("head_dim", -2, "at least 0"),
        ("vocab_size", 65537, "at most 65536"),
        ("vocab_size", 0, "at least 1"),
        ("hidden_size", -48, "at least 1"),
        ("hidden_size", "48", "write 48"),
        ("hidden_size", 48.0, "write 48"),
        ("num_hidden_layers", True, "bool"),
        ("num_hidden_layers", None, "NoneType"),
        ("rms_norm_eps", "1e-5", "write 1.0e-5"),
        ("rms_norm_eps", 0.0, "at least 1e-12"),
        ("rope_theta", math.inf, "finite"),
        ("rope_theta", math.nan, "finite"),
        ("rope_theta", "10000", "write 10000.0"),
        ("initializer_range", [0.02], "list"),
    ],
)
def test_impossible_sizes_are_refused_by_name_value_and_mend(field, value, words):
    with pytest.raises(ConfigError) as refused:
        replace(ODD, **{field: value})
    message = str(refused.value)
    assert message.startswith(f"{field} = {value!r}: ") and words in message, (
        message
    )


def test_head_dim_is_derived_only_when_it_can_be():
    sizes = {"hidden_size": 48, "head_dim": 0}
    assert replace(ODD, **sizes).head_dim == 8
    with pytest.raises(
        ConfigError, match=r"num_attention_heads = 10.*give head_dim"
    ):
        replace(ODD, **sizes, num_attention_heads=10)
    with pytest.raises(ConfigError, match="head_dim = 3"):  # derived, and odd
        replace(ODD, **sizes, num_attention_heads=16)


@pytest.mark.parametrize(
    ("raw", "start", "words"),
    [
        ({"preset": "albor-tinny"}, "model.preset", "did you mean albor-tiny?"),
        ({"preset": None}, "model.preset = None", "known: albor-50m"),
        ({"preset": []}, "model.preset = []", "known: albor-50m"),
        ({}, "model = {}", "preset"),
        (None, "model = None", "preset"),
        ({"preset": "albor-tiny", "layers": 3}, "model = ", "either"),
        ({"architecture": None}, "model.architecture", "keys"),
        (
            {"architecture": {"num_kv_heads": 2}},
            "model.architecture.num_kv_heads",
            "d",
        ),
        ({"architecture": {}}, "model.architecture.vocab_size", "missing"),
    ],
)
def test_a_model_is_named_or_spelled_out(raw, start, words):
    with pytest.raises(ConfigError) as refused:
        build_model(raw, "model")
    assert str(refused.value).startswith(start) and words in str(refused.value)


def test_long_values_do_not_drown_the_mend():
    with pytest.raises(ConfigError) as refused:
        build_model({"architecture": {"hidden": "x" * 10_000}}, "model")
    assert len(str(refused.value)) < 500


def test_memory_of_weights_gradients_and_moments_is_exact():
    model = Albor(ODD, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(40).reshape(2, 20)
    model.loss(ids, ids).backward()
    optimizer.step()
    found = memory_estimate(ODD, 2, 20, "fp32")
    parameters = list(model.parameters())
    states = [optimizer.state[p] for p in parameters]
    assert found["weights"] == sum(p.nbytes for p in parameters)
    assert found["gradients"] == sum(p.grad.nbytes for p in parameters)
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states)
    assert found["moments"] == moments
    assert found["total"] == sum(found.values()) - found["total"]


def saved_bytes(config, precision, rows, length, recompute=False):
    """Bytes that autograd keeps between the passes, but for weights and casts."""
    model = Albor(config, seed=0)
    model.model.recompute = recompute
    ids = torch.zeros(rows, length, dtype=torch.int64)
    skip = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {tuple(p.shape) for p in model.parameters()}
    weights |= {shape[::-1] for shape in weights}
    storages, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # or else its memory is used again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip and tuple(tensor.shape) not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.model(ids)
    cos, sin = model.model.rope
    tables = {cos.untyped_storage().data_ptr(), sin.untyped_storage().data_ptr()}
    return sum(size for key, size in storages.items() if key not in tables)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("blocks", [True, False])
def test_memory_of_activations_is_what_autograd_keeps(
    precision, blocks, monkeypatch
):
    rows, length = 3, 31
    if not blocks:
        monkeypatch.setattr("albor.attention.BLOCK_LIMIT", 0)
        monkeypatch.setattr("albor.shapes.BLOCK_LIMIT", 0)
    expected = memory_estimate(ODD, rows, length, precision)["activations"]
    found = saved_bytes(ODD, precision, rows, length)
    # Beyond the estimate: the ids and the last norm's scale, 12 bytes per token.
    assert found == pytest.approx(expected + 12 * rows * length, rel=0.02)


@given(shapes(), st.integers(1, 8), st.integers(1, 300))
def test_memory_grows_with_the_micro_batch_and_nothing_else_does(
    config, rows, length
):
    one = memory_estimate(config, rows, length, "fp16")
    two = memory_estimate(config, 2 * rows, length, "fp16")
    assert two["activations"] == 2 * one["activations"]
    for part in ("weights", "gradients", "moments"):
        assert two[part] == one[part]


def test_memory_refuses_what_it_cannot_estimate():
    with pytest.raises(ConfigError, match=r"precision = 'int8'.*known: bf16"):
        memory_estimate(ODD, 2, 20, "int8")
    with pytest.raises(ConfigError, match="must be above 0"):
        memory_estimate(ODD, 0, 20, "fp32")


def test_a_model_is_judged_without_torch():
    code = "import sys, albor.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
