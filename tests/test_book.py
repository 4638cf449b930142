"""The text pages of the book, its settings, and the check that looks at it.

Chapters are the business of `make check`; here is what it does not see: that pages,
terms, citations and commands named in prose exist, and that the browser check finds
the faults it is there for.
"""

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pybtex.database import parse_file

import albor
from tools import browse
from tools.chapters import chapter_names, toc_entries

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book").glob("*.md"))
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def is_chapter(text: str) -> bool:
    return text.startswith("---\njupytext:")


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"^```\{code-cell\}.*?^```$", "", text, flags=re.S | re.M)


def roles(text: str, role: str) -> list[str]:
    """The targets of {role}`target` and {role}`words <target>`."""
    found = re.findall(rf"\{{{role}\}}`([^`]+)`", text)
    return [re.sub(r".*<(.*)>$", r"\1", target, flags=re.S) for target in found]


def glossary() -> list[list[str]]:
    """The terms, one list for each definition."""
    body = TEXT["glossary.md"].split("```{glossary}\n")[1].split("\n```")[0]
    entries: list[list[str]] = []
    defined = True
    for line in body.splitlines():
        if line and not line.startswith(" "):
            if defined:
                entries.append([])
            entries[-1].append(line)
            defined = False
        elif line:
            defined = True
    return entries


# ---- Pages, terms, citations ----


def test_the_toc_and_the_pages_agree() -> None:
    entries = toc_entries(ROOT)
    suffix = {"book": ".md", "notebooks": ".ipynb"}
    for entry in entries:
        path = ROOT / f"{entry}{suffix[Path(entry).parent.name]}"
        assert path.exists(), f"_toc.yml names {entry}, but {path} is not there"
    for name, text in TEXT.items():
        folder = "notebooks" if is_chapter(text) else "book"
        entry = f"{folder}/{name.removesuffix('.md')}"
        assert entry in entries, f"book/{name} is not in _toc.yml as {entry}"
    assert len(set(entries)) == len(entries)


@pytest.mark.parametrize("name", TEXT)
def test_terms_citations_and_pages_named_in_prose_exist(name: str) -> None:
    text = prose(TEXT[name])
    terms = {term.lower() for entry in glossary() for term in entry}
    for term in roles(text, "term"):
        assert " ".join(term.lower().split()) in terms, f"{name}: no term {term!r}"
    keys = set(parse_file(ROOT / "book" / "references.bib").entries)
    for role in ("cite", "cite:p", "cite:t"):
        for key in ",".join(roles(text, role)).split(","):
            assert not key or key.strip() in keys, f"{name}: no source {key!r}"
    for target in roles(text, "doc"):
        assert target.lstrip("/") in toc_entries(ROOT), (
            f"{name}: no page {target!r}"
        )


@pytest.mark.parametrize("name", [n for n in TEXT if not is_chapter(TEXT[n])])
def test_figures_of_text_pages_have_alt_text(name: str) -> None:
    text = TEXT[name]
    for alt, source in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text):
        assert len(alt) > 10, f"{name}: {source} has the alt text {alt!r}"
    for block in re.findall(
        r"^(?:```|:::)\{(?:figure|image)\}.*?$(.*?)^(?:```|:::)$", text, re.S | re.M
    ):
        assert re.search(r"^:alt: .{10}", block, re.M), f"{name}: {block}"
    for source in re.findall(r":file: (\S+\.svg)", text):
        svg = (ROOT / "book" / source).read_text(encoding="utf-8")
        assert re.search(r"<title [^>]*>[^<]+</title>", svg), f"{source}: no title"
        assert re.search(r"<desc [^>]*>[^<]{40,}</desc>", svg), f"{source}: no desc"


def test_the_picture_of_the_whole_links_every_chapter_after_the_tour() -> None:
    svg = (ROOT / "book" / "_static" / "system.svg").read_text(encoding="utf-8")
    linked = set(re.findall(r'href="\.\./notebooks/(\w+)\.html"', svg))
    assert linked == set(chapter_names(ROOT)) - {"tour"}
    links = set(re.findall(r'href="([^"]+)"', svg))
    assert all(link.startswith("../notebooks/") for link in links)


def test_the_glossary_is_in_order_and_has_no_term_twice() -> None:
    entries = glossary()
    assert len(entries) >= 50
    # An entry with two names stands under either.
    previous = ""
    for entry in entries:
        later = [term.lower() for term in entry if term.lower() > previous]
        assert later, f"{entry} stands after {previous!r}"
        previous = min(later)
    terms = [term.lower() for entry in entries for term in entry]
    assert len(set(terms)) == len(terms)


def test_the_sources_are_complete_and_their_keys_fit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a repeated key is one
        sources = parse_file(ROOT / "book" / "references.bib").entries
    for key, source in sources.items():
        assert {"title", "year"} <= set(source.fields), f"{key}: no title or year"
        assert source.persons.get("author"), f"{key}: no author"
        year = re.search(r"\d{4}", key)
        assert year and year[0] == source.fields["year"], f"{key}: another year"


