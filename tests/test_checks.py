"""Checks and invariants: silent on sound code, and exact about what is not."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from albor import invariants
from albor.checks import (
    CheckError,
    check_copies,
    check_gradients,
    check_step,
    compare_gradients,
    lively,
    plain_loss,
)
from albor.model import IGNORED, Albor
from albor.shapes import PRESETS, ModelConfig
from albor.step import train_step
from albor.weights import hf_config

CONFIG = ModelConfig(  # all dimensions different
    vocab_size=53,
    hidden_size=16,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=11,
)


def batch(rows=4, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(53, (2, rows, length), generator=generator)


@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 4}, {"head_dim": 10}]
)
def test_the_reference_is_llama(shape):
    config = replace(CONFIG, **shape)
    model = lively(Albor(config))
    llama = LlamaForCausalLM(LlamaConfig(**hf_config(config)))
    llama.load_state_dict(model.state_dict(), strict=False)
    llama.double().config._attn_implementation = "eager"
    ids, targets = batch()
    logits = llama(ids).logits.flatten(0, 1)
    theirs = torch.nn.functional.cross_entropy(logits, targets.flatten())
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    ours = plain_loss(weights, config, ids, targets)
    assert ours.dtype == torch.float64
    assert abs(float(ours - theirs.detach())) < 1e-6  # Llama's norms are float32


def test_gradients_of_sound_code_agree_in_every_precision():
    busy, (ids, targets) = lively(Albor(CONFIG)), batch()
    for cosine, ratio in compare_gradients(busy, ids, targets).values():
        assert cosine > 1 - 1e-6 and abs(ratio - 1) < 1e-4
    check_gradients(busy, ids, targets, least=0.99, precision="bf16")
    assert all(p.grad is None for p in busy.parameters())  # no trace


@settings(max_examples=20)
@given(st.integers(0, 28), st.floats(0.05, 0.9), st.integers(0, 99))
def test_any_tensor_with_any_share_of_its_gradient_gone(which, share, seed):
    busy, (ids, targets) = lively(Albor(CONFIG), seed), batch(seed=seed)
    name, p = list(busy.named_parameters())[which]

    def hole(g):
        g = g.clone()
        biggest = g.abs().flatten().topk(max(1, int(share * g.numel()))).indices
        g.view(-1)[biggest] = 0
        return g

    handle = p.register_hook(hole)
    try:
        with pytest.raises(CheckError, match=name.replace(".", r"\.")):
            check_gradients(busy, ids, targets)
    finally:
        handle.remove()


def test_a_gradient_that_is_missing_or_not_a_number():
    busy, (ids, targets) = lively(Albor(CONFIG)), batch()
    p = busy.model.layers[1].self_attn.q_proj.weight
    for value in (0.0, math.nan, 1.2, -1.0):
        handle = p.register_hook(lambda g, value=value: g * value)
        with pytest.raises(CheckError, match=r"layers\.1\.self_attn\.q_proj"):
            check_gradients(busy, ids, targets)
        handle.remove()


def test_lively_leaves_the_model_alone():
    model = Albor(CONFIG)
    before = copy.deepcopy(model.state_dict())
    busy = lively(model, seed=3)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(
        not torch.equal(p, q)
        for p, q in zip(model.parameters(), busy.parameters(), strict=True)
    )


@pytest.mark.parametrize("scale", [None, 65536.0])
def test_the_step_is_one_update_of_the_whole_batch(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    model, (ids, targets) = Albor(CONFIG), batch(rows=6)
    before = copy.deepcopy(model.state_dict())
    check_step(model, ids, targets, scaler=scaler)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert (targets != IGNORED).all()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda how: how | {"lr": 2 * how["lr"]},
        lambda how: how | {"grad_clip": 3 * how["grad_clip"]},
        lambda how: how | {"grad_clip": math.inf},
    ],
)
def test_a_step_with_other_settings(spoil):
    def step(*arguments, **how):
        return train_step(*arguments, **spoil(how))

    with pytest.raises(CheckError, match=r"model\.embed_tokens\.weight: "):
        check_step(Albor(CONFIG), *batch(), step=step)


def test_copies_are_counted():
    data = torch.zeros(3, device="meta")
    check_copies(lambda: torch.ones(3).to("meta"), up=1, down=0)
    with pytest.raises(CheckError, match=r"0 copies to the device and 1 back"):
        check_copies(lambda: data.sum().item(), up=0, down=0)


# Invariants.


@pytest.mark.parametrize("length", [2, 5, 11])
@pytest.mark.parametrize("seed", [0, 1])
def test_invariants_of_sound_models(length, seed):
    model = Albor(CONFIG, seed=seed)
    for one in (model, lively(model, seed)):
        invariants.check_causal(one, torch.arange(length) * 7 % 53)
    invariants.check_order(model, length=max(3, length), seed=seed)


def test_one_token_that_sees_one_ahead(monkeypatch):
    kernel = torch.nn.functional.scaled_dot_product_attention

    def leak(q, k, v, seen=0):
        mask = torch.ones(q.shape[2], q.shape[2]).tril().bool()
        mask[4, 5] = True
        return kernel(q, k, v, attn_mask=mask, enable_gqa=True)

    def deaf(q, k, v, seen=0):
        mask = torch.eye(q.shape[2]).bool()
        return kernel(q, k, v, attn_mask=mask, enable_gqa=True)

    ids = torch.arange(7)
    name = "albor.attention.attend"
    monkeypatch.setattr(name, leak)
    with pytest.raises(CheckError, match=r"token 5 of 7 .* at position 4, before"):
        invariants.check_causal(Albor(CONFIG), ids)
    monkeypatch.setattr(name, deaf)
    with pytest.raises(CheckError, match=r"token 0 of 7 leaves .* position 1"):
        invariants.check_causal(Albor(CONFIG), ids)


@pytest.mark.parametrize("layer", range(3))
def test_a_block_without_order(layer, monkeypatch):
    model = Albor(CONFIG)
    block = model.model.layers[layer].self_attn
    sound = block.forward
    flat = (torch.ones(7, 6), torch.zeros(7, 6))
    monkeypatch.setattr(block, "forward", lambda x, *_: sound(x, *flat))
    with pytest.raises(CheckError, match=rf"model\.layers\.{layer}: another order"):
        invariants.check_order(model)


@pytest.mark.parametrize("how", ["parameter", "buffer", "attribute", "transposed"])
def test_a_second_head(how):
    model = Albor(CONFIG)
    copied = model.model.embed_tokens.weight.detach().clone()
    if how == "parameter":
        model.lm_head = torch.nn.Linear(16, 53, bias=False)
    elif how == "buffer":
        model.register_buffer("lm_head", copied)
    else:
        model.model.lm_head = copied.T if how == "transposed" else copied
    with pytest.raises(CheckError, match=r"lm_head.* is a second"):
        invariants.check_tied(model)


def test_what_the_optimizer_holds():
    model = Albor(CONFIG)
    every = list(model.parameters())
    invariants.check_tied(model, torch.optim.AdamW(every))
    with pytest.raises(CheckError, match=r"model\.norm\.weight is 0 times"):
        invariants.check_tied(model, torch.optim.AdamW([every[0], *every[2:]]))
    foreign = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckError, match="30 tensors in the optimizer, 29 in"):
        invariants.check_tied(model, torch.optim.AdamW([*every, foreign]))


def test_roundtrip_of_sound_files_and_of_square_models(tmp_path):
    invariants.check_roundtrip(Albor(CONFIG), tmp_path)
    for key, value in (("hidden_size", 24), ("intermediate_size", 12)):
        with pytest.raises(CheckError, match="all five differ"):
            square = Albor(replace(CONFIG, **{key: value}))
            invariants.check_roundtrip(square, tmp_path)


@pytest.mark.parametrize("seed", range(6))
def test_fresh_weights_of_any_seed_pass(seed):
    invariants.check_initial(Albor(CONFIG, seed=seed))
    invariants.check_initial(Albor(PRESETS["albor-tiny"], seed=seed), seed=seed)
    scaled = Albor(CONFIG, seed=seed, scaled_init=True)
    invariants.check_initial(scaled, scaled=True)
    with pytest.raises(CheckError, match=r"o_proj.weight: deviation / s is 0"):
        invariants.check_initial(scaled)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: w + 0.01, "mean / s"),
        (lambda w: w * 1.3, "deviation / s"),
        (lambda w: w.roll(1, 1) * 0.7071 + w * 0.7071, "correlation along rows"),
        (lambda w: w.roll(1, 0) * 0.7071 + w * 0.7071, "correlation along columns"),
        (lambda w: w[:1].expand_as(w), "mean|deviation|columns"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["layers.2.mlp.gate_proj", "embed_tokens"])
def test_first_weights_that_are_not_independent(spoil, words, name):
    torch.manual_seed(0)
    model = Albor(PRESETS["albor-tiny"])
    if name == "layers.2.mlp.gate_proj":
        name = "layers.1.mlp.gate_proj"
    with torch.no_grad():
        p = model.model.get_parameter(f"{name}.weight")
        p.copy_(spoil(p))
    with pytest.raises(CheckError, match=words):
        invariants.check_initial(model)


def test_gains_twins_and_the_first_loss():
    tiny = PRESETS["albor-tiny"]
    model = Albor(tiny)
    model.model.layers[1].input_layernorm.weight.data[3] = 0.5
    with pytest.raises(CheckError, match=r"layers\.1\.input_layernorm.*gains"):
        invariants.check_initial(model)
    model = Albor(tiny)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.down_proj.weight.data.copy_(first.down_proj.weight)
    with pytest.raises(
        CheckError, match=r"layers\.1\.mlp\.down_proj.*one of its shape"
    ):
        invariants.check_initial(model)
    model = Albor(tiny)
    loss = model.loss
    model.loss = lambda *batch: loss(*batch) + 0.1
    with pytest.raises(CheckError, match="the loss on random ids"):
        invariants.check_initial(model)


def test_stable_rank_against_singular_values():
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 40), (30, 70), (90, 20)):
        w = torch.randn(*shape, generator=generator)
        values = torch.linalg.svdvals(w).square()
        exact = float(values.sum() / values[0])
        assert 0.99 * exact < invariants.stable_rank(w, rounds=99) < 1.02 * exact
        assert 0.99 * exact < invariants.stable_rank(w) < 1.25 * exact


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_matrix_drawn_from_another_block_is_found(share):
    """Between two `up_proj` stands a `gate_proj` of the same shape."""
    model = Albor(PRESETS["albor-tiny"])
    one, two = (layer.mlp.up_proj.weight for layer in model.model.layers)
    rows = math.ceil(share * len(one))
    two.data[:rows] = one.data[:rows]
    with pytest.raises(CheckError, match=r"layers\.1\.mlp\.up.*one of its shape"):
        invariants.check_initial(model)
