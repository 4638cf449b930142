"""Evaluation problems in training texts: found, reported, and not imagined."""

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import overlap
from albor.overlap import (
    Contamination,
    OverlapError,
    load_problems,
    ngrams,
    problem_text,
    run_hashes,
    word_hashes,
    words,
)

PROMPT = '''from typing import List


def most_vowels(lines: List[str]) -> str:
    """Return the line that holds the largest number of vowels; of several
    such lines, return the one that stands first in the list.
    """
'''
SOLUTION = """    best, most = lines[0], -1
    for line in lines:
        found = sum(letter in 'aeiou' for letter in line)
        if found > most:
            best, most = line, found
    return best
"""
PROBLEM = {
    "task_id": "toy/vowels",
    "prompt": PROMPT,
    "canonical_solution": SOLUTION,
    "test": "def check(candidate):\n    assert candidate(['a', 'b']) == 'a'\n" * 9,
    "entry_point": "most_vowels",
}


def prose(seed: int, count: int) -> str:
    """`count` made-up words; two seeds share none."""
    return " ".join(f"w{seed}x{i}" for i in range(count))


# ------------------------------------------------------------------- words and runs


def slow_hashes(text: str) -> list[int]:
    """One number per word, from the definition, with Python's integers."""
    letters = [int(x) for x in overlap.fixed_numbers("bytes", 256)]
    base = int(overlap.fixed_numbers("factors", 2)[0]) | 1
    return [
        sum(letters[byte] * base**j for j, byte in enumerate(word.encode())) % 2**64
        for word in words(text)
    ]


def slow_runs(text: str, n: int) -> list[int]:
    """One number per run of n words, likewise."""
    step = int(overlap.fixed_numbers("factors", 2)[1]) | 1
    found, hashes = [], slow_hashes(text)
    for i in range(len(hashes) - n + 1):
        x = sum(h * step ** (n - 1 - j) for j, h in enumerate(hashes[i : i + n]))
        x %= 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(x ^ (x >> 31))
    return found


TEXTS = st.text("aZ_9 0.\\\n\t(é数\U0001f40d\x00\x7f\x80-'", max_size=60)


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.integers(1, 12))
def test_arrays_agree_with_the_definition(text: str, n: int) -> None:
    assert word_hashes(text).tolist() == slow_hashes(text)
    runs = run_hashes(word_hashes(text), n)
    assert runs.dtype == np.uint64 and runs.tolist() == slow_runs(text, n)
    assert ngrams(text, n) == set(slow_runs(text, n))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_unicode_text(text: str) -> None:
    assert len(word_hashes(text)) == len(words(text))


def test_what_is_a_word() -> None:
    assert words("x1 = 0x1F + 1e5 * _y; 3x9a don't") == ["x1", "_y", "don", "t"]
    assert words("größe, 数据→x") == ["größe", "数据→x"]
    assert words(r"\nfrom \\n\tx \é \_a \x1b[0m") == ["from", "x", "é", "a"]
    assert words("") == words("1 + 1 == 2\n") == []
    assert len(word_hashes("lone \ud83d half")) == 3
    assert len(word_hashes("a" * 200_000)) == 1
    # \x80 to \xbf are bytes of letters in UTF-8, wherever the text is cut
    assert word_hashes("é").tolist() != word_hashes("ê").tolist()


def test_no_two_words_or_runs_collide() -> None:
    many = [f"{a}{b}" for a in ("x", "_", "é", "list") for b in range(20_000)]
    hashes = word_hashes(" ".join(many))
    assert len(np.unique(hashes)) == len(many)
    assert len(np.unique(run_hashes(hashes, 2))) == len(many) - 1
    order = word_hashes("a b a b b a")
    assert len(np.unique(run_hashes(order, 3))) == 4  # aba bab abb bba


def test_layout_signs_and_numbers_do_not_count() -> None:
    assert ngrams("def f(x):\n    return x + 1", 3) == ngrams(
        "def f x\treturn x*2", 3
    )
    assert ngrams("a b c", 3) != ngrams("c b a", 3)
    assert ngrams("Ab c d", 3) != ngrams("ab c d", 3)


SHOW = """
from albor.overlap import Contamination, ngrams
text = "one two three four five six seven eight nine ten eleven twelve"
print(sorted(ngrams(text)), Contamination({"a": text, "b": "x y"}).digest)
"""


