"""The model against transformers' Llama, and the loss against torch's."""

import copy
import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from albor.model import Albor, linear_cross_entropy
from albor.shapes import PRESETS, ModelConfig, parameter_shapes

B, T, V = 2, 17, 131
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=40,
    head_dim=10,
)


def batch(seed: int = 0, length: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(V, (B, length + 1), generator=generator)
    return stream[:, :-1], stream[:, 1:]


@torch.no_grad()
def enliven(model: nn.Module, seed: int) -> None:
    """Weights large enough that every part matters, and norms that are not one."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(0.0, 0.15, generator=generator)


def lively(config: ModelConfig = CONFIG, seed: int = 1) -> Albor:
    model = Albor(config)
    enliven(model, seed)
    return model


def agree(name: str, ours: Tensor | None, theirs: Tensor | None) -> None:
    assert ours is not None and theirs is not None, name
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    cosine = F.cosine_similarity(
        ours.flatten().double(), theirs.flatten().double(), 0
    )
    assert difference < 1e-5, f"{name}: off by {difference:.1e}"
    assert cosine > 0.99999, f"{name}: cosine {cosine:.6f}"


# ------------------------------------------------------------- against transformers


def llama(config: ModelConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )


SHAPES = {
    "grouped": CONFIG,
    "one key head": dataclasses.replace(CONFIG, num_key_value_heads=1, head_dim=14),
    "a key head each": dataclasses.replace(CONFIG, num_key_value_heads=6),
    "other constants": dataclasses.replace(
        CONFIG, rms_norm_eps=1e-2, rope_theta=50.0
    ),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
def test_logits_and_gradients_equal_transformers(
    config: ModelConfig, direction: str
) -> None:
    ours, theirs = lively(config), llama(config)
    if direction == "ours to theirs":
        result = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert result.missing_keys == ["lm_head.weight"]
        assert result.unexpected_keys == []
    else:
        enliven(theirs, seed=2)
        assert "lm_head.weight" in theirs.state_dict()
        ours.load_state_dict(theirs.state_dict())

    ids, targets = batch()
    logits = theirs(ids).logits
    agree("logits", ours(ids), logits)

    loss = ours.loss(ids, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, weight in ours.named_parameters():
        agree(name, weight.grad, gradients[name])


def test_positions_at_the_end_of_the_context_equal_transformers() -> None:
    config = dataclasses.replace(CONFIG, max_position_embeddings=1500)
    ours, theirs = lively(config), llama(config)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ids, _ = batch(length=1500)
    with torch.no_grad():
        agree("logits", ours(ids)[:, -9:], theirs(ids).logits[:, -9:])


# ----------------------------------------------------------------- names and counts


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_parameter_shapes(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = Albor(config)
    shapes = {name: tuple(w.shape) for name, w in model.named_parameters()}
    assert list(shapes.items()) == list(parameter_shapes(config).items())
    assert list(model.state_dict()) == list(shapes)  # no buffers, no head
    assert len(shapes) == 2 + 9 * config.num_hidden_layers


def test_the_card_counts_218_tensors_and_398509056_parameters() -> None:
    with torch.device("meta"):
        model = Albor(PRESETS["albor-base-350m"])
    weights = list(model.parameters())
    assert all(weight.is_meta for weight in weights)
    assert len(weights) == 218
    assert sum(weight.numel() for weight in weights) == 398_509_056


def test_the_head_is_the_embedding() -> None:
    model = lively().double()
    table = model.model.embed_tokens.weight
    ids, targets = batch()
    before = model(ids).detach()
    address = table.data_ptr()
    model.loss(ids, targets).backward()
    rows = table.grad.abs().amax(dim=-1)
    assert (rows > 0).all()  # also those of tokens that do not occur in ids
    with torch.no_grad():
        table[targets[0, 0]] *= 2.0  # the head follows, whatever the ids are
    other = ids[:, :3].clamp(max=0)  # token 0 three times
    hidden = model.model(other)
    assert torch.allclose(model(other), hidden @ table.T, rtol=0, atol=1e-12)
    assert not torch.allclose(model(ids), before)
    assert model.model.embed_tokens.weight.data_ptr() == address


def test_a_foreign_head_is_refused() -> None:
    model = lively()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        model.load_state_dict({**state, "lm_head.weight": torch.zeros(V, 48)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**state, "other.weight": torch.zeros(3)})


# --------------------------------------------------------------------------- init


def test_scaled_init_shrinks_what_adds_to_the_stream_and_nothing_else() -> None:
    plain = dict(Albor(CONFIG, seed=4).named_parameters())
    scaled = dict(Albor(CONFIG, seed=4, scaled_init=True).named_parameters())
    shrunk = set()
    for name, weight in plain.items():
        if not torch.equal(weight, scaled[name]):
            shrunk.add(name.split(".")[-2])
            due = weight / (2 * CONFIG.num_hidden_layers) ** 0.5
            assert torch.allclose(scaled[name], due, rtol=1e-6, atol=0)
    assert shrunk == {"o_proj", "down_proj"}


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Albor(CONFIG, seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # no one else's numbers
    torch.manual_seed(2)
    second, other = Albor(CONFIG, seed=5), Albor(CONFIG, seed=6)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, second.get_parameter(name))
        if weight.dim() == 2:
            assert not torch.equal(weight, other.get_parameter(name))
    unseeded = Albor(CONFIG, seed=None), Albor(CONFIG, seed=None)
    tables = [model.model.embed_tokens.weight for model in unseeded]
    assert not torch.equal(*tables)


def test_weights_do_not_depend_on_the_default_type() -> None:
    expected = Albor(CONFIG, seed=5).model.embed_tokens.weight
    torch.set_default_dtype(torch.float64)
    try:
        wide = Albor(CONFIG, seed=5).model.embed_tokens.weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert wide.dtype == torch.float64
    assert torch.equal(wide, expected.double())


def test_weights_are_normal_independent_and_of_full_rank() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=160, intermediate_size=400)
    seen = []
    for name, weight in Albor(config).named_parameters():
        if weight.dim() == 1:
            assert (weight == 1.0).all(), name
            continue
        flat = weight.detach().double().flatten() / 0.02
        error = len(flat) ** -0.5
        assert abs(flat.mean()) < 5 * error, name
        assert abs(flat.std() - 1) < 4 * error, name
        assert abs((flat[1:] * flat[:-1]).mean()) < 5 * error, name  # no period
        assert abs((flat**4).mean() - 3) < 40 * error, name  # the tails of a normal
        matrix = weight.detach().double()
        largest = torch.linalg.matrix_norm(matrix, 2)
        stable_rank = float(matrix.square().sum() / largest**2)
        assert stable_rank > 0.2 * min(weight.shape), name
        seen.append(flat[:100])
    for i, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:i])


def test_the_first_loss_is_a_little_above_ln_v() -> None:
    config = PRESETS["albor-small"]
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(config.vocab_size, (4, 257), generator=generator)
    with torch.no_grad():
        loss = float(Albor(config).loss(stream[:, :-1], stream[:, 1:]))
    expected = math.log(config.vocab_size) + 0.02**2 * config.hidden_size / 2
    assert expected - 0.02 < loss < expected + 0.15


# --------------------------------------------------------------------- properties


@pytest.mark.parametrize("change", [1, 8, 16])
def test_no_logit_sees_a_later_token(change: int) -> None:
    model, (ids, _) = lively().double(), batch()
    other = ids.clone()
    other[:, change:] = (other[:, change:] + 1) % V
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.allclose(before[:, :change], after[:, :change], rtol=0, atol=1e-12)
    assert ((before - after)[:, change:].abs().amax(dim=-1) > 1e-6).all()


def test_order_matters() -> None:
    model, (ids, _) = lively().double(), batch()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shuffled, permuted = model(ids[:, order]), model(ids)[:, order]
    assert (shuffled - permuted).abs().max() > 0.1 * permuted.abs().max()


def test_rows_of_a_batch_do_not_meet() -> None:
    model, (ids, _) = lively().double(), batch()
    with torch.no_grad():
        together, alone = model(ids), [model(row[None])[0] for row in ids]
    assert torch.allclose(together, torch.stack(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_every_parameter_receives_a_gradient(layers: int) -> None:
    model = Albor(dataclasses.replace(CONFIG, num_hidden_layers=layers))
    model.loss(*batch()).backward()
    dead = [
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.abs().max() > 0
    ]
    assert dead == []


@settings(max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
def test_caches_change_nothing(sizes: list[int], rows: int) -> None:
    model = lively().double()
    generator = torch.Generator().manual_seed(sum(sizes))
    ids = torch.randint(V, (rows, min(sum(sizes), 40)), generator=generator)
    with torch.no_grad():
        caches, start, parts = model.new_caches(), 0, []
        for size in sizes:
            if start < ids.shape[1]:
                parts.append(model(ids[:, start : start + size], caches))
                start += size
        whole = model(ids)
    assert torch.allclose(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-11)


def test_rotations_stay_wide_in_a_16_bit_model() -> None:
    model = lively().to(torch.bfloat16)
    cos, _ = model.model.rotations(0, 40)
    assert cos.dtype == torch.float32
    assert model(batch()[0]).dtype == torch.bfloat16
    model.double()
    assert model.model.rotations(0, 40)[0].dtype == torch.float64


def test_training_goes_on_after_inference_mode() -> None:
    model, (ids, targets) = lively(), batch()
    with torch.inference_mode():
        model(ids)
    model.loss(ids, targets).backward()  # the rotary table is no inference tensor
    copy.deepcopy(model).loss(ids, targets).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_comes_close_to_float32(dtype: torch.dtype) -> None:
    model, (ids, targets) = lively(), batch()
    logits, loss = model(ids), model.loss(ids, targets)
    loss.backward()
    exact = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        assert model(ids).dtype == dtype
        close = (model(ids).float() - logits).abs().max() < 0.1 * logits.abs().max()
        narrow = model.loss(ids, targets)
    assert close
    assert narrow.dtype == torch.float32
    assert math.isclose(narrow.item(), loss.item(), rel_tol=0.02)
    narrow.backward()
    for name, weight in model.named_parameters():
        assert weight.grad.dtype == torch.float32
        cosine = F.cosine_similarity(
            weight.grad.flatten(), exact[name].flatten(), 0
        )
        assert cosine > 0.98, name


# ------------------------------------------------------------------------ refusals


def test_ids_that_cannot_be_right_are_refused() -> None:
    model, (ids, targets) = lively(), batch()
    for bad, match in (
        (torch.tensor([[3, V]]), r"from 3 to 131, the vocabulary from 0 to 130"),
        (torch.tensor([[-1, 2]]), r"from -1 to 2"),
        (torch.zeros(1, 41, dtype=torch.int64), r"41 tokens after 0 .* = 40"),
        (torch.zeros(1, 0, dtype=torch.int64), r"empty: their shape is \(1, 0\)"),
        (torch.zeros(0, 5, dtype=torch.int64), r"empty"),
        (torch.zeros(5, dtype=torch.int64), r"\(5,\) of torch.int64"),
        (torch.zeros(2, 5), r"torch.float32"),
        (torch.zeros(2, 5, dtype=torch.bool), r"torch.bool"),
    ):
        with pytest.raises(ValueError, match=match):
            model(bad)
        with pytest.raises(ValueError, match=match):
            model.loss(bad, bad.to(torch.int64))
    for bad, match in (
        (targets[:, 1:], r"\(2, 17\), got \(2, 16\)"),
        (targets.int(), r"of torch.int32"),
    ):
        with pytest.raises(ValueError, match=match):
            model.loss(ids, bad)


def test_caches_that_do_not_fit_are_refused() -> None:
    model, (ids, _) = lively(), batch()
    with torch.no_grad():
        with pytest.raises(ValueError, match="2 caches for 3 layers"):
            model(ids, model.new_caches()[:2])
        caches = model.new_caches()
        model(ids, caches)
        model(ids, caches)
        with pytest.raises(ValueError, match="17 tokens after 34 cached"):
            model(ids, caches)
        with pytest.raises(ValueError, match="at most 16 tokens: 17 more"):
            model(ids, model.new_caches(16))
        with pytest.raises(ValueError, match="max_length is 0"):
            model.new_caches(0)
    with pytest.raises(ValueError, match="no_grad"):
        model(ids, model.new_caches())


# ---------------------------------------------------------------------------- loss


def inputs(
    n: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, 10, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(29, 10, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(29, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@given(st.integers(1, 23), st.integers(1, 30), st.floats(-100, 100), st.data())
def test_loss_equals_cross_entropy(
    n: int, chunk: int, factor: float, data: st.DataObject
) -> None:
    hidden, weight, targets = inputs(n)
    ignored = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    ignored[data.draw(st.integers(0, n - 1))] = False  # one must count
    targets[torch.tensor(ignored)] = -100
    ours = linear_cross_entropy(hidden, weight, targets, chunk)
    plain = F.cross_entropy(hidden @ weight.T, targets)
    assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-12)
    both = zip(
        torch.autograd.grad(ours * factor, (hidden, weight)),
        torch.autograd.grad(plain * factor, (hidden, weight)),
        strict=True,
    )
    for one, other in both:
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_loss_gradients_by_finite_differences() -> None:
    hidden, weight, targets = inputs(7)
    targets[2] = -100
    assert gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, 3), (hidden, weight)
    )


def test_loss_of_no_target_is_nan_and_never_zero() -> None:
    hidden, weight, targets = inputs(5)
    assert linear_cross_entropy(hidden, weight, targets.fill_(-100)).isnan()


def test_loss_survives_large_logits() -> None:
    hidden, weight, targets = inputs(5, torch.float32)
    ours = linear_cross_entropy(hidden * 1e4, weight, targets, 2)
    plain = F.cross_entropy((hidden.double() * 1e4) @ weight.double().T, targets)
    assert math.isclose(ours.item(), plain.item(), rel_tol=1e-5)


def test_loss_without_gradient_computes_none() -> None:
    hidden, weight, targets = inputs(11)
    expected = linear_cross_entropy(hidden, weight, targets, 4)
    with torch.no_grad(), Sizes() as sizes:
        loss = linear_cross_entropy(hidden, weight, targets, 4)
    assert torch.equal(loss, expected) and not loss.requires_grad
    # Apart from the weights themselves nothing of shape (V, D) or (N, D) is made.
    assert (29, 10) not in sizes.shapes and (11, 10) not in sizes.shapes


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_loss_with_one_input_frozen(frozen: str) -> None:
    hidden, weight, targets = inputs(11)
    live = weight if frozen == "hidden" else hidden
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    ours = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, 4), live
    )
    plain = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), live)
    assert torch.allclose(ours[0], plain[0], rtol=1e-10)


def test_loss_backward_twice_gives_the_same() -> None:
    hidden, weight, targets = inputs(11)
    loss = linear_cross_entropy(hidden, weight, targets, 4)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(map(torch.equal, first, second))


def test_loss_scale_saves_fp16_gradients() -> None:
    """Softmax over V, divided by N, is under fp16's smallest number here."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 10, generator=generator)
    weight = (0.01 * torch.randn(30_000, 10, generator=generator)).requires_grad_()
    hidden[1:] = hidden[0]  # all alike, so that rare rows get nothing but softmax
    targets = torch.zeros(64, dtype=torch.int64)
    scale = 2.0**16
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, 16)
    narrow = torch.autograd.grad(loss * scale, weight)[0] / scale
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    exact = torch.autograd.grad(exact, weight)[0]
    cosine = F.cosine_similarity(narrow[1:].flatten(), exact[1:].flatten(), 0)
    assert cosine > 0.999


