"""Schedule, groups, AdamW and clipping against independent arithmetic."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from albor.config import OptimizerConfig
from albor.model import Albor
from albor.optimizer import (
    build_optimizer,
    clip_by_global_norm,
    lr_at,
    parameter_groups,
)
from albor.shapes import PRESETS, ModelConfig, parameter_shapes

SHAPE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=32,
)
RECIPE = OptimizerConfig(lr=2e-3, beta1=0.8, beta2=0.97, eps=1e-7, weight_decay=0.3)


def model_with_gradients(seed=0):
    model = Albor(SHAPE, seed=seed)
    ids = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(seed))
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    return model


# ---------------------------------------------------------------- learning rate


@st.composite
def plans(draw):
    max_steps = draw(st.integers(1, 400))
    return dict(
        peak=draw(st.floats(1e-6, 10)),
        warmup_steps=draw(st.integers(0, max_steps)),
        max_steps=max_steps,
        min_ratio=draw(st.floats(0, 1)),
        scheduler=draw(st.sampled_from(["cosine", "linear"])),
    )


@given(plans())
def test_the_rate_rises_to_the_peak_and_falls_to_the_floor(plan):
    peak, warmup, last = plan["peak"], plan["warmup_steps"], plan["max_steps"] - 1
    rates = [lr_at(step, **plan) for step in range(last + 1)]
    floor = plan["min_ratio"] * peak
    assert all(rate <= peak * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    tail = rates[warmup:]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(tail))
    assert all(rate >= floor * (1 - 1e-12) for rate in tail)
    if warmup:
        assert rates[0] > 0 and rates[warmup - 1] == peak
    if warmup < last:
        assert rates[warmup] == peak
    if warmup <= last:
        assert rates[last] == floor
    assert lr_at(last + 1000, **plan) == floor


def test_the_rate_against_a_formula_written_elsewhere():
    peak, warmup, steps, ratio = 3e-4, 500, 5000, 0.1
    s = np.arange(steps)
    wave = 0.5 * (1 + np.cos(np.pi * (s - warmup) / (steps - 1 - warmup)))
    expected = np.where(
        s < warmup, peak * (s + 1) / warmup, peak * (ratio + (1 - ratio) * wave)
    )
    plan = dict(peak=peak, warmup_steps=warmup, max_steps=steps, min_ratio=ratio)
    found = [lr_at(int(step), **plan) for step in s]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_line_falls_by_equal_steps():
    plan = dict(peak=2.0, warmup_steps=3, max_steps=14, scheduler="linear")
    found = [lr_at(s, **plan, min_ratio=0.0) for s in range(14)]
    expected = [2 / 3, 4 / 3, 2.0, *np.linspace(2.0, 0.0, 11)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_constant_rate_still_warms_up():
    plan = dict(peak=2.0, warmup_steps=4, max_steps=9, scheduler="constant")
    assert [lr_at(s, **plan) for s in range(9)] == [0.5, 1.0, 1.5] + [2.0] * 6


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"max_steps": 0},
        {"warmup_steps": -1},
        {"warmup_steps": 11},
        {"scheduler": "square"},
    ],
)
def test_an_impossible_schedule_is_refused(change):
    plan = dict(step=0, peak=1.0, warmup_steps=2, max_steps=10) | change
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        lr_at(plan.pop("step"), **plan)


# ------------------------------------------------------------- groups and AdamW


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_every_parameter_is_in_exactly_one_group(decay):
    model = Albor(SHAPE, seed=0)
    groups = parameter_groups(model, 0.1, decay)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(parameter_shapes(SHAPE))
    tensors = [p for group in groups for _, p in group["params"]]
    assert len({id(p) for p in tensors}) == len(tensors) == 29
    for group in groups:
        for name, p in group["params"]:
            decays = decay == "all" or p.dim() == 2
            assert group["weight_decay"] == (0.1 if decays else 0.0), name


def test_frozen_parameters_are_left_out_and_none_at_all_is_refused():
    model = Albor(SHAPE, seed=0)
    model.model.norm.weight.requires_grad_(False)
    names = [n for g in parameter_groups(model, 0.1) for n, _ in g["params"]]
    assert "model.norm.weight" not in names and len(names) == 28
    with pytest.raises(ValueError, match="no parameter"):
        parameter_groups(model.requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match="'norms'"):
        parameter_groups(model, 0.1, decay="norms")


def test_the_optimizer_is_fused_and_has_the_recipes_numbers():
    optimizer = build_optimizer(Albor(SHAPE, seed=0), RECIPE)
    assert type(optimizer) is torch.optim.AdamW
    for group, wd in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert group["lr"] == 2e-3 and group["betas"] == (0.8, 0.97)
        assert group["eps"] == 1e-7 and group["weight_decay"] == wd
        assert group["fused"] and len(group["param_names"]) == len(group["params"])


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_updates_against_adamw_in_numpy(decay):
    """Six updates of the whole model, in float64 NumPy from the formula."""
    recipe = dataclasses.replace(RECIPE, decay=decay)
    model = Albor(SHAPE, seed=0)
    optimizer = build_optimizer(model, recipe)
    w = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    m = {n: np.zeros_like(x) for n, x in w.items()}
    v = {n: np.zeros_like(x) for n, x in w.items()}
    dice = torch.Generator().manual_seed(5)
    for t in range(1, 7):
        ids = torch.randint(97, (2, 9), generator=dice)
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        for name, p in model.named_parameters():
            g = p.grad.double().numpy()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.97 * v[name] + 0.03 * g**2
            m_hat, v_hat = m[name] / (1 - 0.8**t), v[name] / (1 - 0.97**t)
            if decay == "all" or g.ndim == 2:
                w[name] *= 1 - 2e-3 * 0.3
            w[name] -= 2e-3 * m_hat / (np.sqrt(v_hat) + 1e-7)
        optimizer.step()
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), w[name], atol=2e-6)


def test_decay_reaches_matrices_alone():
    model = Albor(SHAPE, seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, RECIPE)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 2e-3 * 0.3 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_an_unknown_optimizer_is_refused():
    class Other:
        name = "sgd"

    with pytest.raises(ValueError, match="'sgd'"):
        build_optimizer(Albor(PRESETS["albor-tiny"], seed=0), Other())


# ---------------------------------------------------------------------- clipping


def joined(parameters):
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.floats(1e-4, 1e4),
    st.floats(1e-3, 1e3),
)
def test_clipping_keeps_the_direction_and_limits_the_length(sizes, scale, limit):
    dice = torch.Generator().manual_seed(sum(sizes))
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=dice)
    raw = joined(parameters).double()
    norm = clip_by_global_norm(iter(parameters), limit)
    assert norm.shape == () and math.isclose(norm, raw.norm(), rel_tol=1e-4)
    clipped = joined(parameters).double()
    assert clipped.norm() <= limit * (1 + 1e-4) or torch.equal(raw, clipped)
    assert torch.dot(raw, clipped) / (raw.norm() * clipped.norm()) > 1 - 1e-6
    if raw.norm() < limit * (1 - 1e-3):
        assert torch.equal(raw, clipped)


def test_clipping_equals_the_librarys_on_a_real_gradient():
    ours, theirs = model_with_gradients(), model_with_gradients()
    norm = clip_by_global_norm(ours.parameters(), 0.05)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
    assert norm == expected > 0.05
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_limit_infinity_only_measures():
    model = model_with_gradients()
    raw = joined(model.parameters())
    norm = clip_by_global_norm(model.parameters(), math.inf)
    torch.testing.assert_close(norm, raw.norm())
    assert torch.equal(joined(model.parameters()), raw)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients_alone(bad):
    model = model_with_gradients()
    model.model.layers[1].mlp.up_proj.weight.grad[3, 4] = bad
    raw = joined(model.parameters())
    norm = clip_by_global_norm(model.parameters(), 1.0)
    assert not torch.isfinite(norm)
    torch.testing.assert_close(
        joined(model.parameters()), raw, rtol=0, atol=0, equal_nan=True
    )


def test_a_huge_finite_gradient_does_not_become_nan():
    """The square of 1e38 is no float32; the norm may overflow, the gradient not."""
    p = nn.Parameter(torch.zeros(5))
    p.grad = torch.tensor([1e38, -1e38, 0.0, 1.0, 2.0])
    norm = clip_by_global_norm([p], 1.0)
    assert not torch.isnan(norm) and norm > 1e38
    assert torch.isfinite(p.grad).all()


def test_parameters_without_a_gradient_are_no_obstacle():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    q.grad = torch.tensor([3.0, 4.0])
    assert clip_by_global_norm([p, q], 1.0) == 5.0 and p.grad is None
    assert clip_by_global_norm([p], 1.0) == 0.0


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_no_limit_is_refused(limit):
    with pytest.raises(ValueError, match=str(limit)):
        clip_by_global_norm([], limit)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits():
    model = model_with_gradients().cuda()
    optimizer = build_optimizer(model, RECIPE)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = clip_by_global_norm(model.parameters(), 0.1)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.device.type == "cuda" and norm > 0.1
