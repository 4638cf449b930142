# Generated from book/fim.md: edit the chapter, not this file.
"""Fill-in-the-middle: rows of tokens in which some texts are told out of order.

Notable:
- A sample lies whole in one row: it is made of what has fallen into that row.
- Cuts fall between characters, where a hash of (seed, key) puts them; the parts
  are encoded one by one, so that a prompt has the tokens that training has shown.
- `</s>` follows a middle only where the document really ends.
- Every sample gives back its text exactly, and its text the same ids.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albor.tokenizer import (
    EOS,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    SPECIAL_TOKENS,
    Tokenizer,
    check_text,
)

__all__ = [
    "STYLES",
    "Encoded",
    "FimError",
    "Rows",
    "arrange",
    "decode_parts",
    "draw",
    "encode_parts",
    "find_samples",
    "infill_prompt",
    "pack_rows",
    "split_text",
]


STYLES = ("psm", "spm")


class FimError(ValueError):
    """A sample, a text or a setting that cannot be used; the text says why."""


def draw(seed: int, key: str) -> tuple[float, float, float]:
    """Three numbers in [0, 1) that depend on (seed, key) alone and look random."""
    bits = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
    one, two, three = (int.from_bytes(bits[i : i + 6]) for i in (0, 6, 12))
    return one / 2**48, two / 2**48, three / 2**48


def split_text(text: str, key: str, seed: int = 0) -> tuple[str, str, str]:
    """(prefix, middle, suffix) of a text, cut at two characters drawn for the key.

    Each cut is one of the len(text) + 1 places, so that every part may be empty.
    """
    _, *cuts = draw(seed, key)
    first, second = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    return text[:first], text[first:second], text[second:]


def arrange(
    prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], style: str
) -> list[int]:
    """Encoded parts in the order of a style, with the three control tokens."""
    if style == "psm":
        head = [FIM_PREFIX, *prefix, FIM_SUFFIX, *suffix]
        return [*head, FIM_MIDDLE, *middle]
    if style == "spm":
        head = [FIM_PREFIX, FIM_SUFFIX, *suffix]
        return [*head, FIM_MIDDLE, *prefix, *middle]
    raise FimError(f"style = {style!r}: give one of {', '.join(STYLES)}")


def encode_parts(
    tokenizer: Tokenizer,
    prefix: str,
    middle: str,
    suffix: str,
    style: str = "psm",
    ended: bool = True,
) -> list[int]:
    """One sample. The parts are encoded separately, as a prompt's would be.

    `ended` says that the document ends with the suffix; then `</s>` comes last.
    """
    one, two, three = tokenizer.encode_batch([prefix, middle, suffix])
    ids = arrange(one, two, three, style)
    return [*ids, EOS] if ended else ids


def infill_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, style: str = "psm"
) -> list[int]:
    """What to give a model that shall write the middle, up to its `</s>`.

    It begins with `</s>`, as every prompt and every document of a stream does.
    """
    left, right = tokenizer.encode_batch([prefix, suffix])
    return [EOS, *arrange(left, [], right, style)]


def decode_parts(
    tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray
) -> tuple[str, str, str]:
    """(prefix, middle, suffix) of one sample; joined, they are its text exactly.

    SPM does not mark where the prefix ends. Read by its signs such a sample has an
    empty prefix, and its middle holds prefix and middle.
    """
    ids = [int(i) for i in ids]
    if ids[-1:] == [EOS]:
        ids.pop()
    control = [i for i in ids if i < len(SPECIAL_TOKENS)]
    signs = [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE]
    if control != signs or ids[0] != FIM_PREFIX:
        raise FimError(
            f"no sample: it must begin with id {FIM_PREFIX} and have the control "
            f"tokens {signs}, with {EOS} last or not at all; got {control}, "
            f"beginning with {ids[:1]}"
        )
    at, end = ids.index(FIM_SUFFIX), ids.index(FIM_MIDDLE)
    decode = tokenizer.decode
    return decode(ids[1:at]), decode(ids[end + 1 :]), decode(ids[at + 1 : end])


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents packed into whole rows, and how they came to lie there."""

    ids: np.ndarray  # uint16 (rows * row_tokens,); the first is `</s>`
    starts: np.ndarray  # uint64 (documents + 1,): first token of each; the length
    plain: np.ndarray  # int64 (documents,): tokens of each in rows, left to right
    fragments: int  # pieces of a document in one row, reordered or not
    samples: int  # those that are reordered
    overhead: int  # tokens that reordering added: 3 signs each, words cut in two
    dropped: int  # tokens after the last whole row


# The beginning of a line that is not blank, as bytes: what comes next is visible.
_LINE = re.compile(rb"\n(?=[ \t]*[!-~])")
# The bytes of UTF-8 that go on with a character.
_WITHIN = {bytes([byte]) for byte in range(0x80, 0xC0)}


