# Generated from book/data.md: edit the chapter, not this file.
"""Token files and batches: documents in, integer tensors out.

Notable here:
- a split is one flat stream of uint16 tokens with `</s>` around every document;
- a folder is named by the digest of what went in, so a stale one is never reused;
- the batch of step n is a function of (seed, n) alone: resuming costs nothing;
- on an accelerator the stream lives on the device, and batches are gathered there.
"""

import math
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from albor.artifacts import atomic_path, digest, read_json, sha256_file, write_json
from albor.corpus import Corpus, Document
from albor.tokenizer import EOS, Tokenizer

__all__ = ["Batches", "DataError", "TokenFile", "prepare", "unigram_cross_entropy"]


_FORMAT = 1  # version of the files, part of their digest: a new one has new folders
_AGAIN = "delete the folder and prepare() again"


class DataError(ValueError):
    """Token data is missing, damaged, foreign or too small; the text says which."""


def _expect(what: str, expected: object, got: object, mend: str = _AGAIN) -> None:
    """Refuse `got` where it is not as expected, naming the thing and the mend."""
    if got != expected:
        raise DataError(f"{what}: expected {expected}, got {got}; {mend}")


def _write_split(
    documents: list[Document], tokenizer: Tokenizer, folder: Path, split: str
) -> dict[str, Any]:
    """Write `split.bin` (tokens), `split.idx` (document starts); return a record.

    The stream is `</s> document </s> document </s> ...`. The index holds the place
    of each document's first token and, last, the length of the stream: document i
    with its closing `</s>` is `tokens[starts[i] : starts[i + 1]]`.
    """
    if not documents:
        raise DataError(f"no {split} documents; give build_corpus more packages")
    starts = [1]
    packages: Counter[str] = Counter()
    with atomic_path(folder / f"{split}.bin") as path, open(path, "wb") as stream:
        stream.write(np.array([EOS], dtype="<u2").tobytes())
        for first in range(0, len(documents), 64):  # a few MB of text at a time
            group = documents[first : first + 64]
            encoded = tokenizer.encode_batch([document.text for document in group])
            for document, ids in zip(group, encoded, strict=True):
                stream.write(np.array([*ids, EOS], dtype="<u2").tobytes())
                starts.append(starts[-1] + len(ids) + 1)
                packages[document.package] += len(ids) + 1
    with atomic_path(folder / f"{split}.idx") as path:
        path.write_bytes(np.array(starts, dtype="<u8").tobytes())
    files = (folder / f"{split}.bin", folder / f"{split}.idx")
    hashes = {file.name: sha256_file(file) for file in files}
    counts = {"tokens": starts[-1], "documents": len(documents)}
    return {**counts, "tokens_by_package": dict(packages), "sha256": hashes}


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One split of a prepared folder: a read-only, memory-mapped token stream."""

    path: Path
    meta: dict[str, Any]  # the folder's record: inputs, then counts and hashes
    vocab_size: int
    tokens: np.ndarray  # uint16 (N,)
    starts: np.ndarray  # uint64 (documents + 1,), as in _write_split

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        vocab_size: int | None = None,
        tokenizer_digest: str | None = None,
        verify: bool = False,
    ) -> "TokenFile":
        """Open `DIGEST/train.bin` or `DIGEST/val.bin`, if it is what was recorded.

        Reads the record and the sizes, not the tokens, unless `verify` asks for the
        hashes. `vocab_size` and `tokenizer_digest` refuse another tokenizer's data.
        """
        path = Path(path)
        index, record = path.with_suffix(".idx"), path.with_name("meta.json")
        for file in (path, index, record):
            if not file.is_file():
                raise DataError(f"{file} is missing; prepare() makes it")
        try:
            meta = read_json(record)
            inputs, split = meta["inputs"], meta["splits"][path.stem]
            sizes = {path: 2 * split["tokens"], index: 8 * (split["documents"] + 1)}
            vocabulary, tokenizer = inputs["vocab_size"], inputs["tokenizer"]
            hashes = dict(split["sha256"]) if verify else {}
        except (KeyError, TypeError, ValueError) as error:
            why = f"{record} is no record of {path.name} ({error!r}); {_AGAIN}"
            raise DataError(why) from None
        _expect(f"{record}: format", _FORMAT, inputs.get("format"))
        name = path.resolve().parent.name
        _expect(f"{record}: digest of the inputs", name, digest(inputs)[:16])
        for file, size in sizes.items():
            _expect(f"{file}: bytes", size, file.stat().st_size)
        mend = "prepare the data with the tokenizer of this model"
        if vocab_size is not None:
            _expect(f"{path}: vocabulary", vocab_size, vocabulary, mend)
        if tokenizer_digest is not None:
            _expect(f"{path}: tokenizer digest", tokenizer_digest, tokenizer, mend)
        for name, recorded in hashes.items():
            found = sha256_file(path.with_name(name))
            _expect(f"{path.with_name(name)}: SHA-256", recorded, found)
        tokens = np.memmap(path, dtype="<u2", mode="r")
        return cls(path, meta, vocabulary, tokens, np.fromfile(index, dtype="<u8"))

    def __len__(self) -> int:
        return len(self.tokens)


def _intact(folder: Path) -> bool:
    """True if both splits are there, of this name's inputs, with their SHA-256."""
    try:
        for split in ("train", "val"):
            TokenFile.open(folder / f"{split}.bin", verify=True)
    except (DataError, OSError):
        return False
    return True


