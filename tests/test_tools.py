"""Plant every fault in a miniature project, and see the toolchain find it.

The project has three chapters: `alpha` exports `double`, `beta` imports it and
reads a committed file, `gamma` draws a figure and prints a number that may vary.
"""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from tools import keep as keeper
from tools.__main__ import main
from tools.chapters import (
    HEADER,
    BookError,
    Chapter,
    cells_hash,
    code_hash,
    dependencies,
    imported_modules,
    outputs_hash,
)
from tools.check import check
from tools.export import exported
from tools.keep import adopt, keep
from tools.new import new


def cell(source: str, *tags: str, options: str = "") -> str:
    given = f":tags: [{', '.join(tags)}]\n\n" if tags else ""
    return f"```{{code-cell}} ipython3\n{options or given}{source}\n```\n\n"


ALT = 'mystnb:\n  image:\n    alt: "a rising line"\n'
FIGURE = "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()"
TEXTS = {
    "alpha": "# Alpha\n\nTwice is *more*.\n\n"
    + cell('"""Doubling."""\n\nimport math', "export")
    + "Now the function.\n\n"
    + cell("def double(x: int) -> int:\n    return int(math.fsum([x,x]))", "export")
    + cell("print(double(2))\ndouble(3)"),
    "beta": "# Beta\n\n"
    + cell('"""Reading."""\n\nfrom albor.alpha import double', "export")
    + cell("def four(x: int) -> int:\n    return double(double(x))", "export")
    + cell("from pathlib import Path")
    + cell('print(Path("../data.txt").exists(), "settings/a.txt", four(1))'),
    "gamma": "# Gamma\n\n"
    + cell(FIGURE, options=f"---\ntags: [hide-input]\n{ALT}---\n")
    + cell("import time\n\nelapsed = time.time()\nelapsed", "nbval-ignore-output")
    + cell("assert elapsed > 0"),
}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The miniature project, built once."""
    root = tmp_path_factory.mktemp("mini") / "project"
    for folder in ("book", "notebooks", "albor", "settings"):
        (root / folder).mkdir(parents=True)
    chapters = [{"file": f"notebooks/{name}"} for name in TEXTS]
    toc = {"format": "jb-book", "root": "book/intro", "chapters": chapters}
    (root / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    (root / "book/intro.md").write_text("# Intro\n")
    (root / "albor/__init__.py").write_text('"""Mini."""\n\n__version__ = "1"\n')
    (root / "settings/a.txt").write_text("first\n")
    for name, text in TEXTS.items():
        (root / f"book/{name}.md").write_text(f"{HEADER}\n{text}")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=root, check=True)
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    list(keep(root, []))
    assert check(root) == []
    return root


@pytest.fixture
def project(built, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(built, tmp_path / "project"))


def edit(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text()
    assert old in text, f"{old!r} is not in {path}"
    (root / path).write_text(text.replace(old, new))


def load(root: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(root / f"notebooks/{name}.ipynb", as_version=4)


def store(root: Path, name: str, notebook: nbformat.NotebookNode) -> None:
    """Save as JupyterLab does: whatever is in the cells, the hashes left alone."""
    nbformat.write(notebook, root / f"notebooks/{name}.ipynb")


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    kept = (path for path in files if ".git/" not in path.as_posix())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in kept}


def found(root: Path, *words: str) -> bool:
    """Does one fault hold all the words? Each fault must also name a mend."""
    faults = check(root)
    assert all(":" in fault and ";" in fault for fault in faults), faults
    hits = [fault for fault in faults if all(word in fault for word in words)]
    assert hits, f"no fault with {words} among {faults}"
    return True


# --- what is made -----------------------------------------------------------------


def test_module_has_docstring_imports_names_and_source(built):
    text = (built / "albor/alpha.py").read_text()
    assert text == (
        "# Generated from book/alpha.md: edit the chapter, not this file.\n"
        '"""Doubling."""\n\nimport math\n\n__all__ = ["double"]\n\n\n'
        "def double(x: int) -> int:\n    return int(math.fsum([x, x]))\n"
    )
    assert not (built / "albor/gamma.py").exists(), "gamma exports nothing"


def test_all_holds_public_names_alone(project):
    names = (
        "import os\n"
        "B, (C, *D) = 1, (2, 3)\n_hidden = 1\nsmall: int = 2\n"
        "squares = [i * i for i in range(3) if (j := i)]\n"
        "if small:\n    inner = 1\n\nclass Shape:\n    side = 1\n"
        "def area():\n    local = 1\n    return local"
    )
    edit(project, "book/alpha.md", "import math", f"import math\n{names}")
    tree = ast.parse(exported(Chapter(project, "alpha")))
    (listing,) = (
        s
        for s in tree.body
        if isinstance(s, ast.Assign) and "__all__" in ast.dump(s)
    )
    public = ["B", "C", "D", "Shape", "area", "double", "inner", "small", "squares"]
    assert set(ast.literal_eval(listing.value)) - {"j"} == set(public)
    assert ast.literal_eval(listing.value)[:4] == ["B", "C", "D", "Shape"]


def test_notebook_is_as_stored(built):
    notebook = load(built, "alpha")
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2, 3]
    assert code[2].outputs[0].text == "4\n"
    assert code[2].outputs[1].data["text/plain"] == "6"
    assert code[2].outputs[1].execution_count == 3
    assert code[0].metadata == {"tags": ["export"]}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.pygments_lexer == "ipython3"
    assert "version" not in notebook.metadata.language_info
    assert set(notebook.metadata.albor) == {"cells", "code", "outputs"}
    assert "jupytext" not in notebook.metadata
    assert len({c.id for c in notebook.cells}) == len(notebook.cells)


def test_split_streams_are_merged_and_stale_counts_mended():
    out = nbformat.v4.new_output
    parts = [
        out("stream", name="stdout", text="a"),
        out("stream", name="stdout", text="b"),
        out("stream", name="stderr", text="c"),
        out("execute_result", data={"text/plain": "1"}, execution_count=9),
    ]
    clean = keeper.clean_outputs(parts, 4)
    assert [o.get("text") for o in clean] == ["ab", "c", None]
    assert clean[-1].execution_count == 4


def test_cells_run_in_notebooks_with_albor_test_set(project):
    code = "import os\nfrom pathlib import Path\n\n"
    code += 'print(os.environ["ALBOR_TEST"], Path.cwd().name)'
    edit(project, "book/alpha.md", "print(double(2))", code)
    list(keep(project, ["alpha"]))
    assert load(project, "alpha").cells[-1].outputs[0].text == "1 notebooks\n"


def test_twice_is_once_whatever_the_clock_says(project):
    """No content changes, so nothing does: not by order, age or time of day."""
    before = contents(project)
    ages = random.Random(0)
    for path in project.rglob("*"):
        os.utime(path, (ages.randrange(2**31), ages.randrange(2**31)))
    assert check(project) == []
    assert list(keep(project, [])) == []
    assert contents(project) == before


def test_execution_again_gives_the_same_bytes(project):
    before = contents(project)
    for name in ("alpha", "beta"):
        (project / f"notebooks/{name}.ipynb").unlink()
    assert list(keep(project, [])) == [
        "notebooks/alpha.ipynb: executed",
        "notebooks/beta.ipynb: executed",
    ]
    assert contents(project) == before


def test_a_copy_without_git_is_as_fresh(project):
    shutil.rmtree(project / ".git")
    assert check(project) == []


def test_prose_alone_runs_nothing(project, monkeypatch):
    monkeypatch.setattr(keeper, "execute", lambda chapter: pytest.fail("it ran"))
    edit(
        project,
        "book/alpha.md",
        "Twice is *more*.",
        "Twice is twice.\n\n+++\n\nSo.",
    )
    edit(project, "book/gamma.md", "a rising line", "a line that rises")
    outputs = outputs_hash(load(project, "gamma"))
    assert list(keep(project, [])) == [
        "notebooks/alpha.ipynb: brought in line with its text",
        "notebooks/gamma.ipynb: brought in line with its text",
    ]
    assert outputs_hash(load(project, "gamma")) == outputs
    assert check(project) == []


def test_a_named_chapter_alone_is_kept(project):
    edit(project, "book/alpha.md", "double(2)", "double(4)")
    edit(project, "book/gamma.md", "[1, 2]", "[2, 1]")
    done = list(keep(project, ["gamma"]))
    assert done == ["notebooks/gamma.ipynb: executed"]
    with pytest.raises(
        BookError, match=r"no notebooks/delta; it lists alpha, beta"
    ):
        list(keep(project, ["delta"]))


# --- what makes a chapter stale ---------------------------------------------------


def test_an_edited_import_makes_the_importer_run(project):
    edit(project, "book/alpha.md", "[x,x]", "[x, x, 0]")
    assert found(project, "albor/alpha.py", "stale")
    assert found(project, "notebooks/alpha.ipynb", "stale twin")
    done = list(keep(project, []))
    assert done == [
        "albor/alpha.py: exported",
        "notebooks/alpha.ipynb: executed",
        "notebooks/beta.ipynb: executed",
    ]
    assert check(project) == []


def test_a_module_that_changed_is_seen_by_its_importers(project):
    """Also when the chapter behind it stands further up the chain of imports."""
    edit(project, "book/gamma.md", "import time", "import time\nimport albor.beta")
    list(keep(project, []))
    edit(project, "albor/alpha.py", "return", "y = 1\n    return")
    assert found(project, "notebooks/beta.ipynb", "imports or reads")
    assert found(project, "notebooks/gamma.ipynb", "imports or reads")


def test_a_committed_file_that_is_read_counts(project):
    assert "settings/a.txt" in dependencies(Chapter(project, "beta"))
    (project / "settings/a.txt").write_text("second\n")
    assert found(project, "notebooks/beta.ipynb", "imports or reads")
    assert list(keep(project, [])) == ["notebooks/beta.ipynb: executed"]
    assert check(project) == []


def test_a_folder_counts_with_what_is_committed_in_it(project):
    edit(project, "book/beta.md", '"settings/a.txt"', 'f"settings/{1}.txt"')
    assert "settings/a.txt" in dependencies(Chapter(project, "beta"))
    (project / "settings/loose.txt").write_text("not committed\n")
    assert "settings/loose.txt" not in dependencies(Chapter(project, "beta"))


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ('root / "settings" / "a.txt"', {"settings/a.txt"}),
        ('root / "book" / "intro.md"', {"book/intro.md"}),
        ('open("./book/intro.md")', {"book/intro.md"}),
        ('open(f"settings/{chr(97)}.txt")', {"settings/a.txt"}),
        ('open(f"settings/{chr(97)}.md")', {"settings/a.txt"}),  # its folder counts
        ('open(f"book/in{chr(116)}ro.md")', {"book/intro.md"}),
        ('open(f"{chr(98)}ook/intro.md")', set()),  # might be anything
        ('["book", "notebooks", "albor", "_toc.yml", ".", ""]', set()),
    ],
)
def test_paths_are_told_from_words(project, source, read):
    edit(project, "book/gamma.md", "elapsed > 0", source)
    assert set(dependencies(Chapter(project, "gamma"))) == read


def test_a_notebook_that_is_read_counts_by_its_code(project):
    edit(
        project,
        "book/gamma.md",
        "elapsed > 0",
        'elapsed > 0, "notebooks/beta.ipynb"',
    )
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    before = code_hash(Chapter(project, "gamma"))
    assert "albor/alpha.py" in dependencies(Chapter(project, "gamma"))
    beta = load(project, "beta")
    beta.cells[-1].outputs = []
    store(project, "beta", beta)
    assert code_hash(Chapter(project, "gamma")) == before
    edit(project, "book/beta.md", "four(1)", "four(2)")
    assert code_hash(Chapter(project, "gamma")) != before


def test_figures_depend_on_their_style_and_on_nothing_of_their_own(project):
    (project / "notebooks/matplotlibrc").write_text("lines.linewidth: 3\n")
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    assert set(dependencies(Chapter(project, "gamma"))) == {
        "notebooks/matplotlibrc"
    }
    assert "albor/beta.py" not in dependencies(Chapter(project, "beta"))


@pytest.mark.parametrize(
    "source",
    [
        "import albor.alpha",
        "import albor.alpha as a",
        "from albor.alpha import double",
        "from albor import alpha",
        "from . import alpha",
        "from .alpha import double",
        "def late():\n    from albor.alpha import double",
        'importlib.import_module("albor.alpha")',
        'import_module(".alpha", "albor")',
        'import_module(name="albor.alpha")',
        '__import__("albor.alpha")',
    ],
)
def test_every_form_of_import_counts(source):
    assert imported_modules(ast.parse(source)) == {"alpha"}


def test_imports_inside_a_program_given_to_another_process_count(project):
    edit(
        project, "book/gamma.md", "elapsed > 0", '"from albor.alpha import double"'
    )
    assert "albor/alpha.py" in dependencies(Chapter(project, "gamma"))


def test_an_edited_tag_makes_a_chapter_stale(project):
    edit(
        project,
        "book/gamma.md",
        "[nbval-ignore-output]",
        "[nbval-ignore-output, a]",
    )
    assert found(project, "notebooks/gamma.ipynb", "stale twin")
    assert list(keep(project, [])) == ["notebooks/gamma.ipynb: executed"]


# --- the keeper refuses -----------------------------------------------------------


def reader_edits(project: Path) -> None:
    alpha = load(project, "alpha")
    alpha.cells[-1].source = "double(21)"
    added = nbformat.v4.new_markdown_cell(
        "A reader's thought, with $x^2$.\n\n- one"
    )
    alpha.cells.insert(1, added)
    alpha.cells.append(
        nbformat.v4.new_code_cell("double(8)", metadata={"tags": ["b"]})
    )
    store(project, "alpha", alpha)


def test_readers_edits_survive(project):
    reader_edits(project)
    edit(project, "book/beta.md", "four(1)", "four(2)")
    before = contents(project)
    assert found(project, "notebooks/alpha.ipynb", "make adopt NAME=alpha")
    with pytest.raises(BookError, match=r"make adopt NAME=alpha.*"):
        list(keep(project, []))
    assert contents(project) == before, "refused before anything was written"

    header = Chapter(project, "alpha").header
    adopt(project, "alpha")
    text = (project / "book/alpha.md").read_text()
    assert text.startswith(header)
    assert "A reader's thought, with $x^2$." in text and "double(21)" in text
    list(keep(project, []))
    assert check(project) == []
    assert load(project, "alpha").cells[-1].outputs[0].data["text/plain"] == "16"
    assert adopt(project, "alpha").endswith("nothing to adopt")


def test_untouched_cells_stay_word_for_word_when_edits_are_adopted(project):
    before = (project / "book/gamma.md").read_text()
    gamma = load(project, "gamma")
    gamma.cells[-1].source = "assert elapsed > 1"
    store(project, "gamma", gamma)
    adopt(project, "gamma")
    assert (project / "book/gamma.md").read_text().strip() == before.replace(
        "elapsed > 0", "elapsed > 1"
    ).strip()


def test_text_and_notebook_both_edited_is_a_conflict_that_loses_nothing(project):
    reader_edits(project)
    edit(project, "book/alpha.md", "Twice is *more*.", "The author's thought.")
    before = contents(project)
    with pytest.raises(BookError, match=r"edited too.*_build/adopt/alpha\.md"):
        adopt(project, "alpha")
    with pytest.raises(BookError, match="make adopt"):
        list(keep(project, ["alpha"]))
    after = contents(project)
    assert "A reader's thought" in after.pop("_build/adopt/alpha.md").decode()
    assert after == before
    # The way that the message names leads out of it.
    merged = (project / "_build/adopt/alpha.md").read_text()
    merged = merged.replace("Twice is *more*.", "The author's thought.")
    (project / "book/alpha.md").write_text(merged)
    (project / "notebooks/alpha.ipynb").unlink()
    list(keep(project, []))
    assert check(project) == []


def test_an_edit_made_alike_in_both_is_no_conflict(project):
    alpha = load(project, "alpha")
    alpha.cells[0].source = alpha.cells[0].source.replace("more", "less")
    store(project, "alpha", alpha)
    edit(project, "book/alpha.md", "more", "less")
    assert list(keep(project, [])) == [
        "notebooks/alpha.ipynb: brought in line with its text"
    ]


def test_a_pasted_picture_is_not_lost(project):
    alpha = load(project, "alpha")
    alpha.cells[0].attachments = {"a.png": {"image/png": "aGVsbG8="}}
    store(project, "alpha", alpha)
    with pytest.raises(BookError, match="attached picture"):
        adopt(project, "alpha")
    with pytest.raises(BookError, match="make adopt"):
        list(keep(project, []))


def test_what_jupyterlab_notes_about_display_is_no_edit(project):
    alpha = load(project, "alpha")
    alpha.cells[1].metadata["scrolled"] = True
    alpha.cells[2].metadata["jp-MarkdownHeadingCollapsed"] = True
    alpha.metadata.language_info["version"] = "3.99"
    store(project, "alpha", alpha)
    assert found(project, "notebooks/alpha.ipynb", "not as the keeper writes it")
    assert list(keep(project, [])) == [
        "notebooks/alpha.ipynb: brought in line with its text"
    ]
    assert check(project) == []


def test_cells_moved_in_the_notebook_are_an_edit(project):
    beta = load(project, "beta")
    beta.cells[2], beta.cells[3] = beta.cells[3], beta.cells[2]
    store(project, "beta", beta)
    with pytest.raises(BookError, match="make adopt NAME=beta"):
        list(keep(project, []))


def test_a_failing_cell_is_named_and_leaves_the_notebook_alone(project):
    before = (project / "notebooks/alpha.ipynb").read_bytes()
    edit(project, "book/alpha.md", "print(double(2))", "print(double('x'))")
    line = (project / "book/alpha.md").read_text().split("\n").index("double(3)")
    with pytest.raises(BookError, match=rf"book/alpha\.md:{line}: the cell failed"):
        list(keep(project, []))
    assert (project / "notebooks/alpha.ipynb").read_bytes() == before
    assert sorted(p.name for p in (project / "notebooks").iterdir()) == [
        "alpha.ipynb",
        "beta.ipynb",
        "gamma.ipynb",
    ]


def test_a_kernel_that_dies_is_named(project):
    edit(project, "book/alpha.md", "print(double(2))", "import os\n\nos._exit(3)")
    with pytest.raises(BookError, match=r"book/alpha\.md:\d+: the cell failed"):
        list(keep(project, []))


def test_a_kernel_that_does_not_start_is_tried_again(project, monkeypatch):
    tried = []

    def start(self, **options):
        tried.append(options)
        raise RuntimeError("Kernel died before replying to kernel_info")

    monkeypatch.setattr(keeper.NotebookClient, "execute", start)
    (project / "notebooks/alpha.ipynb").unlink()
    with pytest.raises(BookError, match="does not start"):
        list(keep(project, []))
    assert len(tried) == keeper.KERNEL_STARTS


def test_an_error_that_is_the_lesson_is_kept(project):
    text = (project / "book/gamma.md").read_text()
    text += cell("1 / 0", "raises-exception")
    (project / "book/gamma.md").write_text(text)
    list(keep(project, []))
    assert load(project, "gamma").cells[-1].outputs[0].ename == "ZeroDivisionError"
    assert check(project) == []


@pytest.mark.parametrize(
    "leak",
    [
        "Path.home() / 'x'",
        "Path.cwd()",
        "__import__('tempfile').mkdtemp()",
        "__import__('yaml').__file__",
        "'in /' + 'home/somebody/work.py'",
        "object()",
    ],
)
def test_an_output_that_names_the_machine_is_refused(project, leak):
    edit(project, "book/beta.md", "from pathlib import Path\n", "")
    edit(
        project,
        "book/beta.md",
        "print(Path(",
        f"from pathlib import Path\nprint({leak})\n#",
    )
    before = (project / "notebooks/beta.ipynb").read_bytes()
    with pytest.raises(
        BookError, match=r"book/beta\.md:\d+: the cell's output holds"
    ):
        list(keep(project, []))
    assert (project / "notebooks/beta.ipynb").read_bytes() == before


# --- check finds ------------------------------------------------------------------


def test_stale_twin(project):
    edit(project, "book/alpha.md", "Now the function.", "Here is the function.")
    assert found(project, "notebooks/alpha.ipynb", "stale twin", "make notebooks")


def test_missing_twin_and_module(project):
    (project / "notebooks/alpha.ipynb").unlink()
    (project / "albor/alpha.py").unlink()
    assert found(project, "notebooks/alpha.ipynb: missing")
    assert found(project, "albor/alpha.py: missing")


def test_hand_edited_module(project):
    edit(project, "albor/alpha.py", "return int", "return 1 + int")
    assert found(project, "albor/alpha.py", "edited by hand")


def test_orphan_module(project):
    (project / "albor/delta.py").write_text("x = 1\n")
    (project / "albor/gamma.py").write_text("x = 1\n")
    (project / "albor/deep").mkdir()
    (project / "albor/deep/alpha.py").write_text("x = 1\n")
    assert found(project, "albor/delta.py", "exported by no chapter")
    assert found(project, "albor/gamma.py", "exports nothing")
    assert found(project, "albor/deep/alpha.py", "exported by no chapter")


def test_unrun_cell(project):
    alpha = load(project, "alpha")
    alpha.cells[-1].execution_count, alpha.cells[-1].outputs = None, []
    store(project, "alpha", alpha)
    assert found(project, "notebooks/alpha.ipynb", "not run")


def test_error_output(project):
    alpha = load(project, "alpha")
    error = {"ename": "ValueError", "evalue": "no", "traceback": ["no"]}
    alpha.cells[-1].outputs = [nbformat.v4.new_output("error", **error)]
    store(project, "alpha", alpha)
    assert found(
        project, "notebooks/alpha.ipynb", "error output", "raises-exception"
    )


@pytest.mark.parametrize("field", ["text", "number", "count", "picture"])
def test_edited_output(project, field):
    """A figure typed into a stored output is found, and the next run mends it."""
    name = "gamma" if field == "picture" else "alpha"
    notebook = load(project, name)
    last = notebook.cells[-1]
    if field == "text":
        last.outputs[0].text = "5\n"
    elif field == "number":
        last.outputs[1].data["text/plain"] = "7"
    elif field == "count":
        last.execution_count = 8
    else:
        notebook.cells[1].outputs[0].data["image/png"] = "aGVsbG8="
    store(project, name, notebook)
    assert found(project, f"notebooks/{name}.ipynb", "outputs are not as")
    assert list(keep(project, [])) == [f"notebooks/{name}.ipynb: executed"]
    assert check(project) == []


def test_leaked_path(project):
    alpha = load(project, "alpha")
    alpha.cells[-1].outputs[0].text = "saved to /home/" + "someone/x.bin\n"
    store(project, "alpha", alpha)
    assert found(project, "notebooks/alpha.ipynb", "someone/x.bin", "machine")


@pytest.mark.parametrize("tag", ["nbval-skip", "skip-execution"])
def test_skipped_cell(project, tag):
    edit(project, "book/gamma.md", "[nbval-ignore-output]", f"[{tag}]")
    assert found(project, "book/gamma.md", f"tagged {tag}")


def test_comment_that_steers_nbval(project):
    edit(
        project, "book/alpha.md", "print(double(2))", "# NBVAL_" + "SKIP\nprint(1)"
    )
    assert found(project, "book/alpha.md", "steers nbval")


def test_picture_without_alt_text(project):
    edit(project, "book/gamma.md", ALT, "")
    list(keep(project, []))
    assert found(project, "notebooks/gamma.ipynb", "alt text")


def test_ignored_output_without_assert(project):
    edit(project, "book/gamma.md", "assert elapsed > 0", "elapsed > 0")
    assert found(project, "book/gamma.md", "nbval-ignore-output", "no assert")


@pytest.mark.parametrize(
    "line", ["assert elapsed", "np.testing.assert_allclose(1, 1)"]
)
def test_ignored_output_with_assert_in_place(project, line):
    edit(project, "book/gamma.md", "assert elapsed > 0", "elapsed > 0")
    edit(project, "book/gamma.md", "elapsed\n```", f"{line}\n```")
    assert not [fault for fault in check(project) if "no assert" in fault]


@pytest.mark.parametrize(
    "line",
    [
        "from albor.beta import four",
        "from albor import beta",
        "def late():\n    import albor.beta",
        'import importlib\n\nimportlib.import_module("albor.beta")',
    ],
)
def test_import_against_the_order(project, line):
    edit(project, "book/alpha.md", "print(double(2))", line)
    assert found(project, "book/alpha.md", "albor.beta", "later chapter")


def test_import_against_the_order_in_an_exported_cell(project):
    edit(
        project,
        "book/alpha.md",
        "import math",
        "import math\nfrom .beta import four",
    )
    assert found(project, "book/alpha.md", "albor.beta", "later chapter")


def test_order_is_that_of_the_table_of_contents(project):
    edit(project, "_toc.yml", "notebooks/alpha", "notebooks/NAME")
    edit(project, "_toc.yml", "notebooks/beta", "notebooks/alpha")
    edit(project, "_toc.yml", "notebooks/NAME", "notebooks/beta")
    assert found(project, "book/beta.md", "albor.alpha", "later chapter")


def test_the_tour_alone_looks_ahead(project):
    new(project, "tour", "The tour", after="alpha")
    edit(project, "book/tour.md", "1 + 1\n```", "from albor.beta import four\n```")
    assert not [fault for fault in check(project) if "later chapter" in fault]


def test_import_of_oneself_and_of_nothing(project):
    edit(
        project,
        "book/alpha.md",
        "print(double(2))",
        "import albor.alpha, albor.nil",
    )
    assert found(project, "book/alpha.md", "its own module")
    assert found(project, "book/alpha.md", "albor.nil", "no chapter exports")


def test_wildcard_import(project):
    edit(
        project, "book/beta.md", "from pathlib import Path", "from pathlib import *"
    )
    assert found(project, "book/beta.md", "import * from pathlib")


def test_long_line(project):
    edit(project, "book/alpha.md", "double(3)", f"double(3)  # {'x' * 80}")
    place = (project / "book/alpha.md").read_text().split("\n")
    line = next(i for i, text in enumerate(place, 1) if "xxx" in text)
    assert found(project, f"book/alpha.md:{line}:", "93 columns")


def test_long_module(project):
    many = "\n".join(f"a{number} = {number}" for number in range(301))
    edit(project, "book/alpha.md", "import math", f"import math\n\n{many}")
    assert found(project, "albor/alpha.py", "lines, over 300")


def test_chapter_and_contents_disagree(project):
    (project / "book/delta.md").write_text(f"{HEADER}\n# Delta\n")
    (project / "book/notes.md").write_text("# Notes\n")
    edit(
        project, "_toc.yml", "- file: notebooks/gamma", "- file: notebooks/missing"
    )
    shutil.copy(
        project / "notebooks/alpha.ipynb", project / "notebooks/stray.ipynb"
    )
    assert found(project, "book/delta.md: not in _toc.yml", "notebooks/delta")
    assert found(project, "book/notes.md: not in _toc.yml", "book/notes")
    assert found(project, "_toc.yml: lists notebooks/missing", "book/missing.md")
    assert found(project, "book/gamma.md: not in _toc.yml")
    assert found(project, "notebooks/stray.ipynb: no chapter")


def test_package_init_holds_the_version_alone(project):
    init = project / "albor/__init__.py"
    init.write_text(init.read_text() + "from albor.alpha import double\n")
    assert found(project, "albor/__init__.py", "__version__")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"""Doubling."""\n\n', "", "no docstring"),
        ("def double", "import os\n\n\ndef double", "import in a later exported"),
        ("double(3)", "double(3", "not Python"),
        ("jupytext:", "nothing:", "header"),
    ],
)
def test_text_that_cannot_be_exported(project, old, new, words):
    edit(project, "book/alpha.md", old, new)
    assert found(project, "book/alpha.md", words)
    with pytest.raises(BookError, match=words):
        list(keep(project, []))


def test_broken_notebook_file(project):
    (project / "notebooks/alpha.ipynb").write_text("{")
    assert found(project, "notebooks/alpha.ipynb", "not a notebook")


def test_every_fault_is_listed_and_the_exit_status_says_so(project, capsys):
    assert main(["--root", str(project), "check"]) == 0
    edit(project, "book/alpha.md", "double(3)", f"double(3)  # {'x' * 80}")
    edit(project, "book/gamma.md", "assert elapsed > 0", "elapsed > 0")
    (project / "albor/delta.py").write_text("")
    capsys.readouterr()
    assert main(["--root", str(project), "check"]) == 1
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == len(check(project)) >= 4


def test_check_imports_neither_the_package_nor_torch(project):
    program = (
        "import sys; from tools.__main__ import main; "
        f"code = main(['--root', {str(project)!r}, 'check']); "
        "assert not {'torch', 'albor'} & sys.modules.keys(); sys.exit(code)"
    )
    here = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=here).returncode == 0


# --- a new chapter ----------------------------------------------------------------


def test_new_chapter_in_one_command(project):
    command = [
        "--root",
        str(project),
        "new",
        "delta",
        "The fourth: more",
        "--after",
    ]
    assert main([*command, "alpha"]) == 0
    assert check(project) == []
    toc = yaml.safe_load((project / "_toc.yml").read_text())
    files = [entry["file"] for entry in toc["chapters"]]
    assert files[:3] == ["notebooks/alpha", "notebooks/delta", "notebooks/beta"]
    headings = (project / "book/delta.md").read_text()
    assert all(word in headings for word in ("Predict", "Exercise", "Summary"))


@pytest.mark.parametrize(
    ("name", "title", "words"),
    [
        ("alpha", "Again", "there is such a chapter"),
        ("Delta", "Capital", "not a name"),
        ("../delta", "Path", "not a name"),
        ("class", "Keyword", "not a name"),
        ("delta", "", "not a title"),
        ("delta", 'Say "it"', "not a title"),
    ],
)
def test_new_chapter_refused(project, name, title, words):
    before = contents(project)
    with pytest.raises(BookError, match=words):
        new(project, name, title)
    with pytest.raises(BookError, match=r"notebooks/nowhere.*alpha, beta, gamma"):
        new(project, "delta", "Delta", after="nowhere")
    assert contents(project) == before


def test_notebook_made_by_hand_becomes_a_chapter(project):
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Hand"),
            nbformat.v4.new_code_cell("2"),
        ]
    )
    store(project, "hand", notebook)
    adopt(project, "hand")
    edit(project, "_toc.yml", "- file: notebooks/gamma", "- file: notebooks/hand")
    (project / "book/gamma.md").unlink()
    (project / "notebooks/gamma.ipynb").unlink()
    list(keep(project, []))
    assert check(project) == []


def test_hashes_ignore_order_of_keys_and_see_order_of_cells(built):
    notebook = load(built, "beta")
    turned = json.loads(
        json.dumps(notebook), object_pairs_hook=lambda p: dict(p[::-1])
    )
    assert cells_hash(nbformat.from_dict(turned)) == cells_hash(notebook)
    notebook.cells.reverse()
    assert cells_hash(notebook) != cells_hash(nbformat.from_dict(turned))