class Encoded:
    """A document and its ids: encodes pieces of it, mostly by copying ids."""

    def __init__(
        self, tokenizer: Tokenizer, text: str, ids: list[int], widths: np.ndarray
    ) -> None:
        self.tokenizer, self.data = tokenizer, text.encode()
        self.ids = np.array(ids, dtype=np.uint16)  # (n,)
        self.ends = np.append(0, np.cumsum(widths[self.ids]))  # (n + 1,), in bytes
        lines = _LINE.finditer(self.data) if tokenizer.keeps_lines else ()
        self.lines = np.array([line.end() for line in lines], dtype=np.int64)

    def encode(self, first: int, last: int) -> list[int]:
        """The ids of bytes `first` to `last`, as the tokenizer alone gives them."""
        encode, data = self.tokenizer.encode, self.data
        lines = self.lines[slice(*self.lines.searchsorted((first, last + 1)))]
        if len(lines) < 2:
            return encode(data[first:last].decode())
        head = encode(data[first : lines[0]].decode())
        tail = encode(data[lines[-1] : last].decode())
        copied = self.ids[slice(*self.ends.searchsorted(lines[[0, -1]]))]
        return [*head, *copied.tolist(), *tail]

    def whole(self, token: int, step: int) -> int:
        """`token`, or the next one that does not begin inside a character."""
        while self.data[self.ends[token] :][:1] in _WITHIN:
            token += step
        return token

    def reorder(
        self, done: int, room: int, style: str, key: str, seed: int
    ) -> tuple[int, list[int]] | None:
        """(`stop`, a sample made of the tokens `done` to `stop`), if one fits.

        It fills the room to the token, or holds the document's end and is shorter.
        """
        last = len(self.ids)
        start = self.whole(done, 1)  # the row before may have cut a character
        lead = self.ids[done:start].tolist()
        left = room - len(lead) - 3
        for slack in range(2, 18) if left > 0 else ():
            stop = self.whole(min(last, start + max(1, left - slack)), -1)
            if stop <= start:
                break
            begin, end = self.ends[[start, stop]].tolist()
            parts = split_text(self.data[begin:end].decode(), key, seed)
            one = begin + len(parts[0].encode())
            two = one + len(parts[1].encode())
            prefix, middle = self.encode(begin, one), self.encode(one, two)
            for _ in range(4):
                suffix = self.encode(two, int(self.ends[stop]))
                missing = left - len(prefix) - len(middle) - len(suffix)
                if missing == 0 or (missing > 0 and stop == last):
                    return stop, lead + arrange(prefix, middle, suffix, style)
                stop = self.whole(max(start, min(last, stop + missing)), -1)
                if self.ends[stop] < two:
                    break  # the suffix is too short to give so many tokens back
        return None


def pack_rows(
    texts: Sequence[str],
    keys: Sequence[str],
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    rate: float = 0.5,
    style: str = "psm",
    seed: int = 0,
) -> Rows:
    """Fill rows of `row_tokens` with `</s> text </s> text </s> ...`.

    What of a text falls into one row is reordered with the probability `rate`, and
    its three control tokens lie in that row. Draws depend on (seed, key, number of
    the fragment) alone. Tokens that do not fill a last row are dropped and counted.
    """
    if type(row_tokens) is not int or row_tokens < 4:
        raise FimError(f"row_tokens = {row_tokens!r}: give a whole number from 4")
    if not 0 <= rate <= 1:
        raise FimError(f"rate = {rate!r}: give a share from 0 to 1")
    if style not in STYLES:
        raise FimError(f"style = {style!r}: give one of {', '.join(STYLES)}")
    if len(texts) != len(keys):
        raise FimError(f"{len(texts)} texts, {len(keys)} keys: give each its own")
    widths = np.array(tokenizer.byte_lengths())
    end = np.array([EOS], dtype=np.uint16)
    stream, length = [end], 1
    starts: list[int] = []
    log = []  # of each fragment: its end, its document, its tokens, tokens added
    for text, key in zip(texts, keys, strict=True):
        check_text(text, repr(key))
    groups = (texts[first : first + 64] for first in range(0, len(texts), 64))
    encoded = (ids for group in groups for ids in tokenizer.encode_batch(group))
    for text, key, ids in zip(texts, keys, encoded, strict=True):
        document = Encoded(tokenizer, text, ids, widths)
        starts.append(length)
        done = number = 0
        while done < len(ids):
            room = row_tokens - length % row_tokens
            name, found = f"{number}:{key}", None
            if draw(seed, name)[0] < rate:
                found = document.reorder(done, room, style, name, seed)
            stop = min(len(ids), done + room)
            stop, piece = found or (stop, document.ids[done:stop])
            stream.append(np.array(piece, dtype=np.uint16))
            length += len(piece)
            tokens, done, number = stop - done, stop, number + 1
            log.append((length, len(starts) - 1, tokens, len(piece) - tokens))
        stream.append(end)
        length += 1
    kept = length - length % row_tokens
    table = np.array(log, dtype=np.int64).reshape(-1, 4)
    table = table[table[:, 0] <= kept]  # a fragment is in these rows or is not
    plain = np.zeros(len(texts), dtype=np.int64)
    np.add.at(plain, table[:, 1], table[:, 2])
    all_ids = np.concatenate(stream)[:kept]
    return Rows(
        ids=all_ids,
        starts=np.minimum([*starts, kept], kept).astype(np.uint64),
        plain=plain,
        fragments=len(table),
        samples=int((all_ids == FIM_PREFIX).sum()),
        overhead=int(table[:, 3].sum()),
        dropped=length - kept,
    )


def find_samples(ids: np.ndarray, row_tokens: int) -> list[slice]:
    """Where the samples of packed rows lie, `</s>` included if it is in the row."""
    starts = np.flatnonzero(ids == FIM_PREFIX)
    ends = np.append(np.flatnonzero(ids == EOS) + 1, len(ids))
    stops = np.minimum(
        ends[np.searchsorted(ends, starts, side="right")],
        (starts // row_tokens + 1) * row_tokens,
    )
    return list(map(slice, starts.tolist(), stops.tolist()))
