"""Files that can be trusted: hashes, atomic writes, JSON lines."""

import hashlib
import json
import math
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor.artifacts import (
    PROCESS,
    ArtifactError,
    append_jsonl,
    atomic_path,
    digest,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_text,
    to_json,
    truncate_jsonl,
    write_json,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and links of POSIX")
finite = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | st.integers() | finite | st.text()
values = st.recursive(
    leaves,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
)


def reordered(value):
    """The same value, all its mappings in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Hashes.


def test_sha256_is_that_of_the_bytes(tmp_path):
    # The example of the standard, FIPS 180-4.
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_text("abc") == sha256_file(tmp_path / "abc") == known
    assert sha256_text("é") == hashlib.sha256("é".encode()).hexdigest()
    large = os.urandom(3_000_001)
    (tmp_path / "large").write_bytes(large)
    assert sha256_file(tmp_path / "large") == hashlib.sha256(large).hexdigest()


@given(values)
def test_digest_depends_on_the_value_alone(value):
    assert digest(value) == digest(reordered(value))
    assert digest(value) == digest(json.loads(to_json(value)))
    assert to_json(value).isascii() and "\n" not in to_json(value)


@given(values, values)
def test_different_values_have_different_digests(one, two):
    same = to_json(one) == to_json(two)
    assert same == (digest(one) == digest(two))


def test_values_that_python_calls_equal_are_told_apart():
    assert len({digest(value) for value in (1, 1.0, True, "1", [1], {"1": 1})}) == 6
    assert digest((1, 2)) == digest([1, 2])


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (math.nan, "value is nan"),
        ({"a": [0, math.inf]}, "value['a'][1] is inf"),
        ({"a": -math.inf}, "value['a'] is -inf"),
        ({"a": {1: 2}}, "value['a'] has the key 1"),
        ({None: 2}, "the key None"),
        ([{"x"}], "value[0] is of type set"),
        ({"a": b"x"}, "value['a'] is of type bytes"),
        (Path("x"), "value is of type "),
    ],
)
def test_what_is_not_json_is_refused_by_place(value, place, tmp_path):
    for action in (digest, lambda v: write_json(tmp_path / "x", v)):
        with pytest.raises(ArtifactError) as refused:
            action(value)
        assert place in str(refused.value)
    assert names(tmp_path) == []


# Atomic writes.


def test_the_old_file_stays_until_the_end_of_the_block(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with atomic_path(str(path)) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two" and names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_no_other(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"), atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@POSIX
def test_bytes_are_forced_to_disk_before_the_name_and_the_name_after(
    tmp_path, monkeypatch
):
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(handle):
        status = os.fstat(handle)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(handle)

    def noted_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"seven b")
    assert calls == [7, "replace", "folder"]


def test_mistakes_in_the_use_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="is a folder"), atomic_path(tmp_path):
        pass
    with pytest.raises(ArtifactError, match=r"nothing was written for .*file"):  # noqa: SIM117
        with atomic_path(tmp_path / "file"):
            pass
    assert names(tmp_path) == []


@POSIX
def test_links_and_permissions_survive(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    umask = os.umask(0)
    os.umask(umask)
    with atomic_path(tmp_path / "fresh") as temporary:
        temporary.write_text("new")
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o666 & ~umask


@POSIX
def test_only_remains_of_dead_writers_are_removed(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    dead, token = int(done.stdout), "0123456789abcdef"
    gone = [
        f".file.{dead}.{token}.tmp",  # its process has ended
        f".file.{os.getpid()}.{token}.tmp",  # an older process of our number
    ]
    kept = [
        f".file.{os.getppid()}.{token}.tmp",  # its process lives
        f".file.{os.getpid()}.{PROCESS}00000000.tmp",  # ours: another thread's
        f".other.{dead}.{token}.tmp",  # another file's
        ".file.tmp",
        f".file.{dead}.tmp",
        f"file.{dead}.{token}.tmp",
    ]
    for name in gone + kept:
        (tmp_path / name).touch()
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == sorted([*kept, "file"])


WRITER = """
import sys
from albor.artifacts import atomic_path
with atomic_path(sys.argv[1]) as path, open(path, "wb", buffering=0) as file:
    for piece in range(5):
        print(piece, flush=True)
        sys.stdin.readline()
        file.write(b"n" * 200)
print("done", flush=True)
sys.stdin.readline()
"""


@POSIX
@pytest.mark.parametrize("steps", range(6))
def test_a_killed_writer_leaves_a_whole_file(steps, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"o" * 1000)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0) as writer:
        for _ in range(steps):
            writer.stdout.readline()
            writer.stdin.write(b"\n")
        reached = writer.stdout.readline()
        writer.kill()
    assert reached == (b"done\n" if steps == 5 else b"%d\n" % steps)
    assert writer.returncode == -9
    assert path.read_bytes() == (b"n" if steps == 5 else b"o") * 1000
    assert len(names(tmp_path)) == (1 if steps == 5 else 2)
    with atomic_path(path) as temporary:
        temporary.write_text("next")
    assert names(tmp_path) == ["file"] and path.read_text() == "next"


def test_readers_see_whole_files_while_writers_race(tmp_path):
    path, stop, torn = tmp_path / "file", threading.Event(), []
    contents = [bytes([65 + i]) * 20_000 for i in range(3)]
    path.write_bytes(contents[0])

    def read():
        while not stop.is_set():
            data = path.read_bytes()
            if data not in contents:
                torn.append(data)

    def write(content):
        for _ in range(10):
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=[c]) for c in contents]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert torn == [] and names(tmp_path) == ["file"]


# JSON.


@given(values)
@settings(max_examples=30)
def test_json_comes_back(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        write_json(path, value)
        assert read_json(path) == value
        assert path.read_bytes().endswith(b"\n")


def test_json_files_do_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "y": {"p": 2, "q": 3}})
    write_json(tmp_path / "b", {"y": {"q": 3, "p": 2}, "x": 1})
    assert sha256_file(tmp_path / "a") == sha256_file(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1: "),
        (b'{\n"a": 1,\n"b": }', "line 3: "),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b'"\xff"', "utf-8"),
        (b"[" * 100_000, "too deep"),
        (b"{} {}", "Extra data"),
    ],
)
def test_files_that_are_no_json_are_refused_by_file_and_line(
    content, words, tmp_path
):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as refused:
        read_json(path)
    message = str(refused.value)
    assert message.startswith(f"{path}, line ") and words in message, message


def test_a_missing_file_is_missing(tmp_path):
    for read in (read_json, read_jsonl):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")


# JSON lines.


@given(
    st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=5), st.data()
)
@settings(max_examples=60)
def test_a_log_cut_anywhere_gives_its_beginning_and_goes_on(records, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        path.touch()
        for record in records:
            append_jsonl(path, record)
        whole = path.read_bytes()
        assert read_jsonl(path) == records
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        complete = whole[: cut + 1].count(
            b"\n"
        )  # the newline itself may be missing
        if cut and whole[cut - 1 : cut] != b"\n" and whole[cut : cut + 1] != b"\n":
            with pytest.warns(UserWarning, match=f"line {complete + 1}: dropped"):
                found = read_jsonl(path)
        else:
            found = read_jsonl(path)
        assert found == records[: len(found)] and len(found) == min(
            complete, len(records)
        )
        append_jsonl(path, {"next": True})
        assert read_jsonl(path) == [*found, {"next": True}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1}\n{"b": \n{"c": 3}\n', "line 2: "),
        ('{"a": 1}\n\n{"c": 3}\n', "line 2: "),
        ('{"a": 1}\n[2]\n', "line 2: [2] is not a mapping"),
        ('{"a": 1}\n{"a": NaN}\n', "line 2: NaN"),
    ],
)
def test_a_fault_inside_a_log_is_an_error_by_file_and_line(
    content, words, tmp_path
):
    path = tmp_path / "log.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError) as refused:
        read_jsonl(path)
    assert str(refused.value).startswith(f"{path}, {words}"), refused.value


def test_records_that_cannot_be_read_back_are_not_written(tmp_path):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    for wrong in ([1], None, "x", {"loss": math.nan}, {1: 2}):
        with pytest.raises(ArtifactError):
            append_jsonl(path, wrong)
    assert path.read_bytes() == b'{"step":1}\n'


def test_a_log_is_cut_back_to_what_is_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in range(1, 8):
        append_jsonl(path, {"step": step})
    path.write_bytes(path.read_bytes() + b'{"step"')
    with pytest.warns(UserWarning, match="line 8: dropped 7 bytes"):
        dropped = truncate_jsonl(path, lambda record: record["step"] <= 5)
    assert dropped == [{"step": 6}, {"step": 7}]
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3, 4, 5]
    assert len(truncate_jsonl(path, lambda record: False)) == 5
    assert path.read_bytes() == b"" and names(tmp_path) == ["log.jsonl"]


def test_a_log_that_cannot_be_judged_stays_as_it_is(tmp_path):
    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"step": 1})
    with pytest.raises(KeyError):
        truncate_jsonl(path, lambda record: record["loss"] < 1)
    assert read_jsonl(path) == [{"step": 1}]
