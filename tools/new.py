"""Begin a chapter: a text with the contract's headings, listed in the order."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from tools.chapters import HEADER, BookError, chapter_names, write_atomically

SKELETON = '''\
# {title}

*The question that this chapter answers, in one sentence?*

:::{{admonition}} Before you start
:class: note

- **You need:** the chapters whose ideas this one uses.
- **Time:** how long it takes to read.
- **Hardware:** what runs without a GPU.
:::

## By hand first

A toy with numbers small enough to check on paper.

```{{code-cell}} ipython3
:tags: [export]

"""{title}.

What this module is, and what is notable about it.
"""
```

```{{code-cell}} ipython3
1 + 1
```

## The idea in code

The equation, and beside it the code. Cells tagged `export` become
`albor/{name}.py`; a class stands whole in one of them. An assertion follows every
definition, and one shows what is refused.

```{{code-cell}} ipython3
assert 1 + 1 == 2
```

## An experiment

:::{{admonition}} Predict
:class: tip

What will happen? Write it down before you run the next cell.
:::

```{{code-cell}} ipython3
print("the cell that answers it, then a figure with alt text")
```

## What goes wrong in practice

The bugs that live here, and how they showed themselves.

## Exercise

Something to try, with its solution folded below.

```{{code-cell}} ipython3
:tags: [hide-cell]

print("the solution, executed")
```

## Summary

- What to remember.
'''


def new(root: Path, name: str, title: str, after: str = "") -> str:
    """Write `book/NAME.md`, and list it after `after` (if empty: at the end)."""
    order = chapter_names(root)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BookError(
            f"{name!r}: not a name for a chapter; it becomes a module, so use "
            "small letters, digits and _"
        )
    title = title.strip()
    path = root / "book" / f"{name}.md"
    if name in order or path.exists():
        raise BookError(
            f"book/{name}.md: there is such a chapter; choose another name"
        )
    if not 0 < len(title) <= 70 or re.search(r'["\\\n]', title):
        raise BookError(
            f"{title!r}: not a title; give one line of at most 70 characters "
            'without " and \\'
        )
    after = after or (order[-1] if order else "")
    toc = root / "_toc.yml"
    text = toc.read_text(encoding="utf-8")
    line = re.compile(
        rf"^( *- file: )notebooks/{re.escape(after)} *$", re.MULTILINE
    )
    found = line.search(text) if after else None
    if not found:
        raise BookError(
            f"_toc.yml: no line `- file: notebooks/{after}` to put it after; "
            f"it lists {', '.join(order) or 'no chapter'}"
        )
    entry = f"\n{found.group(1)}notebooks/{name}"
    write_atomically(path, HEADER + "\n" + SKELETON.format(name=name, title=title))
    write_atomically(toc, text[: found.end()] + entry + text[found.end() :])
    return f"book/{name}.md: begun; in _toc.yml it stands after {after}"
