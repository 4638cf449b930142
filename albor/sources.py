# Generated from book/sources.md: edit the chapter, not this file.
"""Python files on this machine: where they lie, and how to list them unharmed.

Notable:
- Nothing is downloaded, imported or run: files are listed, not even opened.
- Links are never followed and only regular files are opened, so that a loop, a pipe
  or a device named `x.py` does no harm.
- Whatever is left out is counted, with reason and bytes. Only `__pycache__` and
  names that begin with a dot are passed over in silence.
- The shown path of a file says nothing of the machine, and fits into JSON.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import re
import stat
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from albor.config import project_path
from albor.filters import MAX_BYTES, MIN_BYTES
from albor.filters import CorpusError as CorpusError  # had from here as well

__all__ = [
    "VENDORED",
    "Dropped",
    "File",
    "Source",
    "find_distribution",
    "find_package",
    "find_sources",
    "guess",
    "installed",
    "label",
    "refuse",
    "scan",
    "shown",
    "wanted",
]


@dataclass(frozen=True)
class Source:
    """A folder to read: all of it, or the one top-level `name` in it.

    `kind` says what lies at its top: "stdlib" or "site-packages", whose entries are
    packages; "wheel", the files of one distribution; or "folder" for any other
    folder. A manifest settles the other fields; elsewhere they are found out.
    """

    kind: str
    folder: str
    name: str = ""
    distribution: str = ""
    version: str = ""
    licence: str = ""
    tier: int = 0  # 1 or 2; 0: not settled
    split: str = ""  # "train" or "val"; "": not settled


def installed() -> list[Source]:
    """This Python's standard library and every folder of installed packages."""
    paths = sysconfig.get_paths()
    found = {os.path.realpath(paths["stdlib"]): "stdlib"}
    places = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    for place in (paths["purelib"], paths["platlib"], *places):
        if os.path.isdir(place):
            found.setdefault(os.path.realpath(place), "site-packages")
    return [Source(kind, folder) for folder, kind in found.items()]


def find_package(name: str) -> list[Source]:
    """Where the top-level import `name` lies; nothing is imported to find out."""
    if not name.isidentifier():
        return []
    for source in installed():
        place = os.path.join(source.folder, name)
        if os.path.isdir(place) or os.path.isfile(place + ".py"):
            return [Source(source.kind, source.folder, name)]
    try:  # elsewhere on the path: an editable install, for example
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    places = list(spec.submodule_search_locations or ()) if spec else []
    if spec and spec.has_location and not places:
        places = [str(spec.origin)]
    folders = map(os.path.dirname, map(os.path.realpath, places))
    return [Source("site-packages", folder, name) for folder in folders]


def find_distribution(name: str) -> list[Source]:
    """Where the top-level packages of an installed distribution lie."""

    def normal(name: str) -> str:  # as package indexes compare names (PEP 503)
        return re.sub(r"[-_.]+", "-", name).lower()

    packages = importlib.metadata.packages_distributions().items()
    chosen = [p for p, names in packages if normal(name) in map(normal, names)]
    return [source for found in sorted(chosen) for source in find_package(found)]


def find_sources(spec: str) -> list[Source]:
    """Turn a corpus `spec` into sources; "" is this Python with all that it has.

    Otherwise folders (relative ones from the project), import names or distribution
    names, separated by `os.pathsep`. What cannot be found is refused by name.
    """
    if not isinstance(spec, str):
        raise CorpusError(f"corpus = {spec!r}: give one str, '' for this Python")
    if not spec:
        return installed()
    sources: dict[Source, None] = {}
    for part in filter(None, map(str.strip, spec.split(os.pathsep))):
        folder = os.path.join(project_path("."), os.path.expanduser(part))
        if os.path.isdir(folder):
            sources[Source("folder", os.path.realpath(folder))] = None
        elif os.path.exists(folder):
            raise CorpusError(
                f"corpus {part!r} is a file; give the folder around it"
            )
        elif found := find_package(part) or find_distribution(part):
            sources |= dict.fromkeys(found)
        else:
            raise CorpusError(
                f"corpus {part!r} is neither a folder nor an installed package"
                f"{guess(part, os.path.dirname(folder))}; "
                f"folders and packages are separated by {os.pathsep!r}"
            )
    if not sources:
        raise CorpusError(f"corpus = {spec!r} names no folder and no package")
    return list(sources)


