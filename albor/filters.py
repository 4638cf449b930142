# Generated from book/filters.md: edit the chapter, not this file.
"""Which files are worth learning from: verdicts with reasons, and counts.

Notable:
- A verdict never raises: whatever the bytes are, there is a text or a reason.
- Cheap questions come first and the parser last; nothing is executed.
- `Density` counts docstrings and annotations, in numbers that add up over files.
- Licences are judged as they are stated, by a short list of permissive ones.
"""

import ast
import codecs
import dataclasses
import io
import re
import string
import tokenize
from dataclasses import dataclass

__all__ = [
    "DOCUMENTED",
    "GENERATED",
    "GOOD",
    "MAX_BYTES",
    "MAX_LINE",
    "MIN_BYTES",
    "MIN_LETTERS",
    "PERMISSIVE",
    "SIMPLE",
    "TEST_FILE",
    "CorpusError",
    "Density",
    "clean",
    "count_letters",
    "density",
    "is_permissive",
    "is_test",
    "judge",
    "parse",
    "read_text",
]


class CorpusError(ValueError):
    """A corpus that cannot be built; the message names the source and the mend."""


MIN_BYTES, MAX_BYTES = 50, 100_000  # of a file on disk
MAX_LINE = 1_000  # characters
MIN_LETTERS = 0.25  # the share of characters that are letters

# By these phrases in its first lines a file says that a program wrote it.
GENERATED = re.compile(
    r"@generated|do not (edit|modify)|auto(matically|-)?\s*generated"
    r"|^#.*\bgenerated (by|from|and used)\b",
    re.IGNORECASE | re.MULTILINE,
)


def clean(data: bytes) -> str:
    """The text of a file: strict UTF-8, no byte order mark, CRLF and CR as LF.

    Raises UnicodeDecodeError (a ValueError) for anything else.
    """
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def count_letters(text: str) -> int:
    """How many characters of a text are letters."""
    if text.isascii():  # most source is, and then bytes are counted at once
        data = text.encode()
        return len(data) - len(data.translate(None, string.ascii_letters.encode()))
    return sum(map(str.isalpha, text))


def read_text(data: bytes, max_bytes: int = MAX_BYTES) -> tuple[str, str]:
    """The text of a file and ""; or "" and why it is not worth parsing.

    A file that declares another encoding (PEP 263) is not guessed at.
    """
    if not MIN_BYTES <= len(data) <= max_bytes:
        return "", "too small" if len(data) < MIN_BYTES else "too large"
    try:
        declared, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if codecs.lookup(declared).name not in ("utf-8", "utf-8-sig", "ascii"):
            return "", "not UTF-8"
        text = clean(data)
    except (SyntaxError, UnicodeDecodeError):
        return "", "not UTF-8"
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_LINE:
        return "", "long line"
    if count_letters(text) < MIN_LETTERS * len(text):
        return "", "few letters"
    if GENERATED.search("\n".join(lines[:20])):
        return "", "generated"
    return text, ""


def parse(text: str) -> ast.Module | None:
    """The syntax tree of a text, or None if it is not Python of this version."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def judge(data: bytes, max_bytes: int = MAX_BYTES) -> tuple[str, str]:
    """The text of a file and ""; or "" and the reason why the file is left out."""
    text, reason = read_text(data, max_bytes)
    if not reason and parse(text) is None:
        return "", "does not parse"
    return text, reason


@dataclass(frozen=True)
class Density:
    """How much a text explains, in counts that can be added over files."""

    lines: int = 0
    docstrings: int = 0  # of definitions, and of the module itself
    definitions: int = 0  # functions, methods and classes
    documented: int = 0  # definitions with a docstring
    functions: int = 0  # and methods
    annotated: int = 0  # functions with a type on the result or on a parameter

    def __add__(self, other: "Density") -> "Density":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Density(*map(sum, zip(mine, theirs, strict=True)))

    @property
    def score(self) -> float:
        """Documented share of definitions plus annotated share of functions."""
        documented = self.documented / max(1, self.definitions)
        return documented + self.annotated / max(1, self.functions)


# What can have a docstring, and the most frequent statements that hold no others.
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
SIMPLE = ast.Expr, ast.Assign, ast.AnnAssign, ast.Return, ast.ImportFrom, ast.Import


def density(tree: ast.Module, lines: int = 0) -> Density:
    """Count definitions, docstrings and annotations in a syntax tree."""
    docstrings = definitions = documented = functions = annotated = 0
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, name, ())
            stack.extend(one for one in inside if not isinstance(one, SIMPLE))
        if not isinstance(node, DOCUMENTED):
            continue
        said = ast.get_docstring(node, clean=False) is not None
        docstrings += said
        if isinstance(node, ast.Module):
            continue
        definitions += 1
        documented += said
        if not isinstance(node, ast.ClassDef):
            given = node.args
            some = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            some += filter(None, (given.vararg, given.kwarg))
            functions += 1
            annotated += node.returns is not None or any(x.annotation for x in some)
    return Density(lines, docstrings, definitions, documented, functions, annotated)


GOOD = 0.9  # of at most 2: the score from which a package belongs to tier 1

TEST_FILE = re.compile(
    r"(^|/)(tests?|testing|_tests)/"  # in a folder of tests
    r"|(^|/)(test_[^/]*|[^/]*_test|conftest)\.py$"  # or a test by its own name
)


def is_test(path: str) -> bool:
    """Whether a path, with "/" between its parts, is that of a test."""
    return TEST_FILE.search(path) is not None


PERMISSIVE = re.compile(
    r"0bsd|apache|blue ?oak|bsd|bsl|cc0|cnri|hpnd|isc\b|mit\b|ncsa|python software"
    r"|psf|public domain|the unlicense|unlicense|wtfpl|x11|zlib|zpl|zope",
    re.IGNORECASE,
)


def is_permissive(licence: str) -> bool:
    """Whether a stated licence is on the list; unknown words and silence are not.

    Of alternatives (OR) one is enough; of parts (AND, or ";" between classifiers)
    each must be on the list. Brackets are judged first, the innermost before all.
    """
    text = re.sub(r"\bWITH\s+\S+", "", licence)
    while inner := re.search(r"\(([^()]*)\)", text):
        verdict = "MIT" if is_permissive(inner[1]) else "no"
        text = text[: inner.start()] + verdict + text[inner.end() :]
    return any(
        all(PERMISSIVE.match(part.strip()) for part in re.split(r";|\bAND\b", way))
        for way in re.split(r"\bOR\b", text)
    )
