"""Fill-in-the-middle: exact both ways, whole in its row, drawn from keys alone."""

import argparse
import dataclasses
import heapq
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from albor.fim import (
    STYLES,
    Encoded,
    FimError,
    Rows,
    arrange,
    decode_parts,
    draw,
    encode_parts,
    find_samples,
    infill_prompt,
    pack_rows,
    split_text,
)
from albor.tokenizer import (
    EOS,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    TokenizerError,
)

TEXTS = [inspect.getsource(m) for m in (argparse, dataclasses, heapq, textwrap)]
TRAP = "</s> <|fim_prefix|><|fim_suffix|> <|fim_middle|>\r\n\tpass\x00 </s>"
SIGNS = [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 1200)


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Tokenizer) -> list[Tokenizer]:
    """Ours, one that cuts by another rule, and one whose every token is a byte."""
    other = Tokenizer.train(TEXTS, 900, pattern=GPT2_PATTERN)
    return [tokenizer, other, Tokenizer.train(TEXTS[:1], 263)]


# Code-like texts, with all that breaks things mixed in; no lone surrogates.
characters = st.characters(exclude_categories=["Cs"])
texts = st.lists(
    st.one_of(
        st.sampled_from(["    ", "\t", "\n", "\r\n", "\r", " ", "\x00", "\n\n"]),
        st.sampled_from(
            ["def f(", "return x", "'ll", "1234567", "é", "🐍", "数据"]
        ),
        st.sampled_from(["\n    x = 1", "\n\t# naïve", "\u2028", "\x85", "\x0b"]),
        st.sampled_from(SPECIAL_TOKENS),
        st.text(characters, max_size=6),
    ),
    max_size=40,
).map("".join)
styles = st.sampled_from(STYLES)


# --- cutting ----------------------------------------------------------------------


@given(st.text(characters), st.text(), st.integers(0, 2**63))
def test_parts_join_to_the_text(text: str, key: str, seed: int) -> None:
    parts = split_text(text, key, seed)
    assert "".join(parts) == text
    assert parts == split_text(text, key, seed)


