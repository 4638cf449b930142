# Generated from book/corpus.md: edit the chapter, not this file.
"""The Python source on this machine as documents: found, filtered, split by package.

Notable:
- Nothing is downloaded and nothing is imported or run: files are listed, read and
  parsed. Links are never followed, and only regular files are opened.
- Whatever is left out is counted, with its reason and its bytes.
- Order comes from hashes of the paths: not from the disk, the clock or the hash seed.
- A whole package is either trained on or held out, so that validation loss measures
  code that the model has not seen, and not another file by the same hands.
"""

import ast
import codecs
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import stat
import sys
import sysconfig
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.artifacts import digest, sha256_text
from albor.config import project_path

__all__ = [
    "GENERATED",
    "MAX_BYTES",
    "MAX_LINE",
    "MIN_BYTES",
    "MIN_LETTERS",
    "VENDORED",
    "Corpus",
    "CorpusError",
    "Document",
    "Dropped",
    "File",
    "Source",
    "build_corpus",
    "choose_held_out",
    "find_package",
    "find_sources",
    "installed",
    "judge",
    "label_of",
    "licences",
    "normal",
    "rank",
    "refuse_by_listing",
    "scan",
    "shown",
    "split",
    "take",
    "top_level_names",
    "wanted",
]


class CorpusError(ValueError):
    """A corpus that cannot be built; the message names the source and the mend."""


@dataclass(frozen=True)
class Document:
    """One file: its package, its path (posix, no machine in it), its text (LF)."""

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
    """Documents to train on and to validate on, and how they came about.

    `report` is JSON: counts by reason, packages, licences. `digest` names the content:
    every (split, package, path, SHA-256 of the text).
    """

    train: list[Document]
    val: list[Document]
    report: dict[str, Any]
    digest: str


MIN_BYTES, MAX_BYTES = 50, 100_000  # of a file on disk
MAX_LINE = 1_000  # characters
MIN_LETTERS = 0.25  # share of characters that are letters

# Folders that hold copies of other people's packages.
VENDORED = frozenset(
    "_vendor _vendored vendor vendored extern externals third_party node_modules "
    "site-packages dist-packages".split()
)
# Words by which files say, in their first lines, that a program wrote them.
GENERATED = re.compile(
    r"@generated|do not (edit|modify)|auto(matically|-|\s)\s*generated"
    r"|^#.*\bgenerated\b",
    re.IGNORECASE | re.MULTILINE,
)


def judge(data: bytes) -> tuple[str, str]:
    """The text of a file and "", or "" and the reason why it is left out.

    UTF-8 is strict; a byte order mark goes, CRLF and CR become LF. A file that
    declares another encoding (PEP 263) is not guessed at.
    """
    if not MIN_BYTES <= len(data) <= MAX_BYTES:
        return "", "too small" if len(data) < MIN_BYTES else "too large"
    try:
        declared, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if codecs.lookup(declared).name not in ("utf-8", "utf-8-sig", "ascii"):
            return "", "not UTF-8"
        text = data.decode("utf-8-sig")
    except (SyntaxError, UnicodeDecodeError):
        return "", "not UTF-8"
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_LINE:
        return "", "long line"
    if sum(map(str.isalpha, text)) < MIN_LETTERS * len(text):
        return "", "few letters"
    if GENERATED.search("\n".join(lines[:20])):
        return "", "generated"
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "", "does not parse"
    return text, ""


@dataclass(frozen=True)
class Source:
    """A folder to read: all of it, or one top-level `name` in it.

    `kind` says what a top-level name in it stands for: "stdlib", "site-packages", or
    "folder" for one that the user gave.
    """

    kind: str
    folder: str
    name: str = ""


