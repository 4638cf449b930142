"""The tokenizer: lossless, deterministic, deaf to spelled-out control tokens."""

import ast
import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from albor import tokenizer as module
from albor.artifacts import sha256_file
from albor.tokenizer import (
    BOS,
    EOS,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    GPT2_PATTERN,
    PAD,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    UNK,
    Tokenizer,
    TokenizerError,
    bytes_per_token,
)

# The modules of the toolchain that every test machine has: text with indentation.
LIBRARY = Path(ast.__file__).parent
TEXTS = [
    (LIBRARY / f"{name}.py").read_text(encoding="utf-8")
    for name in ("argparse", "dataclasses", "heapq", "textwrap", "json/decoder")
]
HARD = [
    "",
    "\x00",
    "\x00\x01\x7f\x80\x9f",
    "\ufeffdef f():\r\n\treturn 1\r\n",
    "\r\r\n\n\r",
    " " * 700 + "x" + "\t" * 90,
    "class A:\n" + "".join("    " * n + "if x:\n" for n in range(1, 60)),
    "naïve Ω 数据 😀 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200f\u202e\u2028\u2029\x85\x0b\x0c",
    "\ud7ff\ue000\ufffd\uffff\U0010ffff",
    " , . ? ! n't 's 'S I'm do n't  .  ",  # what clean-up rules like to mend
    "▁ Ġ Ċ ĉ ## </w> <0x0A>",  # marks that other tokenizers use inside
    "".join(SPECIAL_TOKENS),
    " </s>\n<s> <|fim_middle|><|endoftext|> <pad><unk>[MASK]",
    "<s" + ">" * 9 + "</s </S> < /s>",
    "1234567890 0x1f 1_000 ٣٤٥ ½ ²",
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(TEXTS, 1200)


def test_special_tokens_have_the_first_seven_ids(small: Tokenizer) -> None:
    assert (UNK, BOS, EOS, PAD) == (0, 1, 2, 3)
    assert (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE) == (4, 5, 6)
    assert small.decode(range(7)) == "".join(SPECIAL_TOKENS)
    assert small.vocab_size == 1200


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert not set(ids) & set(range(7))
    assert all(0 <= i < small.vocab_size for i in ids)


# Python text has few of the characters that break things, so we mix them in.
code = st.lists(
    st.one_of(
        st.sampled_from(
            ["    ", "\t", "\n", "\r\n", "\r", " ", "\x00", "def ", "'ll"]
        ),
        st.sampled_from(SPECIAL_TOKENS),
        st.text(max_size=6),
    ),
    max_size=30,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), code))
@example("\u0130 \u017f ß \ufb01")  # their length depends on their case
def test_any_text_comes_back(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(i > FIM_MIDDLE for i in ids)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_that_are_text_come_back(small: Tokenizer, data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    assert small.decode(small.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(code, max_size=8))
def test_batch_equals_one_by_one(small: Tokenizer, texts: list[str]) -> None:
    assert small.encode_batch(texts) == [small.encode(text) for text in texts]
    assert small.encode_batch(iter(texts)) == small.encode_batch(texts)


@settings(max_examples=300, deadline=None)
@given(code, st.text(" ", max_size=9), st.sampled_from("aß_0(#'\"λ"), code)
def test_prompt_is_a_prefix(
    small: Tokenizer, head: str, indent: str, first: str, tail: str
) -> None:
    """A prompt that ends a line, continued by a line that is not blank."""
    prompt = small.encode(head + "\n")
    whole = small.encode(head + "\n" + indent + first + tail)
    assert whole[: len(prompt)] == prompt


def test_prefix_property_can_fail() -> None:
    """GPT-2's rule fuses line end and indentation; the test above would see it."""
    fused = Tokenizer.train(TEXTS, 900, pattern=GPT2_PATTERN)
    prompt = fused.encode("def f():\n")
    assert fused.encode("def f():\n        return 1\n")[: len(prompt)] != prompt
    assert not fused.keeps_lines


@settings(max_examples=300, deadline=None)
@given(code, st.text(" \t", max_size=9), st.sampled_from("a_0(#'\""), code)
def test_a_line_has_its_tokens_whatever_stands_before(
    small: Tokenizer, head: str, indent: str, first: str, tail: str
) -> None:
    """What `keeps_lines` says: both sides of the line's beginning stand alone."""
    assert small.keeps_lines
    left, right = head + "\n", indent + first + tail
    assert small.encode(left + right) == small.encode(left) + small.encode(right)


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, r"\s+|\S+", r"[\s\S]"])
def test_another_rule_of_cutting_keeps_all_promises(
    pattern: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some rules run out of pairs
        other = Tokenizer.train(TEXTS[:2], 700, pattern=pattern)
    other.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == other.digest and not again.keeps_lines
    for text in HARD:
        ids = again.encode(text)
        assert ids == other.encode(text)
        assert again.decode(ids) == text and not set(ids) & set(range(7))


def test_the_original_rule_is_gpt2s() -> None:
    """As the library itself knows it."""
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    ours = module.pipeline(GPT2_PATTERN).pre_tokenizer
    for text in [*HARD, *TEXTS]:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize("pattern", ["(", "[", None, 3])
def test_a_rule_that_is_none_is_refused(pattern: object) -> None:
    with pytest.raises(TokenizerError, match="pattern = "):
        Tokenizer.train(TEXTS, 300, pattern=pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, "pickle"])
