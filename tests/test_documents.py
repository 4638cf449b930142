"""Documents: records in the order of the files, texts as they were, owners."""

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import documents as module
from albor.documents import (
    Document,
    Reading,
    Rules,
    find_owners,
    read_file,
    read_files,
)
from albor.filters import CorpusError, judge
from albor.sources import File, Source

GOOD = "def double(number):\n    return number + number\n\n\nprint(double(21))\n"


def plant(folder: Path, count: int) -> list[File]:
    """Files of very different lengths, so that workers end in another order."""
    files = []
    for number in range(count):
        place = folder / f"f{number}.py"
        place.write_text(
            GOOD.replace("double", f"name{number}") * (1 + number * 7 % 40)
        )
        size = place.stat().st_size
        files.append(File("p", f"p/f{number}.py", str(place), size))
    return files


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_records_come_in_the_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(module, "GROUP", 3)
    files = plant(tmp_path, 20)
    files[7] = File("p", "p/gone.py", str(tmp_path / "gone.py"), 100)
    found = list(read_files(files, Rules(), workers))
    assert len(found) == 20
    for file, reading in zip(files, found, strict=True):
        if "gone" in file.path:
            assert reading == Reading("unreadable")
            continue
        text = Path(file.place).read_text()
        assert reading.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert reading.size == len(text) and reading.reason == ""
        assert reading.density.definitions == text.count("def ")
        assert reading.density.lines == text.count("\n")


def test_nothing_to_read_is_nothing() -> None:
    assert list(read_files([], Rules(), 2)) == []


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_a_worker_says_what_the_judge_says(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "a.py")
        place.write_bytes(GOOD.encode() + data)
        reading = read_file(File("p", "p/a.py", str(place), 0), Rules())
        text, reason = judge(GOOD.encode() + data)
        assert reading.reason == reason
        if text:
            document = Document.read(place, "p", "p/a.py")
            assert document.size == reading.size
            assert document.sha256 == reading.sha256
            assert document.text == text


def test_a_file_that_grew_since_it_was_listed_is_too_large(tmp_path: Path) -> None:
    place = tmp_path / "a.py"
    place.write_text(GOOD * 40)
    rules = Rules(max_file_bytes=1000)
    assert read_file(File("p", "a.py", str(place), 70), rules).reason == "too large"


def test_signatures_are_taken_on_request(tmp_path: Path) -> None:
    file = plant(tmp_path, 1)[0]
    assert read_file(file, Rules()).signature == b""
    assert len(read_file(file, Rules(signatures=True)).signature) == 4 * 128


def test_documents_tell_equal_texts_by_name_and_hash(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(GOOD)
    one, other = (
        Document.read(tmp_path / x / "a.py", "p") for x in ("here", "there")
    )
    assert one == other, "where a file lies is not what it is"
    assert one.package == "p" and one.path == "a.py" and one.tier == 2
    with pytest.raises(ValueError, match="utf-8"):
        (tmp_path / "b.py").write_bytes(b"\xff\xfe")
        Document.read(tmp_path / "b.py")


def test_a_changed_text_names_both_hashes(tmp_path: Path) -> None:
    place = tmp_path / "a.py"
    place.write_text(GOOD)
    document = Document.read(place)
    place.write_text(GOOD + GOOD)
    with pytest.raises(CorpusError) as caught:
        document.text  # noqa: B018
    assert document.sha256[:12] in str(caught.value)
    assert Document.read(place).sha256[:12] in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_owners_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    for name, licence in (("a", "MIT"), ("b", "GPL-3.0-only"), ("c", "")):
        info = site / f"{name}-2.dist-info"
        info.mkdir(parents=True)
        line = f"License-Expression: {licence}\n" if licence else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 2\n{line}"
        )
        top = {"a": "alone\nshared\n", "b": "shared\n", "c": "silent\n"}[name]
        (info / "top_level.txt").write_text(top)
    monkeypatch.syspath_prepend(str(site))

    def file(package: str, kind: str, **fields: str) -> File:
        return File(package, f"{package}/x.py", "", 9, Source(kind, "", **fields))

    wheel = {"distribution": "D", "version": "7", "licence": "BSD"}
    owners = find_owners(
        [
            file("alone", "site-packages"),
            file("shared", "site-packages"),
            file("silent", "site-packages"),
            file("nobody", "site-packages"),
            file("mine", "folder"),
            file("json", "stdlib"),
            file("D", "wheel", **wheel),
        ]
    )
    assert owners["alone"] == ("a", "2", "MIT")
    assert owners["shared"] == ("a, b", "2, 2", "MIT; GPL-3.0-only")
    assert owners["silent"] == ("c", "2", "not stated")
    assert owners["nobody"] == ("nobody", "", "not stated")
    assert "mine" not in owners
    assert owners["json"].distribution == "Python"
    assert owners["D"] == ("D", "7", "BSD")
