"""Bugs of the original, planted into our own code, and what notices them.

A planted bug is an edit of a function's source: the function is compiled anew, put
in the place of the sound one in every module of `albor` that has it, and taken out
again. `examine` then asks every check, strong or weak, whether it raises its voice.

    python tests/mutations.py       # writes benchmarks/results/mutations.json
"""

import importlib
import inspect
import math
import platform
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import albor.attention
import albor.checkpoint
import albor.model
import albor.optimizer
import albor.step
import albor.train
import albor.weights
from albor import guards, invariants
from albor.artifacts import write_json
from albor.checks import (
    CheckError,
    check_copies,
    check_gradients,
    check_step,
    compare_gradients,
    lively,
)
from albor.config import DataConfig, OptimizerConfig, Recipe, TrainingConfig
from albor.shapes import ModelConfig
from albor.step import StepResult, count_copies
from albor.weights import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "results" / "mutations.json"
CONFIG = ModelConfig(  # all dimensions different, three blocks
    vocab_size=53,
    hidden_size=16,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=11,
)
T, ROWS, STEPS = 9, 6, 50
Edit = tuple[str, str, str]  # function, text in it, text instead


@dataclass(frozen=True)
class Bug:
    """A fault, where it sits, and the check that must find it."""

    name: str
    what: str
    guard: str  # the check that must fire
    edits: tuple[Edit, ...] = ()
    sick: tuple[str, ...] = ("",)  # prefixes of the modules in which it is active
    wrap: Callable | None = None  # of train_step
    scaled: bool = False  # with a loss scale
    offset: int = 0  # steps that a fresh run believes to have behind it


def sources(target: str) -> tuple[object, str, Callable]:
    """Owner, attribute and function of "albor.model:Block.forward"."""
    module, path = target.split(":")
    owner: object = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Our code with a bug in it, for as long as the block lasts."""
    edits: dict[str, str] = {}
    for target, old, new in bug.edits:
        _, _, function = sources(target)
        text = edits.get(target) or textwrap.dedent(inspect.getsource(function))
        assert text.count(old) >= 1, f"{target} no longer has {old!r}"
        edits[target] = text.replace(
            old, new.replace("SICK", 'hasattr(self, "sick")'), 1
        )
    with patched(edits, bug.wrap):
        yield


@contextmanager
def patched(edits: dict[str, str], wrap: Callable | None) -> Iterator[None]:
    """Put functions with these sources in the place of the ones they came from."""
    patches = []
    for target, text in edits.items():
        owner, name, old = sources(target)
        where: dict[str, object] = {}
        code = compile(text, f"<mutated {target}>", "exec")
        exec(code, inspect.unwrap(old).__globals__, where)
        patches += replacements(owner, name, old, where[name])
    if wrap:
        owner, name, old = sources("albor.step:train_step")
        patches += replacements(owner, name, old, partial(wrap, old))
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()


def replacements(owner: object, name: str, old: object, new: object) -> list:
    """Patches of a method, or of a function wherever albor has a name for it."""
    if inspect.isclass(owner):
        return [patch.object(owner, name, new)]
    modules = [m for key, m in sys.modules.items() if key.startswith("albor.")]
    return [
        patch.object(module, key, new)
        for module in modules
        for key, value in vars(module).items()
        if value is old
    ]


RECIPE = Recipe(
    name="mutations",
    model=CONFIG,
    data=DataConfig(batch_size=2, seq_len=T),
    optimizer=OptimizerConfig(lr=2e-2, weight_decay=0.1),
    training=TrainingConfig(
        epochs=99,
        max_steps=STEPS,
        warmup_steps=3,
        grad_clip=0.25,
        gradient_accumulation=3,
    ),
)


def text(count: int = 6000) -> np.ndarray:
    """A stream in which some tokens are frequent, and what follows what matters."""
    draw = np.random.default_rng(0)
    often = 1 / np.arange(1, CONFIG.vocab_size + 1)
    ids = draw.choice(CONFIG.vocab_size, count, p=often / often.sum())
    for i in range(1, count):
        if draw.random() < 0.5:
            ids[i] = (5 * ids[i - 1] + 7) % CONFIG.vocab_size
    return ids


STREAM = torch.from_numpy(text())


class Scene:
    """A model under a bug, its optimizer, and steps as the loop takes them."""

    def __init__(self, bug: Bug, seed: int = 0) -> None:
        self.bug, self.step = bug, bug.offset
        # Slices cost time; only a bug of the step itself can tell them apart.
        self.rows = 3 if any(e[0] == STEP for e in bug.edits) else ROWS
        self.model = albor.model.Albor(CONFIG, seed=seed)
        self.infect(self.model)
        self.optimizer = albor.optimizer.build_optimizer(
            self.model, RECIPE.optimizer
        )
        self.scaler = torch.amp.GradScaler("cpu") if bug.scaled else None

    def infect(self, model: albor.model.Albor) -> albor.model.Albor:
        """Mark the modules in which the bug is to be active."""
        for name, module in model.model.named_modules():
            if name.startswith(self.bug.sick):
                module.sick = True  # type: ignore[assignment]
        return model

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.arange(ROWS) * 997 + step * 83
        rows = STREAM[(starts[:, None] + torch.arange(T + 1)) % len(STREAM)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def take(self) -> StepResult:
        result = albor.step.train_step(
            self.model,
            self.optimizer,
            *self.batch(self.step),
            lr=albor.train.scheduled_rate(RECIPE, self.step),
            grad_clip=RECIPE.training.grad_clip,
            micro_batch=self.rows,
            scaler=self.scaler,
        )
        self.step += 1
        return result

    def resumed(self, folder: Path) -> "Scene":
        """Another scene that goes on from this one's state."""
        albor.checkpoint.save_state(
            folder, self.step, self.model, self.optimizer, {}
        )
        other = Scene(self.bug, seed=9)
        state = albor.checkpoint.latest_state(folder)
        found = albor.checkpoint.load_state(state, other.model, other.optimizer)
        other.step = found["step"] + self.bug.offset
        return other


