"""Shards: what is written, what is refused, and what a stream reads."""

import itertools
import json
import math
import resource
import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import shards
from albor.artifacts import write_json
from albor.shards import (
    FORMAT,
    DataError,
    TokenStream,
    _token_counts,
    folder_for,
    is_whole,
    read_shard,
    unigram_cross_entropy,
    write_meta,
    write_shard,
)

INPUTS = {"format": FORMAT, "corpus": "c", "tokenizer": "t", "vocab_size": 65_536}


def make(home, lengths, **more):
    """A folder whose training tokens are their own places, in such shards."""
    inputs = INPUTS | more
    target = folder_for(home, inputs)
    ids = np.arange(sum(lengths), dtype=np.uint16)
    made = {"train": [], "val": []}
    for split, cuts in (("train", lengths), ("val", [5])):
        places = itertools.pairwise([0, *itertools.accumulate(cuts)])
        for number, (a, b) in enumerate(places):
            stem = target / f"{split}-{number:05}"
            starts = [0, (b - a) // 2, b - a]
            listed = [("a.py", 0, (b - a) // 2), ("b.py", 1, b - a - (b - a) // 2)]
            made[split].append(
                write_shard(stem, ids[a:b], starts, listed, samples=2)
            )
    return write_meta(target, inputs, made)


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path, [7, 11, 3])


def test_the_bytes_are_as_described(folder):
    assert (folder / "train-00001.bin").read_bytes() == b"".join(
        token.to_bytes(2, "little") for token in range(7, 18)
    )
    assert (folder / "train-00001.idx").read_bytes() == b"".join(
        place.to_bytes(8, "little") for place in (0, 5, 11)
    )
    record = json.loads((folder / "train-00001.json").read_text())
    assert record["documents"] == [["a.py", 0, 5], ["b.py", 1, 6]]
    assert record["data"] == folder.name and record["tokens"] == 11
    meta = json.loads((folder / "meta.json").read_text())
    train = meta["splits"]["train"]
    assert (train["tokens"], train["documents"], train["samples"]) == (21, 6, 6)
    assert [shard["tokens"] for shard in train["shards"]] == [7, 11, 3]


def test_equal_inputs_have_equal_names(tmp_path):
    names = {folder_for(tmp_path, INPUTS | {"corpus": x}).name for x in "aab"}
    assert len(names) == 2 and all(len(name) == 16 for name in names)


def test_a_finished_folder_may_be_read_only(folder, monkeypatch):
    meta = json.loads((folder / "meta.json").read_text())
    made = {
        split: [
            read_shard(folder / f"{split}-{i:05}", [["a.py", 0], ["b.py", 1]])
            for i in range(len(meta["splits"][split]["shards"]))
        ]
        for split in ("train", "val")
    }
    monkeypatch.setattr(shards, "write_json", lambda *_: pytest.fail("written"))
    assert write_meta(folder, meta["inputs"], made) == folder


def test_too_little_is_refused(tmp_path):
    made = [write_shard(tmp_path / "train-00000", [2], [0, 1], [("a", 0, 1)])]
    with pytest.raises(DataError, match="train: 1 tokens; give more text"):
        write_meta(tmp_path, INPUTS, {"train": made})


ASKED = [["a.py", 0], ["b.py", 1]]


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "remove"])
def test_a_damaged_shard_has_no_record(folder, suffix, damage):
    stem = folder / "train-00001"
    assert read_shard(stem, ASKED)["tokens"] == 11
    assert is_whole(folder)
    file = stem.with_suffix(f".{suffix}")
    good = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        cut = good[:-2] if damage == "cut" else b""
        middle = len(good) // 2
        flip = bytes([*good[:middle], good[middle] ^ 1, *good[middle + 1 :]])
        file.write_bytes(flip if damage == "flip" else cut)
    assert read_shard(stem, ASKED) is None
    assert not is_whole(folder)


def test_a_shard_of_other_documents_or_folders_is_none(folder, tmp_path):
    stem = folder / "train-00001"
    for asked in ([], ASKED[:1], ASKED[::-1], [["a.py", 0], ["b.py", 0]]):
        assert read_shard(stem, asked) is None
    other = make(tmp_path, [7, 11, 3], corpus="other")
    for suffix in ("bin", "idx", "json"):
        shutil.copy(stem.with_suffix(f".{suffix}"), other)
    assert read_shard(other / "train-00001", ASKED) is None