@pytest.mark.parametrize("chunk", [-1, -3])
def test_loss_refuses_a_chunk_of_nothing(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk}"):
        linear_cross_entropy(*inputs(5), chunk=chunk)


@pytest.mark.parametrize("target", [29, -1, -99])
def test_loss_refuses_targets_outside_the_vocabulary(target: int) -> None:
    hidden, weight, targets = inputs(5)
    targets[2] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        linear_cross_entropy(hidden, weight, targets)


class Sizes(TorchDispatchMode):
    """The shapes of all tensors that operations return as new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        known = {tensor.data_ptr() for tensor in tensors(args)}
        for tensor in tensors(result):
            if tensor.data_ptr() not in known:
                self.shapes.add(tuple(tensor.shape))
                self.largest = max(self.largest, tensor.numel())
        return result


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_logits_never_exist_as_a_whole(dtype: torch.dtype | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 8, generator=generator).requires_grad_()
    weight = torch.randn(900, 8, generator=generator).requires_grad_()
    targets = torch.randint(900, (700,), generator=generator)
    with (
        Sizes() as sizes,
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        linear_cross_entropy(hidden, weight, targets, 50).backward()
    assert sizes.largest <= 50 * 900
    with Sizes() as sizes:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert sizes.largest == 700 * 900  # the measure does see them where they exist


def test_the_model_loss_never_holds_all_logits() -> None:
    config = dataclasses.replace(
        CONFIG, vocab_size=4099, max_position_embeddings=700, num_hidden_layers=1
    )
    model = Albor(config)
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(4099, (2, 701), generator=generator)
    with Sizes() as sizes:
        model.loss(stream[:, :-1], stream[:, 1:]).backward()
    assert sizes.largest <= 2800 * 4099 * 3 // 4


def test_the_loss_runs_on_meta_tensors() -> None:
    with torch.device("meta"):
        model = Albor(CONFIG)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        model.loss(ids, ids).backward()
    assert all(weight.grad is not None for weight in model.parameters())


class Softmax(TorchFunctionMode):
    """The types that softmax is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype | None] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.softmax:
            self.types.append((kwargs or {}).get("dtype"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_does_not_widen_the_softmax(half):
    hidden, weight, targets = (
        torch.ones(11, 7),
        torch.ones(131, 7),
        torch.arange(11),
    )
    with Softmax() as asked, torch.autocast("cpu", dtype=half):
        linear_cross_entropy(hidden, weight, targets)
    assert asked.types == [half]
    # On CUDA that makes the difference; fake tensors show it without a GPU.
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` would ask for a GPU
    torch.set_autocast_dtype("cuda", half)
    try:
        with FakeTensorMode():
            logits = torch.zeros(5, 131, device="cuda", dtype=half)
            assert logits.softmax(dim=-1).dtype == torch.float32
            assert logits.softmax(dim=-1, dtype=half).dtype == half
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