def raises(check: Callable, *arguments: object, **options: object) -> bool:
    """Whether a check fires. What is no CheckError is a fault of this file."""
    try:
        check(*arguments, **options)
    except CheckError:
        return True
    return False


def meta_step() -> Callable[[], object]:
    """A step on the device of shapes, for counting copies."""
    with torch.device("meta"):
        model = albor.model.Albor(replace(CONFIG, num_hidden_layers=1))
    optimizer = albor.step.MetaAdamW(model.parameters())
    ids = torch.zeros(2, 4, T, dtype=torch.int64)

    def work() -> None:
        how = {"lr": 1e-3, "micro_batch": 2}
        inputs, targets = ids[0].to("meta"), ids[1].to("meta")
        albor.step.train_step(model, optimizer, inputs, targets, **how)

    count_copies(work)  # the rotary table goes up once
    return work


def offline(bug: Bug, folder: Path) -> Iterator[tuple[str, bool]]:
    """The checks of a model and of a step, each by name: did it fire?"""
    scene = Scene(bug)
    model, (ids, targets) = scene.model, scene.batch(0)
    step = albor.step.train_step
    load = lambda place: scene.infect(albor.weights.load_model(place))  # noqa: E731
    files = {"save": albor.weights.save_model, "load": load}
    yield "gradients", raises(check_gradients, lively(model), ids, targets)
    scalers = (None, torch.amp.GradScaler("cpu", init_scale=1024.0))
    few = ids[:4], targets[:4], step
    yield "step", any([raises(check_step, model, *few, one) for one in scalers])
    yield "copies", raises(check_copies, meta_step(), up=2, down=1)
    yield "causal", raises(invariants.check_causal, model, ids[0, :7])
    yield "order", raises(invariants.check_order, model)
    yield "tied", raises(invariants.check_tied, model, scene.optimizer)
    yield "roundtrip", raises(invariants.check_roundtrip, model, folder, **files)
    yield "initial", raises(invariants.check_initial, model)
    yield "schedule", raises(guards.check_schedule, RECIPE)