def test_cuts_are_the_same_on_every_machine() -> None:
    """Written down once: a change here is a change of everybody's data."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pinned = "abcdefghijk", "lmnop", "qrstuvwxyz"
    assert split_text(letters, "a/b.py", 3) == pinned
    assert split_text(letters, "a/b.py", 4) != pinned
    assert split_text(letters, "a/c.py", 3) != pinned


def test_every_place_is_cut_equally_often() -> None:
    text, draws = "x" * 6, 7000
    cuts = np.zeros(7, dtype=int)
    for i in range(draws):
        prefix, middle, _ = split_text(text, str(i))
        cuts[len(prefix)] += 1
        cuts[len(prefix) + len(middle)] += 1
    assert (abs(cuts - 2 * draws / 7) < 5 * (2 * draws / 7) ** 0.5).all(), cuts


def test_the_three_draws_are_independent() -> None:
    drawn = np.array([draw(5, f"{i}.py") for i in range(4000)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert (abs(np.corrcoef(drawn.T) - np.eye(3)) < 0.08).all()
    assert (abs(drawn.mean(axis=0) - 0.5) < 0.03).all()


# --- one sample -------------------------------------------------------------------


@settings(max_examples=300)
@given(texts, texts, texts, styles, st.booleans())
@example("", "", "", "psm", True)
@example("", "", "", "spm", False)
@example("x = '\r", "\n", "'\n", "psm", False)  # a cut inside CRLF
@example("e", "\u0301", "\ufeff", "spm", True)  # a cut inside a grapheme
def test_a_sample_gives_its_parts_back(
    tokenizer: Tokenizer,
    prefix: str,
    middle: str,
    suffix: str,
    style: str,
    ended: bool,
) -> None:
    ids = encode_parts(tokenizer, prefix, middle, suffix, style, ended)
    p, m, s = (tokenizer.encode(part) for part in (prefix, middle, suffix))
    told = {"psm": [4, *p, 5, *s, 6, *m], "spm": [4, 5, *s, 6, *p, *m]}[style]
    assert ids == told + [EOS] * ended
    found = decode_parts(tokenizer, np.array(ids, dtype=np.uint16))
    if style == "psm":
        assert found == (prefix, middle, suffix)
    else:
        assert found == ("", prefix + middle, suffix)
    prompt = infill_prompt(tokenizer, prefix, suffix, style)
    assert [EOS, *ids][: len(prompt)] == prompt
    assert [EOS, *ids][len(prompt) :] == m + [EOS] * ended


def test_text_that_spells_signs_gives_no_orders(tokenizer: Tokenizer) -> None:
    for style in STYLES:
        for i in range(len(TRAP)):
            for j in range(i, len(TRAP), 3):
                ids = encode_parts(tokenizer, TRAP[:i], TRAP[i:j], TRAP[j:], style)
                assert [x for x in ids if x < 7] == [*SIGNS, EOS], (style, i, j)
                assert "".join(decode_parts(tokenizer, ids)) == TRAP, (style, i, j)


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [EOS],
        [50, 51],
        [4, 50, 5, 51],
        [4, 50, 6, 51, 5, 52],
        [50, 4, 5, 6],
        [4, 5, 6, EOS, EOS],
        [4, 5, EOS, 6],
        [EOS, 4, 5, 6],
        [4, 5, 6, 4, 5, 6],
        [4, 5, 6, 50, 3],
        [4, 0, 5, 6],
    ],
)
def test_what_is_no_sample_is_refused(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(FimError, match=r"no sample.*\[4, 5, 6\]"):
        decode_parts(tokenizer, ids)


@pytest.mark.parametrize("style", ["PSM", "", "msp", None])
def test_unknown_styles_are_refused(tokenizer: Tokenizer, style: str) -> None:
    for attempt in (
        lambda: encode_parts(tokenizer, "a", "b", "c", style),
        lambda: infill_prompt(tokenizer, "a", "c", style),
        lambda: pack_rows(["a"], ["k"], tokenizer, row_tokens=9, style=style),
        lambda: arrange([], [], [], style),
    ):
        with pytest.raises(FimError, match="psm, spm"):
            attempt()


# --- pieces of a document ---------------------------------------------------------


@settings(max_examples=300)
@given(texts, st.data())
def test_a_piece_has_the_ids_that_the_tokenizer_gives(
    tokenizers: list[Tokenizer], text: str, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(text)))
    last = data.draw(st.integers(first, len(text)))
    places = [len(text[:i].encode()) for i in (first, last)]
    for tokenizer in tokenizers:
        widths = np.array(tokenizer.byte_lengths())
        document = Encoded(tokenizer, text, tokenizer.encode(text), widths)
        assert document.encode(*places) == tokenizer.encode(text[first:last])


def test_whole_lines_are_copied_where_the_rule_allows_it(
    tokenizers: list[Tokenizer],
) -> None:
    copies = []
    for tokenizer in tokenizers:
        widths = np.array(tokenizer.byte_lengths())
        for text in TEXTS:
            document = Encoded(tokenizer, text, tokenizer.encode(text), widths)
            copies.append(len(document.lines))
            for first in range(0, len(text), 997):
                piece = text[first : first + 2500]
                begin = len(text[:first].encode())
                places = begin, begin + len(piece.encode())
                assert document.encode(*places) == tokenizer.encode(piece)
    assert min(copies[:4]) > 50, "ours copies"
    assert max(copies[4:8]) == 0, "GPT-2's rule reaches across lines"


# --- rows -------------------------------------------------------------------------


def pieces(rows: Rows, row_tokens: int, index: int) -> Iterator[list[int]]:
    """What of a document lies in each row that it touches."""
    first, last = rows.starts[index : index + 2].tolist()
    while first < last:
        stop = min(last, first // row_tokens * row_tokens + row_tokens)
        yield rows.ids[first:stop].tolist()
        first = stop


def restore(
    tokenizer: Tokenizer, rows: Rows, row_tokens: int, index: int
) -> tuple[str, int]:
    """A document's text, read from its rows, and how many `</s>` it has."""
    text, plain, ends = "", [], 0
    for piece in pieces(rows, row_tokens, index):
        ends += piece.count(EOS)
        assert EOS not in piece[:-1], "an end inside a document"
        if FIM_PREFIX in piece:
            at = piece.index(FIM_PREFIX)
            text += tokenizer.decode(plain + piece[:at])
            text += "".join(decode_parts(tokenizer, piece[at:]))
            plain = []
        else:
            plain += [i for i in piece if i != EOS]
    return text + tokenizer.decode(plain), ends


def check_rows(
    tokenizer: Tokenizer,
    rows: Rows,
    documents: list[str],
    row_tokens: int,
    style: str,
) -> None:
    """All that every packing promises."""
    ids = rows.ids
    assert ids.dtype == np.uint16 and rows.starts.dtype == np.uint64
    assert len(ids) % row_tokens == 0 and 0 <= rows.dropped < row_tokens
    assert not len(ids) or ids[0] == EOS
    assert len(rows.starts) == len(documents) + 1 and rows.starts[-1] == len(ids)
    assert (np.diff(rows.starts.astype(np.int64)) >= 0).all()
    ends = int((ids == EOS).sum())
    assert len(ids) == ends + rows.plain.sum() + rows.overhead
    counts = [int((ids == sign).sum()) for sign in SIGNS]
    assert counts == [rows.samples] * 3 and rows.samples <= rows.fragments
    assert ends + 3 * rows.samples == int((ids < 7).sum()), "a sign from a text"

    for where in find_samples(ids, row_tokens):
        assert where.start // row_tokens == (where.stop - 1) // row_tokens
        sample = ids[where].tolist()
        parts = decode_parts(tokenizer, sample)
        ended = sample[-1] == EOS
        assert ended or where.stop % row_tokens == 0, "no end, and the row not full"
        if style == "psm":  # the parts, encoded anew, are the sample
            assert encode_parts(tokenizer, *parts, style, ended) == sample

    for index, text in enumerate(documents):
        plain = len(tokenizer.encode(text))
        found, ended = restore(tokenizer, rows, row_tokens, index)
        if rows.starts[index + 1] < len(ids):
            assert (found, ended) == (text, 1)
            assert rows.plain[index] == plain
        else:
            assert text.encode().startswith(found.rstrip("\ufffd").encode())
            assert rows.plain[index] <= plain