def test_no_placeholder_is_left() -> None:
    for name, text in {**TEXT, "README.md": README}.items():
        for word in ("TODO", "FIXME", "XXX", "lorem ipsum", "example.com", "your-"):
            assert word not in text, f"{name} still says {word}"


# ---- What a reader is told to type ----


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M))


def fenced(text: str) -> list[str]:
    return re.findall(r"^```(?:sh|shell|text)\n(.*?)^```", text, re.S | re.M)


def test_the_readme_has_the_two_commands_in_one_block() -> None:
    assert fenced(README)[0] == "make pretrain\nmake test\n"
    assert "make pretrain\nmake test\n" in fenced(TEXT["intro.md"])


def test_every_make_command_in_prose_exists_and_the_readme_names_them_all() -> None:
    for name, text in {**TEXT, "README.md": README}.items():
        quoted = "\n".join([*fenced(text), *re.findall(r"`(make [^`]+)`", text)])
        for target in re.findall(r"^make ([a-z-]+)", quoted, re.M):
            assert target in targets(), f"{name}: there is no `make {target}`"
    named = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert targets() <= named, f"README.md is silent on {targets() - named}"


def test_the_lines_for_those_without_make_are_the_makefiles_own() -> None:
    version = re.search(r"^TORCH = (\S+)$", MAKEFILE, re.M)
    assert version
    lines = re.findall(r"\$\(BIN\)/python (-m pip install --quiet .*)", MAKEFILE)
    setup = [
        line.replace("--quiet ", "").replace("$(TORCH)", version[1])
        for line in lines
        if line.split()[-1] != "uv"
    ]
    assert len(setup) == 3
    assert "".join(f"python {line}\n" for line in setup) in README
    for line in setup:
        assert line.removeprefix("-m ") in TEXT["intro.md"]


def test_one_version_for_package_changelog_and_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == albor.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {albor.__version__}" in changelog


# ---- Settings ----


def test_the_book_executes_nothing_and_fetches_nothing() -> None:
    assert CONFIG["execute"]["execute_notebooks"] == "off"
    settings = CONFIG["sphinx"]["config"]
    script = ROOT / "book" / "_static" / settings["mathjax_path"]
    assert script.exists()
    assert (script.parent / "LICENSE").exists()
    assert settings["nb_ipywidgets_js"] == {}
    style = (ROOT / "book" / "_static" / "albor.css").read_text(encoding="utf-8")
    assert "url(" not in style and "@import" not in style


def test_the_api_page_lists_every_module_in_reading_order() -> None:
    path = ROOT / "book" / "_ext" / "apipage.py"
    spec = importlib.util.spec_from_file_location("apipage", path)
    assert spec and spec.loader
    apipage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(apipage)
    listed = apipage.modules(ROOT)
    files = {path.stem for path in (ROOT / "albor").glob("*.py")} - {"__init__"}
    assert set(listed) == files
    assert listed == [name for name in chapter_names(ROOT) if name in files]
    assert "```{modules}\n```\n" in TEXT["api.md"]


def test_figures_use_the_palette_for_colour_blind_readers() -> None:
    import matplotlib as mpl

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        style = mpl.rc_params_from_file(
            ROOT / "notebooks" / "matplotlibrc", use_default_template=False
        )
    colours = {
        f"#{c.lstrip('#')}" for c in style["axes.prop_cycle"].by_key()["color"]
    }
    palette = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #F0E442 #000000"
    assert colours == set(palette.split())
    assert style["figure.facecolor"] == "white"


# ---- The browser check, on pages with planted faults ----

CLEAN = """<!doctype html><html lang="en"><head><title>clean</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">
<style>
  body {{ background: #fff; color: #222 }} .grey {{ color: #888 }}
  @media (prefers-color-scheme: dark) {{
    :root {{ color-scheme: dark }} body {{ background: #111; color: #eee }}
    .dim {{ color: #444 }} }}
  .badge::before {{ content: "exported"; color: #9c9; background: #fff }}
  .tick::before {{ content: "\\2713"; color: #fff }}
  .cell_input pre {{ overflow-x: auto; width: 300px }}
</style></head><body><article><h1 id="top">A page</h1>
<p>Some <code>\\( code \\)</code>.</p>{}</article></body></html>"""

DOT = (
    "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
)

