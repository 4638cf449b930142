# Generated from book/data.md: edit the chapter, not this file.
"""Token data: documents in, folders of token shards out.

Notable here:
- what goes into which shard is settled before any worker starts: the same bytes
  come out for any number of workers, and after any interruption;
- a shard is the unit of work: made, checked and made again by itself;
- a worker is sent names and reads the texts: memory does not grow with the corpus;
- copies of good documents lie far apart; infilling samples lie whole in their rows.
"""

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from albor.artifacts import digest
from albor.corpus import Corpus
from albor.documents import Document
from albor.fim import STYLES, pack_rows
from albor.shards import (
    FORMAT,
    DataError,
    folder_for,
    read_shard,
    write_meta,
    write_shard,
)
from albor.tokenizer import EOS, Tokenizer

__all__ = [
    "ASCII_PIECES",
    "LINE",
    "REMEMBERED",
    "SHARD_BYTES",
    "FastEncoder",
    "Item",
    "Job",
    "cut_into_shards",
    "prepare",
    "spread_copies",
]


SHARD_BYTES = 4_000_000  # of text, about a million tokens


Item = tuple[Document, int]  # a document, and which of its copies


def spread_copies(documents: Sequence[Document], upsample: int) -> list[Item]:
    """Documents in their order; those of tier 1 `upsample` times, far apart.

    Copy c of n documents lies c * n / upsample places after the first, round the
    circle: between two copies stands that part of everything else.
    """
    around = len(documents) * upsample
    places = [
        ((i * upsample + copy * len(documents)) % around, copy, i)
        for i, document in enumerate(documents)
        for copy in range(upsample if document.tier == 1 else 1)
    ]
    return [(documents[i], copy) for _, copy, i in sorted(places)]


