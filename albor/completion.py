# Generated from book/completion.md: edit the chapter, not this file.
"""From text to text: completions, samples, streams, gaps, and a cell that fills in.

Notable here:
- tokens become text byte by byte: no half character is ever given out;
- a stop text ends a completion wherever it begins, inside a token or across many;
- what may be the beginning of a stop text is held back until that is decided;
- a prompt given several times gives several samples, each with its row's draws.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from albor.decode import New, decode
from albor.fim import infill_prompt
from albor.generate import GenerateError
from albor.model import Albor
from albor.sampling import Sampling
from albor.tokenizer import EOS, SPECIAL_TOKENS, Tokenizer

__all__ = [
    "CONTROL",
    "Completion",
    "Writer",
    "check_texts",
    "complete_batch",
    "complete_prompts",
    "completer",
    "infill",
    "stream",
    "token_bytes",
    "written",
]


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; none for the control tokens."""
    found = []
    # In the file a byte is a letter: itself if printable, else the next unused one.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    letters |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    for i in range(tokenizer.vocab_size):
        name = "" if i < len(SPECIAL_TOKENS) else tokenizer._backend.id_to_token(i)
        found.append(bytes(letters[letter] for letter in name or ""))
    return found


class Writer:
    """Makes text of tokens as they come, up to the first of the stop texts.

    `add` and `finish` return what is certain by now: whole characters that belong
    to no stop. `text` is all of it. After a stop, `stopped` is True and nothing
    follows. Where two stops overlap, the one that is complete first counts, and of
    two that end together the longer: the text does not depend on how it was cut
    into tokens. Bytes that are no UTF-8 give U+FFFD; half a character, nothing.
    """

    def __init__(self, pieces: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self.pieces, self.stop = pieces, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.held, self.stopped = "", "", False

    def add(self, token: int) -> str:
        """Take one more token. An id that the tokenizer lacks has no text."""
        if self.stopped:
            return ""
        known = self.pieces[token] if token < len(self.pieces) else b""
        self.held += self.decoder.decode(known)
        found = [stop for stop in self.stop if stop in self.held]
        ends = [(self.held.find(stop) + len(stop), -len(stop)) for stop in found]
        if ends:
            self.stopped = True
            self.held = self.held[: sum(min(ends))]
            return self.finish()
        return self._give(len(self.held) - self._undecided())

    def finish(self) -> str:
        """What was held back: no token follows."""
        return self._give(len(self.held))

    def _undecided(self) -> int:
        """Length of the longest end of `held` with which a stop text begins."""
        longest = max(map(len, self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-size:]) for stop in self.stop):
                return size
        return 0

    def _give(self, size: int) -> str:
        new, self.held = self.held[:size], self.held[size:]
        self.text += new
        return new


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    text: str  # up to a stop, in whole characters
    tokens: list[int]  # all that were generated, those of a stop included
    logprobs: list[float]  # of the tokens, by the model's own opinion, in nats
    ended: str  # "stop", "length" (max_new_tokens) or "context" (it is full)


CONTROL = range(len(SPECIAL_TOKENS))  # each of them ends a text


