"""Text: stops across token borders, whole characters, batches, streams, gaps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albor import completion as module
from albor.completion import (
    Completion,
    Writer,
    complete_batch,
    completer,
    infill,
    stream,
    token_bytes,
)
from albor.decode import New, Slots
from albor.fim import infill_prompt
from albor.generate import GenerateError, complete, generate
from albor.model import Albor
from albor.shapes import ModelConfig
from albor.tokenizer import EOS, FIM_PREFIX, Tokenizer

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=60,
    initializer_range=0.3,
)
TEXTS = ["def f(x):\n    return x + 1\n\n\n", "class A:\n    pass\n\n\n"] * 2
PROMPTS = ["def f(x", "class A:\n    pass\n", "", "é🐍 </s>", "    return x +"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=288)


@pytest.fixture(scope="module")
def model():
    return Albor(CONFIG, seed=1)


# --- tokens to text ----------------------------------------------------------


def test_the_bytes_of_tokens_are_those_of_texts(tokenizer):
    pieces = token_bytes(tokenizer)
    assert [*map(len, pieces)] == tokenizer.byte_lengths()
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)
    text = "".join(map(chr, range(0x250))) + "€🐍\r\n\t" + TEXTS[0]
    assert b"".join(pieces[i] for i in tokenizer.encode(text)) == text.encode()


def reference(text, stops):
    """The text, letter by letter, until it ends with a stop."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=400, deadline=None)
@given(
    st.text("ab\né🐍", max_size=25),
    st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=4),
    st.data(),
)
def test_any_cut_into_tokens_gives_the_same_text(text, stops, data):
    whole, parts = text.encode(), []
    while whole:
        size = data.draw(st.integers(1, 6))
        parts.append(whole[:size])
        whole = whole[size:]
    writer, shown = Writer(parts, stops), ""
    for token in range(len(parts)):
        shown += writer.add(token)
        assert reference(text, stops).startswith(shown)
    shown += writer.finish()
    assert shown == writer.text == reference(text, stops)
    assert writer.stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_half_characters_are_never_given_out(missing):
    data = "ok 🐍".encode()
    pieces = [bytes([byte]) for byte in data]
    writer = Writer(pieces)
    shown = [writer.add(token) for token in range(len(data) - missing)]
    assert "".join(shown) + writer.finish() == "ok "


def test_a_replacement_character_of_the_text_is_text():
    pieces = [bytes([byte]) for byte in "\N{REPLACEMENT CHARACTER}x".encode()]
    writer = Writer(pieces)
    assert [writer.add(i) for i in range(4)] == [
        "",
        "",
        "\N{REPLACEMENT CHARACTER}",
        "x",
    ]


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    writer = Writer([b"\xf0\x9f", b"a", b"\xff"])
    assert writer.add(0) == "" and writer.add(1) == "\N{REPLACEMENT CHARACTER}a"
    assert writer.add(2) == "\N{REPLACEMENT CHARACTER}" and writer.finish() == ""


def test_unknown_ids_have_no_text():
    writer = Writer([b"a"])
    assert writer.add(7) == "" and writer.add(0) == "a"


# --- completions -------------------------------------------------------------


def test_greedy_is_complete(model, tokenizer):
    for one, prompt in zip(
        complete_batch(model, tokenizer, PROMPTS, max_new_tokens=25),
        PROMPTS,
        strict=True,
    ):
        ids = [EOS, *tokenizer.encode(prompt)]
        # `complete` also strips whole bytes at the end that are no text.
        text = complete(model, tokenizer, prompt, max_new_tokens=25)
        assert one.text.rstrip("\N{REPLACEMENT CHARACTER}") == text
        stop = range(7)
        assert one.tokens == generate(model, ids, max_new_tokens=25, stop=stop)
        assert len(one.logprobs) == len(one.tokens) and max(one.logprobs) <= 0
        reason = "stop" if one.tokens[-1] < 7 else "length"
        assert one.ended == reason


DRAWN = {"max_new_tokens": 25, "temperature": 1.0, "top_p": 0.9, "top_k": 40}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_samples_do_not_depend_on_the_batch(model, tokenizer, batch_size):
    texts = [PROMPTS[0]] * 3 + PROMPTS
    whole = complete_batch(model, tokenizer, texts, seed=3, **DRAWN)
    assert len({one.text for one in whole[:4]}) == 4
    cut = [6, 1, 4]
    part = complete_batch(
        model,
        tokenizer,
        [texts[i] for i in cut],
        rows=cut,
        seed=3,
        batch_size=batch_size,
        **DRAWN,
    )
    for i, one in zip(cut, part, strict=True):
        assert (one.text, one.tokens) == (whole[i].text, whole[i].tokens)
    other = complete_batch(model, tokenizer, texts, seed=4, **DRAWN)
    assert [one.text for one in other] != [one.text for one in whole]


def test_a_stop_text_ends_the_work(model, tokenizer):
    (free,) = complete_batch(model, tokenizer, ["def"], seed=3, **DRAWN)
    assert len(free.text) > 6
    stop = free.text[3:5]
    (one,) = complete_batch(model, tokenizer, ["def"], seed=3, stop=[stop], **DRAWN)
    assert one.text == free.text[: free.text.index(stop)] and one.ended == "stop"
    assert one.tokens == free.tokens[: len(one.tokens)]
    writer = Writer(token_bytes(tokenizer), [stop])
    for token in one.tokens:
        assert not writer.stopped  # not a token too many
        writer.add(token)
    assert writer.stopped


