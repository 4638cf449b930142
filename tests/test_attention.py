"""Attention against loops, and the key/value cache against no cache."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from albor.attention import Attention, KVCache, causal_mask, grouped_kernel
from albor.layers import rope_table
from albor.shapes import ModelConfig

B, T, D, H, K, Dh = 2, 17, 48, 6, 2, 10
CONFIG = ModelConfig(
    vocab_size=131,
    hidden_size=D,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=H,
    num_key_value_heads=K,
    max_position_embeddings=40,
    head_dim=Dh,
)
COS, SIN = rope_table(Dh, 40, CONFIG.rope_theta, torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def layer() -> Attention:
    torch.manual_seed(0)
    return Attention(CONFIG).double()


def rotate(x: Tensor, t: int) -> Tensor:
    """One vector (Dh,) at position t, by complex numbers."""
    speeds = CONFIG.rope_theta ** (-2 * torch.arange(Dh // 2).double() / Dh)
    pairs = torch.complex(x[: Dh // 2], x[Dh // 2 :])
    turned = pairs * torch.polar(torch.ones(Dh // 2).double(), t * speeds)
    return torch.cat((turned.real, turned.imag))


def by_loops(layer: Attention, x: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D), one query at a time, without a mask to get wrong."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        q, k, v = (
            (x[b] @ projection.weight.T).unflatten(-1, (-1, Dh))
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        for t in range(x.shape[1]):
            heads = []
            for h in range(H):
                g = h * K // H
                query = rotate(q[t, h], t)
                scores = [query @ rotate(k[s, g], s) for s in range(t + 1)]
                weights = (torch.stack(scores) / math.sqrt(Dh)).exp()
                heads.append((weights / weights.sum()) @ v[: t + 1, g])
            out[b, t] = layer.o_proj.weight @ torch.cat(heads)
    return out


def test_attention_is_its_formula(layer: Attention) -> None:
    x = randn(B, T, D)
    with torch.no_grad():
        expected = by_loops(layer, x)
        got = layer(x, COS[:T], SIN[:T])
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_parameters_have_the_shapes_of_grouped_heads(layer: Attention) -> None:
    assert {name: tuple(w.shape) for name, w in layer.named_parameters()} == {
        "q_proj.weight": (H * Dh, D),
        "k_proj.weight": (K * Dh, D),
        "v_proj.weight": (K * Dh, D),
        "o_proj.weight": (D, H * Dh),
    }


def test_grouped_heads_equal_repeated_heads(layer: Attention) -> None:
    wide = Attention(dataclasses.replace(CONFIG, num_key_value_heads=H)).double()
    state = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].view(K, Dh, D)
        state[name] = torch.stack([heads[h * K // H] for h in range(H)]).flatten(
            0, 1
        )
    wide.load_state_dict(state)
    x = randn(B, T, D)
    got = layer(x, COS[:T], SIN[:T])
    assert torch.allclose(got, wide(x, COS[:T], SIN[:T]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(17,), (5, 12), (5, 1, 4, 7), (1,) * 17])
def test_repeating_the_heads_changes_nothing(
    layer: Attention, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    """The path for kernels that want H key heads, which no CPU takes by itself."""
    x = randn(B, T, D)
    with torch.no_grad():
        expected = layer(x, COS[:T], SIN[:T])
        monkeypatch.setattr(
            "albor.attention.grouped_kernel", lambda q, masked: False
        )
        assert torch.allclose(
            in_pieces(layer, x, sizes), expected, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    ("kernel", "grouped"),
    [("FLASH", 1), ("CUDNN", 1), ("EFFICIENT", 0), ("MATH", 0)],
)
def test_grouped_heads_go_to_a_kernel_that_takes_them(kernel, grouped, monkeypatch):
    class Query:
        device, dtype = torch.device("cuda"), torch.bfloat16

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert grouped_kernel(Query(), masked=False)
    name = "MATH" if kernel == "MATH" else f"{kernel}_ATTENTION"
    with sdpa_kernel(getattr(SDPBackend, name)):
        assert grouped_kernel(Query(), masked=False) == bool(grouped)
    assert not grouped_kernel(Query(), masked=True)


def test_grouped_kernel_on_a_cpu() -> None:
    assert grouped_kernel(randn(1, H, 3, Dh), masked=False)
    assert grouped_kernel(randn(1, H, 3, Dh), masked=True)


# ---------------------------------------------------------------------------- mask


@given(st.integers(1, 12), st.integers(0, 12))
def test_causal_mask_counts_from_the_start_of_the_cache(
    new: int, seen: int
) -> None:
    mask = causal_mask(new, seen, torch.device("cpu"))
    assert mask.shape == (new, seen + new) and mask.dtype == torch.bool
    for t in range(new):
        assert mask[t].tolist() == [s <= seen + t for s in range(seen + new)]


@pytest.mark.parametrize("change", [1, 9, 16])
def test_no_output_sees_a_later_token(layer: Attention, change: int) -> None:
    x = randn(B, T, D)
    other = x.clone()
    other[:, change:] = randn(B, T - change, D, seed=1)
    with torch.no_grad():
        before, after = (layer(each, COS[:T], SIN[:T]) for each in (x, other))
    assert torch.allclose(before[:, :change], after[:, :change], rtol=0, atol=1e-14)
    moved = (before[:, change:] - after[:, change:]).abs().amax(dim=-1)
    assert (moved > 1e-6).all()


def test_order_matters(layer: Attention) -> None:
    x, order = randn(B, T, D), torch.randperm(T, generator=torch.Generator())
    with torch.no_grad():
        shuffled = layer(x[:, order], COS[:T], SIN[:T])
        merely_permuted = layer(x, COS[:T], SIN[:T])[:, order]
    difference = (shuffled - merely_permuted).abs().max()
    assert difference > 0.1 * merely_permuted.abs().max()


def test_rotation_alone_makes_order_matter(layer: Attention) -> None:
    """The last token sees all others: without positions, as a bag."""
    x = randn(B, T, D)
    order = torch.cat((torch.arange(T - 1).flip(0), torch.tensor([T - 1])))
    still = torch.ones(T, Dh).double(), torch.zeros(T, Dh).double()
    with torch.no_grad():
        bag = [layer(each, *still)[:, -1] for each in (x, x[:, order])]
        placed = [layer(each, COS[:T], SIN[:T])[:, -1] for each in (x, x[:, order])]
    assert torch.allclose(*bag, rtol=0, atol=1e-13)
    assert (placed[0] - placed[1]).abs().max() > 0.01 * placed[0].abs().max()


# --------------------------------------------------------------------------- cache


def in_pieces(layer: Attention, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    cache, start, parts = KVCache(max_length=T + 3), 0, []
    for size in sizes:
        at = slice(start, start + size)
        parts.append(layer(x[:, at], COS[at], SIN[at], cache))
        start += size
    assert cache.length == start
    return torch.cat(parts, dim=1)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_any_pieces_equal_the_whole(sizes: list[int]) -> None:
    torch.manual_seed(0)
    layer = Attention(CONFIG).double()
    cut = []
    for size in sizes:
        cut.append(min(size, T - sum(cut)))
    pieces = tuple(size for size in cut if size > 0)
    x = randn(B, sum(pieces), D)
    with torch.no_grad():
        whole = layer(x, COS[: sum(pieces)], SIN[: sum(pieces)])
        assert torch.allclose(
            in_pieces(layer, x, pieces), whole, rtol=0, atol=1e-12
        )


def test_the_cache_holds_key_heads_at_full_size_from_the_start() -> None:
    cache = KVCache(max_length=9)
    cache.append(randn(B, K, 2, Dh), randn(B, K, 2, Dh, seed=1))
    assert cache.keys is not None and cache.keys.shape == (B, K, 9, Dh)
    address = cache.keys.data_ptr()
    keys, values = cache.append(
        randn(B, K, 3, Dh, seed=2), randn(B, K, 3, Dh, seed=3)
    )
    assert cache.keys.data_ptr() == address and cache.length == 5
    expected = randn(B, K, 2, Dh), randn(B, K, 3, Dh, seed=2)
    assert torch.equal(keys, torch.cat(expected, dim=2))
    expected = randn(B, K, 2, Dh, seed=1), randn(B, K, 3, Dh, seed=3)
    assert torch.equal(values, torch.cat(expected, dim=2))


def test_the_cache_refuses_what_it_cannot_hold() -> None:
    cache = KVCache(max_length=4)
    cache.append(randn(B, K, 3, Dh), randn(B, K, 3, Dh))
    with pytest.raises(ValueError, match="holds 3 of at most 4 tokens: 2 more"):
        cache.append(randn(B, K, 2, Dh), randn(B, K, 2, Dh))
    with pytest.raises(ValueError, match=r"\(2, 2\) and now gets \(1, 2\)"):
        cache.append(randn(1, K, 1, Dh), randn(1, K, 1, Dh))
    wanting = randn(B, K, 1, Dh).requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        cache.append(wanting, wanting)
    assert cache.length == 3  # a refusal leaves it as it was
    with torch.no_grad():
        cache.append(wanting, wanting)
    assert cache.length == 4
    for length in (0, -1):
        with pytest.raises(ValueError, match=f"max_length is {length}"):
            KVCache(length)