def test_a_copy_for_a_worker_process_stays_deaf(small: Tokenizer, how) -> None:
    """The library's own object, pickled, would hear the control tokens again."""
    if how == "pickle":
        again = pickle.loads(pickle.dumps(small))
        bare = pickle.loads(pickle.dumps(small._backend))
        assert EOS in bare.encode(HARD[11]).ids
    else:
        again = how(small)
    assert again.digest == small.digest
    assert again.encode_batch([*HARD, *TEXTS]) == small.encode_batch(
        [*HARD, *TEXTS]
    )


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=90), code))
def test_byte_lengths_add_up_to_the_text(small: Tokenizer, text: str) -> None:
    lengths = small.byte_lengths()
    ids = small.encode(text)
    assert sum(lengths[i] for i in ids) == len(text.encode())
    assert len(lengths) == small.vocab_size and not any(lengths[:7])
    assert min(lengths[7:]) == 1
    for cut in range(
        0, len(ids), 7
    ):  # a cut that is no character's end gives U+FFFD
        start = text.encode()[: sum(lengths[i] for i in ids[:cut])]
        assert small.decode(ids[:cut]) == start.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=9), st.integers(0xD800, 0xDFFF), st.text(max_size=9))
def test_lone_surrogates_are_refused(
    small: Tokenizer, before: str, code_point: int, after: str
) -> None:
    text = before + chr(code_point) + after
    expected = rf"U\+{code_point:04X} at position {len(before)}\b.*errors='strict'"
    for call in (
        lambda: small.encode(text),
        lambda: small.encode_batch(["fine", text]),
        lambda: Tokenizer.train(["fine", text], 300),
    ):
        with pytest.raises(TokenizerError, match=expected):
            call()


@pytest.mark.parametrize("bad", [b"bytes", None, 3, ["a"], ("a", "b")])
def test_what_is_no_text_is_refused(small: Tokenizer, bad: object) -> None:
    with pytest.raises(TokenizerError, match=type(bad).__name__):
        small.encode(bad)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=r"texts\[1\]"):
        small.encode_batch(["fine", bad])  # type: ignore[list-item]
    with pytest.raises(TokenizerError, match=r"texts\[0\]"):
        Tokenizer.train([bad], 300)  # type: ignore[list-item]


def test_one_text_for_many_is_refused(small: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"\[text\]"):
        small.encode_batch("one text")
    with pytest.raises(TokenizerError, match=r"\[text\]"):
        Tokenizer.train("one text", 300)


@pytest.mark.parametrize("ids", [[-1], [7, 1200], [65_535]])
def test_foreign_ids_are_refused(small: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(
        TokenizerError, match=f"id {ids[-1]} at position {len(ids) - 1}"
    ):
        small.decode(ids)


def test_half_a_character_decodes_to_the_replacement(small: Tokenizer) -> None:
    ids = small.encode("😀")
    assert len(ids) > 1
    assert set(small.decode(ids[:1])) == {"\ufffd"}


@pytest.mark.parametrize("size", [262, 65_537, 0, -5, 1000.0, "1000", True, None])
def test_impossible_vocabulary_sizes_are_refused(size: object) -> None:
    with pytest.raises(TokenizerError, match="263"):
        Tokenizer.train(TEXTS, size)  # type: ignore[arg-type]


@pytest.mark.parametrize("texts", [[], [""], iter(())])
def test_nothing_to_train_on_is_refused(texts: object) -> None:
    with pytest.raises(TokenizerError, match="no text"):
        Tokenizer.train(texts, 300)  # type: ignore[arg-type]


def test_bytes_alone_are_a_tokenizer() -> None:
    letters = Tokenizer.train(TEXTS[:1], 263)
    assert bytes_per_token(letters, HARD[1:]) == 1.0
    assert letters.decode(letters.encode(HARD[7])) == HARD[7]


def test_small_corpus_gives_a_smaller_vocabulary_and_says_so() -> None:
    with pytest.warns(UserWarning, match="of 32,768 entries"):
        tiny = Tokenizer.train(["return x\n"] * 3)
    assert 263 < tiny.vocab_size < 300
    assert tiny.decode(tiny.encode("yield y")) == "yield y"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer.train(TEXTS, 1000)


def test_control_tokens_never_grow_from_text() -> None:
    """A corpus full of sentinels teaches none, and does not break training."""
    texts = ["x = '</s><|fim_middle|>'\n<s>\n<pad>\n" * 40] * 3
    with pytest.warns(UserWarning):
        odd = Tokenizer.train(texts)
    assert min(odd.encode(texts[0])) > FIM_MIDDLE
    assert odd.decode(odd.encode(texts[0])) == texts[0]


@pytest.mark.parametrize(
    ("hash_seed", "threads"), [("0", "1"), ("1", "2"), ("12345", "5")]
)
def test_training_again_gives_the_same_bytes(
    small: Tokenizer, tmp_path: Path, hash_seed: str, threads: str
) -> None:
    """In another process, under another hash seed, with more or fewer threads."""
    script = (
        "import json, sys; from albor.tokenizer import Tokenizer; "
        "texts = json.load(open(sys.argv[1])); "
        "Tokenizer.train(iter(texts), 1200).save(sys.argv[2])"
    )
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed,
        "RAYON_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false" if threads == "1" else "true",
    }
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "texts.json", tmp_path / "made"],
        env=environment,
        check=True,
    )
    small.save(tmp_path / "here")
    here = (tmp_path / "here" / "tokenizer.json").read_bytes()
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == here


