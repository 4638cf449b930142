# Generated from book/overlap.md: edit the chapter, not this file.
"""The same words again: runs of words, and evaluation problems in training files.

Notable:
- A text is the set of its runs of n words, its n-grams. Signs, numbers and layout
  do not count: reformatted code is the same text, and `0, 0, 0, 0` is no evidence.
- Runs are 64-bit hashes, computed by NumPy for a whole file at a time and from
  nothing but its bytes: the same in every process and on every machine.
- Contamination is judged file by file, so that it does not depend on the order of
  files, on the number of workers, or on what else is in the corpus.
"""

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from albor.artifacts import ArtifactError, digest, parse_json
from albor.config import project_path

__all__ = [
    "BOILERPLATE",
    "FIELDS",
    "SUFFIXES",
    "WORD",
    "Contamination",
    "OverlapError",
    "fixed_numbers",
    "load_problems",
    "ngrams",
    "problem_text",
    "run_hashes",
    "word_hashes",
    "words",
]


WORD = re.compile(
    r"(?:(?<!\\)[0-9A-Za-z_]|[\u0080-\U0010ffff])[0-9A-Za-z_\u0080-\U0010ffff]*"
)


def words(text: str) -> list[str]:
    """The words of a text: names, keywords, prose; no numbers, signs or escapes.

    A word is a run of letters, digits, `_` and characters beyond ASCII that does
    not begin with a digit. The `n` of `\\n` is not a part of it.
    """
    return [word for word in WORD.findall(text) if word[0] not in "0123456789"]


def fixed_numbers(key: str, count: int) -> np.ndarray:
    """`count` uint64 that look random, always the same ones for a key."""
    data = hashlib.shake_256(f"albor.overlap {key}".encode()).digest(8 * count)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