def cut_into_shards(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    """Neighbours together: shards of equal bytes of text, `shard_bytes` at most.

    A shard exceeds it by less than one document. All are about equal, for a tiny
    last one would leave a worker idle, and could be too short for a single row.
    """
    total = sum(document.size for document, _ in items)
    count = max(1, -(-total // shard_bytes))
    shards: list[list[Item]] = [[] for _ in range(count)]
    before = 0
    for item in items:
        shards[min(count - 1, before * count // max(1, total))].append(item)
        before += item[0].size
    return [shard for shard in shards if shard]


# SPLIT_PATTERN for ASCII, with its classes written out.
ASCII_PIECES = re.compile(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    r"|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^ \t-\rA-Za-z0-9]+[\r\n]*"
    r"|[ \t-\r]*[\r\n]+|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+"
)
LINE = re.compile(r"(?<=\n)(?=[ \t]*[!-~])")  # the beginning of one not blank
REMEMBERED = 200_000  # pieces: about 50 MB


class FastEncoder(dict[str, bytes]):
    """A tokenizer with a memory: the same ids, faster. Piece -> ids as uint16."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:  # all else, the tokenizer answers
        return getattr(self.tokenizer, name)

    def __missing__(self, piece: str) -> bytes:
        ids = np.array(self.tokenizer.encode(piece), "<u2").tobytes()
        if len(self) >= REMEMBERED:
            self.clear()
        if len(piece) < 100:
            self[piece] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, as `Tokenizer.encode` has them."""
        if not self.keeps_lines:
            return self.tokenizer.encode(text)
        found: list[bytes] = []
        lines = [text] if text.isascii() else LINE.split(text)
        for is_ascii, some in itertools.groupby(lines, str.isascii):
            part = "".join(some)
            pieces = ASCII_PIECES.findall(part) if is_ascii else [part]
            found += map(self.__getitem__, pieces)
        return np.frombuffer(b"".join(found), "<u2").tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


@dataclass(frozen=True)
class Job:
    """All that a worker must know to make one shard. It holds no text."""

    stem: Path  # the shard's files without suffix: DIGEST/train-00000
    items: list[Item]
    inputs: dict[str, Any]  # of the whole folder, as in its record

    @property
    def asked(self) -> list[list[Any]]:
        """Path and copy of every document, as in the shard's record."""
        return [[document.path, copy] for document, copy in self.items]

    @property
    def bytes(self) -> int:
        """Bytes of text to encode."""
        return sum(document.size for document, _ in self.items)


def _make(job: Job, tokenizer: Any) -> dict[str, Any]:
    """Encode a job's documents, write its shard, return the shard's record."""
    texts = [document.text for document, _ in job.items]
    split, _, number = job.stem.name.rpartition("-")
    rate, counts = job.inputs["fim_rate"], {}
    if rate and split == "train":
        keys = [f"{document.path}:{copy}" for document, copy in job.items]
        how = {key: job.inputs[key] for key in ("row_tokens", "style", "seed")}
        rows = pack_rows(texts, keys, tokenizer, rate=rate, **how)
        ids, starts, plain = rows.ids, rows.starts, rows.plain
        counts = {x: getattr(rows, x) for x in ("samples", "overhead", "dropped")}
    else:
        pieces = [np.array([EOS] if int(number) == 0 else [], "<u2")]
        pieces += [np.array([*tokenizer.encode(x), EOS], "<u2") for x in texts]
        ids = np.concatenate(pieces)
        starts = np.cumsum([len(piece) for piece in pieces])
        plain = np.array([len(piece) - 1 for piece in pieces[1:]])
    listed = zip(job.items, plain.tolist(), strict=True)
    documents = [[document.path, copy, n] for (document, copy), n in listed]
    return write_shard(job.stem, ids, starts, documents, **counts)


_LOADED: dict[str, FastEncoder] = {}  # in a worker process: the one it uses


def _make_in_worker(job: Job, saved: str) -> dict[str, Any]:
    """The same in a process of its own, which takes one core and no more."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if saved not in _LOADED:
        _LOADED.clear()
        _LOADED[saved] = FastEncoder(Tokenizer.load(saved))
    return _make(job, _LOADED[saved])


def _inputs_of(
    corpus: Corpus,
    tokenizer: Tokenizer,
    row_tokens: int,
    fim_rate: float,
    fim_style: str,
    upsample: int,
    seed: int,
) -> dict[str, Any]:
    """What decides the bytes of a prepared folder, refused where it cannot be."""
    for split in ("train", "val"):
        if not getattr(corpus, split):
            raise DataError(f"no {split} documents; give build_corpus more text")
    if tokenizer.vocab_size > 2**16:
        raise DataError(
            f"a vocabulary of {tokenizer.vocab_size:,} does not fit 16-bit tokens, "
            f"which count to {2**16:,}; train a smaller tokenizer"
        )
    if not 0 <= fim_rate <= 1 or fim_style not in STYLES or upsample < 1:
        raise DataError(
            f"fim_rate is in 0 .. 1, fim_style one of {STYLES}, upsample at least "
            f"1; got fim_rate={fim_rate}, fim_style={fim_style!r}, "
            f"upsample={upsample}"
        )
    if fim_rate and row_tokens < 8:
        raise DataError(
            f"fim_rate={fim_rate} needs row_tokens, the length of a row that holds "
            f"its samples whole: give the model's seq_len; got {row_tokens}"
        )
    fim = {"row_tokens": row_tokens, "style": fim_style, "seed": seed}
    good = [document.path for document in corpus.train if document.tier == 1]
    return {
        "format": FORMAT,
        "corpus": corpus.digest,
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "shard_bytes": SHARD_BYTES,
        "fim_rate": float(fim_rate),
        **(fim if fim_rate else {}),
        "upsample": upsample if good else 1,
        "repeated": digest(good) if good and upsample > 1 else "",
    }


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    row_tokens: int = 0,
    fim_rate: float = 0.0,
    fim_style: str = "psm",
    upsample: int = 1,
    seed: int = 0,
    workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the corpus as token shards and return their folder, `folder/DIGEST`.

    `fim_rate`: the share of fragments to turn into infilling samples, in rows of
    `row_tokens`, in `fim_style`, drawn from `seed`; training only. `upsample`: how
    often a document of tier 1 is taken; training only. `workers`: processes, 0 for
    one per core; 1 starts none. `on_progress(done, all)` counts bytes of text.

    Interrupted or killed, it goes on where it was; what is whole is kept. A worker
    holds one shard at a time, the caller none.
    """
    inputs = _inputs_of(
        corpus, tokenizer, row_tokens, fim_rate, fim_style, upsample, seed
    )
    if workers < 0:
        raise DataError(f"workers={workers}; give 0 (one per core), 1, 2, ...")
    target = folder_for(folder, inputs)
    parts = {
        "train": spread_copies(corpus.train, upsample),
        "val": spread_copies(corpus.val, 1),
    }
    jobs = [
        Job(target / f"{split}-{number:05}", items, inputs)
        for split, part in parts.items()
        for number, items in enumerate(cut_into_shards(part, SHARD_BYTES))
    ]
    made = {job.stem: read_shard(job.stem, job.asked) for job in jobs}
    to_do = [job for job in jobs if made[job.stem] is None]
    total = sum(job.bytes for job in jobs)
    done = total - sum(job.bytes for job in to_do)
    if not workers:  # small work is done before a process has started
        workers = joblib.cpu_count() if total - done > 2 * SHARD_BYTES else 1
    workers = min(workers, len(to_do))
    with tempfile.TemporaryDirectory() as saved:
        if workers > 1:
            tokenizer.save(saved)
            run = joblib.Parallel(n_jobs=workers, return_as="generator")
            tasks = (joblib.delayed(_make_in_worker)(job, saved) for job in to_do)
            results = run(tasks)
        else:
            results = map(_make, to_do, itertools.repeat(FastEncoder(tokenizer)))
        try:
            for job, record in zip(to_do, results, strict=True):
                made[job.stem] = record
                done += job.bytes
                if on_progress:
                    on_progress(done, total)
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for want of memory; call "
                f"prepare() again with fewer than {workers} workers: what is "
                "finished is kept"
            ) from None
    records: dict[str, list[dict[str, Any]]] = {split: [] for split in parts}
    for stem, found in made.items():
        if found is not None:
            records[stem.name.partition("-")[0]].append(found)
    return write_meta(target, inputs, records)
