"""Read the book: its order, its chapters, and what each chapter depends on.

A chapter NAME is three files: `book/NAME.md`, the text that people edit;
`notebooks/NAME.ipynb`, its executed twin; and `albor/NAME.py`, the module that its
cells tagged `export` become. Everything here looks at contents alone: no clock, no
modification time, and no import of the package.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

PACKAGE = "albor"
# In a string these are words, or (_toc.yml) a mark by which the root is known.
NAMES = {PACKAGE, "book", "notebooks", "tests", "tools", "benchmarks"}
NAMES |= {"_toc.yml", ".", ""}
MYST = {"extension": ".md", "format_name": "myst"}
HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""
# What JupyterLab notes about the display of a cell; no part of the chapter.
DISPLAY_KEYS = {"collapsed", "scrolled", "trusted", "execution", "ExecuteTime"}
DISPLAY_KEYS |= {"jp-MarkdownHeadingCollapsed", "jupyter", "editable", "deletable"}


class BookError(Exception):
    """The book needs a person; the message says where, and what to do."""


@dataclass(frozen=True)
class Chapter:
    """The three files of one chapter, and what its text says."""

    root: Path
    name: str

    @property
    def text_path(self) -> Path:
        return self.root / "book" / f"{self.name}.md"

    @property
    def notebook_path(self) -> Path:
        return self.root / "notebooks" / f"{self.name}.ipynb"

    @property
    def module_path(self) -> Path:
        return self.root / PACKAGE / f"{self.name}.py"

    @cached_property
    def text(self) -> str:
        if not self.text_path.exists():
            raise BookError(
                f"book/{self.name}.md: no such chapter; "
                f'`make new NAME={self.name} TITLE="..."` starts one'
            )
        return self.text_path.read_text(encoding="utf-8")

    @cached_property
    def header(self) -> str:
        """The YAML block between the first two `---` lines, kept word for word."""
        head, mark, _ = self.text.removeprefix("---\n").partition("\n---\n")
        if not self.text.startswith("---\n") or not mark or "jupytext:" not in head:
            raise BookError(
                f"book/{self.name}.md: begins with no jupytext header; "
                "copy the one of another chapter"
            )
        return f"---\n{head}\n---\n"

    @cached_property
    def source(self) -> NotebookNode:
        """The text as a notebook without outputs."""
        _ = self.header
        return jupytext.reads(self.text, fmt=MYST)

    @cached_property
    def stored(self) -> NotebookNode | None:
        """The executed twin as it lies on disk."""
        if not self.notebook_path.exists():
            return None
        try:
            return nbformat.read(self.notebook_path, as_version=4)
        except (ValueError, nbformat.reader.NotJSONError) as error:
            raise BookError(
                f"notebooks/{self.name}.ipynb: not a notebook ({error}); "
                "restore it with git, or delete it and run `make notebooks`"
            ) from error

    def place(self, cell: NotebookNode, line: int = 0) -> str:
        """`book/NAME.md:LINE`, where the cell's source (or a line of it) stands."""
        at = self.text.find(cell.source) if cell.source else -1
        first = self.text.count("\n", 0, at) + 1 if at >= 0 else 1
        return f"book/{self.name}.md:{first + line}"


def toc_entries(root: Path) -> list[str]:
    """Every file that `_toc.yml` names, in reading order."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file"):
                    yield value
                else:
                    yield from walk(value)
        elif isinstance(node, list):
            for item in node:
                yield from walk(item)

    text = (root / "_toc.yml").read_text(encoding="utf-8")
    return list(walk(yaml.safe_load(text)))


def chapter_names(root: Path) -> list[str]:
    """The chapters in reading order: `_toc.yml`'s entries under `notebooks/`."""
    entries = [Path(entry) for entry in toc_entries(root)]
    return [entry.name for entry in entries if entry.parent.name == "notebooks"]


def tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def alt_text(cell: NotebookNode) -> str:
    node: Any = cell.metadata
    for key in ("mystnb", "image", "alt"):
        node = node.get(key) if isinstance(node, dict) else None
    return node.strip() if isinstance(node, str) else ""


@cache
def parse(source: str, place: str) -> ast.Module:
    """The syntax tree of a cell, which may use IPython's own syntax."""
    try:
        return ast.parse(source)
    except SyntaxError:
        plain = TransformerManager().transform_cell(source)
    try:
        return ast.parse(plain)
    except SyntaxError as error:
        raise BookError(
            f"{place}: not Python ({error.msg}, line {error.lineno}); mend it"
        ) from error


def trees(chapter: Chapter) -> list[ast.Module]:
    """The syntax trees of the chapter's code cells, in order."""
    cells = code_cells(chapter.source)
    return [parse(cell.source, chapter.place(cell)) for cell in cells]


# --- hashes -----------------------------------------------------------------------


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cells_hash(notebook: NotebookNode) -> str:
    """What people write: every cell's type, source, metadata and attachments."""
    seen = []
    for cell in notebook.cells:
        kept = {k: v for k, v in cell.metadata.items() if k not in DISPLAY_KEYS}
        kept = {key: value for key, value in kept.items() if value not in ([], {})}
        text = cell.source.strip("\n").rstrip()
        seen.append([cell.cell_type, text, kept, cell.get("attachments") or {}])
    return digest(seen)


def outputs_hash(notebook: NotebookNode) -> str:
    """What the kernel wrote: every code cell's count and outputs."""
    cells = code_cells(notebook)
    return digest([[cell.execution_count, cell.outputs] for cell in cells])


