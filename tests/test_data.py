"""Preparing token data: the same bytes from anyone, however often interrupted."""

import argparse
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import data
from albor.artifacts import digest
from albor.corpus import Corpus
from albor.data import FastEncoder, Job, cut_into_shards, prepare, spread_copies
from albor.documents import Document
from albor.filters import CorpusError
from albor.shards import DataError, TokenStream, is_whole
from albor.tokenizer import (
    EOS,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
)

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",  # an empty document is only its end sign
    "# </s> and <|fim_middle|> are text here\n",
    "s = 'é🐍'\n\tpass\x00\n",
    "for i in range(10):\n    print(i)\n",
]
LONG = [f"def name_{i}(x):\n    return x * {i}\n" * (i % 9 + 1) for i in range(60)]


def documents_of(texts, home, package, good=()):
    """Documents on disk; those numbered in `good` are of tier 1."""
    made = []
    (home / package).mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        place = home / package / f"{i}.py"
        place.write_bytes(text.encode())
        document = Document.read(place, package, f"{package}/{i}.py")
        made.append(dataclasses.replace(document, tier=1 if i in good else 2))
    return made


def corpus_of(home, train, val, good=()):
    train = documents_of(train, home, "a", good)
    val = documents_of(val, home, "b", good=(0,))
    return Corpus(train, val, {}, digest([[d.path, d.sha256] for d in train + val]))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*TEXTS, *LONG], vocab_size=290)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    home = tmp_path_factory.mktemp("corpus")
    return corpus_of(home, LONG, TEXTS, good=(3, 8, 40))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "SHARD_BYTES", 1_500)


