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
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

PACKAGE = "albor"
MYST = {"extension": ".md", "format_name": "myst"}
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

    def place(self, cell: NotebookNode) -> str:
        """`book/NAME.md:LINE`, where the cell's source begins."""
        at = self.text.find(cell.source) if cell.source else -1
        line = self.text.count("\n", 0, at) + 1 if at >= 0 else 1
        return f"book/{self.name}.md:{line}"


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


def plain_python(source: str) -> str:
    """A cell without IPython's own syntax, so that `ast` can read it."""
    return TransformerManager().transform_cell(source)


def parse(source: str, place: str) -> ast.Module:
    try:
        return ast.parse(plain_python(source))
    except SyntaxError as error:
        raise BookError(
            f"{place}: not Python ({error.msg}, line {error.lineno} of the cell); "
            "mend the cell"
        ) from error


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


def code_hash(chapter: Chapter) -> str:
    """What decides the outputs: code cells with their tags, and what they use."""
    cells = [[cell.source, tags(cell)] for cell in code_cells(chapter.source)]
    return digest([cells, dependencies(chapter)])


# --- what a chapter depends on ----------------------------------------------------


def imported_modules(tree: ast.AST, inside: str = "") -> set[str]:
    """Modules of the package that `tree` imports, wherever the import stands.

    Function-level imports, relative ones (in a module of the package: pass its name
    as `inside`) and `importlib.import_module("albor.x")` count too. A plain
    `import albor` yields the empty name.
    """
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{PACKAGE}." if node.level else ""
            base = (base + (node.module or "")).rstrip(".")
            deeper = [f"{base}.{alias.name}" for alias in node.names]
            names += deeper if base == PACKAGE else [base]
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(
                first, ast.Constant
            ):
                name = str(first.value)
                names.append(f"{PACKAGE}{name}" if name.startswith(".") else name)
    parts = [name.split(".") for name in names]
    found = {[*part, ""][1] for part in parts if part[0] == PACKAGE}
    return found - {inside, "__version__"}


def tracked_files(root: Path) -> list[str]:
    """The committed files; without git, all that `.gitignore` lets pass."""
    listing = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--", "."],
        capture_output=True,
        text=True,
    )
    if (root / ".git").exists() and listing.returncode == 0:
        names = [name for name in listing.stdout.split("\0") if name]
    else:
        ignore = root / ".gitignore"
        lines = ignore.read_text().splitlines() if ignore.exists() else []
        skip = [".git"] + [ln.strip("/").removesuffix("/*") for ln in lines if ln]
        names = []
        for folder, inner, files in os.walk(root):
            inner[:] = [
                d for d in inner if not any(fnmatch.fnmatch(d, s) for s in skip)
            ]
            names += [Path(folder, f).relative_to(root).as_posix() for f in files]
    hidden = (".gitkeep", ".gitignore")
    return sorted(
        n for n in names if not n.endswith(hidden) and (root / n).is_file()
    )


def files_named(tree: ast.AST, tracked: list[str]) -> set[str]:
    """Committed files that a string in the code names, relative to the root.

    A string that is the path of a committed file counts as reading it; the path of
    a folder (or the constant start of an f-string: "configs/train/") counts as
    reading all that is committed in it. The package's own name is no path: its
    modules count when they are imported.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.removeprefix("./").rstrip("/")
            if name and name != PACKAGE and "\n" not in name:
                inside = name + "/"
                found |= {t for t in tracked if t == name or t.startswith(inside)}
    return found


def dependencies(chapter: Chapter) -> dict[str, str]:
    """Path -> SHA-256 of all that a chapter's code imports or reads, transitively.

    Another chapter's notebook counts by its code and by what that uses, not by its
    outputs. The chapter's own files never count: it runs its own cells. Figures
    take their style from `notebooks/matplotlibrc`.
    """
    root, tracked = chapter.root, tracked_files(chapter.root)
    own = {chapter.text_path, chapter.notebook_path, chapter.module_path}
    skip = {path.relative_to(root).as_posix() for path in own}
    found: dict[str, str] = {}
    todo = [
        (parse(c.source, chapter.place(c)), "") for c in code_cells(chapter.source)
    ]
    while todo:
        tree, inside = todo.pop()
        names = {
            f"{PACKAGE}/{m or '__init__'}.py"
            for m in imported_modules(tree, inside)
        }
        reads = files_named(tree, tracked)
        if "matplotlib" in ast.dump(tree):
            reads |= {"notebooks/matplotlibrc"} & set(tracked)
        for name in sorted((names | reads) - skip - found.keys()):
            path = root / name
            other = Chapter(root, path.stem)
            if name in names:
                source = path.read_text(encoding="utf-8") if path.exists() else ""
                found[name] = digest(source)
                todo.append((ast.parse(source), path.stem))
            elif path == other.notebook_path and other.text_path.exists():
                cells = code_cells(other.source)
                found[name] = digest([[cell.source, tags(cell)] for cell in cells])
                todo += [(parse(c.source, other.place(c)), "") for c in cells]
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