def test_saved_and_loaded_is_the_same(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "new" / "folder")
    file = tmp_path / "new" / "folder" / "tokenizer.json"
    for path in (file.parent, str(file.parent), file):
        again = Tokenizer.load(path)
        assert again.digest == small.digest == sha256_file(file)
        assert again.encode_batch(HARD) == small.encode_batch(HARD)
        assert again.vocab_size == small.vocab_size
    assert Tokenizer.train(TEXTS, 1201).digest != small.digest


def test_truncation_in_a_file_is_switched_off(
    small: Tokenizer, tmp_path: Path
) -> None:
    """Other programs save settings into tokenizer.json; text must stay whole."""
    small.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.enable_truncation(5)
    theirs.enable_padding(length=50)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == small.encode(TEXTS[0])


def word_level() -> str:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return backend.to_str()


def damaged(text: str, how: str) -> str | bytes:
    state = json.loads(text)
    if how == "cut off":
        return text[: len(text) // 2]
    if how == "empty":
        return ""
    if how == "binary":
        return b"\xff\xfe\x00" + text.encode()[:50]
    if how == "other JSON":
        return json.dumps({"vocab_size": 300})
    if how == "a list":
        return "[]"
    if how == "words":
        return word_level()
    if how == "sentinels swapped":
        for token in state["added_tokens"][1:3]:
            token["content"] = {"<s>": "</s>", "</s>": "<s>"}[token["content"]]
        vocabulary = state["model"]["vocab"]
        vocabulary["<s>"], vocabulary["</s>"] = (
            vocabulary["</s>"],
            vocabulary["<s>"],
        )
    if how == "a byte missing":
        del state["model"]["vocab"]["!"]
        state["model"]["merges"] = [
            m for m in state["model"]["merges"] if "!" not in m
        ]
    if how == "tabs to blanks":
        replace = {
            "type": "Replace",
            "pattern": {"String": "\t"},
            "content": "    ",
        }
        state["normalizer"] = replace
    if how == "no decoder":
        state["decoder"] = None
    return json.dumps(state)


DAMAGE = "cut off, empty, binary, other JSON, a list, words, sentinels swapped"
DAMAGE += ", a byte missing, tabs to blanks, no decoder"


@pytest.mark.parametrize("how", DAMAGE.split(", "))
def test_damaged_and_foreign_files_are_refused(
    small: Tokenizer, tmp_path: Path, how: str
) -> None:
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = damaged(file.read_text(encoding="utf-8"), how)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*(copy|train)"):
        Tokenizer.load(tmp_path)


def test_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.json"):
        with pytest.raises(TokenizerError, match=r"no tokenizer at .*json|nowhere"):
            Tokenizer.load(path)


def test_split_pattern_cuts_code_where_it_should() -> None:
    rule = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")

    def cut(text: str) -> list[str]:
        return [piece for piece, _ in rule.pre_tokenize_str(text)]

    assert cut("    return x") == ["   ", " return", " x"]
    assert cut("\n\n        x") == ["\n\n", "       ", " x"]
    assert cut("f(1234567)") == ["f", "(", "123", "456", "7", ")"]
    assert cut("it's I'LL") == ["it", "'s", " I", "'LL"]
    assert cut("x);\r\n\ty") == ["x", ");\r\n", "\ty"]
    assert cut("_private") == ["_private"]


@pytest.mark.parametrize("with_model", [False, True])
def test_transformers_gives_the_same_ids(
    small: Tokenizer, tmp_path: Path, with_model: bool
) -> None:
    """Also beside a Llama config.json, for which transformers has its own rules."""
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    if with_model:
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, *TEXTS]:
        ids = small.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == small.vocab_size
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    named = theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id
    assert (*named, theirs.pad_token_id) == (UNK, BOS, EOS, PAD)
    assert sorted(theirs.all_special_ids) == list(range(7))


def test_bytes_per_token_counts_bytes(small: Tokenizer) -> None:
    text = "é" * 10
    assert bytes_per_token(small, [text, ""]) == 20 / len(small.encode(text))
    with pytest.raises(TokenizerError, match="non-empty"):
        bytes_per_token(small, [""])
    with pytest.raises(TokenizerError, match="non-empty"):
        bytes_per_token(small, [])