def running(bug: Bug, folder: Path) -> Iterator[tuple[str, bool]]:
    """The checks of a run, after its first steps and after a resumed run's."""
    names = ("result", "reached", "clipped", "settings", "moments", "moved")
    fired = dict.fromkeys((*names, "save_state"), False)
    scene = Scene(bug)
    for resumed in (False, True):
        try:
            scene = scene.resumed(folder) if resumed else scene
        except CheckpointError:
            fired["save_state"] = True
            break
        before = guards.fingerprints(scene.model, scene.optimizer)
        for _ in range(2):
            step, result = scene.step, scene.take()
            model, optimizer = scene.model, scene.optimizer
            fired["result"] |= raises(guards.check_result, result)
            if result is None:
                continue
            updates = None if bug.scaled else step + 1
            marks = guards.fingerprints(model, optimizer)
            for name, one in {
                "reached": partial(guards.check_reached, model),
                "clipped": partial(guards.check_clipped, model, result, 0.25),
                "settings": partial(
                    guards.check_settings, model, optimizer, RECIPE, step
                ),
                "moments": partial(guards.check_moments, model, optimizer, updates),
                "moved": partial(
                    guards.check_moved, before, marks, rows=step == bug.offset
                ),
            }.items():
                fired[name] |= raises(one)
            before = marks
    yield from fired.items()


def weak(bug: Bug) -> Iterator[tuple[str, bool]]:
    """What people look at instead: does any of it look wrong?"""
    scene = Scene(bug)
    busy, (ids, targets) = lively(scene.model), scene.batch(0)
    ratios = [ratio for _, ratio in compare_gradients(busy, ids, targets).values()]
    first = float(scene.model.loss(ids, targets).detach())
    losses, fits, finite = [], True, True
    for _ in range(STEPS):
        result = scene.take()
        losses.append(result.loss if result else 0.0)  # as the original did
        fits &= all(
            p.grad is None or p.grad.shape == p.shape
            for p in scene.model.parameters()
        )
    moments = [
        t for state in scene.optimizer.state.values() for t in state.values()
    ]
    for value in [*scene.model.parameters(), *moments]:
        finite &= bool(torch.isfinite(value).all())
    falls = np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    yield "loss does not fall", not falls
    yield "first loss out of band", abs(first - math.log(CONFIG.vocab_size)) > 0.5
    yield "not finite", not (finite and np.isfinite(losses).all())
    yield "shapes differ", not fits
    yield "norm off by 2", not all(0.5 <= ratio <= 2 for ratio in ratios)


def examine(bug: Bug) -> dict[str, bool]:
    """All checks by name: True where it fires under this bug."""
    with tempfile.TemporaryDirectory() as place, planted(bug):
        folder = Path(place)
        found = dict(offline(bug, folder / "model"))
        return found | dict(running(bug, folder / "run")) | dict(weak(bug))


# The bugs themselves.
FORWARD, ATTENTION = (
    "albor.model:Block.forward",
    "albor.attention:Attention.forward",
)
FFN, NORM = "albor.layers:SwiGLU.forward", "albor.layers:RMSNorm.forward"
STEP, LOSS = "albor.step:enqueue_step", "albor.model:Albor.loss"
MATRIX = "F.silu(self.gate_proj(x)) * self.up_proj(x)"
ROPE = "q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)"
ATTEND = "y = attend(q, k, v, seen)"
KERNEL = "F.scaled_dot_product_attention(q, k, v, {})"
ONE = "x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)"
TWO = "return x + self.mlp(self.post_attention_layernorm(x))"
SHARE = "part * (share[now].sum() / count)"
NORMED = "rms_norm(x, self.weight, self.eps)"
DRAWN = "drawn.normal_(0.0, spread, generator=generator)"
WRITTEN = 'p.detach().to("cpu", torch.float32).contiguous()'
HEAD = "self.model.embed_tokens.weight"
COPY = (
    f'self.__dict__.setdefault("copied", {HEAD}.detach().clone().requires_grad_())'
)
CLIP = "norm = clip_by_global_norm(model.parameters(), grad_clip)"


