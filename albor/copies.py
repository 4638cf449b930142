# Generated from book/copies.md: edit the chapter, not this file.
"""Near-copies among many texts: MinHash signatures, and banding to find pairs.

Notable:
- A signature is 128 numbers, whatever the length of the text; the share of places
  at which two agree estimates the Jaccard similarity of their 5-grams.
- Only texts that agree in a whole band of their signatures are ever compared.
- Signatures depend on the words of a text alone: the same in every process.
- Near-copies are measured and grouped; to drop any is the caller's decision.
"""

import numpy as np

from albor.overlap import (
    OverlapError,
    fixed_numbers,
    ngrams,
    run_hashes,
    word_hashes,
)

__all__ = ["ORDERS", "chance", "jaccard", "minhash", "near_duplicates"]


ORDERS = 128  # K, the numbers in a signature: J is estimated to about 0.04
_numbers = fixed_numbers("orders", 2 * ORDERS + 1)
_FACTOR, _SHIFT = (
    (_numbers[1:] >> np.uint64(32)).astype(np.uint32).reshape(2, -1, 1)
)
_FACTOR |= np.uint32(1)  # odd, so that every number has a place of its own
_STEP = _numbers[0] | np.uint64(1)


def minhash(text: str, n: int = 5) -> np.ndarray:
    """The signature of a text: its smallest n-gram in each of `ORDERS` orders.

    uint32 (K,). The share of places at which two signatures agree estimates the
    Jaccard similarity of the texts. A text of fewer than `n` words is one run.
    """
    hashes = word_hashes(text)
    runs = run_hashes(hashes, max(1, min(n, len(hashes))))
    runs = (runs >> np.uint64(32)).astype(np.uint32)
    smallest = np.full(ORDERS, 2**32 - 1, dtype=np.uint32)
    for start in range(0, len(runs), 2048):  # a megabyte, which the cache holds
        ordered = runs[start : start + 2048] * _FACTOR + _SHIFT
        np.minimum(smallest, ordered.min(axis=1), out=smallest)
    return smallest


def jaccard(a: str, b: str, n: int = 5) -> float:
    """The exact Jaccard similarity of the n-grams of two texts; 0 without any."""
    first, second = ngrams(a, n), ngrams(b, n)
    return len(first & second) / max(1, len(first | second))


def chance(similarity: float, rows: int, bands: int) -> float:
    """The probability that two texts agree in at least one of `bands` bands."""
    return 1 - (1 - similarity**rows) ** bands


def near_duplicates(
    signatures: np.ndarray, threshold: float = 0.7
) -> list[list[int]]:
    """Groups of texts that are alike, as sorted indices into `signatures` (N, K).

    Two texts with an estimated similarity of at least `threshold` are in one group,
    if they agree in a band (99% of pairs at the threshold do). Groups join along
    chains: their ends may be less alike than that. Others are in no group.
    """
    if not 0 < threshold <= 1:
        raise OverlapError(
            f"threshold = {threshold!r}: give a share, over 0 up to 1"
        )
    signatures = np.asarray(signatures)
    if signatures.ndim != 2:
        raise OverlapError(
            f"signatures of shape {signatures.shape}: stack them, (N, K)"
        )
    count, size = signatures.shape
    lengths = [
        r for r in range(1, size + 1) if chance(threshold, r, size // r) >= 0.99
    ]
    rows = max(lengths, default=1)
    group = np.arange(count)
    for start in range(0, size - rows + 1, rows):
        key = np.zeros(count, dtype=np.uint64)
        for column in range(start, start + rows):
            key = key * _STEP + signatures[:, column]
        order = np.argsort(key, kind="stable")
        cuts = np.flatnonzero(np.diff(key[order])) + 1
        for bucket in np.split(order, cuts) if count else []:
            while len(bucket) > 1:
                first, bucket = bucket[0], bucket[1:]
                strangers = bucket[group[bucket] != group[first]]
                if not len(strangers):
                    break
                alike = (signatures[strangers] == signatures[first]).mean(axis=1)
                for other in strangers[alike >= threshold]:
                    group[group == group[other]] = group[first]
    order = np.argsort(group, kind="stable")
    cuts = np.flatnonzero(np.diff(group[order])) + 1
    found = [part.tolist() for part in np.split(order, cuts) if len(part) > 1]
    return sorted(found)