# --- what is not opened -----------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", ["train-00001.bin", "train-00002.idx"])
def test_truncated_files_are_refused(folder, name, cut):
    file = folder / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError) as error:
        TokenStream.open(folder, "train")
    assert f"{file}: bytes: expected {size}, got {size - cut}" in str(error.value)
    assert "prepare() again" in str(error.value)
    TokenStream.open(folder, "val")


def test_lengthened_empty_and_missing_files_are_refused(folder):
    file = folder / "train-00000.bin"
    good = file.read_bytes()
    for bad in (good + b"\0\0", b""):
        file.write_bytes(bad)
        with pytest.raises(DataError, match="bytes: expected 14"):
            TokenStream.open(folder, "train")
    file.unlink()
    with pytest.raises(DataError, match="expected 14, got no file"):
        TokenStream.open(folder, "train")
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match=r"meta\.json is missing; prepare\(\)"):
        TokenStream.open(folder, "train")


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_changed_bytes_are_found_on_request(folder, suffix):
    file = folder / f"train-00001.{suffix}"
    good = file.read_bytes()
    file.write_bytes(good[:-2] + bytes([good[-2] ^ 1, good[-1]]))
    TokenStream.open(folder, "train")
    with pytest.raises(
        DataError, match=rf"train-00001\.{suffix}: SHA-256: expected"
    ):
        TokenStream.open(folder, "train", verify=True)


def test_other_vocabulary_and_tokenizer_are_refused(folder):
    TokenStream.open(folder, "train", vocab_size=65_536, tokenizer_digest="t")
    with pytest.raises(DataError, match="vocabulary: expected 271, got 65536"):
        TokenStream.open(folder, "train", vocab_size=271)
    with pytest.raises(DataError, match="tokenizer: expected 00, got t; prepare"):
        TokenStream.open(folder, "train", tokenizer_digest="00")


def test_a_record_from_elsewhere_is_refused(folder, tmp_path):
    other = make(tmp_path, [7, 11, 3], corpus="other")
    shutil.copy(other / "meta.json", folder / "meta.json")
    with pytest.raises(DataError, match="digest of the inputs: expected"):
        TokenStream.open(folder, "train")


def test_a_renamed_folder_and_an_older_format_are_refused(folder, tmp_path):
    renamed = folder.rename(tmp_path / "mine")
    with pytest.raises(DataError, match="expected mine, got"):
        TokenStream.open(renamed, "train")
    inputs = INPUTS | {"format": FORMAT - 1}
    old = folder_for(tmp_path, inputs)
    old.mkdir()
    write_json(
        old / "meta.json", {"inputs": inputs, "splits": {"val": {"shards": []}}}
    )
    with pytest.raises(
        DataError, match=f"format: expected {FORMAT}, got {FORMAT - 1}"
    ):
        TokenStream.open(old, "val")


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", "{}", '{"inputs": 3}', '{"inputs": {}, "splits": []}', "3"],
)
def test_a_broken_record_is_refused(folder, record):
    (folder / "meta.json").write_text(record)
    with pytest.raises(DataError, match=r"meta\.json.*'train'.*prepare\(\) again"):
        TokenStream.open(folder, "train")


def test_an_unknown_split_is_named(folder):
    with pytest.raises(DataError, match="'test'"):
        TokenStream.open(folder, "test")


# --- what a stream reads ----------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    start=st.integers(0, 40),
    length=st.integers(0, 40),
)
@settings(max_examples=200)
def test_reading_crosses_shards(lengths, start, length):
    ids = np.arange(100, 100 + sum(lengths), dtype=np.uint16)
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    stream = TokenStream(pieces, lengths, {})
    assert len(stream) == len(ids)
    if start + length > len(ids):
        with pytest.raises(DataError, match=f"of a stream of {len(ids)}"):
            stream.read(start, length)
    else:
        row = stream.read(start, length)
        assert row.dtype == np.uint16
        assert row.tolist() == ids[start : start + length].tolist()


