# Generated from book/artifacts.md: edit the chapter, not this file.
"""Files that can be trusted: content hashes, atomic writes, JSON lines.

Notable:

- a file is named and checked by the SHA-256 of its bytes, a value by that of its
  canonical JSON, in which equal values have equal text;
- a file is written beside its place and renamed into it, so a reader finds the old
  bytes or the new ones, and never a mixture, whenever the writer was killed;
- logs only grow, line by line: a kill tears the last line alone, and the reader
  drops it and says so.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "PROCESS",
    "ArtifactError",
    "append_jsonl",
    "atomic_path",
    "digest",
    "is_alive",
    "parse_json",
    "read_json",
    "read_jsonl",
    "refuse_foreign",
    "remove_leftovers",
    "sha256_file",
    "sha256_text",
    "split_torn",
    "sync_folder",
    "to_json",
    "truncate_jsonl",
    "write_json",
]


class ArtifactError(ValueError):
    """A file or a value cannot be trusted; the message names it, and the mend."""


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes of `text`, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read in pieces, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_foreign(value: Any, where: str = "value") -> None:
    """Refuse what JSON would change or has no word for, naming the place."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ArtifactError(
                    f"{where} has the key {key!r}, and {str(key)!r} would be the "
                    "same to JSON; make keys text"
                )
            refuse_foreign(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            refuse_foreign(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError(f"{where} is {value}; JSON is finite, use None or text")
    elif not isinstance(value, str | int | float | None):
        kind = type(value).__name__
        raise ArtifactError(f"{where} is of type {kind}; make it a list or text")


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as ASCII JSON with sorted keys; equal values give equal text.

    Without `indent` there is no white space at all: the canonical form, which
    `digest` hashes. A tuple becomes a list.
    """
    refuse_foreign(value)
    marks = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, indent=indent, separators=marks)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: a name for what it says."""
    return sha256_text(to_json(value))


PROCESS = secrets.token_hex(4)  # tells this process from older ones with its number


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut (POSIX; elsewhere nothing)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_alive(process: int) -> bool:
    """Whether a process of this number exists; True where that cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # signal 0 asks, and does nothing
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        return True
    return True


def remove_leftovers(path: Path) -> None:
    """Delete the temporary siblings of `path` whose writers are gone."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(\w{{8}})\w{{8}}\.tmp")
    for sibling in path.parent.iterdir():
        if match := name.fullmatch(sibling.name):
            number, token = int(match[1]), match[2]
            mine = number == os.getpid()
            if token != PROCESS if mine else not is_alive(number):
                sibling.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; when the block ends, put it in place.

    An error inside the block leaves `path` as it was and removes the sibling. A
    kill leaves `path` as it was; the next write of that path removes the sibling.
    Links are written through, permissions are kept, missing folders are made.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; give the path of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    token = PROCESS + secrets.token_hex(4)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{token}.tmp")
    try:
        yield temporary
        if not temporary.is_file():
            raise ArtifactError(
                f"nothing was written for {path}; use the path given"
            )
        if path.exists():
            shutil.copymode(path, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` atomically as indented JSON with sorted keys."""
    text = to_json(value, indent=2)  # refused before the disk is touched
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def parse_json(text: bytes, where: str, line: int = 1) -> Any:
    """Parse strict JSON: UTF-8, no NaN, no key twice; errors name file and line."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            raise ValueError(f"a key is given twice: {[key for key, _ in items]}")
        return dict(items)

    try:
        return json.loads(
            text.decode("utf-8"), parse_constant=refuse, object_pairs_hook=pairs
        )
    except json.JSONDecodeError as error:
        line, problem = (
            line + error.lineno - 1,
            f"{error.msg} at column {error.colno}",
        )
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # not UTF-8, NaN, a key twice
        problem = str(error)
    raise ArtifactError(
        f"{where}, line {line}: {problem}; repair or restore the file"
    )


def read_json(path: str | Path) -> Any:
    """Read one JSON value; `ArtifactError` names the file and the line."""
    return parse_json(Path(path).read_bytes(), str(path))


def split_torn(data: bytes) -> tuple[bytes, bytes]:
    """Split JSON lines into complete lines and the torn end (empty if none).

    A record is a mapping, and no proper beginning of one parses: a last line that
    lacks its newline and parses is complete, any other was torn.
    """
    cut = data.rfind(b"\n") + 1
    if data[cut:]:
        try:
            json.loads(data[cut:])
        except ValueError:
            return data[:cut], data[cut:]
        data += b"\n"
    return data, b""


def append_jsonl(path: str | Path, *records: dict[str, Any]) -> None:
    """Add each record as one line, in one write, after cutting off a torn end.

    No fsync: a killed process loses nothing, since the kernel holds the bytes; a
    power cut may lose a log's last seconds, which costs less than a sync per step.
    """
    for record in records:
        if not isinstance(record, dict):
            raise ArtifactError(f"a record is a mapping of keys, got {record!r}")
    line = "".join(to_json(record) + "\n" for record in records).encode()
    if not records:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                _, torn = split_torn(file.readall())
                file.truncate(size - len(torn))
                line = line if torn else b"\n" + line
        file.write(line)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read all records; a torn last line is dropped with a warning that says so."""
    complete, torn = split_torn(Path(path).read_bytes())
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        record = parse_json(line, str(path), number)
        if not isinstance(record, dict):
            raise ArtifactError(
                f"{path}, line {number}: {record!r} is not a mapping"
            )
        records.append(record)
    if torn:
        where = f"{path}, line {len(records) + 1}"
        lost = f"{where}: dropped {len(torn)} bytes, its writer was cut off"
        warnings.warn(lost, stacklevel=2)
    return records


def truncate_jsonl(
    path: str | Path, keep: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Keep, atomically, the records for which `keep` is true; return the others."""
    marked = [(bool(keep(record)), record) for record in read_jsonl(path)]
    lines = [to_json(record).encode() + b"\n" for kept, record in marked if kept]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(lines))
    return [record for kept, record in marked if not kept]