def residual(one: str, two: str) -> tuple[Edit, ...]:
    """Block.forward, in which sick blocks compute the same in another way."""
    both = f"if SICK:\n        {one}\n        {two}\n    {TWO}"
    return ((FORWARD, ONE, f"stream = x\n    {ONE}"), (FORWARD, TWO, both))


SKIPPED = residual(
    "n = self.input_layernorm(stream)\n"
    "        r = stream.detach() + self.self_attn(n, cos, sin, cache)",
    "y = self.mlp(self.post_attention_layernorm(r))\n"
    "        return r.detach() + y + n - n.detach()",
)
SHIPPED = residual(
    "n = self.input_layernorm(stream)\n"
    "        r = stream.detach() + self.self_attn(n, cos, sin, cache)",
    "y = self.mlp(self.post_attention_layernorm(r))\n"
    "        return r + y + stream - stream.detach()",
)


def stray(
    step: Callable,
    model: albor.model.Albor,
    optimizer: torch.optim.Optimizer,
    *rest: object,
    tensor: str,
    into: str,
    rows: int,
    **options: object,
) -> StepResult:
    """A step whose rows land in the moments of a tensor: they are its neighbours.

    The arena holds an activation's gradient, `exp_avg` and `exp_avg_sq`; rows of
    sines, as small as gradients are, are written at a pitch that is too wide.
    """
    result = step(model, optimizer, *rest, **options)
    weight = dict(model.named_parameters()).get(tensor)
    if weight is None or weight.is_meta:  # nothing to write into
        return result
    state = optimizer.state[weight]
    shape = state["exp_avg"].shape
    n, width = shape.numel(), shape[1]
    arena = torch.zeros(3 * n)
    views = {
        key: arena[i * n : i * n + n].view(shape)
        for i, key in ((1, "exp_avg"), (2, "exp_avg_sq"))
    }
    for key, view in views.items():
        view.copy_(state[key])
        state[key] = view
    pitch = n if into == "exp_avg" else 2 * n
    for row in range(rows):
        out = torch.as_strided(arena, (width,), (1,), pitch + row * width)
        out.copy_(1e-2 * torch.arange(width).add(row).mul(2.1).sin())
    return result


def zero(step: Callable, *rest: object, **options: object) -> StepResult:
    return StepResult(0.0, 0.0, 1.0, True, 1.0)


def nothing(step: Callable, *rest: object, **options: object) -> None:
    return None


def at(name: str, rows: int, into: str) -> Callable:
    return partial(
        stray, tensor=f"model.layers.{name}.weight", rows=rows, into=into
    )


def edit(target: str, old: str, new: str) -> tuple[Edit, ...]:
    return ((target, old, new),)


