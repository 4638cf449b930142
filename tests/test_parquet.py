"""Token rows of others: whose they are, and what is read from Parquet."""

import builtins
import inspect
import itertools
import json
import textwrap

import numpy as np
import pytest

from albor import parquet as module
from albor.parquet import DataError, _ended, _groups, import_parquet, native_share
from albor.shards import TokenStream, is_whole
from albor.tokenizer import EOS, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer

TEXT = inspect.getsource(textwrap)
TEXTS = [TEXT[i : i + 400] for i in range(0, len(TEXT), 400)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=500)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return tokenizer.encode_batch(TEXTS)


# --- whose ids --------------------------------------------------------------


def test_own_ids_come_back(tokenizer, rows):
    assert native_share([np.array(row) for row in rows], tokenizer) == 1.0
    flat = np.array([*itertools.chain(*rows)])
    torn = np.split(flat, range(5, len(flat), 13))
    assert native_share(torn, tokenizer) > 0.95
    a, b, c = rows[:3]
    signs = [FIM_PREFIX, *a, FIM_SUFFIX, *b, FIM_MIDDLE, *c, EOS, *a]
    assert native_share([np.array(signs)], tokenizer) == 1.0
    assert native_share([], tokenizer) == 0.0


@pytest.mark.parametrize("size", [450, 400, 300])
def test_ids_of_others_do_not(tokenizer, size):
    other = Tokenizer.train(TEXTS[::2], vocab_size=size)
    ids = [np.array(row) for row in other.encode_batch(TEXTS)]
    assert native_share(ids, tokenizer) < 0.95


# --- documents and groups ---------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([], [EOS]),
        ([EOS], [EOS]),
        ([9, 8], [9, 8, EOS]),
        ([9, 8, EOS], [9, 8, EOS]),
        ([EOS, 9, 8], [9, 8, EOS]),
        ([EOS, 9, EOS], [9, EOS]),
    ],
)
def test_a_document_has_one_end(row, expected):
    ended = _ended(np.array(row, np.uint16))
    assert ended.tolist() == expected and ended.dtype == np.uint16


def test_groups_keep_all_rows_in_order():
    rows = [(str(i), np.zeros(i % 5, np.uint16)) for i in range(40)]
    groups = list(_groups(iter(rows), 7))
    assert [*itertools.chain(*groups)] == rows
    sizes = [sum(len(row) for _, row in group) for group in groups]
    assert all(7 <= size < 7 + 5 for size in sizes[:-1])
    assert list(_groups(iter([]), 7)) == []


def test_without_pyarrow_the_error_says_so(tokenizer, tmp_path, monkeypatch):
    plain = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError, match=r"x\.parquet is Parquet.*pip install pyarrow"
    ):
        import_parquet("x.parquet", tokenizer, tmp_path, val="y.parquet")


# --- from rows to shards: without pyarrow, rows come from JSON ---------------


@pytest.fixture
def as_json(monkeypatch):
    """Let `import_parquet` read JSON in the place of Parquet."""

    def rows(file, column, vocab_size):
        yield [np.array(row, np.uint16) for row in json.loads(file.read_text())]

    def write(file, rows):
        file.write_text(json.dumps(rows))
        return file

    monkeypatch.setattr(module, "_parquet_rows", rows)
    return write


