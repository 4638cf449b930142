"""What must agree within the project, compared: texts, pins, versions, names."""

import ast
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.chapters import committed_files
from tools.check import check

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[list[str]]:
    """The lines of every fenced shell block of a Markdown file."""
    found = re.findall(r"^```sh\n(.*?)^```", read(name), re.MULTILINE | re.DOTALL)
    return [block.strip().split("\n") for block in found]


def targets() -> dict[str, str]:
    """What `make help` prints: target -> its line."""
    command = ["make", "-s", "-C", str(ROOT), "help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in printed.stdout.splitlines()]
    return {target: text for make, target, text in lines if make == "make"}


def requirements() -> set[str]:
    extras = PYPROJECT["optional-dependencies"].values()
    return {
        *PYPROJECT["dependencies"],
        *(line for extra in extras for line in extra),
    }


def locked() -> dict[str, list[str]]:
    """Package -> the versions that the lock holds, one per platform or Python."""
    versions: dict[str, list[str]] = {}
    for line in re.findall(
        r"^[a-zA-Z0-9].*", read("requirements.lock"), re.MULTILINE
    ):
        name, version = re.match(r"([\w.-]+)==([^ ;]+)", line).groups()
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def texts() -> dict[str, str]:
    """Every committed text file; vendored MathJax is its authors' business."""
    found = {}
    for name in committed_files(ROOT):
        path = ROOT / name
        if path.is_file() and "_static/mathjax" not in name:
            data = path.read_bytes()
            if b"\0" not in data:
                found[name] = data.decode("utf-8")
    return found


def test_readme_continuous_integration_and_help_name_the_same_commands():
    assert blocks("README.md")[0] == ["make pretrain", "make test"]
    steps = re.findall(
        r"^step (?:logged )?(make \w+)", read(".ci/run"), re.MULTILINE
    )
    assert steps[:2] == blocks("README.md")[0]
    assert set(steps[2:]) == {"make check", "make book", "make browse"}
    offered = targets()
    for name in (
        "README.md",
        ".ci/run",
        "CHANGELOG.md",
        ".github/workflows/book.yml",
    ):
        named = set(re.findall(r"\bmake ([a-z-]+)\b(?=[`\" \n])", read(name)))
        used = {word for word in named if f"`make {word}" in read(name)}
        assert used <= offered.keys(), f"{name} names {used - offered.keys()}"
    wanted = {
        "pretrain",
        "test",
        "check",
        "notebooks",
        "adopt",
        "new",
        "book",
        "lab",
    }
    assert wanted <= offered.keys()
    assert all(offered.values())


def test_every_phony_target_has_its_line_in_help():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)
    assert set(phony.split()) == targets().keys()


def test_readme_without_make_is_what_make_does():
    recipe = re.findall(r"-m pip install (?:--quiet )?(.*)", read("Makefile"))
    (pin,) = re.findall(r"^TORCH = (.*)$", read("Makefile"), re.MULTILINE)
    made = {line.replace("$(TORCH)", pin) for line in recipe}
    (lines,) = (
        b for b in blocks("README.md") if any("pip install" in x for x in b)
    )
    told = [
        line.split("pip install ")[1] for line in lines if "pip install" in line
    ]
    assert set(told) <= made
    assert len(told) == 3


def test_one_version():
    tree = ast.parse(read("albor/__init__.py"))
    (version,) = (s.value.value for s in tree.body if isinstance(s, ast.Assign))
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == version


def test_one_licence():
    assert PYPROJECT["license"] == yaml.safe_load(read("CITATION.cff"))["license"]
    assert "Apache License" in read("LICENSE")
    assert "Version 2.0" in read("LICENSE")


def test_environment_equals_pyproject():
    listed = yaml.safe_load(read("environment.yml"))["dependencies"]
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    assert len(pip) == len(set(pip))
    assert {str(Requirement(line)) for line in pip} == {
        str(Requirement(line)) for line in requirements()
    }
    assert f"python{PYPROJECT['requires-python']}" in listed


def test_lock_holds_every_requirement_but_torch():
    versions = locked()
    for requirement in map(Requirement, requirements()):
        name = canonicalize_name(requirement.name)
        if name == "torch":
            assert name not in versions, (
                "torch is pinned by version, outside the lock"
            )
            continue
        assert name in versions, f"{name}: run `make lock`"
        for version in versions[name]:
            assert requirement.specifier.contains(version), (
                f"{name}: run `make lock`"
            )


def test_lock_is_hashed_throughout_and_brings_no_cuda():
    entries = re.split(
        r"^(?=[a-zA-Z0-9])", read("requirements.lock"), flags=re.MULTILINE
    )
    assert all("--hash=sha256:" in entry for entry in entries if entry.strip())
    prefixes = ("nvidia-", "cuda-")
    assert not [name for name in locked() if name.startswith(prefixes)]


def test_triton_is_the_version_that_torch_pins():
    pins = [
        r
        for r in map(Requirement, metadata.requires("torch"))
        if r.name == "triton"
    ]
    if not pins:
        pytest.skip("this build of torch has no CUDA and pins no Triton")
    pinned = re.search(r"^TORCH = (\S+)", read("Makefile"), re.MULTILINE)[1]
    if metadata.version("torch").partition("+")[0] != pinned:
        pytest.skip(f"this is not torch {pinned}, which the lock goes with")
    (locked_version,) = locked()["triton"]
    assert all(pin.specifier.contains(locked_version) for pin in pins)


def test_torch_pin_is_within_bounds():
    (pin,) = re.findall(r"^TORCH = (.*)$", read("Makefile"), re.MULTILINE)
    (torch,) = (r for r in map(Requirement, requirements()) if r.name == "torch")
    assert torch.specifier.contains(pin)


REGISTRIES = r"pypi\.\w+|pythonhosted\.\w+|npmjs\.\w+|registry\.\w+\.\w{2,3}\b"
REGISTRIES += r"|anaconda\.\w{3}\b|\bdeb\.debian\.\w+|proxy\.golang\.\w+"
PATHS = r"(?<![\w.~/-])/(?:home|Users|root|work)/\w[^\s'\"`<>)]*"


@pytest.mark.parametrize(
    "pattern", [REGISTRIES, PATHS], ids=["registries", "paths"]
)
def test_no_file_names_a_registry_or_a_machine(pattern):
    hits = {
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in texts().items()
        for match in re.finditer(pattern, text)
    }
    assert not hits


def test_what_runs_make_is_not_committed():
    made = ("checkpoints/", "models/", "data/", "_build/", "runs/", ".venv/")
    assert not [name for name in committed_files(ROOT) if name.startswith(made)]


def test_the_workflow_publishes_what_make_book_builds():
    workflow = yaml.safe_load(read(".github/workflows/book.yml"))
    steps = workflow["jobs"]["publish"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make book"]
    assert {"path": "_build/html"} in [step.get("with") for step in steps]


def test_the_book_is_sound():
    assert check(ROOT) == []
