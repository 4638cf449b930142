"""Likelihoods against transformers, against sums by hand, and against bad input."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from albor.artifacts import to_json
from albor.likelihood import (
    Judged,
    LikelihoodError,
    Perplexity,
    judge,
    loglikelihood,
    perplexity,
    rolling,
    to_stream,
)
from albor.model import Albor
from albor.shapes import ModelConfig
from albor.tokenizer import EOS, Tokenizer, TokenizerError
from albor.train import evaluate_loss
from albor.weights import CheckpointError, load_model, save_model

SHAPE = ModelConfig(  # wide weights, so that probabilities are far from equal
    vocab_size=331,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=40,
    rms_norm_eps=3e-4,
    rope_theta=5000.0,
    initializer_range=0.2,
)
TEXT = "def area(width, height):\n    return width * height  # größe\n\n\n" * 5


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT * 3], vocab_size=290)


@pytest.fixture(scope="module")
def model():
    return Albor(SHAPE, seed=3)


@pytest.fixture(scope="module")
def theirs(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model, tokenizer)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def by_transformers(theirs, ids, count):
    logits = theirs(torch.tensor([ids[:-1]])).logits[0, -count:]
    goal = torch.tensor(ids[-count:])
    logprobs = -F.cross_entropy(logits.double(), goal, reduction="sum")
    return float(logprobs), bool((logits.argmax(-1) == goal).all())


def stream(ids):
    return np.array(ids, dtype=np.uint16)


# -------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("sequences", [0, 1, 3, 99])
@pytest.mark.parametrize("seq_len", [7, 40])
def test_the_loss_is_that_of_the_training_log(model, tokenizer, seq_len, sequences):
    tokens = stream([EOS, *tokenizer.encode(TEXT), EOS])
    found = perplexity(model, tokenizer, tokens, seq_len, sequences=sequences)
    loss, judged = evaluate_loss(model, tokens, seq_len, sequences=sequences)
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.tokens == judged == found.rows * found.seq_len
    assert found.perplexity == math.exp(found.loss)


def test_loss_error_and_bytes_by_hand(model, tokenizer, theirs):
    ids = [EOS, *tokenizer.encode("größe, größe"), EOS, *tokenizer.encode(TEXT)]
    found = perplexity(model, tokenizer, stream(ids), 9)
    rows = (len(ids) - 1) // 9
    losses = [
        -by_transformers(theirs, ids[r * 9 : r * 9 + 10], 9)[0] / 9
        for r in range(rows)
    ]
    assert found.rows == rows
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.error == pytest.approx(
        np.std(losses, ddof=1) / math.sqrt(rows), rel=1e-3
    )
    # Bytes by the alphabet: a letter of a token's name is a byte.
    names = tokenizer._backend.id_to_token
    judged = [i for i in ids[1 : rows * 9 + 1] if i != EOS]
    assert found.text_bytes == sum(len(names(i)) for i in judged)
    bits = sum(losses) * 9 / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / found.text_bytes, rel=1e-5)
    low, high = found.interval
    assert low == pytest.approx(found.perplexity * math.exp(-1.96 * found.error))
    assert high == pytest.approx(found.perplexity * math.exp(1.96 * found.error))


def test_texts_as_a_stream(tokenizer):
    tokens = to_stream(tokenizer, ["größe", "", TEXT])
    ids = [tokenizer.encode(text) for text in ("größe", TEXT)]
    assert tokens.tolist() == [EOS, *ids[0], EOS, EOS, *ids[1], EOS]
    assert tokens.dtype == np.uint16 and to_stream(tokenizer, []).tolist() == [EOS]
    with pytest.raises(TokenizerError, match="one str"):
        to_stream(tokenizer, TEXT)


def test_the_end_of_a_document_costs_bits_and_has_no_bytes(model, tokenizer):
    ids = tokenizer.encode(TEXT)[:20]
    one = perplexity(model, tokenizer, stream([EOS, *ids]), 20)
    two = perplexity(model, tokenizer, stream([EOS, *ids, EOS]), 21)
    assert two.text_bytes == one.text_bytes and two.tokens == one.tokens + 1
    assert two.loss * 21 > one.loss * 20


def test_a_record_is_json_whatever_the_numbers_are(model, tokenizer):
    single = perplexity(model, tokenizer, stream([EOS, 20, 30]), 99)
    assert single.rows == 1 and single.seq_len == 2
    assert single.error is None and single.interval is None
    huge = Perplexity(1e4, 1.0, 10, 2, 5, 0)
    assert huge.perplexity == math.inf and huge.interval is None
    for each in (single, huge):
        record = json.loads(to_json(each.record()))
        assert record["tokens"] == each.tokens
        assert record["perplexity_95"] is None
    assert huge.record()["perplexity"] is None


def test_what_cannot_be_judged_is_refused(model, tokenizer):
    for tokens, seq_len, words in (
        (stream([EOS]), 8, "1 tokens in rows of seq_len = 8"),
        (stream([EOS, 9, 9]), 0, "seq_len = 0"),
        (stream([EOS, 9, tokenizer.vocab_size]), 2, "another tokenizer"),
    ):
        with pytest.raises(LikelihoodError, match=words):
            perplexity(model, tokenizer, tokens, seq_len)
    with pytest.raises(ValueError, match="max_position_embeddings = 40"):
        perplexity(model, tokenizer, stream([EOS] * 60), 41)


# ------------------------------------------------------------------- likelihoods

PAIRS = [
    ("def area(width", ", height):"),
    ("    return", " width * height"),
    ("    return ", "width * height"),
    ("def f():\n    ", "return height\n"),
    ("größe = ", "größe\n\n"),
    ("", "def"),
]


@pytest.mark.parametrize("context, continuation", PAIRS)
@pytest.mark.parametrize("first", [EOS, 1])
def test_transformers_agrees(
    model, tokenizer, theirs, context, continuation, first
):
    found = loglikelihood(model, tokenizer, context, continuation, first)
    kept = context.rstrip()
    head, whole = tokenizer.encode_batch([kept, context + continuation])
    assert whole[: len(head)] == head  # no token over these boundaries
    count = len(whole) - len(head)
    expected, greedy = by_transformers(theirs, [first, *whole], count)
    assert found.logprob == pytest.approx(expected, abs=1e-4)
    assert (found.tokens, found.is_greedy) == (count, greedy)


def test_without_a_first_token(model, tokenizer, theirs):
    found = loglikelihood(model, tokenizer, "def area", "(width", None)
    whole = tokenizer.encode("def area(width")
    count = len(whole) - len(tokenizer.encode("def area"))
    assert found.logprob == pytest.approx(
        by_transformers(theirs, whole, count)[0], abs=1e-4
    )
    with pytest.raises(LikelihoodError, match="after 0"):
        loglikelihood(model, tokenizer, " ", "x", None)


def test_a_token_over_the_boundary_is_not_lost(model, theirs):
    """`(x` as one token: the harness would judge `)` alone, and never the x."""
    tokenizer = Tokenizer.train(["(x)\n(x)\n" * 9], vocab_size=280)
    head, tail, whole = tokenizer.encode_batch(["f(", "x)", "f(x)"])
    assert whole[: len(head)] != head
    found = loglikelihood(model, tokenizer, "f(", "x)")
    expected, _ = by_transformers(theirs, [EOS, *head, *tail], len(tail))
    assert found.tokens == len(tail) == 2
    assert found.logprob == pytest.approx(expected, abs=1e-4)


def test_a_greedy_continuation_is_known_as_one(model, theirs):
    ids = [EOS, 40, 50]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    assert judge(model, ids, 6).is_greedy
    for place in range(3, 9):
        other = [*ids]
        other[place] = (other[place] + 1) % 331
        assert not judge(model, other, 6).is_greedy


def test_an_input_too_long_loses_its_beginning(model, tokenizer, theirs):
    found = loglikelihood(model, tokenizer, TEXT, "def")
    ids = tokenizer.encode(TEXT + "def")
    assert len(ids) > 50
    expected, _ = by_transformers(theirs, ids[-41:], found.tokens)
    assert found.logprob == pytest.approx(expected, abs=1e-4)
    with pytest.raises(LikelihoodError, match="from 1 to 40 to judge"):
        loglikelihood(model, tokenizer, "def", TEXT)
    with pytest.raises(LikelihoodError, match="0 tokens to judge"):
        loglikelihood(model, tokenizer, "def", "")


@settings(max_examples=30)
@given(length=st.integers(1, 170))
def test_rolling_judges_every_token_once(model, tokenizer, theirs, length):
    """Windows as the harness lays them: the last reaches back to be full."""
    text = (TEXT * 3)[:length]
    ids = tokenizer.encode(text)
    padded, expected, done = [EOS, *ids], 0.0, 0
    while done < len(ids):
        step = min(40, len(ids) - done)
        last = done + step
        window = padded[max(0, last - 40) : last + 1]
        expected += by_transformers(theirs, window, step)[0]
        done = last
    found = rolling(model, tokenizer, text)
    assert found.tokens == len(ids)
    assert found.logprob == pytest.approx(expected, abs=1e-3)


def test_a_text_of_one_window_is_a_continuation_of_nothing(model, tokenizer):
    text = "def area(width):"
    one = rolling(model, tokenizer, text)
    assert one == loglikelihood(model, tokenizer, "", text)
    assert isinstance(one, Judged)
    with pytest.raises(LikelihoodError, match="empty"):
        rolling(model, tokenizer, "")


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    small = Albor(dataclasses.replace(SHAPE, vocab_size=270))
    for call in (
        lambda: loglikelihood(small, tokenizer, "a", "b"),
        lambda: rolling(small, tokenizer, "a"),
    ):
        with pytest.raises(LikelihoodError, match="290 entries, the model 270"):
            call()


# ------------------------------------------- the model card's figure, and strangers


def test_a_head_that_was_not_saved_gives_the_size_of_the_vocabulary(tokenizer):
    """However good the body: hidden vectors of unit size and a fresh head."""
    config = ModelConfig(8192, 64, 128, 2, 4, 2, 40)
    fresh = Albor(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    hidden = F.normalize(torch.randn(900, 64, generator=generator), dim=1) * 8
    logits = hidden @ fresh.model.embed_tokens.weight.T
    goal = torch.randint(8192, (900,), generator=generator)
    loss = float(F.cross_entropy(logits, goal).detach())
    assert abs(loss - math.log(8192)) < 0.06


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tie_word_embeddings": False}, "lm_head.weight is not the embedding"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
    ],
)
def test_a_foreign_llama_that_computes_otherwise_is_refused(
    tmp_path, change, words
):
    torch.manual_seed(0)
    shape = dict(vocab_size=331, hidden_size=48, intermediate_size=80)
    shape |= dict(num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**shape | change)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_foreign_tied_llama_is_judged_as_transformers_does(
    tmp_path, tokenizer, dtype
):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=331,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    ours = load_model(tmp_path)
    found = loglikelihood(ours, tokenizer, "def area(width", ", height)")
    ids = tokenizer.encode("def area(width, height)")
    expected, _ = by_transformers(read, [EOS, *ids], found.tokens)
    assert found.logprob == pytest.approx(expected, abs=1e-4)


def test_a_foreign_folder_with_a_foreign_tokenizer(tmp_path):
    """Refused by name; judged by its own ids as transformers does."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=331,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator([TEXT], 290, special_tokens=["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*'<unk>' has id"):
        Tokenizer.load(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [fast.token_to_id("<|endoftext|>"), *fast.encode("def area(width)").ids]
    for count in (1, len(ids) - 1):
        found = judge(load_model(tmp_path), ids, count)
        expected, greedy = by_transformers(read, ids, count)
        assert found.logprob == pytest.approx(expected, abs=1e-4)
        assert (found.tokens, found.is_greedy) == (count, greedy)