@settings(max_examples=300)
@given(
    st.lists(texts, max_size=7),
    st.integers(4, 67),
    st.sampled_from([0, 0.5, 1.0]),
    styles,
    st.integers(0, 99),
)
def test_any_texts_lie_in_rows_and_come_back(
    tokenizers: list[Tokenizer],
    documents: list[str],
    row_tokens: int,
    rate: float,
    style: str,
    seed: int,
) -> None:
    keys = [f"{i}.py" for i in range(len(documents))]
    for tokenizer in tokenizers:
        rows = pack_rows(
            documents,
            keys,
            tokenizer,
            row_tokens=row_tokens,
            rate=rate,
            style=style,
            seed=seed,
        )
        check_rows(tokenizer, rows, documents, row_tokens, style)
        if rate == 0:
            assert rows.samples == rows.overhead == 0


@pytest.mark.parametrize("row_tokens", [31, 256, 1024])
@pytest.mark.parametrize("style", STYLES)
def test_real_modules_in_rows(
    tokenizer: Tokenizer, row_tokens: int, style: str
) -> None:
    documents = [*TEXTS, TRAP, "é🐍数据\n" * 300, *TEXTS[::-1]]
    keys = [f"{i}.py" for i in range(len(documents))]
    options = {"row_tokens": row_tokens, "style": style}
    rows = pack_rows(documents, keys, tokenizer, **options)
    check_rows(tokenizer, rows, documents, row_tokens, style)
    spread = (rows.fragments / 4) ** 0.5
    assert abs(rows.samples - rows.fragments / 2) < 5 * spread
    every = pack_rows(documents, keys, tokenizer, **options, rate=1)
    check_rows(tokenizer, every, documents, row_tokens, style)
    assert every.samples > 0.95 * every.fragments, "too few found their room"


def test_no_samples_means_the_flat_stream(tokenizer: Tokenizer) -> None:
    documents = [*TEXTS, "", TRAP]
    flat = [EOS]
    starts = []
    for text in documents:
        starts.append(len(flat))
        flat += [*tokenizer.encode(text), EOS]
    rows = pack_rows(documents, "abcdef", tokenizer, row_tokens=11, rate=0)
    kept = len(flat) // 11 * 11
    assert rows.ids.tolist() == flat[:kept]
    assert rows.starts.tolist() == [min(start, kept) for start in (*starts, kept)]
    assert rows.dropped == len(flat) - kept and rows.fragments > 0


def test_a_draw_depends_on_seed_key_and_fragment_alone(
    tokenizer: Tokenizer,
) -> None:
    """The same document, wherever it lies and whoever lies before it."""
    text, other = TEXTS[2][:3000], TEXTS[3][:2000]

    def told(documents: dict[str, str], seed: int = 0) -> list[int]:
        rows = pack_rows(
            list(documents.values()),
            list(documents),
            tokenizer,
            row_tokens=4096,
            rate=1,
            seed=seed,
        )
        where = list(documents).index("a.py")
        return rows.ids[slice(*rows.starts[where : where + 2])].tolist()

    tail = {"z.py": TEXTS[0][:40_000]}  # so that no row of interest is dropped
    alone = told({"a.py": text} | tail)
    assert alone[0] == FIM_PREFIX and alone[-1] == EOS
    assert told({"b.py": other, "a.py": text} | tail) == alone
    assert told({"a.py": text, "b.py": other} | tail) == alone
    assert told({"a.py": text} | tail, seed=1) != alone
    parts = decode_parts(tokenizer, alone)
    assert parts == split_text(text, "0:a.py", 0)


