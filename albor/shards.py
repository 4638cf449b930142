# Generated from book/shards.md: edit the chapter, not this file.
"""Token shards: streams of 16-bit integers on disk, mapped into memory.

Notable here:
- a split is one stream of uint16 tokens with `</s>` around every document, cut into
  shards of three files each: tokens, index, and a record that is written last;
- a folder is named by the digest of what went in, so a stale one is never reused;
- a stream opens without reading a token, whatever its length;
- what is truncated, damaged or of another tokenizer is refused, not read.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albor.artifacts import atomic_path, digest, read_json, sha256_file, write_json

__all__ = [
    "FORMAT",
    "MEND",
    "DataError",
    "TokenStream",
    "expect",
    "folder_for",
    "is_whole",
    "read_shard",
    "unigram_cross_entropy",
    "write_meta",
    "write_shard",
]


FORMAT = 2  # version of the files, part of their digest: a new one has new folders
MEND = "run prepare() again, it makes anew what is damaged"


class DataError(ValueError):
    """Token data is missing, damaged, foreign or too small; the text says which."""


def expect(what: str, expected: object, got: object, mend: str = MEND) -> None:
    """Refuse `got` where it is not as expected, naming the thing and the mend."""
    if got != expected:
        raise DataError(f"{what}: expected {expected}, got {got}; {mend}")


def write_shard(
    stem: Path,
    ids: np.ndarray | Sequence[int],
    starts: np.ndarray | Sequence[int],
    documents: Sequence[Sequence[Any]],
    **counts: int,
) -> dict[str, Any]:
    """Write stem.bin, stem.idx and, when both are whole, stem.json: its record.

    `starts` has the place of each document's first token in the shard and, last,
    the shard's length. `documents` lists (path, copy, tokens) of each; `counts` are
    kept in the record.
    """
    hashes = {}
    for suffix, kind, array in (("bin", "<u2", ids), ("idx", "<u8", starts)):
        file = stem.with_suffix(f".{suffix}")
        with atomic_path(file) as path:
            path.write_bytes(np.asarray(array, kind).tobytes())
        hashes[suffix] = sha256_file(file)
    record = {
        "data": stem.parent.name,  # the folder that it was made for
        "documents": [list(entry) for entry in documents],
        "sha256": hashes,
        "tokens": len(ids),
        **counts,
    }
    write_json(stem.with_suffix(".json"), {**record, "digest": digest(record)})
    return record


def read_shard(stem: Path, asked: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """The record of a shard if it is whole and of the (path, copy) asked."""
    try:
        record = read_json(stem.with_suffix(".json"))
        own = record.pop("digest")
        made = [entry[:2] for entry in record["documents"]]
        files = {x: sha256_file(stem.with_suffix(f".{x}")) for x in ("bin", "idx")}
        found = (own, record["data"], record["sha256"], made)
        wanted = [list(entry) for entry in asked]
        whole = found == (digest(record), stem.parent.name, files, wanted)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return record if whole else None


_COUNTS = ("documents", "tokens", "samples", "overhead", "dropped")  # summed up


def folder_for(folder: str | Path, inputs: dict[str, Any]) -> Path:
    """Where data made from `inputs` lies: a folder named by their digest."""
    return Path(folder) / digest(inputs)[:16]


def write_meta(
    folder: Path, inputs: dict[str, Any], made: dict[str, list[dict[str, Any]]]
) -> Path:
    """Write the folder's record from the shards' records by split, in order.

    What is there and the same is not touched: a finished folder may be read-only.
    """
    splits: dict[str, Any] = {}
    for split, records in made.items():
        total = dict.fromkeys(_COUNTS, 0)
        shards = []
        for number, record in enumerate(records):
            name = f"{split}-{number:05}"
            sidecar = {"json": sha256_file(folder / f"{name}.json")}
            counts = {**record, "documents": len(record["documents"])}
            total = {key: total[key] + counts.get(key, 0) for key in total}
            shard = {"name": name, "sha256": record["sha256"] | sidecar}
            shards.append(shard | {k: counts[k] for k in ("documents", "tokens")})
        if total["tokens"] < 2:
            raise DataError(f"{split}: {total['tokens']} tokens; give more text")
        splits[split] = {**total, "shards": shards}
    meta, file = {"inputs": inputs, "splits": splits}, folder / "meta.json"
    with contextlib.suppress(OSError, ValueError):
        if read_json(file) == meta:
            return folder
    write_json(file, meta)
    return folder


class TokenStream:
    """One split of a prepared folder: shards of tokens, read as one stream.

    Files are mapped when they are first touched, and read-only. `meta` is the
    folder's record. Make one with `open`, or with `of` from an array.
    """

    def __init__(
        self, pieces: Sequence[Path | np.ndarray], lengths: Sequence[int], meta: Any
    ) -> None:
        self.meta: dict[str, Any] = meta
        self.bounds = np.cumsum([0, *lengths])  # o_k, and last the stream's length
        self.sources = list(pieces)

        def mapped(number: int) -> np.ndarray:
            piece, length = pieces[number], lengths[number]
            if isinstance(piece, Path):  # an empty file cannot be mapped
                empty = np.empty(0, "<u2")
                piece = np.memmap(piece, "<u2", "r") if length else empty
            return piece.view(np.ndarray)

        # A map keeps its file open, and a process may open about a thousand.
        self._map = functools.lru_cache(maxsize=256)(mapped)

    @classmethod
    def of(cls, tokens: "TokenStream | np.ndarray") -> "TokenStream":
        """The same for an array of tokens, uint16 (N,); a stream stays as it is."""
        if isinstance(tokens, TokenStream):
            return tokens
        got = f"{tokens.dtype} {tokens.shape}"
        expect("tokens", f"uint16 ({tokens.size},)", got, "flatten or convert them")
        return cls([tokens], [len(tokens)], {})

    @classmethod
    def open(
        cls,
        folder: str | Path,
        split: str,
        *,
        vocab_size: int | None = None,
        tokenizer_digest: str | None = None,
        verify: bool = False,
    ) -> "TokenStream":
        """Open the "train" or "val" split of a folder, if it is what was recorded.

        Reads the record and the sizes, not the tokens, unless `verify` asks for the
        hashes. `vocab_size` and `tokenizer_digest` refuse another tokenizer's data.
        """
        folder = Path(folder)
        record = folder / "meta.json"
        if not record.is_file():
            raise DataError(f"{record} is missing; prepare() makes it, at its end")
        try:
            meta = read_json(record)
            inputs, shards = meta["inputs"], meta["splits"][split]["shards"]
            vocabulary, tokenizer = inputs["vocab_size"], inputs["tokenizer"]
            lengths = [shard["tokens"] for shard in shards]
            sizes, hashes = {}, {}
            for shard in shards:
                stem = folder / shard["name"]
                sizes[stem.with_suffix(".bin")] = 2 * shard["tokens"]
                sizes[stem.with_suffix(".idx")] = 8 * (shard["documents"] + 1)
                for suffix, value in shard["sha256"].items():
                    hashes[stem.with_suffix(f".{suffix}")] = value
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{record} is no record of the split {split!r} ({error!r}); {MEND}"
            ) from None
        expect(f"{record}: format", FORMAT, inputs.get("format"), "prepare() anew")
        name = folder.resolve().name
        expect(f"{record}: digest of the inputs", name, digest(inputs)[:16])
        for file, size in sizes.items():
            found = file.stat().st_size if file.is_file() else "no file"
            expect(f"{file}: bytes", size, found)
        mend = "prepare the data with the tokenizer of this model"
        if vocab_size is not None:
            expect(f"{record}: vocabulary", vocab_size, vocabulary, mend)
        if tokenizer_digest is not None:
            expect(f"{record}: tokenizer", tokenizer_digest, tokenizer, mend)
        for file, value in hashes.items() if verify else ():
            found = sha256_file(file) if file.is_file() else "no file"
            expect(f"{file}: SHA-256", value, found)
        return cls([x for x in sizes if x.suffix == ".bin"], lengths, meta)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def pieces(self) -> Iterator[np.ndarray]:
        """The shards one by one, uint16 (n_k,) each."""
        return map(self._map, range(len(self.sources)))

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens from place `start` of the stream: uint16 (length,)."""
        if not 0 <= start <= start + length <= len(self):
            raise DataError(
                f"tokens {start} to {start + length} of a stream of {len(self)}"
            )
        row = np.empty(length, np.uint16)
        shard = int(np.searchsorted(self.bounds, start, side="right")) - 1
        done = 0
        while done < length:
            place = start + done - int(self.bounds[shard])
            part = self._map(shard)[place : place + length - done]
            row[done : done + len(part)] = part
            done, shard = done + len(part), shard + 1
        return row

    def gather(self, starts: Iterable[int], length: int) -> np.ndarray:
        """Rows of `length` tokens from these places: uint16 (rows, length)."""
        rows = [self.read(int(start), length) for start in starts]
        return np.stack(rows) if rows else np.empty((0, length), np.uint16)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The place of each document's first token; last the length: uint64."""
        places = [
            np.fromfile(source.with_suffix(".idx"), "<u8")[:-1] + np.uint64(before)
            for source, before in zip(self.sources, self.bounds[:-1], strict=True)
            if isinstance(source, Path)
        ]
        return np.concatenate([*places, np.array([len(self)], "<u8")])


