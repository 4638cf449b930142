"""The record: complete, recomputable, and at odds with whatever was changed."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from albor.artifacts import digest, write_json
from albor.corpus import Corpus, build_corpus
from albor.data import prepare
from albor.provenance import ProvenanceError, by_distribution, record, verify
from albor.tokenizer import Tokenizer

TEXT = "def NAME(value: int) -> int:\n    'Add one.'\n    return value + 1\n"
BARE = "def NAME(value):\n    number = value + value\n    return number * number\n"
Made = tuple[Path, Corpus, Tokenizer, Path, dict[str, Any]]


def plant(folder: Path) -> Path:
    for package, count, text in (
        ("good", 12, TEXT),
        ("bare", 9, BARE),
        ("c", 3, BARE),
    ):
        for number in range(count):
            place = folder / package / f"filé{number}.py"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(
                text.replace("NAME", f"{package}_{number}") * (number + 1)
            )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    work = tmp_path_factory.mktemp("provenance")
    corpus = build_corpus(str(plant(work / "tree")))
    tokenizer = Tokenizer.train((one.text for one in corpus.train), vocab_size=290)
    folder = prepare(
        corpus, tokenizer, work / "data", upsample=3, fim_rate=0.5, row_tokens=33
    )
    return work, corpus, tokenizer, folder, record(corpus, tokenizer, folder)


def test_every_file_is_there_with_all_that_was_asked(made: Made) -> None:
    _, corpus, _, folder, found = made
    every = [("train", one) for one in corpus.train]
    every += [("val", one) for one in corpus.val]
    assert len(found["files"]) == len(every)
    for row, (split, one) in zip(found["files"], every, strict=True):
        assert (row["split"], row["path"], row["sha256"]) == (
            split,
            one.path,
            one.sha256,
        )
        assert (row["bytes"], row["tier"]) == (one.size, one.tier)
        assert row["licence"] == "not stated" and row["distribution"] == ""
        assert row["copies"] == (3 if split == "train" and one.tier == 1 else 1)
    assert {shard["split"] for shard in found["shards"]} == {"train", "val"}
    names = {path.name for path in folder.iterdir()} - {"meta.json"}
    listed = {f"{s['name']}.{x}" for s in found["shards"] for x in s["sha256"]}
    assert listed == names


def test_tokens_are_those_of_the_text(made: Made) -> None:
    _, corpus, tokenizer, _, found = made
    counts = {row["path"]: row["tokens"] for row in found["files"]}
    for one in corpus.val:
        assert counts[one.path] == len(tokenizer.encode(one.text))
    plain = sum(len(tokenizer.encode(one.text)) for one in corpus.train)
    rows = [row for row in found["files"] if row["split"] == "train"]
    # The tail of a shard is dropped, with a few tokens of its last documents.
    assert 0.9 * plain < sum(row["tokens"] for row in rows) <= plain


def test_a_script_of_its_own_agrees(made: Made) -> None:
    """json and hashlib alone, written from the chapter's description."""
    work, _, _, folder, found = made
    write_json(work / "p.json", found)
    stored = json.loads((work / "p.json").read_bytes())

    def sha(value: Any) -> str:
        text = json.dumps(value, separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    assert (
        sha({k: v for k, v in stored.items() if k != "digest"}) == stored["digest"]
    )
    rows = [
        [r["split"], r["package"], r["path"], r["sha256"], r["tier"]]
        for r in stored["files"]
    ]
    assert sha(rows) == stored["corpus"]["digest"]
    for row in stored["files"]:
        text = (work / "tree" / row["path"]).read_bytes()
        assert hashlib.sha256(text).hexdigest() == row["sha256"]
    for shard in stored["shards"]:
        ids = np.fromfile(folder / f"{shard['name']}.bin", "<u2")
        assert len(ids) == shard["tokens"]
        for suffix, value in shard["sha256"].items():
            data = (folder / f"{shard['name']}.{suffix}").read_bytes()
            assert hashlib.sha256(data).hexdigest() == value
    saved = work / "tokenizer"
    made[2].save(saved)
    data = (saved / "tokenizer.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == stored["tokenizer"]["digest"]


def test_what_is_untouched_verifies_in_every_form(made: Made) -> None:
    work, corpus, tokenizer, folder, found = made
    write_json(work / "record.json", found)
    about = {"digest": corpus.digest, "report": corpus.report, "record": found}
    run = {"tokenizer": tokenizer.digest, "data": folder.name, "seed": 3}
    write_json(work / "run.json", {**run, "corpus": about})
    tokenizer.save(work / "t")
    for form in (found, work / "record.json", str(work / "run.json")):
        given = {"corpus": corpus, "tokenizer": work / "t", "data": folder}
        counts = verify(form, **given)
        assert counts == {
            "files": len(found["files"]),
            "shards": len(found["shards"]),
        }
    assert verify(found) == {"files": 0, "shards": 0}


def change(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(found: dict[str, Any]) -> None:
        *way, last = path
        for key in way:
            found = found[key]
        found[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["files", 2, "licence"], "MIT", "digest of the record"),
        (["files", 0, "tokens"], 1, "digest of the record"),
        (["shards", 0, "tokens"], 1, "digest of the record"),
        (["tools", "numpy"], "0.1", "digest of the record"),
        (["format"], 99, "format: recorded 2, found 99"),
        (["files"], None, "digest of the record"),
    ],
)
def test_a_record_that_was_edited(
    made: Made, path: list[Any], value: Any, message: str
) -> None:
    found = copy.deepcopy(made[4])
    change(path, value)(found)
    with pytest.raises(ProvenanceError, match=message):
        verify(found)


@pytest.mark.parametrize(
    "rubbish", [{}, {"digest": "x"}, {"corpus": 7}, {"format": 1}]
)
def test_what_is_no_record(rubbish: dict[str, Any]) -> None:
    with pytest.raises(ProvenanceError):
        verify(rubbish)


def test_the_first_difference_of_a_corpus_is_named(
    made: Made, tmp_path: Path
) -> None:
    found = made[4]

    def now(act: Callable[[Path], object]) -> str:
        tree = tmp_path / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        plant(tree)
        act(tree)
        with pytest.raises(ProvenanceError) as caught:
            verify(found, corpus=build_corpus(str(tree)))
        return str(caught.value)

    trained = next(row for row in found["files"] if row["split"] == "train")["path"]
    said = now(lambda tree: (tree / trained).write_text(BARE.replace("NAME", "x")))
    assert said.startswith(f"{trained} (train), bytes: recorded ")
    said = now(lambda tree: (tree / trained).unlink())
    assert said == f"{trained} (train): recorded, and not in the corpus now"
    more = str(Path(trained).with_name("more.py"))
    said = now(lambda tree: (tree / more).write_text(BARE.replace("NAME", "more")))
    assert said == f"{more} (train): in the corpus now, not recorded"


def test_the_first_difference_of_shards_is_named(
    made: Made, tmp_path: Path
) -> None:
    _, corpus, _, folder, found = made
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    assert verify(found, data=copied)["shards"] == len(found["shards"])
    for name in ("val-00000.idx", "train-00000.bin", "train-00000.json"):
        kept = (copied / name).read_bytes()
        (copied / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ProvenanceError, match=rf"{name}, SHA-256: recorded"):
            verify(found, data=copied)
        (copied / name).unlink()
        with pytest.raises(ProvenanceError, match=rf"{name}.*no file"):
            verify(found, data=copied)
        (copied / name).write_bytes(kept)
    copied.rename(tmp_path / "renamed")
    with pytest.raises(ProvenanceError, match=r"digest of the inputs"):
        verify(found, data=tmp_path / "renamed")
    other = Tokenizer.train([one.text for one in corpus.val], vocab_size=280)
    with pytest.raises(ProvenanceError, match=r"tokenizer, digest: recorded"):
        verify(found, tokenizer=other)


def test_sums_by_distribution(made: Made) -> None:
    found = made[4]
    sums = by_distribution(found)
    for key in ("bytes", "tokens"):
        assert sum(one[key] for one in sums) == sum(
            row[key] for row in found["files"]
        )
    assert sum(one["files"] for one in sums) == len(found["files"])
    assert [one["tokens"] for one in sums] == sorted(
        (one["tokens"] for one in sums), reverse=True
    )


def test_owners_and_licences_stand_with_their_files(tmp_path: Path) -> None:
    corpus = build_corpus(os.pathsep.join(["json", "yaml", "html"]))
    tokenizer = Tokenizer.train((one.text for one in corpus.train), vocab_size=300)
    found = record(corpus, tokenizer, prepare(corpus, tokenizer, tmp_path))
    owners = {row["package"]: row for row in found["files"]}
    assert owners["yaml"]["distribution"] == "PyYAML"
    assert "MIT" in owners["yaml"]["licence"] and owners["yaml"]["version"]
    assert owners["json"]["licence"] == "PSF-2.0"
    assert str(tmp_path) not in json.dumps(found)


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every single value of a JSON value, empty ones included."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, dict | list) and part:
            yield from places(part, (*way, key))
        else:
            yield (*way, key)


def other(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return 7
    return (
        f"{value}x"
        if isinstance(value, str)
        else [*value, 1]
        if isinstance(value, list)
        else {"x": 1}
        if isinstance(value, dict)
        else value + 1
    )


def sealed(found: dict[str, Any]) -> dict[str, Any]:
    """With its own digest computed again, as a careful forger would."""
    content = {key: found[key] for key in found if key != "digest"}
    return {**content, "digest": digest(content)}


def test_every_single_value_of_a_record_is_guarded(made: Made) -> None:
    _, corpus, tokenizer, folder, found = made
    given = {"corpus": corpus, "tokenizer": tokenizer, "data": folder}
    ways = [way for way in places(found)]
    assert len(ways) > 200
    free = {("corpus", "report", "spec")}
    for way in ways:
        forged = copy.deepcopy(found)
        inner = forged
        for key in way[:-1]:
            inner = inner[key]
        change(list(way), other(inner[way[-1]]))(forged)
        with pytest.raises(ProvenanceError):
            verify(forged)
        if way[0] in ("tools", "digest") or way in free:
            continue  # nothing is at hand to compare these with
        with pytest.raises(ProvenanceError):
            verify(sealed(forged), **given)


@pytest.mark.parametrize("what", ["files", "shards"])
@pytest.mark.parametrize("how", ["drop", "double", "swap"])
def test_rows_and_shards_that_are_moved(made: Made, what: str, how: str) -> None:
    _, corpus, tokenizer, folder, found = made
    forged = copy.deepcopy(found)
    rows = forged[what]
    if how == "drop":
        rows.pop()
    elif how == "double":
        rows.append(rows[-1])
    else:
        rows[0], rows[1] = rows[1], rows[0]
    with pytest.raises(ProvenanceError):
        verify(sealed(forged), corpus=corpus, tokenizer=tokenizer, data=folder)


def test_a_record_that_contradicts_itself_needs_no_witness(made: Made) -> None:
    """Sealed again, and found with nothing else at hand."""
    for way, value, message in (
        (
            ["files", 0, "licence"],
            "MIT",
            r"licence: recorded MIT, found not stated",
        ),
        (["files", 0, "version"], "9", r"version: recorded 9"),
        (["files", 0, "copies"], 2, r"copies: recorded 2"),
        (["files", 0, "bytes"], 1, r"report, train, bytes"),
        (["data", "inputs", "corpus"], "0", r"name of the data folder"),
        (["tokenizer", "digest"], "0", r"tokenizer of the shards"),
        (["tokenizer", "vocab_size"], 5, r"vocab_size of the shards"),
        (["shards", 0, "documents"], 1, r"documents in the shards of train"),
        (["corpus", "report", "splits", "val", "files"], 1, r"report, val, files"),
    ):
        forged = copy.deepcopy(made[4])
        change(way, value)(forged)
        with pytest.raises(ProvenanceError, match=message):
            verify(sealed(forged))


def test_a_run_says_the_same_as_its_record(made: Made) -> None:
    _, corpus, tokenizer, folder, found = made
    about = {"digest": corpus.digest, "report": corpus.report, "record": found}
    run = {"tokenizer": tokenizer.digest, "data": folder.name, "corpus": about}
    verify(run)
    for way in (
        ["tokenizer"],
        ["data"],
        ["corpus", "digest"],
        ["corpus", "report", "seed"],
    ):
        forged = json.loads(json.dumps(run))  # the two reports are not one
        change(way, "0")(forged)
        with pytest.raises(ProvenanceError, match=f"run.*{way[-1]}: recorded 0"):
            verify(forged)


def test_every_single_value_of_a_folder_is_guarded(
    made: Made, tmp_path: Path
) -> None:
    """meta.json and the record beside a shard, value by value."""
    found, copied = made[4], tmp_path / made[3].name
    shutil.copytree(made[3], copied)
    for name in ("meta.json", "train-00000.json", "val-00000.json"):
        kept = (copied / name).read_bytes()
        value = json.loads(kept)
        for way in places(value):
            forged = json.loads(kept)
            inner = forged
            for key in way[:-1]:
                inner = inner[key]
            change(list(way), other(inner[way[-1]]))(forged)
            write_json(copied / name, forged)
            with pytest.raises(ProvenanceError):
                verify(found, data=copied)
            with pytest.raises(ProvenanceError):
                record(made[1], made[2], copied)
        for rubbish in (b"", b"[]", b"{}", b"\xff", b"{" + kept, kept + b"\n"):
            (copied / name).write_bytes(rubbish)
            with pytest.raises(ProvenanceError):
                verify(found, data=copied)
        (copied / name).unlink()
        with pytest.raises(ProvenanceError):
            verify(found, data=copied)
        (copied / name).write_bytes(kept)
    verify(found, data=copied)


def test_files_that_come_or_go(made: Made, tmp_path: Path) -> None:
    found, copied = made[4], tmp_path / made[3].name
    shutil.copytree(made[3], copied)
    for name in ("train-00001.bin", "train-7.json", "notes.txt", "extra"):
        (copied / name).write_bytes(b"12")
        with pytest.raises(ProvenanceError, match=f"{name}: in the data folder"):
            verify(found, data=copied)
        (copied / name).unlink()
    (copied / "more").mkdir()
    with pytest.raises(ProvenanceError, match="more: in the data folder"):
        verify(found, data=copied)
    (copied / "more").rmdir()
    (copied / ".leftover.tmp").touch()  # of a writer that was killed
    assert verify(found, data=copied)["shards"] == len(found["shards"])


def test_a_whole_folder_of_another_corpus(made: Made, tmp_path: Path) -> None:
    """Everything about it is true, but it is another's."""
    work, corpus, tokenizer, folder, found = made
    tree = plant(tmp_path / "tree")
    (tree / "bare" / "more.py").write_text(BARE.replace("NAME", "more"))
    grown = build_corpus(str(tree))
    how = {"upsample": 3, "fim_rate": 0.5, "row_tokens": 33}
    theirs = prepare(grown, tokenizer, tmp_path / "data", **how)
    letters = Tokenizer.train([one.text for one in corpus.val], vocab_size=290)
    with pytest.raises(ProvenanceError, match="name of the data folder"):
        verify(found, data=theirs)
    for three, message in (
        ((corpus, tokenizer, theirs), "corpus of the shards"),
        ((grown, tokenizer, folder), "corpus of the shards"),
        ((corpus, letters, folder), "tokenizer of the shards"),
        ((corpus, tokenizer, work), "meta.json is missing"),
        ((corpus, tokenizer, work / "nowhere"), "meta.json is missing"),
        (
            (replace(corpus, digest="0" * 64), tokenizer, folder),
            "digest of the corp",
        ),
        (
            (replace(corpus, val=grown.val[:1]), tokenizer, folder),
            "digest of the c",
        ),
    ):
        with pytest.raises(ProvenanceError, match=message):
            record(*three)
    verify(record(grown, tokenizer, theirs), corpus=grown, data=theirs)


def test_a_text_that_changed_under_a_corpus(made: Made, tmp_path: Path) -> None:
    """The corpus at hand is an old one: its texts are read again all the same."""
    corpus = build_corpus(str(plant(tmp_path / "tree")))
    assert corpus.digest == made[1].digest
    verify(made[4], corpus=corpus)
    file = tmp_path / "tree" / corpus.val[0].path
    for act in (lambda: file.write_text(TEXT), file.unlink):
        act()
        with pytest.raises(ProvenanceError, match=corpus.val[0].path):
            verify(made[4], corpus=corpus)
        with pytest.raises(ProvenanceError, match=corpus.val[0].path):
            record(corpus, made[2], made[3])


def test_settings_of_a_corpus_built_again(made: Made, tmp_path: Path) -> None:
    """The same files, asked for in another way: the claim is not the same."""
    again = build_corpus(str(plant(tmp_path / "tree")), benchmarks=["a b c d e f"])
    assert again.digest == made[1].digest
    with pytest.raises(ProvenanceError, match="report, benchmarks, "):
        verify(made[4], corpus=again)