@pytest.mark.parametrize("options", [{}, {"stop": ["\n", "re"]}, {"seed": 9}])
def test_a_stream_is_the_completion(model, tokenizer, options):
    for row, prompt in enumerate(PROMPTS):
        how = DRAWN | {"temperature": 2.0} | options
        pieces = list(stream(model, tokenizer, prompt, row=row, **how))
        (one,) = complete_batch(model, tokenizer, [prompt], rows=[row], **how)
        assert "".join(pieces) == one.text and all(pieces)


def test_a_stream_stops_the_model_when_it_is_left(model, tokenizer, monkeypatch):
    steps = []
    step = Slots.step

    def counted(self, ids, at):
        steps.append(ids)
        return step(self, ids, at)

    monkeypatch.setattr(Slots, "step", counted)
    pieces = stream(model, tokenizer, "def", **DRAWN)
    next(pieces)
    seen = len(steps)
    pieces.close()
    assert len(steps) == seen < 24


def fake_decode(monkeypatch, ids):
    """Make `decode` write these ids; keep what it was asked."""
    asked = []

    def fake(model, prompts, *, ended, stop, **options):
        asked.append((prompts, options))
        for i, _ in enumerate(prompts):
            for place, token in enumerate(ids):
                over = ended(i, token) or token in stop
                last = over or place == len(ids) - 1
                why = ("stop" if over else "length") if last else ""
                yield New(i, token, -0.5, why)
                if over:
                    break

    monkeypatch.setattr(module, "decode", fake)
    return asked


def test_a_control_token_has_no_text(model, tokenizer, monkeypatch):
    ids = tokenizer.encode("pass\n")
    for sign in (EOS, FIM_PREFIX):
        asked = fake_decode(monkeypatch, [*ids, sign, *ids])
        (one,) = complete_batch(model, tokenizer, ["x</s>"])
        assert one == Completion(
            "pass\n", [*ids, sign], [-0.5] * (len(ids) + 1), "stop"
        )
        assert asked[0][0] == [[EOS, *tokenizer.encode("x</s>")]]


def test_what_was_held_back_is_text_in_the_end(model, tokenizer, monkeypatch):
    fake_decode(monkeypatch, tokenizer.encode("x\n    de"))
    (one,) = complete_batch(model, tokenizer, [""], stop=["\n    def"])
    assert one.text == "x\n    de" and one.ended == "length"
    fake_decode(monkeypatch, tokenizer.encode("x🐍")[:-1])
    assert complete_batch(model, tokenizer, [""])[0].text == "x"


# --- gaps --------------------------------------------------------------------


@pytest.mark.parametrize("style", ["psm", "spm"])
def test_infilling_is_the_completion_of_its_prompt(model, tokenizer, style):
    prompt = infill_prompt(tokenizer, "def f(", "):\n", style)
    new = generate(model, prompt, max_new_tokens=20, stop=range(7))
    known = [token for token in new if 7 <= token < tokenizer.vocab_size]
    found = infill(
        model, tokenizer, "def f(", "):\n", style=style, max_new_tokens=20
    )
    sign = "\N{REPLACEMENT CHARACTER}"
    assert found.rstrip(sign) == tokenizer.decode(known).rstrip(sign)


def test_a_gap_in_the_cell_or_its_end(model, tokenizer, monkeypatch):
    fake_decode(monkeypatch, [*tokenizer.encode("x + 1"), EOS])
    cells, magics = [], {}

    class Shell:
        def set_next_input(self, text, replace):
            assert replace
            cells.append(text)

        def register_magic_function(self, function, kind, name):
            assert kind == "cell"
            magics[name] = function

    fill = completer(model, tokenizer, shell=Shell())
    assert fill("a = <?>\n") == "a = x + 1\n"
    assert fill("a = ") == "a = x + 1"
    magics["complete"]("", "b = <?>; c\n")
    assert cells == ["b = x + 1; c"]


# --- refusals ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"stop": "\ndef"}, "stop is one str"),
        ({"stop": ["a", ""]}, r"stop\[1\] is ''"),
        ({"stop": [3]}, r"stop\[0\] is 3"),
        ({"top_k": -1}, "top_k must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"rows": [1, 2]}, "2 rows for 1 prompts"),
        ({"batch_size": 0}, "slots must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_impossible_requests_are_refused(model, tokenizer, bad, message):
    with pytest.raises(GenerateError, match=message):
        complete_batch(model, tokenizer, ["x"], **bad)


def test_a_larger_tokenizer_is_refused(tokenizer):
    with torch.device("meta"):
        small = Albor(
            ModelConfig(
                vocab_size=265,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=1,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=10,
                max_position_embeddings=40,
            )
        )
    with pytest.raises(GenerateError, match="entries, the model 265"):
        complete_batch(small, tokenizer, ["x"])


def test_no_texts_give_nothing(model, tokenizer):
    assert complete_batch(model, tokenizer, []) == []
