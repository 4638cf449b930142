"""`python -m tools.wheelhouse`: collect wheels for a computer without a network.

A bare node of a cluster has a GPU, Python and torch, and cannot fetch papermill.
This collects it, with all that it needs, in a folder that travels:

    python -m tools.wheelhouse --to wheelhouse --python 3.12 papermill ipykernel

Notable:
- Versions and hashes are those of requirements.lock, chosen for the node's Python
  and not for ours. What a package needs is read from the wheel just fetched.
- torch stays out: the node has its own, which fits its GPU. So does a package that
  needs torch, since it might not fit that one.
- There, with no network: `python -m pip install --no-index --no-deps --target SITE
  wheelhouse/*.whl`, and SITE in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
JOBS = ["papermill", "nbclient", "ipykernel"]  # what runs a notebook headless
ON_THE_NODE = frozenset({"torch"})
GLIBC = range(34, 4, -1)  # 2.34 is of 2021; pip wants each older one by name

Reader = Callable[[set[str]], dict[str, list[str]]]  # names -> name: its needs


class WheelhouseError(RuntimeError):
    """Something that was asked for cannot be collected."""


def plain(name: str) -> str:
    """A package's name as all of them write it."""
    return canonicalize_name(name)


def target_environment(python: str) -> dict[str, str]:
    """The variables of requirement markers on Linux, x86-64, with that CPython."""
    if not re.fullmatch(r"3\.\d+", python):
        raise WheelhouseError(
            f"python = {python!r}: give two numbers, as in 3.12; ask the node with "
            "`python3 --version`"
        )
    return {
        "python_version": python,
        "python_full_version": python + ".0",
        "implementation_name": "cpython",
        "implementation_version": python + ".0",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_release": "",
        "platform_version": "",
    }


def locked(text: str, environment: dict[str, str]) -> dict[str, str]:
    """Package -> its lines of the lock for that environment, without the marker."""
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=[a-zA-Z0-9])", text.strip()):
        first, _, hashes = block.partition("\n")
        line = Requirement(first.rstrip(" \\"))
        if line.marker is None or line.marker.evaluate(environment):
            pin = f"{line.name}{line.specifier}"
            found[plain(line.name)] = f"{pin} \\\n{hashes}"
    return found


def closure(
    names: Iterable[str], read: Reader, environment: dict[str, str]
) -> tuple[set[str], set[str]]:
    """What `names` need, themselves included, and what is left out for torch.

    `read(names)` gives the requirement lines of each, and is asked once for each.
    """
    roots = [plain(name) for name in names]
    wanted = {name: {""} for name in roots}  # name: its extras
    needs: dict[str, list[Requirement]] = {}
    users: dict[str, set[str]] = {}
    while True:
        new = {name for name in wanted if name not in needs} - ON_THE_NODE
        for name, lines in (read(new) if new else {}).items():
            needs[name] = [Requirement(line) for line in lines]
        before = sum(map(len, wanted.values()))
        for name, extras in [*wanted.items()]:
            for need in needs.get(name, []):
                asked = [{**environment, "extra": extra} for extra in extras]
                if need.marker and not any(map(need.marker.evaluate, asked)):
                    continue
                other = plain(need.name)
                wanted.setdefault(other, {""}).update(need.extras)
                users.setdefault(other, set()).add(name)
        if sum(map(len, wanted.values())) == before:
            break
    out = set(wanted) & ON_THE_NODE
    while more := {user for name in out for user in users.get(name, ())} - out:
        out |= more
    reached, queue = set[str](), roots
    while queue:  # once more, for what only they needed
        name = queue.pop()
        if name not in out | reached:
            reached.add(name)
            queue += [other for other, those in users.items() if name in those]
    return reached, out


def needs_of(wheel: Path) -> list[str]:
    """The requirement lines in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        metadata = next(
            name
            for name in inside
            if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)
        )
        text = archive.read(metadata).decode("utf-8")
    return Parser().parsestr(text, headersonly=True).get_all("Requires-Dist") or []


def wheels(folder: Path) -> dict[str, Path]:
    """Package -> its wheel."""
    return {
        plain(parse_wheel_filename(path.name)[0]): path
        for path in sorted(folder.glob("*.whl"))
    }


def download(lines: Iterable[str], folder: Path, python: str) -> None:
    """Fetch these lines of the lock as wheels for Linux on x86-64, and no others.

    pip reads markers and would take our own Python for the node's; these lines have
    none, and each says which hashes may come.
    """
    platforms = [f"manylinux_2_{n}_x86_64" for n in GLIBC]
    platforms += [
        "manylinux2014_x86_64",
        "manylinux2010_x86_64",
        "manylinux1_x86_64",
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--require-hashes", "--implementation", "cp"]
    command += ["--python-version", python, "--dest", str(folder)]
    command += [part for name in platforms for part in ("--platform", name)]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "requirements.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        done = subprocess.run([*command, "-r", str(file)])
    if done.returncode:
        raise WheelhouseError("pip could not fetch the wheels; it says why above")


def collect(
    names: list[str], folder: Path, python: str, lock: Path
) -> tuple[dict[str, Path], set[str]]:
    """Fill `folder` with one wheel for each package; also what was left out."""
    environment = target_environment(python)
    pins = locked(lock.read_text(encoding="utf-8"), environment)

    def read(some: set[str]) -> dict[str, list[str]]:
        if missing := sorted(some - set(pins)):
            raise WheelhouseError(
                f"{', '.join(missing)}: not in {lock.name} for Python {python}; "
                "add it to pyproject.toml and run `make lock`"
            )
        download([pins[name] for name in sorted(some)], scratch, python)
        return {name: needs_of(wheels(scratch)[name]) for name in some}

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        needed, out = closure(names, read, environment)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
        for package in needed:
            wheel = wheels(scratch)[package]
            (folder / wheel.name).write_bytes(wheel.read_bytes())
    return wheels(folder), out


def main(arguments: list[str] | None = None) -> int:
    """Collect, and print what there is and how large it is."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheelhouse", description=about
    )
    parser.add_argument(
        "names", nargs="*", help=f"packages (default: {' '.join(JOBS)})"
    )
    parser.add_argument(
        "--to", type=Path, default=ROOT / "wheelhouse", help="folder"
    )
    parser.add_argument("--python", default="3.12", help="the node's Python")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock")
    given = parser.parse_args(arguments)
    try:
        found, out = collect(
            given.names or JOBS, given.to, given.python, given.lock
        )
    except WheelhouseError as error:
        print(error, file=sys.stderr)
        return 1
    for path in found.values():
        print(f"{path.stat().st_size:>12,}  {path.name}")
    size = sum(path.stat().st_size for path in found.values())
    print(f"{size:>12,}  bytes in {len(found)} wheels for Python {given.python}")
    for name in sorted(out):
        print(
            f"left out: {name}"
            + ("" if name in ON_THE_NODE else ", it needs torch")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