def written_code(chapter: Chapter) -> list[Any]:
    return [[cell.source, tags(cell)] for cell in code_cells(chapter.source)]


def code_hash(chapter: Chapter) -> str:
    """What decides the outputs: code cells with their tags, and what they use."""
    return digest([written_code(chapter), dependencies(chapter)])


# --- what a chapter depends on ----------------------------------------------------


@cache
def imported_names(tree: ast.AST) -> set[str]:
    """Dotted names of all modules that `tree` imports, wherever the import stands.

    Function-level imports count, relative ones (they mean the package) and
    `importlib.import_module("albor.x")` too.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (f"{PACKAGE}." * bool(node.level) + (node.module or "")).rstrip(
                "."
            )
            deeper = {f"{base}.{alias.name}" for alias in node.names}
            names |= deeper if base == PACKAGE else {base}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            for value in [*node.args, *(word.value for word in node.keywords)][:1]:
                if called in ("import_module", "__import__"):
                    name = str(getattr(value, "value", ""))
                    names.add(PACKAGE * name.startswith(".") + name)
    return names


def imported_modules(tree: ast.AST) -> set[str]:
    """Modules of the package that `tree` imports; "__init__" for a bare `albor`."""
    parts = [[*name.split("."), "__init__"] for name in imported_names(tree)]
    found = {part[1] for part in parts if part[0] == PACKAGE}
    return {"__init__" if name == "__version__" else name for name in found}


@cache
def strings(tree: ast.AST) -> set[str]:
    """All string constants, and paths joined by `/`; `*` for an f-string's values.

    The constant parts of an f-string are there by themselves, too.
    """

    def joined(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(joined(part) or "*" for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return "/".join(filter(None, [joined(node.left), joined(node.right)]))
        return ""

    return {joined(node) for node in ast.walk(tree)} - {""}


def committed_files(root: Path) -> dict[str, set[str]]:
    """Every committed file, and every folder with the files in it, by its path.

    In a copy without git: all files that `.gitignore` lets pass.
    """
    command = ["git", "-C", str(root), "ls-files", "-z"]
    names: list[str] = []
    if (root / ".git").exists():
        listing = subprocess.run(
            command, capture_output=True, text=True, check=True
        )
        names = listing.stdout.split("\0")
    else:
        ignore = root / ".gitignore"
        lines = ignore.read_text().split() if ignore.exists() else []
        skip = [".git", *(line.strip("/").removesuffix("/*") for line in lines)]
        for folder, inner, files in os.walk(root):
            kept = [
                d for d in inner if not any(fnmatch.fnmatch(d, s) for s in skip)
            ]
            inner[:] = kept
            names += [Path(folder, f).relative_to(root).as_posix() for f in files]
    index: dict[str, set[str]] = {}
    for name in names:
        if name and not name.endswith(".gitkeep") and (root / name).is_file():
            for path in (Path(name), *Path(name).parents):
                index.setdefault(path.as_posix(), set()).add(name)
    return index


def files_named(tree: ast.AST, committed: dict[str, set[str]]) -> set[str]:
    """Committed files that a string in the code names, relative to the root.

    A string that is the path of a committed file counts as reading it; the path of
    a folder (or the start of an f-string: "configs/train/") counts as reading all
    that is committed in it; `*` in a path, which is what an f-string's values are
    here, counts for any text. The words in NAMES are no paths by themselves.
    """
    found = set()
    for text in strings(tree):
        name = text.removeprefix("./").rstrip("/")
        if name not in NAMES:
            found |= committed.get(name, set())
        if "/" in name.partition("*")[0] and "*" in name:
            found |= {file for file in committed if fnmatch.fnmatchcase(file, name)}
    return {file for file in found if committed[file] == {file}}  # no folders


def dependencies(chapter: Chapter) -> dict[str, str]:
    """Path -> SHA-256 of all that a chapter's code imports or reads, transitively.

    Another chapter's notebook counts by its code and by what that uses, not by its
    outputs. The chapter's own files never count: it runs its own cells. Figures
    take their style from `notebooks/matplotlibrc`.
    """
    root, committed = chapter.root, committed_files(chapter.root)
    own = {chapter.text_path, chapter.notebook_path, chapter.module_path}
    skip = {path.relative_to(root).as_posix() for path in own}
    found: dict[str, str] = {}
    todo = trees(chapter)
    while todo:
        tree = todo.pop()
        program = "\n".join(strings(tree))  # one handed to another process, perhaps
        modules = imported_modules(tree)
        modules |= set(re.findall(rf"\b(?:from|import) {PACKAGE}\.(\w+)", program))
        names = {f"{PACKAGE}/{module}.py" for module in modules}
        reads = files_named(tree, committed)
        if any(name.split(".")[0] == "matplotlib" for name in imported_names(tree)):
            reads |= committed.get("notebooks/matplotlibrc", set())
        for name in sorted((names | reads) - skip - found.keys()):
            path = root / name
            other = Chapter(root, path.stem)
            if name in names:
                source = path.read_text(encoding="utf-8") if path.exists() else ""
                found[name] = digest(source)
                todo.append(parse(source, name))
            elif path == other.notebook_path and other.text_path.exists():
                found[name] = digest(written_code(other))
                todo += trees(other)
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def write_atomically(path: Path, text: str) -> bool:
    """Write `text` whole or not at all; False if the file already holds it."""
    if path.exists() and path.read_bytes() == text.encode():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True