def test_both_styles_tell_the_same_fragments(tokenizer: Tokenizer) -> None:
    """They differ in the order within samples, and in nothing else."""
    options = {"row_tokens": 96, "rate": 0.7, "seed": 3}
    psm = pack_rows(TEXTS, "abcd", tokenizer, **options)
    spm = pack_rows(TEXTS, "abcd", tokenizer, **options, style="spm")
    assert (psm.starts == spm.starts).all() and (psm.plain == spm.plain).all()
    assert (psm.samples, psm.overhead) == (spm.samples, spm.overhead)
    places = find_samples(psm.ids, 96)
    assert find_samples(spm.ids, 96) == places
    outside = np.ones(len(psm.ids), dtype=bool)
    for where in places:
        one, other = psm.ids[where].tolist(), spm.ids[where].tolist()
        at, end = one.index(FIM_SUFFIX), one.index(FIM_MIDDLE)
        told = [FIM_PREFIX, *one[at : end + 1], *one[1:at], *one[end + 1 :]]
        assert other == told
        outside[where] = False
    assert (psm.ids[outside] == spm.ids[outside]).all()


@pytest.mark.parametrize(("hash_seed", "threads"), [("0", "1"), ("77", "3")])
def test_another_process_makes_the_same_rows(
    tokenizer: Tokenizer, tmp_path: Path, hash_seed: str, threads: str
) -> None:
    """Under another hash seed, with more threads, and with dice thrown before."""
    script = (
        "import random, sys, numpy; from albor.fim import pack_rows; "
        "from albor.tokenizer import Tokenizer; from pathlib import Path; "
        "random.seed(); numpy.random.rand(3); folder = Path(sys.argv[1]); "
        "texts = [(folder / name).read_text() for name in 'abc']; "
        "rows = pack_rows(texts, 'abc', Tokenizer.load(folder), row_tokens=100); "
        "numpy.save(folder / 'rows.npy', rows.ids)"
    )
    tokenizer.save(tmp_path)
    for name, text in zip("abc", TEXTS[1:], strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "RAYON_NUM_THREADS": threads,
        "PYTHONUTF8": "1",
    }
    subprocess.run(
        [sys.executable, "-c", script, tmp_path], env=environment, check=True
    )
    here = pack_rows(TEXTS[1:], "abc", tokenizer, row_tokens=100)
    assert (np.load(tmp_path / "rows.npy") == here.ids).all() and here.samples > 20


def test_characters_that_fit_no_row_stay_in_order() -> None:
    """Four tokens to a character, and 3 signs: 29 tokens hold no whole number."""
    letters = Tokenizer.train(TEXTS[:1], 263)
    documents = ["🐍" * 400]
    rows = pack_rows(documents, ["a"], letters, row_tokens=32, rate=1)
    check_rows(letters, rows, documents, 32, "psm")
    assert rows.samples < rows.fragments
    fitting = pack_rows(["ab" + "🐍" * 400], ["a"], letters, row_tokens=33, rate=1)
    assert fitting.samples > 0


@pytest.mark.parametrize("row_tokens", [4, 5, 6, 7])
def test_the_smallest_rows(tokenizer: Tokenizer, row_tokens: int) -> None:
    documents = ["x", "def f(x):\n    return x\n", "", "🐍\r\n"] * 3
    keys = [str(i) for i in range(12)]
    rows = pack_rows(documents, keys, tokenizer, row_tokens=row_tokens, rate=1)
    check_rows(tokenizer, rows, documents, row_tokens, "psm")
    assert rows.samples > 0


def test_nothing_to_pack_makes_no_rows(tokenizer: Tokenizer) -> None:
    for documents in ([], [""], ["x = 1\n"]):
        keys = ["k"] * len(documents)
        rows = pack_rows(documents, keys, tokenizer, row_tokens=64, rate=1)
        assert len(rows.ids) == rows.samples == rows.fragments == 0
        assert rows.starts.tolist() == [0] * (len(documents) + 1)
        assert rows.dropped >= 1 and rows.plain.sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_tokens": 3}, "row_tokens = 3"),
        ({"row_tokens": 64.0}, "row_tokens = 64.0"),
        ({"rate": 1.01}, "rate = 1.01"),
        ({"rate": -0.5}, "rate = -0.5"),
        ({"rate": float("nan")}, "rate = nan"),
        ({"keys": ["a"]}, "2 texts, 1 keys"),
    ],
)
def test_wrong_settings_are_refused(
    tokenizer: Tokenizer, change: dict, message: str
) -> None:
    settings = {"texts": ["x", "y"], "keys": ["a", "b"], "row_tokens": 64} | change
    with pytest.raises(FimError, match=message):
        pack_rows(tokenizer=tokenizer, **settings)


def test_a_text_that_cannot_be_encoded_is_named_by_its_key(
    tokenizer: Tokenizer,
) -> None:
    texts, keys = ["fine"] * 70 + ["x\ud83d"], [f"{i}.py" for i in range(71)]
    with pytest.raises(
        TokenizerError, match=r"'70\.py' has .*U\+D83D at position 1"
    ):
        pack_rows(texts, keys, tokenizer, row_tokens=64)
