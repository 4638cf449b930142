"""RMSNorm, rotary embedding and SwiGLU against independent formulas and laws."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from albor.layers import RMSNorm, SwiGLU, apply_rope, rms_norm, rope_table
from albor.shapes import ModelConfig

CONFIG = ModelConfig(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=40,
    head_dim=10,
)


def randn(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------ RMSNorm


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=9),
    st.floats(1e-6, 1e-1),
)
def test_rms_norm_is_its_formula(values: list[float], eps: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    gain = torch.arange(1, len(values) + 1, dtype=torch.float64)
    root = math.sqrt(sum(v * v for v in values) / len(values) + eps)
    expected = [g * v / root for g, v in enumerate(values, start=1)]
    got = rms_norm(x, gain, eps)
    assert torch.allclose(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12
    )


def test_rms_norm_equals_torch_and_normalizes_the_last_axis_only() -> None:
    x, gain = randn(2, 5, 7), randn(7, seed=1)
    expected = F.rms_norm(x, (7,), gain, 1e-5)
    assert torch.allclose(rms_norm(x, gain, 1e-5), expected, rtol=1e-12)
    alone = rms_norm(x[1, 3], gain, 1e-5)
    assert torch.allclose(rms_norm(x, gain, 1e-5)[1, 3], alone, rtol=1e-12)


def test_rms_norm_gradients() -> None:
    x, gain = randn(3, 7).requires_grad_(), randn(7, seed=1).requires_grad_()
    assert gradcheck(lambda x, g: rms_norm(x, g, 1e-5), (x, gain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_squares_narrow_numbers_in_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([300.0, -300.0, 600.0, 0.5], dtype=dtype)  # 300 * 300 > 65504
    got = rms_norm(x, torch.ones(4, dtype=dtype), 1e-5)
    expected = F.rms_norm(x.double(), (4,), None, 1e-5)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), expected, rtol=2e-2)


def test_rms_norm_keeps_float64_precision() -> None:
    x = randn(4, 9)
    got = rms_norm(x, torch.ones(9, dtype=torch.float64), 1e-5)
    root = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert got.dtype == torch.float64
    assert (got - x / root).abs().max() < 1e-14


def test_rms_norm_of_zeros_is_zero_and_module_starts_at_one() -> None:
    norm = RMSNorm(9, 1e-5)
    assert torch.equal(norm.weight, torch.ones(9))
    assert torch.equal(norm(torch.zeros(2, 9)), torch.zeros(2, 9))


# ----------------------------------------------------------------- rotary embedding


def test_rope_rotates_each_pair_by_position_times_its_speed() -> None:
    cos, sin = rope_table(10, 40, 10_000.0, torch.float64)
    x = randn(40, 10)
    got = apply_rope(x, cos, sin)
    for t in (0, 1, 7, 39):
        for i in range(5):
            turn = cmath.exp(1j * t * 10_000.0 ** (-2 * i / 10))
            expected = complex(x[t, i], x[t, i + 5]) * turn
            assert math.isclose(got[t, i], expected.real, abs_tol=1e-12)
            assert math.isclose(got[t, i + 5], expected.imag, abs_tol=1e-12)


def test_rope_matches_transformers_to_the_bit() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
    )
    positions = torch.arange(2048)[None]
    theirs = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    cos, sin = rope_table(10, 2048, 10_000.0)
    assert torch.equal(cos, theirs[0][0]) and torch.equal(sin, theirs[1][0])

    q, k = (
        randn(2, 6, 17, 10, dtype=torch.float32),
        randn(2, 2, 17, 10, seed=1).float(),
    )
    expected = llama.apply_rotary_pos_emb(q, k, cos[None, :17], sin[None, :17])
    assert torch.equal(apply_rope(q, cos[:17], sin[:17]), expected[0])
    assert torch.equal(apply_rope(k, cos[:17], sin[:17]), expected[1])


def test_rope_back_and_forth_is_the_identity_and_keeps_lengths() -> None:
    cos, sin = rope_table(10, 40, 500.0, torch.float64)
    x = randn(2, 6, 40, 10)
    turned = apply_rope(x, cos, sin)
    assert torch.allclose(apply_rope(turned, cos, -sin), x, rtol=0, atol=1e-13)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12)
    assert torch.equal(turned[..., 0, :], x[..., 0, :])  # position 0 stays
    assert not torch.allclose(turned[..., 1, :], x[..., 1, :])


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 9))
def test_rope_scores_depend_on_distance_alone(i: int, j: int, shift: int) -> None:
    cos, sin = rope_table(10, 40, 10_000.0, torch.float64)
    q, k = randn(10, seed=2), randn(10, seed=3)

    def score(at: int, other: int) -> float:
        query = apply_rope(q[None], cos[at], sin[at])
        key = apply_rope(k[None], cos[other], sin[other])
        return float(query @ key.T)

    assert math.isclose(score(i, j), score(i + shift, j + shift), abs_tol=1e-11)


def test_rope_gradient_turns_back() -> None:
    cos, sin = rope_table(10, 7, 10_000.0, torch.float64)
    x = randn(3, 7, 10).requires_grad_()
    assert gradcheck(lambda x: apply_rope(x, cos, sin), (x,))
    arriving = randn(3, 7, 10, seed=4)
    (gradient,) = torch.autograd.grad(apply_rope(x, cos, sin), x, arriving)
    assert torch.allclose(gradient, apply_rope(arriving, cos, -sin), atol=1e-13)


def test_rope_of_16_bit_input_is_computed_in_float32() -> None:
    cos, sin = rope_table(10, 40, 10_000.0)
    x = randn(40, 10, dtype=torch.bfloat16)
    got = apply_rope(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.float(), cos, sin).to(torch.bfloat16))


@pytest.mark.parametrize("width", [0, 1, 9, -2])
def test_rope_refuses_odd_heads(width: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim is {width}"):
        rope_table(width, 40, 10_000.0)


# --------------------------------------------------------------------------- SwiGLU


def test_swiglu_is_its_formula() -> None:
    mlp = SwiGLU(CONFIG).double()
    shapes = {name: tuple(w.shape) for name, w in mlp.named_parameters()}
    assert shapes == {
        "gate_proj.weight": (112, 48),
        "up_proj.weight": (112, 48),
        "down_proj.weight": (48, 112),
    }
    x = randn(2, 5, 48)
    gate = torch.einsum("btd,fd->btf", x, mlp.gate_proj.weight)
    up = torch.einsum("btd,fd->btf", x, mlp.up_proj.weight)
    inner = gate / (1 + (-gate).exp()) * up
    expected = torch.einsum("btf,df->btd", inner, mlp.down_proj.weight)
    assert torch.allclose(mlp(x), expected, rtol=0, atol=1e-12)


def test_swiglu_gradients() -> None:
    torch.manual_seed(0)
    small = ModelConfig(
        vocab_size=11,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=8,
        head_dim=2,
    )
    mlp = SwiGLU(small).double()
    names = [name for name, _ in mlp.named_parameters()]

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(mlp, parameters, (x,))

    weights = [w.detach().requires_grad_() for w in mlp.parameters()]
    assert gradcheck(call, (randn(3, 4).requires_grad_(), *weights))