def installed() -> list[Source]:
    """The standard library and every folder of installed packages of this Python."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"]]
    folders += [
        p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")
    ]
    found = {os.path.realpath(paths["stdlib"]): "stdlib"}
    for folder in filter(os.path.isdir, map(os.path.realpath, folders)):
        found.setdefault(folder, "site-packages")
    return [Source(kind, folder) for folder, kind in found.items()]


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def top_level_names() -> dict[str, set[str]]:
    """For every installed distribution (normal name) its top-level import names."""
    names: dict[str, set[str]] = {}
    for (
        package,
        distributions,
    ) in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            names.setdefault(normal(distribution), set()).add(package)
    return names


def find_package(name: str) -> list[Source]:
    """Where the top-level import `name` lies; nothing is imported."""
    if not name.isidentifier():
        return []
    found = []
    for source in installed():
        place = os.path.join(source.folder, name)
        if os.path.isdir(place) or os.path.isfile(place + ".py"):
            found.append(Source(source.kind, source.folder, name))
    if not found:  # elsewhere on the path, for example an editable install
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        places = list(spec.submodule_search_locations or []) if spec else []
        if spec and not places and spec.has_location and spec.origin:
            places = [spec.origin]
        for place in map(os.path.realpath, places):
            found.append(Source("site-packages", os.path.dirname(place), name))
    return found


def find_sources(spec: str) -> list[Source]:
    """Turn a corpus `spec` into sources; "" is this Python and all that it has.

    Otherwise folders, import names or distribution names, split at `os.pathsep`.
    """
    if not isinstance(spec, str):
        raise CorpusError(f"corpus={spec!r}: give one string, '' for this Python")
    if not spec:
        return installed()
    sources: dict[Source, None] = {}
    for part in filter(None, map(str.strip, spec.split(os.pathsep))):
        folder = project_path(os.path.expanduser(part))
        if os.path.isdir(folder):
            sources[Source("folder", os.path.realpath(folder))] = None
            continue
        if os.path.exists(folder):
            raise CorpusError(
                f"corpus {part!r} is a file; give the folder around it"
            )
        names = [part] if find_package(part) else []
        names = names or sorted(top_level_names().get(normal(part), ()))
        found = [source for name in names for source in find_package(name)]
        if not found:
            known = set(sys.stdlib_module_names) | top_level_names().keys()
            known |= importlib.metadata.packages_distributions().keys()
            if folder.parent.is_dir():
                known |= {p.name for p in folder.parent.iterdir() if p.is_dir()}
            close = difflib.get_close_matches(Path(part).name, sorted(known), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise CorpusError(
                f"corpus {part!r} is neither a folder nor an installed package{hint} "
                f"(folders and packages are separated by {os.pathsep!r})"
            )
        sources |= dict.fromkeys(found)
    if not sources:
        raise CorpusError(f"corpus={spec!r} names no folder and no package")
    return list(sources)


@dataclass(frozen=True)
class File:
    """A candidate: its package, its path as shown, its place on disk, its bytes."""

    package: str
    path: str
    place: str
    size: int


# Why files were left out: reason -> (path as shown, bytes on disk).
Dropped = defaultdict[str, list[tuple[str, int]]]


def label_of(source: Source, sources: list[Source]) -> str:
    """What the shown paths of `source` begin with; "" when a folder stands alone."""
    if source.kind != "folder":
        return source.kind
    folders = {Path(other.folder).parts for other in sources}
    depth = 0 if len(folders) == 1 else 1
    while depth and len({parts[-depth:] for parts in folders}) < len(folders):
        depth += 1  # two folders of one name: show the folders above them too
    return "/".join(Path(source.folder).parts[-depth:]) if depth else ""


def wanted(source: Source, name: str) -> bool:
    """Whether an entry at the top of `source` belongs to it."""
    if source.name:
        return name in (source.name, source.name + ".py")
    if source.kind == "site-packages":
        ours = name == "albor" or name.startswith("__editable__")
        return not ours and not name.endswith((".dist-info", ".egg-info"))
    return source.kind == "folder" or name not in VENDORED


def scan(sources: list[Source], dropped: Dropped) -> list[File]:
    """List the files worth reading and count the others; no file is opened."""
    files: dict[str, File] = {}
    for source in sources:
        label = label_of(source, sources)
        stack: list[tuple[str, ...]] = [
            ()
        ]  # folders, as the names below the source
        while stack:
            above = stack.pop()
            try:
                with os.scandir(os.path.join(source.folder, *above)) as listing:
                    entries = list(listing)
            except OSError:
                dropped["unreadable"].append((shown(label, *above), 0))
                continue
            for entry in entries:
                name, path = entry.name, shown(label, *above, entry.name)
                if name.startswith(".") or name == "__pycache__":
                    continue
                if not above and not wanted(source, name):
                    continue
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError:
                    dropped["unreadable"].append((path, 0))
                    continue
                if stat.S_ISDIR(info.st_mode):
                    stack.append((*above, name))
                elif stat.S_ISLNK(info.st_mode) and entry.is_dir():
                    dropped["link"].append((path, 0))
                elif name.endswith(".py"):
                    top = (
                        (*above, name)[0]
                        if above or source.kind != "folder"
                        else "."
                    )
                    package = shown(top.removesuffix(".py"))
                    file = File(package, path, entry.path, info.st_size)
                    if reason := refuse_by_listing(above, info):
                        dropped[reason].append((path, file.size))
                    else:
                        files[file.place] = file
    return list(files.values())


def shown(*names: str) -> str:
    """A path for reports; bytes of a name that are not UTF-8 become `\\xff`."""
    path = "/".join(filter(None, names)) or "."
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def refuse_by_listing(above: tuple[str, ...], info: os.stat_result) -> str:
    """Why a file need not be opened; "" if it must be."""
    if not stat.S_ISREG(info.st_mode):
        return "link" if stat.S_ISLNK(info.st_mode) else "not a regular file"
    if VENDORED & set(above):
        return "vendored"
    if info.st_size < MIN_BYTES:
        return "too small"
    return "too large" if info.st_size > MAX_BYTES else ""


def rank(seed: int, name: str) -> bytes:
    """A place in an order that depends on (seed, name) alone."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def choose_held_out(sizes: dict[str, int], val_bytes: int, seed: int) -> list[str]:
    """Which packages to hold out so that they make up about `val_bytes`.

    In the order of their ranks, packages of at most a quarter of `val_bytes` are taken
    until three quarters are reached: no draw can give a giant. If the small ones do
    not reach half, the smallest of the others follow, and the caller cuts them to
    size. One package is always left to train on.
    """
    order = sorted(sizes, key=lambda name: rank(seed, name))
    small = [name for name in order if sizes[name] * 4 <= val_bytes]
    large = sorted(set(order) - set(small), key=lambda name: (sizes[name], name))
    held: list[str] = []
    total = 0
    for names, enough in ((small, 0.75 * val_bytes), (large, 0.5 * val_bytes)):
        for name in names:
            if total < enough and len(held) < len(sizes) - 1:
                held.append(name)
                total += sizes[name]
    return held


