"""The chapter's broken modules, at shapes that it does not show: still broken,
invisible from the outputs, and found by the checks that it recommends."""

import ast
from pathlib import Path
from typing import Any

import jupytext
import pytest
import torch
from torch import nn

from albor.layers import RMSNorm, rms_norm
from albor.model import Albor, Block
from albor.shapes import ModelConfig

CHAPTER = Path(__file__).resolve().parents[1] / "book" / "alb_038_gradient_flow.md"


def broken_modules() -> dict[str, Any]:
    """Its classes of layers and its `plant`, without running the cells."""
    names = {
        "BatchedNorm",
        "GatheredHeads",
        "Lost",
        "Misled",
        "WrittenNorm",
        "plant",
    }
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "rms_norm": rms_norm}
    scope |= {"RMSNorm": RMSNorm, "Block": Block}
    for cell in jupytext.read(CHAPTER).cells:
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                if getattr(node, "name", None) in names:
                    exec(compile(ast.unparse(node), str(CHAPTER), "exec"), scope)
    assert names <= scope.keys()
    return scope


BROKEN = broken_modules()


def model(layers: int) -> Albor:
    config = ModelConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=40,
        head_dim=10,
        initializer_range=0.1,
    )
    return Albor(config, seed=3).double()


def run(net: Albor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients that arrive and are not zero."""
    rows = torch.randint(131, (3, 18), generator=torch.Generator().manual_seed(5))
    net.loss(rows[:, :-1], rows[:, 1:]).backward()
    named = net.named_parameters()
    found = {n: p.grad for n, p in named if p.grad is not None and p.grad.any()}
    return net(rows).detach(), found


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_the_holes_starve_the_tensors_that_the_chapter_counts(layers: int) -> None:
    plant, norm, heads = (
        BROKEN[n] for n in ("plant", "BatchedNorm", "GatheredHeads")
    )
    logits, whole = run(model(layers))
    assert len(whole) == 2 + 9 * layers
    for faults, count in (
        ({"norm": norm, "o_proj": heads}, 1),
        ({"o_proj": heads}, 2 + 5 * layers),
    ):
        same, reached = run(plant(model(layers), **faults))
        assert torch.equal(same, logits)
        assert len(reached) == count


@pytest.mark.parametrize("kind", ["Lost", "Misled"])
def test_a_wrong_way_back_shows_in_the_cosine_of_some_tensor(kind: str) -> None:
    net = model(4)
    logits, exact = run(model(4))
    for block in net.model.layers:
        block.__class__ = BROKEN[kind]
    same, given = run(net)
    assert torch.equal(same, logits) and given.keys() == exact.keys()
    wrong = set()
    for name, gradient in given.items():
        one, other = gradient.flatten(), exact[name].flatten()
        if ".layers." in name and torch.cosine_similarity(one, other, 0) < 0.999:
            wrong.add(int(name.split(".")[2]))
    assert wrong == {"Lost": {0, 1, 2, 3}, "Misled": {0, 1, 2}}[kind]


def test_the_written_norm_leads_back_what_autograd_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, arriving = (
        torch.randn(*shape, generator=generator).double()
        for shape in ((2, 3, 5, 7), (7,), (2, 3, 5, 7))
    )
    found = []
    for function in (
        lambda x, w: BROKEN["WrittenNorm"].apply(x, w, 1e-5, rms_norm),
        lambda x, w: rms_norm(x, w, 1e-5),
    ):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        function(*leaves).backward(arriving)
        found.append([leaf.grad for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
