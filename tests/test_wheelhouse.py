"""The wheelhouse: what is needed, for which Python, and what stays out."""

import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import wheelhouse
from tools.wheelhouse import (
    JOBS,
    WheelhouseError,
    closure,
    collect,
    locked,
    main,
    needs_of,
    target_environment,
)

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
NODE = target_environment("3.12")


def installed(names: set[str]) -> dict[str, list[str]]:
    """What packages need, as their installed metadata say; nothing if not here."""
    found = {}
    for name in names:
        try:
            found[name] = requires(name) or []
        except PackageNotFoundError:
            found[name] = []
    return found


def table(**needs: list[str]):
    """A reader of a made-up index, and the names that it was asked for."""
    asked: list[str] = []

    def read(names: set[str]) -> dict[str, list[str]]:
        asked.extend(names)
        return {name: needs[name] for name in names}

    return read, asked


def make_wheel(folder: Path, name: str, *needs: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


def test_needs_are_followed_once_each_and_rings_end() -> None:
    read, asked = table(a=["b>=2", "c"], b=["d"], c=["a"], d=[])
    assert closure(["A"], read, NODE) == ({"a", "b", "c", "d"}, set())
    assert sorted(asked) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("marker", "for_311", "for_312"),
    [
        ("python_version == '3.12'", False, True),
        ("python_version < '3.12'", True, False),
        ("sys_platform == 'win32'", False, False),
        ("platform_machine == 'x86_64'", True, True),
        ("extra == 'test'", False, False),
    ],
)
def test_markers_are_the_nodes(marker: str, for_311: bool, for_312: bool) -> None:
    for python, there in (("3.11", for_311), ("3.12", for_312)):
        read, _ = table(a=[f"b; {marker}"], b=[])
        needed, _ = closure(["a"], read, target_environment(python))
        assert ("b" in needed) == there


def test_an_extra_counts_where_it_is_asked_for_also_when_asked_late() -> None:
    read, _ = table(
        a=["b", "c"],
        b=["plain", "more; extra == 'full'"],
        c=["b[full]"],
        plain=[],
        more=[],
    )
    assert closure(["a"], read, NODE)[0] == {"a", "b", "c", "plain", "more"}
    assert closure(["b"], read, NODE)[0] == {"b", "plain"}


def test_torch_stays_out_with_what_needs_it_and_what_only_that_needed() -> None:
    read, asked = table(
        job=["vision", "plain"],
        vision=["torch>=2", "pictures"],
        plain=["shared"],
        pictures=["shared"],
        shared=[],
    )
    needed, out = closure(["plain", "vision"], read, NODE)
    assert (needed, out) == ({"plain", "shared"}, {"torch", "vision"})
    assert "torch" not in asked
    assert closure(["job"], read, NODE) == (set(), {"job", "torch", "vision"})


def test_the_jobs_needs_are_closed_and_locked_for_both_pythons() -> None:
    """Against a plain loop over the installed metadata, without our closure."""
    for python in ("3.11", "3.12"):
        environment = target_environment(python)
        needed, out = closure(JOBS, installed, environment)
        assert not out and {*JOBS, "pyzmq", "tornado", "pyyaml"} <= needed
        for name in needed:
            for line in installed({name})[name]:
                need = Requirement(line)
                if not need.marker or need.marker.evaluate(
                    environment | {"extra": ""}
                ):
                    assert canonicalize_name(need.name) in needed, (name, line)
        assert needed <= set(locked(LOCK, environment))
    here = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    assert closure(JOBS, installed, target_environment("3.11"))[0] <= here


def test_torch_is_found_by_installed_metadata() -> None:
    needed, out = closure(
        ["albor", "papermill"],
        lambda names: {
            name: ["torch>=2.11"] if name == "albor" else installed({name})[name]
            for name in names
        },
        NODE,
    )
    assert out == {"albor", "torch"} and "papermill" in needed


def test_the_lock_is_read_for_the_node_with_hashes_and_without_markers() -> None:
    lines = {v: locked(LOCK, target_environment(v)) for v in ("3.11", "3.12")}
    assert lines["3.11"]["numpy"] != lines["3.12"]["numpy"]
    assert "aiohttp" in lines["3.12"] and "aiohttp" not in lines["3.11"]
    assert "\nappnope==" in LOCK and "appnope" not in lines["3.12"]  # for macOS
    for line in lines["3.12"].values():
        first, *hashes = line.split("\n")
        assert first.endswith(" \\") and ";" not in first
        assert hashes and all("--hash=sha256:" in each for each in hashes)


def test_a_wheel_says_what_it_needs(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "one", "two>=2; python_version > '3'", "three")
    assert needs_of(wheel) == ["two>=2; python_version > '3'", "three"]
    assert needs_of(make_wheel(tmp_path, "four")) == []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of three packages, and a `download` that makes their wheels."""
    needs = {"one": ["two"], "two": [], "net": ["torch"]}
    lock = tmp_path / "requirements.lock"
    pins = [f"{name}==1.0 \\\n    --hash=sha256:{'0' * 64}" for name in needs]
    lock.write_text("\n".join(pins) + "\n")

    def download(lines, folder, python):
        for line in lines:
            name = line.split("==")[0]
            make_wheel(folder, name, *needs[name])

    monkeypatch.setattr(wheelhouse, "download", download)
    return lock


def test_the_folder_holds_one_wheel_each_and_no_old_ones(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "two-0.9-py3-none-any.whl").touch()
    arguments = ["--to", str(folder), "--lock", str(index), "one", "net"]
    assert main(arguments) == 0
    names = ["one-1.0-py3-none-any.whl", "two-1.0-py3-none-any.whl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    printed = capsys.readouterr().out
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert f"{size:,}  bytes in 2 wheels for Python 3.12" in printed
    assert "left out: net, it needs torch" in printed


def test_what_the_lock_lacks_and_odd_versions_are_refused(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WheelhouseError, match=r"five: not in requirements.lock"):
        collect(["one", "five"], tmp_path / "wheels", "3.12", index)
    assert not (tmp_path / "wheels").exists()
    assert main(["--python", "312", "--lock", str(index)]) == 1
    assert "'312': give two numbers, as in 3.12" in capsys.readouterr().err


def test_pip_gets_hashes_no_needs_and_the_nodes_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def run(command):
        seen["command"] = command
        seen["text"] = Path(command[-1]).read_text()
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(wheelhouse.subprocess, "run", run)
    with pytest.raises(WheelhouseError, match="could not fetch"):
        wheelhouse.download(["one==1.0 \\\n    --hash=sha256:00"], tmp_path, "3.12")
    assert seen["text"] == "one==1.0 \\\n    --hash=sha256:00\n"
    assert seen["command"][0] == sys.executable
    for flag in ("--no-deps", "--require-hashes", "--only-binary=:all:"):
        assert flag in seen["command"]
    assert "manylinux_2_28_x86_64" in seen["command"]