def check_texts(model: Albor, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
    """Refuse a tokenizer of another model, and stops that cannot be meant."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise GenerateError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, the model "
            f"{model.config.vocab_size:,}; load the tokenizer saved with the model"
        )
    if isinstance(stop, str):
        raise GenerateError(f"stop is one str; give a list of texts: [{stop!r}]")
    for place, one in enumerate(stop):
        if not isinstance(one, str) or not one:
            raise GenerateError(
                f"stop[{place}] is {one!r}, not a text of any length"
            )


def written(
    model: Albor,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] = CONTROL,
    rows: Sequence[int] | None = None,
    batch_size: int = 16,
    compiled: bool = False,
    **sampling: Any,
) -> Iterator[tuple[New, str]]:
    """Each new token of prompts of tokens, and the text that is certain with it.

    `sampling` are the fields of `Sampling`. A text ends at a stop token, which has
    no text, or where a stop text is complete.
    """
    check_texts(model, tokenizer, stop)
    pieces = token_bytes(tokenizer)
    writers = [Writer(pieces, stop) for _ in prompts]
    fresh = ""

    def ended(i: int, token: int) -> bool:
        nonlocal fresh
        fresh = "" if token in stop_tokens else writers[i].add(token)
        return writers[i].stopped

    for new in decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(**sampling),
        stop=stop_tokens,
        ended=ended,
        rows=rows,
        slots=batch_size,
        compiled=compiled,
    ):
        yield new, fresh + (writers[new.text].finish() if new.ended else "")


def complete_prompts(
    model: Albor, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], **how: Any
) -> list[Completion]:
    """Completions of prompts of tokens; `how` as in `written`."""
    texts, reasons = [""] * len(prompts), [""] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for (i, token, logprob, reason), text in written(
        model, tokenizer, prompts, **how
    ):
        texts[i] += text
        reasons[i] = reason
        tokens[i].append(token)
        logprobs[i].append(logprob)
    parts = zip(texts, tokens, logprobs, reasons, strict=True)
    return [Completion(*part) for part in parts]


def complete_batch(
    model: Albor,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> list[Completion]:
    """What the model writes after each text, up to a control token or a stop text.

    A text given several times gives as many samples: draws depend on (seed,
    `rows[i]`, position), rows being 0, 1, 2 ... if not given. Further options are
    repetition_penalty, no_repeat_ngram, stop_tokens, batch_size and compiled.
    """
    options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    options |= {"max_new_tokens": max_new_tokens, "seed": seed}
    prompts = [[EOS, *ids] for ids in tokenizer.encode_batch(texts)]
    return complete_prompts(
        model, tokenizer, prompts, stop=stop, rows=rows, **options
    )


def stream(
    model: Albor,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int = 64,
    row: int = 0,
    **options: Any,
) -> Iterator[str]:
    """The completion of one text in pieces, each given as soon as it is certain.

    Joined, the pieces are the text of `complete_batch`. None is empty, and none ends
    within a character. `options` are those of `complete_batch`.
    """
    prompt = [EOS, *tokenizer.encode(text)]
    options |= {"max_new_tokens": max_new_tokens, "rows": [row]}
    for _, piece in written(model, tokenizer, [prompt], **options):
        if piece:
            yield piece


def infill(
    model: Albor,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    style: str = "psm",
    max_new_tokens: int = 64,
    **options: Any,
) -> str:
    """What the model writes between prefix and suffix, up to a control token.

    `style` is "psm" or "spm", the order of training. The other options are those of
    `complete_batch`, stop texts among them.
    """
    prompt = infill_prompt(tokenizer, prefix, suffix, style)
    options["max_new_tokens"] = max_new_tokens
    (found,) = complete_prompts(model, tokenizer, [prompt], **options)
    return found.text


def completer(
    model: Albor,
    tokenizer: Tokenizer,
    *,
    mark: str = "<?>",
    style: str = "psm",
    shell: Any = None,
    **options: Any,
) -> Callable[[str], str]:
    """A function that fills the place of `mark` in a text, or goes on at its end.

    In IPython, or with a `shell` given, it is also the cell magic `%%complete`, which
    puts the result in place of the cell. `options` are those of `complete_batch`.
    """

    def fill(code: str) -> str:
        before, found, after = code.partition(mark)
        if found:
            middle = infill(model, tokenizer, before, after, style=style, **options)
            return before + middle + after
        return code + complete_batch(model, tokenizer, [code], **options)[0].text

    def magic(line: str, cell: str) -> None:
        shell.set_next_input(fill(cell.removesuffix("\n")), replace=True)

    if shell is None:
        try:  # only those who work in notebooks have it
            from IPython import get_ipython

            shell = get_ipython()
        except ImportError:
            pass
    if shell is not None:
        shell.register_magic_function(magic, "cell", "complete")
    return fill
