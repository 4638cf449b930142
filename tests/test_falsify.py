"""The predictions: each verdict on data that it is due for, faults included."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from albor.artifacts import append_jsonl, write_json
from albor.falsify import (
    falsify,
    loss_falls,
    norms_bounded,
    read_log,
    runs_agree,
    smoothed,
    validate_checkpoint,
)
from albor.model import Albor
from albor.shapes import ModelConfig
from albor.train import METRICS
from albor.weights import save_model

SHAPE = ModelConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=16,
    head_dim=10,
)


def log(folder: Path, losses: list, norms: list | None = None) -> Path:
    for step, loss in enumerate(losses):
        norm = norms[step] if norms else 2.0
        clip = 1.0 if norm is None else min(1.0, 1.0 / norm)
        record = {"step": step, "loss": loss, "grad_norm": norm, "clip": clip}
        append_jsonl(folder / METRICS, record)
    return folder


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=40), st.integers(1, 30))
def test_smoothing_is_the_weighted_sum_that_it_stands_for(
    losses: list[float], span: int
) -> None:
    weight = 2 / (span + 1)
    for t, mean in enumerate(smoothed(losses, span)):
        due = (1 - weight) ** t * losses[0]
        due += sum(
            weight * (1 - weight) ** (t - i) * losses[i] for i in range(1, t + 1)
        )
        assert math.isclose(mean, due, rel_tol=1e-9)


@pytest.mark.parametrize(
    "steps, status", [(22, "INSUFFICIENT DATA"), (23, "CORROBORATED")]
)
def test_the_least_data_is_warm_up_window_and_span(
    tmp_path: Path, steps: int, status: str
) -> None:
    run = log(tmp_path, [10 - step / 10 for step in range(steps)])
    assert loss_falls(run, 5, span=3, window=15).status == status


@pytest.mark.parametrize(
    "rise, status", [(1.04, "CORROBORATED"), (1.07, "FALSIFIED")]
)
def test_a_sustained_rise_counts_from_five_percent_on(
    tmp_path: Path, rise: float, status: str
) -> None:
    run = log(tmp_path, [10.0] * 5 + [5.0] * 200 + [5.0 * rise] * 300)
    assert loss_falls(run, 2, span=4, window=50).status == status


def test_a_level_loss_does_not_fall(tmp_path: Path) -> None:
    assert loss_falls(log(tmp_path, [7.0] * 800), 10).status == "FALSIFIED"


def test_noise_is_no_fall(tmp_path: Path) -> None:
    """Of 40 runs that learn nothing, about half end lower, and none may pass."""
    noise = np.random.default_rng(0).standard_normal((40, 300))
    ends_lower = 0
    for number, losses in enumerate(10 + 0.3 * noise):
        run = log(tmp_path / str(number), losses.tolist())
        assert loss_falls(run, 30, span=25, window=100).status == "FALSIFIED"
        means = smoothed(losses.tolist(), 25)
        ends_lower += means[-1] < means[30]
    assert 10 < ends_lower < 30


@pytest.mark.parametrize(
    "length, status", [(5, "CORROBORATED"), (120, "FALSIFIED")]
)
def test_a_spike_passes_and_a_plateau_does_not(
    tmp_path: Path, length: int, status: str
) -> None:
    losses = [3 + 7 * math.exp(-step / 60) for step in range(500)]
    for step in range(300, 300 + length):
        losses[step] += 4
    run = log(tmp_path, losses)
    assert loss_falls(run, 20, span=40, window=100).status == status


def test_a_warm_up_may_rise(tmp_path: Path) -> None:
    losses = [5 + step / 10 for step in range(50)]
    losses += [10 * 0.99**step for step in range(120)]
    assert (
        loss_falls(log(tmp_path, losses), 60, span=10, window=80).status
        == "CORROBORATED"
    )


@pytest.mark.parametrize("step, norm", [(30, 10.0), (59, 400.0), (0, 400.0)])
def test_a_norm_over_the_bound_after_the_warm_up_falsifies(
    tmp_path: Path, step: int, norm: float
) -> None:
    norms: list = [3.0] * 60
    norms[step] = norm
    verdict = norms_bounded(log(tmp_path, [3.0] * 60, norms), 20)
    assert verdict.status == ("FALSIFIED" if step >= 20 else "CORROBORATED")
    assert step < 20 or f"step {step}" in verdict.evidence


def test_a_clip_that_did_not_clip_falsifies_even_in_the_warm_up(
    tmp_path: Path,
) -> None:
    for step in range(30):
        norm, clip = (50.0, 0.5) if step == 1 else (2.0, 0.5)
        record = {"step": step, "loss": 3.0, "grad_norm": norm, "clip": clip}
        append_jsonl(tmp_path / METRICS, record)
    verdict = norms_bounded(tmp_path, 10)
    assert (
        verdict.status == "FALSIFIED"
        and "is 25 at step 1 when clipped" in verdict.evidence
    )


def test_skipped_steps_are_counted_and_not_judged(tmp_path: Path) -> None:
    run = log(tmp_path / "some", [3.0] * 30, [None, *[2.0] * 29])
    verdict = norms_bounded(run, 10)
    assert verdict.status == "CORROBORATED" and "1 skipped" in verdict.evidence
    none = log(tmp_path / "none", [3.0] * 30, [None] * 30)
    assert norms_bounded(none, 10).status == "INSUFFICIENT DATA"


@pytest.mark.parametrize("keep", [(0, 2), (1, 2), (0, 0), (2, 1)])
def test_a_log_with_gaps_or_repeats_is_refused(
    tmp_path: Path, keep: tuple[int, ...]
) -> None:
    for step in keep:
        append_jsonl(tmp_path / METRICS, {"step": step, "loss": 1.0})
    with pytest.raises(ValueError, match=r"line \d: step"):
        read_log(tmp_path)


def finished(folder: Path, model: Albor, steps: int = 9, **changes: object) -> Path:
    save_model(folder, model)
    plan = {"max_steps": 9, "output_dir": str(folder)}
    about: dict = {
        "recipe": {"training": plan},
        "seed": 42,
        "corpus": {"digest": "c"},
    }
    about |= {"tokenizer": "t", "micro_batch": 2, "sessions": [{"versions": {}}]}
    write_json(folder / "provenance.json", about | changes)
    write_json(folder / "final_model.json", {"steps": steps})
    return folder


def test_one_bit_in_one_tensor_falsifies_determinism(tmp_path: Path) -> None:
    model = Albor(SHAPE, seed=3)
    one = finished(tmp_path / "one", model)
    two = finished(tmp_path / "two", model)
    assert runs_agree(one, two).status == "CORROBORATED"
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)[3, 4] ^= 1
    assert runs_agree(one, finished(two, model)).status == "FALSIFIED"


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"seed": 7}, "seed"),
        ({"tokenizer": "u"}, "tokenizer"),
        ({"corpus": {"digest": "d"}}, "corpus"),
        ({"micro_batch": 1}, "micro_batch"),
        ({"steps": 8}, "steps"),
        ({"recipe": {"training": {"max_steps": 8}}}, "recipe"),
        ({"sessions": [{"versions": {"torch": "1"}}]}, "versions"),
    ],
)
def test_other_runs_are_no_evidence(
    tmp_path: Path, changes: dict, word: str
) -> None:
    model = Albor(SHAPE, seed=3)
    one = finished(tmp_path / "one", model)
    verdict = runs_agree(one, finished(tmp_path / "two", model, **changes))
    assert verdict.status == "INSUFFICIENT DATA" and word in verdict.evidence


def test_a_run_is_not_compared_with_itself_or_with_nothing(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", Albor(SHAPE, seed=3))
    with pytest.raises(ValueError, match="given twice"):
        runs_agree(one, tmp_path / "one" / ".." / "one")
    assert runs_agree(one, tmp_path / "two").status == "NOT RUN"


def test_two_equal_runs_of_another_seed_say_nothing_of_42(tmp_path: Path) -> None:
    model = Albor(SHAPE, seed=3)
    pair = [finished(tmp_path / name, model, seed=5) for name in ("one", "two")]
    assert runs_agree(*pair).status == "INSUFFICIENT DATA"
    assert runs_agree(*pair, seed=5).status == "CORROBORATED"


def moved(skip: str = "") -> Albor:
    model = Albor(SHAPE, seed=42)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            step = 0.01 * torch.randn(p.shape, generator=generator)
            p += step if name != skip else 0.0
    return model


def test_initial_weights_are_recognised(tmp_path: Path) -> None:
    found = validate_checkpoint(finished(tmp_path, Albor(SHAPE, seed=42)))
    assert not found.passed and len(found.unmoved) == 2 + 9 * 3
    assert "initial weights" in str(found)


def test_one_tensor_that_stood_still_is_named(tmp_path: Path) -> None:
    assert validate_checkpoint(finished(tmp_path / "all", moved())).passed
    for name, _ in Albor(SHAPE).named_parameters():
        found = validate_checkpoint(finished(tmp_path / "one", moved(skip=name)))
        assert found.unmoved == (name,) and name in str(found) and not found.passed


def test_a_copied_layer_and_a_bad_number_are_named(tmp_path: Path) -> None:
    model = moved()
    model.model.layers[2].load_state_dict(model.model.layers[0].state_dict())
    run = finished(tmp_path, model)
    found = validate_checkpoint(run)
    assert len(found.equal_layers) == 9 and "layers.2." in str(found)
    assert all(".layers.2." in name for name in found.equal_layers)
    weights = load_file(run / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].clone()
    weights["model.norm.weight"][5] = math.inf
    (run / "model.safetensors").unlink()
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    assert validate_checkpoint(run).not_finite == ("model.norm.weight",)


def test_few_moved_numbers_are_reported(tmp_path: Path) -> None:
    model, fresh = moved(), Albor(SHAPE, seed=42)
    with torch.no_grad():
        model.model.embed_tokens.weight[7:] = fresh.model.embed_tokens.weight[7:]
    found = validate_checkpoint(finished(tmp_path, model))
    assert found.partly == ("model.embed_tokens.weight",)
    assert np.isclose(found.least_moved, 7 / 67)


def test_validation_wants_a_seed_and_the_models_own_tensors(tmp_path: Path) -> None:
    save_model(tmp_path, moved())
    with pytest.raises(ValueError, match="no seed"):
        validate_checkpoint(tmp_path)
    assert validate_checkpoint(tmp_path, seed=42).passed
    weights = load_file(tmp_path / "model.safetensors")
    weights["stray"] = torch.ones(2)
    save_file(weights, tmp_path / "more.safetensors", {"format": "pt"})
    (tmp_path / "more.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stray"):
        validate_checkpoint(tmp_path, seed=42)


def test_all_verdicts_of_a_folder_that_holds_nothing(tmp_path: Path) -> None:
    assert {verdict.status for verdict in falsify(tmp_path)} == {"NOT RUN"}
