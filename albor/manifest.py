# Generated from book/manifest.md: edit the chapter, not this file.
"""Pinned wheels: a corpus that is the same for everybody, byte for byte.

Notable:
- A manifest is a CSV file with a row per wheel and its SHA-256. It can stand in a
  repository where the packages themselves may not.
- pip fetches and checks. It takes wheels only: to download a source distribution is
  to run a program in it.
- No wheel is installed or imported. Python, metadata and licences are unpacked, and
  a wheel with one unsafe entry is refused as a whole.
- Before it is read, what was unpacked is compared with the wheel once more.
"""

import contextlib
import csv
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from albor.artifacts import is_alive, sha256_file
from albor.config import project_path
from albor.sources import CorpusError, Source

__all__ = ["WHEELS", "Wheel", "fetch", "find_wheels", "read_manifest", "unpack"]


# Column -> what stands in it, and the pattern that lets nothing else in.
_COLUMNS = {
    "name": ("a distribution's name", r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?"),
    "version": ("an exact version, like 1.4.2", r"[\w.!+]+"),
    "licence": ("a licence", r"[^\x00-\x1f]+"),
    "sha256": ("64 hexadecimal digits in small letters", r"[0-9a-f]{64}"),
    "filename": (
        "NAME-VERSION-PYTHON-ABI-PLATFORM.whl (to download anything but a wheel, "
        "such as a source distribution, is to run code in it)",
        r"[\w.]+-[\w.!+]+(-\d[\w.]*)?-([a-z]+\d+\.)*[a-z]+\d+-[\w.]+-[\w.]+\.whl",
    ),
    "tier": ("1, 2, val or nothing", r"1|2|val|"),
}


@dataclass(frozen=True)
class Wheel:
    """One row of a manifest: which file, whose licence, and what it is for."""

    name: str
    version: str
    licence: str
    sha256: str
    filename: str
    tier: int  # 1 or 2; 0: measure it
    split: str  # "val": held out; "train": others are; "": draw

    @property
    def target(self) -> list[str]:
        """The options that make pip, on any machine, take this very wheel."""
        python, *tags = self.filename.removesuffix(".whl").split("-")[-3:]
        kind, version = re.findall(r"[a-z]+|\d+", python)[-2:]
        options = [f"--implementation={kind}", f"--python-version={version}"]
        for option, tag in zip(("abi", "platform"), tags, strict=True):
            options += [f"--{option}={part}" for part in tag.split(".")]
        return options


def _normal(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _fault(row: dict[str, str]) -> str:
    """What is wrong with a row of a manifest; "" if nothing is."""
    if None in row.values() or "" in row:
        return "has more or fewer fields than the first line"
    for column, (meaning, pattern) in _COLUMNS.items():
        if not re.fullmatch(pattern, row[column], re.ASCII):
            return f"{column} {row[column]!r} is not {meaning}"
    name, version = row["filename"].split("-")[:2]
    if (_normal(name), version) != (_normal(row["name"]), row["version"]):
        return f"{row['filename']!r} is no wheel of {row['name']} {row['version']}"
    return ""


def read_manifest(path: str | Path) -> list[Wheel]:
    """Read a manifest, in its order; what is wrong is named with file and line.

    If a row is held out ("val"), the others are for training; else nothing is said.
    """
    try:
        with open(project_path(path), encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="", strict=True)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeError, csv.Error) as error:
        raise CorpusError(f"manifest {path} cannot be read: {error}") from None
    if not rows or _COLUMNS.keys() - rows[0][1].keys():
        raise CorpusError(
            f"manifest {path} is no list of wheels: its first line has to name "
            f"{', '.join(_COLUMNS)}, and the others a wheel each"
        )
    others = "train" if any(row["tier"] == "val" for _, row in rows) else ""
    wheels: dict[str, Wheel] = {}
    for line, row in rows:
        if not (why := _fault(row)) and _normal(row["name"]) in wheels:
            why = f"{row['name']} is listed twice; keep one row"
        if why:
            raise CorpusError(f"manifest {path}, line {line}: {why}")
        name, version, licence, sha256, file, tier = (row[c] for c in _COLUMNS)
        split, number = ("val", 0) if tier == "val" else (others, int(tier or 0))
        wheel = Wheel(name, version, licence, sha256, file, number, split)
        wheels[_normal(name)] = wheel
    return list(wheels.values())


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`; those of killed runs are removed."""
    for old in folder.glob(".work-*-*"):
        number = old.name.split("-")[1]
        if number.isdecimal() and not is_alive(int(number)):
            shutil.rmtree(old, ignore_errors=True)
    prefix = f".work-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        yield Path(name)


def _expect(wheel: Wheel, got: str, mend: str) -> None:
    """Refuse a SHA-256 that is not the one in the manifest."""
    if got != wheel.sha256:
        raise CorpusError(
            f"{wheel.filename}: SHA-256 expected {wheel.sha256}, got {got}; {mend}"
        )


def _download(wheel: Wheel, folder: Path, options: Sequence[str]) -> None:
    """Let pip fetch a wheel into `folder`; nothing is there unchecked."""
    mend = "nothing was kept: the manifest is wrong, or what the index serves"
    with _workplace(folder) as work:
        pin, file = work / "pin.txt", work / wheel.filename
        line = f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
        pin.write_text(line, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--dest", str(work)]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--ignore-requires-python", "--no-input", "--quiet"]
        command += [*wheel.target, *options, "--requirement", str(pin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and file.is_file():
            _expect(wheel, sha256_file(file), mend)
            os.replace(file, folder / wheel.filename)
            return
    for got in re.findall(r"Got\s+([0-9a-f]{64})", done.stderr):
        _expect(wheel, got, mend)
    said = " ".join(re.findall(r"ERROR: (.*)", done.stderr)) or done.stderr.strip()
    raise CorpusError(
        f"pip could not fetch {wheel.filename}: {said or 'another file came'}; see "
        "whether the network and `python -m pip` work, then run it again"
    )


_MAX_FILE, _MAX_TREE = 20_000_000, 500_000_000  # bytes, unpacked
_WANTED = re.compile(  # Python, and who wrote it under which licence
    r".*\.py"
    r"|[^/]+\.dist-info/(METADATA|licenses/.*[^/]|(LICEN[CS]E|COPYING|NOTICE)[^/]*)"
)


def _unsafe(entry: zipfile.ZipInfo) -> str:
    """Why an entry of an archive must not be unpacked; "" if it may be."""
    name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
    if name != entry.orig_filename or re.search(r"[\x00-\x1f\x7f\\:]", name):
        return "has a sign in its name that paths do not have everywhere"
    if {"", ".", ".."} & set(name.removesuffix("/").split("/")):
        return "leads out of its folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return "is encrypted" if entry.flag_bits & 1 else ""


def _plan(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries to unpack, by name; refuses an archive that could do harm."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        why, name = _unsafe(entry), entry.filename
        if _WANTED.fullmatch(name) and not why:
            if name in entries:
                why = "is there twice"
            elif entry.file_size > _MAX_FILE:
                why = f"has {entry.file_size:,} bytes; {_MAX_FILE:,} are the most"
            elif entry.compress_type not in (0, zipfile.ZIP_DEFLATED):
                why = f"is packed in the unusual way {entry.compress_type}"
            entries[name] = entry
        if why:
            raise ValueError(f"its entry {name!r} {why}")
    if sum(entry.file_size for entry in entries.values()) > _MAX_TREE:
        raise ValueError(f"it unpacks to more than {_MAX_TREE:,} bytes")
    return entries


def _difference(entries: dict[str, zipfile.ZipInfo], tree: Path) -> str:
    """The first difference between an archive and what was unpacked; "" if none."""
    places = [p for p in tree.rglob("*") if p.is_symlink() or not p.is_dir()]
    found = {place.relative_to(tree).as_posix(): place for place in places}
    for name in sorted(entries.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in entries:
            return f"{name} is not from the wheel"
        state, entry = found[name].lstat(), entries[name]
        same = stat.S_ISREG(state.st_mode) and state.st_size == entry.file_size
        if not same or zlib.crc32(found[name].read_bytes()) != entry.CRC:
            return f"{name} was changed"
    return ""


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[zipfile.ZipFile, Path]]:
    """A wheel, open, and where it is unpacked; all that is wrong in it names it."""
    broken = (ValueError, OSError, RuntimeError, EOFError, zlib.error)
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive, file.with_name(file.name.removesuffix(".whl"))
    except (*broken, zipfile.BadZipFile) as error:
        raise CorpusError(f"wheel {file.name} is refused: {error}") from None


def unpack(file: Path) -> Path:
    """Unpack a wheel's Python and papers beside it, or nothing; return where."""
    with _opened(file) as (archive, tree):
        entries = _plan(archive)
        if not _difference(entries, tree):
            return tree
        with _workplace(file.parent) as work:
            new = work / "tree"
            for name, entry in entries.items():
                place = new.joinpath(*name.split("/"))
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, open(place, "xb") as stream:
                    shutil.copyfileobj(packed, stream)
            if why := _difference(entries, new):  # a size that lies, for example
                raise ValueError(f"unpacked, {why}")
            shutil.rmtree(tree, ignore_errors=True)
            os.replace(new, tree)
    return tree


WHEELS = "data/wheels"  # where wheels lie, below the project


def fetch(
    path: str | Path, folder: str | Path = WHEELS, options: Sequence[str] = ()
) -> Path:
    """Fetch, check and unpack the wheels of a manifest; return their folder.

    What is there already is not fetched again, so an interrupted fetch goes on. pip
    asks the index that it is set up for; `options` are added to its command, such
    as `["--no-index", "--find-links=FOLDER"]` for wheels that are at hand.
    """
    place = project_path(folder)
    place.mkdir(parents=True, exist_ok=True)
    wheels = read_manifest(path)
    for number, wheel in enumerate(wheels, start=1):
        file = place / wheel.filename
        how = "was there"
        if not file.is_file():
            _download(wheel, place, options)
            how = f"{file.stat().st_size:,} bytes"
        _expect(wheel, sha256_file(file), f"delete it in {folder}, fetch again")
        unpack(file)
        what = f"{number}/{len(wheels)} {wheel.name} {wheel.version}"
        print(f"{what}: {how}", flush=True)
    return place


def find_wheels(path: str | Path, folder: str | Path = WHEELS) -> list[Source]:
    """The sources that a manifest names: fetched, unpacked and as pinned.

    Wheels are hashed, and what was unpacked is compared with them. What is not in
    order is refused with the mend; nothing is fetched.
    """
    sources, again = [], f"`make corpus MANIFEST={path}` fetches and unpacks it"
    for wheel in read_manifest(path):
        file, why = project_path(folder) / wheel.filename, "is not there"
        if file.is_file():
            _expect(wheel, sha256_file(file), f"delete it, and {again}")
            with _opened(file) as (archive, tree):
                why = _difference(_plan(archive), tree)
        if why:
            raise CorpusError(f"{wheel.filename} in {folder}: {why}; {again}")
        settled = wheel.name, wheel.version, wheel.licence, wheel.tier, wheel.split
        sources.append(Source("wheel", str(tree), "", *settled))
    return sources
