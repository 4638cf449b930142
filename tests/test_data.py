"""Token files and batches: what is written, refused, and read in an epoch."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import data
from albor.artifacts import digest
from albor.corpus import Corpus, Document
from albor.data import (
    Batches,
    DataError,
    TokenFile,
    _token_counts,
    prepare,
    unigram_cross_entropy,
)
from albor.tokenizer import EOS, Tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",  # an empty document is only its end sign
    "# </s> and <|fim_middle|> are text here\n",
    "s = 'é🐍'\r\n\tpass\x00\n",
    "for i in range(10):\n    print(i)\n",
]


def corpus_of(train, val):
    def documents(texts, package):
        return [Document(package, f"{i}.py", text) for i, text in enumerate(texts)]

    return Corpus(
        documents(train, "a"), documents(val, "b"), {}, digest([train, val])
    )


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=270)


@pytest.fixture
def prepared(tokenizer, tmp_path):
    return prepare(corpus_of(TEXTS, TEXTS[:2]), tokenizer, tmp_path)


def texts_of(file, tokenizer):
    spans = itertools.pairwise(file.starts.tolist())
    return [tokenizer.decode(file.tokens[a : b - 1].tolist()) for a, b in spans]


# --- what is written --------------------------------------------------------


def test_the_stream_holds_every_document_between_end_signs(prepared, tokenizer):
    train = TokenFile.open(prepared / "train.bin", verify=True)
    expected = [EOS]
    for text in TEXTS:
        expected += [*tokenizer.encode(text), EOS]
    assert train.tokens.tolist() == expected
    assert (prepared / "train.bin").read_bytes() == b"".join(
        token.to_bytes(2, "little") for token in expected
    )
    assert texts_of(train, tokenizer) == TEXTS
    assert train.tokens.tolist().count(EOS) == len(TEXTS) + 1  # none from the texts
    assert train.starts.dtype == np.uint64 and train.starts[-1] == len(train)


def test_more_documents_than_one_encoding_batch(tokenizer, tmp_path):
    texts = [f"x{i} = {i}\n" * (i % 7) for i in range(150)]
    folder = prepare(corpus_of(texts, texts[:3]), tokenizer, tmp_path)
    assert texts_of(TokenFile.open(folder / "train.bin"), tokenizer) == texts


def test_the_record_counts_tokens_by_package(prepared, tokenizer):
    meta = json.loads((prepared / "meta.json").read_text())
    train = meta["splits"]["train"]
    assert train["documents"] == len(TEXTS)
    assert sum(train["tokens_by_package"].values()) == train["tokens"] - 1
    assert meta["inputs"]["tokenizer"] == tokenizer.digest
    assert meta["inputs"]["vocab_size"] == tokenizer.vocab_size


def test_the_folder_name_follows_every_input(prepared, tokenizer, tmp_path):
    names = {prepared.name}
    names.add(prepare(corpus_of(TEXTS, TEXTS[:1]), tokenizer, tmp_path).name)
    other = Tokenizer.train(TEXTS, vocab_size=268)
    names.add(prepare(corpus_of(TEXTS, TEXTS[:2]), other, tmp_path).name)
    assert len(names) == 3


def test_reuse_does_no_encoding(prepared, tokenizer, tmp_path):
    lazy = SimpleNamespace(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    assert prepare(corpus_of(TEXTS, TEXTS[:2]), lazy, tmp_path) == prepared


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "val.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_repaired(prepared, tokenizer, tmp_path, name, damage):
    file = prepared / name
    good = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(good[:-2])
    else:
        file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert prepare(corpus_of(TEXTS, TEXTS[:2]), tokenizer, tmp_path) == prepared
    assert file.read_bytes() == good


def test_an_error_leaves_nothing(tokenizer, tmp_path):
    class Dying:
        vocab_size, digest, calls = tokenizer.vocab_size, tokenizer.digest, 0

        def encode_batch(self, texts):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return tokenizer.encode_batch(texts)

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_of(TEXTS * 20, TEXTS), Dying(), tmp_path)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import albor.data
from test_data import TEXTS, Tokenizer, corpus_of
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
albor.data.write_json = die
tokenizer = Tokenizer.train(TEXTS, vocab_size=270)
albor.data.prepare(corpus_of(TEXTS, TEXTS[:2]), tokenizer, {folder!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_killed_run_is_done_again_and_swept_up(tokenizer, tmp_path):
    here = Path(__file__).resolve().parent
    script = KILLED.format(
        root=str(here.parent), tests=str(here), folder=str(tmp_path)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".")  # half a folder, no good name
    folder = prepare(corpus_of(TEXTS, TEXTS[:2]), tokenizer, tmp_path)
    assert [path for path in tmp_path.iterdir()] == [folder]
    TokenFile.open(folder / "val.bin", verify=True)


def test_a_faster_process_is_accepted(tokenizer, tmp_path, monkeypatch):
    corpus = corpus_of(TEXTS, TEXTS[:2])
    elsewhere = prepare(corpus, tokenizer, tmp_path / "elsewhere")
    target = tmp_path / "here" / elsewhere.name

    def too_late(source, destination):
        shutil.copytree(elsewhere, target)
        raise OSError("directory not empty")

    monkeypatch.setattr(data.os, "replace", too_late)
    monkeypatch.setattr(data, "write_json", lambda *_: None)
    monkeypatch.setattr(data, "_write_split", lambda *_: {})
    assert prepare(corpus, tokenizer, tmp_path / "here") == target
    assert [path for path in target.parent.iterdir()] == [target]


def test_a_large_vocabulary_is_refused(tmp_path):
    stub = SimpleNamespace(vocab_size=65_537, digest="x")
    with pytest.raises(DataError, match=r"65,537 does not fit 16-bit.*65,536"):
        prepare(corpus_of(TEXTS, TEXTS), stub, tmp_path)


def test_the_largest_ids_survive(tmp_path):
    ids = [65_535, 32_768, 32_767, 0]
    stub = SimpleNamespace(
        vocab_size=65_536,
        digest="x",
        encode_batch=lambda texts: [ids for _ in texts],
    )
    folder = prepare(corpus_of(["a"], ["b"]), stub, tmp_path)
    train = TokenFile.open(folder / "train.bin")
    assert train.tokens.tolist() == [EOS, *ids, EOS]
    inputs, targets = Batches(train, seq_len=5, batch_size=1).step(0)
    assert inputs.tolist() == [[EOS, *ids]] and targets.tolist() == [[*ids, EOS]]


@pytest.mark.parametrize(("train", "val"), [([], TEXTS), (TEXTS, [])])
def test_an_empty_split_is_refused(tokenizer, tmp_path, train, val):
    with pytest.raises(DataError, match=r"no (train|val) documents"):
        prepare(corpus_of(train, val), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- what is not opened -----------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
def test_truncated_files_are_refused(prepared, name, cut):
    file = prepared / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(DataError) as error:
        TokenFile.open(prepared / "train.bin")
    assert str(file) in str(error.value)
    assert f"expected {size}, got {size - cut}" in str(error.value)


def test_lengthened_and_empty_files_are_refused(prepared):
    good = (prepared / "train.bin").read_bytes()
    for bad in (good + b"\0\0", b""):
        (prepared / "train.bin").write_bytes(bad)
        with pytest.raises(DataError, match="bytes: expected"):
            TokenFile.open(prepared / "train.bin")


def test_changed_bytes_are_found_on_request(prepared):
    good = (prepared / "val.bin").read_bytes()
    (prepared / "val.bin").write_bytes(good[:-2] + b"\x07\0")
    TokenFile.open(prepared / "val.bin")
    with pytest.raises(DataError, match=r"val\.bin: SHA-256: expected"):
        TokenFile.open(prepared / "val.bin", verify=True)


def test_other_vocabulary_and_tokenizer_are_refused(prepared, tokenizer):
    path = prepared / "train.bin"
    TokenFile.open(path, vocab_size=270, tokenizer_digest=tokenizer.digest)
    with pytest.raises(DataError, match="vocabulary: expected 271, got 270"):
        TokenFile.open(path, vocab_size=271)
    with pytest.raises(DataError, match="tokenizer digest: expected 00, got"):
        TokenFile.open(path, tokenizer_digest="00")


def test_a_record_from_elsewhere_is_refused(prepared, tokenizer, tmp_path):
    other = prepare(corpus_of(TEXTS, TEXTS[:1]), tokenizer, tmp_path)
    shutil.copy(other / "meta.json", prepared / "meta.json")
    with pytest.raises(DataError, match="digest of the inputs: expected"):
        TokenFile.open(prepared / "train.bin")


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "{}", '{"inputs": 3}', '{"inputs": {}, "splits": []}']
)
def test_a_broken_record_is_refused(prepared, record):
    (prepared / "meta.json").write_text(record)
    with pytest.raises(DataError, match=r"meta\.json.*delete the folder"):
        TokenFile.open(prepared / "train.bin")


def test_missing_files_are_named(prepared, tmp_path):
    with pytest.raises(DataError, match=r"test\.bin is missing"):
        TokenFile.open(prepared / "test.bin")
    (prepared / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train\.idx is missing"):
        TokenFile.open(prepared / "train.bin")


# --- batches ----------------------------------------------------------------


def counting(length):
    """A stream whose tokens are their own places."""
    return np.arange(length, dtype=np.uint16)


@given(
    length=st.integers(12, 700),
    seq_len=st.integers(1, 11),
    batch_size=st.integers(1, 5),
    more=st.integers(0, 9),
    rows=st.sampled_from(["pack", "truncate"]),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_reads_every_row_once(
    length, seq_len, batch_size, more, rows, seed, epoch
):
    make = {"seed": seed, "rows": rows, "row_tokens": seq_len + more}
    try:
        batches = Batches(counting(length), seq_len, batch_size, **make)
    except DataError as error:
        assert "too few for one batch" in str(error)
        return
    stride = seq_len if rows == "pack" else seq_len + more
    seen = []
    for step in range(batches.steps_per_epoch):
        step += epoch * batches.steps_per_epoch
        inputs, targets = batches.step(step)
        assert inputs.shape == targets.shape == (batch_size, seq_len)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(targets, inputs + 1)
        starts = inputs[:, 0].tolist()
        assert [row * stride for row in batches.rows_of(step)] == starts
        seen += starts
    possible = range(0, batches.sequences * stride, stride)
    assert len(set(seen)) == len(seen) and set(seen) <= set(possible)
    assert len(possible) - len(seen) == batches.sequences % batch_size
    last = (batches.sequences - 1) * stride
    assert last + seq_len < length  # the last target exists; no row is forgotten:
    assert last + stride + max(stride, seq_len + 1) > length


def test_a_batch_is_a_function_of_seed_and_step():
    def fresh(seed=5):
        return Batches(counting(900), 7, 6, seed=seed)

    walked = fresh()
    walk = [walked.step(step)[0] for step in range(70)]
    for step in (69, 3, 40, 21, 20, 0):  # any order, across epochs
        assert torch.equal(fresh().step(step)[0], walk[step])
        assert torch.equal(walked.step(step)[0], walk[step])
    assert not torch.equal(fresh(6).step(0)[0], walk[0])
    per_epoch = walked.steps_per_epoch
    assert per_epoch == 21 and not torch.equal(walk[0], walk[per_epoch])


def test_global_random_state_is_neither_read_nor_moved():
    batches = Batches(counting(900), 7, 6)
    np.random.seed(1)
    torch.manual_seed(1)
    first = batches.step(0)[0]
    after = np.random.random(), torch.rand(())
    np.random.seed(1)
    torch.manual_seed(1)
    assert (np.random.random(), torch.rand(())) == after
    assert torch.equal(Batches(counting(900), 7, 6).step(0)[0], first)


def test_the_order_is_pinned():
    """A change here breaks the resume of every run that exists."""
    batches = Batches(counting(25), 2, 1, seed=0)
    assert batches.permutation(0).tolist() == [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    batches = Batches(counting(25), 2, 1, seed=2**64 - 1)
    assert sorted(batches.permutation(2**40).tolist()) == list(range(12))


def test_the_permutation_is_uniform():
    """Chi-square over all orders of four rows: 24 cells, 99.99% point about 57."""
    stream = counting(5)
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for epoch in range(2_400):
        order = Batches(stream, 1, 1, seed=3).permutation(epoch)
        counts[tuple(order.tolist())] += 1
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 57


@pytest.mark.parametrize(("rows", "expected"), [("truncate", 43), ("pack", 86)])
def test_the_card_v1(rows, expected):
    stream = np.broadcast_to(np.uint16(0), (22_079 * 2048,))
    batches = Batches(stream, 1024, 4 * 128, rows=rows, row_tokens=2048)
    assert batches.steps_per_epoch == expected


@pytest.mark.parametrize(("rows", "expected"), [("truncate", 132), ("pack", 265)])
def test_the_card_v2(rows, expected):
    stream = np.broadcast_to(np.uint16(0), (67_977 * 2048,))
    batches = Batches(stream, 1024, 4 * 128, rows=rows, row_tokens=2048)
    assert batches.steps_per_epoch == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, f"seed={2**64}"),
        ({"rows": "pad"}, "got 'pad'"),
        ({"rows": "truncate", "row_tokens": 6}, "seq_len=7; got 'truncate'"),
        ({"seq_len": 100}, "100 tokens make 0 rows of 100"),
        ({"batch_size": 15}, "14 rows of 7, too few for one batch of 15"),
    ],
)
def test_impossible_batches_are_refused(bad, message):
    options = {"seq_len": 7, "batch_size": 3} | bad
    with pytest.raises(DataError) as error:
        Batches(counting(100), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "stream", [np.arange(99), np.zeros((9, 9), np.uint16), np.zeros(99, np.int16)]
)
def test_other_arrays_are_refused(stream):
    with pytest.raises(DataError, match="tokens: expected uint16"):
        Batches(stream, 7, 3)


def test_steps_before_zero_are_refused():
    with pytest.raises(DataError, match="at least 0, got -1"):
        Batches(counting(100), 7, 3).step(-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_gathered_on_the_device_are_the_same():
    stream = np.arange(2**16, dtype=np.uint16)[::-1].copy()  # ids above 32,767 too
    here = Batches(stream, 7, 6, seed=2)
    there = Batches(stream, 7, 6, seed=2, device="cuda")
    for step in (0, 5_000):
        for a, b in zip(here.step(step), there.step(step), strict=True):
            assert b.device.type == "cuda" and torch.equal(a, b.cpu())


def test_the_branch_for_devices_keeps_large_ids():
    """The same arithmetic as on an accelerator, made to run on the CPU."""
    stream = np.arange(2**16, dtype=np.uint16)[::-1].copy()
    plain, resident = (Batches(stream, 7, 6, seed=2) for _ in range(2))
    resident.resident = torch.from_numpy(stream.view(np.int16))
    for step in (0, 1_555, 5_000):
        for a, b in zip(plain.step(step), resident.step(step), strict=True):
            assert torch.equal(a, b)


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
