"""Export a chapter: its cells tagged `export` become the module `albor/NAME.py`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

from tools.chapters import (
    BookError,
    Chapter,
    code_cells,
    parse,
    tags,
)

LINE_LENGTH = 84
IMPORTS = (ast.Import, ast.ImportFrom)


def assigned(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements bind: definitions and assignments, also in `if`."""
    for statement in body:
        if isinstance(
            statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ):
            yield statement.name
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            inner = list(ast.walk(statement))
            names = [node for node in inner if isinstance(node, ast.Name)]
            loops = [node for node in inner if isinstance(node, ast.comprehension)]
            local = {n for loop in loops for n in ast.walk(loop.target)}
            stored = [name for name in names if isinstance(name.ctx, ast.Store)]
            yield from (name.id for name in stored if name not in local)
        for part in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try, ast.With)):
                yield from assigned(getattr(statement, part, []))


def public_names(statements: list[ast.stmt]) -> list[str]:
    """Public names that a module's statements define, constants first."""

    def order(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    names = {name for name in assigned(statements) if not name.startswith("_")}
    return sorted(names, key=order)


def formatted(source: str, name: str) -> str:
    """`source` as `ruff format` writes it."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated"]
    command += ["--line-length", str(LINE_LENGTH), "--target-version", "py311"]
    command += ["--stdin-filename", f"{name}.py", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    if done.returncode:
        raise BookError(
            f"book/{name}.md: ruff cannot format it: {done.stderr.strip()}"
        )
    return done.stdout


def exported(chapter: Chapter) -> str | None:
    """The text of the chapter's module; None when no cell is tagged `export`."""
    cells = [cell for cell in code_cells(chapter.source) if "export" in tags(cell)]
    if not cells:
        return None
    trees = [parse(cell.source, chapter.place(cell)) for cell in cells]
    if not ast.get_docstring(trees[0]):
        raise BookError(
            f"{chapter.place(cells[0])}: the first exported cell has no docstring; "
            "open it with the module's docstring, then all imports"
        )
    for cell, tree in zip(cells[1:], trees[1:], strict=True):
        if any(isinstance(statement, IMPORTS) for statement in tree.body):
            raise BookError(
                f"{chapter.place(cell)}: an import in a later exported cell; "
                "move it into the first exported cell"
            )
    head = [
        s for s in trees[0].body if any(isinstance(n, IMPORTS) for n in ast.walk(s))
    ]
    head = [s for s in head if not isinstance(s, (ast.FunctionDef, ast.ClassDef))]
    last = (head or trees[0].body[:1])[-1].end_lineno or 0
    lines = cells[0].source.split("\n")
    names = public_names([statement for tree in trees for statement in tree.body])
    listing = f"__all__ = {names!r}" if names else "__all__: list[str] = []"
    note = (
        f"# Generated from book/{chapter.name}.md: edit the chapter, not this file."
    )
    parts = [note, *lines[:last], "", listing, "", *lines[last:]]
    source = "\n".join(parts) + "\n"
    source += "".join(f"\n\n{cell.source}\n" for cell in cells[1:])
    return formatted(source, chapter.name)
