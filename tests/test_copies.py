"""Signatures, bands and groups: the estimate holds, and no pair is lost."""

import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import copies
from albor.copies import ORDERS, chance, jaccard, minhash, near_duplicates
from albor.overlap import OverlapError, run_hashes, word_hashes


def slow_minhash(text: str, n: int) -> list[int]:
    """From the definition, with Python's integers."""
    hashes = word_hashes(text)
    runs = run_hashes(hashes, max(1, min(n, len(hashes)))).tolist()
    pairs = zip(copies._FACTOR.ravel(), copies._SHIFT.ravel(), strict=True)
    return [
        min([2**32 - 1, *(((run >> 32) * int(a) + int(b)) % 2**32 for run in runs)])
        for a, b in pairs
    ]


@settings(max_examples=50, deadline=None)
@given(st.text("ab c.", max_size=40), st.integers(1, 6))
def test_signatures_agree_with_the_definition(text: str, n: int) -> None:
    signature = minhash(text, n)
    assert signature.dtype == np.uint32 and signature.shape == (ORDERS,)
    assert signature.tolist() == slow_minhash(text, n)


def test_long_texts_are_worked_through_in_pieces() -> None:
    text = " ".join(f"w{i}" for i in range(5000))
    assert minhash(text).tolist() == slow_minhash(text, 5)


def test_every_order_is_a_permutation() -> None:
    assert (copies._FACTOR % 2 == 1).all()
    assert len(set(copies._FACTOR.ravel().tolist())) == ORDERS


def mixture(dice: random.Random, kept: float, size: int = 400) -> tuple[str, str]:
    """A text, and a copy in which a share of the words in a row are others."""
    first = [f"w{dice.random()}".replace(".", "") for _ in range(size)]
    cut = int(size * kept)
    second = first[:cut] + [f"v{dice.random()}"[:12] for _ in range(size - cut)]
    return " ".join(first), " ".join(second)


def test_the_estimate_is_unbiased() -> None:
    dice = random.Random(1)
    errors = []
    for kept in (0.1, 0.3, 0.5, 0.7, 0.9) * 40:
        a, b = mixture(dice, kept)
        exact = jaccard(a, b)
        estimate = (minhash(a) == minhash(b)).mean()
        errors.append((estimate - exact) / np.sqrt(exact * (1 - exact) / ORDERS))
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))
    assert 0.8 < np.std(errors) < 1.25


def test_jaccard() -> None:
    assert jaccard("a b c d e f", "a b c d e f") == 1
    assert jaccard("a b c d e f", "x a b c d e") == pytest.approx(1 / 3)
    assert jaccard("a b", "a b") == 0  # no run of five
    assert jaccard("", "") == 0


def test_chance() -> None:
    assert chance(0, 4, 32) == 0 and chance(1, 4, 32) == 1
    assert chance(0.5, 1, 1) == 0.5
    assert chance(0.5, 2, 3) == pytest.approx(1 - 0.75**3)


def test_planted_copies_are_found_and_nothing_else() -> None:
    dice = random.Random(2)
    texts, expected = [], []
    for i in range(60):
        base, other = mixture(dice, 0.95)
        texts.append(base)
        if i % 3 == 0:
            expected.append([len(texts) - 1, len(texts)])
            texts.append(other)
    signatures = np.stack([minhash(text) for text in texts])
    assert near_duplicates(signatures) == expected
    order = list(range(len(texts)))
    dice.shuffle(order)
    shuffled = near_duplicates(signatures[order])
    assert sorted(sorted(order[i] for i in group) for group in shuffled) == expected


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_groups_against_all_pairs(threshold: float) -> None:
    """Bands may miss a pair in a hundred at the threshold, and never invent one."""
    dice = np.random.default_rng(3)
    size = 300
    signatures = dice.integers(0, 2**32, (size, ORDERS), dtype=np.uint32)
    for i in range(1, size):  # each copies a random share of an earlier one
        same = dice.random(ORDERS) < dice.choice([0, 0, 0.2, 0.5, 0.8, 0.95, 1])
        signatures[i, same] = signatures[dice.integers(i), same]
    group = list(range(size))
    for i, j in itertools.combinations(range(size), 2):
        alike = (signatures[i] == signatures[j]).mean() >= threshold
        if alike and group[i] != group[j]:
            old, new = group[j], group[i]
            group = [new if x == old else x for x in group]
    found = near_duplicates(signatures, threshold)
    labels = {i: k for k, members in enumerate(found) for i in members}
    assert all(members == sorted(members) for members in found)
    assert found == sorted(found) and all(len(members) > 1 for members in found)
    true = {
        p
        for p in itertools.combinations(range(size), 2)
        if group[p[0]] == group[p[1]]
    }
    ours = {
        p for p in itertools.combinations(labels, 2) if labels[p[0]] == labels[p[1]]
    }
    ours = {(min(p), max(p)) for p in ours}
    assert ours <= true and len(ours) >= 0.97 * len(true)


def test_one_large_family_is_quick() -> None:
    signatures = np.tile(np.arange(ORDERS, dtype=np.uint32), (20_000, 1))
    signatures[::2, 0] = 7
    assert near_duplicates(signatures) == [list(range(20_000))]


def test_few_texts() -> None:
    empty = np.zeros((0, ORDERS), dtype=np.uint32)
    assert near_duplicates(empty) == near_duplicates(np.ones((1, ORDERS))) == []
    assert near_duplicates(np.stack([minhash(""), minhash("1")])) == [[0, 1]]


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_bad_threshold(threshold: float) -> None:
    with pytest.raises(OverlapError, match="threshold"):
        near_duplicates(np.zeros((2, ORDERS)), threshold)


def test_bad_shape() -> None:
    with pytest.raises(OverlapError, match="stack"):
        near_duplicates(minhash("some words"))


def test_the_same_in_every_process() -> None:
    code = (
        "from albor.copies import minhash; print(minhash('a b c d e f').tolist())"
    )
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