def test_rows_become_documents(tokenizer, rows, tmp_path, as_json, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TOKENS", 300)
    file = as_json(tmp_path / "a", [*rows[:9], [], rows[9]])
    held = as_json(tmp_path / "b", rows[10:14])
    folder = import_parquet(file, tokenizer, tmp_path, val=[held])
    train = TokenStream.open(folder, "train", tokenizer_digest=tokenizer.digest)
    expected = [EOS]
    for row in [*rows[:9], [], rows[9]]:
        expected += [*row, EOS]
    assert train.read(0, len(train)).tolist() == expected
    assert len(train.sources) > 2 and len(train.starts) == 12
    spans = itertools.pairwise(train.starts.tolist())
    found = [train.read(a, b - a - 1).tolist() for a, b in spans]
    assert found == [*rows[:9], [], rows[9]]
    assert import_parquet(file, tokenizer, tmp_path, val=held) == folder


def test_rows_become_a_stream(tokenizer, rows, tmp_path, as_json):
    flat = [*itertools.chain(*rows)]
    cut = [flat[i : i + 32] for i in range(0, len(flat) - 32, 32)]
    file, held = (
        as_json(tmp_path / "a", cut[:-5]),
        as_json(tmp_path / "b", cut[-5:]),
    )
    train = TokenStream.open(
        import_parquet(file, tokenizer, tmp_path, val=held), "train"
    )
    assert train.read(0, len(train)).tolist() == [*itertools.chain(*cut[:-5])]
    other = import_parquet(file, tokenizer, tmp_path, val=held, packed=False)
    assert len(TokenStream.open(other, "train")) == len(train) + len(cut) - 5 + 1


def test_rows_of_another_tokenizer_do_not(tokenizer, rows, tmp_path, as_json):
    other = Tokenizer.train(TEXTS[::2], vocab_size=450)  # all ids small enough
    file = as_json(tmp_path / "a", other.encode_batch(TEXTS))
    held = as_json(tmp_path / "b", rows)
    with pytest.raises(DataError, match=r"a: of its first ids.* come back.*check="):
        import_parquet(file, tokenizer, tmp_path, val=held)
    assert is_whole(
        import_parquet(file, tokenizer, tmp_path, val=held, check=False)
    )


# --- files: with pyarrow, which is not among the requirements -----------------


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow")


def write(path, rows, kind=None, column="input_ids", **options):
    import pyarrow
    from pyarrow import parquet

    cells = pyarrow.array(rows, type=kind)
    table = pyarrow.table({"text": ["x"] * len(rows), column: cells})
    parquet.write_table(table, path, **options)
    return path


def kinds(arrow):
    return [
        arrow.list_(arrow.int64()),
        arrow.list_(arrow.int32()),
        arrow.list_(arrow.uint16()),
        arrow.list_(arrow.uint64()),
        arrow.large_list(arrow.int32()),
        arrow.large_list(arrow.int64()),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("options", [{}, {"row_group_size": 3}])
def test_documents_of_any_type(tokenizer, rows, tmp_path, arrow, number, options):
    kind = kinds(arrow)[number]
    file = write(tmp_path / "a.parquet", [*rows[:9], [], rows[9]], kind, **options)
    held = write(tmp_path / "b.parquet", rows[10:14], kind, **options)
    folder = import_parquet(file, tokenizer, tmp_path, val=held)
    train = TokenStream.open(folder, "train", tokenizer_digest=tokenizer.digest)
    expected = [EOS]
    for row in [*rows[:9], [], rows[9]]:
        expected += [*row, EOS]
    assert train.read(0, len(train)).tolist() == expected
    assert len(train.starts) == 12 and train.starts[0] == 1
    val = TokenStream.open(folder, "val", verify=True)
    assert len(val) == 1 + sum(len(row) + 1 for row in rows[10:14])


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_of_one_length_are_laid_end_to_end(
    tokenizer, rows, tmp_path, arrow, fixed
):
    flat = [*itertools.chain(*rows)]
    cut = [flat[i : i + 32] for i in range(0, len(flat) - 32, 32)]
    kind = arrow.list_(arrow.int32(), 32) if fixed else arrow.list_(arrow.int32())
    file = write(tmp_path / "a.parquet", cut[:-5], kind, row_group_size=7)
    held = write(tmp_path / "b.parquet", cut[-5:], kind)
    folder = import_parquet(file, tokenizer, tmp_path, val=held)
    train = TokenStream.open(folder, "train")
    assert train.read(0, len(train)).tolist() == [*itertools.chain(*cut[:-5])]
    assert train.meta["inputs"]["packed"] is True
    other = import_parquet(file, tokenizer, tmp_path, val=held, packed=False)
    assert len(TokenStream.open(other, "train")) == len(train) + len(cut) - 5 + 1


def test_several_files_and_shards(tokenizer, rows, tmp_path, arrow, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TOKENS", 300)
    files = [
        write(tmp_path / f"{i}.parquet", rows[i * 8 : i * 8 + 8], column="ids")
        for i in range(3)
    ]
    made = import_parquet(
        files[:2], tokenizer, tmp_path, val=files[2:], column="ids"
    )
    train = TokenStream.open(made, "train")
    assert len(train.sources) > 2 and len(train.starts) == 17
    assert train.read(0, 1 + len(rows[0])).tolist() == [EOS, *rows[0]]
    listed = [
        shard["documents"] for shard in train.meta["splits"]["train"]["shards"]
    ]
    assert sum(listed) == 16
    before = {file.name: file.stat().st_ino for file in made.iterdir()}
    again = import_parquet(
        files[:2], tokenizer, tmp_path, val=files[2:], column="ids"
    )
    assert again == made and is_whole(made)
    assert before == {file.name: file.stat().st_ino for file in made.iterdir()}
    swapped = import_parquet(
        files[1::-1], tokenizer, tmp_path, val=files[2], column="ids"
    )
    assert swapped != made


def test_other_vocabularies_are_refused(tokenizer, rows, tmp_path, arrow):
    good = write(tmp_path / "good.parquet", rows)
    for bad in (500, -1, 2**40):
        ids = [*rows[:5], [9, 9, bad], *rows[5:]]
        file = write(tmp_path / "bad.parquet", ids, row_group_size=2)
        with pytest.raises(
            DataError, match=rf"bad\.parquet: token {bad} in row 5 "
        ):
            import_parquet(file, tokenizer, tmp_path, val=good)
    other = Tokenizer.train(TEXTS[::2], vocab_size=450)  # all ids small enough
    file = write(tmp_path / "other.parquet", other.encode_batch(TEXTS))
    for train, val in ((file, good), (good, file)):
        with pytest.raises(
            DataError, match=r"other\.parquet: .* come back.*check="
        ):
            import_parquet(train, tokenizer, tmp_path, val=val)
    folder = import_parquet(file, tokenizer, tmp_path, val=good, check=False)
    assert is_whole(folder)


def test_files_that_will_not_do(tokenizer, rows, tmp_path, arrow):
    good = write(tmp_path / "good.parquet", rows)
    (tmp_path / "none.parquet").write_bytes(b"nothing")

    def refused(file, message, **options):
        with pytest.raises(DataError, match=message):
            import_parquet(file, tokenizer, tmp_path, val=good, **options)

    refused(tmp_path / "none.parquet", r"none\.parquet is no Parquet file")
    refused(tmp_path / "lacking.parquet", r"lacking\.parquet is no Parquet file")
    refused(
        good, r"no column 'tokens', but \['text', 'input_ids'\]", column="tokens"
    )
    refused(good, "text is string; lists of integers", column="text")
    wrong = write(tmp_path / "w.parquet", [[0.5], [1.5]])
    refused(wrong, "input_ids is list.*double.*lists of integers")
    wrong = write(tmp_path / "w.parquet", [1, 2])
    refused(wrong, "input_ids is int64; lists of integers")
    wrong = write(tmp_path / "w.parquet", [[1], None])
    refused(wrong, "a null after row 0")
    wrong = write(tmp_path / "w.parquet", [[1, None], [2]])
    refused(wrong, "a null after row 0")
    wrong = write(tmp_path / "w.parquet", [[], []], arrow.list_(arrow.int8()))
    refused(wrong, "train: 0 tokens; give more text", packed=True)
