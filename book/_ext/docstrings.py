"""Show docstrings on the API page as the Markdown that they are.

Sphinx reads docstrings as reStructuredText, in which a list needs a blank line before
it and `x_` is a link. Ours are plain Markdown, so each is wrapped in a directive that
hands it to the book's own parser.
"""

from __future__ import annotations

import sys
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx


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
    sys.path.insert(
        0, str(app.srcdir)
    )  # document the modules that lie beside the book
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", wrap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
