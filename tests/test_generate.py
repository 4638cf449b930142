"""Generation: the same text with and without a cache, draws, ends, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import generate as module
from albor.generate import (
    GenerateError,
    complete,
    draw,
    generate,
    reshape,
    why_stopped,
)
from albor.model import Albor
from albor.shapes import ModelConfig
from albor.tokenizer import EOS, FIM_PREFIX, Tokenizer

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=40,
    initializer_range=0.3,  # opinions strong enough to differ by token
)


@pytest.fixture(scope="module")
def model():
    return Albor(CONFIG, seed=1)


# --- the loop ----------------------------------------------------------------


def by_hand(model, prompt, count):
    """The most probable tokens, from the model's forward pass alone."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", [[EOS], [EOS, 9, 17, 5], list(range(30))])
def test_greedy_is_the_argmax_of_the_forward_pass(model, prompt):
    expected = by_hand(model, prompt, 10)
    for use_cache in (True, False):
        new = generate(
            model, prompt, max_new_tokens=10, stop=(), use_cache=use_cache
        )
        assert new == expected
    assert len(set(expected)) > 1


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 299), min_size=1, max_size=39),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.7]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_cache_changes_no_token(model, prompt, temperature, top_p, seed):
    options = {
        "max_new_tokens": 12,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    cached = generate(model, prompt, **options)
    assert cached == generate(model, prompt, **options, use_cache=False)
    assert all(type(token) is int and 0 <= token < 300 for token in cached)


def test_the_text_depends_on_the_seed_and_on_nothing_else(model):
    def text(seed):
        return generate(
            model, [EOS, 7], max_new_tokens=30, temperature=1.0, seed=seed
        )

    first = text(3)
    torch.manual_seed(99)
    np.random.seed(99)
    before = torch.random.get_rng_state()
    assert text(3) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert text(4) != first


def test_a_longer_text_begins_with_the_shorter_one(model):
    options = {"temperature": 1.0, "seed": 8, "stop": ()}
    short = generate(model, [EOS, 7], max_new_tokens=5, **options)
    long = generate(model, [EOS, 7], max_new_tokens=25, **options)
    assert long[:5] == short
    # A draw belongs to its position: going on from the middle gives the same text.
    assert (
        generate(model, [EOS, 7, *short], max_new_tokens=20, **options) == long[5:]
    )


def test_what_ends_a_text(model):
    prompt, options = [EOS, 7], {"temperature": 1.0, "seed": 8}
    full = generate(model, prompt, max_new_tokens=99, stop=(), **options)
    assert len(full) == 40 - len(prompt)
    assert why_stopped(full, 99, ()) == "context"
    some = generate(model, prompt, max_new_tokens=6, stop=(), **options)
    assert some == full[:6] and why_stopped(some, 6, ()) == "length"
    stop = (full[4], 299)
    ended = generate(model, prompt, max_new_tokens=6, stop=stop, **options)
    assert ended == full[: full.index(full[4]) + 1]
    assert why_stopped(ended, 6, stop) == "stop"
    exact = generate(model, prompt, max_new_tokens=38, stop=(), **options)
    assert exact == full and why_stopped(exact, 38, ()) == "length"


def test_one_place_left_in_the_context(model):
    prompt = [EOS] * 39
    new = generate(model, prompt, max_new_tokens=5, stop=())
    assert new == by_hand(model, prompt, 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_restored_after_errors_too(training, monkeypatch):
    model = Albor(CONFIG, seed=2).train(training)
    generate(model, [EOS], max_new_tokens=2)
    assert model.training is training and model.model.layers[0].training is training
    assert all(p.requires_grad for p in model.parameters())

    def fail(*_):
        assert not model.training
        raise RuntimeError("planted")

    monkeypatch.setattr(module, "draw", fail)
    with pytest.raises(RuntimeError, match="planted"):
        generate(model, [EOS], max_new_tokens=2, temperature=1.0)
    assert model.training is training


def test_weights_can_still_be_trained_after_generating():
    model = Albor(CONFIG, seed=2)
    generate(model, [EOS], max_new_tokens=3)
    ids = torch.tensor([[1, 2, 3]])
    model.loss(ids, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [EOS] * 40}, "has 40 tokens, and a context of 40"),
        ({"prompt": [EOS, 300]}, "prompt[1] is 300, not an id from 0 to 299"),
        ({"prompt": [-1]}, "prompt[0] is -1"),
        ({"prompt": [1.5]}, "prompt[0] is 1.5"),
        ({"prompt": "text"}, "prompt[0] is 't'"),
        ({"stop": (2, 300)}, "stop[1] is 300"),
        ({"max_new_tokens": 0}, "whole number from 1, got 0"),
        ({"max_new_tokens": -3}, "whole number from 1, got -3"),
        ({"max_new_tokens": 2.5}, "whole number from 1, got 2.5"),
        ({"temperature": -0.1}, "temperature must be 0 (greedy) or positive"),
        ({"temperature": math.nan}, "got nan"),
        ({"temperature": math.inf}, "got inf"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "got 1.01"),
        ({"top_p": math.nan}, "got nan"),
        ({"seed": -1}, "seed must be in 0 .. 2**64 - 1, got -1"),
        ({"seed": 2**64}, f"got {2**64}"),
    ],
)
def test_impossible_requests_are_refused(model, bad, message):
    with pytest.raises(GenerateError) as error:
        generate(model, **({"prompt": [EOS], "max_new_tokens": 3} | bad))
    assert message in str(error.value)


def test_broken_weights_are_reported():
    model = Albor(CONFIG, seed=1)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerateError, match="not finite"):
            generate(model, [EOS], max_new_tokens=1, temperature=temperature)


