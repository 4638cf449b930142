"""Find what is stale or wrong in the book, without running or importing any of it.

Every fault is one line: the file, what is wrong, and the mend.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

from tools.chapters import (
    PACKAGE,
    BookError,
    Chapter,
    alt_text,
    cells_hash,
    chapter_names,
    code_cells,
    code_hash,
    imported_modules,
    outputs_hash,
    parse,
    tags,
    toc_entries,
)
from tools.export import LINE_LENGTH, exported
from tools.keep import as_text, assemble, record
from tools.leaks import leaks

MODULE_LINES = 300
LOOKS_AHEAD = "tour"  # the one chapter that may import later ones
# Tags that leave a cell out; nbval takes its own from comments too.
SKIPS = {"nbval-skip", "skip-execution"}
COMMENTS = ("NBVAL_", "PYTEST_VALIDATE_IGNORE_OUTPUT")


def check(root: Path) -> list[str]:
    """All faults of the project at `root`; an empty list means that it is sound."""
    faults = list(check_project(root))
    order = chapter_names(root)
    for name in order:
        chapter = Chapter(root, name)
        if not chapter.text_path.exists():
            continue  # check_project has said so
        for part in (check_text, check_module, check_twin, check_outputs):
            try:
                faults += part(chapter, order)
            except BookError as error:
                faults.append(str(error))
    return list(dict.fromkeys(faults))


def check_project(root: Path) -> Iterator[str]:
    """The parts against each other: `_toc.yml`, texts, notebooks, modules."""
    entries, order = toc_entries(root), chapter_names(root)
    for entry in entries:
        path = root / entry
        text = (
            root / "book" / path.name if path.parent.name == "notebooks" else path
        )
        if not text.with_suffix(".md").exists():
            name = text.relative_to(root).with_suffix(".md").as_posix()
            yield f"_toc.yml: lists {entry}, but there is no {name}; write it"
    for entry in sorted({entry for entry in entries if entries.count(entry) > 1}):
        yield f"_toc.yml: lists {entry} more than once; keep one line"
    for path in sorted((root / "book").glob("*.md")):
        is_chapter = "\njupytext:" in path.read_text(encoding="utf-8")[:200]
        entry = f"{'notebooks' if is_chapter else 'book'}/{path.stem}"
        if entry not in entries:
            yield f"book/{path.name}: not in _toc.yml; add `- file: {entry}` there"
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if path.stem not in order:
            yield (
                f"notebooks/{path.name}: no chapter of _toc.yml; list its text "
                f"there (`make adopt NAME={path.stem}` makes one), or delete it"
            )
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = path.relative_to(root / PACKAGE).as_posix()
        if name != "__init__.py" and name.removesuffix(".py") not in order:
            yield f"{PACKAGE}/{name}: exported by no chapter; delete it"
    init = root / PACKAGE / "__init__.py"
    body = ast.parse(init.read_text(encoding="utf-8") if init.exists() else "").body
    held = [ast.unparse(statement).split(" = ")[0] for statement in body]
    if held[1:] != ["__version__"] or not isinstance(body[0], ast.Expr):
        yield (
            f"{PACKAGE}/__init__.py: holds more or less than a docstring and "
            "__version__; the rest belongs in a chapter"
        )


def check_text(chapter: Chapter, order: list[str]) -> Iterator[str]:
    """What is written: imports, lines and tags of every code cell."""
    cells = code_cells(chapter.source)
    earlier = order[: order.index(chapter.name)]
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        place = chapter.place(cell)
        tree = parse(cell.source, place)
        for name in sorted(imported_modules(tree) - {"__init__", *earlier}):
            what = f"{place}: imports {PACKAGE}.{name}"
            if name == chapter.name:
                yield f"{what}, its own module; use the names that its cells define"
            elif name not in order:
                yield f"{what}, which no chapter exports; mend the name"
            elif chapter.name != LOOKS_AHEAD:
                yield f"{what}, a later chapter in _toc.yml; do without it here"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                yield f"{place}: import * from {node.module}; name what is used"
        for number, line in enumerate(cell.source.split("\n")):
            where = chapter.place(cell, number)
            if len(line) > LINE_LENGTH:
                yield f"{where}: {len(line)} columns; {LINE_LENGTH} is the most"
            if line.lstrip("# ").startswith(COMMENTS) and "#" in line:
                yield f"{where}: a comment that steers nbval; use a tag"
        for tag in sorted(SKIPS & set(tags(cell))):
            yield f"{place}: tagged {tag}; every cell is tested, take it off"
        near = [cell, following] if following else [cell]
        if "nbval-ignore-output" in tags(cell) and not any(map(asserts, near)):
            yield (
                f"{place}: tagged nbval-ignore-output, with no assert there or in "
                "the next code cell; assert what must hold"
            )


def asserts(cell: NotebookNode) -> bool:
    """Does the cell assert, by statement or by a call such as `assert_close`?"""
    nodes = list(ast.walk(parse(cell.source, "a cell")))
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    return any(isinstance(node, ast.Assert) for node in nodes) or any(
        call.split(".")[-1].startswith("assert") for call in calls
    )


def check_module(chapter: Chapter, order: list[str]) -> Iterator[str]:
    """The exported module against the chapter."""
    text, path = exported(chapter), f"{PACKAGE}/{chapter.name}.py"
    there = chapter.module_path.exists()
    held = chapter.module_path.read_text("utf-8") if there else None
    if text is None and there:
        yield f"{path}: its chapter exports nothing; delete it"
    elif text is not None and not there:
        yield f"{path}: missing; run `make notebooks`"
    elif text != held:
        yield (
            f"{path}: stale or edited by hand, not what book/{chapter.name}.md "
            "exports; edit the chapter, then run `make notebooks`"
        )
    lines = len((text or "").splitlines())
    if lines > MODULE_LINES:
        yield f"{path}: {lines} lines, over {MODULE_LINES}; split the chapter"


def check_twin(chapter: Chapter, order: list[str]) -> Iterator[str]:
    """The notebook against the text, and the three hashes."""
    stored, path = chapter.stored, f"notebooks/{chapter.name}.ipynb"
    mend = "run `make notebooks`"
    if stored is None:
        yield f"{path}: missing; {mend}"
        return
    kept, code = record(stored), code_hash(chapter)
    written, found = cells_hash(chapter.source), cells_hash(stored)
    if found not in (written, kept.get("cells")):
        yield (
            f"{path}: edited in the notebook; `make adopt NAME={chapter.name}` "
            "carries the edits into the text"
        )
        return
    if found != written:
        yield f"{path}: stale twin of book/{chapter.name}.md; {mend}"
    elif kept.get("code") != code:
        yield f"{path}: stale, for what it imports or reads has changed; {mend}"
    if kept.get("outputs") != outputs_hash(stored):
        yield f"{path}: its outputs are not as the keeper's run left them; {mend}"
    elif found == written and kept.get("code") == code:
        on_disk = chapter.notebook_path.read_text(encoding="utf-8")
        if on_disk != as_text(assemble(chapter, stored, code)):
            yield f"{path}: not as the keeper writes it; {mend}"


def check_outputs(chapter: Chapter, order: list[str]) -> Iterator[str]:
    """What the notebook shows: all run, no error, no leak, pictures in words."""
    for cell in code_cells(chapter.stored) if chapter.stored else []:
        place = f"notebooks/{chapter.name}.ipynb ({chapter.place(cell)})"
        if cell.execution_count is None and cell.source.strip():
            yield f"{place}: a cell that was not run; run `make notebooks`"
        kinds = {output.output_type for output in cell.outputs}
        if "error" in kinds and "raises-exception" not in tags(cell):
            yield (
                f"{place}: an error output; mend the cell, or tag it "
                "raises-exception if the error is the lesson"
            )
        for leak in leaks(cell, chapter.root):
            yield (
                f"{place}: the output holds {leak!r}, which differs from machine "
                "to machine; print something else"
            )
        data = [kind for output in cell.outputs for kind in output.get("data", {})]
        if any(kind.startswith("image/") for kind in data) and not alt_text(cell):
            yield (
                f"{place}: a picture without alt text; say what it shows in the "
                "cell's metadata, under mystnb: image: alt"
            )
