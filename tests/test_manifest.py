"""Manifests and wheels: rows that lie, fetches that break, harmful archives."""

import io
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import manifest
from albor.artifacts import sha256_file
from albor.manifest import fetch, find_wheels, read_manifest, unpack
from albor.sources import CorpusError

ROOT = Path(__file__).resolve().parents[1]
HEADER = "name,version,licence,sha256,filename,tier"
SHA = "0123456789abcdef" * 4
CODE = "def double(number):\n    return number + number\n"
POSIX = os.name == "posix"


def build(
    folder: Path, name="toy", version="1.0", files=None, damage=None, tags=None
):
    """A small wheel; `damage` is called with the open archive."""
    folder.mkdir(parents=True, exist_ok=True)
    tags = tags or "py3-none-any"
    path = folder / f"{name}-{version}-{tags}.whl"
    info = f"{name}-{version}.dist-info"
    files = {f"{name}/__init__.py": CODE} if files is None else files
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\n"
        f"Version: {version}\nRequires-Python: >=3.99\nRequires-Dist: nowhere\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nTag: {tags}\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for entry, text in files.items():
            archive.writestr(entry, text)
        if damage:
            damage(archive)
    return path


def row(file: Path, tier="1", licence="MIT", sha="") -> str:
    name, version = file.name.split("-")[:2]
    return (
        f"{name},{version},{licence},{sha or sha256_file(file)},{file.name},{tier}"
    )


def listing(path: Path, *rows: str, header=HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def offline(shelf: Path) -> list[str]:
    return ["--no-index", f"--find-links={shelf}"]


@pytest.fixture
def no_pip(monkeypatch):
    """Fail where pip would be started."""

    def refuse(*arguments, **options):
        raise AssertionError("pip was started")

    monkeypatch.setattr(manifest.subprocess, "run", refuse)


# ---------------------------------------------------------------------- manifests


def test_the_projects_manifests():
    small, large = (read_manifest(f"configs/corpus/{v}.csv") for v in ("v1", "v2"))
    assert len(large) == 44 and set(small) < set(large)
    held = {wheel.name for wheel in large if wheel.split == "val"}
    assert len(held) == 6 and held == {w.name for w in small if w.split == "val"}
    assert {w.split for w in large} == {"train", "val"}
    assert all((w.tier in (1, 2)) == (w.split == "train") for w in large)
    assert all(w.filename.isascii() and w.licence for w in large)


def test_they_name_what_is_permissively_licensed_and_nothing_of_an_index():
    text = (ROOT / "configs/corpus/v2.csv").read_text()
    assert "://" not in text and "GPL" not in text


def test_a_manifest_without_a_held_out_row_leaves_the_split_open(tmp_path):
    one, two = build(tmp_path), build(tmp_path, "other")
    wheels = read_manifest(listing(tmp_path / "m.csv", row(one), row(two, "")))
    assert [(w.tier, w.split) for w in wheels] == [(1, ""), (0, "")]
    wheels = read_manifest(listing(tmp_path / "m.csv", row(one), row(two, "val")))
    assert [(w.tier, w.split) for w in wheels] == [(1, "train"), (0, "val")]


def test_columns_may_come_in_any_order_and_in_company(tmp_path):
    path = tmp_path / "m.csv"
    path.write_bytes(
        "\ufefffilename,stars,tier,licence,version,name,sha256\r\n"
        'a_b-1.0-py3-none-any.whl,5,2,"Apache License, 2.0",1.0,A.b,'
        f"{SHA}\r\n".encode()
    )
    (wheel,) = read_manifest(path)
    assert (wheel.name, wheel.licence, wheel.tier) == (
        "A.b",
        "Apache License, 2.0",
        2,
    )


GOOD = ["toy", "1.0", "MIT", SHA, "toy-1.0-py3-none-any.whl", "1"]
LIES = {
    "path": (0, "../toy"),
    "option": (0, "-r/etc/passwd"),
    "line break": (0, '"toy\n--index-url=x"'),
    "no name": (0, ""),
    "range": (1, ">=1.0"),
    "url": (1, "1.0 @ file:///x"),
    "no version": (1, ""),
    "no licence": (2, ""),
    "short": (3, SHA[1:]),
    "capitals": (3, SHA.upper()),
    "sdist": (4, "toy-1.0.tar.gz"),
    "zip": (4, "toy-1.0.zip"),
    "egg": (4, "toy-1.0-py3.11.egg"),
    "elsewhere": (4, "/tmp/toy-1.0-py3-none-any.whl"),
    "up": (4, "..\\toy-1.0-py3-none-any.whl"),
    "other name": (4, "boy-1.0-py3-none-any.whl"),
    "other version": (4, "toy-1.0.1-py3-none-any.whl"),
    "no tags": (4, "toy-1.0.whl"),
    "tier": (5, "3"),
    "words": (5, "train"),
    "a field more": (5, "1,"),
}


@pytest.mark.parametrize("lie", LIES)
def test_rows_that_lie_are_refused_by_file_and_line(lie, tmp_path, no_pip):
    place, value = LIES[lie]
    fields = [*GOOD[:place], value, *GOOD[place + 1 :]]
    path = listing(tmp_path / "m.csv", ",".join(GOOD).replace("toy", "good"))
    listing(path, ",".join(GOOD).replace("toy", "good"), ",".join(fields))
    with pytest.raises(CorpusError, match=r"m\.csv, line [34]: "):
        fetch(path, tmp_path / "wheels")


def test_source_distributions_are_refused_with_the_reason(tmp_path):
    fields = [*GOOD[:4], "toy-1.0.tar.gz", "1"]
    with pytest.raises(CorpusError, match="source distribution, is to run code"):
        read_manifest(listing(tmp_path / "m.csv", ",".join(fields)))


@pytest.mark.parametrize(
    ("rows", "header", "why"),
    [
        ([], HEADER, "is no list of wheels"),
        ([",".join(GOOD)], "name,version,sha256,filename,tier,owner", "licence"),
        ([",".join(GOOD)] * 2, HEADER, "line 3: toy is listed twice"),
        ([",".join(GOOD[:5])], HEADER, "more or fewer fields"),
        (['"' + ",".join(GOOD)], HEADER, "cannot be read"),
    ],
)
def test_tables_that_are_no_manifests(rows, header, why, tmp_path):
    with pytest.raises(CorpusError, match=why):
        read_manifest(listing(tmp_path / "m.csv", *rows, header=header))


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "latin.csv").write_bytes(f"{HEADER}\nGr\xf6\xdfe".encode("latin-1"))
    (tmp_path / "folder.csv").mkdir()
    for name in ("latin.csv", "folder.csv", "nowhere.csv"):
        with pytest.raises(CorpusError, match=f"{name} cannot be read"):
            read_manifest(tmp_path / name)