def is_whole(folder: str | Path) -> bool:
    """True if both splits are there, of this name's inputs, with their hashes."""
    try:
        for split in ("train", "val"):
            TokenStream.open(folder, split, verify=True)
    except (DataError, OSError):
        return False
    return True


def _token_counts(tokens: TokenStream | np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token id occurs: int64 (V,). Reads the stream in pieces."""
    stream = TokenStream.of(tokens)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(stream), 1 << 22):
        piece = stream.read(start, min(1 << 22, len(stream) - start))
        if piece.max() >= vocab_size:
            raise DataError(f"token {piece.max()} in a vocabulary of {vocab_size}")
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def unigram_cross_entropy(
    counts_from: TokenStream | np.ndarray,
    of: TokenStream | np.ndarray,
    vocab_size: int,
    smoothing: float = 1.0,
) -> float:
    """Nats per token of `of` under the token frequencies of `counts_from`.

    From training to validation data it is the loss of a model that knows only how
    frequent tokens are. Of the validation data under its own counts, unsmoothed, it
    is that set's entropy: the best that any table of frequencies could do.
    """
    seen = _token_counts(counts_from, vocab_size) + smoothing
    asked = _token_counts(of, vocab_size)
    if not asked.any() or not seen.any():
        raise DataError("unigram_cross_entropy needs a token on each side")
    chosen = asked > 0
    if not seen[chosen].all():
        return math.inf  # without smoothing, an unseen token is impossible
    logs = np.log(seen[chosen]) - math.log(seen.sum())
    return float(-(asked[chosen] * logs).sum() / asked.sum())
