"""Decoding in slots: tokens of `transformers`, of `generate`, of a single row."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from albor import decode as module
from albor.decode import Slots, decode, product
from albor.generate import GenerateError, generate
from albor.model import Albor
from albor.sampling import Sampling
from albor.shapes import ModelConfig
from albor.tokenizer import EOS, Tokenizer
from albor.weights import save_model

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=40,
    initializer_range=0.3,
)
chance = np.random.default_rng(0)
PROMPTS = [
    chance.integers(0, 300, size).tolist()
    for size in (5, 31, 1, 12, 2, 39, 7, 7, 22, 3, 17)
]


@pytest.fixture(scope="module")
def model():
    return Albor(CONFIG, seed=1)


def run(model, prompts=PROMPTS, **options):
    """Tokens and reasons by text."""
    options = {"max_new_tokens": 12, "stop": ()} | options
    tokens, reasons = [[] for _ in prompts], [""] * len(prompts)
    for new in decode(model, prompts, **options):
        assert not reasons[new.text], "a text went on after its end"
        tokens[new.text].append(new.token)
        reasons[new.text] = new.ended
    assert all(reasons)
    return tokens, reasons


@pytest.fixture(scope="module")
def llama(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 3, vocab_size=264)
    save_model(folder, model, tokenizer)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("slots", [1, 4, 11])
@pytest.mark.parametrize(
    "limits",
    [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram": 2}],
)
def test_tokens_are_those_of_transformers(model, llama, slots, limits):
    """Greedy, float32; theirs is one batch padded on the left."""
    fit = [prompt for prompt in PROMPTS if len(prompt) <= 28]
    width = max(map(len, fit))
    padded = torch.tensor([[3] * (width - len(p)) + p for p in fit])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in fit])
    names = {"no_repeat_ngram": "no_repeat_ngram_size"}
    theirs = {names.get(key, key): value for key, value in limits.items()}
    if "repetition_penalty" in limits:
        # Theirs counts the padding as text: compare without it, one by one.
        found = [
            llama.generate(
                torch.tensor([p]),
                attention_mask=torch.ones(1, len(p), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=3,
                **theirs,
            )[0, len(p) :].tolist()
            for p in fit
        ]
    else:
        found = llama.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=3,
            **theirs,
        )[:, width:].tolist()
    ours, reasons = run(model, fit, slots=slots, sampling=Sampling(**limits))
    assert ours == found
    assert set(reasons) == {"length"}


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_a_row_gives_the_tokens_of_a_single_text(model, slots):
    tokens, reasons = run(model, slots=slots, stop=(7, 11, EOS))
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        assert new == generate(model, prompt, max_new_tokens=12, stop=(7, 11, EOS))
    assert reasons[PROMPTS.index(max(PROMPTS, key=len))] in ("context", "stop")


@pytest.mark.parametrize("slots", [2, 5])
def test_draws_do_not_depend_on_the_batch(model, slots):
    how = Sampling(temperature=1.1, top_p=0.9, seed=5)
    whole, _ = run(model, sampling=how)
    order = [8, 3, 3, 10, 0, 1]
    part, _ = run(
        model, [PROMPTS[i] for i in order], sampling=how, rows=order, slots=slots
    )
    assert part == [whole[i] for i in order]
    first, _ = run(model, PROMPTS[:1], sampling=how)
    assert first[0] == generate(
        model,
        PROMPTS[0],
        max_new_tokens=12,
        temperature=1.1,
        top_p=0.9,
        seed=5,
        stop=(),
    )
    same, _ = run(model, [PROMPTS[0]] * 4, sampling=how)
    assert len({tuple(one) for one in same}) == 4  # samples of one prompt


def test_log_probabilities_are_those_of_the_model(model):
    prompt = PROMPTS[3]
    news = list(decode(model, [prompt] * 2, max_new_tokens=9, stop=()))
    for text in range(2):
        mine = [new for new in news if new.text == text]
        tokens = [new.token for new in mine]
        with torch.no_grad():
            z = model(torch.tensor([prompt + tokens]))[0].double().log_softmax(-1)
        wanted = z[range(len(prompt) - 1, len(prompt) + 8), tokens]
        found = torch.tensor([new.logprob for new in mine]).double()
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_steps_are_saved_and_slots_given_on(model, monkeypatch):
    sizes = []
    step = Slots.step

    def counted(self, ids, at):
        sizes.append(len(ids))
        return step(self, ids, at)

    monkeypatch.setattr(Slots, "step", counted)
    lengths = [2, 9, 4, 3]
    seen = [0] * 4

    def ended(text, token):
        seen[text] += 1
        return seen[text] == lengths[text]

    tokens, reasons = run(model, PROMPTS[6:10], slots=2, ended=ended)
    assert [*map(len, tokens)] == lengths == seen and set(reasons) == {"stop"}
    # Texts 0, 2 and 3 share a slot beside text 1; the first token needs no step.
    assert sum(sizes) == sum(lengths) - 4
    assert max(sizes) == 2 and sizes[-1] >= 1 and len(sizes) == 8


def test_a_prompt_given_again_is_read_once(model, monkeypatch):
    reads = []
    forward = type(model.model).forward

    def counted(self, ids, caches=None):
        reads.append(ids.shape)
        return forward(self, ids, caches)

    monkeypatch.setattr(type(model.model), "forward", counted)
    run(model, [PROMPTS[3]] * 5 + [PROMPTS[0]], slots=2)
    assert reads == [(1, 12), (1, 5)]


def test_nothing_is_kept_between_calls(model):
    changed = Albor(CONFIG, seed=2)
    before, _ = run(changed)
    changed.load_state_dict(model.state_dict())
    assert run(changed)[0] == run(model)[0] != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_stay_close(dtype):
    model = Albor(CONFIG, seed=1)
    wide = Albor(CONFIG, seed=1)
    model.to(dtype)
    with torch.inference_mode():
        slots = Slots(model, 3, 40)
        for slot in range(3):
            slots.read(slot, PROMPTS[slot + 6][:-1])
        ids = [PROMPTS[slot + 6][-1] for slot in range(3)]
        at = [len(PROMPTS[slot + 6]) - 1 for slot in range(3)]
        logits = slots.step(ids, at)
        assert logits.dtype == dtype
        for slot in range(3):
            one = wide(torch.tensor([PROMPTS[slot + 6]]))[0, -1]
            error = (logits[slot].double() - one.double()).norm() / one.norm()
            assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_packed_products_are_products():
    weights = [torch.randn(n, 33).bfloat16() for n in (17, 5)]
    for rows in (1, 4, 19):
        x = torch.randn(rows, 33).bfloat16()
        exact = x.double() @ torch.cat(weights).double().T
        for size in (1, 2):
            y = product(weights[:size], rows)(x).double()
            goal = exact[:, : y.shape[1]]
            torch.testing.assert_close(y, goal, atol=5e-2, rtol=2e-2)


def test_the_compiled_step_is_one_graph_of_fixed_shapes(model, monkeypatch):
    """As on CUDA: all slots, all places. A graph break would be an error here."""
    shapes = set()

    def compiler(graph, inputs):
        shapes.add(tuple(x.shape for x in inputs if isinstance(x, torch.Tensor)))
        return graph.forward

    compiled = torch.compile

    def fake(function):
        return compiled(function, backend=compiler, fullgraph=True)

    monkeypatch.setattr(module.torch, "compile", fake)
    torch._dynamo.reset()
    tokens, _ = run(model, PROMPTS, slots=4, compiled=True)
    assert len(shapes) == 1
    assert tokens == run(model, PROMPTS, slots=4)[0]


def test_gradients_are_left_alone(model):
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    run(model)
    ids = torch.tensor([[1, 2, 3]])
    model.loss(ids, ids).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\]: the prompt is empty"),
        ({"prompts": [[1], [2, 300]]}, r"prompts\[1\]: prompt\[1\] is 300"),
        ({"prompts": [[1] * 40]}, r"prompts\[0\]: the prompt has 40 tokens"),
        ({"rows": [1, 2]}, "2 rows for 11 prompts"),
        ({"slots": 0}, "slots must be a whole number from 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature must be 0"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p must be above 0"),
        ({"stop": (300,)}, r"stop\[0\] is 300"),
    ],
)
def test_impossible_requests_are_refused(model, bad, message):
    with pytest.raises(GenerateError, match=message):
        run(model, **bad)


def test_no_prompts_give_nothing(model):
    assert list(decode(model, [], max_new_tokens=3)) == []