def test_names_are_compared_as_indexes_do(tmp_path):
    fields = ",".join(GOOD)
    upper = fields.replace("toy", "TOY", 1)
    with pytest.raises(CorpusError, match="TOY is listed twice"):
        read_manifest(listing(tmp_path / "m.csv", fields, upper))


def test_pip_is_told_the_wheels_target_and_not_this_machine(tmp_path):
    tags = "cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64"
    file = build(tmp_path, tags=tags)
    (wheel,) = read_manifest(listing(tmp_path / "m.csv", row(file)))
    assert wheel.target == [
        "--implementation=cp",
        "--python-version=39",
        "--abi=abi3",
        "--platform=manylinux_2_17_x86_64",
        "--platform=manylinux2014_x86_64",
    ]


# ----------------------------------------------------------------------- fetching


def test_fetch_through_pip_and_go_on(tmp_path, capsys):
    """Four kinds of wheel, none for this machine's Python; nothing is installed."""
    shelf = tmp_path / "shelf"
    tags = {
        "pure": "py3-none-any",
        "old": "py2.py3-none-any",
        "mac": "cp312-cp312-macosx_11_0_arm64",
        "abi": "cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64",
    }
    files = [build(shelf, name, tags=tag) for name, tag in tags.items()]
    path = listing(tmp_path / "m.csv", *map(row, files))
    place = tmp_path / "wheels"
    with pytest.raises(CorpusError, match=r"pure-1\.0-py3-none-any\.whl"):
        fetch(path, place, offline(tmp_path / "empty"))
    assert fetch(path, place, offline(shelf)) == place
    assert capsys.readouterr().out.count("bytes") == 4

    (place / files[2].name).unlink()
    fetch(path, place, offline(shelf))
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] == "was there" for line in said] == [1, 1, 0, 1]
    assert said[2].startswith("3/4 mac 1.0: ")
    assert not list(place.glob(".work*"))
    assert not any(name in sys.modules for name in tags)

    found = find_wheels(path, place)
    assert [source.distribution for source in found] == list(tags)
    assert all(source.kind == "wheel" for source in found)
    texts = [Path(s.folder, s.distribution, "__init__.py") for s in found]
    assert all(text.read_text() == CODE for text in texts)