def test_the_same_in_every_process() -> None:
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", SHOW], env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert ngrams("the same words", 3) == {128405622284405372}  # for ever


# ----------------------------------------------------------------- reading problems


def test_every_shape_of_file_gives_the_same(tmp_path: Path) -> None:
    expected = {"toy/vowels": problem_text(PROBLEM, "")}
    line = json.dumps(PROBLEM)
    shapes = {
        "a.jsonl": f"\n{line}\n\n".encode(),
        "b.jsonl.gz": gzip.compress(line.encode()),
        "c.json": f"[{line}]".encode(),
        "d.json": json.dumps(PROBLEM, indent=2).encode(),
        "e.json.gz": gzip.compress(f"[\n{line}\n]".encode()),
    }
    for name, data in shapes.items():
        (tmp_path / name).write_bytes(data)
        assert load_problems(tmp_path / name) == expected, name
        assert load_problems(str(tmp_path / name)) == expected, name
    assert load_problems(tmp_path) == expected  # equal texts of one name are one
    assert (
        load_problems([PROBLEM])
        == load_problems([tmp_path / "a.jsonl"])
        == expected
    )


def test_text_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / "one.py").write_text("\ufeff" + PROMPT, encoding="utf-8")
    (tmp_path / "two.txt").write_text("some words here")
    (tmp_path / "README.md").write_text("not a problem")
    (tmp_path / "sub" / ".git" / "three.py").write_text("not a problem")
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe.py")  # open() would wait for ever
        (tmp_path / "loop").symlink_to(tmp_path)
    assert set(load_problems(tmp_path)) == {"two.txt", "sub/one.py"}
    assert load_problems(["some words", {"text": "a", "code": "b"}]) == {
        "problems[0]": "some words",
        "problems[1]": "a\nb",
    }


def test_two_problems_of_one_name_are_both_kept() -> None:
    first, second = {**PROBLEM}, {**PROBLEM, "canonical_solution": "return None"}
    found = load_problems([first, second, first, second, "x y"])
    assert set(found) == {"toy/vowels", "toy/vowels (2)", "problems[4]"}


def test_the_tests_of_a_problem_do_not_count() -> None:
    text = problem_text(PROBLEM, "toy")
    assert (
        "candidate" not in text and "best, most" in text and "stands first" in text
    )


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("# Copyright (c) A\n# of B\n\nimport os\nx = y\n", ["x", "y"]),
        ("\n#!/bin/sh\n# Licensed to you\nfrom a.b import (c,\n d)\nx\n", ["x"]),
        ("from typing import List, Any\nx\n", ["x"]),
        (
            "# Write a function f\ndef f\n",
            ["Write", "a", "function", "f", "def", "f"],
        ),
        ("def f\n    # Licensed\n", ["def", "f", "Licensed"]),
        ("x\n    import os\n    y\n", ["x", "y"]),
        (
            "take from here\nimportant words\n",
            ["take", "from", "here", "important", "words"],
        ),
    ],
)
def test_boilerplate(text: str, left: list[str]) -> None:
    assert words(problem_text(text, "toy")) == left


