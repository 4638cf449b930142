"""Guards: silent in sound runs, changing no bit, and in time before a save."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import Cut, Run

from albor import guards
from albor.checkpoint import latest_state, load_state
from albor.checks import CheckError
from albor.guards import Guards
from albor.muon import make_optimizer
from albor.step import StepResult


class Guarded(Run):
    """The run of the loop's tests, with guards; `spoil(run, step)` is its bug."""

    def __init__(self, folder, spoil=None, start=0, **how):
        super().__init__(folder, **how)
        self.guards = Guards(
            self.model,
            self.optimizer,
            self.recipe,
            folder=folder,
            start_step=start,
            scaled=self.scaler is not None,
        )
        self.spoil = spoil
        self.options["inspect"] = self.inspect

    def inspect(self, step, result):
        if self.spoil:
            self.spoil(self, step)
        self.guards.inspect(step, result)

    def save(self, done):
        self.guards.before_save(done)
        super().save(done)

    def state(self, name, part):
        return self.optimizer.state[self.model.get_parameter(name)][part]


def test_a_guarded_run_ends_in_the_same_bits(tmp_path):
    plain, guarded = Run(tmp_path / "a"), Guarded(tmp_path / "b")
    plain.go()
    generator = torch.get_rng_state()
    guarded.guards.begin()
    guarded.go()
    assert torch.equal(generator, torch.get_rng_state())
    assert all(map(torch.equal, plain.bits, guarded.bits))
    # Before the run, after step 0, before the states of steps 4, 8 and 12.
    assert guarded.guards.looks == 5
    assert guarded.saved == [4, 8, 12]
    assert 0 < guarded.guards.seconds < 60


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sound_runs_pass_in_every_precision_and_when_resumed(tmp_path, precision):
    first = Guarded(tmp_path, precision=precision)
    first.guards.begin()
    first.die_in(6)
    with pytest.raises(Cut):
        first.go()
    again = Guarded(tmp_path, precision=precision, seed=9, start=4)
    again.guards.start = 4
    again.resume()
    assert again.guards.looks == 3  # after step 4, before the states of 8 and 12


@pytest.mark.parametrize("schedule", [{"warmup_steps": 0}, {"max_steps": 4}])
def test_sound_runs_of_other_lengths(tmp_path, schedule):
    run = Guarded(tmp_path, **{"eval_interval": 0, **schedule})
    run.guards.begin()
    run.go()
    run = Guarded(tmp_path / "0", min_lr_ratio=0.0, save_interval=1)
    run.guards.begin()
    run.go()  # the last rate is exactly 0, and nothing may have to move


@pytest.mark.parametrize("bf16", [False, True])
def test_a_sound_run_with_muon_and_what_it_would_notice(tmp_path, bf16):
    """What `begin`, `look` and `check_moved` hold a run to, with Muon's rule."""
    run = Guarded(tmp_path, scaled_init=True, lr_scheduler="linear")
    asked = dataclasses.replace(run.recipe.optimizer, name="muon", momentum=0.8)
    run.recipe = run.guards.recipe = dataclasses.replace(
        run.recipe, optimizer=asked
    )
    run.model.initialize(seed=1, scaled_init=True)
    run.optimizer = run.guards.optimizer = make_optimizer(run.model, asked, bf16)
    run.guards.begin()
    kept = []
    run.options["save"] = None
    run.options["inspect"] = lambda *at: run.guards.inspect(*at) or kept.append(at)
    run.go()
    run.guards.look()
    assert run.guards.looks == 3 and len(kept) == run.recipe.training.max_steps
    name = "model.layers.1.self_attn.k_proj.weight"
    run.state(name, "momentum_buffer")[2, 1] = math.nan
    with pytest.raises(CheckError, match=r"k_proj.*momentum_buffer is not finite"):
        run.guards.look()
    muon = next(g for g in run.optimizer.param_groups if g["rule"] == "muon")
    muon["momentum"] = 0.95
    last = run.recipe.training.max_steps - 1
    with pytest.raises(CheckError, match=r": momentum is 0.95 at step .*, and 0.8"):
        guards.check_settings(run.model, run.optimizer, run.recipe, last)