CUT = edit(
    NORM,
    f"return {NORMED}",
    f"y = {NORMED}\n    return y.detach().requires_grad_() if SICK else y",
)
LEAF = edit(
    ATTENTION,
    ROPE,
    f"{ROPE}\n    if SICK:\n        q, k, v = q.detach(), k.detach(), v.detach()",
)
VALUES = edit(
    ATTENTION,
    ROPE,
    f"{ROPE}\n    if SICK:\n"
    "        v = torch.cat([v[:, :1], v[:, 1:].detach()], dim=1)",
)
NO_ROPE = edit(ATTENTION, ROPE, f"if not SICK:\n        {ROPE}")
BARE = KERNEL.format("enable_gqa=True")
NO_MASK = edit(
    ATTENTION, ATTEND, f"y = {BARE} if SICK and T > 1 else attend(q, k, v, seen)"
)
STRIDE = edit(
    ATTENTION,
    ATTEND,
    "mask = -1e9 * (1 - x.new_ones(11, 11).tril().flatten()[: T * T].view(T, T))\n"
    f"    y = {KERNEL.format('attn_mask=mask, enable_gqa=True')}",
)
TURNED = "(x * cos + quarter_turn * sin).to(x.dtype)"
SINES = (
    "drawn.copy_(1.4142 * spread * (torch.arange({}) * 0.37).sin().view_as(drawn))"
)
BETAS = "betas=(config.beta1, config.beta2)"
GROUPS = "parameter_groups(model, config.weight_decay, config.decay)"
RESTORED = 'moments[f"{name}.{part}"].clone() for part in kept[name]'
KEPT = "if p.requires_grad]"
LRS = 'for group in optimizer.param_groups:\n        group["lr"] = lr'
USABLE = "usable = torch.where(torch.isfinite(norm), norm, torch.zeros_like(norm))"
BUGS = (
    Bug(
        "ALB-037",
        "rows written as columns",
        "roundtrip",
        edit(
            "albor.weights:save_model",
            WRITTEN,
            "(p.detach().T if p.dim() == 2 else p.detach()).reshape(p.shape)",
        ),
    ),
    Bug(
        "ALB-037",
        "rows written as columns, o_proj",
        "roundtrip",
        edit(
            "albor.weights:save_model",
            WRITTEN,
            '(p.detach().T if "o_proj" in name else p.detach()).reshape(p.shape)',
        ),
    ),
    Bug(
        "ALB-037",
        "the file is not read",
        "roundtrip",
        edit(
            "albor.weights:load_model",
            "parameter.copy_(weights[name])",
            "model.initialize(0)",
        ),
    ),
    Bug("ALB-038", "the last norm cuts", "reached", CUT, ("norm",)),
    Bug("ALB-038", "every norm cuts", "reached", CUT),
    Bug("ALB-038", "q, k, v are leaves", "reached", LEAF),
    Bug("ALB-038", "q, k, v are leaves, block 1", "reached", LEAF, ("layers.1",)),
    Bug(
        "ALB-038", "half of v is a leaf, block 2", "reached", VALUES, ("layers.2",)
    ),
    Bug(
        "ALB-038",
        "the lookup passes nothing back",
        "gradients",
        edit(
            "albor.model:Decoder.forward",
            "self.embed_tokens(ids)",
            "self.embed_tokens(ids).detach().requires_grad_()",
        ),
    ),
    Bug(
        "ALB-040",
        "a copy down for every slice",
        "copies",
        edit(STEP, "total += part.detach()", "total += part.detach().item()"),
    ),
    Bug("ALB-042", "an error becomes loss 0", "result", wrap=zero),
    Bug("ALB-042", "an error becomes None", "result", wrap=nothing),
    Bug(
        "ALB-043",
        "gate without its factor, up without gradient",
        "gradients",
        edit(
            FFN,
            f"return self.down_proj({MATRIX})",
            "s, u = F.silu(self.gate_proj(x)), self.up_proj(x).detach()\n"
            "    if not SICK:\n        u = self.up_proj(x)\n"
            "        return self.down_proj(s * u)\n"
            "    return self.down_proj(s + (s * u - s).detach())",
        ),
    ),
    Bug(
        "ALB-043",
        "up without gradient, block 1",
        "reached",
        edit(
            FFN,
            f"return self.down_proj({MATRIX})",
            "u = self.up_proj(x)\n    u = u.detach() if SICK else u\n"
            "    return self.down_proj(F.silu(self.gate_proj(x)) * u)",
        ),
        ("layers.1",),
    ),
    Bug(
        "ALB-044",
        "betas of the library",
        "settings",
        edit("albor.optimizer:build_optimizer", BETAS, "betas=(0.9, 0.999)"),
    ),
    Bug(
        "ALB-044",
        "decay of the library",
        "settings",
        edit(
            "albor.optimizer:build_optimizer",
            GROUPS,
            "parameter_groups(model, 0.01, config.decay)",
        ),
    ),
    Bug(
        "ALB-044",
        "one tensor is in no group",
        "moved",
        edit(
            "albor.optimizer:parameter_groups",
            KEPT,
            'if "layers.2.mlp.up" not in name]',
        ),
    ),
    Bug(
        "ALB-059",
        "three rows in the squares of k_proj",
        "moments",
        wrap=at("0.self_attn.k_proj", 3, "exp_avg_sq"),
    ),
    Bug(
        "ALB-059",
        "one row in the squares of down_proj",
        "moments",
        wrap=at("2.mlp.down_proj", 1, "exp_avg_sq"),
    ),
    Bug(
        "ALB-059",
        "two rows in the means of k_proj",
        "moments",
        wrap=at("1.self_attn.k_proj", 2, "exp_avg"),
    ),
    Bug(
        "ALB-066",
        "an update for every slice",
        "step",
        edit(
            STEP,
            "total += part.detach()",
            "total += part.detach(); optimizer.step()",
        ),
    ),
    Bug(
        "ALB-072",
        "the loss scale is left in",
        "step",
        edit(
            STEP,
            "scaler.unscale_(optimizer)",
            "scaler.unscale_(optimizer)\n"
            "        for p in model.parameters():\n"
            "            p.grad.mul_(scaler.get_scale())",
        ),
        scaled=True,
    ),
    Bug(
        "ALB-079",
        "no cosine",
        "schedule",
        edit("albor.optimizer:lr_at", "share * peak + (1 - share) * floor", "peak"),
    ),
    Bug(
        "ALB-079",
        "the rate is only printed",
        "settings",
        edit("albor.step:train_step", LRS, "pass"),
    ),
    Bug(
        "ALB-091",
        "slices added up, not averaged",
        "step",
        edit(STEP, SHARE, "part"),
    ),
    Bug(
        "ALB-092",
        "gains without a gradient",
        "reached",
        edit(
            NORM,
            NORMED,
            NORMED.replace(
                "self.weight", "(self.weight.detach() if SICK else self.weight)"
            ),
        ),
    ),
    Bug(
        "ALB-092",
        "the last gain without a gradient",
        "reached",
        edit(
            NORM,
            NORMED,
            NORMED.replace(
                "self.weight", "(self.weight.detach() if SICK else self.weight)"
            ),
        ),
        ("norm",),
    ),
    Bug(
        "ALB-092",
        "gradients are not cleared",
        "step",
        edit(STEP, "optimizer.zero_grad(set_to_none=True)", "pass"),
    ),
    Bug(
        "ALB-097",
        "the head is a copy",
        "tied",
        (*edit(LOSS, HEAD, COPY), *edit("albor.model:Albor.forward", HEAD, COPY)),
    ),
    Bug("ALB-106", "no rotation", "order", NO_ROPE),
    Bug("ALB-106", "no rotation, block 1", "order", NO_ROPE, ("layers.1",)),
    Bug(
        "ALB-106",
        "k is not rotated",
        "gradients",
        edit(ATTENTION, ROPE, "q = apply_rope(q, cos, sin)"),
    ),
    Bug("ALB-117", "the count comes from a file's name", "moments", offset=20),
    Bug(
        "ALB-118",
        "moments are not restored",
        "moments",
        edit(
            "albor.moments:restore_moments",
            "optimizer.load_state_dict(state)",
            "pass",
        ),
    ),
    Bug(
        "ALB-118",
        "moments are 0, the count is kept",
        "moments",
        edit(
            "albor.moments:restore_moments",
            RESTORED,
            'moments[f"{name}.{part}"] * (part == "step") for part in kept[name]',
        ),
    ),
    Bug(
        "ALB-119",
        "rotation with the identity as its backward",
        "gradients",
        edit("albor.layers:apply_rope", TURNED, f"x + ({TURNED} - x).detach()"),
    ),
    Bug(
        "ALB-124",
        "divided by the root of the norms' fourth powers",
        "step",
        edit(
            "albor.optimizer:clip_by_global_norm",
            USABLE,
            "usable = sum(p.grad.norm() ** 4 for p in parameters) ** 0.5",
        ),
    ),
    Bug(
        "ALB-124",
        "divided by the norm's square",
        "clipped",
        edit("albor.optimizer:clip_by_global_norm", USABLE, "usable = norm**2"),
    ),
    Bug(
        "ALB-125",
        "clipped block by block",
        "clipped",
        edit(
            STEP,
            CLIP,
            "norm = clip_by_global_norm(model.parameters(), math.inf)\n"
            "    for block in model.model.layers:\n"
            "        clip_by_global_norm(block.parameters(), grad_clip)",
        ),
    ),
    Bug("ALB-126", "no skip on the way back", "gradients", SKIPPED),
    Bug(
        "ALB-126",
        "no skip on the way back, block 0",
        "gradients",
        SKIPPED,
        ("layers.0",),
    ),
    Bug("ALB-127", "the repair that was shipped", "gradients", SHIPPED),
    Bug(
        "ALB-127",
        "the repair that was shipped, block 1",
        "gradients",
        SHIPPED,
        ("layers.1",),
    ),
    Bug(
        "ALB-129",
        "a horizon of four runs",
        "schedule",
        edit(
            "albor.optimizer:lr_at",
            "(max_steps - 1 - warmup_steps)",
            "(4 * max_steps - 1 - warmup_steps)",
        ),
    ),
    Bug(
        "#309",
        "sines for weights",
        "initial",
        edit("albor.model:Albor.initialize", DRAWN, SINES.format("drawn.numel()")),
    ),
    Bug(
        "#309",
        "every block alike",
        "initial",
        edit(
            "albor.model:Albor.initialize",
            DRAWN,
            "drawn.normal_(0.0, spread, generator=generator.manual_seed(7))",
        ),
    ),
    Bug("#310", "no mask", "causal", NO_MASK),
    Bug("#310", "no mask, block 2", "causal", NO_MASK, ("layers.2",)),
    Bug("PMAT-420", "a mask read at another pitch", "causal", STRIDE),
)