def take(
    files: Iterable[File],
    limit: float,
    beyond: str,
    seen: set[str],
    dropped: Dropped,
) -> list[Document]:
    """Read and judge files in order until `limit` bytes; what is left is `beyond`.

    `seen` holds the SHA-256 of every text taken so far: exact copies are dropped.
    """
    taken, room = [], limit
    for file in files:
        if file.size > room:
            dropped[beyond].append((file.path, file.size))
            continue
        try:
            with open(file.place, "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
            text, reason = judge(data)
        except OSError:
            text, reason = "", "unreadable"
        document = Document(file.package, file.path, text)
        if not reason and document.sha256 in seen:
            reason = "duplicate"
        if reason:
            dropped[reason].append((file.path, file.size))
            continue
        seen.add(document.sha256)
        taken.append(document)
        room -= len(data)
    return taken


def split(
    files: list[File],
    unit: str,
    dropped: Dropped,
    *,
    max_bytes: int,
    val_bytes: int,
    seed: int,
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; no `unit` (package, or path) is in both."""
    files = sorted(files, key=lambda file: rank(seed, file.path))
    sizes: defaultdict[str, int] = defaultdict(int)
    for file in files:
        sizes[getattr(file, unit)] += file.size
    total = min(max_bytes or sys.maxsize, sum(sizes.values()))
    room = max(1, min(val_bytes, total // 10))
    seen: set[str] = set()
    val: list[Document] = []
    val_size = 0
    while len(sizes) > 1 and (not val or val_size < room / 2):
        names = choose_held_out(sizes, room - val_size, seed)
        some = [file for file in files if getattr(file, unit) in names]
        limit = max(room - val_size, min(file.size for file in some))
        val += take(some, limit, "held out, beyond val_bytes", seen, dropped)
        val_size = sum(document.size for document in val)
        for name in names:
            del sizes[name]
    rest = [file for file in files if getattr(file, unit) in sizes]
    train = take(rest, total - val_size, "beyond max_bytes", seen, dropped)
    return (
        sorted(train, key=lambda document: document.path),
        sorted(val, key=lambda document: document.path),
    )


def licences(kinds: set[str], packages: set[str]) -> dict[str, dict[str, str]]:
    """Version and licence, as its metadata states it, of every distribution used."""
    found = {}
    if "stdlib" in kinds:
        version = platform.python_version()
        found["Python"] = {"version": version, "licence": "PSF-2.0"}
    if "site-packages" not in kinds:
        return found
    for package, names in importlib.metadata.packages_distributions().items():
        for name in names if package in packages else []:
            meta = importlib.metadata.metadata(name)
            classifiers = meta.get_all("Classifier") or []
            stated = [
                c.split(" :: ")[-1] for c in classifiers if c[:9] == "License ::"
            ]
            text = (meta.get("License") or "").strip().partition("\n")[0][:80]
            expression = meta.get("License-Expression")
            licence = expression or "; ".join(stated) or text or "not stated"
            found[name] = {"version": meta["Version"], "licence": licence}
    return found


def build_corpus(
    spec: str = "", *, max_bytes: int = 0, val_bytes: int = 1_000_000, seed: int = 0
) -> Corpus:
    """Find, filter and split the Python source that `spec` names.

    `spec`: "" for this Python's standard library and installed packages; otherwise
    folders or package names, separated by `os.pathsep`. `max_bytes` takes a sample of
    about that size across all packages (0: everything), `val_bytes` of which, and a
    tenth at most, are held out. `seed` draws the sample and the held-out packages.
    """
    for key, value in {"max_bytes": max_bytes, "val_bytes": val_bytes}.items():
        if type(value) is not int or value < (key == "val_bytes"):
            raise CorpusError(f"{key}={value!r}: give a whole number of bytes")
    sources = find_sources(spec)
    listed: Dropped = defaultdict(list)
    files = scan(sources, listed)
    for unit in ("package", "path"):
        dropped: Dropped = defaultdict(
            list, {k: list(v) for k, v in listed.items()}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what ast.parse thinks of other people
            train, val = split(
                files,
                unit,
                dropped,
                max_bytes=max_bytes,
                val_bytes=val_bytes,
                seed=seed,
            )
        if train and val:
            break
    else:
        counts = ", ".join(f"{len(v)} {k}" for k, v in sorted(dropped.items()))
        raise CorpusError(
            f"corpus {spec or 'of this Python'!r}: {len(train) + len(val)} usable "
            f"Python files of {len(files) + sum(map(len, listed.values()))} "
            f"({counts or 'no .py file there'}); two are needed, to train and to validate"
        )
    kinds = {source.kind for source in sources}
    parts = {"train": train, "val": val}
    packages: defaultdict[str, dict[str, int]] = defaultdict(
        lambda: {"files": 0, "train": 0, "val": 0}
    )
    for part, documents in parts.items():
        for document in documents:
            packages[document.package]["files"] += 1
            packages[document.package][part] += document.size
    notes = []
    if unit == "path":
        notes.append(
            "split by file, because only one package has usable files: validation "
            "loss will look better than on code by other hands"
        )
    if "folder" in kinds:
        notes.append(
            "the licences of folders are not recorded: check them yourself"
        )
    report = {
        "spec": shown(spec) if spec else "",
        "max_bytes": max_bytes,
        "val_bytes": val_bytes,
        "seed": seed,
        "split_by": "file" if unit == "path" else "package",
        "splits": {
            part: {
                "files": len(documents),
                "bytes": sum(document.size for document in documents),
                "packages": len({document.package for document in documents}),
            }
            for part, documents in parts.items()
        },
        "dropped": {
            reason: {
                "files": len(found),
                "bytes": sum(size for _, size in found),
                "examples": sorted(path for path, _ in found)[:3],
            }
            for reason, found in sorted(dropped.items())
        },
        "packages": dict(sorted(packages.items())),
        "licences": licences(kinds, set(packages)),
        "notes": notes,
    }
    content = [
        [part, document.package, document.path, document.sha256]
        for part, documents in parts.items()
        for document in documents
    ]
    return Corpus(train, val, report, digest(content))
