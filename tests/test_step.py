"""The optimizer step: slices, precisions, poison, refusals, copies."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from albor.config import ConfigError, ModelConfig, OptimizerConfig
from albor.model import IGNORED, Albor
from albor.optimizer import build_optimizer
from albor.step import (
    MIN_SCALE,
    MetaAdamW,
    StepResult,
    count_copies,
    make_scaler,
    train_step,
)

CPU = torch.device("cpu")
CONFIG = ModelConfig(  # all dimensions different
    vocab_size=89,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=10,
    max_position_embeddings=17,
)
RECIPE = OptimizerConfig(lr=1e-3, weight_decay=0.1)


def batch(rows=12, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 89, (2, rows, tokens), generator=generator)
    return ids[0], ids[1]


def everything(model, optimizer):
    """All weights and moments, copied."""
    kept = [p.detach().clone() for p in model.parameters()]
    for state in optimizer.state.values():
        kept += [value.clone() for value in state.values()]
    return kept


def gradients(model, inputs, targets, micro_batch, **how):
    model = copy.deepcopy(model)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    how = {"lr": 0.0, "grad_clip": math.inf, "micro_batch": micro_batch, **how}
    result = train_step(model, still, inputs, targets, **how)
    return result, [p.grad for p in model.parameters()]


@settings(max_examples=25, deadline=None)
@given(
    slices=st.integers(1, 5),
    micro_batch=st.integers(1, 4),
    left_out=st.floats(0, 0.8),
    seed=st.integers(0, 99),
)
def test_slices_add_up_to_the_gradient_of_the_batch(
    slices, micro_batch, left_out, seed
):
    """Against plain cross-entropy over all targets at once."""
    inputs, targets = batch(slices * micro_batch, 7, seed)
    drop = torch.rand(targets.shape) < left_out
    drop[:, 0] = False  # each slice keeps a target
    targets = targets.masked_fill(drop, IGNORED)
    model = Albor(CONFIG, seed=seed).double()
    reference = copy.deepcopy(model)
    logits = reference(inputs).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
    expected.backward()
    result, found = gradients(model, inputs, targets, micro_batch)
    assert result.loss == pytest.approx(expected.item(), abs=1e-12)
    for p, grad in zip(reference.parameters(), found, strict=True):
        assert (p.grad - grad).abs().max() <= 1e-12 * p.grad.abs().max()
    norm = torch.cat([g.flatten() for g in found]).norm().item()
    assert result.grad_norm == pytest.approx(norm, rel=1e-12)


def test_slices_agree_in_float32():
    inputs, targets = batch()
    model = Albor(CONFIG, seed=1)
    _, whole = gradients(model, inputs, targets, 0)
    for micro_batch in (1, 3, 4):
        _, parts = gradients(model, inputs, targets, micro_batch)
        for a, b in zip(whole, parts, strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_step_equals_a_plain_loop_with_clipping():
    """Five steps against the clip and the AdamW of torch, at changing rates."""
    model, plain = Albor(CONFIG, seed=3), Albor(CONFIG, seed=3)
    optimizer, other = (
        build_optimizer(model, RECIPE),
        build_optimizer(plain, RECIPE),
    )
    for i in range(5):
        inputs, targets = batch(seed=i)
        lr, clip = 1e-3 * (i + 1), 0.3
        result = train_step(
            model, optimizer, inputs, targets, lr=lr, grad_clip=clip, micro_batch=4
        )
        other.zero_grad()
        plain.loss(inputs, targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        for group in other.param_groups:
            group["lr"] = lr
        other.step()
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert result.clip == pytest.approx(clip / norm.item(), rel=1e-5)
        assert result.finite and not result.skipped and result.scale == 1.0
        assert {group["lr"] for group in optimizer.param_groups} == {lr}
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_clip_is_one_when_the_norm_is_small():
    model = Albor(CONFIG, seed=0)
    result = train_step(
        model, build_optimizer(model, RECIPE), *batch(), lr=1e-3, grad_clip=1e9
    )
    assert result.clip == 1.0


@pytest.mark.parametrize("micro_batch", [5, 7, 13, 24])
def test_micro_batch_must_divide(micro_batch):
    model = Albor(CONFIG, seed=0)
    optimizer = build_optimizer(model, RECIPE)
    before = everything(model, optimizer)
    with pytest.raises(ConfigError, match=rf"micro_batch = {micro_batch}.*12"):
        train_step(model, optimizer, *batch(), lr=1.0, micro_batch=micro_batch)
    assert all(map(torch.equal, before, everything(model, optimizer)))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["weight", "gradient"])
def test_poison_changes_nothing(precision, poison, place):
    model = Albor(CONFIG, seed=0)
    optimizer = build_optimizer(model, RECIPE)
    scaler = make_scaler(precision, CPU)
    how = {"lr": 1e-3, "precision": precision, "scaler": scaler, "micro_batch": 4}
    assert train_step(model, optimizer, *batch(), **how).finite
    if place == "weight":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[2, 3] = poison
    else:
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.register_hook(lambda grad: torch.full_like(grad, poison))
    before = everything(model, optimizer)
    result = train_step(model, optimizer, *batch(seed=1), **how)
    after = everything(model, optimizer)
    assert not result.finite
    assert result.skipped == (precision == "fp16" and place == "gradient")
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_one_poisoned_slice_of_many_is_enough():
    model = Albor(CONFIG, seed=0).double()
    real = model.loss
    calls = []

    def loss(ids, targets):
        calls.append(len(ids))
        return real(ids, targets) * (math.nan if len(calls) == 2 else 1.0)

    model.loss = loss
    result = train_step(
        model, torch.optim.SGD(model.parameters()), *batch(), lr=1.0, micro_batch=4
    )
    assert calls == [4, 4, 4] and not result.finite and math.isnan(result.loss)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(precision):
    """The same start, the same gradient to a few per cent, the same way down."""
    ends = {}
    for name in ("fp32", precision):
        model = Albor(CONFIG, seed=0)
        optimizer = build_optimizer(model, RECIPE)
        scaler = make_scaler(name, CPU)
        how = {"lr": 1e-2, "precision": name, "scaler": scaler}
        results = [train_step(model, optimizer, *batch(), **how) for _ in range(12)]
        assert all(result.finite for result in results)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        ends[name] = (results[0].grad_norm, results[-1].loss)
        assert results[-1].loss < results[0].loss - 0.5
    assert ends[precision][0] == pytest.approx(ends["fp32"][0], rel=0.05)
    assert ends[precision][1] == pytest.approx(ends["fp32"][1], abs=0.1)


def test_precision_reaches_the_matrix_products():
    seen = set()
    model = Albor(CONFIG, seed=0)
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    optimizer = build_optimizer(model, RECIPE)
    for precision in ("fp32", "bf16", "fp16"):
        train_step(model, optimizer, *batch(), lr=0.0, precision=precision)
    assert seen == {torch.float32, torch.bfloat16, torch.float16}


def test_scale_falls_until_gradients_fit_then_grows():
    model = Albor(CONFIG, seed=0)
    optimizer = build_optimizer(model, RECIPE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    how = {"lr": 1e-3, "precision": "fp16", "scaler": scaler}
    start = everything(model, optimizer)
    results = []
    while not (results and results[-1].finite):
        assert all(map(torch.equal, start, everything(model, optimizer)))
        results.append(train_step(model, optimizer, *batch(), **how))
        assert len(results) < 40
    scales = [result.scale for result in results]
    assert all(result.skipped for result in results[:-1]) and len(results) > 2
    assert scales[:-1] == [2.0 ** (39 - i) for i in range(len(scales) - 1)]
    assert scales[-1] == scales[-2]
    for _ in range(2):
        result = train_step(model, optimizer, *batch(), **how)
    assert result.scale == 2 * scales[-1]


def test_scale_does_not_show_in_the_result():
    inputs, targets = batch()
    model = Albor(CONFIG, seed=0)
    plain, grads = gradients(model, inputs, targets, 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled, same = gradients(model, inputs, targets, 0, scaler=scaler)
    assert plain.grad_norm == scaled.grad_norm and plain.loss == scaled.loss
    assert all(map(torch.equal, grads, same))


def test_skipping_ends_when_the_scale_is_spent():
    bad = {"loss": 3.0, "grad_norm": math.inf, "clip": 1.0, "finite": False}
    assert StepResult(**bad, scale=2 * MIN_SCALE).skipped
    assert not StepResult(**bad, scale=MIN_SCALE).skipped
    assert not StepResult(**bad | {"loss": math.nan}, scale=2.0**9).skipped
    assert not StepResult(**bad | {"finite": True}, scale=2.0**9).skipped


def test_scaler_only_for_fp16():
    assert make_scaler("fp32", CPU) is None and make_scaler("bf16", CPU) is None
    assert make_scaler("fp16", CPU).get_scale() == 2.0**16


def meta_step(config, micro_batch, rows=6):
    with torch.device("meta"):
        model = Albor(config, seed=None)
    optimizer = MetaAdamW(model.parameters())
    ids = torch.zeros(2, rows, 5, dtype=torch.int64)

    def work():
        inputs, targets = ids[0].to("meta"), ids[1].to("meta")
        how = {"lr": 1e-3, "micro_batch": micro_batch}
        train_step(model, optimizer, inputs, targets, **how)

    count_copies(work)  # the rotary table goes up once
    return count_copies(work)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_three_copies_in_any_depth_and_slicing(layers, micro_batch):
    shape = {**vars(CONFIG), "num_hidden_layers": layers}
    copies = meta_step(ModelConfig(**shape), micro_batch)
    assert (copies.up, copies.down) == (2, 1)
    assert (copies.up_bytes, copies.down_bytes) == (2 * 6 * 5 * 8, 32)


def test_counter_counts_what_it_should_and_nothing_else():
    device = torch.zeros(3, 5, device="meta")

    def work():
        torch.ones(7).to("meta")  # 28 bytes up
        device.copy_(torch.ones(3, 5, dtype=torch.float64))  # 120 bytes up
        assert device.sum().item() == 0.0  # 4 bytes down
        assert device.to("cpu").shape == (3, 5)  # 60 bytes down
        torch.ones(3, 5).copy_(device)  # 60 bytes down
        device.to(torch.float64), torch.ones(3).double(), device + 1  # none

    copies = count_copies(work)
    assert (copies.up, copies.up_bytes) == (2, 28 + 120)
    assert (copies.down, copies.down_bytes) == (3, 4 + 60 + 60)
    assert count_copies(lambda: torch.ones(4).sum().item()) == type(copies)()
