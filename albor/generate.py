# Generated from book/generate.md: edit the chapter, not this file.
"""Generation: one token at a time from a trained model, reproducibly.

Notable here:
- temperature and top-p reshape one probability vector; greedy decoding skips it;
- the draw for position n depends on (seed, n) alone, never on a global generator;
- with the key/value cache each step reads one token, and the tokens are the same;
- a text ends at a stop token, at the count asked for, or where the context is full.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from albor.model import Albor
from albor.tokenizer import EOS, SPECIAL_TOKENS, Tokenizer

__all__ = [
    "GenerateError",
    "check_request",
    "complete",
    "draw",
    "generate",
    "reshape",
    "why_stopped",
]


class GenerateError(ValueError):
    """A prompt or a sampling value is impossible; the text says which and why."""


def _sound(logits: torch.Tensor) -> torch.Tensor:
    """The logits, if all are finite: argmax would make a token of NaN, too."""
    if not logits.isfinite().all():
        raise GenerateError("the logits are not finite: the weights are bad")
    return logits


def reshape(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities to draw from: float64 (V,) on the CPU, summing to 1.

    `softmax(logits / temperature)`, of which the most probable tokens stay until
    their mass reaches `top_p`, the one that gets it there included (nucleus
    sampling, Holtzman et al. 2020). Equal probabilities rank by token id.
    """
    scores = _sound(logits).detach().to("cpu", torch.float64)
    probabilities = ((scores - scores.max()) / temperature).softmax(dim=-1)
    ranked, order = probabilities.sort(descending=True, stable=True)
    before = ranked.cumsum(0) - ranked  # the mass of all more probable tokens
    kept = torch.zeros_like(ranked).scatter(0, order, ranked * (before < top_p))
    return kept / kept.sum()


def draw(probabilities: torch.Tensor, seed: int, position: int) -> int:
    """A token id from probabilities (V,), the same for the same seed and position.

    A counter-based generator under the key (seed, position) gives u in [0, 1). The
    token is the first at which the running total of probabilities exceeds u.
    """
    key = np.array([seed, position], dtype=np.uint64)
    u = (int(np.random.Philox(key=key).random_raw()) >> 11) / 2**53
    total = probabilities.cumsum(0)
    return int(torch.searchsorted(total, u * float(total[-1]), right=True))


def check_request(
    model: Albor,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: Sequence[int],
    seed: int,
) -> None:
    """Refuse what no text can be generated from, before any work."""
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    if not len(prompt):
        raise GenerateError("the prompt is empty; begin it with the token `</s>`")
    for name, ids in (("prompt", prompt), ("stop", stop)):
        for place, token in enumerate(ids):
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab:
                raise GenerateError(
                    f"{name}[{place}] is {token!r}, not an id from 0 to {vocab - 1}"
                )
    if len(prompt) >= context:
        raise GenerateError(
            f"the prompt has {len(prompt):,} tokens, and a context of {context:,} "
            f"must hold one more; keep the last {context - 1:,} of them or fewer"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise GenerateError(
            f"max_new_tokens must be a whole number from 1, got {max_new_tokens!r}"
        )
    if not 0 <= temperature < math.inf:
        raise GenerateError(
            f"temperature must be 0 (greedy) or positive, got {temperature}"
        )
    if not 0 < top_p <= 1:
        raise GenerateError(f"top_p must be above 0 and at most 1, got {top_p}")
    if not 0 <= seed < 2**64:
        raise GenerateError(f"seed must be in 0 .. 2**64 - 1, got {seed}")


@torch.inference_mode()
def generate(
    model: Albor,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[int] = (EOS,),
    seed: int = 0,
    use_cache: bool = True,
) -> list[int]:
    """New tokens after `prompt`; a stop token ends them and is the last of them.

    Temperature 0 takes the most probable token each time. Prompt and new tokens
    together fill at most the model's context; `why_stopped` says what ended them.
    """
    check_request(model, prompt, max_new_tokens, temperature, top_p, stop, seed)
    context = model.config.max_position_embeddings
    head = model.model.embed_tokens.weight  # (V, D)
    ids = torch.tensor([list(prompt)], device=head.device)  # (1, T)
    end = min(len(prompt) + max_new_tokens, context)
    caches = model.new_caches(end) if use_cache else None
    unread = ids  # what the next forward pass must read
    training = model.training
    model.eval()
    try:
        while ids.shape[1] < end:
            hidden = model.model(unread, caches)[
                0, -1
            ]  # (D,): the last place alone
            logits = F.linear(hidden, head)  # (V,)
            if temperature == 0:
                token = int(_sound(logits).argmax())
            else:
                token = draw(
                    reshape(logits, temperature, top_p), seed, ids.shape[1]
                )
            newest = torch.tensor([[token]], device=head.device)
            ids = torch.cat([ids, newest], dim=1)
            unread = newest if use_cache else ids
            if token in stop:
                break
    finally:
        model.train(training)
    return ids[0, len(prompt) :].tolist()


def why_stopped(
    new: Sequence[int], max_new_tokens: int, stop: Sequence[int]
) -> str:
    """What ended the tokens that `generate` returned: stop, length or context."""
    if new and new[-1] in stop:
        return "stop"
    return "length" if len(new) == max_new_tokens else "context"


def complete(
    model: Albor,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
) -> str:
    """What the model writes after `text`, up to the first control token.

    The prompt is `</s>` and the text, which is how documents begin in the training
    stream. `</s>` is the end of the document; a sign of infilling, which a model
    may put where a fragment would begin, ends the text as well. A character whose
    last bytes were not generated any more is left out, and so are ids that the
    tokenizer does not have: a model may have room for more.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GenerateError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, the model "
            f"{model.config.vocab_size:,}; load the tokenizer saved with the model"
        )
    new = generate(
        model,
        [EOS, *tokenizer.encode(text)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=range(len(SPECIAL_TOKENS)),
        seed=seed,
        use_cache=use_cache,
    )
    if new[-1] < len(SPECIAL_TOKENS):
        new.pop()
    known = [token for token in new if token < tokenizer.vocab_size]
    return tokenizer.decode(known).rstrip("\N{REPLACEMENT CHARACTER}")
