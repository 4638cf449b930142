# Generated from book/corpus.md: edit the chapter, not this file.
"""The corpus: documents to train on and to validate on, and how they came about.

Notable:
- One call finds, filters, measures and splits, and writes down what it did: what
  was left out and why, whose packages they are, how they score.
- The digest names the content. It does not depend on the order of directories, the
  number of workers, or Python's hash seed.
- No text is held in memory.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from albor.artifacts import digest
from albor.config import project_path
from albor.copies import near_duplicates
from albor.documents import Document as Document  # had from here as well
from albor.documents import Owner, Reading, Rules, find_owners, read_files
from albor.filters import (
    GOOD,
    MAX_BYTES,
    CorpusError,
    Density,
    is_permissive,
    is_test,
)
from albor.manifest import find_wheels
from albor.overlap import Contamination, load_problems
from albor.sources import Dropped, File, Source, find_sources, scan, shown
from albor.split import Taken, split

__all__ = [
    "Corpus",
    "Met",
    "build_corpus",
    "check_settings",
    "count_copies",
    "grade",
    "overlaps",
    "permitted",
    "resolve",
    "tally",
    "tier",
    "to_documents",
]


def grade(taken: Iterable[Taken]) -> dict[str, float]:
    """The score of every package over its files that are not tests."""
    sums: dict[str, Density] = defaultdict(Density)
    for file, reading in taken:
        if not is_test(file.path):
            sums[file.package] += reading.density
    return {package: round(counts.score, 3) for package, counts in sums.items()}


def tier(file: File, scores: dict[str, float]) -> int:
    """1 for files of packages that explain themselves, 2 for all others."""
    good = 1 if scores.get(file.package, 0) >= GOOD else 2
    return 2 if is_test(file.path) else file.source.tier or good


def to_documents(
    taken: list[Taken], scores: dict[str, float], owners: dict[str, Owner]
) -> list[Document]:
    """What was taken, as documents with tier and owner, in the order of paths."""
    documents = []
    for file, reading in sorted(taken, key=lambda one: one[0].path):
        owner = owners[file.package].distribution if file.package in owners else ""
        names = file.package, file.path, file.place
        measures = reading.size, reading.sha256, tier(file, scores)
        documents.append(Document(*names, *measures, owner))
    return documents


@dataclass(frozen=True)
class Corpus:
    """Both parts, in the order of their paths, and how they came about.

    `report` is plain JSON: settings, counts by reason, packages, licences, notes.
    `digest` names the content: the SHA-256 of the canonical JSON of the list of
    [part, package, path, SHA-256, tier] of every document, training first.
    """

    train: list[Document]
    val: list[Document]
    report: dict[str, Any]
    digest: str


def tally(parts: dict[str, list[Document]], dropped: Dropped) -> dict[str, Any]:
    """Counts of what was kept and left out, as plain JSON."""
    zero = {"files": 0, **dict.fromkeys(parts, 0)}
    packages: dict[str, Counter[str]] = defaultdict(lambda: Counter(zero))
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


def count_copies(taken: list[Taken]) -> dict[str, Any]:
    """How many files are near-copies of another, if signatures were taken."""
    marks = [np.frombuffer(reading.signature, np.uint32) for _, reading in taken]
    if not marks[0].size:
        return {}
    groups = near_duplicates(np.stack(marks), threshold=0.7)
    return {"threshold": 0.7, "files": sum(map(len, groups)), "groups": len(groups)}


def resolve(spec: str) -> list[Source]:
    """The sources of a corpus `spec`; parts that end in .csv are manifests."""
    parts = spec.split(os.pathsep) if isinstance(spec, str) else []
    tables = [part for part in parts if part.strip().endswith(".csv")]
    if not tables:
        return find_sources(spec)
    others = os.pathsep.join(part for part in parts if part not in tables)
    sources = find_sources(others) if others.strip() else []
    for table in tables:
        wheels = project_path("data/wheels")
        sources += find_wheels(project_path(table.strip()), wheels)
    return sources


def check_settings(**settings: Any) -> None:
    """Refuse what is no number of bytes, no seed, no choice of licences."""
    choices = ("auto", "permissive", "any")
    for key, value in settings.items():
        if key == "licences":
            if value not in choices:
                raise CorpusError(f"{key} = {value!r}: give one of {choices}")
        elif key == "docstrings":
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise CorpusError(f"{key} = {value!r}: give a number from 0 to 1")
        else:
            least = 1 if key in ("val_bytes", "max_file_bytes") else 0
            if type(value) is not int or value < least:
                why = f"give a whole number >= {least}"
                raise CorpusError(f"{key} = {value!r}: {why}")


def permitted(
    files: list[File], owners: dict[str, Owner], dropped: Dropped
) -> list[File]:
    """The files whose owners state permissive licences; the others are dropped."""
    kept = []
    for file in files:
        owner = owners.get(file.package)
        if owner is None or is_permissive(owner.licence):
            kept.append(file)
        else:
            dropped["licence"].append((file.path, file.size))
    return kept


Met = dict[str, list[tuple[int, str]]]  # problem -> (n-grams shared, path) of files


def overlaps(problems: Contamination | None, met: Met) -> dict[str, dict[str, Any]]:
    """What each problem shares with the files read, dropped ones included."""
    table = {}
    for name, ngrams in problems.counts.items() if problems else ():
        files = sorted(met.get(name, ()), key=lambda one: (-one[0], one[1]))
        most, nearest = files[0] if files else (0, "")
        enough = min(problems.least, ngrams) if problems else 0
        dropped = sum(shared >= enough for shared, _ in files)
        row: dict[str, Any] = {"ngrams": ngrams, "files": len(files), "most": most}
        table[name] = row | {"nearest": nearest, "dropped": dropped}
    return table


def build_corpus(
    spec: str = "",
    *,
    max_bytes: int = 0,
    val_bytes: int = 1_000_000,
    seed: int = 0,
    max_file_bytes: int = MAX_BYTES,
    workers: int = 0,
    docstrings: float = 0.0,
    licences: str = "auto",
    benchmarks: Any = None,
    near_copies: bool = False,
) -> Corpus:
    """Find, filter and split the Python source that `spec` names.

    `spec`: "" for this Python's standard library and installed packages; otherwise
    folders, package names or manifests (.csv), separated by `os.pathsep`.
    `max_bytes` takes a sample of about that size from all packages (0: everything);
    `val_bytes` of it, a tenth at most, are held out. `seed` draws the sample and
    the packages to hold out. `workers` are processes (0: a core each).
    `docstrings` is the least number per line. `licences`: "permissive", "any", or
    "auto": permissive, unless the user has named the packages. `benchmarks` (a
    file, a folder or a list of texts) holds problems that must not be trained on.
    `near_copies` counts files that are nearly alike, which takes a little longer.
    """
    chosen = {"max_bytes": max_bytes, "val_bytes": val_bytes, "seed": seed}
    settings = {"docstrings": docstrings, "licences": licences}
    settings |= {"max_file_bytes": max_file_bytes}
    check_settings(**chosen, **settings, workers=workers)
    sources = resolve(spec)
    listed: Dropped = defaultdict(list)
    files = scan(sources, listed, max_file_bytes)
    owners = find_owners(files)
    if licences == "permissive" or (licences == "auto" and not spec):
        files = permitted(files, owners, listed)
    problems = Contamination(load_problems(benchmarks)) if benchmarks else None
    rules = Rules(max_file_bytes, docstrings, problems, near_copies)
    given_away: dict[str, list[str]] = defaultdict(list)  # problem -> paths
    met: Met = defaultdict(list)

    def read(some: list[File]) -> Iterator[Reading]:
        found = read_files(some, rules, workers)
        for file, reading in zip(some, found, strict=True):
            for problem in reading.problems:
                given_away[problem].append(file.path)
            for problem, shared in reading.shared:
                met[problem].append((shared, file.path))
            yield reading

    for unit in ("package", "path"):
        given_away.clear()
        met.clear()
        dropped = Dropped(list, {why: [*some] for why, some in listed.items()})
        taken = split(files, unit, dropped, read, **chosen)
        if taken["train"] and taken["val"]:
            break
    else:
        why = [f"{len(some)} {reason}" for reason, some in sorted(dropped.items())]
        usable = sum(map(len, taken.values()))
        raise CorpusError(
            f"corpus {spec or 'of this Python'!r} has {usable} usable files "
            f"(left out: {', '.join(why) or 'none'}); two are the least, one to "
            "train on and one to hold out"
        )
    scores = grade(taken["train"] + taken["val"])
    parts = {
        part: to_documents(some, scores, owners) for part, some in taken.items()
    }
    counts = tally(parts, dropped)
    for package, entry in counts["packages"].items():
        entry["score"] = scores.get(package, 0.0)
    notes = []
    if any(source.kind == "folder" for source in sources):
        notes.append("licences of folders are not recorded; look them up yourself")
    if unit == "path":
        notes.append(
            "split by file, for only one package has usable files: validation loss "
            "will look better than on code by other hands"
        )
    report = {
        "spec": shown(spec),
        **chosen,
        **settings,
        "split_by": "file" if unit == "path" else unit,
        **counts,
        "licences": {
            owner.distribution: {"version": owner.version, "licence": owner.licence}
            for name, owner in sorted(owners.items(), key=lambda item: item[1])
            if name in counts["packages"]
        },
        "near_copies": count_copies(taken["train"] + taken["val"]),
        "benchmarks": {
            "problems": len(problems.names) if problems else 0,
            "digest": problems.digest if problems else "",
            "contaminated": {name: sorted(at) for name, at in given_away.items()},
            "overlap": overlaps(problems, met),
        },
        "notes": notes,
    }
    content = [
        [part, one.package, one.path, one.sha256, one.tier]
        for part, documents in parts.items()
        for one in documents
    ]
    return Corpus(parts["train"], parts["val"], report, digest(content))
