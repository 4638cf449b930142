# Generated from book/overlap.md: edit the chapter, not this file.
"""The same words again: evaluation problems in training files, and near-copies.

Notable:
- A text is the set of its runs of n words, its n-grams. Signs, numbers and layout do
  not count: reformatted code is the same text, and `0, 0, 0, 0` is no evidence.
- Runs are 64-bit hashes computed by NumPy, tens of megabytes a second, from nothing
  but the bytes: the same in every process and on every machine.
- Contamination is judged file by file, so that it does not depend on the order of
  files, on the number of workers, or on what else is in the corpus.
- Near-copies are found by MinHash and banding: no pair that is unlike is compared.
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
    "ORDERS",
    "RUN",
    "SUFFIXES",
    "Contamination",
    "OverlapError",
    "chance",
    "jaccard",
    "load_problems",
    "minhash",
    "near_duplicates",
    "ngrams",
    "problem_text",
    "run_hashes",
    "word_hashes",
    "words",
]


RUN = re.compile(r"[0-9A-Za-z_\u0080-\U0010ffff]+")


def words(text: str) -> list[str]:
    """The words of a text: names, keywords, prose; no numbers, no signs.

    A word is a run of letters, digits, `_` and characters beyond ASCII that does
    not begin with a digit.
    """
    return [word for word in RUN.findall(text) if word[0] not in "0123456789"]


def _fixed(key: str, count: int) -> np.ndarray:
    """`count` random-looking uint64, always the same ones for a key."""
    data = hashlib.shake_256(f"albor.overlap {key}".encode()).digest(8 * count)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


_BYTE = _fixed("bytes", 256)
_BASE, _STEP = _fixed("factors", 2) | np.uint64(1)  # odd, so that nothing is lost
_KIND = np.zeros(
    256, dtype=np.uint8
)  # of a byte: 0 between words, 2 a digit, 1 else
_KIND[[*b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"]] = 1
_KIND[[*b"0123456789"]] = 2
_KIND[128:] = 1


def word_hashes(text: str) -> np.ndarray:
    """One number per word of `words(text)`: uint64 (W,)."""
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    kind = _KIND[data]
    inside = kind > 0
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
    """One number per run of `n` words, in order, repeats too: uint64 (W - n + 1,)."""
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

# What says nothing about a problem: comments at its top, and imports.
BOILERPLATE = re.compile(
    r"\A(?:[ \t]*(?:#.*)?\n)+"
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
            f"comment at the top do not count): {problem!r:.60}; leave it out"
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


def _in_file(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """(Name, text) of the problems in one file, shown as `name`."""
    data, kind = _read(path), path.name.removesuffix(".gz")
    try:
        if not kind.endswith((".json", ".jsonl")):
            yield name, problem_text(data.decode("utf-8-sig"), name)
        elif kind.endswith(".jsonl"):
            for number, line in enumerate(data.splitlines(), start=1):
                if line.strip():
                    problem = parse_json(line, name, number)
                    yield from _named(problem, f"{name}, line {number}")
        else:
            value = parse_json(data, name)
            if isinstance(value, Mapping) and not set(FIELDS) & set(value):
                for key, problem in value.items():
                    yield key, problem_text(problem, f"{name}, {key!r}")
            else:
                for i, problem in enumerate(
                    value if isinstance(value, list) else [value], start=1
                ):
                    yield from _named(problem, f"{name}, problem {i}")
    except ArtifactError as error:  # broken JSON: it names the line
        raise OverlapError(f"problems: {error}") from None
    except UnicodeDecodeError as error:
        raise OverlapError(f"problems: {name} is not UTF-8: {error}") from None


def _named(problem: object, where: str) -> Iterator[tuple[str, str]]:
    """A problem under its `task_id`, or under the place where it stands."""
    given = problem.get("task_id") if isinstance(problem, Mapping) else None
    yield str(where if given is None else given), problem_text(problem, where)


def load_problems(source: str | os.PathLike | Iterable[Any]) -> dict[str, str]:
    """Name -> text of evaluation problems.

    `source`: the path of a file (.jsonl, .json, .py or .txt, each also .gz) or of a
    folder of such files; or a list of texts, of mappings in HumanEval's schema, or
    of `Path`s. A text file is one problem. Relative paths start at the project.
    """
    found: dict[str, str] = {}
    for name, text in _problems(source):
        label = name
        for number in range(2, len(found) + 3):
            if found.setdefault(label, text) == text:
                break
            label = f"{name} ({number})"  # two problems of one name
    if not found:
        raise OverlapError(
            f"problems: none in {source!r:.200}; give a file or a folder with "
            f"{', '.join(SUFFIXES)} (or .gz of them), or a list that is not empty"
        )
    return found


def _problems(source: Any) -> Iterator[tuple[str, str]]:
    """(Name, text) of all problems, in order; names may come twice."""
    if isinstance(source, str | os.PathLike):
        path = project_path(os.fspath(source))
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(x for x in folders if not x.startswith("."))
                for file in (Path(folder, name) for name in sorted(names)):
                    plain = file.name.removesuffix(".gz")
                    if plain.endswith(SUFFIXES) and file.is_file():
                        yield from _in_file(file, file.relative_to(path).as_posix())
        elif not path.is_file():
            raise OverlapError(
                f"problems: {path} is no file or folder; mend the path"
            )
        else:
            yield from _in_file(path, path.name)
    elif isinstance(source, Iterable) and not isinstance(source, bytes | Mapping):
        for i, item in enumerate(source):
            if isinstance(item, os.PathLike):
                yield from _problems(item)
            else:
                yield from _named(item, f"problems[{i}]")
    else:
        raise OverlapError(
            f"problems = {source!r:.60}: give a path, or a list of texts or mappings"
        )


class Contamination:
    """Looks for evaluation problems in training texts.

    A text is contaminated by a problem if they share at least `least` different
    runs of `n` words (all runs, if the problem has fewer; all words in a row, if it
    has fewer than `n`). Runs in more than 5% of the problems, four at the least, do
    not count, unless a problem has no others. Picklable; no two processes disagree.
    """

    def __init__(
        self, problems: Mapping[str, str], n: int = 10, least: int = 3
    ) -> None:
        for key, value in (("n", n), ("least", least)):
            if type(value) is not int or value < 1:
                raise OverlapError(f"{key} = {value!r}: give a whole number >= 1")
        if not problems:
            raise OverlapError("no problems to look for; give at least one")
        self.names = tuple(problems)
        self.settings = {"n": n, "least": least, "problems": digest(dict(problems))}
        hashes = [word_hashes(problem_text(problems[x], x)) for x in self.names]
        runs = [np.unique(run_hashes(one, min(n, len(one)))) for one in hashes]
        every, times = np.unique(np.concatenate(runs), return_counts=True)
        common = every[times > max(3, 0.05 * len(runs))]
        runs = [
            x if np.isin(x, common).all() else np.setdiff1d(x, common) for x in runs
        ]
        self.counts = np.array([len(one) for one in runs])  # runs of every problem
        self.needed = np.minimum(self.counts, least)
        # By length of run: the numbers to look for, sorted, and (number, problem).
        self._tables = {}
        for length in sorted({min(n, len(one)) for one in hashes}):
            chosen = [
                i for i, one in enumerate(hashes) if min(n, len(one)) == length
            ]
            wanted = np.unique(np.concatenate([runs[i] for i in chosen]))
            pairs = [(np.searchsorted(wanted, runs[i]), i) for i in chosen]
            numbers = np.concatenate([places for places, _ in pairs])
            owners = np.repeat([i for _, i in pairs], [len(p) for p, _ in pairs])
            self._tables[length] = wanted, numbers, owners

    def shared(self, text: str) -> dict[str, int]:
        """Problem -> number of runs that it shares with `text`, if there are any."""
        hashes = word_hashes(text)
        totals = np.zeros(len(self.names), dtype=np.int64)
        for length, (wanted, numbers, owners) in self._tables.items():
            runs = run_hashes(hashes, length)
            places = np.searchsorted(wanted, runs).clip(max=len(wanted) - 1)
            places = places[wanted[places] == runs]
            if len(places):
                present = np.zeros(len(wanted), dtype=bool)
                present[places] = True
                hits = owners[present[numbers]]
                totals += np.bincount(hits, minlength=len(totals))
        return {self.names[i]: int(totals[i]) for i in np.flatnonzero(totals)}

    def found(self, text: str) -> dict[str, int]:
        """The problems that contaminate `text` -> runs shared; empty for a clean one."""
        needed = dict(zip(self.names, self.needed.tolist(), strict=True))
        return {x: n for x, n in self.shared(text).items() if n >= needed[x]}

    def report(
        self, shared: Iterable[tuple[str, Mapping[str, int]]]
    ) -> dict[str, Any]:
        """Per problem, from (path, what `shared` said) of all files, as plain JSON.

        `ngrams` of the problem, `needed` to condemn a file; `dropped` files and
        `touched` ones, which share less; the `most` that a file shares; examples.
        """
        rows = {
            name: {
                "ngrams": total,
                "needed": least,
                "dropped": 0,
                "touched": 0,
                "most": 0,
            }
            for name, total, least in zip(
                self.names, self.counts.tolist(), self.needed.tolist(), strict=True
            )
        }
        examples: dict[str, list[str]] = {name: [] for name in rows}
        dropped = set()
        for path, counts in shared:
            for name, count in counts.items():
                row = rows[name]
                row["most"] = max(row["most"], count)
                if count >= row["needed"]:
                    dropped.add(path)
                    examples[name].append(path)
                row["dropped" if count >= row["needed"] else "touched"] += 1
        by_problem = {
            name: {**row, "examples": sorted(examples[name])[:3]}
            for name, row in rows.items()
        }
        return {**self.settings, "dropped": len(dropped), "by_problem": by_problem}


ORDERS = 128  # K: numbers in a signature; J is estimated to within about 0.04
_FACTOR, _SHIFT = (_fixed("orders", 2 * ORDERS) >> np.uint64(32)).reshape(
    2, ORDERS, 1
)
_FACTOR = _FACTOR.astype(np.uint32) | np.uint32(1)
_SHIFT = _SHIFT.astype(np.uint32)


def minhash(text: str, n: int = 5) -> np.ndarray:
    """The signature of a text: the smallest of its n-grams in each of `ORDERS` orders.

    uint32 (K,). The share of places at which two signatures agree estimates the
    Jaccard similarity of the texts. A text of fewer than `n` words is one run.
    """
    hashes = word_hashes(text)
    runs = run_hashes(hashes, max(1, min(n, len(hashes))))
    runs = (runs >> np.uint64(32)).astype(np.uint32)
    smallest = np.full(ORDERS, 2**32 - 1, dtype=np.uint32)
    for start in range(
        0, len(runs), 2048
    ):  # 128 orders of 2,048 fit into the cache
        ordered = runs[start : start + 2048] * _FACTOR + _SHIFT
        np.minimum(smallest, ordered.min(axis=1), out=smallest)
    return smallest


def jaccard(a: str, b: str, n: int = 5) -> float:
    """The exact Jaccard similarity of the n-grams of two texts."""
    first, second = ngrams(a, n), ngrams(b, n)
    return len(first & second) / max(1, len(first | second))


def chance(similarity: float, rows: int, bands: int) -> float:
    """The probability that two texts agree in at least one of `bands` bands."""
    return 1 - (1 - similarity**rows) ** bands


def near_duplicates(
    signatures: np.ndarray, threshold: float = 0.7
) -> list[list[int]]:
    """Groups of texts that are alike, as sorted indices into `signatures` (N, K).

    Two texts with an estimated similarity of at least `threshold` are in one group,
    if they agree in a band (99% of pairs at the threshold do). Groups join along
    chains: their ends may be less alike than that. Texts without a twin are left out.
    """
    if not 0 < threshold <= 1:
        raise OverlapError(
            f"threshold = {threshold!r}: give a share, over 0 up to 1"
        )
    signatures = np.asarray(signatures)
    if signatures.ndim != 2:
        raise OverlapError(
            f"signatures of shape {signatures.shape}: stack them, (N, K)"
        )
    count, size = signatures.shape
    lengths = [
        r for r in range(1, size + 1) if chance(threshold, r, size // r) >= 0.99
    ]
    rows = max(lengths, default=1)
    group = np.arange(count)
    for start in range(0, size - rows + 1, rows):
        key = np.zeros(count, dtype=np.uint64)
        for column in range(start, start + rows):
            key = key * _STEP + signatures[:, column]
        order = np.argsort(key, kind="stable")
        cuts = np.flatnonzero(np.diff(key[order])) + 1
        for bucket in np.split(order, cuts) if count else []:
            while len(bucket) > 1:
                first, bucket = bucket[0], bucket[1:]
                strangers = bucket[group[bucket] != group[first]]
                if not len(strangers):
                    break
                alike = (signatures[strangers] == signatures[first]).mean(axis=1)
                for other in strangers[alike >= threshold]:
                    group[group == group[other]] = group[first]
    order = np.argsort(group, kind="stable")
    cuts = np.flatnonzero(np.diff(group[order])) + 1
    found = [part.tolist() for part in np.split(order, cuts) if len(part) > 1]
    return sorted(found)