PLANTED = {
    "image": ('<img src="no.png" alt="words">', "missing image no.png"),
    "alt": (f'<img src="{DOT}">', "image without alt text"),
    "emptyalt": (f'<img src="{DOT}" alt="">', "image with empty alt text"),
    "math": ('<span class="math">x</span>', "formula not rendered"),
    "raw": ("<p>where \\(x\\) is small</p>", "raw formula"),
    "macro": ("<p>where $\\eta$ is small</p>", "raw formula"),
    "torn": ("<p>the first $t</p><ul><li>1$ keys</li></ul>", "raw formula"),
    "role": ("<p>see {doc}`/notebooks/model`</p>", "raw markup"),
    "merror": (
        '<span class="math"><mjx-container><svg width="9" height="9">'
        '<g data-mml-node="merror"></g></svg></mjx-container></span>',
        "formula with an error",
    ),
    "contrast": ('<p class="grey">pale</p>', "contrast 3.54 under 4.5"),
    "night": ('<p class="dim">by day</p>', '("by day") [dark]'),
    "badge": ('<p class="badge">text</p>', "::before"),
    "wide": ('<div style="width: 500px">wide</div>', "on a screen of 390"),
    "code": (
        f'<div class="cell_input"><pre>{"x" * 100}</pre></div>',
        "code of 100 columns",
    ),
    "search": (
        '<input type="search" aria-label="a"><input type="search" aria-label="b">',
        "2 search bars",
    ),
    "console": ("<script>console.error('alas')</script>", "console: alas"),
    "throws": ("<script>undefined.x</script>", "console: TypeError"),
    "outside": (
        '<script src="https://cdn.invalid/x.js"></script>',
        "external request https://cdn.invalid/x.js",
    ),
    "missing": ('<script src="no.js"></script>', "status 404"),
    "nowhere": ('<a href="gone.html">gone</a>', "link to gone.html"),
    "anchor": ('<a href="clean.html#end">end</a>', "link to clean.html#end"),
}

INNOCENT = f"""<p class="tick">a mark needs no contrast</p>
<p>costs $5</p><a href="clean.html#top">up</a><img src="{DOT}" alt="a dot">
<div style="overflow-x: auto"><div style="width: 900px">scrolls in place</div></div>
<div class="cell_input"><pre>short</pre></div><input type="search" aria-label="a">
<span class="math"><mjx-container>x</mjx-container></span>"""

SEARCH = """<form onsubmit="return true"><input name="q" aria-label="q"></form>
<div id="search-results"></div><script>
const q = new URLSearchParams(location.search).get("q");
const results = document.querySelector("#search-results");
if ({found}) results.innerHTML = "<ul><li>one</li></ul>";
else if (q) results.textContent = "Your search did not match any documents.";
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    try:
        return browse.find_browser()
    except browse.NoBrowserError:
        if os.environ.get("CI"):
            raise
        pytest.skip("no Chromium on this machine")


@pytest.fixture(scope="module")
def faults(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the check says of pages with one fault each, and of a clean page."""
    site = tmp_path_factory.mktemp("site")
    planted = {name: body for name, (body, _) in PLANTED.items()}
    for name, body in {**planted, "clean": INNOCENT}.items():
        (site / f"{name}.html").write_text(CLEAN.format(body), encoding="utf-8")
    return browse.check_site(site)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_the_browser_check_finds_a_planted_fault(
    name: str, faults: list[str]
) -> None:
    own = [fault for fault in faults if fault.startswith(f"{name}.html: ")]
    assert any(PLANTED[name][1] in fault for fault in own), own


@pytest.mark.slow
def test_the_browser_check_blames_each_page_for_its_own_fault_alone(
    faults: list[str],
) -> None:
    for fault in faults:
        name = fault.split(".html")[0]
        twice = name == "image" and "status 404" in fault
        twice |= name == "outside" and "failed request" in fault
        assert PLANTED[name][1] in fault or twice, fault


@pytest.fixture
def site(tmp_path: Path, chromium: str) -> Iterator[Path]:
    page = CLEAN.format(SEARCH.replace("{found}", "q === 'tokenizer'"))
    (tmp_path / "search.html").write_text(page, encoding="utf-8")
    yield tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "found, complaint",
    [
        ("q === 'tokenizer'", None),
        ("false", "0 results for 'tokenizer'"),
        ("q", "1 results for 'qzxjkvwq'"),
    ],
)
def test_the_search_must_find_a_word_and_must_not_find_nonsense(
    site: Path, found: str, complaint: str | None
) -> None:
    page = CLEAN.format(SEARCH.replace("{found}", found))
    (site / "search.html").write_text(page, encoding="utf-8")
    complaints = browse.check_site(site, word="tokenizer")
    assert complaints == ([f"search.html: {complaint}"] if complaint else [])


@pytest.mark.slow
def test_the_command_takes_pictures_and_answers_with_its_exit_code(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screens = tmp_path / "screens"
    where = ["--build", str(site), "--screens", str(screens)]
    assert browse.main(where) == 0
    taken = sorted(path.relative_to(screens) for path in screens.rglob("*.png"))
    assert [str(p) for p in taken] == [
        f"{view}/search.png" for view in ("dark", "light", "phone")
    ]
    (site / "bad.html").write_text(CLEAN.format('<img src="no.png" alt="x">'))
    assert browse.main([*where, "--no-screens"]) == 1
    assert "bad.html: missing image no.png" in capsys.readouterr().out


def test_a_machine_without_browser_or_book_is_told_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert browse.main(["--build", str(tmp_path)]) == 2
    assert "make book" in capsys.readouterr().err
    (tmp_path / "search.html").write_text(CLEAN.format(""))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert browse.main(["--build", str(tmp_path)]) == 2
    assert "apt install chromium" in capsys.readouterr().err
