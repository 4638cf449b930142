# Generated from book/documents.md: edit the chapter, not this file.
"""Documents: files that were read, judged and measured, and are kept by name.

Notable:
- Texts stay on disk. A document is a path with a SHA-256 and is read again when it
  is needed, so memory does not grow with the corpus.
- Files are judged in worker processes; only small records travel between them, and
  they come back in the order of the files, whoever was faster.
- Every package gets its owner: the distribution, its version, its stated licence.
"""

import gc
import importlib.metadata
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from joblib import Parallel, cpu_count, delayed

from albor.artifacts import sha256_text
from albor.copies import minhash
from albor.filters import (
    MAX_BYTES,
    CorpusError,
    Density,
    clean,
    density,
    parse,
    read_text,
)
from albor.overlap import Contamination
from albor.sources import File

__all__ = [
    "GROUP",
    "LARGE",
    "Document",
    "Owner",
    "Reading",
    "Rules",
    "find_owners",
    "read_file",
    "read_files",
    "read_group",
    "stated",
]


@dataclass(frozen=True)
class Document:
    """One file: its package and path (posix, nothing of the machine), and its text.

    `size` is in bytes of UTF-8, `sha256` that of the text; `tier` is 1 or 2, and
    `distribution` names its owner, "" for a plain folder. `text` reads the file.
    """

    package: str
    path: str
    place: str = field(repr=False, compare=False)  # where it lies on this machine
    size: int
    sha256: str
    tier: int = 2
    distribution: str = ""

    @classmethod
    def read(cls, place: str | Path, package: str = "", path: str = "") -> Self:
        """A document of a file that was chosen by hand: nothing is judged."""
        place, text = Path(place), clean(Path(place).read_bytes())
        names = package or place.stem, path or place.name, str(place)
        return cls(*names, len(text.encode()), sha256_text(text))

    @property
    def text(self) -> str:
        """The text as it was judged; CorpusError if the file is another by now."""
        try:
            text = clean(Path(self.place).read_bytes())
        except (OSError, ValueError) as error:
            why = f"{self.path}: cannot be read any more ({error})"
            raise CorpusError(f"{why}; build the corpus again") from None
        now = sha256_text(text)
        if now != self.sha256:
            why = f"{self.path}: SHA-256 {self.sha256[:12]} became {now[:12]}"
            raise CorpusError(f"{why}; build the corpus again") from None
        return text


@dataclass(frozen=True)
class Rules:
    """What a worker must know to judge a file."""

    max_file_bytes: int = MAX_BYTES
    docstrings: float = 0.0  # least docstrings per line; 0: not asked
    contamination: Contamination | None = None  # texts that must not be trained on
    signatures: bool = False  # whether to take one of each text, for near-copies


@dataclass(frozen=True)
class Reading:
    """What a worker found: a reason to leave the file out, or else its measures."""

    reason: str
    size: int = 0  # bytes of the text
    sha256: str = ""
    density: Density = field(default_factory=Density)
    problems: tuple[str, ...] = ()  # that the text would give away
    shared: tuple[tuple[str, int], ...] = ()  # all met, with n-grams shared
    signature: bytes = b""  # of `copies.minhash`, if it was asked for


def read_file(file: File, rules: Rules) -> Reading:
    """Read, judge and measure one file; whatever it holds, this does not raise."""
    try:
        with open(file.place, "rb") as stream:
            data = stream.read(rules.max_file_bytes + 1)
    except OSError:
        return Reading("unreadable")
    text, reason = read_text(data, rules.max_file_bytes)
    if reason:
        return Reading(reason)
    tree = parse(text)
    if tree is None:
        return Reading("does not parse")
    counts = density(tree, lines=text.count("\n"))
    if counts.docstrings < rules.docstrings * counts.lines:
        return Reading("few docstrings")
    check = rules.contamination
    shared = check.shared(text) if check else {}
    found = tuple(check.found(text)) if check and shared else ()
    signature = minhash(text).tobytes() if rules.signatures else b""
    measures = len(text.encode()), sha256_text(text), counts, found
    reason = "contaminated" if found else ""
    return Reading(reason, *measures, tuple(shared.items()), signature)


GROUP = 100  # files that a worker gets at a time
LARGE = 16_000_000  # bytes from which starting processes pays


def read_group(files: list[File], rules: Rules) -> list[Reading]:
    """Read some files, in a worker or here."""
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree has no cycles, but many nodes to look for them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser comments on what it reads
            return [read_file(file, rules) for file in files]
    finally:
        if collecting:
            gc.enable()


def read_files(
    files: list[File], rules: Rules, workers: int = 0
) -> Iterator[Reading]:
    """Read files in `workers` processes; the records come in the files' order.

    0 takes a process per core for large sets, and none beside this one for small.
    """
    if not workers:
        workers = cpu_count() if sum(file.size for file in files) > LARGE else 1
    groups = [files[first : first + GROUP] for first in range(0, len(files), GROUP)]
    if min(workers, len(groups)) < 2:
        found = (read_group(group, rules) for group in groups)
    else:
        tasks = (delayed(read_group)(group, rules) for group in groups)
        found = Parallel(workers, return_as="generator")(tasks)
    for readings in found:
        yield from readings


class Owner(NamedTuple):
    """Whose a package is, as its metadata says."""

    distribution: str
    version: str
    licence: str


def stated(name: str) -> Owner:
    """Version and licence that an installed distribution states."""
    meta = importlib.metadata.metadata(name).json
    classifiers = [c.split(" :: ") for c in meta.get("classifier", ())]
    listed = "; ".join(c[-1] for c in classifiers if c[0] == "License")
    first_line = str(meta.get("license", "")).strip().partition("\n")[0][:80]
    licence = meta.get("license_expression") or listed or first_line
    return Owner(name, str(meta["version"]), str(licence or "not stated"))


def find_owners(files: list[File]) -> dict[str, Owner]:
    """The owner of every package, by its name; packages of folders have none.

    Where several distributions share a package, it has all of their licences.
    """
    known = importlib.metadata.packages_distributions()
    owners: dict[str, Owner] = {}
    for file in files:
        source, package = file.source, file.package
        if source.kind == "folder" or package in owners:
            continue
        if source.kind == "stdlib":
            owners[package] = Owner("Python", platform.python_version(), "PSF-2.0")
        elif source.kind == "wheel":
            owners[package] = Owner(package, source.version, source.licence)
        else:
            found = [stated(name) for name in sorted({*known.get(package, ())})]
            found = found or [Owner(package, "", "not stated")]
            names, versions, licences = zip(*found, strict=True)
            licence = "; ".join(dict.fromkeys(licences))
            owners[package] = Owner(", ".join(names), ", ".join(versions), licence)
    return owners