# --- probabilities and draws -------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    st.floats(0.05, 20),
    st.floats(0.01, 1),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(values, temperature, top_p):
    logits = torch.tensor(values)
    full = (logits.double() / temperature).softmax(0)
    kept = reshape(logits, temperature, top_p)
    inside = kept > 0
    assert math.isclose(float(kept.sum()), 1.0, rel_tol=1e-12)
    mass = float(full[inside].sum())
    assert mass >= top_p - 1e-9
    assert mass - float(full[inside].min()) < top_p + 1e-9  # none could be spared
    if not inside.all():
        assert full[inside].min() >= full[~inside].max() - 1e-15
    torch.testing.assert_close(kept[inside], full[inside] / mass)


def test_temperature_is_a_division():
    logits = torch.tensor([1.0, -2.0, 0.5])
    for temperature in (0.3, 1.0, 4.0):
        expected = torch.softmax(logits.double() / temperature, 0)
        torch.testing.assert_close(reshape(logits, temperature, 1.0), expected)


def test_logits_are_not_changed():
    logits = torch.tensor([3.0, 1.0, 2.0])
    reshape(logits, 0.5, 0.5)
    assert logits.tolist() == [3.0, 1.0, 2.0]


def test_draws_follow_the_probabilities():
    """Chi-square with 3 degrees of freedom: 99.99% point about 21."""
    p = torch.tensor([0.1, 0.0, 0.55, 0.3, 0.05], dtype=torch.float64)
    for seed in (0, 1, 2**64 - 1):
        counts = np.bincount([draw(p, seed, i) for i in range(5_000)], minlength=5)
        assert counts[1] == 0
        wanted = 5_000 * p.numpy()[[0, 2, 3, 4]]
        assert ((counts[[0, 2, 3, 4]] - wanted) ** 2 / wanted).sum() < 21


def test_draws_are_pinned():
    """A change here changes every sampled text that was ever published."""
    p = torch.full((10,), 0.1, dtype=torch.float64)
    assert [draw(p, 1, i) for i in range(8)] == [3, 0, 3, 6, 8, 7, 7, 9]


@pytest.mark.parametrize("u", [0, 2**64 - 1])
def test_the_ends_of_the_line(monkeypatch, u):
    class Extreme:
        def __init__(self, key):
            pass

        def random_raw(self):
            return u

    monkeypatch.setattr(module.np.random, "Philox", Extreme)
    p = torch.tensor([0.0, 0.3, 0.7, 0.0], dtype=torch.float64)
    assert draw(p, 0, 0) == (1 if u == 0 else 2)  # never one without probability


# --- text --------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=266)


def written(monkeypatch, ids):
    """Make `generate` return these ids, and keep what it was asked."""
    asked = []

    def fake(model, prompt, **options):
        asked.append((prompt, options))
        return list(ids)

    monkeypatch.setattr(module, "generate", fake)
    return asked


def test_the_prompt_begins_like_a_document(model, tokenizer, monkeypatch):
    asked = written(monkeypatch, tokenizer.encode("x"))
    assert complete(model, tokenizer, "def </s>", seed=4, temperature=0.5) == "x"
    prompt, options = asked[0]
    assert prompt == [EOS, *tokenizer.encode("def </s>")]
    assert prompt.count(EOS) == 1  # what the text says is text
    assert options["seed"] == 4 and options["temperature"] == 0.5


def test_the_end_sign_is_not_written(model, tokenizer, monkeypatch):
    written(monkeypatch, [*tokenizer.encode("pass\n"), EOS])
    assert complete(model, tokenizer, "") == "pass\n"
    written(monkeypatch, [EOS])
    assert complete(model, tokenizer, "") == ""


def test_a_sign_of_infilling_ends_the_text(model, tokenizer, monkeypatch):
    """A model that has learnt to infill may open a sample where texts begin."""
    asked = written(monkeypatch, [*tokenizer.encode("pass\n"), FIM_PREFIX])
    assert complete(model, tokenizer, "") == "pass\n"
    assert set(asked[0][1]["stop"]) == set(range(7))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_half_characters_are_held_back(model, tokenizer, monkeypatch, missing):
    ids = tokenizer.encode("ok 🐍")
    written(monkeypatch, ids[:-missing])
    assert complete(model, tokenizer, "") == "ok "
    written(monkeypatch, ids)
    assert complete(model, tokenizer, "") == "ok 🐍"


def test_ids_beyond_the_tokenizer_are_left_out(model, tokenizer, monkeypatch):
    written(monkeypatch, [*tokenizer.encode("a"), 266, *tokenizer.encode("b"), 299])
    assert complete(model, tokenizer, "") == "ab"  # the model has 300 entries


def test_a_larger_tokenizer_is_refused(tokenizer):
    small = ModelConfig(
        vocab_size=265,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=40,
    )
    with pytest.raises(GenerateError, match="has 266 entries, the model 265"):
        complete(Albor(small), tokenizer, "x")


def test_real_completions_round_trip(model, tokenizer):
    for seed in range(5):
        text = complete(
            model, tokenizer, "def f", max_new_tokens=20, temperature=1.0, seed=seed
        )
        assert text[-1:] != "\ufffd" and "</s>" not in text
    with pytest.raises(GenerateError, match="context of 40"):
        complete(model, tokenizer, "x = 1\n" * 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_the_same_with_and_without_cache():
    model = Albor(CONFIG, seed=1).to("cuda")
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        options |= {"max_new_tokens": 30, "stop": ()}
        cached = generate(model, [EOS, 9], **options)
        assert cached == generate(model, [EOS, 9], **options, use_cache=False)