def guess(part: str, folder: str) -> str:
    """A "did you mean" for a corpus that is not there; "" if nothing is close."""
    packages = importlib.metadata.packages_distributions()
    known = set(sys.stdlib_module_names).union(packages, *packages.values())
    with contextlib.suppress(OSError, ValueError):  # the folder may be missing too
        known |= {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    close = difflib.get_close_matches(os.path.basename(part), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True)
class File:
    """A candidate: its package, its path as shown, its place on disk, its size."""

    package: str
    path: str
    place: str
    size: int
    source: Source = Source("folder", "")


# Why files were left out: reason -> (path as shown, bytes on disk) of each.
Dropped = defaultdict[str, list[tuple[str, int]]]

# Folders in which projects keep copies of other people's packages.
VENDORED = {"_vendor", "_vendored", "vendor", "vendored", "extern", "externals"}
VENDORED |= {"third_party", "node_modules", "site-packages", "dist-packages"}


def shown(*names: str) -> str:
    """A path for reports; bytes of a name that are not UTF-8 become `\\xff`."""
    path = "/".join(filter(None, names))
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def label(source: Source, sources: list[Source]) -> str:
    """What the shown paths of `source` begin with; "" for one folder alone."""
    if source.kind == "wheel":
        return source.distribution
    if source.kind != "folder" or len(sources) == 1:
        return "" if source.kind == "folder" else source.kind
    parts = {Path(other.folder).parts for other in sources}
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1  # two folders of one name: show the folders above them too
    return "/".join(Path(source.folder).parts[-depth:])


def wanted(source: Source, name: str) -> bool:
    """Whether the entry `name` at the top of `source` belongs to it."""
    if source.name:
        return name in (source.name, source.name + ".py")
    if source.kind == "site-packages":  # not this book's own code
        return name != "albor" and not name.startswith("__editable__")
    return source.kind == "folder" or name not in VENDORED


def refuse(above: tuple[str, ...], info: os.stat_result, max_bytes: int) -> str:
    """Why a listed file need not be opened; "" if it must be."""
    if not stat.S_ISREG(info.st_mode):
        return "link" if stat.S_ISLNK(info.st_mode) else "not a regular file"
    if VENDORED & set(above):
        return "vendored"
    if info.st_size < MIN_BYTES:
        return "too small"
    return "too large" if info.st_size > max_bytes else ""


def scan(
    sources: list[Source], dropped: Dropped, max_bytes: int = MAX_BYTES
) -> list[File]:
    """List the files worth opening; count the others in `dropped`.

    A file's package is its first folder below the source, or its own name where the
    source holds packages; loose files of a plain folder form the package "."; the
    files of a wheel are one package, its distribution.
    """
    files: dict[str, File] = {}
    for source in sources:
        first = label(source, sources)
        # folders still to list, as the names below the source
        stack: list[tuple[str, ...]] = [()]
        while stack:
            above = stack.pop()
            try:
                with os.scandir(os.path.join(source.folder, *above)) as listing:
                    entries = list(listing)
            except OSError:
                dropped["unreadable"].append((shown(first, *above), 0))
                continue
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name == "__pycache__":
                    continue
                if not above and not wanted(source, name):
                    continue
                try:
                    if entry.is_dir(follow_symlinks=False):
                        stack.append((*above, name))
                        continue
                    linked = entry.is_symlink() and os.path.isdir(entry.path)
                    if not name.endswith(".py") and not linked:
                        continue
                    info = entry.stat(follow_symlinks=False)
                    reason, size = refuse(above, info, max_bytes), info.st_size
                except OSError:
                    reason, size = "unreadable", 0
                path = shown(first, *above, name)
                if reason:
                    dropped[reason].append((path, size))
                    continue
                loose = "." if source.kind == "folder" else name.removesuffix(".py")
                package = source.distribution or shown(above[0] if above else loose)
                files[entry.path] = File(package, path, entry.path, size, source)
    return list(files.values())
