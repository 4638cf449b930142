# Generated from book/guards.md: edit the chapter, not this file.
"""Guards: what must hold while a model is trained, looked at in every run.

Notable:
- the loop knows none of this: `train` calls `Guards.inspect` after each look, with
  its last step's gradients there, and `Guards.before_save` before every state;
- nothing here draws a shared random number or changes any: a run with guards ends
  in the same bits as one without.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from albor.checkpoint import latest_state
from albor.checks import CheckError
from albor.config import Recipe
from albor.invariants import check_causal, check_initial, check_order, check_tied
from albor.model import Albor
from albor.step import StepResult
from albor.train import scheduled_rate

__all__ = [
    "Guards",
    "Marks",
    "check_clipped",
    "check_moments",
    "check_moved",
    "check_reached",
    "check_result",
    "check_schedule",
    "check_settings",
    "fingerprints",
    "planned_rate",
]


def check_result(result: StepResult | None) -> None:
    """A step came back with numbers, and its loss is not the 0 of a lost error."""
    if result is None:
        raise CheckError("the step returned nothing; let its error through")
    if result.finite and not (result.loss > 0 and result.grad_norm > 0):
        raise CheckError(
            f"loss {result.loss} and gradient norm {result.grad_norm}: no text is "
            "free of surprise; look for an error that was caught and dropped"
        )


def check_reached(model: nn.Module, rows: bool = True) -> None:
    """Every tensor has a gradient that is finite and not zero.

    With `rows`, so has each row and column of a matrix, each number of a vector: a
    tied head reaches even tokens that never occur. fp16 may round such rows to 0.
    """
    for name, p in model.named_parameters():
        g, mend = p.grad, "look for a detach or a copy between it and the loss"
        if g is None:
            raise CheckError(f"{name} has no gradient; {mend}")
        if bad := int((~torch.isfinite(g)).sum()):
            raise CheckError(f"{name}: {bad} of {g.numel()} gradients not finite")
        parts = {"tensors": g.reshape(1, -1)}
        if rows:
            parts["rows"] = g.reshape(len(g), -1)
            parts["columns"] = parts["rows"].T
        for part, table in parts.items():
            if dead := (table == 0).all(dim=1).nonzero().flatten().tolist():
                raise CheckError(
                    f"{name}: the gradient is zero in {len(dead)} of {len(table)} "
                    f"{part}, the first {dead[0]}; {mend}"
                )


def check_clipped(model: nn.Module, result: StepResult, limit: float) -> None:
    """All gradients together have the norm that was reported, cut to `limit`."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm, due = float(get_total_norm(grads)), min(result.grad_norm, limit)
    if not math.isclose(norm, due, rel_tol=1e-3):
        raise CheckError(
            f"after clipping the gradient has norm {norm:.4g}, and not {due:.4g}, "
            f"which is {result.grad_norm:.4g} cut to {limit}; shrink all tensors "
            "by one factor, limit / norm"
        )


def planned_rate(recipe: Recipe, step: int) -> float:
    """The rate at a step, by the recipe: the schedule, written a second time."""
    plan, peak = recipe.training, recipe.optimizer.lr
    if step < plan.warmup_steps or plan.lr_scheduler == "constant":
        return peak * min(1.0, (step + 1) / max(1, plan.warmup_steps))
    left, length = plan.max_steps - 1 - step, plan.max_steps - 1 - plan.warmup_steps
    share = left / length if left > 0 else 0.0
    if plan.lr_scheduler == "cosine":
        share = math.sin(math.pi / 2 * share) ** 2
    return peak * (plan.min_lr_ratio + (1 - plan.min_lr_ratio) * share)