def test_a_state_that_fails_is_not_saved(tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"

    def spoil(run, step):
        if step == 5:
            run.state(name, "exp_avg_sq")[3, 2] = math.inf

    run = Guarded(tmp_path, spoil)
    run.guards.begin()
    with pytest.raises(CheckError) as caught:
        run.go()
    text = str(caught.value)
    assert text.startswith(f"step 7: {name}: 1 of 192 values of exp_avg_sq are not")
    assert text.endswith(f"the last sound state is {latest_state(tmp_path)})")
    assert run.saved == [4] and latest_state(tmp_path).name == "step-4"


def test_a_run_that_fails_at_once_has_no_state_to_name(tmp_path):
    def spoil(run, step):
        run.model.model.layers[2].mlp.up_proj.weight.grad[:, 5] = 0

    run = Guarded(tmp_path, spoil)
    with pytest.raises(
        CheckError, match=r"step 0: .*up_proj.* 1 of 16 columns, the"
    ):
        run.go()
    assert run.saved == [] and latest_state(tmp_path) is None


def stepped(tmp_path, steps=1):
    """A run after some steps, with the gradients of the last."""
    run, kept = Guarded(tmp_path, max_steps=20), []
    run.options["inspect"] = lambda step, result: kept.append(result)
    run.options["save"] = None

    class Enough(Exception):
        pass

    def enough(step, result):
        kept.append(result)
        if step + 1 == steps:
            raise Enough

    run.options["inspect"] = enough
    with pytest.raises(Enough):
        run.go()
    return run, kept[-1]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return stepped(tmp_path_factory.mktemp("run"), steps=3)


NAMES = (
    "embed_tokens",
    "layers.0.mlp.down_proj",
    "layers.2.self_attn.v_proj",
    "norm",
)


@settings(max_examples=40)
@given(
    st.sampled_from(NAMES),
    st.integers(0, 10**6),
    st.sampled_from(["negative", "infinite", "nan", "small", "mean", "mean nan"]),
)
def test_one_wrong_number_in_any_moment_of_any_tensor(sound, name, place, how):
    run, _ = sound
    name = f"model.{name}.weight"
    m, v = run.state(name, "exp_avg"), run.state(name, "exp_avg_sq")
    before = m.clone(), v.clone()
    at = place % v.numel()
    p = run.model.get_parameter(name)
    guards.check_moments(run.model, run.optimizer, 3)
    if how == "small" and not p.grad.view(-1)[at].abs() > 1e-10:
        return
    values = {
        "negative": -1e-12,
        "infinite": math.inf,
        "nan": math.nan,
        "small": 0.0,
    }
    target, value = (v, values[how]) if how in values else (m, 9.9)
    target.view(-1)[at] = math.nan if how == "mean nan" else value
    try:
        with pytest.raises(CheckError, match=f"{name}: 1 of {v.numel()} values"):
            guards.check_moments(run.model, run.optimizer, 3)
    finally:
        m.copy_(before[0]), v.copy_(before[1])


def test_moments_bound_of_random_gradients():
    generator = torch.Generator().manual_seed(0)
    for beta1, beta2 in ((0.9, 0.95), (0.9, 0.999), (0.5, 0.3), (0.0, 0.95)):
        layer = torch.nn.Linear(7, 5, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters(), betas=(beta1, beta2))
        for step in range(60):
            g = torch.randn(5, 7, generator=generator)
            layer.weight.grad = 10 ** (3 * torch.sin(g.sum())) * g
            optimizer.step()
            guards.check_moments(layer, optimizer, step + 1)


def test_the_bound_is_reached():
    """Gradients in the worst ratio, (beta1 / beta2)^k back in time, attain C."""
    beta1, beta2, m, v = 0.9, 0.95, 0.0, 0.0
    for k in range(400, -1, -1):
        g = (beta1 / beta2) ** k
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    C = (1 - beta1) ** 2 / ((1 - beta2) * (1 - beta1**2 / beta2))
    assert m**2 / v == pytest.approx(C)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_does_not_reach(sound, name):
    run, _ = sound
    p = run.model.get_parameter(f"model.{name}.weight")
    kept = p.grad.clone()
    guards.check_reached(run.model)
    for change in ("none", "nan", "row", "all"):
        p.grad = None if change == "none" else kept.clone()
        if change == "nan":
            p.grad.view(-1)[-1] = math.nan
        elif change == "row":
            p.grad[3] = 0
        elif change == "all":
            p.grad.zero_()
        with pytest.raises(CheckError, match=rf"model\.{name}\.weight"):
            guards.check_reached(run.model)
        if change == "row":
            guards.check_reached(run.model, rows=False)
    p.grad = kept


def test_clipping_by_blocks_by_squares_and_not_at_all(sound):
    run, result = sound
    guards.check_clipped(run.model, result, run.recipe.training.grad_clip)
    norm = run.recipe.training.grad_clip * 3
    larger = dataclasses.replace(result, grad_norm=norm)
    limit = 2 * run.recipe.training.grad_clip
    with pytest.raises(CheckError, match="after clipping the gradient has norm"):
        guards.check_clipped(run.model, larger, limit)


def test_results_that_are_none_or_nothing():
    good = StepResult(2.5, 0.7, 1.0, True, 1.0)
    guards.check_result(good)
    guards.check_result(
        StepResult(2.5, math.inf, 1.0, False, 32768.0)
    )  # fp16 skips
    with pytest.raises(CheckError, match="returned nothing"):
        guards.check_result(None)
    for part in ("loss", "grad_norm"):
        with pytest.raises(CheckError, match="no text is free of surprise"):
            guards.check_result(dataclasses.replace(good, **{part: 0.0}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lr", 1e-3), ("betas", (0.9, 0.999)), ("betas", (0.8, 0.95))),
        *(("eps", 1e-6), ("weight_decay", 0.01)),
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_settings_that_are_not_the_recipes(tmp_path, key, value, group):
    run, _ = stepped(tmp_path)
    guards.check_settings(run.model, run.optimizer, run.recipe, 0)
    run.optimizer.param_groups[group][key] = value
    with pytest.raises(CheckError, match=f": {key} is .* at step 0, and .* recipe"):
        guards.check_settings(run.model, run.optimizer, run.recipe, 0)


@pytest.mark.parametrize(
    "plan",
    [
        {"warmup_steps": 0, "max_steps": 1},
        {"warmup_steps": 3, "max_steps": 4},
        {"warmup_steps": 50, "max_steps": 5000, "min_lr_ratio": 0.0},
        {"warmup_steps": 7, "max_steps": 99, "lr_scheduler": "constant"},
        {"warmup_steps": 7, "max_steps": 99, "lr_scheduler": "linear"},
        {"warmup_steps": 0, "lr_scheduler": "linear", "min_lr_ratio": 0.0},
    ],
)
def test_schedules(tmp_path, plan, monkeypatch):
    plan = {"save_interval": 0, "eval_interval": 0, **plan}
    recipe = Run(tmp_path, **plan).recipe
    guards.check_schedule(recipe)
    sound = guards.scheduled_rate
    monkeypatch.setattr(guards, "scheduled_rate", lambda r, s: 1.001 * sound(r, s))
    with pytest.raises(CheckError, match="the rate at step 0"):
        guards.check_schedule(recipe)


def test_what_has_not_moved(sound):
    run, _ = sound
    marks = guards.fingerprints(run.model, run.optimizer)
    assert len(marks) == 3 * len(list(run.model.parameters()))
    p = run.model.model.layers[1].mlp.gate_proj.weight
    key = ("model.layers.1.mlp.gate_proj.weight", "weight")
    kept = p.detach().clone()
    with torch.no_grad():
        p[:20] *= 1.001
    old, now = {key: marks[key]}, guards.fingerprints(run.model, run.optimizer)
    guards.check_moved(old, now)
    with pytest.raises(CheckError, match=r"8 of 28 rows of its weight .* first 20"):
        guards.check_moved(old, now, rows=True)
    p.data.copy_(kept)
    now = guards.fingerprints(run.model, run.optimizer)
    with pytest.raises(CheckError, match="28 of 28 rows"):
        guards.check_moved(old, now)


def test_a_resumed_run_that_forgot(tmp_path):
    Guarded(tmp_path, max_steps=12).go()
    run = Guarded(tmp_path, start=12)
    for keep in (True, False):
        run = Guarded(tmp_path / str(keep), start=4)
        state = Guarded(tmp_path / str(keep) / "first")
        state.die_in(5)
        with pytest.raises(Cut):
            state.go()
        run.folder = state.folder
        load_state(latest_state(state.folder), run.model, run.optimizer)
        for p in run.model.parameters():
            if keep:
                run.optimizer.state[p]["exp_avg"].zero_()
                run.optimizer.state[p]["exp_avg_sq"].zero_()
        if not keep:
            run.optimizer.state.clear()
        run.options["output_dir"] = state.folder
        words = "forgotten all gradients but one" if keep else "counts 1 updates"
        with pytest.raises(CheckError, match=f"step 4: .*{words}"):
            run.go(start_step=4)
