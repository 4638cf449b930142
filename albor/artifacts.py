"""Files that can be trusted: content hashes, atomic writes, JSON lines.

A run is judged by what it leaves on disk, and it can die at any instruction. Two
habits cover both. A file is named and checked by the SHA-256 of its bytes. And it is
written beside its place and renamed into it, so that a reader finds the old bytes or
the new ones and never a mixture. Logs, which only grow, are JSON lines instead: a
kill can tear the last line alone, and the reader knows it.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class ArtifactError(ValueError):
    """A file or a value cannot be trusted; the message names it, and the mend."""


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes of `text`, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read in pieces, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_foreign_keys(value: Any, where: str = "value") -> None:
    """Refuse keys that are not strings: JSON would turn 1 and "1" into one key."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ArtifactError(
                    f"{where} has the key {key!r}; JSON keys are strings, "
                    f"write {str(key)!r}"
                )
            refuse_foreign_keys(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            refuse_foreign_keys(item, f"{where}[{index}]")


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as ASCII JSON with sorted keys; equal values give equal text.

    Without `indent` there is no white space at all: the canonical form that `digest`
    hashes. NaN and infinities are refused, for JSON has no word for them, and so is
    what is not JSON. A tuple becomes a list.
    """
    refuse_foreign_keys(value)
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        return json.dumps(
            value,
            sort_keys=True,
            allow_nan=False,
            indent=indent,
            separators=separators,
        )
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"not JSON: {error}; use None, text, finite numbers, lists and mappings"
        ) from None


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: a name for what it says."""
    return sha256_text(to_json(value))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut (POSIX; elsewhere nothing)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Delete the temporary siblings of `path` whose writer is no longer alive."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.[0-9a-f]{{8}}\.tmp")
    for sibling in path.parent.iterdir():
        match = pattern.fullmatch(sibling.name)
        if match and os.name == "posix":
            try:
                os.kill(int(match[1]), 0)  # signal 0 asks, and does nothing
            except ProcessLookupError:
                sibling.unlink(missing_ok=True)
            except (OverflowError, PermissionError):
                continue  # not ours to judge


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; when the block ends, put it in place.

    The steps are those of POSIX: write a sibling (the same file system, so that a
    rename is possible), fsync it (its bytes before its name), `os.replace` (atomic),
    fsync the folder (the name). An error inside the block leaves `path` as it was and
    removes the sibling; a kill leaves `path` as it was, and the next write of the same
    path removes the sibling. A link is written through; permissions are kept.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; give the path of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    name = f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    temporary = path.with_name(name)
    try:
        yield temporary
        if not temporary.is_file():
            raise ArtifactError(
                f"nothing was written for {path}; write to the path given"
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
    """Parse strict JSON (UTF-8, no NaN, no key twice); errors name place and line."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) < len(items):
            raise ValueError(
                f"a key is given twice among {[key for key, _ in items]}"
            )
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
        f"{where}, line {line}: {problem}; restore or repair the file"
    )


def read_json(path: str | Path) -> Any:
    """Read one JSON value; `ArtifactError` names the file and the line."""
    return parse_json(Path(path).read_bytes(), str(path))


def split_torn(data: bytes) -> tuple[bytes, bytes]:
    """Split JSON lines into complete lines and the torn end (empty if none).

    A record is a mapping, so no proper beginning of one parses: a last line that lacks
    its newline and parses is complete, any other was torn.
    """
    cut = data.rfind(b"\n") + 1
    if data[cut:]:
        try:
            json.loads(data[cut:])
        except ValueError:
            return data[:cut], data[cut:]
        data += b"\n"
    return data, b""


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Add one record as one line, in one write, after cutting off a torn end.

    No fsync: a killed process loses nothing, since the kernel holds the bytes; a power
    cut may lose the last seconds of a log, which costs less than a sync per step.
    """
    if not isinstance(record, dict):
        raise ArtifactError(f"a record is a mapping of keys, got {record!r}")
    line = to_json(record).encode() + b"\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                complete, torn = split_torn(file.read())
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
        warnings.warn(
            f"{path}, line {len(records) + 1}: dropped {len(torn)} bytes of a record "
            "whose writer was cut off",
            stacklevel=2,
        )
    return records


def truncate_jsonl(
    path: str | Path, keep: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Keep, atomically, only the records for which `keep` is true; return the others."""
    records = read_jsonl(path)
    kept = [record for record in records if keep(record)]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(to_json(r).encode() + b"\n" for r in kept))
    return [record for record in records if not keep(record)]
