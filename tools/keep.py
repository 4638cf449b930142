"""Keep the twins: text -> notebook, never the other way without being asked.

A notebook carries three SHA-256 in `metadata.albor`: `cells` (all cells as the
keeper wrote them, so that an edit made in JupyterLab is noticed), `code` (the code
cells and everything that they import or read) and `outputs`. A chapter runs again
when `code` or `outputs` no longer fits; prose alone never makes it run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs
from nbclient import NotebookClient
from nbclient.exceptions import (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)
from nbformat import NotebookNode

from tools.chapters import (
    HEADER,
    MYST,
    BookError,
    Chapter,
    cells_hash,
    chapter_names,
    code_cells,
    code_hash,
    digest,
    outputs_hash,
    write_atomically,
)
from tools.export import exported
from tools.leaks import leaks

SECONDS_PER_CELL = 600
KERNEL_STARTS = 3
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}


def record(notebook: NotebookNode | None) -> dict[str, str]:
    """The hashes that the keeper left in the notebook."""
    return dict(notebook.metadata.get("albor", {})) if notebook else {}


def edited_notebook(chapter: Chapter) -> bool:
    """Does the notebook hold work that is neither the keeper's nor in the text?"""
    stored = chapter.stored
    if stored is None:
        return False
    cells = cells_hash(stored)
    kept = record(stored).get("cells")
    known = [kept] if kept else []
    if chapter.text_path.exists():
        known.append(cells_hash(chapter.source))
    return cells not in known


# --- building the notebook --------------------------------------------------------


def clean_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    """Join split streams, number the result as its cell, drop what is transient."""
    clean: list[NotebookNode] = []
    for output in outputs:
        previous = clean[-1] if clean else None
        if (
            previous is not None
            and output.output_type == previous.output_type == "stream"
            and output.name == previous.name
        ):
            previous.text += output.text
            continue
        output = nbformat.from_dict(output)
        output.pop("transient", None)
        if output.output_type == "execute_result":
            output.execution_count = count
        clean.append(output)
    return clean


def assemble(chapter: Chapter, ran: NotebookNode, code: str) -> NotebookNode:
    """The notebook as stored: cells of the text, outputs of `ran`, three hashes."""
    source = nbformat.from_dict(chapter.source)
    joined = combine_inputs_with_outputs(source, nbformat.from_dict(ran), fmt=MYST)
    metadata = {"kernelspec": KERNEL, "language_info": LANGUAGE}
    extra = set(source.metadata) - {
        "jupytext",
        "kernelspec",
        "language_info",
        "albor",
    }
    metadata |= {key: source.metadata[key] for key in extra}
    notebook = nbformat.v4.new_notebook(metadata=metadata)
    seen: dict[str, int] = {}
    count = 0
    for cell, written in zip(source.cells, joined.cells, strict=True):
        key = hashlib.sha256(
            f"{cell.cell_type}\n{cell.source}".encode()
        ).hexdigest()[:8]
        seen[key] = seen.get(key, 0) + 1
        made = nbformat.from_dict(cell)
        made.id = key if seen[key] == 1 else f"{key}-{seen[key]}"
        if cell.cell_type == "code":
            run = bool(cell.source.strip()) and written.execution_count is not None
            count += run
            made.execution_count = count if run else None
            made.outputs = clean_outputs(written.outputs, count) if run else []
        notebook.cells.append(made)
    notebook.metadata["albor"] = {
        "cells": cells_hash(notebook),
        "code": code,
        "outputs": outputs_hash(notebook),
    }
    return notebook


def as_text(notebook: NotebookNode) -> str:
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=4) + "\n"


def execute(chapter: Chapter) -> NotebookNode:
    """Run the cells in a new kernel, in `notebooks/`, with ALBOR_TEST=1."""
    folder = chapter.notebook_path.parent
    folder.mkdir(exist_ok=True)
    paths = [str(chapter.root), os.environ.get("PYTHONPATH", "")]
    search = os.pathsep.join(path for path in paths if path)
    environment = {**os.environ, "ALBOR_TEST": "1", "PYTHONPATH": search}
    environment.pop("MPLBACKEND", None)  # it would keep figures out of the outputs
    for attempt in range(KERNEL_STARTS):
        notebook = nbformat.from_dict(chapter.source)
        begun: list[NotebookNode] = []
        client = NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
            on_cell_start=lambda cell, cell_index, begun=begun: begun.append(cell),
        )
        try:
            client.execute(env=environment)
            return notebook
        except CellTimeoutError as error:
            raise BookError(
                f"{chapter.place(begun[-1])}: the cell took {SECONDS_PER_CELL} "
                "seconds and more; give it less to do"
            ) from error
        except (CellExecutionError, DeadKernelError) as error:
            message = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
            raise BookError(
                f"{chapter.place(begun[-1])}: the cell failed; mend it, or tag it "
                f"`raises-exception` if the error is the lesson\n{message}"
            ) from error
        except (AssertionError, RuntimeError) as error:
            # Before the first cell: another process took the port, perhaps.
            if begun or attempt + 1 == KERNEL_STARTS:
                raise BookError(
                    f"notebooks/{chapter.name}.ipynb: its kernel does not start "
                    f"({error}); try again, or `make clean` and make it anew"
                ) from error
    raise AssertionError("unreachable")


