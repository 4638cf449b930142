# Generated from book/sampling.md: edit the chapter, not this file.
"""Choosing the next token for many texts at once, each as if it were alone.

Notable here:
- a draw depends on (seed, row, position) alone; row 0 draws what `generate` draws;
- top-k, nucleus and repetition limits count as they do in `transformers`;
- only the tokens that can be in the nucleus are sorted: a few of 32,768;
- each token comes with the log-probability that the model itself gave it.

Shapes: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from albor.generate import GenerateError

__all__ = ["Sampling", "choose", "distribution", "limit_repetition", "uniform"]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. As it stands: the most probable one, always."""

    temperature: float = 0.0
    top_k: int = 0  # draw among so many tokens; 0: among all
    top_p: float = 1.0  # draw among the fewest that have this mass
    repetition_penalty: float = 1.0  # above 1: less of what the text has
    no_repeat_ngram: int = 0  # no n tokens in a row come twice; 0: no limit
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "no_repeat_ngram"):
            if type(value := getattr(self, name)) is not int or value < 0:
                raise GenerateError(
                    f"{name} must be a whole number, 0 for no limit, got {value!r}"
                )
        if not 0 < self.repetition_penalty < math.inf:
            raise GenerateError(
                "repetition_penalty must be positive, 1 for none, got "
                f"{self.repetition_penalty}"
            )


def limit_repetition(scores: Tensor, text: Sequence[int], how: Sampling) -> None:
    """Make what `text` has said less probable in scores (V,), which are changed.

    The penalty divides positive scores of the text's tokens and multiplies negative
    ones (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1). A
    token that would complete n tokens in a row for the second time gets -inf.
    """
    if how.repetition_penalty != 1:
        seen = torch.tensor(sorted({*text}), device=scores.device)
        z, penalty = scores[seen], how.repetition_penalty
        scores[seen] = torch.where(z > 0, z / penalty, z * penalty)
    if n := how.no_repeat_ngram:
        text = [*text]
        tail = text[len(text) - n + 1 :]
        for i in range(len(text) - n + 1):
            if text[i : i + n - 1] == tail:
                scores[text[i + n - 1]] = -math.inf


def uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, row, position) alone."""
    key = np.array([seed, position], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=[0, 0, 0, row])
    return (int(philox.random_raw()) >> 11) / 2**53


def distribution(scores: Tensor, how: Sampling) -> Tensor:
    """Probabilities to draw from, float64 (B, V), of scores (B, V).

    Temperature first, then the `top_k` best, then of these the nucleus. Equal
    probabilities rank by token id. `reshape` does the same to one row, without k.
    """
    wide = scores.double()
    top = wide.amax(dim=-1, keepdim=True)
    p = ((wide - top) / how.temperature).softmax(dim=-1)
    vocab = p.shape[-1]
    k = min(how.top_k, vocab) or vocab
    if k == vocab and how.top_p == 1:
        return p
    # Tokens under `least` weigh less than 1 - top_p together, so that the others
    # reach top_p without them: only these must be sorted.
    least = torch.full_like(top, (1 - how.top_p) / vocab)
    if k < vocab:
        least = p.topk(k).values[:, -1:]
    kept = torch.zeros_like(p)
    for row in range(len(p)):
        ids = (p[row] >= least[row]).nonzero().flatten()
        ranked, order = p[row, ids].sort(descending=True, stable=True)
        ranked, order = ranked[:k], order[:k]
        whole = ranked.sum() if k < vocab else 1.0
        before = ranked.cumsum(0) - ranked  # the mass of all more probable tokens
        ranked = ranked * (before < how.top_p * whole)
        kept[row, ids[order]] = ranked / ranked.sum()
    return kept


def choose(
    logits: Tensor,
    texts: Sequence[Sequence[int]],
    rows: Sequence[int],
    how: Sampling,
) -> tuple[list[int], list[float]]:
    """The next token of each text, and its log-probability, of logits (B, V).

    `rows` are the numbers that the draws depend on, beside the texts' lengths. The
    log-probability is the model's own, in nats, before temperature and limits.
    """
    mps = logits.device.type == "mps"  # it has no float64
    scores = (logits.cpu() if mps else logits).float()
    log_sum = scores.logsumexp(dim=-1, keepdim=True)  # (B, 1)
    limited = scores
    if how.repetition_penalty != 1 or how.no_repeat_ngram:
        limited = scores.clone()
        for one, text in zip(limited, texts, strict=True):
            limit_repetition(one, text, how)
    if how.temperature == 0:
        chosen = limited.argmax(dim=-1, keepdim=True)  # (B, 1)
    else:
        total = distribution(limited, how).cumsum(dim=-1)  # (B, V)
        named = zip(rows, texts, strict=True)
        u = [[uniform(how.seed, row, len(text))] for row, text in named]
        goal = total.new_tensor(u) * total[:, -1:]  # (B, 1)
        chosen = torch.searchsorted(total, goal, right=True)
        chosen = chosen.clamp(max=total.shape[-1] - 1)  # only where all is NaN
    logprobs = (scores.gather(1, chosen) - log_sum).flatten().tolist()
    taken = limited.gather(1, chosen).flatten().tolist()
    if not all(map(math.isfinite, logprobs + taken)):
        raise GenerateError(
            "the logits are not finite: the weights are bad, or the repetition "
            "limits leave no token"
        )
    return chosen.flatten().tolist(), logprobs