def test_another_wheel_on_the_index_stops_it_with_both_hashes(tmp_path):
    shelf = tmp_path / "shelf"
    path = listing(tmp_path / "m.csv", row(build(shelf)))
    pinned = sha256_file(build(tmp_path / "own"))
    other = build(shelf, files={"toy/__init__.py": "import trouble\n"})
    assert pinned != sha256_file(other)
    path = listing(tmp_path / "m.csv", row(other, sha=pinned))
    with pytest.raises(CorpusError) as error:
        fetch(path, tmp_path / "wheels", offline(shelf))
    assert f"expected {pinned}, got {sha256_file(other)}" in str(error.value)
    assert not list((tmp_path / "wheels").iterdir())


def test_a_wheel_here_that_is_not_the_pinned_one(tmp_path, no_pip):
    place = tmp_path / "wheels"
    file = build(place)
    path = listing(tmp_path / "m.csv", row(file, sha=SHA))
    for door in (fetch, find_wheels):
        with pytest.raises(CorpusError) as error:
            door(path, place)
        assert f"expected {SHA}, got {sha256_file(file)}" in str(error.value)
        assert "delete it" in str(error.value)
    assert file.exists() and not list(place.glob("*-any"))


def test_pip_serving_a_wrong_file_in_silence_is_found_out(tmp_path, monkeypatch):
    wheel = build(tmp_path / "own")
    path = listing(tmp_path / "m.csv", row(wheel))

    def serve(command, **options):
        place = Path(command[command.index("--dest") + 1], wheel.name)
        place.write_bytes(b"not the wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(manifest.subprocess, "run", serve)
    with pytest.raises(
        CorpusError, match=r"SHA-256 expected .*, got .*nothing was"
    ):
        fetch(path, tmp_path / "wheels")
    assert not list((tmp_path / "wheels").iterdir())


def test_the_command_takes_wheels_only_and_checks(tmp_path, monkeypatch):
    path = listing(tmp_path / "m.csv", ",".join(GOOD))
    seen = {}

    def look(command, **options):
        seen["command"] = command
        seen["pins"] = Path(command[-1]).read_text()
        return subprocess.CompletedProcess(command, 1, "", "No module named pip")

    monkeypatch.setattr(manifest.subprocess, "run", look)
    with pytest.raises(CorpusError, match="No module named pip"):
        fetch(path, tmp_path / "wheels")
    must = {"--only-binary=:all:", "--require-hashes", "--no-deps", "download"}
    assert must <= set(seen["command"]) and "install" not in seen["command"]
    assert seen["pins"] == f"toy==1.0 --hash=sha256:{SHA}\n"


def test_an_interrupted_fetch_keeps_whole_wheels_and_goes_on(tmp_path, monkeypatch):
    shelf, place = tmp_path / "shelf", tmp_path / "wheels"
    files = [build(shelf, name) for name in ("alpha", "beta")]
    path = listing(tmp_path / "m.csv", *map(row, files))
    run, calls = subprocess.run, []

    def interrupt(command, **options):
        calls.append(command)
        if len(calls) == 2:
            Path(command[command.index("--dest") + 1], "half").write_bytes(b"PK")
            raise KeyboardInterrupt
        return run(command, **options)

    monkeypatch.setattr(manifest.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(path, place, offline(shelf))
    whole = {entry.name for entry in place.iterdir()}
    assert whole == {files[0].name, files[0].name.removesuffix(".whl")}
    with pytest.raises(CorpusError, match=r"beta.*is not there; `make corpus"):
        find_wheels(path, place)
    fetch(path, place, offline(shelf))
    assert len(calls) == 3 and len(find_wheels(path, place)) == 2


@pytest.mark.skipif(not POSIX, reason="asks for processes by number")
def test_what_killed_fetches_left_is_removed(tmp_path):
    place = tmp_path / "wheels"
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True)  # fmt: skip
    dead = place / f".work-{child.stdout.strip()}-abc"
    mine = place / f".work-{os.getpid()}-abc"
    for folder in (dead, mine):
        folder.mkdir(parents=True)
    unpack(build(place))
    assert not dead.exists() and mine.exists()


# ---------------------------------------------------------------------- unpacking


def test_python_and_papers_come_out_and_nothing_else(tmp_path):
    info = "toy-1.0.dist-info"
    wanted = {
        "toy/__init__.py": CODE,
        "toy/sub/é.py": "",
        "single.py": CODE,
        f"{info}/licenses/deep/LICENSE.apache": "text",
        f"{info}/LICENCE": "text",
        f"{info}/COPYING.txt": "text",
        f"{info}/NOTICE": "text",
    }
    other = {
        "toy/data.json": "{}",
        "toy/METADATA": "",
        "toy/code.pyc": "",
        "toy/LICENSE": "",
        "toy.so": "",
        "toy/stub.pyi": "",
        f"{info}/entry_points.txt": "",
    }
    tree = unpack(build(tmp_path, files=wanted | other))
    there = {p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_file()}
    assert there == {*wanted, f"{info}/METADATA"}
    assert tree.name == "toy-1.0-py3-none-any"
    if POSIX:
        modes = [p.stat().st_mode & 0o111 for p in tree.rglob("*") if p.is_file()]
        assert not any(modes), "nothing can be run"


def entry(
    name: str, text: str | bytes = CODE, mode: int = 0, how=zipfile.ZIP_STORED
):
    info = zipfile.ZipInfo("x" * len(name))
    info.filename = name  # zipfile would mend some
    info.external_attr = mode << 16
    info.compress_type = how
    return lambda archive: archive.writestr(info, text)


HARMFUL = {
    "up": entry("toy/../../slipped.py"),
    "up and nothing wanted": entry("../slipped.txt"),
    "only dots": entry(".."),
    "here": entry("./slipped.py"),
    "absolute": entry("/slipped.py"),
    "double": entry("toy//slipped.py"),
    "drive": entry("C:slipped.py"),
    "stream": entry("toy/a.py:slipped.py"),
    "backslash": entry("..\\slipped.py"),
    "NUL": entry("toy/slipped.py\x00.txt"),
    "control": entry("toy/\x1b[2Jslipped.py"),
    "link": entry("toy/slipped.py", "/etc/passwd", stat.S_IFLNK | 0o777),
    "link to a folder": entry("toy/lib", "/", stat.S_IFLNK | 0o777),
    "pipe": entry("toy/slipped.py", "", stat.S_IFIFO | 0o600),
    "device": entry("toy/slipped.py", "", stat.S_IFCHR | 0o600),
    "twice": entry("toy/__init__.py", "slipped = True\n"),
    "file and folder": entry("toy/__init__.py/slipped.py"),
    "bomb": entry("toy/slipped.py", "0" * 20_000_001, how=zipfile.ZIP_DEFLATED),
    "bzip2": entry("toy/slipped.py", how=zipfile.ZIP_BZIP2),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("harm", HARMFUL)
def test_a_harmful_wheel_is_refused_as_a_whole(harm, tmp_path):
    place = tmp_path / "deep" / "wheels"
    file = build(place, damage=HARMFUL[harm])
    with pytest.raises(CorpusError, match=f"wheel {file.name} is refused"):
        unpack(file)
    path = listing(tmp_path / "m.csv", row(file))
    with pytest.raises(CorpusError, match="refused"):
        fetch(path, place)
    assert sorted(tmp_path.rglob("*")) == sorted(
        [tmp_path / "deep", place, file, path]
    )


def test_an_encrypted_entry_and_a_lying_size(tmp_path):
    file = build(tmp_path)
    good = file.read_bytes()
    central = good.index(b"PK\x01\x02")
    for place, byte in ((central + 8, 1), (central + 24, 0xFF)):
        data = bytearray(good)
        data[place] ^= byte
        file.write_bytes(data)
        with pytest.raises(CorpusError, match="is refused"):
            unpack(file)


def test_the_whole_tree_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_MAX_TREE", 100)
    file = build(tmp_path, files={f"toy/{i}.py": "x" * 20 for i in range(6)})
    with pytest.raises(CorpusError, match="more than 100 bytes"):
        unpack(file)


def test_no_archive_at_all(tmp_path):
    file = tmp_path / "toy-1.0-py3-none-any.whl"
    for data in (b"", b"text", b"PK\x05\x06" + bytes(17)):
        file.write_bytes(data)
        with pytest.raises(
            CorpusError, match=r"toy-1\.0-py3-none-any\.whl is refus"
        ):
            unpack(file)


@settings(max_examples=150)
@given(st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Any bytes may change: the wheel is refused, or unpacks below its folder."""
    top = tmp_path_factory.mktemp("damaged")
    file = build(top / "wheels", files={"toy/a.py": CODE, "toy/b.py": CODE * 2})
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        tree = unpack(file)
    except CorpusError:
        assert os.listdir(top / "wheels") == [file.name]
    else:
        assert sorted(os.listdir(top / "wheels")) == sorted([tree.name, file.name])
        assert not any(p.is_symlink() for p in tree.rglob("*"))
    assert os.listdir(top) == ["wheels"]


# ------------------------------------------------------------- what was unpacked


def change(tree: Path) -> str:
    (tree / "toy/__init__.py").write_text(CODE.replace("+", "-"))
    return "toy/__init__.py was changed"


def shorten(tree: Path) -> str:
    (tree / "toy/__init__.py").write_text(CODE[:-1])
    return "toy/__init__.py was changed"


def remove(tree: Path) -> str:
    (tree / "toy/__init__.py").unlink()
    return "toy/__init__.py is missing"


def add(tree: Path) -> str:
    (tree / "toy/more.py").write_text(CODE)
    return "toy/more.py is not from the wheel"


def link(tree: Path) -> str:
    file = tree / "toy/__init__.py"
    file.rename(tree.parent / "moved.py")
    file.symlink_to(tree.parent / "moved.py")
    return "toy/__init__.py was changed"


def link_folder(tree: Path) -> str:
    (tree / "toy/deep").symlink_to(tree)
    return "toy/deep is not from the wheel"


def pipe(tree: Path) -> str:
    (tree / "toy/__init__.py").unlink()
    os.mkfifo(tree / "toy/__init__.py")  # open() would wait for ever
    return "toy/__init__.py was changed"


@pytest.mark.parametrize(
    "edit",
    [change, shorten, remove, add, *([link, link_folder, pipe] if POSIX else [])],
)
def test_edits_of_what_was_unpacked_are_found_and_mended(edit, tmp_path, no_pip):
    place = tmp_path / "wheels"
    path = listing(tmp_path / "m.csv", row(build(place)))
    fetch(path, place)
    assert len(find_wheels(path, place)) == 1
    (tree,) = place.glob("*-any")
    why = edit(tree)
    with pytest.raises(CorpusError) as error:
        find_wheels(path, place)
    assert why in str(error.value) and "make corpus MANIFEST=" in str(error.value)
    fetch(path, place)
    assert len(find_wheels(path, place)) == 1


def test_unpacking_again_changes_nothing(tmp_path):
    file = build(tmp_path)
    tree = unpack(file)
    before = (tree / "toy/__init__.py").stat()
    assert unpack(file) == tree
    assert (tree / "toy/__init__.py").stat().st_ino == before.st_ino


def test_sources_carry_what_the_manifest_settles(tmp_path):
    place = tmp_path / "wheels"
    path = listing(
        tmp_path / "m.csv",
        row(build(place, "alpha"), "2", "Apache-2.0"),
        row(build(place, "beta", "0.3"), "val"),
    )
    fetch(path, place)
    alpha, beta = find_wheels(path, place)
    assert (alpha.tier, alpha.split, alpha.licence) == (2, "train", "Apache-2.0")
    assert (beta.tier, beta.split, beta.version) == (0, "val", "0.3")
    assert Path(alpha.folder) == place / "alpha-1.0-py3-none-any"


def test_no_code_of_a_wheel_is_run(tmp_path):
    """Unpacked under a fresh Python that would notice an import."""
    place = tmp_path / "wheels"
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    files = dict.fromkeys(["toy/__init__.py", "setup.py", "sitecustomize.py"], trap)
    path = listing(tmp_path / "m.csv", row(build(place, files=files)))
    code = (
        "import sys; from albor.manifest import fetch, find_wheels; "
        "fetch(*sys.argv[1:]); find_wheels(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(path), str(place)]
    subprocess.run(command, check=True, capture_output=True)
    assert (place / "toy-1.0-py3-none-any/setup.py").read_text() == trap
    assert not (tmp_path / "ran").exists()


def test_a_zip_from_windows_is_fine(tmp_path):
    """There the kind of an entry is not stated at all."""
    file = tmp_path / "toy-1.0-py3-none-any.whl"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("toy/__init__.py")
        info.create_system, info.external_attr = 0, 0
        archive.writestr(info, CODE)
        archive.writestr("toy/", "")
    file.write_bytes(buffer.getvalue())
    assert (unpack(file) / "toy/__init__.py").read_text() == CODE
