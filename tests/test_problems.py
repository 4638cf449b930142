"""Problems, their judges, and whether our own tests refuse what is wrong."""

import ast
import copy
import doctest
import gzip
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albor.artifacts import read_jsonl
from albor.overlap import Contamination, load_problems
from albor.problems import (
    STOPS,
    ProblemError,
    cut,
    evaluate_problems,
    judge,
    pass_at_k,
    read_problems,
    read_samples,
    score_interval,
    summarize,
)

EVALS = Path(__file__).resolve().parents[1] / "evals"
SETS = {
    name: read_problems(EVALS / f"{name}.jsonl")
    for name in ("python-intermediate", "infilling")
}
OURS = {task: problem for some in SETS.values() for task, problem in some.items()}

# ------------------------------------------------------------------------- pass@k


@given(st.data())
def test_pass_at_k_is_its_formula(data):
    n = data.draw(st.integers(1, 300))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ProblemError, match=f"n = {n}"):
        pass_at_k(n, c, k)


@given(st.integers(1, 400), st.data())
def test_the_interval_solves_wilsons_equation(problems, data):
    mean = data.draw(st.integers(0, problems)) / problems
    low, high = score_interval(mean, problems)
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1 and low < high
    for end in (low, high):  # |mean - p| is 1.96 standard errors at p
        error = math.sqrt(max(0.0, end * (1 - end)) / problems)
        if 1e-9 < end < 1 - 1e-9:
            assert abs(mean - end) == pytest.approx(1.96 * error, abs=1e-9)


# ------------------------------------------------------------------------ reading