def prepare(corpus: Corpus, tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Write the corpus as token files and return their folder, `folder/DIGEST`.

    DIGEST comes from the corpus, the tokenizer and the format. An intact folder of
    that name is reused, a damaged one made anew, beside it, and renamed at the end.
    """
    if tokenizer.vocab_size > 2**16:
        raise DataError(
            f"a vocabulary of {tokenizer.vocab_size:,} does not fit 16-bit tokens, "
            f"which count to {2**16:,}; train a smaller tokenizer"
        )
    inputs = {
        "format": _FORMAT,
        "corpus": corpus.digest,
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
    }
    name = digest(inputs)[:16]
    target = Path(folder) / name
    if _intact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        parts = {"train": corpus.train, "val": corpus.val}
        splits = {x: _write_split(parts[x], tokenizer, work, x) for x in parts}
        write_json(work / "meta.json", {"inputs": inputs, "splits": splits})
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work, target)
    except OSError:
        if not _intact(target):  # unless another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for leftover in target.parent.glob(f".{name}-*"):  # a killed run's
        shutil.rmtree(leftover, ignore_errors=True)
    return target


class Batches:
    """Shuffled batches of a token stream, each a function of (seed, step) alone.

    Row i starts at token `i * stride`. Its inputs are the `seq_len` tokens from
    there, its targets the same shifted by one, so the last target is the next token
    of the stream. `rows="pack"` cuts the stream every `seq_len` tokens;
    `rows="truncate"` cuts it every `row_tokens` and throws the tail of each row
    away, as the original did. An epoch takes every row once, in its own order, but
    for the last `sequences % batch_size`. `batch_size` counts a whole step's rows.
    """

    def __init__(
        self,
        tokens: TokenFile | np.ndarray,
        seq_len: int,
        batch_size: int,
        *,
        seed: int = 0,
        rows: str = "pack",
        row_tokens: int = 2048,
        device: str | torch.device = "cpu",
    ):
        self.stream = tokens.tokens if isinstance(tokens, TokenFile) else tokens
        got = f"{self.stream.dtype} {self.stream.shape}"
        _expect("tokens", f"uint16 ({self.stream.size},)", got, "flatten them")
        if seq_len < 1 or batch_size < 1 or not 0 <= seed < 2**64:
            raise DataError(
                "seq_len and batch_size start at 1, seed is in 0 .. 2**64 - 1; got "
                f"seq_len={seq_len}, batch_size={batch_size}, seed={seed}"
            )
        self.stride = {"pack": seq_len, "truncate": row_tokens}.get(rows, 0)
        if self.stride < seq_len:
            raise DataError(
                "rows must be 'pack', or 'truncate' with row_tokens of at least "
                f"seq_len={seq_len}; got {rows!r} with row_tokens={row_tokens}"
            )
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        whole_rows = len(self.stream) // self.stride
        with_a_target = (len(self.stream) - seq_len - 1) // self.stride + 1
        self.sequences = max(0, min(whole_rows, with_a_target))
        if self.sequences < batch_size:
            raise DataError(
                f"{len(self.stream):,} tokens make {self.sequences:,} rows of "
                f"{self.stride:,}, too few for one batch of {batch_size:,}; "
                "use more text, a shorter seq_len or a smaller batch"
            )
        self.steps_per_epoch = self.sequences // batch_size
        self.device = torch.device(device)
        self.resident: torch.Tensor | None = None  # int16 (N,) on the device
        if self.device.type != "cpu":
            signed = np.array(self.stream).view(np.int16)
            self.resident = torch.from_numpy(signed).to(self.device)
        self.window = torch.arange(seq_len + 1, device=self.device)
        self.epoch, self.order = -1, self.window[:0]

    def permutation(self, epoch: int) -> torch.Tensor:
        """The order in which this epoch takes the rows: int64 (sequences,).

        Rows are sorted by random keys: the raw output of a counter-based generator
        under the key (seed, epoch), the same with every NumPy on every machine.
        """
        key = np.array([self.seed, epoch], dtype=np.uint64)
        keys = np.random.Philox(key=key).random_raw(self.sequences)
        return torch.from_numpy(np.argsort(keys, kind="stable")).to(self.device)

    def places(self, step: int) -> torch.Tensor:
        """Row numbers in the batch of a step: int64 (batch_size,) on the device."""
        if step < 0:
            raise DataError(f"step must be at least 0, got {step}")
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:  # sorted once an epoch, without a look at any other
            self.epoch, self.order = epoch, self.permutation(epoch)
        return self.order[within * self.batch_size :][: self.batch_size]

    def rows_of(self, step: int) -> list[int]:
        """The same as a list, to say which rows a bad step has read."""
        return self.places(step).tolist()

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of step 0, 1, 2, ...: int64 (batch_size, T) each."""
        where = self.places(step)[:, None] * self.stride + self.window
        if self.resident is None:
            taken = torch.from_numpy(self.stream[where.numpy()].astype(np.int64))
        else:
            taken = self.resident[where].long() & 0xFFFF  # int16 back to uint16
        return taken[:, :-1].contiguous(), taken[:, 1:].contiguous()


def _token_counts(tokens: TokenFile | np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token id occurs: int64 (V,). Reads the stream in pieces."""
    stream = tokens.tokens if isinstance(tokens, TokenFile) else tokens
    counts = np.zeros(vocab_size, dtype=np.int64)
    for piece in np.split(stream, range(1 << 22, len(stream), 1 << 22)):
        if len(piece) and piece.max() >= vocab_size:
            raise DataError(f"token {piece.max()} in a vocabulary of {vocab_size}")
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def unigram_cross_entropy(
    counts_from: TokenFile | np.ndarray,
    of: TokenFile | np.ndarray,
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