def refuse_leaks(chapter: Chapter, notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        for found in leaks(cell, chapter.root):
            raise BookError(
                f"{chapter.place(cell)}: the cell's output holds {found!r}, which "
                "differs from machine to machine; print something else"
            )


# --- the commands -----------------------------------------------------------------


def keep(root: Path, names: list[str]) -> Iterator[str]:
    """Export, execute what is stale, write the twins; yields what it did.

    With no names: all chapters of `_toc.yml`. Nothing is written while any of the
    notebooks holds edits that `adopt` has not carried into the text.
    """
    order = chapter_names(root)
    for name in names:
        if name not in order:
            raise BookError(
                f"_toc.yml: lists no notebooks/{name}; it lists {', '.join(order)}"
            )
    chapters = [Chapter(root, name) for name in order if not names or name in names]
    edited = [chapter.name for chapter in chapters if edited_notebook(chapter)]
    if edited:
        lines = [
            f"notebooks/{name}.ipynb: edited in the notebook; `make adopt "
            f"NAME={name}` carries the edits into book/{name}.md"
            for name in edited
        ]
        raise BookError("\n".join([*lines, "Nothing was written."]))
    modules = [(chapter, exported(chapter)) for chapter in chapters]
    for chapter, text in modules:
        if text is not None and write_atomically(chapter.module_path, text):
            yield f"albor/{chapter.name}.py: exported"
    for chapter in chapters:
        code, stored = code_hash(chapter), chapter.stored
        now = {"code": code, "outputs": outputs_hash(stored) if stored else ""}
        fresh = now.items() <= record(stored).items()
        ran = stored if stored and fresh else execute(chapter)
        notebook = assemble(chapter, ran, code)
        refuse_leaks(chapter, notebook)
        if write_atomically(chapter.notebook_path, as_text(notebook)):
            verb = "brought in line with its text" if fresh else "executed"
            yield f"notebooks/{chapter.name}.ipynb: {verb}"


FENCE = re.compile(r"^(`{3,})\{code-cell\}.*?^\1$", re.MULTILINE | re.DOTALL)


def as_written(text: str, before: str) -> str:
    """`text` with each code cell that `before` has too written as it was there."""

    def keys(text: str) -> list[str]:
        cells = code_cells(jupytext.reads(text, fmt=MYST))
        return [digest([cell.source, cell.metadata]) for cell in cells]

    fences = [match.group() for match in FENCE.finditer(before)]
    known, order = keys(before), iter(keys(text))
    if len(fences) != len(known):
        return text
    written = dict(zip(known, fences, strict=True))
    return FENCE.sub(
        lambda match: written.get(next(order, ""), match.group()), text
    )


def adopt(root: Path, name: str) -> str:
    """Carry edits made in the notebook into the text; returns what was done."""
    chapter = Chapter(root, name)
    stored = chapter.stored
    if stored is None:
        raise BookError(
            f"notebooks/{name}.ipynb: no such notebook; try `make adopt NAME=model`"
        )
    if not edited_notebook(chapter):
        return f"notebooks/{name}.ipynb: holds no edits; nothing to adopt"
    if any(cell.get("attachments") for cell in stored.cells):
        raise BookError(
            f"notebooks/{name}.ipynb: a cell has an attached picture, which text "
            "cannot hold; save it in book/_static/ and link it, then adopt again"
        )
    edits = nbformat.from_dict(stored)
    for cell in edits.cells:
        cell.source = cell.source.strip("\n").rstrip()
    edits.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": LANGUAGE}
    )
    exists = chapter.text_path.exists()
    written = jupytext.writes(edits, fmt=MYST)
    body = written.removeprefix("---\n").partition("\n---\n")[2]
    text = (chapter.header if exists else HEADER) + body
    text = as_written(text, chapter.text) if exists else text
    if cells_hash(jupytext.reads(text, fmt=MYST)) != cells_hash(stored):
        raise BookError(
            f"notebooks/{name}.ipynb: its cells do not survive as text; "
            f"carry the edits into book/{name}.md by hand"
        )
    if exists and cells_hash(chapter.source) != record(stored).get("cells"):
        aside = root / "_build" / "adopt" / f"{name}.md"
        write_atomically(aside, text)
        raise BookError(
            f"book/{name}.md: edited too, as was notebooks/{name}.ipynb; neither "
            f"was changed. The notebook's version lies as text in _build/adopt/"
            f"{name}.md: merge what you want into book/{name}.md, then delete "
            f"notebooks/{name}.ipynb and run `make notebooks`"
        )
    write_atomically(chapter.text_path, text)
    return (
        f"book/{name}.md: took over the notebook's edits; now run `make notebooks`"
    )
