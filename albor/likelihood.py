# Generated from book/likelihood.md: edit the chapter, not this file.
"""How probable a text is to a model: perplexity, bits per byte, log-likelihoods.

Notable:
- Perplexity, bits per byte and their interval come from one pass over one set of
  rows, so that they cannot belong to different models or texts.
- A row's loss is `evaluate_loss` of that row: the figure of the training log.
- Log-likelihoods follow the conventions of lm-evaluation-harness, where these are
  sound, so that its figures and ours agree for the same folder.

Shapes: T tokens, D width, V vocabulary. Probabilities are in nats.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from albor.model import Albor
from albor.shards import TokenStream
from albor.tokenizer import EOS, Tokenizer
from albor.train import evaluate_loss

__all__ = [
    "Judged",
    "LikelihoodError",
    "Perplexity",
    "check_fit",
    "judge",
    "loglikelihood",
    "perplexity",
    "rolling",
    "to_stream",
]


class LikelihoodError(ValueError):
    """A text, a stream or a tokenizer that cannot be judged; the text says why."""


@dataclass(frozen=True)
class Perplexity:
    """What one pass over rows of a text found. `record()` is the same as JSON."""

    loss: float  # nats per token, the mean over all that were judged
    error: float | None  # standard error of `loss` over rows; None for a single row
    tokens: int  # judged: rows x seq_len
    rows: int
    seq_len: int  # tokens that a row's last target can look back on
    text_bytes: int  # of UTF-8 that the judged tokens spell; `</s>` has none

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / max(1, self.text_bytes)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Perplexities within 1.96 standard errors: 95%, were rows independent."""
        if self.error is None or self.loss + 1.96 * self.error > 709:
            return None
        reach = 1.96 * self.error
        return math.exp(self.loss - reach), math.exp(self.loss + reach)

    def record(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        finite = self.perplexity if self.loss < 709 else None
        return {
            "loss": self.loss,
            "standard_error": self.error,
            "perplexity": finite,
            "perplexity_95": list(self.interval) if self.interval else None,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "rows": self.rows,
            "seq_len": self.seq_len,
            "bytes": self.text_bytes,
        }


def to_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Texts as tokens, with `</s>` around each: uint16 (N,)."""
    ids = [EOS]
    for each in tokenizer.encode_batch(texts):
        ids += [*each, EOS]
    return np.array(ids, dtype=np.uint16)


def perplexity(
    model: Albor,
    tokenizer: Tokenizer,
    tokens: TokenStream | np.ndarray,
    seq_len: int,
    *,
    sequences: int = 0,
    precision: str = "fp32",
) -> Perplexity:
    """Judge rows of a stream, uint16 (N,): all, or `sequences` evenly spaced ones.

    They are the rows of `evaluate_loss`, and so is the loss. The rows are also the
    units of the standard error: tokens of one row are too much alike for that.
    """
    stream = TokenStream.of(tokens)
    if seq_len < 1 or len(stream) < 2:
        raise LikelihoodError(
            f"{len(stream)} tokens in rows of seq_len = {seq_len}: give at least "
            "2, one to predict the other from, and rows of at least 1"
        )
    seq_len = min(seq_len, len(stream) - 1)
    rows = (len(stream) - 1) // seq_len
    count = min(sequences or rows, rows)
    widths = np.array(tokenizer.byte_lengths())  # bytes of each id
    losses, text_bytes = [], 0
    for i in range(count):
        row = stream.read(i * rows // count * seq_len, seq_len + 1)
        if row.max() >= len(widths):
            raise LikelihoodError(
                f"token {row.max()} in a vocabulary of {len(widths)}: the text was "
                "prepared with another tokenizer; prepare it with this one"
            )
        losses.append(evaluate_loss(model, row, seq_len, precision=precision)[0])
        text_bytes += int(widths[row[1:]].sum())
    error = statistics.stdev(losses) / math.sqrt(count) if count > 1 else None
    loss = math.fsum(losses) / count
    return Perplexity(loss, error, count * seq_len, count, seq_len, text_bytes)


@dataclass(frozen=True)
class Judged:
    """The probability of some tokens, given all that stood before them."""

    logprob: float  # nats, summed over the tokens
    tokens: int
    is_greedy: bool  # whether each was the most probable token at its place


@torch.no_grad()
def judge(model: Albor, ids: Sequence[int], count: int) -> Judged:
    """The last `count` of the ids (T,), each given all ids before it."""
    weight = model.model.embed_tokens.weight  # (V, D)
    given = torch.tensor([list(ids[:-1])], device=weight.device)  # (1, T - 1)
    goal = torch.tensor(list(ids[-count:]), device=weight.device)  # (count,)
    hidden = model.model(given)[0, -count:]  # (count, D)
    logits = F.linear(hidden, weight).float()  # (count, V)
    logprobs = logits.log_softmax(dim=-1).gather(1, goal[:, None])
    greedy = bool((logits.argmax(dim=-1) == goal).all())
    return Judged(float(logprobs.double().sum()), count, greedy)


def check_fit(model: Albor, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with entries that the model has no row for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise LikelihoodError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, the model "
            f"{model.config.vocab_size:,}; load the tokenizer saved with the model"
        )


def loglikelihood(
    model: Albor,
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    first: int | None = EOS,
) -> Judged:
    """How probable `continuation` is after `first` and `context`.

    Blank space at the end of the context counts as the continuation's, and both are
    encoded as one text, unless a token reaches over the boundary: then each for
    itself. Of an input that is too long the beginning goes. `first` is the token
    before everything: `</s>` as in training, or None for nothing, which is what
    lm-evaluation-harness puts before a context that is not empty.
    """
    check_fit(model, tokenizer)
    kept = len(context.rstrip())
    context, continuation = context[:kept], context[kept:] + continuation
    texts = [context, continuation, context + continuation]
    head, tail, whole = tokenizer.encode_batch(texts)
    if whole[: len(head)] == head:
        tail = whole[len(head) :]
    before = head if first is None else [first, *head]
    longest = model.config.max_position_embeddings
    if not before or not 1 <= len(tail) <= longest:
        raise LikelihoodError(
            f"{len(tail)} tokens to judge after {len(before)}: there must be one "
            f"to start from (first), and from 1 to {longest} to judge"
        )
    return judge(model, [*before, *tail][-(longest + 1) :], len(tail))


def rolling(
    model: Albor, tokenizer: Tokenizer, text: str, first: int = EOS
) -> Judged:
    """How probable a whole text is after `first`; every token is judged once.

    A text longer than the context is judged in windows of that length, one after
    the other; the last one reaches back to be full.
    """
    check_fit(model, tokenizer)
    ids, longest = tokenizer.encode(text), model.config.max_position_embeddings
    if not ids:
        raise LikelihoodError("the text is empty; give one to judge")
    padded, parts = [first, *ids], []
    for start in range(0, len(ids), longest):
        end = min(start + longest, len(ids))
        window = padded[max(0, end - longest) : end + 1]
        parts.append(judge(model, window, end - start))
    total = math.fsum(part.logprob for part in parts)
    return Judged(total, len(ids), all(part.is_greedy for part in parts))