LINE = json.dumps(PROBLEM)
BAD = {
    "missing.jsonl": (None, "no file or folder"),
    "plain.jsonl.gz": (LINE.encode(), "is not gzip"),
    "cut.jsonl.gz": (gzip.compress(LINE.encode())[:-20], "damaged gzip"),
    "torn.jsonl": (f"{LINE}\n\n{LINE[:50]}".encode(), "line 3"),
    "broken.json": (b"[\n{},\n{]", "line 3"),
    "latin.py": ("größe".encode("latin-1"), "not UTF-8"),
    "latin.jsonl": ('{"prompt": "größe"}'.encode("latin-1"), "line 1"),
    "empty.jsonl": (b"\n\n", "none in"),
    "empty.json": (b"[]", "none in"),
    "empty.py": (b"", "no words"),
    "signs.txt": (b"1 + 1 == 2\n", "no words"),
    "imports.py": (b"import os\n", "no words"),
    "no-text.jsonl": (
        b'{"prompt": "a b"}\n{"task_id": "x", "test": "y"}',
        "line 2",
    ),
    "null.jsonl": (b'{"prompt": null, "canonical_solution": ""}', "has no text"),
    "list.jsonl": (b'{"prompt": ["a", "b"]}', "must be text"),
    "number.json": (b"[42]", "42"),
    "scalar.json": (b"42", "42"),
    "mapping.json": (b'{"one": "some words"}', "it has one"),
    "nan.jsonl": (b'{"prompt": NaN}', "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(OverlapError) as caught:
        load_problems(tmp_path / name)
    assert message in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    "value", [None, 42, b"bytes", {}, {"a": "b"}, [], [None], [""]]
)
def test_bad_values_are_refused(value: object) -> None:
    with pytest.raises(OverlapError):
        load_problems(value)  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix", reason="a pipe of POSIX")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(OverlapError, match="no file"):
        load_problems(tmp_path / "pipe.jsonl")


def test_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.py").write_text(PROMPT)
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def locked(place: str) -> object:
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(OverlapError, match=r"Permission denied: '.*locked'; mend"):
        load_problems(tmp_path)


def test_an_empty_folder_has_no_problems(tmp_path: Path) -> None:
    with pytest.raises(OverlapError, match="none in"):
        load_problems(tmp_path)


# ---------------------------------------------------------------------- the verdict

TOY = load_problems([PROBLEM])
FULL = len(ngrams(TOY["toy/vowels"]))
HIDDEN = {
    "whole": PROMPT + SOLUTION,
    "between a thousand lines": "x = 1\n" * 500
    + PROMPT
    + SOLUTION
    + "y = 2\n" * 500,
    "prompt": PROMPT,
    "solution": SOLUTION,
    "tabs": (PROMPT + SOLUTION).replace("    ", "\t"),
    "CRLF": (PROMPT + SOLUTION).replace("\n", "\r\n"),
    "other quotes": (PROMPT + SOLUTION).replace("'", '"'),
    "one line": " ".join((PROMPT + SOLUTION).split()),
    "a comment": "\n".join(f"# {line}" for line in PROMPT.split("\n")),
    "as JSON": json.dumps({"question": PROMPT}),
    "as a literal": f"TASK = {PROMPT!r}",
    "renamed": (PROMPT + SOLUTION).replace("most_vowels", "f"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_problems_are_found(name: str) -> None:
    contamination = Contamination(TOY)
    found = contamination.found(HIDDEN[name])
    assert set(found) == {"toy/vowels"} and 3 <= found["toy/vowels"] <= FULL
    assert found == contamination.shared(HIDDEN[name])


@pytest.mark.parametrize(
    "text",
    [
        "",
        PROBLEM["test"],
        "from typing import List\n\n\ndef f(lines: List[str]) -> str:\n    return",
        "most_vowels = 'Return the line that holds the number of vowels'",
        "0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0\n" * 9,
    ],
)
def test_innocent_texts_are_not_accused(text: str) -> None:
    assert Contamination(TOY).found(text) == {}


def test_three_runs_condemn_and_two_touch() -> None:
    contamination = Contamination({"a": prose(1, 40), "b": prose(2, 40)})
    for count in range(41):
        text = f"def f(): {prose(1, count)} return"
        runs = max(0, count - 9)
        assert contamination.shared(text) == ({"a": runs} if runs else {})
        assert contamination.found(text) == ({"a": runs} if runs >= 3 else {})
    parts = [" ".join(prose(2, 40).split()[i : i + 10]) for i in (0, 12, 25)]
    assert contamination.found(" or ".join(parts[:2])) == {}
    assert contamination.found(" or ".join(parts)) == {"b": 3}
    assert contamination.found(" or ".join(parts[:1] * 9)) == {}  # one run, again
    strict = Contamination({"a": prose(1, 40)}, least=1)
    assert strict.found(prose(1, 10)) == {"a": 1}


@pytest.mark.parametrize("count", range(1, 13))
def test_short_problems_are_found_whole(count: int) -> None:
    """Fewer than ten words: all in a row. Ten and eleven: all of their runs."""
    text = prose(1, count).split()
    contamination = Contamination({"short": " ".join(text), "long": prose(2, 30)})
    needed = max(1, min(3, count - 9))
    inside = f"before ({', '.join(text)}) after"
    assert contamination.found(inside) == {"short": needed}
    assert contamination.found(inside + " " + prose(2, 30)).keys() == {
        "short",
        "long",
    }
    if count > 1:
        assert contamination.found(" ".join(text[:-1])) == {}
        assert contamination.found(" other ".join(text)) == {}
    assert contamination.counts == {"short": max(1, count - 9), "long": 21}


def test_short_problems_of_several_lengths() -> None:
    problems = {str(n): prose(n, n) for n in range(1, 10)}
    contamination = Contamination(problems)
    for n, text in problems.items():
        assert contamination.found(f"a {text} b") == {n: 1}
    assert contamination.found(" ".join(problems.values())) == dict.fromkeys(
        problems, 1
    )


def test_what_many_problems_share_condemns_nobody() -> None:
    """A header of 60 words on top of each, such as a licence in a docstring."""
    header = prose(0, 60)
    problems = {str(i): f"{header} {prose(i, 20)}" for i in range(1, 9)}
    contamination = Contamination(problems)
    assert contamination.found(f"{header} and something else") == {}
    for name, text in problems.items():
        assert set(contamination.found(text)) == {name}
    # of two or three problems nobody can tell what is a header
    few = Contamination({x: problems[x] for x in ("1", "2", "3")})
    assert set(few.found(header)) == {"1", "2", "3"}


def test_the_same_problem_under_many_names_is_still_found() -> None:
    contamination = Contamination({str(i): PROMPT for i in range(40)})
    assert len(contamination.found(PROMPT)) == 40


def test_two_benchmarks_with_the_same_prompts() -> None:
    """HumanEval beside a second edition of it: each prompt is there twice."""
    first = {f"a/{i}": f"{prose(i, 30)} {prose(100 + i, 9)}" for i in range(50)}
    second = {f"b/{i}": f"{prose(i, 30)} {prose(200 + i, 9)}" for i in range(50)}
    contamination = Contamination(first | second)
    for i in range(50):
        assert set(contamination.found(prose(i, 30))) == {f"a/{i}", f"b/{i}"}


def test_a_pickled_one_says_the_same() -> None:
    problems = {str(i): prose(i, 3 + 4 * i) for i in range(12)}
    contamination = Contamination(problems)
    copy = pickle.loads(pickle.dumps(contamination))
    dice = random.Random(0)
    for _ in range(50):
        text = " ".join(dice.choices([*problems.values(), "x", "y"], k=4))
        assert copy.shared(text) == contamination.shared(text)
        assert copy.found(text) == contamination.found(text)
    assert copy.digest == contamination.digest


def test_the_order_of_problems_changes_nothing_but_the_order() -> None:
    problems = {str(i): prose(i, 3 + 4 * i) for i in range(12)}
    turned = Contamination(dict(reversed(problems.items())))
    text = " ".join(problems.values())
    assert turned.shared(text) == Contamination(problems).shared(text)
    assert turned.digest == Contamination(problems).digest
    assert turned.digest != Contamination(problems, least=2).digest
    assert turned.digest != Contamination({**problems, "0": "x"}).digest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=3))
def test_shared_counts_are_intersections(texts: list[str]) -> None:
    """Against sets of tuples of words; up to three problems have no common runs."""
    problems = {str(i): f"a {text}" for i, text in enumerate(texts)}
    text = "a b a a b b a b a b b b a a a b"

    def tuples(text: str, n: int) -> set[tuple[str, ...]]:
        found = text.split()
        return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}

    contamination = Contamination(problems, n=4)
    for name, problem in problems.items():
        n = min(4, len(problem.split()))
        expected = len(tuples(problem, n) & tuples(text, n))
        assert contamination.shared(text).get(name, 0) == expected


@pytest.mark.parametrize(
    "change", [{"n": 0}, {"n": 2.0}, {"least": 0}, {"n": True}]
)
def test_bad_settings(change: dict) -> None:
    with pytest.raises(OverlapError, match="whole number"):
        Contamination({"a": "b"}, **change)


def test_nothing_to_look_for() -> None:
    with pytest.raises(OverlapError, match="no problems"):
        Contamination({})
    with pytest.raises(OverlapError, match="toy/1 has no words"):
        Contamination({"toy/0": "some words", "toy/1": "1 + 1"})
