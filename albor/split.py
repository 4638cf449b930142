# Generated from book/split.md: edit the chapter, not this file.
"""Which files to train on and which to hold out, by package and by bytes.

Notable:
- A whole package is either trained on or held out. Validation loss then speaks of
  code that the model has not seen, and not of another file by the same hands.
- The order in which files are taken comes from hashes of their paths: not from the
  disk, the clock, the number of workers or Python's hash seed.
- Shares are counted in bytes: no draw holds out a thousandth, or a third.
- A sample of some megabytes takes files from all packages and reads only those.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable

from albor.documents import Reading
from albor.sources import Dropped, File

__all__ = ["Taken", "choose_held_out", "rank", "split", "take"]


def rank(seed: int, name: str) -> bytes:
    """A place in an order that depends on (seed, name) alone and looks random."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def choose_held_out(sizes: dict[str, int], val_bytes: int, seed: int) -> list[str]:
    """Which packages to hold out so that they make up about `val_bytes`.

    In the order of their ranks, packages of at most a quarter of `val_bytes` are
    taken until three quarters are reached: no draw can hold out a giant, and none
    ends far from its mark. Where the small ones do not make up half, others follow,
    those up to `val_bytes` first and then the smallest, for the caller to cut to
    size. One package is always left to train on.
    """
    ranked = sorted(sizes, key=lambda name: rank(seed, name))
    small = [name for name in ranked if sizes[name] * 4 <= val_bytes]
    large = [name for name in ranked if sizes[name] * 4 > val_bytes]
    large.sort(key=lambda name: max(sizes[name], val_bytes))  # else still by rank
    held: list[str] = []
    total = 0
    for names, enough in ((small, 0.75 * val_bytes), (large, 0.5 * val_bytes)):
        for name in names:
            if total < enough and len(held) < len(sizes) - 1:
                held.append(name)
                total += sizes[name]
    return held


Taken = tuple[File, Reading]


def take(
    files: Iterable[File],
    limit: int,
    beyond: str,
    seen: set[str],
    dropped: Dropped,
    read: Callable[[list[File]], Iterable[Reading]],
) -> list[Taken]:
    """Judge files in order, up to `limit` bytes on disk; the rest are `beyond` it.

    `seen` holds the SHA-256 of the texts taken so far: exact copies are duplicates.
    """
    taken: list[Taken] = []
    waiting = list(files)[::-1]
    while waiting:
        block: list[File] = []  # all of it would fit, so all of it is read
        room = limit
        while waiting and waiting[-1].size <= room:
            block.append(waiting.pop())
            room -= block[-1].size
        for file, reading in zip(block, read(block), strict=True):
            reason = reading.reason
            if not reason and reading.sha256 in seen:
                reason = "duplicate"
            if reason:
                dropped[reason].append((file.path, file.size))
            else:
                seen.add(reading.sha256)
                taken.append((file, reading))
                limit -= file.size
        if waiting and waiting[-1].size > limit:
            file = waiting.pop()
            dropped[beyond].append((file.path, file.size))
    return taken


def split(
    files: list[File],
    unit: str,
    dropped: Dropped,
    read: Callable[[list[File]], Iterable[Reading]],
    *,
    max_bytes: int,
    val_bytes: int,
    seed: int,
) -> dict[str, list[Taken]]:
    """Take both parts; no `unit` ("package", or "path" of a file) is in both.

    Validation comes first, so that a text found in both parts leaves training.
    """
    files = sorted(files, key=lambda file: rank(seed, file.path))
    settled = [file for file in files if file.source.split == "val"]
    sizes: Counter[str] = Counter()
    for file in files:
        if file.source.split != "val":
            sizes[getattr(file, unit)] += file.size
    total = min(max_bytes or sys.maxsize, sizes.total())
    room = max(1, min(val_bytes, total // 10))
    held_out, seen = "held out, beyond val_bytes", set[str]()
    val = take(settled, val_bytes, held_out, seen, dropped, read)
    left = 0 if settled else room
    while not settled and len(sizes) > 1 and (not val or left > room / 2):
        names = set(choose_held_out(sizes, left, seed))
        some = [file for file in files if getattr(file, unit) in names]
        limit = max(left, min(file.size for file in some))  # one file at least
        val += take(some, limit, held_out, seen, dropped, read)
        left = room - sum(reading.size for _, reading in val)
        for name in names:
            del sizes[name]
    rest = [file for file in files if getattr(file, unit) in sizes]
    rest = [file for file in rest if file.source.split != "val"]
    limit = total if settled else total - room + left
    return {
        "train": take(rest, limit, "beyond max_bytes", seen, dropped, read),
        "val": val,
    }