def everything(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def texts_of(stream, tokenizer):
    spans = itertools.pairwise(stream.starts.tolist())
    return [tokenizer.decode(stream.read(a, b - a - 1)) for a, b in spans]


# --- what goes where --------------------------------------------------------


def stand_ins(sizes, good=()):
    return [
        Document("p", str(i), "", size, "", tier=1 if i in good else 2)
        for i, size in enumerate(sizes)
    ]


@given(st.lists(st.integers(0, 90), max_size=40), st.integers(1, 300))
def test_shards_are_equal_and_in_order(sizes, shard_bytes):
    items = spread_copies(stand_ins(sizes), 1)
    shards = cut_into_shards(items, shard_bytes)
    assert [item for shard in shards for item in shard] == items
    assert all(shards)
    total, largest = sum(sizes), max(sizes, default=0)
    for shard in shards:
        size = sum(document.size for document, _ in shard)
        assert size <= shard_bytes + largest
    if len(shards) > 1:  # no tiny last one
        count = -(-total // shard_bytes)
        last = sum(document.size for document, _ in shards[-1])
        assert last > total / count - largest - 1


@given(
    st.integers(1, 30), st.integers(1, 12), st.sets(st.integers(0, 29), max_size=9)
)
def test_copies_are_spread(count, upsample, good):
    documents = stand_ins([9] * count, good)
    items = spread_copies(documents, upsample)
    good = {i for i in good if i < count}
    assert len(items) == len(set(items)) == count + len(good) * (upsample - 1)
    for document in documents:
        copies = [copy for other, copy in items if other is document]
        wanted = upsample if document.tier == 1 else 1
        assert sorted(copies) == list(range(wanted))
    firsts = [document for document, copy in items if copy == 0]
    assert firsts == documents
    if good and 1 < upsample <= count and count > 2 * upsample:
        neighbours = itertools.pairwise(document.path for document, _ in items)
        assert all(a != b for a, b in neighbours)


# --- what is written --------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 60, 1])
def test_the_stream_does_not_depend_on_the_cuts(
    tokenizer, tmp_path, monkeypatch, shard_bytes
):
    monkeypatch.setattr(data, "SHARD_BYTES", shard_bytes)
    corpus = corpus_of(tmp_path, TEXTS, TEXTS[:2])
    folder = prepare(corpus, tokenizer, tmp_path / "data")
    train = TokenStream.open(folder, "train", verify=True)
    expected = [EOS]
    for text in TEXTS:
        expected += [*tokenizer.encode(text), EOS]
    assert train.read(0, len(train)).tolist() == expected
    assert texts_of(train, tokenizer) == TEXTS
    assert expected.count(EOS) == len(TEXTS) + 1  # none from the texts
    assert texts_of(TokenStream.open(folder, "val"), tokenizer) == TEXTS[:2]


def test_the_records_say_what_went_in(corpus, tokenizer, tmp_path, small_shards):
    folder = prepare(corpus, tokenizer, tmp_path, upsample=4)
    meta = json.loads((folder / "meta.json").read_text())
    train = meta["splits"]["train"]
    assert train["documents"] == len(LONG) + 3 * 3 and len(train["shards"]) > 4
    assert meta["splits"]["val"]["documents"] == len(TEXTS)  # tier 1 counts once
    listed = []
    for shard in train["shards"]:
        record = json.loads((folder / f"{shard['name']}.json").read_text())
        listed += [tuple(entry) for entry in record["documents"]]
    expected = {
        (document.path, copy): len(tokenizer.encode(document.text))
        for document in corpus.train
        for copy in range(4 if document.tier == 1 else 1)
    }
    assert {(path, copy): tokens for path, copy, tokens in listed} == expected
    assert train["tokens"] == 1 + sum(expected.values()) + len(expected)
    assert meta["inputs"]["tokenizer"] == tokenizer.digest


def test_the_folder_name_follows_every_input(corpus, tokenizer, tmp_path):
    def name(which=corpus, how=tokenizer, **options):
        return prepare(which, how, tmp_path / "data", workers=1, **options).name

    fim = {"row_tokens": 64, "fim_rate": 0.5}
    names = [
        name(),
        name(corpus_of(tmp_path, LONG, TEXTS[:1])),
        name(how=Tokenizer.train(TEXTS, vocab_size=268)),
        name(upsample=2),
        name(**fim),
        name(**fim, seed=1),
        name(**fim, fim_style="spm"),
        name(**fim | {"row_tokens": 32}),
        name(**fim | {"fim_rate": 0.25}),
    ]
    assert len(set(names)) == len(names)
    # What decides nothing is none of the inputs.
    assert name(seed=5) == name(row_tokens=9) == name(fim_style="spm") == names[0]
    assert name(fim_rate=0) == names[0]
    untiered = [dataclasses.replace(d, tier=2) for d in corpus.train]
    plain = dataclasses.replace(corpus, train=untiered)
    assert name(plain, upsample=9) == names[0]


def test_infilling_fills_whole_rows(corpus, tokenizer, tmp_path, small_shards):
    how = {"row_tokens": 48, "fim_rate": 0.6, "upsample": 5, "seed": 3}
    folder = prepare(corpus, tokenizer, tmp_path, **how)
    train = TokenStream.open(folder, "train")
    assert len(train.sources) > 3 and (train.bounds % 48 == 0).all()
    rows = train.read(0, len(train)).reshape(-1, 48)
    signs = [(rows == x).sum(1) for x in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)]
    assert (signs[0] == signs[1]).all() and (signs[1] == signs[2]).all()
    counted = train.meta["splits"]["train"]
    assert counted["samples"] == signs[0].sum() > 20
    assert counted["overhead"] > 0 and counted["dropped"] > 0
    for piece in train.pieces():
        assert piece[0] == EOS
    val = TokenStream.open(folder, "val")
    assert texts_of(val, tokenizer) == TEXTS
    # Each copy has a draw of its own.
    text = [
        train.read(a, 40).tolist() for a in train.starts[:-1] if a + 40 < len(train)
    ]
    assert len({tuple(row) for row in text}) > len(LONG)


# --- any number of workers --------------------------------------------------


@pytest.mark.parametrize("fim", [{}, {"row_tokens": 32, "fim_rate": 0.5}])
def test_the_same_bytes_for_any_number_of_workers(
    corpus, tokenizer, tmp_path, small_shards, fim
):
    made = {}
    for workers in (1, 2, 3):
        reports = []
        folder = prepare(
            corpus,
            tokenizer,
            tmp_path / str(workers),
            upsample=3,
            workers=workers,
            on_progress=lambda *counts: reports.append(counts),  # noqa: B023
            **fim,
        )
        made[workers] = everything(folder)
        assert reports == sorted(reports) and reports[-1][0] == reports[-1][1]
        assert len(reports) > 4
    assert made[1] == made[2] == made[3]


def test_small_work_starts_no_process(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data.joblib, "Parallel", lambda **_: pytest.fail("started"))
    folder = prepare(corpus, tokenizer, tmp_path)  # two shards
    assert is_whole(folder)
    (folder / "val-00000.idx").unlink()
    assert is_whole(prepare(corpus, tokenizer, tmp_path, workers=5))  # one to do


def test_a_job_holds_no_text(corpus):
    job = Job(Path("x/train-00000"), [(d, 0) for d in corpus.train], {})
    assert LONG[7] not in repr(job) and job.bytes == sum(map(len, LONG))


def test_a_changed_file_stops_the_work(tokenizer, tmp_path, small_shards):
    corpus = corpus_of(tmp_path, LONG, TEXTS)
    Path(corpus.train[50].place).write_text("x = 1\n")
    with pytest.raises(CorpusError, match=r"a/50\.py.*build the corpus again"):
        prepare(corpus, tokenizer, tmp_path / "data", workers=2)


# --- interrupted ------------------------------------------------------------


def inodes(folder):
    return {file.name: file.stat().st_ino for file in folder.glob("*.bin")}


@pytest.mark.filterwarnings("ignore:.*tasks")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on(
    corpus, tokenizer, tmp_path, small_shards, workers
):
    def stop(done, total):
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            corpus, tokenizer, tmp_path / "a", workers=workers, on_progress=stop
        )
    (half,) = (tmp_path / "a").iterdir()
    kept = inodes(half)
    assert kept and not (half / "meta.json").exists()
    reports = []
    folder = prepare(
        corpus,
        tokenizer,
        tmp_path / "a",
        workers=1,
        on_progress=lambda *counts: reports.append(counts),
    )
    whole = everything(prepare(corpus, tokenizer, tmp_path / "b", workers=1))
    assert folder == half and everything(folder) == whole
    again = inodes(folder)
    finished = [name for name in kept if again[name] == kept[name]]
    assert len(finished) >= (3 if workers == 1 else 1)
    assert len(reports) <= len(again) - len(finished)


