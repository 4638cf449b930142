"""Find what an output must not hold: paths and addresses of one machine."""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

# Home folders, temporary folders and installed packages, whoever's machine it was.
MACHINE = re.compile(
    r"""(?<![\w.~-])/(?:home|Users|root|tmp|private|var/folders|var/tmp)/[^\s'"<>)]*"""
    r"""|[A-Za-z]:\\+(?:Users|Temp)\\+[^\s'"<>)]*"""
    r"""|(?<![\w.~-])/[^\s'"<>)]*(?:site|dist)-packages[^\s'"<>)]*"""
    r"""|\b(?:object|function|method|\w+) at 0x[0-9a-fA-F]{6,}"""
)


def texts(cell: NotebookNode) -> Iterator[str]:
    """All text that the outputs of a code cell hold; encoded pictures are none."""
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            yield output.text
        elif output.output_type == "error":
            yield "\n".join([output.ename, output.evalue, *output.traceback])
        else:
            for kind, data in output.data.items():
                if kind.startswith("text/") or kind.endswith(("json", "xml")):
                    yield data if isinstance(data, str) else repr(data)


def leaks(cell: NotebookNode, root: Path) -> list[str]:
    """Machine paths and memory addresses in the outputs of a code cell."""
    here = {str(root.resolve()), str(root), str(Path.home()), tempfile.gettempdir()}
    here |= {sys.prefix, sysconfig.get_paths()["stdlib"]} - {"/usr"}
    found = []
    for text in texts(cell):
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
        found += [match.group() for match in MACHINE.finditer(text)]
        found += [
            path for path in sorted(here) if len(path) > 1 and path + "/" in text
        ]
        found += [
            path for path in sorted(here) if path.count("/") > 1 and path in text
        ]
    return list(dict.fromkeys(found))
