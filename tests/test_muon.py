"""Muon against PyTorch's, against a decomposition in 64 bits, and left unmoved."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albor.config import OptimizerConfig
from albor.model import Albor
from albor.muon import Muon, block_matrices, make_optimizer, orthogonalize
from albor.optimizer import build_optimizer
from albor.shapes import ModelConfig
from albor.step import enqueue_step

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
RECIPE = OptimizerConfig(
    name="muon", lr=2e-3, beta1=0.8, beta2=0.97, momentum=0.9, weight_decay=0.3
)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def everything(model, optimizer):
    """Copies of all weights and of all that the optimizer remembers."""
    parts = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        parts += [part.clone() for part in optimizer.state[p].values()]
    return parts


# Newton-Schulz.


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.integers(0, 9))
def test_the_singular_values_alone_are_moved(rows, columns, seed):
    some = np.random.default_rng(seed).normal(size=(2, rows, columns))
    U, S, Vh = np.linalg.svd(some, full_matrices=False)
    S /= np.sqrt((S**2).sum(-1, keepdims=True))
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    found = orthogonalize(torch.tensor(some), dtype=torch.float64)
    assert np.allclose(found, U * S[:, None] @ Vh, rtol=0, atol=1e-8)


def test_what_is_not_small_ends_near_one():
    generator = torch.Generator().manual_seed(3)
    kind = {"generator": generator, "dtype": torch.float64}
    U, _ = torch.linalg.qr(torch.randn(13, 7, **kind))
    V, _ = torch.linalg.qr(torch.randn(7, 7, **kind))
    given = U @ torch.diag(torch.tensor([9, 3, 1, 0.6, 0.3, 0.2, 0.1]).double()) @ V
    values = torch.linalg.svdvals(orthogonalize(given, dtype=torch.float64))
    assert values.min() > 0.65 and values.max() < 1.25
    near = orthogonalize(given, dtype=torch.float64)
    assert float((near - U @ V).norm() / (U @ V).norm()) < 0.35


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_and_shapes_stay(dtype):
    one = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(one, dtype=dtype)
    assert found.shape == one.shape and found.dtype == one.dtype
    exact = orthogonalize(one.double(), dtype=torch.float64)
    error = float((found - exact).norm() / exact.norm())
    assert error < (1e-4 if dtype == torch.float32 else 0.1)
    alone = orthogonalize(one[2, 1], dtype=torch.float64)
    assert torch.allclose(exact[2, 1], alone.double(), atol=1e-5)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"\(4,\) has no singular values"):
        orthogonalize(torch.ones(4))


# The rule.


def test_updates_against_torch_s_muon_and_adamw():
    ours, theirs = Albor(SHAPE, seed=1), Albor(SHAPE, seed=1)
    optimizer = make_optimizer(ours, RECIPE, bf16=True)
    named = dict(theirs.named_parameters())
    blocks = block_matrices(theirs)
    rest = {name: p for name, p in named.items() if name not in blocks}
    how = {"lr": 2e-3, "weight_decay": 0.3}
    muon = torch.optim.Muon(
        [named[name] for name in blocks],
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
        **how,
    )
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in rest.values() if p.dim() == 2]},
            {
                "params": [p for p in rest.values() if p.dim() == 1],
                "weight_decay": 0.0,
            },
        ],
        betas=(0.8, 0.97),
        **how,
    )
    start = {name: p.detach().clone() for name, p in named.items()}
    for seed in range(4):
        for model in (ours, theirs):
            gradients(model, seed)
        for each in (optimizer, muon, adam):
            each.step()
    for name, p in ours.named_parameters():
        moved, due = p.detach() - start[name], named[name].detach() - start[name]
        error = float((moved - due).norm() / due.norm())
        assert error < (0.03 if name in blocks else 1e-5), name  # bf16, twice
        if name in blocks:
            buffer = muon.state[named[name]]["momentum_buffer"]
            assert torch.allclose(
                optimizer.state[p]["momentum_buffer"], buffer, atol=1e-6
            )


def test_updates_against_numpy_in_64_bits():
    model = Albor(SHAPE, seed=2).double()
    names = block_matrices(model)
    adam = build_optimizer(model, dataclasses.replace(RECIPE, name="adamw"))
    optimizer = Muon(adam, names, momentum=0.9, dtype=torch.float64)
    weights = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    means = {name: np.zeros_like(weights[name]) for name in names}
    for step in range(3):
        lr = 1e-3 * (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradients(model, step)
        for name in names:
            g = model.get_parameter(name).grad.numpy()
            means[name] = 0.9 * means[name] + 0.1 * g
            U, S, Vh = np.linalg.svd(
                0.9 * means[name] + 0.1 * g, full_matrices=False
            )
            S /= np.sqrt((S**2).sum())
            for _ in range(5):
                S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
            size = lr * 0.2 * math.sqrt(max(g.shape))
            weights[name] = weights[name] * (1 - lr * 0.3) - size * (U * S) @ Vh
        optimizer.step()
    for name in names:
        assert np.allclose(
            model.get_parameter(name).detach(), weights[name], atol=1e-9
        )


def test_a_rate_on_the_device_is_the_same_rate():
    ours, theirs = Albor(SHAPE, seed=1), Albor(SHAPE, seed=1)
    for model, rate in ((ours, torch.tensor(0.004)), (theirs, 0.004)):
        optimizer = make_optimizer(model, RECIPE)
        gradients(model, 0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7)


# Who moves what.


def test_every_parameter_has_one_rule():
    model = Albor(SHAPE)
    optimizer = make_optimizer(model, RECIPE)
    rules = {
        name: (group["rule"], group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert sorted(rules) == sorted(dict(model.named_parameters()))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rules)
    for name, p in model.named_parameters():
        rule = "muon" if "proj" in name else "adamw"
        assert rules[name] == (rule, 0.3 if p.dim() == 2 else 0.0, 2e-3)


def test_the_recipe_s_name_decides():
    model = Albor(SHAPE)
    plain = make_optimizer(model, dataclasses.replace(RECIPE, name="adamw"))
    assert type(plain) is torch.optim.AdamW
    assert isinstance(make_optimizer(model, RECIPE), Muon)
    with pytest.raises(ValueError, match=r"make_optimizer builds"):
        build_optimizer(model, RECIPE)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"model.norm.weight"}, "is not a matrix"),
        ({"nobody"}, "does not hold nobody"),
    ],
)
def test_wrong_names_are_refused(names, words):
    adam = build_optimizer(Albor(SHAPE), OptimizerConfig(lr=0.1))
    with pytest.raises(ValueError, match=words):
        Muon(adam, names)


def test_a_closure_is_refused_and_a_missing_gradient_skipped():
    model = Albor(SHAPE, seed=1)
    optimizer = make_optimizer(model, RECIPE)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


# Steps that must leave no trace, and states that must leave one.


def test_gradients_that_are_still_scaled_are_refused():
    optimizer = make_optimizer(Albor(SHAPE), RECIPE)
    optimizer.grad_scale = torch.tensor(8.0)
    with pytest.raises(ValueError, match="unscale_"):
        optimizer.step()


def test_the_step_of_the_loop_leaves_a_bad_batch_behind_without_asking():
    model = Albor(SHAPE, seed=1)
    optimizer = make_optimizer(model, RECIPE)
    ids = torch.randint(97, (3, 13), generator=torch.Generator().manual_seed(0))
    ids, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    enqueue_step(model, optimizer, ids, targets)
    before = everything(model, optimizer)
    bad = lambda *_: model.loss(ids, targets) * math.nan  # noqa: E731
    row = enqueue_step(model, optimizer, ids, targets, loss=bad)
    assert row[2] == 0 and optimizer.found_inf == 1
    assert all(map(torch.equal, before, everything(model, optimizer)))
    assert enqueue_step(model, optimizer, ids, targets)[2] == 1
    assert not any(map(torch.equal, before, everything(model, optimizer)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(value, first):
    model = Albor(SHAPE, seed=1)
    optimizer = make_optimizer(model, RECIPE)
    if not first:
        gradients(model, 0)
        optimizer.step()
    weights = [p.detach().clone() for p in model.parameters()]
    before = everything(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for p, old in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, old)
    after = everything(model, optimizer)
    if first:  # what was made by the step is as if it were new
        assert not any(part.any() for part in after[len(weights) :])
        return
    for now, old in zip(after, before, strict=True):
        assert torch.equal(now, old)
    gradients(model, 1)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    for p, old in zip(model.parameters(), weights, strict=True):
        assert torch.isfinite(p).all() and not torch.equal(p, old)


def test_nothing_is_asked_of_the_device():
    """On `meta`, where there are no numbers, asking for one is an error."""
    with torch.device("meta"):
        model = Albor(SHAPE)
        optimizer = make_optimizer(model, RECIPE)
        names = block_matrices(model)
        group = next(g for g in optimizer.param_groups if g["rule"] == "muon")
        group["lr"], bad = torch.empty(()), torch.empty(())
        for name, p in model.named_parameters():
            p.grad = torch.empty_like(p)
            if name in names:
                with torch.no_grad():
                    optimizer.move([p], group, bad)
        with pytest.raises(RuntimeError):
            bad.item()


def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been():
    through, stopped = Albor(SHAPE, seed=1), Albor(SHAPE, seed=1)
    first = make_optimizer(through, RECIPE)
    second = make_optimizer(stopped, RECIPE)
    for seed in range(2):
        for model, optimizer in ((through, first), (stopped, second)):
            gradients(model, seed)
            optimizer.step()
    resumed = Albor(SHAPE, seed=9)
    resumed.load_state_dict(stopped.state_dict())
    third = make_optimizer(resumed, RECIPE)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for seed in range(2, 4):
        for model, optimizer in ((through, first), (resumed, third)):
            gradients(model, seed)
            optimizer.step()
    for p, q in zip(through.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    pairs = zip(everything(through, first), everything(resumed, third), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_learns():
    model = Albor(SHAPE, seed=1)
    optimizer = make_optimizer(model, dataclasses.replace(RECIPE, lr=1e-2))
    ids = torch.randint(97, (3, 13), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
