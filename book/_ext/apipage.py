"""The API page: one section for each exported module, in the order of the book.

The page asks for them with `{modules}`, so that a new chapter needs no line there.
Sphinx reads docstrings as reStructuredText, in which a list needs a blank line
before it and `x_` is a link; ours are Markdown, and are parsed as Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

SECTION = """
## {name}

From the chapter {{doc}}`/notebooks/{name}`.

```{{eval-rst}}
.. automodule:: albor.{name}
   :members:
```
"""


def modules(root: Path) -> list[str]:
    """The chapters that export a module, in reading order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    pages = [
        Path(page["file"]) for part in toc["parts"] for page in part["chapters"]
    ]
    return [
        page.name for page in pages if (root / "albor" / f"{page.name}.py").exists()
    ]


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the sections where the API page asks for them."""
    if page == "book/api":
        sections = [SECTION.format(name=name) for name in modules(Path(app.srcdir))]
        source[0] = source[0].replace("```{modules}\n```\n", "".join(sections))


class Markdown(Directive):
    """The content of the directive, parsed as MyST Markdown."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        page = self.state.document
        document = new_document(str(page["source"]), page.settings)
        MystParser().parse("\n".join(self.content), document)
        return list(document.children)


def wrap(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Replace the docstring's lines, in place, by one directive that holds them."""
    if any(line.strip() for line in lines):
        lines[:] = [".. markdown::", "", *(f"   {line}" for line in lines), ""]


def setup(app: Sphinx) -> dict[str, bool]:
    sys.path.insert(0, str(app.srcdir))  # document the package beside the book
    app.add_directive("markdown", Markdown)
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", wrap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
