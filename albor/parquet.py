# Generated from book/parquet.md: edit the chapter, not this file.
"""Token rows of others: from the Parquet format to shards.

Notable here:
- any integer type, plain or large or fixed lists, any number of files and row
  groups; read a thousand rows at a time;
- ids of another vocabulary are refused, also when all of them are small enough:
  they do not come back when their text is encoded again;
- pyarrow is imported when a file is read, and is no requirement of the package.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from albor.artifacts import sha256_file
from albor.shards import (
    FORMAT,
    DataError,
    folder_for,
    is_whole,
    write_meta,
    write_shard,
)
from albor.tokenizer import EOS, SPECIAL_TOKENS, Tokenizer

__all__ = ["SHARD_TOKENS", "Row", "import_parquet", "native_share"]


def native_share(rows: Sequence[np.ndarray], tokenizer: Tokenizer) -> float:
    """Share of ids that come back when their text is encoded again.

    1.0 for this tokenizer's own rows, or a little less where a row begins or ends
    inside a character. Control tokens end a text and are not counted.
    """
    pieces = []
    for row in rows:
        cuts = np.flatnonzero(row < len(SPECIAL_TOKENS))
        for piece in np.split(row, cuts):
            pieces.append(piece[piece >= len(SPECIAL_TOKENS)].tolist())
    again = tokenizer.encode_batch([tokenizer.decode(piece) for piece in pieces])
    both = zip(pieces, again, strict=True)
    kept = sum((Counter(a) & Counter(b)).total() for a, b in both)
    return kept / max(1, sum(map(len, pieces)))


def _parquet_rows(
    file: Path, column: str, vocab_size: int
) -> Iterator[list[np.ndarray]]:
    """The rows of a Parquet column of lists, uint16 each, a thousand at a time."""
    try:
        import pyarrow as arrow
        from pyarrow import compute, parquet
    except ImportError:
        raise DataError(
            f"{file} is Parquet, and pyarrow reads it: pip install pyarrow"
        ) from None
    try:
        table = parquet.ParquetFile(file)
    except (OSError, arrow.ArrowInvalid) as error:
        raise DataError(f"{file} is no Parquet file: {error}") from None
    schema = table.schema_arrow
    if column not in schema.names:
        raise DataError(f"{file} has no column {column!r}, but {schema.names}")
    kind = schema.field(column).type
    if not arrow.types.is_integer(getattr(kind, "value_type", None) or kind) or (
        not arrow.types.is_nested(kind)
    ):
        raise DataError(f"{file}: {column} is {kind}; lists of integers are needed")
    before = 0  # rows read
    for batch in table.iter_batches(1024, columns=[column]):
        cells = batch.column(0)
        if not len(cells):
            continue
        values = cells.flatten()
        if cells.null_count or values.null_count:
            raise DataError(f"{file}: a null after row {before}; leave it out")
        ids = values.to_numpy()
        ends = np.cumsum(compute.list_value_length(cells).to_numpy())
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(wrong):
            row = before + int(np.searchsorted(ends, wrong[0], side="right"))
            raise DataError(
                f"{file}: token {ids[wrong[0]]} in row {row} of a vocabulary of "
                f"{vocab_size}; give the tokenizer that the file was made with"
            )
        before += len(cells)
        yield np.split(ids.astype("<u2"), ends[:-1])


SHARD_TOKENS = 1 << 20
Row = tuple[str, np.ndarray]  # where it comes from, and its tokens


def _groups(rows: Iterable[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows in lists of about so many tokens."""
    group: list[Row] = []
    held = 0
    for row in rows:
        group.append(row)
        held += len(row[1])
        if held >= tokens:
            yield group
            group, held = [], 0
    if group:
        yield group


def _ended(row: np.ndarray) -> np.ndarray:
    """A document's tokens with one `</s>` behind, and none in front."""
    row = row[1:] if len(row) and row[0] == EOS else row
    return row if len(row) and row[-1] == EOS else np.append(row, np.uint16(EOS))


def import_parquet(
    files: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    val: str | Path | Sequence[str | Path],
    column: str = "input_ids",
    packed: bool | None = None,
    check: bool = True,
) -> Path:
    """Write token rows of Parquet files as shards and return `folder/DIGEST`.

    `files` are trained on, `val` is held out. `packed`: rows are pieces of a stream
    and are laid end to end, or (False) documents, and get a `</s>`; None decides by
    the lengths. `check=False` takes ids that look like another tokenizer's.
    """
    parts = {"train": files, "val": val}
    paths = {
        split: [Path(x) for x in ([some] if isinstance(some, str | Path) else some)]
        for split, some in parts.items()
    }

    def rows_of(split: str) -> Iterator[tuple[str, np.ndarray]]:
        for file in paths[split]:
            number = 0
            for rows in _parquet_rows(file, column, tokenizer.vocab_size):
                for row in rows:
                    yield f"{file.name}:{number}", row
                    number += 1

    for split in paths:
        rows = [row[:4096] for _, row in itertools.islice(rows_of(split), 16)]
        share = native_share(rows, tokenizer)
        if check and sum(map(len, rows)) > 200 and share < 0.98:
            raise DataError(
                f"{paths[split][0]}: of its first ids only {share:.0%} come back "
                "when their text is encoded again; give the tokenizer that the "
                "file was made with, or check=False if it was this one"
            )
    if packed is None:
        packed = len({len(row) for x in paths for _, row in rows_of(x)}) == 1
    inputs = {
        "format": FORMAT,
        "corpus": {x: [sha256_file(file) for file in paths[x]] for x in paths},
        "column": column,
        "packed": packed,
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "shard_tokens": SHARD_TOKENS,
    }
    target = folder_for(folder, inputs)
    if is_whole(target):
        return target
    made: dict[str, list[dict[str, Any]]] = {split: [] for split in paths}
    for split, shards in made.items():
        for group in _groups(rows_of(split), SHARD_TOKENS):
            lead = [] if packed or shards else [np.array([EOS], "<u2")]
            rows = [row if packed else _ended(row) for _, row in group]
            starts = np.cumsum([0, *map(len, lead + rows)])[len(lead) :]
            listed = [(name, 0, len(row)) for name, row in group]
            stem = target / f"{split}-{len(shards):05}"
            ids = np.concatenate(lead + rows)
            shards.append(write_shard(stem, ids, starts, listed))
    return write_meta(target, inputs, made)
