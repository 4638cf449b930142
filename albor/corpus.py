# Generated from book/corpus.md: edit the chapter, not this file.
"""Documents to train on and to validate on, split by package.

Notable:
- A whole package is either trained on or held out. Validation loss then speaks of
  code that the model has not seen, and not of another file by the same hands.
- The order in which files are taken comes from hashes of their paths: not from the
  disk, the clock or Python's hash seed. The same files give the same digest.
- A sample of some megabytes takes files from all packages and reads only those.
- Everything left out is counted by reason, and the licences are listed.
"""

import hashlib
import importlib.metadata
import platform
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from albor.artifacts import digest, sha256_text
from albor.sources import (
    MAX_BYTES,
    CorpusError,
    Dropped,
    File,
    find_sources,
    judge,
    scan,
    shown,
)

__all__ = [
    "Corpus",
    "Document",
    "build_corpus",
    "choose_held_out",
    "licences",
    "rank",
    "split",
    "take",
    "tally",
]


@dataclass(frozen=True)
class Document:
    """One file: its package, its path (posix, nothing of the machine), its text."""

    package: str
    path: str
    text: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8."""
        return sha256_text(self.text)


@dataclass(frozen=True)
class Corpus:
    """Both parts, in the order of their paths, and how they came about.

    `report` is plain JSON: settings, counts by reason, packages, licences, notes.
    `digest` names the content: (part, package, path, SHA-256) of every document.
    """

    train: list[Document]
    val: list[Document]
    report: dict[str, Any]
    digest: str


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


def take(
    files: Iterable[File], limit: int, beyond: str, seen: set[str], dropped: Dropped
) -> list[Document]:
    """Read and judge files in order, up to `limit` bytes; the rest are `beyond` it.

    `seen` holds the SHA-256 of the texts taken so far: exact copies are duplicates.
    """
    taken = []
    for file in files:
        reason, text = beyond, ""
        if file.size <= limit:
            try:
                with open(file.place, "rb") as stream:
                    text, reason = judge(stream.read(MAX_BYTES + 1))
            except OSError:
                reason = "unreadable"
        document = Document(file.package, file.path, text)
        if not reason and document.sha256 in seen:
            reason = "duplicate"
        if reason:
            dropped[reason].append((file.path, file.size))
        else:
            seen.add(document.sha256)
            taken.append(document)
            limit -= file.size
    return taken


def split(
    files: list[File],
    unit: str,
    dropped: Dropped,
    *,
    max_bytes: int,
    val_bytes: int,
    seed: int,
) -> dict[str, list[Document]]:
    """Take both parts; no `unit` ("package", or "path" of a file) is in both.

    Validation comes first, so that a text found in both parts leaves training.
    """
    files = sorted(files, key=lambda file: rank(seed, file.path))
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[getattr(file, unit)] += file.size
    total = min(max_bytes or sys.maxsize, sizes.total())
    room = max(1, min(val_bytes, total // 10))
    seen: set[str] = set()
    val: list[Document] = []
    left = room
    while len(sizes) > 1 and (not val or left > room / 2):
        names = set(choose_held_out(sizes, left, seed))
        some = [file for file in files if getattr(file, unit) in names]
        limit = max(left, min(file.size for file in some))  # one file at least
        val += take(some, limit, "held out, beyond val_bytes", seen, dropped)
        left = room - sum(document.size for document in val)
        for name in names:
            del sizes[name]
    rest = [file for file in files if getattr(file, unit) in sizes]
    train = take(rest, total - room + left, "beyond max_bytes", seen, dropped)
    return {
        part: sorted(documents, key=lambda document: document.path)
        for part, documents in (("train", train), ("val", val))
    }


def licences(packages: set[str]) -> dict[str, dict[str, str]]:
    """Version and stated licence of the distributions that hold `packages`."""
    found = {}
    for package, names in importlib.metadata.packages_distributions().items():
        for name in names if package in packages else ():
            meta = importlib.metadata.metadata(name).json
            classifiers = [c.split(" :: ") for c in meta.get("classifier", ())]
            stated = [c[-1] for c in classifiers if c[0] == "License"]
            first_line = str(meta.get("license", "")).strip().partition("\n")[0]
            licence = meta.get("license_expression") or "; ".join(stated)
            found[name] = {
                "version": str(meta["version"]),
                "licence": str(licence or first_line[:80] or "not stated"),
            }
    return dict(sorted(found.items()))


def tally(parts: dict[str, list[Document]], dropped: Dropped) -> dict[str, Any]:
    """Counts of what was kept and left out, as plain JSON."""
    packages: dict[str, Counter[str]] = defaultdict(
        lambda: Counter(files=0, **dict.fromkeys(parts, 0))
    )
    splits = {}
    for part, documents in parts.items():
        for document in documents:
            packages[document.package].update({"files": 1, part: document.size})
        splits[part] = {
            "files": len(documents),
            "bytes": sum(document.size for document in documents),
            "packages": len({document.package for document in documents}),
        }
    reasons = {
        reason: {
            "files": len(files),
            "bytes": sum(size for _, size in files),
            "examples": sorted(path for path, _ in files)[:3],
        }
        for reason, files in sorted(dropped.items())
    }
    by_name = {name: dict(counts) for name, counts in sorted(packages.items())}
    return {"splits": splits, "dropped": reasons, "packages": by_name}


def build_corpus(
    spec: str = "", *, max_bytes: int = 0, val_bytes: int = 1_000_000, seed: int = 0
) -> Corpus:
    """Find, filter and split the Python source that `spec` names.

    `spec`: "" for this Python's standard library and installed packages; otherwise
    folders or package names, separated by `os.pathsep`. `max_bytes` takes a sample
    of about that size from all packages (0: everything); `val_bytes` of it, a tenth
    at most, are held out. `seed` draws the sample and the packages to hold out.
    """
    settings = {"max_bytes": max_bytes, "val_bytes": val_bytes, "seed": seed}
    for key, value in settings.items():
        least = 1 if key == "val_bytes" else 0
        if type(value) is not int or value < least:
            raise CorpusError(f"{key} = {value!r}: give a whole number >= {least}")
    sources = find_sources(spec)
    listed: Dropped = defaultdict(list)
    files = scan(sources, listed)
    for unit in ("package", "path"):
        dropped = Dropped(
            list, {reason: [*some] for reason, some in listed.items()}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ast.parse comments on what it reads
            parts = split(files, unit, dropped, **settings)
        if parts["train"] and parts["val"]:
            break
    else:
        counts = [
            f"{len(some)} {reason}" for reason, some in sorted(dropped.items())
        ]
        usable = sum(map(len, parts.values()))
        raise CorpusError(
            f"corpus {spec or 'of this Python'!r} has {usable} usable files "
            f"(left out: {', '.join(counts) or 'none'}); two are the least, one to "
            "train on and one to hold out"
        )
    kinds = {source.kind for source in sources}
    names = {document.package for part in parts.values() for document in part}
    found = licences(names) if "site-packages" in kinds else {}
    if "stdlib" in kinds:
        found["Python"] = {
            "version": platform.python_version(),
            "licence": "PSF-2.0",
        }
    notes = []
    if "folder" in kinds:
        notes.append("licences of folders are not recorded; look them up yourself")
    if unit == "path":
        notes.append(
            "split by file, for only one package has usable files: validation loss "
            "will look better than on code by other hands"
        )
    content = [
        [part, document.package, document.path, document.sha256]
        for part, documents in parts.items()
        for document in documents
    ]
    return Corpus(
        parts["train"],
        parts["val"],
        {
            "spec": shown(spec),
            **settings,
            "split_by": "file" if unit == "path" else unit,
            **tally(parts, dropped),
            "licences": found,
            "notes": notes,
        },
        digest(content),
    )