_BYTE = fixed_numbers("bytes", 256)
_BASE, _STEP = fixed_numbers("factors", 2) | np.uint64(1)  # odd: nothing is lost
_KIND = np.zeros(256, dtype=np.uint8)  # 0 between words, 2 a digit, 1 other letters
_KIND[[*b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"]] = 1
_KIND[[*b"0123456789"]] = 2
_KIND[128:] = 1


def word_hashes(text: str) -> np.ndarray:
    """One number per word of `words(text)`: uint64 (W,)."""
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    kind = _KIND[data]
    inside = kind > 0
    inside[1:] &= (data[:-1] != ord("\\")) | (data[1:] > 127)  # no escapes
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    letters = data[inside]
    starts = np.flatnonzero(begins[inside])
    if not len(starts):
        return np.zeros(0, dtype=np.uint64)
    lengths = np.diff(starts, append=len(letters))
    powers = np.full(lengths.max(), _BASE)
    powers[0] = 1
    powers = np.cumprod(powers)  # uint64 wraps: arithmetic modulo 2**64
    place = np.arange(len(letters)) - np.repeat(starts, lengths)
    hashes = np.add.reduceat(_BYTE[letters] * powers[place], starts)
    return hashes[kind[begins] == 1]


def run_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """One number per run of `n` words, in order: uint64 (W - n + 1,)."""
    count = max(0, len(hashes) - n + 1)
    runs = np.zeros(count, dtype=np.uint64)
    for j in range(n):
        runs = runs * _STEP + hashes[j : j + count]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        runs = (runs ^ (runs >> np.uint64(shift))) * np.uint64(factor)
    return runs ^ (runs >> np.uint64(31))  # the finalizer of SplitMix64


def ngrams(text: str, n: int = 10) -> set[int]:
    """The runs of `n` words of a text, as 64-bit numbers; the same everywhere."""
    return set(run_hashes(word_hashes(text), n).tolist())


class OverlapError(ValueError):
    """Problems that cannot be read, or a setting that makes no sense."""


# What counts as the text of a problem: the question and the answer, not the tests.
FIELDS = ("prompt", "text", "code", "canonical_solution")

# What says nothing about a problem: a licence at its top, and imports.
BOILERPLATE = re.compile(
    r"\A(?=(?:[ \t]*(?:#.*)?\n)*[ \t]*#.*(?i:copyright|licen[cs]e))"
    r"(?:[ \t]*(?:#.*)?\n)+"
    r"|^[ \t]*from[ \t]+[\w.]+[ \t]+import[ \t]*(?:\([^)]*\)|.*)"
    r"|^[ \t]*import[ \t]+\w.*",
    re.MULTILINE,
)


def problem_text(problem: object, where: str) -> str:
    """The text of one problem, a str or a mapping with some of `FIELDS`."""
    if isinstance(problem, Mapping):
        given = [problem[field] for field in FIELDS if problem.get(field)]
        if not given or not all(isinstance(text, str) for text in given):
            raise OverlapError(
                f"{where} has no text: of {', '.join(FIELDS)} at least one must be "
                f"text; it has {', '.join(map(str, problem)) or 'no keys'}"
            )
        problem = "\n".join(given)
    if not isinstance(problem, str):
        raise OverlapError(
            f"{where} is {problem!r:.60}; a problem is a text, or a mapping with "
            f"some of {', '.join(FIELDS)}"
        )
    text = BOILERPLATE.sub("\n", problem)
    if not words(text):
        raise OverlapError(
            f"{where} has no words to look for (signs, numbers, imports and the "
            f"licence at the top do not count): {problem!r:.60}; leave it out"
        )
    return text


SUFFIXES = (".jsonl", ".json", ".py", ".txt")  # and each of them with .gz


def _read(path: Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except gzip.BadGzipFile:
        why = "is not gzip; take .gz off its name, or fetch it again"
    except (EOFError, zlib.error):
        why = "is a damaged gzip archive; fetch it again"
    except OSError as error:
        why = f"cannot be read ({error.strerror}); mend the path"
    raise OverlapError(f"problems: {path} {why}")


def _in_file(path: Path, name: str) -> Iterator[tuple[str, object]]:
    """(Place, problem) of every problem in one file, which is shown as `name`."""
    data, kind = _read(path), path.name.removesuffix(".gz")
    try:
        if kind.endswith(".jsonl"):
            for number, line in enumerate(data.splitlines(), start=1):
                if line.strip():
                    place = f"{name}, line {number}"
                    yield place, parse_json(line, name, number)
        elif kind.endswith(".json"):
            value = parse_json(data, name)
            several = value if isinstance(value, list) else [value]
            for number, problem in enumerate(several, start=1):
                yield f"{name}, problem {number}", problem
        else:
            yield name, data.decode("utf-8-sig")
    except ArtifactError as error:  # broken JSON: it names the file and the line
        raise OverlapError(f"problems: {error}") from None
    except UnicodeDecodeError as error:
        raise OverlapError(f"problems: {name} is not UTF-8: {error}") from None


def _refuse(error: OSError) -> None:
    raise OverlapError(f"problems: {error}; mend the permissions") from None


def _problems(source: Any) -> Iterator[tuple[str, object]]:
    """(Place, problem) of every problem, in order."""
    if isinstance(source, str | os.PathLike):
        path = project_path(os.fspath(source))
        if path.is_file():
            return (yield from _in_file(path, path.name))
        if not path.is_dir():
            raise OverlapError(f"problems: no file or folder {path}; mend the path")
        for folder, folders, names in os.walk(path, onerror=_refuse):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            names = [x for x in names if x.removesuffix(".gz").endswith(SUFFIXES)]
            for file in (Path(folder, name) for name in sorted(names)):
                if file.is_file():
                    yield from _in_file(file, file.relative_to(path).as_posix())
    elif isinstance(source, Iterable) and not isinstance(source, bytes | Mapping):
        for i, item in enumerate(source):
            is_path = isinstance(item, os.PathLike)
            yield from _problems(item) if is_path else [(f"problems[{i}]", item)]
    else:
        raise OverlapError(
            f"problems = {source!r:.60}: give a path or a list of texts or mappings"
        )


def load_problems(source: str | os.PathLike | Iterable[Any]) -> dict[str, str]:
    """Name -> text of evaluation problems.

    `source`: the path of a file (.jsonl, .json, .py or .txt, each also .gz) or of a
    folder of such files; or a list of texts, of mappings in HumanEval's schema, or
    of `Path`s. A text file is one problem. Relative paths start at the project;
    links to folders are not followed. Names: `task_id`, or where a problem stands.
    """
    found: dict[str, str] = {}
    for place, problem in _problems(source):
        text = problem_text(problem, place)
        given = problem.get("task_id") if isinstance(problem, Mapping) else None
        label = name = place if given is None else str(given)
        number = 1
        while found.setdefault(label, text) != text:  # two problems of one name
            number += 1
            label = f"{name} ({number})"
    if not found:
        raise OverlapError(
            f"problems: none in {source!r:.200}; give a file or a folder with "
            f"{', '.join(SUFFIXES)} (or .gz of them), or a list that is not empty"
        )
    return found


class Contamination:
    """Looks for evaluation problems in training texts.

    A text is contaminated by a problem if they share at least `least` different
    runs of `n` words (all runs, if the problem has fewer; all words in a row, if it
    has fewer than `n`). Runs in more than 5% of the problems, four at the least, do
    not count, unless a problem has no others. Picklable; no two processes disagree.
    `counts` says how many runs each problem has, `digest` names problems and rule.
    """

    def __init__(self, problems: Mapping[str, str], n: int = 10, least: int = 3):
        for key, value in (("n", n), ("least", least)):
            if type(value) is not int or value < 1:
                raise OverlapError(f"{key} = {value!r}: give a whole number >= 1")
        if not problems:
            raise OverlapError("no problems to look for; give at least one")
        self.names, self.least = tuple(problems), least
        self.digest = digest([n, least, dict(problems)])
        hashes = [word_hashes(text) for text in problems.values()]
        lengths = [min(n, len(one)) for one in hashes]
        if 0 in lengths:
            name = self.names[lengths.index(0)]
            raise OverlapError(f"problem {name} has no words; use load_problems")
        pairs = zip(hashes, lengths, strict=True)
        runs = [np.unique(run_hashes(*pair)) for pair in pairs]
        every, times = np.unique(np.concatenate(runs), return_counts=True)
        common = every[times > max(3, 0.05 * len(runs))]
        for i, one in enumerate(runs):
            if not np.isin(one, common).all():
                runs[i] = np.setdiff1d(one, common)
        counts = [len(one) for one in runs]
        self.counts = dict(zip(self.names, counts, strict=True))
        # By length of run: what to look for, sorted; and pairs (which one, whose)
        self._tables: dict[int, tuple[np.ndarray, ...]] = {}
        for length in sorted({*lengths}):
            chosen = [i for i, one in enumerate(lengths) if one == length]
            joined = np.concatenate([runs[i] for i in chosen])
            owners = np.repeat(chosen, [counts[i] for i in chosen])
            self._tables[length] = *np.unique(joined, return_inverse=True), owners

    def shared(self, text: str) -> dict[str, int]:
        """Problem -> number of runs that it shares with `text`, if any."""
        hashes = word_hashes(text)
        totals = np.zeros(len(self.names), dtype=np.int64)
        for length, (wanted, which, owners) in self._tables.items():
            runs = run_hashes(hashes, length)
            places = np.searchsorted(wanted, runs).clip(max=len(wanted) - 1)
            places = places[wanted[places] == runs]
            if len(places):
                present = np.zeros(len(wanted), dtype=bool)
                present[places] = True
                totals += np.bincount(owners[present[which]], minlength=len(totals))
        return {self.names[i]: int(totals[i]) for i in np.flatnonzero(totals)}

    def found(self, text: str) -> dict[str, int]:
        """Problems that contaminate `text` -> runs shared; empty: it is clean."""
        shared, least = self.shared(text).items(), self.least
        return {x: n for x, n in shared if n >= min(least, self.counts[x])}