def test_files_and_arrays_read_the_same(tmp_path):
    folder = make(tmp_path, [7, 0, 11, 3])
    stream = TokenStream.open(folder, "train", verify=True)
    assert stream.read(0, 21).tolist() == list(range(21))
    starts = np.array([0, 5, 6, 7, 17])
    rows = stream.gather(starts, 4)
    assert (
        rows == starts[:, None] + np.arange(4)
    ).all() and rows.dtype == np.uint16
    assert stream.gather([], 4).shape == (0, 4)
    assert stream.starts.tolist() == [0, 3, 7, 7, 7, 12, 18, 19, 21]
    assert stream.starts.dtype == np.uint64
    assert not any(piece.flags.writeable for piece in stream.pieces() if len(piece))
    assert np.concatenate(list(stream.pieces())).tolist() == list(range(21))
    array = TokenStream.of(stream.read(0, 21))
    assert (array.gather(starts, 4) == rows).all()
    assert TokenStream.of(stream) is stream
    for wrong in ((-1, 2), (3, -1), (20, 2)):
        with pytest.raises(DataError):
            stream.read(*wrong)


@pytest.mark.parametrize(
    "array", [np.arange(99), np.zeros((9, 9), np.uint16), np.zeros(99, np.int16)]
)
def test_other_arrays_are_refused(array):
    with pytest.raises(DataError, match="tokens: expected uint16"):
        TokenStream.of(array)


def test_more_shards_than_a_process_may_open(tmp_path):
    shape = [2] * 400
    folder = make(tmp_path, shape)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(360, hard), hard))
    try:
        stream = TokenStream.open(folder, "train")
        for _ in range(2):
            for place in range(0, 800, 2):
                assert stream.read(place, 2).tolist() == [place, place + 1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_large_stream_opens_at_once(tmp_path):
    """33M tokens and a row in 2.5 ms at rest; here the machine may be busy."""
    zeros, size = np.zeros(1 << 20, np.uint16), 1 << 20
    target = folder_for(tmp_path, INPUTS)
    made = [
        write_shard(target / f"train-{i:05}", zeros, [0, size], [("a", 0, size)])
        for i in range(33)
    ]
    write_meta(target, INPUTS, {"train": made})
    spent = []
    for _ in range(7):
        clock = time.perf_counter()
        stream = TokenStream.open(target, "train")
        assert stream.read(17 * size - 5, 1025).any() == 0
        spent.append(time.perf_counter() - clock)
    assert min(spent) < 0.05 and len(stream) == 33 * size


# --- unigrams ---------------------------------------------------------------


def test_unigram_by_hand():
    seen = np.array([0, 0, 1, 2], dtype=np.uint16)
    assert math.isclose(unigram_cross_entropy(seen, seen, 3, 0), 1.5 * math.log(2))
    asked = np.array([0, 3], dtype=np.uint16)  # smoothed: 3/9 and 1/9
    expected = -(math.log(3 / 9) + math.log(1 / 9)) / 2
    assert math.isclose(unigram_cross_entropy(seen, asked, 5), expected)
    assert unigram_cross_entropy(seen, asked, 5, smoothing=0) == math.inf


@given(st.lists(st.integers(0, 11), min_size=1, max_size=99), st.data())
def test_no_table_beats_the_entropy(asked, draw):
    seen = draw.draw(st.lists(st.integers(0, 11), min_size=1, max_size=99))
    asked, seen = (np.array(ids, dtype=np.uint16) for ids in (asked, seen))
    entropy = unigram_cross_entropy(asked, asked, 12, smoothing=0)
    assert -1e-9 <= entropy <= math.log(12) + 1e-9
    assert unigram_cross_entropy(seen, asked, 12) >= entropy - 1e-9


def test_counts_over_several_pieces(monkeypatch):
    stream = np.random.default_rng(0).integers(0, 9, 5_000_000).astype(np.uint16)
    assert _token_counts(stream, 11).tolist() == [
        *np.bincount(stream, minlength=9).tolist(),
        0,
        0,
    ]


def test_foreign_ids_and_nothing_are_refused():
    with pytest.raises(DataError, match="token 3 in a vocabulary of 3"):
        _token_counts(np.array([3], dtype=np.uint16), 3)
    none = np.array([], dtype=np.uint16)
    with pytest.raises(DataError, match="a token on each side"):
        unigram_cross_entropy(none, none, 3)