def check_schedule(recipe: Recipe) -> None:
    """The loop's rate is the recipe's at 50 places, the last step among them."""
    end = recipe.training.max_steps
    for step in [*range(0, end, max(1, end // 50)), end - 1]:
        rate, due = scheduled_rate(recipe, step), planned_rate(recipe, step)
        if not math.isclose(rate, due, rel_tol=1e-9, abs_tol=1e-15):
            raise CheckError(
                f"the rate at step {step} of {end} is {rate:.6g}, the recipe's is "
                f"{due:.6g}; does the schedule end where the run does?"
            )


def check_settings(
    model: nn.Module, optimizer: Optimizer, recipe: Recipe, step: int
) -> None:
    """The optimizer holds the recipe's constants, and the rate due at this step."""
    c, names = recipe.optimizer, {p: name for name, p in model.named_parameters()}
    adam = {"betas": (c.beta1, c.beta2), "eps": c.eps}
    for group in optimizer.param_groups:
        due: dict[str, Any] = {"lr": planned_rate(recipe, step)}
        due |= {"momentum": c.momentum} if group.get("rule") == "muon" else adam
        for p in group["params"]:
            due["weight_decay"] = c.weight_decay * (
                c.decay == "all" or p.dim() == 2
            )
            for key, value in due.items():
                now = torch.as_tensor(group[key], device="cpu")
                if not np.allclose(now, value, rtol=1e-6, atol=1e-15):
                    raise CheckError(
                        f"{names.get(p, tuple(p.shape))}: {key} is {group[key]} at "
                        f"step {step}, and {value} in the recipe; build the "
                        "optimizer from it, and set the rate before each update"
                    )


def check_moments(
    model: nn.Module, optimizer: Optimizer, updates: int | None = None
) -> None:
    """AdamW's moments are means of gradients, after `updates` (None: unknown).

    Whatever the gradients were, their mean m and mean square v obey v >= (1 -
    beta2) g^2, g the last of them, and m^2 <= C v by Cauchy and Schwarz.
    """
    held = {p: g for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        state = optimizer.state.get(p)
        if not state:
            raise CheckError(f"{name} has no moments; is it in the optimizer?")
        if "momentum_buffer" in state:  # Muon's: one mean, and no count of updates
            if not torch.isfinite(state["momentum_buffer"]).all():
                raise CheckError(f"{name}: its momentum_buffer is not finite")
            continue
        m, v = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = held[p]["betas"]
        done = int(state["step"])
        if done < 1 or done != (done if updates is None else updates):
            raise CheckError(
                f"{name}: the optimizer counts {done} updates, the run {updates}; "
                "update once a step, and restore moments and counts on resuming"
            )
        share, rest = 1 - beta2, 1 - beta1**2 / beta2 if beta2 else 0.0
        most = (1 - beta1) * (share * rest) ** -0.5 if rest > 0 else math.inf
        bad = {
            "exp_avg are not finite": ~torch.isfinite(m),
            "exp_avg_sq are not finite: they freeze it": ~torch.isfinite(v),
            "exp_avg_sq are negative": v < 0,
            "exp_avg are too large for exp_avg_sq": m.abs()
            > 1.01 * most * v.clamp(min=0).sqrt() + 1e-18,
        }
        if p.grad is not None:
            new = share * p.grad.square()
            low = v < 0.99 * new - 1e-30
            bad["exp_avg_sq are too small for the gradient"] = low
            if done > 1 and (v - new <= 1e-5 * v).all():
                bad["exp_avg_sq have forgotten all gradients but one"] = v >= 0
        for what, where in bad.items():
            if count := int(where.sum()):
                raise CheckError(
                    f"{name}: {count} of {v.numel()} values of {what}, the first "
                    f"at {where.nonzero()[0].tolist()}; what else writes there, or "
                    "were they not restored?"
                )


Marks = dict[tuple[str, str], Tensor]  # by tensor, and "weight" or which moment


def fingerprints(model: nn.Module, optimizer: Optimizer) -> Marks:
    """A float64 per row of weights and moments, which changes with the row."""
    found: Marks = {}
    for name, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        for part in ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer"):
            if (value := p if part == "weight" else state.get(part)) is not None:
                table = value.detach().reshape(len(value), -1).double()
                columns = torch.arange(1, 1 + table.shape[1], device=table.device)
                found[name, part] = table @ columns.double().cos()
    return found


def check_moved(before: Marks, after: Marks, rows: bool = False) -> None:
    """What had a fingerprint has another one now: as a whole, or in every row."""
    for (name, part), old in before.items():
        still = (old == after[name, part]).nonzero().flatten().tolist()
        if len(still) == len(old) or (rows and still):
            raise CheckError(
                f"{name}: {len(still)} of {len(old)} rows of its {part} have not "
                f"moved, the first {still[0]}; is all of it in the optimizer?"
            )


class Guards:
    """The checks of one run, and what they took: `looks` and `seconds`.

    `scaled`: fp16's loss scale may skip updates and lose small numbers. An error
    names the step and the last sound state.
    """

    def __init__(
        self,
        model: Albor,
        optimizer: Optimizer,
        recipe: Recipe,
        *,
        folder: str | Path,
        start_step: int = 0,
        scaled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self.folder, self.start, self.scaled = Path(folder), start_step, scaled
        self.looks, self.seconds = 0, 0.0
        self.marks, self.looked = Marks(), -1  # of the last look, and its step
        self.last: tuple[int, StepResult] | None = None

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Time what is checked, and say in its errors where the run stands."""
        began = time.monotonic()
        try:
            yield
        except CheckError as error:
            state = latest_state(self.folder)
            good = f"the last sound state is {state}" if state else "none is saved"
            why = f"step {step}: {error} (no state of this step; {good})"
            raise CheckError(why) from None
        finally:
            self.seconds += time.monotonic() - began

    def begin(self) -> None:
        """Before the first step: schedule, tying, mask, positions, weights."""
        model, c = self.model, self.recipe.model
        with self.at(self.start), torch.no_grad():
            check_schedule(self.recipe)
            check_tied(model, self.optimizer)
            ids = torch.arange(min(7, c.max_position_embeddings)) * 5 % c.vocab_size
            check_causal(model, ids.to(model.model.embed_tokens.weight.device))
            check_order(model, len(ids))
            if self.start == 0:
                check_initial(model, scaled=self.recipe.training.scaled_init)
            self.marks = fingerprints(model, self.optimizer)
            self.looks += 1

    def inspect(self, step: int, result: StepResult) -> None:
        """After a look's last step; the first that updates gets a full look."""
        with self.at(step):
            check_result(result)
        self.last = step, result
        if self.looked < 0 and result.finite:
            self.look()

    def before_save(self, done: int) -> None:
        """Before the state after `done` steps; not twice for the same step."""
        self.look() if 0 <= self.looked < done - 1 else None

    @torch.no_grad()
    def look(self) -> None:
        """Hold gradients, moments and weights to what the last step must leave."""
        assert self.last is not None, "no step has been taken"
        (step, result), model, optimizer = self.last, self.model, self.optimizer
        with self.at(step):
            if result.finite:  # else fp16 has skipped it, and dropped the gradients
                check_reached(model, rows=not self.scaled)
                check_clipped(model, result, self.recipe.training.grad_clip)
            check_moments(model, optimizer, None if self.scaled else step + 1)
            check_settings(model, optimizer, self.recipe, step)
            # A rate far below the spacing of floats around a weight cannot move it.
            named, rate = model.named_parameters(), planned_rate(self.recipe, step)
            stiff = {n for n, p in named if rate <= 5e-7 * float(p.abs().max())}
            old = self.marks.items()
            due = {m: v for m, v in old if m[1] != "weight" or m[0] not in stiff}
            # AdamW's first update moves every number by the rate, so every row.
            fresh = self.start == 0 and self.looked < 0 and not self.scaled
            self.looked, self.looks = step, self.looks + 1
            self.marks = fingerprints(model, optimizer)
            check_moved(due, self.marks, rows=fresh)
