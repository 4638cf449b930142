"""What an optimizer keeps: asked without harm, taken whole, put back by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from albor.moments import (
    kept_shapes,
    moment_shapes,
    moment_tensors,
    restore_moments,
    trained,
)
from albor.weights import CheckpointError

KINDS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-2, foreach=True),
    "amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, amsgrad=True),
    "tensor rate": lambda ps: torch.optim.AdamW(
        ps, lr=torch.tensor(1e-2), fused=True
    ),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5),
}


def network(seed=0):
    """A matrix, a vector, a cube and a single number."""
    torch.manual_seed(seed)
    module = nn.Module()
    shapes = {"matrix": (5, 3), "vector": (7,), "cube": (2, 3, 4), "number": ()}
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return module


def update(module, optimizer, step, skip=()):
    dice = torch.Generator().manual_seed(step)
    for name, p in module.named_parameters():
        grad = torch.randn(p.shape, generator=dice)
        p.grad = None if name in skip else grad
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_is_what_it_keeps_and_asking_changes_nothing(kind):
    ours, theirs = network(), network()
    asked, other = KINDS[kind](ours.parameters()), KINDS[kind](theirs.parameters())
    said = []
    for step in range(3):
        said.append(kept_shapes(ours, asked))
        update(ours, asked, step)
        update(theirs, other, step)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        for part, value in other.state[q].items():
            assert torch.equal(asked.state[p][part], value)
    really = {
        name: {part: tuple(t.shape) for part, t in asked.state[p].items()}
        for name, p in ours.named_parameters()
    }
    assert said == [really] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [(), ("vector", "cube")])
def test_there_and_back_is_the_same_run(kind, skip):
    whole, first, second = network(), network(), network(9)
    runs = [KINDS[kind](one.parameters()) for one in (whole, first, second)]
    for step in range(2):
        update(whole, runs[0], step, skip)
        update(first, runs[1], step, skip)
    second.load_state_dict(first.state_dict())
    update(second, runs[2], 50)  # other memories, to be replaced
    second.load_state_dict(first.state_dict())
    restore_moments(second, runs[2], moment_tensors(first, runs[1]))
    for step in range(2, 5):
        update(whole, runs[0], step)
        update(second, runs[2], step)
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        if kind != "rmsprop":  # whose momentum starts otherwise, if it was skipped
            assert torch.equal(p, q)


def test_a_wrapped_step_and_a_flag_are_left_alone():
    module = network()
    optimizer = KINDS["adamw"](module.parameters())
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps optimizer.step
    optimizer.found_inf = torch.tensor(1.0)
    before = [p.clone() for p in module.parameters()]
    assert len(moment_shapes(module, optimizer)) == 12
    assert not optimizer.state
    assert optimizer.found_inf == 1
    for p, q in zip(before, module.parameters(), strict=True):
        assert torch.equal(p, q)


def test_taken_tensors_are_the_optimizers_own_and_given_ones_are_copies():
    module, other = network(), network()
    optimizer, its = (KINDS["adamw"](one.parameters()) for one in (module, other))
    update(module, optimizer, 0)
    taken = moment_tensors(module, optimizer)
    assert taken["cube.exp_avg"] is not None
    for part in ("exp_avg", "exp_avg_sq", "step"):
        mine = optimizer.state[module.cube][part]
        assert taken[f"cube.{part}"].data_ptr() == mine.data_ptr()
    restore_moments(other, its, taken)
    update(module, optimizer, 1)
    assert not torch.equal(taken["cube.exp_avg"], its.state[other.cube]["exp_avg"])


@pytest.mark.parametrize("harm", ["missing", "surplus", "shape"])
def test_what_does_not_fit_is_refused_and_changes_nothing(harm):
    module = network()
    optimizer = KINDS["adamw"](module.parameters())
    update(module, optimizer, 0)
    taken = {
        name: t.clone() for name, t in moment_tensors(module, optimizer).items()
    }
    if harm == "missing":
        wrong = {name: t for name, t in taken.items() if name != "vector.step"}
    elif harm == "surplus":
        wrong = taken | {"vector.step2": torch.zeros(())}
    else:
        wrong = taken | {"matrix.exp_avg": torch.zeros(3, 5)}
    words = "shapes" if harm == "shape" else r"\['vector\.step"
    with pytest.raises(CheckpointError, match=words):
        restore_moments(module, optimizer, wrong)
    for name, t in moment_tensors(module, optimizer).items():
        assert torch.equal(t, taken[name])


def test_a_forgotten_parameter_is_named_and_a_frozen_one_is_not():
    module = network()
    optimizer = torch.optim.AdamW([module.matrix, module.vector, module.cube])
    with pytest.raises(CheckpointError, match="number is not in the optimizer"):
        trained(module, optimizer)
    module.number.requires_grad_(False)
    assert [*trained(module, optimizer)] == ["matrix", "vector", "cube"]


@given(st.permutations(["matrix", "vector", "cube", "number"]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_names_do_not_depend_on_the_order_of_the_groups(order, cut):
    module, other = network(), network()
    optimizer = KINDS["adamw"](module.parameters())
    update(module, optimizer, 0)
    groups = [
        {"params": [other.get_parameter(name) for name in names]}
        for names in (order[:cut], order[cut:])
    ]
    turned = torch.optim.AdamW(groups)
    taken = moment_tensors(module, optimizer)
    restore_moments(other, turned, taken)
    for name, t in moment_tensors(other, turned).items():
        assert torch.equal(t, taken[name]), name