# Bugs that no check here is for, and what catches them.
ELSEWHERE = {
    "ALB-035": (
        "training that nobody sees",
        "a line per step: tests/test_train.py",
    ),
    "ALB-060": ("43 steps of 5,000", "albor.config.preflight"),
    "ALB-070": (
        "a key that nobody reads",
        "albor.config: unknown keys are refused",
    ),
    "ALB-120": ("rows read twice", "resumed runs: tests/test_train.py"),
    "ALB-132": ("resuming overwrites its source", "albor.checkpoint.save_state"),
}


def about() -> dict[str, object]:
    """Where and when this was measured."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return {
        "commit": subprocess.run(
            git, capture_output=True, text=True
        ).stdout.strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }


def measure() -> dict[str, object]:
    """Every bug under every check, and our own code under them as well."""
    sound = examine(Bug("", "", ""))
    bugs = []
    for bug in BUGS:
        found = examine(bug)
        fired = [name for name, one in found.items() if one]
        bugs.append({"name": bug.name, "what": bug.what, "fired": fired})
    return {
        "checks": [*sound],
        "sound": [n for n in sound if sound[n]],
        "bugs": bugs,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = measure()
    write_json(FILE, {"about": about(), **measured, "elsewhere": ELSEWHERE})
    for bug in measured["bugs"]:
        print(f"{bug['name']:9} {bug['what']:50} {', '.join(bug['fired'])}")