GOOD = {
    "task_id": "t/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_is_read_packed_or_not_and_with_blank_lines(tmp_path, name):
    other = GOOD | {"task_id": "t/1", "suffix": "#"}
    found = read_problems(write(tmp_path / name, GOOD, "", other))
    assert list(found) == ["t/0", "t/1"]
    assert found["t/0"].suffix is None and found["t/1"].suffix == "#"
    assert found["t/1"].program("    pass\n") == "def f(x):\n    pass\n#"


@pytest.mark.parametrize(
    "rows, words",
    [
        (["{"], "line 1"),
        ([GOOD, "[1]"], "line 2: .* no mapping"),
        ([GOOD, {**GOOD, "test": 3}], "line 2: test is 3"),
        ([{k: v for k, v in GOOD.items() if k != "test"}], "line 1: test is not"),
        ([GOOD | {"suffix": None}], "line 1: suffix is None"),
        ([GOOD, "", GOOD], "line 3: task_id t/0 is there twice"),
        ([GOOD | {"entry_point": "f()"}], "line 1: entry_point"),
        ([""], "no problems"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, rows, words):
    with pytest.raises(ProblemError, match=words):
        read_problems(write(tmp_path / "a.jsonl", *rows))


def test_archives_that_are_none(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for data in (b'{"task_id": 1}\n', gzip.compress(b"{}" * 99)[:-12], b""):
        path.write_bytes(data)
        with pytest.raises(ProblemError, match=r"a\.jsonl\.gz"):
            read_problems(path)
    path = tmp_path / "packed.jsonl"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    with pytest.raises(ProblemError, match="packed"):
        read_problems(path)
    with pytest.raises(ProblemError, match=r"none\.jsonl"):
        read_problems(tmp_path / "none.jsonl")


def test_samples_must_be_of_the_problems(tmp_path):
    problems = read_problems(write(tmp_path / "p.jsonl", GOOD))
    sample = {"task_id": "t/0", "completion": "    pass\n", "model": "m"}
    path = write(tmp_path / "s.jsonl", sample, sample)
    assert read_samples(path, problems) == [sample, sample]
    for wrong, words in (
        (sample | {"task_id": "t/9"}, "line 2: task_id t/9"),
        ({"task_id": "t/0"}, "line 2: completion is not there"),
    ):
        with pytest.raises(ProblemError, match=words):
            read_samples(write(path, sample, wrong), problems)


@pytest.mark.parametrize("stop", STOPS)
def test_a_completion_is_cut_at_the_first_stop(stop):
    assert cut(f"    return 1\n{stop} x\ndef g():") == "    return 1\n"
    assert cut(f"    return{stop[1:]}") == f"    return{stop[1:]}"
    assert cut("") == ""


# ------------------------------------------------------------------------- judging

RUNNER = """
import contextlib, io, json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
def ring(*_):
    raise TimeoutError
signal.signal(signal.SIGALRM, ring)
found = []
for program, test in json.load(sys.stdin):
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program + test, {"__name__": "tested"})
        found.append("")
    except BaseException as error:
        found.append(repr(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps(found))
"""


def run(jobs):
    """Run programs of our own, all in one process, 0.3 seconds each."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUNNER],
        input=json.dumps(list(jobs)),
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        SimpleNamespace(status="failed" if detail else "passed", detail=detail)
        for detail in json.loads(done.stdout)
    ]


def test_the_line_of_a_result():
    problems = {"t": SETS["infilling"]["infilling/0"]}
    endings = {
        "passed": "passed",
        "failed": "failed: why",
        "timed out": "timed out",
        "out of memory": "failed: out of memory: why",
    }
    for status, result in endings.items():
        verdict = SimpleNamespace(status=status, detail="why")
        sample = {"task_id": "t", "completion": "x"}
        (line,) = judge(problems, [sample], lambda jobs, v=verdict: [v])
        passed = status == "passed"
        assert line == {
            **sample,
            "result": result,
            "passed": passed,
            "exact": False,
        }


def test_a_summary_comes_from_the_lines_alone():
    problems = {name: OURS[f"python-intermediate/{name}"] for name in "012"}
    passes = {"0": [True, False, False, False], "1": [True] * 4, "2": [False] * 4}
    lines = [
        {"task_id": t, "passed": x} for t, some in passes.items() for x in some
    ]
    found = summarize(problems, lines, (1, 2))
    assert (found["problems"], found["samples"]) == (3, 4)
    assert found["pass@1"]["value"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert found["pass@2"]["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["passed"] == {"0": 1, "1": 4, "2": 0} and "exact" not in found
    for wrong, words in (
        (lines[:-1], "from 3 samples"),
        (lines[:-4], "from 0 samples"),
        ([*lines, {"task_id": "x", "passed": True}], "none of the problems"),
    ):
        with pytest.raises(ProblemError, match=words):
            summarize(problems, wrong)


def canonical(problems, sample):
    return [problem.canonical_solution for problem in problems]


def noise(problems, sample):
    return ["\x00 ) é"] * len(problems)


@pytest.mark.parametrize("writer, score", [(canonical, 1.0), (noise, 0.0)])
@pytest.mark.parametrize("name", SETS)
def test_canonical_solutions_score_1_and_noise_0(tmp_path, name, writer, score):
    begun = SETS[name], writer, run, tmp_path, name, {}
    found = evaluate_problems(*begun, n=2, ks=(1, 2))
    assert found["pass@1"]["value"] == found["pass@2"]["value"] == score
    lines = read_jsonl(tmp_path / f"{name}_results.jsonl")
    assert len(lines) == 2 * len(SETS[name]) and found["samples"] == 2
    assert summarize(SETS[name], lines, (1, 2)) == found
    assert found.get("exact", {"value": score})["value"] == score


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    problems, asked = SETS["infilling"], []

    def writer(some, sample):
        asked.append([(problem.task_id, sample) for problem in some])
        if len(asked) == 9:
            raise KeyboardInterrupt
        return canonical(some, sample)

    begun = problems, writer, run, tmp_path, "x", {"seed": 1}
    with pytest.raises(KeyboardInterrupt):
        evaluate_problems(*begun, n=2, batch=3)
    path = tmp_path / "x_results.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"task_id": "infill')  # torn by the kill
    with pytest.warns(UserWarning, match="cut off"):
        found = evaluate_problems(*begun, n=2, batch=3)
    assert found["samples"] == 2 and found["pass@1"]["value"] == 1
    lines = [(line["task_id"], line["sample"]) for line in read_jsonl(path)]
    assert lines == [(name, sample) for sample in range(2) for name in problems]
    assert asked[8] == asked[9] and len(asked) == 15  # 7 batches a draw, one twice
    assert evaluate_problems(*begun, n=2) == found and len(asked) == 15


def test_other_settings_do_not_go_on(tmp_path):
    few = {"infilling/0": OURS["infilling/0"]}
    begun = canonical, run, tmp_path, "x"
    evaluate_problems(few, *begun, {"seed": 1})
    for problems, settings, n, words in (
        (few, {"seed": 2}, 1, "seed 1, now 2"),
        (few, {"seed": 1, "top_p": 1}, 1, "top_p None, now 1"),
        (few, {"seed": 1}, 2, "n 1, now 2"),
        (SETS["infilling"], {"seed": 1}, 1, "problems"),
    ):
        with pytest.raises(ProblemError, match=words):
            evaluate_problems(problems, *begun, settings, n=n)
    (tmp_path / "x_settings.json").unlink()
    with pytest.raises(ProblemError, match=r"no x_settings\.json"):
        evaluate_problems(few, *begun, {"seed": 1})
    for n, ks in ((0, (1,)), (1, (2,)), (3, ()), (3, (0,))):
        with pytest.raises(ProblemError, match=f"n = {n}"):
            evaluate_problems(few, *begun, {}, n=n, ks=ks)


@pytest.mark.parametrize("part", ["complete", "run"])
def test_what_fails_is_no_score(tmp_path, part):
    def broken(*_):
        raise RuntimeError("no tokenizer")

    sound, some = {"complete": canonical, "run": run}, SETS["infilling"]
    parts = (sound | {part: broken}).values()
    with pytest.raises(RuntimeError, match="no tokenizer"):
        evaluate_problems(some, *parts, tmp_path, "x", {})
    assert not (tmp_path / "x_results.jsonl").exists()
    parts = (sound | {part: lambda *_: []}).values()
    with pytest.raises(ValueError, match="shorter"):
        evaluate_problems(some, *parts, tmp_path, "y", {})


# ----------------------------------------------------------------- our own problems


def test_the_sets_are_what_they_say():
    for name, count in (("python-intermediate", 15), ("infilling", 20)):
        assert list(SETS[name]) == [f"{name}/{i}" for i in range(count)]
    assert all(p.suffix is None for p in SETS["python-intermediate"].values())
    assert all(p.suffix for p in SETS["infilling"].values())
    assert len({p.entry_point for p in OURS.values()}) == 35
    assert "Apache-2.0" in (EVALS / "README.md").read_text()


PAIRS = (
    "Add Sub, Mult FloorDiv, Lt LtE, Gt GtE, Eq NotEq, In NotIn, Is IsNot, And Or"
)
OPERATORS = {ast.Div: ast.Mult, ast.Mod: ast.FloorDiv}
for pair in PAIRS.split(", "):
    one, two = (getattr(ast, name) for name in pair.split())
    OPERATORS |= {one: two, two: one}


def changes(node):
    """Every small way to break one node: functions that change it in place."""
    if type(getattr(node, "op", None)) in OPERATORS:
        yield lambda n: setattr(n, "op", OPERATORS[type(n.op)]())
    for i, one in enumerate(getattr(node, "ops", [])):
        if type(one) in OPERATORS:
            yield lambda n, i=i: n.ops.__setitem__(i, OPERATORS[type(n.ops[i])]())
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield lambda n: setattr(n, "value", n.value + 1)
        yield lambda n: setattr(n, "value", n.value - 1)
    if isinstance(node, ast.Constant) and type(node.value) is str and node.value:
        yield lambda n: setattr(n, "value", n.value[:-1])
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Return) and node.value is not None:
        yield lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.stmt) and not isinstance(
        node, ast.FunctionDef | ast.Raise | ast.Pass
    ):
        yield ...  # leave it out
        yield None  # return before it


class Replace(ast.NodeTransformer):
    """Puts `pass`, or a return and then the statement, in the place of one."""

    def __init__(self, old, how):
        self.old, self.how = old, how

    def visit(self, node):
        if node is not self.old:
            return self.generic_visit(node)
        early = ast.Return(ast.Constant(None))
        return ast.Pass() if self.how is ... else [early, node]


def mutants(problem):
    """Programs that differ from the right one in one place of the solution."""
    first = problem.prompt.count("\n") + 1
    last = first + problem.canonical_solution.count("\n") - 1
    tree = ast.parse(problem.program(problem.canonical_solution))
    right, found = ast.unparse(tree), {}
    for place, node in enumerate(ast.walk(tree)):
        if not first <= getattr(node, "lineno", 0) <= last:
            continue
        for i, _ in enumerate(changes(node)):
            other = copy.deepcopy(tree)
            twin = [*ast.walk(other)][place]
            change = [*changes(twin)][i]
            if callable(change):
                change(twin)
            else:
                other = Replace(twin, change).visit(other)
            found[ast.unparse(ast.fix_missing_locations(other))] = None
    found.pop(right, None)
    return [*found]


# Mutants that compute the same function, by what the mutant has in place of the
# line: there is no test that could tell them from the solution.
MESSAGE = "the text of an error, which no docstring promises"
EQUIVALENT = {
    "python-intermediate/3": {
        "raise ValueError(f'{number} is not from 1 to 399')": MESSAGE
    },
    "python-intermediate/6": {
        "for total in range(0, amount + 1):": "no coin is worth 0 or less",
        "if best[total] is None or count <= best[total]:": "the same number",
    },
    "python-intermediate/7": {
        "pass": "without the check, min of nothing raises ValueError, too",
        "raise ValueError('the needs go round in a circl')": MESSAGE,
    },
    "python-intermediate/8": {
        "total, digits, last = (0, '', -2)": "below the first unit, as -1 is",
    },
    "python-intermediate/10": {
        "for key in range(27):": "26 places are as none, which came first",
    },
    "python-intermediate/14": {
        "raise ValueError(f'{cents} is no coi')": MESSAGE,
    },
    "infilling/0": {"if value <= low:": "equal numbers, either is returned"},
    "infilling/6": {
        "if values[middle] <= wanted:": "equality was dealt with before",
    },
    "infilling/10": {
        "for column in range(len(matrix[-1])):": "all rows are equally long",
    },
}


def difference(right, mutant):
    """The lines that only the mutant has, or those that it lacks."""
    old, new = ([x.strip() for x in text.splitlines()] for text in (right, mutant))
    more = [x for x in new if new.count(x) > old.count(x)]
    return " | ".join(more or ["without " + x for x in old if x not in new])


def test_our_tests_refuse_what_is_wrong():
    total, survivors = 0, set()
    for task, problem in OURS.items():
        right = ast.unparse(ast.parse(problem.program(problem.canonical_solution)))
        texts = mutants(problem)
        total += len(texts)
        assert len(texts) >= 2, task
        verdicts = run((text, problem.check) for text in texts)
        for text, verdict in zip(texts, verdicts, strict=True):
            if verdict.status == "passed":
                survivors.add((task, difference(right, text)))
    known = {(task, x) for task, lines in EQUIVALENT.items() for x in lines}
    assert survivors == known, f"of {total}: {sorted(survivors ^ known)}"
    assert total > 400 and len(survivors) < 0.1 * total


@pytest.mark.parametrize("task", OURS)
def test_empty_and_constant_bodies_fail(task):
    problem = OURS[task]
    solution = problem.canonical_solution
    blank = solution[: len(solution) - len(solution.lstrip())]
    bodies = [
        "pass",
        "return None",
        "return 0",
        "return []",
        "return -1",
        "return ''",
    ]
    jobs = [(problem.program(f"{blank}{x}\n"), problem.check) for x in bodies]
    assert all(verdict.status == "failed" for verdict in run(jobs))


def by_heart(problem):
    """A program that knows the examples of the docstring, and nothing else."""
    tree = ast.parse(problem.program(problem.canonical_solution))
    (node,) = [x for x in tree.body if isinstance(x, ast.FunctionDef)]
    examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
    name = problem.entry_point
    known = [
        (x.source.strip().removeprefix(name), x.want.strip()) for x in examples
    ]
    table = ", ".join(f"(together{call}, {want})" for call, want in known)
    return (
        "def together(*given):\n    return given\n"
        f"def {name}(*given):\n"
        f"    return dict((repr(k), v) for k, v in [{table}])[repr(given)]\n"
    ) + "".join(f"assert {name}{call} == {want}\n" for call, want in known)


FUNCTIONS = [
    t for t, p in SETS["python-intermediate"].items() if "def " in p.prompt
]


@pytest.mark.parametrize("task", FUNCTIONS)
def test_the_examples_by_heart_are_not_enough(task):
    problem = SETS["python-intermediate"][task]
    cheat = by_heart(problem)
    shown, judged = run([(cheat, ""), (cheat, problem.check)])
    assert shown.status == "passed", shown.detail  # it does know the examples
    assert judged.status == "failed"


@pytest.mark.parametrize("task", SETS["python-intermediate"])
def test_the_examples_of_the_docstrings_are_right(task):
    problem, namespace = OURS[task], {}
    exec(problem.program(problem.canonical_solution), namespace)
    test = doctest.DocTestParser().get_doctest(
        namespace[problem.entry_point].__doc__, namespace, task, None, 0
    )
    done = doctest.DocTestRunner(verbose=False).run(test)
    assert done.attempted >= 1 and done.failed == 0


def test_a_corpus_that_holds_our_problems_is_contaminated():
    found = load_problems(EVALS)
    assert set(found) == set(OURS)
    contamination = Contamination(found)
    for task, problem in OURS.items():
        text = problem.program(problem.canonical_solution)
        assert task in contamination.found(f"import os\n\n{text}\n\nprint(os)\n")
    assert not contamination.found(Path(ast.__file__).read_text())
