"""Choosing tokens for rows: against `transformers`, `generate` and plain loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from albor.generate import GenerateError, draw, reshape
from albor.sampling import (
    Sampling,
    choose,
    distribution,
    limit_repetition,
    uniform,
)


def noise(*shape, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.2, 3.0),
    st.integers(0, 50),
    st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    st.integers(0, 9),
    st.floats(0.1, 6.0),
)
def test_cuts_are_those_of_transformers(temperature, top_k, top_p, seed, spread):
    scores = noise(3, 41, seed=seed, spread=spread)
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = distribution(scores, how)
    wide = theirs.TemperatureLogitsWarper(temperature)(None, scores.double())
    if top_k:
        wide = theirs.TopKLogitsWarper(top_k)(None, wide)
    if top_p < 1:
        wide = theirs.TopPLogitsWarper(top_p)(None, wide)
    torch.testing.assert_close(ours, wide.softmax(-1), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("top_p", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 20.0])
def test_a_row_is_what_reshape_gives(top_p, spread):
    scores = noise(5, 301, spread=spread)
    rows = distribution(scores, Sampling(temperature=0.7, top_p=top_p))
    for row, one in zip(rows, scores, strict=True):
        torch.testing.assert_close(row, reshape(one, 0.7, top_p))


def test_equal_probabilities_rank_by_id():
    how = Sampling(temperature=1.0, top_k=3, top_p=0.5)
    rows = distribution(torch.zeros(2, 7), how)
    assert (rows > 0).tolist() == [[True, True] + [False] * 5] * 2


@pytest.mark.parametrize("penalty", [0.7, 1.3, 4.0])
@pytest.mark.parametrize("ngram", [0, 1, 2, 3])
def test_limits_are_those_of_transformers(penalty, ngram):
    text = [5, 1, 2, 5, 1, 7, 1, 2, 5, 1]
    scores = noise(1, 11)
    ids = torch.tensor([text])
    wanted = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores.clone())
    if ngram:
        wanted = theirs.NoRepeatNGramLogitsProcessor(ngram)(ids, wanted)
    limit_repetition(
        scores[0],
        text,
        Sampling(repetition_penalty=penalty, no_repeat_ngram=ngram),
    )
    assert torch.equal(scores, wanted)


def test_a_text_shorter_than_the_run_is_not_limited():
    scores = torch.zeros(4)
    limit_repetition(scores, [1], Sampling(no_repeat_ngram=3))
    assert scores.tolist() == [0, 0, 0, 0]


def test_row_zero_draws_what_generate_draws():
    line = torch.full((977,), 1 / 977, dtype=torch.float64)
    for seed in (0, 1, 2**64 - 1):
        for position in (0, 1, 2047):
            u = uniform(seed, 0, position)
            assert draw(line, seed, position) == int(u * 977)


def test_addresses_do_not_collide():
    numbers = {
        uniform(s, r, p) for s in range(9) for r in range(11) for p in range(13)
    }
    assert len(numbers) == 9 * 11 * 13


def test_draws_are_pinned():
    """A change here changes every sample that was ever published."""
    found = [int(1000 * uniform(1, row, 5)) for row in range(5)]
    assert found == [798, 481, 747, 661, 563]


def test_draws_follow_the_distribution():
    """Chi-square with 3 degrees of freedom: 99.99% point about 21."""
    scores = torch.tensor([[0.1, 0.55, 0.3, 0.05]]).log()
    how = Sampling(temperature=1.0, seed=3)
    many = scores.expand(4000, 4)
    tokens, _ = choose(many, [[0]] * 4000, range(4000), how)
    wanted = 4000 * scores[0].exp().numpy()
    counts = np.bincount(tokens, minlength=4)
    assert ((counts - wanted) ** 2 / wanted).sum() < 21


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_row_does_not_know_its_neighbours(temperature):
    scores = noise(6, 53)
    texts = [[1] * n for n in (3, 1, 4, 15, 9, 2)]
    how = Sampling(
        temperature=temperature, top_k=20, top_p=0.9, repetition_penalty=1.2
    )
    rows = [8, 3, 5, 0, 2, 7]
    together = choose(scores, texts, rows, how)
    for i, row in enumerate(rows):
        alone = choose(scores[i : i + 1], [texts[i]], [row], how)
        assert alone == ([together[0][i]], [together[1][i]])


def test_log_probabilities_are_the_models_own():
    scores = noise(4, 29)
    how = Sampling(temperature=0.3, top_k=2, repetition_penalty=1.7)
    tokens, logprobs = choose(scores, [[3, 4]] * 4, range(4), how)
    wanted = scores.double().log_softmax(-1)[range(4), tokens]
    found = torch.tensor(logprobs).double()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    before = scores.clone()
    choose(scores, [[3, 4]] * 4, range(4), how)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_reported(temperature, bad):
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 1.0]])
    with pytest.raises(GenerateError, match="not finite"):
        choose(scores, [[0], [0]], [0, 1], Sampling(temperature=temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_say_is_reported(temperature):
    how = Sampling(temperature=temperature, no_repeat_ngram=1)
    with pytest.raises(GenerateError, match="repetition limits leave no token"):
        choose(torch.zeros(1, 3), [[2, 0, 1]], [0], how)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"top_k": -1}, "top_k must be a whole number, 0 for no limit, got -1"),
        ({"top_k": 2.0}, "got 2.0"),
        ({"no_repeat_ngram": True}, "got True"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"repetition_penalty": math.nan}, "got nan"),
    ],
)
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(GenerateError, match=message):
        Sampling(**bad)
