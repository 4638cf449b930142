"""Finding and judging files: trees full of traps, and files that mean harm."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from albor import sources
from albor.sources import (
    CorpusError,
    Dropped,
    File,
    Source,
    find_distribution,
    find_package,
    find_sources,
    installed,
    scan,
    shown,
)

GOOD = "def double(number):\n    return number + number\n\n\nprint(double(21))\n"
POSIX = os.name == "posix"


def write(path: Path, text: str | bytes = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def walk(folder: Path) -> tuple[dict[str, File], Dropped]:
    dropped: Dropped = defaultdict(list)
    found = scan([Source("folder", str(folder))], dropped)
    assert len({file.path for file in found}) == len(found)
    return {file.path: file for file in found}, dropped


# ------------------------------------------------------------------------- walking


def test_packages_are_first_folders(tmp_path: Path) -> None:
    write(tmp_path / "alpha" / "core.py")
    write(tmp_path / "alpha" / "inner" / "deep.py")
    write(tmp_path / "loose.py")
    found, dropped = walk(tmp_path)
    packages = {path: file.package for path, file in found.items()}
    assert packages == {
        "alpha/core.py": "alpha",
        "alpha/inner/deep.py": "alpha",
        "loose.py": ".",
    }
    assert not dropped


def test_only_python_files_count(tmp_path: Path) -> None:
    for name in ("a.pyc", "b.txt", "c.pyi", "py", "d.py.orig", "e.PY"):
        write(tmp_path / "pack" / name)
    write(tmp_path / "pack" / "__pycache__" / "x.py")
    write(tmp_path / "pack" / ".hidden" / "x.py")
    write(tmp_path / ".git" / "hook.py")
    write(tmp_path / "pack" / "folder.py" / "inside.py")  # a folder of such a name
    found, dropped = walk(tmp_path)
    assert list(found) == ["pack/folder.py/inside.py"]
    assert not dropped


def test_vendored_and_odd_sizes_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "pack" / "_vendor" / "six.py")
    write(tmp_path / "pack" / "third_party" / "deep" / "lib.py")
    write(tmp_path / "pack" / "venv" / "lib" / "site-packages" / "x" / "y.py")
    write(tmp_path / "pack" / "vendor.py")  # a module of that name is not vendored
    write(tmp_path / "pack" / "__init__.py", "")
    (tmp_path / "pack" / "huge.py").touch()
    os.truncate(tmp_path / "pack" / "huge.py", 2 << 30)  # 2 GiB, sparse
    found, dropped = walk(tmp_path)
    assert list(found) == ["pack/vendor.py"]
    assert {reason: len(files) for reason, files in dropped.items()} == {
        "vendored": 3,
        "too small": 1,
        "too large": 1,
    }
    assert dropped["too large"] == [("pack/huge.py", 2 << 30)]


@pytest.mark.skipif(not POSIX, reason="links and pipes as on POSIX")
def test_links_pipes_and_sockets_are_left_alone(tmp_path: Path) -> None:
    import socket

    inside = tmp_path / "tree"
    write(inside / "pack" / "real.py")
    write(tmp_path / "outside" / "secret.py")
    (inside / "pack" / "loop").symlink_to(inside)
    (inside / "pack" / "self.py").symlink_to("self.py")
    (inside / "pack" / "out").symlink_to(tmp_path / "outside")
    (inside / "pack" / "out.py").symlink_to(tmp_path / "outside" / "secret.py")
    (inside / "pack" / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (inside / "pack" / "notes").symlink_to(tmp_path / "notes.txt")
    os.mkfifo(inside / "pack" / "pipe.py")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(inside / "pack")  # the name of a socket is limited in length
        try:
            server.bind("socket.py")
        finally:
            os.chdir(here)
        found, dropped = walk(inside)
    assert list(found) == ["pack/real.py"]
    assert sorted(path for path, _ in dropped["link"]) == [
        "pack/gone.py",
        "pack/loop",
        "pack/out",
        "pack/out.py",
        "pack/self.py",
    ]
    refused = sorted(path for path, _ in dropped["not a regular file"])
    assert refused == ["pack/pipe.py", "pack/socket.py"]


@pytest.mark.skipif(not POSIX, reason="permissions as on POSIX")
def test_locked_folders_are_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "open" / "a.py")
    locked = write(tmp_path / "locked" / "b.py").parent
    real = os.scandir

    def scandir(path: str) -> object:  # for root, no folder is locked
        if os.path.realpath(path) == os.path.realpath(locked):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(sources.os, "scandir", scandir)
    found, dropped = walk(tmp_path)
    assert list(found) == ["open/a.py"]
    assert dropped == {"unreadable": [("locked", 0)]}


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_text_fit_into_json(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"/a\xff.py", b"/b\n.py", "/ü.py".encode()):
        with open(folder + name, "wb") as file:
            file.write(GOOD.encode())
    found, _ = walk(tmp_path)
    assert set(found) == {r"caf\xe9/a\xff.py", "caf\\xe9/b\n.py", r"caf\xe9/ü.py"}
    assert {file.package for file in found.values()} == {r"caf\xe9"}
    for path, file in found.items():
        json.dumps(path, ensure_ascii=False).encode("utf-8")
        with open(file.place, encoding="utf-8") as stream:
            assert stream.read() == GOOD


def test_deep_trees_do_not_recurse(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(300):
        folder = folder / "d"
    write(folder / "bottom.py")
    found, _ = walk(tmp_path)
    assert [file.package for file in found.values()] == ["d"]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "src", tmp_path / "two" / "src"
    write(one / "pack" / "a.py")
    write(two / "pack" / "a.py")
    dropped: Dropped = defaultdict(list)
    chosen = [Source("folder", str(folder)) for folder in (one, two)]
    for order in (chosen, chosen[::-1]):
        found = {file.path: file.package for file in scan(order, dropped)}
        assert found == {"one/src/pack/a.py": "pack", "two/src/pack/a.py": "pack"}


# ------------------------------------------------------------------------- finding


def test_this_python_has_a_library() -> None:
    kinds = [source.kind for source in installed()]
    assert kinds.count("stdlib") == 1 and "site-packages" in kinds
    assert len({source.folder for source in installed()}) == len(kinds)
    assert find_sources("") == installed()


def test_this_book_does_not_learn_itself() -> None:
    dropped: Dropped = defaultdict(list)
    found = scan(installed(), dropped)
    packages = {file.package for file in found}
    assert "albor" not in packages
    assert not any(package.startswith("__editable__") for package in packages)
    assert {"dataclasses", "json", "numpy"} <= packages
    paths = [file.path for file in found]
    assert all(path.startswith(("stdlib/", "site-packages/")) for path in paths)
    assert not any(path.startswith("stdlib/site-packages") for path in paths)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("json", "stdlib"),
        ("dataclasses", "stdlib"),
        ("os", "stdlib"),  # frozen into the interpreter, yet a file
        ("numpy", "site-packages"),
        ("yaml", "site-packages"),
    ],
)
def test_packages_are_found_by_import_name(name: str, kind: str) -> None:
    (source,) = find_package(name)
    assert (source.kind, source.name) == (kind, name)
    dropped: Dropped = defaultdict(list)
    found = scan([source], dropped)
    assert {file.package for file in found} == {name}
    assert all(file.path.startswith(f"{kind}/{name}") for file in found)


def test_packages_are_found_by_distribution_name() -> None:
    for spelling in ("PyYAML", "pyyaml", "PYYAML"):
        assert "yaml" in {source.name for source in find_distribution(spelling)}
        assert find_sources(spelling) == find_distribution(spelling)
    assert find_distribution("no-such-thing") == []


def test_editable_installs_are_found() -> None:
    """Albor itself may be installed as a link to its folder."""
    (source,) = find_package("albor")
    assert (Path(source.folder) / "albor" / "sources.py").is_file()


def test_finding_imports_nothing(tmp_path: Path) -> None:
    bomb = tmp_path / "site-packages" / "bomb"
    write(bomb / "__init__.py", "raise SystemExit('imported')\n" + GOOD)
    script = "from albor.sources import find_sources; print(find_sources('bomb'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": f"{os.getcwd()}{os.pathsep}{bomb.parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "name='bomb'" in done.stdout


def test_specs_are_lists(tmp_path: Path) -> None:
    write(tmp_path / "x.py")
    spec = os.pathsep.join(["json", str(tmp_path), "", " email ", "json"])
    assert [(s.kind, s.name) for s in find_sources(spec)] == [
        ("stdlib", "json"),
        ("folder", ""),
        ("stdlib", "email"),
    ]
    (relative,) = find_sources("book")  # from the project, wherever we stand
    assert relative.kind == "folder" and os.path.isabs(relative.folder)


@pytest.mark.skipif(not POSIX, reason="links")
def test_a_folder_named_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path / "real" / "x.py")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    spec = os.pathsep.join(map(str, (tmp_path / "real", tmp_path / "link")))
    assert len(find_sources(spec)) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsn", r"'jsn' is neither .* did you mean 'json'\?"),
        ("numpyy", r"did you mean 'numpy'\?"),
        ("/no/such/folder", "'/no/such/folder' is neither"),
        ("~nobody-of-that-name/x", "neither"),
        ("xml.etree", "'xml.etree' is neither"),
        ("sys", "'sys' is neither"),
        ("pyproject.toml", "is a file"),
        ("a" * 5000, "neither"),
        ("nul\0byte", "neither"),
        (os.pathsep, "names no folder"),
        ("   ", "names no folder"),
        (None, "give one str"),
        (["json"], "give one str"),
        (Path("book"), "give one str"),
    ],
)
def test_what_is_not_there_is_refused_by_name(spec: object, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        find_sources(spec)  # type: ignore[arg-type]


def test_misspelt_folders_are_guessed(tmp_path: Path) -> None:
    write(tmp_path / "project" / "x.py")
    with pytest.raises(CorpusError, match=r"did you mean 'project'\?"):
        find_sources(str(tmp_path / "projetc"))


def test_shown_paths() -> None:
    assert shown("", "a", "b.py") == "a/b.py"
    assert shown("a\udcff") == r"a\xff"
