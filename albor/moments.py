# Generated from book/moments.md: edit the chapter, not this file.
"""What an optimizer keeps for each parameter, by name: listed, taken, put back.

Notable:
- the optimizer is asked what it keeps: nothing here knows AdamW or Muon by name
- names are `PARAMETER.PART`, e.g. `model.norm.weight.exp_avg`
- a part is one number for the whole parameter, or has the parameter's shape
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from albor.weights import CheckpointError

__all__ = [
    "kept_shapes",
    "moment_shapes",
    "moment_tensors",
    "restore_moments",
    "trained",
]


def trained(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer holds, by name; none may be left out."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and p not in held:
            raise CheckpointError(f"{name} is not in the optimizer")
    return {name: p for name, p in model.named_parameters() if p in held}


def kept_shapes(
    model: nn.Module, optimizer: Optimizer
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What a fresh optimizer of this kind keeps for each parameter, with shapes.

    Found by an update of stand-ins; the optimizer itself is not touched.
    """
    held, probe = trained(model, optimizer), object.__new__(type(optimizer))
    stand_ins = {
        p: torch.zeros([1] * p.dim(), dtype=p.dtype, device=p.device)
        for p in held.values()
    }
    for one in stand_ins.values():
        one.grad = torch.zeros_like(one)
    vars(probe).update(vars(optimizer))
    # A scheduler's wrapper would update the real one; flags belong to real steps.
    for name in ("step", "found_inf", "grad_scale"):
        vars(probe).pop(name, None)
    probe.state = defaultdict(dict)
    probe.param_groups = [
        {**group, "params": [stand_ins[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    probe.step()
    return {
        name: {
            part: tuple(p.shape) if value.dim() else ()
            for part, value in probe.state[stand_ins[p]].items()
        }
        for name, p in held.items()
    }


def moment_shapes(
    model: nn.Module, optimizer: Optimizer
) -> dict[str, tuple[int, ...]]:
    """The same in one mapping from `PARAMETER.PART` to the shape."""
    kept = kept_shapes(model, optimizer)
    return {f"{n}.{part}": shape for n in kept for part, shape in kept[n].items()}


def moment_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All that the optimizer keeps, by `PARAMETER.PART`: its own tensors, uncopied.

    Float32; zeros for a parameter that was never updated.
    """
    kept = kept_shapes(model, optimizer)
    tensors: dict[str, Tensor] = {}
    for name, p in trained(model, optimizer).items():
        fresh = {part: torch.zeros(shape) for part, shape in kept[name].items()}
        state = optimizer.state.get(p) or fresh
        forms = {part: getattr(t, "shape", None) for part, t in state.items()}
        dtypes = {getattr(t, "dtype", None) for t in state.values()}
        if forms != kept[name] or dtypes - {torch.float32}:
            kind = type(optimizer).__name__
            raise CheckpointError(
                f"{name} has {[*state]}; {kind} keeps {[*kept[name]]}, tensors in "
                "float32, each of the parameter's shape or one number"
            )
        tensors |= {f"{name}.{part}": t.detach() for part, t in state.items()}
    return tensors


def restore_moments(
    model: nn.Module, optimizer: Optimizer, moments: Mapping[str, Tensor]
) -> None:
    """Give the optimizer a copy of `moments`, which `moment_shapes` must describe.

    It keeps its own learning rate and other settings: they come from the recipe.
    """
    expected = moment_shapes(model, optimizer)
    if {name: tuple(t.shape) for name, t in moments.items()} != expected:
        odd = sorted(moments.keys() ^ expected.keys()) or "their shapes"
        raise CheckpointError(f"these are not its moments; they differ in {odd}")
    names = {p: name for name, p in trained(model, optimizer).items()}
    kept, state = kept_shapes(model, optimizer), optimizer.state_dict()
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {
        index: {part: moments[f"{name}.{part}"].clone() for part in kept[name]}
        for index, name in enumerate(order)
    }
    optimizer.load_state_dict(state)
