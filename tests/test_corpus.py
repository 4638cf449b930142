"""The corpus: packages on one side only, sizes kept, the same on every machine."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import corpus as module
from albor.corpus import Corpus, build_corpus
from albor.documents import Document, Reading, find_owners, read_files
from albor.filters import CorpusError
from albor.sources import Dropped, File, Source, find_sources, scan
from albor.split import choose_held_out, rank


def program(name: str, lines: int = 12) -> str:
    """A text that passes every filter and that no other name gives."""
    body = "".join(
        f"    value = value + {name}_part(value)\n" for _ in range(lines)
    )
    return f"def {name}(value):\n{body}    return value\n"


def plant(
    folder: Path, packages: dict[str, int], lines: int = 12, seed: int = 0
) -> Path:
    """A tree with so many files in each package, written in an order of its own."""
    files = [(p, n) for p, count in packages.items() for n in range(count)]
    random.Random(seed).shuffle(files)
    for package, number in files:
        path = folder / package / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(program(f"{package}_{number}", lines), encoding="utf-8")
    return folder


def packages(documents: list[Document]) -> set[str]:
    return {document.package for document in documents}


def size(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def check(corpus: Corpus) -> Corpus:
    """What holds for every corpus."""
    assert corpus.train and corpus.val
    if corpus.report["split_by"] == "package":
        assert not packages(corpus.train) & packages(corpus.val)
    every = corpus.train + corpus.val
    assert len({document.sha256 for document in every}) == len(every)
    assert len({document.path for document in every}) == len(every)
    for part in (corpus.train, corpus.val):
        assert part == sorted(part, key=lambda document: document.path)
    text = json.dumps(corpus.report, allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")  # no surrogates either
    for part, documents in (("train", corpus.train), ("val", corpus.val)):
        assert corpus.report["splits"][part] == {
            "files": len(documents),
            "bytes": size(documents),
            "packages": len(packages(documents)),
        }
    return corpus


SIX = {"ant": 9, "bee": 7, "cat": 12, "dog": 3, "elk": 1, "fox": 20}


# ---------------------------------------------------------------------- splitting


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text("abcdefgh", min_size=1), st.integers(1, 10**7), min_size=2
    ),
    st.integers(1, 10**6),
    st.integers(0, 99),
)
def test_held_out_sizes(sizes: dict[str, int], val_bytes: int, seed: int) -> None:
    held = choose_held_out(sizes, val_bytes, seed)
    total = sum(sizes[name] for name in held)
    assert 1 <= len(held) < len(sizes) and len(set(held)) == len(held)
    small = [name for name in sizes if sizes[name] <= val_bytes / 4]
    reachable = sum(sorted(sizes.values())[:-1])
    assert total >= min(0.5 * val_bytes, reachable)
    if set(held) <= set(small):
        assert total <= val_bytes
    else:  # then small ones did not reach half, and only the last one is cut
        assert total - sizes[held[-1]] < 0.5 * val_bytes
    shuffled = dict(random.Random(seed).sample(list(sizes.items()), len(sizes)))
    assert choose_held_out(shuffled, val_bytes, seed) == held


def test_no_salt_holds_out_a_giant_or_a_crumb() -> None:
    """Sizes as they are on disk: few giants, many dwarfs."""
    dice = random.Random(7)
    sizes = {f"p{i}": int(dice.paretovariate(0.7) * 3000) for i in range(150)}
    total = sum(sizes.values())
    target = total // 20
    shares = [
        sum(sizes[name] for name in choose_held_out(sizes, target, salt)) / target
        for salt in range(500)
    ]
    assert min(shares) >= 0.5 and max(shares) <= 1
    naive = [
        sum(s for name, s in sizes.items() if rank(salt, name)[0] % 20 == 0)
        / target
        for salt in range(500)
    ]
    assert min(naive) < 0.1 and max(naive) > 4  # what the rule is there for


@pytest.mark.parametrize("seed", range(6))
def test_no_package_is_in_both_parts(tmp_path: Path, seed: int) -> None:
    corpus = check(build_corpus(str(plant(tmp_path, SIX)), seed=seed))
    assert corpus.report["split_by"] == "package"
    assert packages(corpus.train) | packages(corpus.val) <= set(SIX)
    share = size(corpus.val) / (size(corpus.train) + size(corpus.val))
    assert 0.015 < share < 0.15
    assert "ant" in packages(corpus.train) or "fox" in packages(corpus.train)


def test_two_equal_packages_are_not_halved(tmp_path: Path) -> None:
    """Only a tenth is examined; the rest of that package is given up, counted."""
    tree = plant(tmp_path, {"left": 40, "right": 40})
    corpus = check(build_corpus(str(tree)))
    assert len(packages(corpus.val)) == len(packages(corpus.train)) == 1
    everything = size(corpus.train) + size(corpus.val)
    everything += corpus.report["dropped"]["held out, beyond val_bytes"]["bytes"]
    assert 0.05 < size(corpus.val) / everything <= 0.1


def test_val_bytes_is_a_limit(tmp_path: Path) -> None:
    tree = plant(tmp_path, dict.fromkeys("abcdefghijklmnop", 6))
    total = sum(path.stat().st_size for path in tree.rglob("*.py"))
    for val_bytes in (3000, 6000, 10**9):
        corpus = check(build_corpus(str(tree), val_bytes=val_bytes))
        limit = min(val_bytes, total // 10)
        assert limit / 2 <= size(corpus.val) <= limit


def test_one_package_is_split_by_file_and_says_so(tmp_path: Path) -> None:
    for tree in (
        plant(tmp_path / "a", {"only": 30}),
        plant(tmp_path / "b", {"flat": 30}) / "flat",
    ):
        corpus = check(build_corpus(str(tree)))
        assert corpus.report["split_by"] == "file"
        assert any("split by file" in note for note in corpus.report["notes"])
        assert size(corpus.val) < 0.11 * size(corpus.train)
    corpus = check(build_corpus(str(plant(tmp_path / "c", {"a": 2, "b": 2}))))
    assert not any("split by file" in note for note in corpus.report["notes"])


def test_packages_of_rubbish_do_not_empty_a_part(tmp_path: Path) -> None:
    """Whatever is drawn first, both parts hold something that passes filters."""
    for seed in range(12):
        tree = plant(tmp_path / str(seed), {"good": 5, "fine": 5})
        for bad in ("x", "y", "z"):
            for number in range(6):
                path = tree / bad / f"{number}.py"
                path.parent.mkdir(exist_ok=True)
                path.write_text("this is not Python, it is prose " * 3)
        corpus = check(build_corpus(str(tree), seed=seed))
        assert packages(corpus.train) | packages(corpus.val) == {"good", "fine"}
        assert corpus.report["split_by"] == "package"
    tree = plant(tmp_path / "one", {"good": 5, "poor": 1})
    (tree / "poor" / "file0.py").write_text(
        "print 'this is Python of another age'\n" * 3
    )
    corpus = check(build_corpus(str(tree)))
    assert corpus.report["split_by"] == "file"
    assert corpus.report["dropped"]["does not parse"]["files"] == 1


# ----------------------------------------------------------------------- sampling


def test_a_sample_keeps_to_its_limits_and_its_breadth(tmp_path: Path) -> None:
    tree = plant(tmp_path, dict.fromkeys("abcdefgh", 30))
    for seed in range(4):
        corpus = check(build_corpus(str(tree), max_bytes=60_000, seed=seed))
        total = size(corpus.train) + size(corpus.val)
        assert 55_000 < total <= 60_000
        assert len(packages(corpus.train)) >= 6
        assert corpus.report["dropped"]["beyond max_bytes"]["files"] > 50


def test_a_sample_reads_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = plant(tmp_path, dict.fromkeys("abcdefgh", 30))
    read: list[File] = []

    def counting(files: list[File], *rest: Any) -> Iterator[Reading]:
        read.extend(files)
        return read_files(files, *rest)

    monkeypatch.setattr(module, "read_files", counting)
    corpus = build_corpus(str(tree), max_bytes=40_000)
    assert len(read) == len(corpus.train) + len(corpus.val) < 90


def test_a_limit_too_small_for_any_file_is_refused(tmp_path: Path) -> None:
    tree = plant(tmp_path, SIX)
    with pytest.raises(CorpusError, match="beyond max_bytes"):
        build_corpus(str(tree), max_bytes=100)


# -------------------------------------------------------------------- determinism


def test_the_same_tree_anywhere_gives_the_same_corpus(tmp_path: Path) -> None:
    """Written in another order, in another place, under another name."""
    one = build_corpus(str(plant(tmp_path / "one", SIX, seed=1)), max_bytes=30_000)
    two = build_corpus(
        str(plant(tmp_path / "x" / "two", SIX, seed=2)), max_bytes=30_000
    )
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    three = build_corpus(str(tmp_path / "three"), max_bytes=30_000)
    assert one.digest == two.digest == three.digest
    assert one.train == two.train and one.val == two.val
    assert {**one.report, "spec": ""} == {**two.report, "spec": ""}


def test_listing_order_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = str(plant(tmp_path, SIX))
    (tmp_path / "ant" / "copy.py").write_text(program("ant_0"))
    before = check(build_corpus(tree, max_bytes=30_000))
    real = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with real(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *problem: object) -> None: ...

    monkeypatch.setattr("albor.sources.os.scandir", Backwards)
    after = build_corpus(tree, max_bytes=30_000)
    assert after.digest == before.digest and after.report == before.report


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_hash_seeds_do_not_matter(tmp_path: Path, hash_seed: str) -> None:
    tree = str(plant(tmp_path / "tree", SIX))
    script = (
        "import sys, json; from albor.corpus import build_corpus; "
        "c = build_corpus(sys.argv[1], max_bytes=30_000); "
        "print(json.dumps([c.digest, c.report]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tree],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    here = build_corpus(tree, max_bytes=30_000)
    assert json.loads(done.stdout) == [here.digest, here.report]
    assert list(json.loads(done.stdout)[1]["packages"]) == list(
        here.report["packages"]
    )


def test_seeds_matter(tmp_path: Path) -> None:
    tree = str(plant(tmp_path, dict.fromkeys("abcdefghijklmnop", 6)))
    corpora = [build_corpus(tree, seed=seed) for seed in range(5)]
    assert len({corpus.digest for corpus in corpora}) > 1
    assert len({frozenset(packages(corpus.val)) for corpus in corpora}) > 1
    samples = [build_corpus(tree, seed=seed, max_bytes=9_000) for seed in range(5)]
    assert len({corpus.digest for corpus in samples}) == 5


def test_every_part_of_the_content_is_in_the_digest(tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", SIX)
    before = build_corpus(str(tree)).digest
    file = tree / "cat" / "file3.py"
    file.write_text(file.read_text() + "# more words\n")
    changed = build_corpus(str(tree)).digest
    file.rename(tree / "cat" / "file300.py")
    renamed = build_corpus(str(tree)).digest
    assert len({before, changed, renamed}) == 3


def test_rank_is_fixed() -> None:
    """It names places in samples: another value would change every corpus."""
    names = ["argparse", "bisect", "csv", "email", "json"]
    assert sorted(names, key=lambda name: rank(0, name)) == [
        "json",
        "argparse",
        "bisect",
        "email",
        "csv",
    ]
    assert sorted(names, key=lambda name: rank(1, name)) == [
        "email",
        "bisect",
        "json",
        "csv",
        "argparse",
    ]


# --------------------------------------------------------------------- duplicates


def test_copies_are_dropped_once(tmp_path: Path) -> None:
    tree = plant(tmp_path, SIX)
    for name in ("ant/copy1.py", "ant/copy2.py", "cat/copy3.py"):
        (tree / name).write_text(program("copied"))
    (tree / "fox" / "dos.py").write_bytes(  # the same text in another form
        b"\xef\xbb\xbf" + program("copied").replace("\n", "\r\n").encode()
    )
    corpus = check(build_corpus(str(tree)))
    every = corpus.train + corpus.val
    assert sum(document.text == program("copied") for document in every) == 1
    assert corpus.report["dropped"]["duplicate"]["files"] == 3


def test_a_text_in_both_parts_leaves_training(tmp_path: Path) -> None:
    tree = plant(tmp_path, dict.fromkeys("abcdefghijklmnop", 6))
    first = check(build_corpus(str(tree)))
    examined = first.val[0]
    (tree / first.train[0].package / "borrowed.py").write_text(examined.text)
    second = check(build_corpus(str(tree)))
    assert packages(second.val) == packages(first.val)
    assert examined in second.val
    assert not any(document.text == examined.text for document in second.train)


# --------------------------------------------------------------- harm and reports


def test_files_that_go_away_are_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = plant(tmp_path, SIX)
    real = module.scan

    def scan(sources: list[Source], dropped: Dropped, size: int) -> list[File]:
        files = real(sources, dropped, size)
        (tree / "fox" / "file3.py").unlink()
        (tree / "fox" / "file4.py").unlink()
        (tree / "fox" / "file4.py").mkdir()
        return files

    monkeypatch.setattr(module, "scan", scan)
    corpus = check(build_corpus(str(tree)))
    reasons = corpus.report["dropped"]["unreadable"]
    assert reasons["files"] == 2
    assert reasons["examples"] == ["fox/file3.py", "fox/file4.py"]


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root reads all"
)
def test_locked_files_are_survived(tmp_path: Path) -> None:
    tree = plant(tmp_path, SIX)
    (tree / "fox" / "file3.py").chmod(0)
    (tree / "cat").chmod(0)
    try:
        corpus = check(build_corpus(str(tree)))
    finally:
        (tree / "cat").chmod(0o755)
    assert corpus.report["dropped"]["unreadable"]["files"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes, pipes")
def test_a_tree_of_traps(tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", SIX)
    trap = tree / "trap"
    trap.mkdir()
    os.mkfifo(trap / "pipe.py")
    (trap / "loop").symlink_to(tree)
    (trap / "huge.py").touch()
    os.truncate(trap / "huge.py", 2 << 30)
    (trap / "latin.py").write_bytes(
        "größe = 'Länge über alles'\n".encode("latin-1") * 4
    )
    (trap / "nul.py").write_bytes(program("nul").encode() + b"\x00")
    (trap / "deep.py").write_text("value = (\n" + "not\n" * 20_000 + "x)\n")
    (trap / "empty.py").touch()
    (trap / "warns.py").write_text("value = '\\d' is 'something'\n" * 3)
    with open(os.fsencode(trap) + b"/\xff\xfe.py", "wb") as file:
        file.write(program("odd_name").encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = check(build_corpus(str(tree)))
    reasons = {r: some["files"] for r, some in corpus.report["dropped"].items()}
    for reason in (
        "too large",
        "not UTF-8",
        "too small",
        "link",
        "not a regular file",
    ):
        assert reasons[reason] == 1, reason
    assert reasons["does not parse"] == 2
    kept = {document.path for document in corpus.train + corpus.val}
    assert {"trap/warns.py", r"trap/\xff\xfe.py"} <= kept


def test_all_files_are_accounted_for(tmp_path: Path) -> None:
    tree = plant(tmp_path, SIX)
    (tree / "ant" / "bad.py").write_text(
        "not Python at all, but long enough for it\n" * 2
    )
    for max_bytes in (0, 12_000):
        report = check(build_corpus(str(tree), max_bytes=max_bytes)).report
        kept = sum(part["files"] for part in report["splits"].values())
        dropped = sum(some["files"] for some in report["dropped"].values())
        assert kept + dropped == sum(SIX.values()) + 1
        by_package: Counter[str] = Counter()
        for counts in report["packages"].values():
            by_package.update(counts)
        assert by_package["files"] == kept
        for part in ("train", "val"):
            assert by_package[part] == report["splits"][part]["bytes"]


@pytest.mark.parametrize("what", ["empty", "no Python", "rubbish", "one file"])
def test_a_corpus_without_text_is_refused(tmp_path: Path, what: str) -> None:
    if what == "no Python":
        (tmp_path / "readme.txt").write_text("hello")
    if what == "rubbish":
        for number in range(4):
            (tmp_path / f"{number}.py").write_text(
                "this is prose, and no Python\n" * 3
            )
    if what == "one file":
        (tmp_path / "alone.py").write_text(program("alone"))
    usable = int(what == "one file")
    with pytest.raises(CorpusError, match=f"has {usable} usable files") as problem:
        build_corpus(str(tmp_path))
    assert ("4 does not parse" in str(problem.value)) == (what == "rubbish")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_bytes": -1},
        {"max_bytes": 1e6},
        {"max_bytes": True},
        {"max_bytes": "1000"},
        {"val_bytes": 0},
        {"val_bytes": None},
        {"seed": -1},
        {"seed": 0.5},
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path: Path, settings: dict) -> None:
    tree = plant(tmp_path, SIX)
    ((name, value),) = settings.items()
    with pytest.raises(
        CorpusError, match=rf"{name} = {value!r}: give a whole number"
    ):
        build_corpus(str(tree), **settings)


def test_missing_sources_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"'jsno' .*did you mean 'json'"):
        build_corpus("email" + os.pathsep + "jsno")


# -------------------------------------------------------------------- this Python


@pytest.fixture(scope="module")
def default() -> Corpus:
    return check(build_corpus(max_bytes=3_000_000, val_bytes=200_000))


def test_the_default_is_this_python(default: Corpus) -> None:
    every = default.train + default.val
    assert 2_500_000 < size(every) <= 3_000_000
    assert 100_000 <= size(default.val) <= 200_000
    assert len(packages(default.train)) > 20 and len(packages(default.val)) > 4
    assert "albor" not in packages(every)
    assert not any("/work/" in document.path for document in every)
    assert default.report["split_by"] == "package" and not default.report["notes"]


def test_no_machine_path_is_in_the_report(default: Corpus) -> None:
    text = json.dumps(default.report)
    for folder in (sys.prefix, sys.base_prefix, os.getcwd(), str(Path.home())):
        assert folder == "/" or folder not in text


def test_licences_are_listed(default: Corpus) -> None:
    listed = default.report["licences"]
    assert listed["Python"]["licence"] == "PSF-2.0"
    assert all(set(entry) == {"version", "licence"} for entry in listed.values())
    three = find_sources(os.pathsep.join(["numpy", "PyYAML", "json"]))
    found = find_owners(scan(three, Dropped(list)))
    assert found["json"].distribution == "Python"
    assert (
        found["numpy"].distribution == "numpy" and "BSD" in found["numpy"].licence
    )
    assert (
        found["yaml"].distribution == "PyYAML"
        and found["yaml"].licence == "MIT License"
    )
    assert {one.distribution for one in default.train} <= listed.keys()


def test_folders_have_no_listed_licence(tmp_path: Path) -> None:
    report = build_corpus(str(plant(tmp_path, SIX))).report
    assert report["licences"] == {}
    assert any("licences of folders" in note for note in report["notes"])


def test_packages_and_folders_mix(tmp_path: Path) -> None:
    tree = plant(tmp_path / "mine", SIX)
    corpus = check(build_corpus(os.pathsep.join(["json", str(tree), "email"])))
    paths = {document.path for document in corpus.train + corpus.val}
    assert {"stdlib/json/decoder.py", "mine/fox/file0.py"} <= paths or (
        "held out, beyond val_bytes" in corpus.report["dropped"]
    )
    assert packages(corpus.train + corpus.val) <= {"json", "email", *SIX}


# ----------------------------------------------------------------------- licences


def test_what_is_not_permissive_is_left_out_where_nobody_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = tmp_path / "site-packages"
    plant(site, {"free": 9, "bound": 8, "silent": 7, "loose": 5, "kept": 6})
    for name, licence in (
        ("free", "MIT"),
        ("bound", "GPL-3.0-only"),
        ("kept", "BSD"),
    ):
        info = site / f"{name}_dist-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}-dist\nVersion: 1.5\n"
            f"License-Expression: {licence}\n"
        )
        (info / "top_level.txt").write_text(name)
        (info / "RECORD").write_text(f"{name}/file0.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(
        module, "resolve", lambda spec: [Source("site-packages", str(site))]
    )
    corpus = check(build_corpus())
    assert packages(corpus.train + corpus.val) == {"free", "kept"}
    assert corpus.report["dropped"]["licence"]["files"] == 8 + 7 + 5
    assert corpus.report["licences"]["free-dist"] == {
        "version": "1.5",
        "licence": "MIT",
    }
    assert {one.distribution for one in corpus.train + corpus.val} == {
        "free-dist",
        "kept-dist",
    }
    everything = check(build_corpus(licences="any"))
    assert len(packages(everything.train + everything.val)) == 5
    assert everything.report["licences"]["silent"]["licence"] == "not stated"
    named = check(build_corpus("free:bound".replace(":", os.pathsep)))
    assert "bound" in packages(named.train + named.val), (
        "who names it has chosen it"
    )


# ------------------------------------------------------------ tiers and manifests


def wheel(folder: Path, name: str, files: int, body: str, **fields: Any) -> Source:
    """An unpacked wheel with so many files, and one test among them."""
    for number in range(files):
        path = folder / name / name / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body.replace("NAME", f"{name}_{number}"))
    (folder / name / name / "test_it.py").write_text(
        body.replace("NAME", f"{name}_it")
    )
    return Source(
        "wheel", str(folder / name), distribution=name, version="2", **fields
    )


EXPLAINED = """def NAME(value: int) -> int:
    'Say what it does, at length.'
    return value