CHILD = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_data
from test_data import *
data.SHARD_BYTES = 1_500
home = Path({home!r})
tokenizer = Tokenizer.train([*TEXTS, *LONG], vocab_size=290)
corpus = corpus_of(home / "corpus", LONG, TEXTS, good=(3, 8, 40))
def tell(done, total):
    print(done, flush=True)
    time.sleep(0.2 if {workers} == 1 else 0.5)
prepare(corpus, tokenizer, home / "data", workers={workers}, on_progress=tell)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on(tokenizer, tmp_path, small_shards, workers):
    here = Path(__file__).resolve().parent
    script = CHILD.format(
        root=str(here.parent), tests=str(here), home=str(tmp_path), workers=workers
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    for _ in range(3):
        assert child.stdout.readline().strip().isdigit()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    time.sleep(0.5)  # its workers notice, and finish what they have begun
    (half,) = (tmp_path / "data").iterdir()
    assert not (half / "meta.json").exists()
    kept = inodes(half)
    (half / "train-00005.json").unlink(missing_ok=True)
    stray = half / ".train-00005.bin.999999999.abcdef1234567890.tmp"
    stray.write_bytes(b"half")  # what a kill in the middle of a shard leaves
    corpus = corpus_of(tmp_path / "corpus", LONG, TEXTS, good=(3, 8, 40))
    folder = prepare(corpus, tokenizer, tmp_path / "data", workers=1)
    assert folder == half and not stray.exists()
    again = inodes(folder)
    assert sum(again[name] == number for name, number in kept.items()) >= 3
    other = prepare(corpus, tokenizer, tmp_path / "other", workers=1)
    assert everything(folder) == everything(other)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")
def test_a_killed_worker_is_reported(corpus, tokenizer, tmp_path, small_shards):
    over = threading.Event()

    def kill_one():  # the first that starts, before it can have done all the work
        mine = f"\nPPid:\t{os.getpid()}\n"
        while not over.wait(0.002):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    ours = mine in (process / "status").read_text()
                    worker = b"popen_loky" in (process / "cmdline").read_bytes()
                except OSError:  # it has ended meanwhile
                    continue
                if ours and worker:
                    os.kill(int(process.name), signal.SIGKILL)
                    return

    joblib.externals.loky.get_reusable_executor().shutdown(wait=True)
    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(
            DataError, match=r"worker process was killed.*than 2 workers"
        ):
            prepare(corpus, tokenizer, tmp_path, workers=2)
    finally:
        over.set()
        killer.join()
    folder = prepare(corpus, tokenizer, tmp_path, workers=2)
    assert is_whole(folder)


def test_reuse_does_no_encoding(corpus, tokenizer, tmp_path):
    folder = prepare(corpus, tokenizer, tmp_path)
    before = everything(folder), inodes(folder)
    lazy = SimpleNamespace(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    assert prepare(corpus, lazy, tmp_path) == folder
    assert (everything(folder), inodes(folder)) == before


@pytest.mark.parametrize(
    "name", ["train-00001.bin", "train-00002.idx", "val-00000.json", "meta.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_repaired_alone(
    corpus, tokenizer, tmp_path, small_shards, name, damage
):
    folder = prepare(corpus, tokenizer, tmp_path, workers=1)
    good = everything(folder)
    for made in folder.glob("*.bin"):
        os.utime(made, (1, 1))  # dates tell: an inode may be given out again
    file = folder / name
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(good[name][:-2])
    else:
        file.write_bytes(bytes([good[name][0] ^ 1]) + good[name][1:])
    assert prepare(corpus, tokenizer, tmp_path, workers=1) == folder
    assert everything(folder) == good
    changed = [x.name for x in folder.glob("*.bin") if x.stat().st_mtime != 1]
    assert changed == (
        [] if name == "meta.json" else [name.partition(".")[0] + ".bin"]
    )


# --- what is refused --------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fim_rate": 0.5}, r"fim_rate=0\.5 needs row_tokens.*got 0"),
        ({"fim_rate": 1.5, "row_tokens": 64}, r"fim_rate=1\.5"),
        ({"fim_rate": float("nan"), "row_tokens": 64}, "fim_rate=nan"),
        ({"fim_style": "mps"}, "fim_style='mps'"),
        ({"upsample": 0}, "upsample=0"),
        ({"workers": -2}, "workers=-2"),
    ],
)
def test_impossible_settings_are_refused(
    corpus, tokenizer, tmp_path, wrong, message
):
    with pytest.raises(DataError, match=message):
        prepare(corpus, tokenizer, tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_no_whole_row_is_refused(tokenizer, tmp_path):
    corpus = corpus_of(tmp_path, TEXTS, TEXTS)
    with pytest.raises(DataError, match="train: 0 tokens; give more text"):
        prepare(corpus, tokenizer, tmp_path / "d", row_tokens=4096, fim_rate=0.5)


def test_a_large_vocabulary_is_refused(corpus, tmp_path):
    stub = SimpleNamespace(vocab_size=65_537, digest="x")
    with pytest.raises(DataError, match=r"65,537 does not fit 16-bit.*65,536"):
        prepare(corpus, stub, tmp_path)


def test_the_largest_ids_survive(tmp_path):
    ids = [65_535, 32_768, 32_767, 0]
    stub = SimpleNamespace(
        vocab_size=65_536,
        digest="x",
        keeps_lines=False,
        encode=lambda text: ids,
    )
    folder = prepare(corpus_of(tmp_path, ["a"], ["b"]), stub, tmp_path / "data")
    train = TokenStream.open(folder, "train")
    assert train.read(0, 6).tolist() == [EOS, *ids, EOS]


@pytest.mark.parametrize(("train", "val"), [([], TEXTS), (TEXTS, [])])
def test_an_empty_split_is_refused(tokenizer, tmp_path, train, val):
    with pytest.raises(DataError, match=r"no (train|val) documents"):
        prepare(corpus_of(tmp_path, train, val), tokenizer, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_memory_is_bounded_by_a_shard(tokenizer, tmp_path, monkeypatch):
    """The caller keeps no text: what is read of one shard is gone by the next."""
    monkeypatch.setattr(data, "SHARD_BYTES", 1_500)
    corpus = corpus_of(tmp_path, LONG, TEXTS)
    read, alive, held = Document.text.fget, weakref.WeakValueDictionary(), []

    class Text(str):  # one that can be watched
        pass

    def watched(document):
        text = Text(read(document))
        alive[id(text)] = text
        return text

    def spy(text):
        held.append(sum(map(len, alive.values())))
        return tokenizer.encode(str(text))

    monkeypatch.setattr(Document, "text", property(watched))
    stub = SimpleNamespace(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    stub.keeps_lines, stub.encode = False, spy
    prepare(corpus, stub, tmp_path / "data", workers=1)
    total = sum(one.size for one in corpus.train + corpus.val)
    assert 500 < max(held) < 2 * (1_500 + 500) < total
    assert np.mean(held) < 2_000


CODE = st.lists(
    st.one_of(
        st.sampled_from(
            ["    ", "\t", "\n", "\r\n", "\r", " ", "def ", "'ll", "'S"]
        ),
        st.sampled_from(["x", "12345", *"\x00\x0b\x0c\x1c\x1f\x85\u2028"]),
        st.sampled_from(
            [*SPECIAL_TOKENS, "é", "٣", "\u017f", "'\u017f", "\u212a", "\xa0"]
        ),
        st.text(max_size=6),
        st.text(st.characters(max_codepoint=127), max_size=6),
    ),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    texts = [Path(x.__file__).read_text("utf-8") for x in (argparse, textwrap)]
    return Tokenizer.train(texts, 1200)


@settings(max_examples=500, deadline=None)
@given(CODE)
def test_the_memory_gives_what_the_tokenizer_gives(learnt, text: str) -> None:
    fast = FastEncoder(learnt)
    assert fast.encode(text) == learnt.encode(text)
    assert fast.encode(text) == learnt.encode(text)  # now from memory


def test_the_memory_on_real_files_and_when_it_is_full(learnt, monkeypatch) -> None:
    folder = Path(argparse.__file__).parent
    texts = [x.read_bytes().decode("utf-8", "replace") for x in folder.glob("*.py")]
    texts += [" " * 5000 + "x" * 5000 + "=" * 5000, ""]
    expected = learnt.encode_batch(texts)
    assert FastEncoder(learnt).encode_batch(texts) == expected
    monkeypatch.setattr(data, "REMEMBERED", 50)
    forgetful = FastEncoder(learnt)
    assert forgetful.encode_batch(texts[:20]) == expected[:20]
    assert len(forgetful) <= 50 and max(map(len, forgetful)) < 100


def test_every_character_of_the_basic_plane(learnt) -> None:
    """The library's classes of characters, one by one."""
    fast = FastEncoder(learnt)
    for code in [*range(0x3000), *range(0xFE00, 0x10000)]:
        text = f"a {chr(code)}b1{chr(code)}\n {chr(code)} \n  x\n'{chr(code)}s"
        assert fast.encode(text) == learnt.encode(text)


def test_a_tokenizer_of_another_rule_is_used_as_it_is() -> None:
    texts = [Path(textwrap.__file__).read_text("utf-8")]
    other = Tokenizer.train(texts, 500, pattern=GPT2_PATTERN)
    assert FastEncoder(other).encode_batch(texts) == other.encode_batch(texts)
    assert not FastEncoder(other)