"""
BARE = "def NAME(value):\n    number = value + value + value\n    return number\n"


def test_tiers_are_measured_and_tests_are_never_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        wheel(tmp_path, "good", 6, EXPLAINED, licence="MIT"),
        wheel(tmp_path, "bare", 7, BARE, licence="MIT"),
        wheel(tmp_path, "said", 5, BARE, licence="MIT", tier=1),
        wheel(tmp_path, "told", 4, EXPLAINED, licence="MIT", tier=2),
    ]
    monkeypatch.setattr(module, "resolve", lambda spec: sources)
    corpus = check(build_corpus("all.csv"))
    for document in corpus.train + corpus.val:
        first = document.package in ("good", "said")
        tested = document.path.endswith("test_it.py")
        assert document.tier == (1 if first and not tested else 2), document.path
        assert document.distribution == document.package
    scores = {name: one["score"] for name, one in corpus.report["packages"].items()}
    assert scores == {"good": 2.0, "bare": 0.0, "said": 0.0, "told": 2.0}
    other = [*sources[:3], replace(sources[3], tier=1)]
    monkeypatch.setattr(module, "resolve", lambda spec: other)
    assert build_corpus("all.csv").digest != corpus.digest, "tiers are content"


def test_a_manifest_says_what_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        wheel(tmp_path, "one", 6, BARE, licence="MIT"),
        wheel(tmp_path, "two", 20, BARE, licence="MIT", split="val"),
        wheel(tmp_path, "three", 5, BARE, licence="GPL-3.0", split="val"),
    ]
    monkeypatch.setattr(module, "resolve", lambda spec: sources)
    corpus = build_corpus("all.csv", licences="permissive")
    assert packages(corpus.val) == {"two"} and packages(corpus.train) == {"one"}
    assert len(corpus.val) == 21, "all of it, though it is more than a tenth"
    few = build_corpus("all.csv", val_bytes=500)
    assert size(few.val) <= 500 and packages(few.train) == {"one"}


# ---------------------------------------------------------- workers, text on disk


def test_any_number_of_workers_gives_the_same_corpus(tmp_path: Path) -> None:
    tree = plant(tmp_path, dict.fromkeys("abcdefgh", 45))
    (tree / "a" / "slow.py").write_text(program("slow", 2000))
    (tree / "a" / "slow2.py").write_text(program("slow", 2000))
    one, two, three = (check(build_corpus(str(tree), workers=n)) for n in (1, 2, 3))
    assert one.digest == two.digest == three.digest
    assert one.report == two.report == three.report
    assert one.report["dropped"]["duplicate"]["files"] == 1


def test_a_text_that_changes_is_refused(tmp_path: Path) -> None:
    tree = plant(tmp_path, SIX)
    corpus = build_corpus(str(tree))
    document = corpus.train[0]
    Path(document.place).write_text(document.text + "# more\n")
    with pytest.raises(
        CorpusError, match=rf"{document.path}: .* build the corpus again"
    ):
        document.text  # noqa: B018
    Path(document.place).unlink()
    with pytest.raises(CorpusError, match=r"cannot be read any more"):
        document.text  # noqa: B018


def test_texts_are_not_held_and_places_are_not_told(tmp_path: Path) -> None:
    corpus = build_corpus(str(plant(tmp_path, SIX)))
    told = repr(corpus.train) + repr(corpus.val)
    assert str(tmp_path) not in told and "value = value" not in told


def test_documents_travel_to_workers(tmp_path: Path) -> None:
    document = build_corpus(str(plant(tmp_path, SIX))).val[0]
    again = pickle.loads(pickle.dumps(document))
    assert again == document and again.text == document.text


def test_crlf_and_marks_are_cleaned_once(tmp_path: Path) -> None:
    place = tmp_path / "a.py"
    place.write_bytes(b"\xef\xbb\xbfx = 1\r\ny = '\xc3\xa9'\r\n")
    document = Document.read(place)
    assert document.text == "x = 1\ny = 'é'\n" and document.size == 15
    assert document.sha256 == hashlib.sha256(document.text.encode()).hexdigest()


# --------------------------------------------------------------------- more rules


def test_docstrings_are_asked_for_on_request(tmp_path: Path) -> None:
    tree = plant(tmp_path, SIX)
    for name in ("ant", "bee", "fox"):
        place = tree / name / "file0.py"
        place.write_text('"""What this is for."""\n' + place.read_text())
    corpus = check(build_corpus(str(tree), docstrings=0.02))
    assert {one.path for one in corpus.train + corpus.val} == {
        "ant/file0.py",
        "bee/file0.py",
        "fox/file0.py",
    }
    dropped = corpus.report["dropped"]["few docstrings"]["files"]
    assert dropped == sum(SIX.values()) - 3


def test_the_size_of_a_file_is_a_parameter(tmp_path: Path) -> None:
    tree = plant(tmp_path, SIX)
    (tree / "fox" / "long.py").write_text(program("long", 6000))
    assert build_corpus(str(tree)).report["dropped"]["too large"]["files"] == 1
    corpus = build_corpus(str(tree), max_file_bytes=1_000_000)
    assert "too large" not in corpus.report["dropped"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"licences": "all"}, r"licences = 'all': give one of"),
        ({"docstrings": 2}, r"docstrings = 2: give a number from 0 to 1"),
        ({"docstrings": "0.1"}, r"docstrings = '0.1'"),
        ({"workers": -1}, r"workers = -1: give a whole number >= 0"),
        ({"max_file_bytes": 0}, r"max_file_bytes = 0"),
    ],
)
def test_more_bad_settings(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        build_corpus("json", **setting)


def test_a_script_without_a_guard_starts_no_pool_of_pools(tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", dict.fromkeys("abcdefgh", 45))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom albor.corpus import build_corpus\n"
        "print('started')\n"
        "print(build_corpus(sys.argv[1], workers=2).digest)\n"
    )
    run = subprocess.run(
        [sys.executable, str(script), str(tree)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert run.stdout.split() == [
        "started",
        build_corpus(str(tree), workers=1).digest,
    ]


def test_every_problem_is_in_the_report_of_overlaps() -> None:
    """Also one that nobody has met, and one met by too little to drop a file."""
    from albor.corpus import overlaps
    from albor.overlap import Contamination

    words = [f"word{i}" for i in range(40)]
    exam = {
        "whole": words[:20],
        "near": words[20:31],
        "far": ["else"] * 3 + words[35:],
    }
    problems = Contamination({name: " ".join(some) for name, some in exam.items()})
    met = {
        "whole": [(2, "b.py"), (11, "a.py"), (2, "a2.py")],
        "near": [(1, "c.py")],
    }
    table = overlaps(problems, met)
    assert table["whole"] == {
        "ngrams": 11,
        "files": 3,
        "most": 11,
        "nearest": "a.py",
        "dropped": 1,
    }
    assert (table["near"]["files"], table["near"]["dropped"]) == (1, 0)
    far = table["far"]
    assert (far["files"], far["most"], far["nearest"]) == (0, 0, "")
    assert overlaps(None, {}) == {}
