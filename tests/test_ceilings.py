"""FLOPs against PyTorch's own counter; ceilings against what cannot be."""

import dataclasses
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from albor.ceilings import ceilings, flops_by_part, flops_per_token, median_seconds
from albor.model import Albor
from albor.shapes import PRESETS, ModelConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(131, 48, 112, 3, 6, 2, 40, head_dim=10)
B, T = 5, 17


@pytest.mark.parametrize(
    "config", [CONFIG, dataclasses.replace(CONFIG, num_key_value_heads=6)]
)
def test_flops_are_those_that_pytorch_counts(config: ModelConfig) -> None:
    """The plain formula of attention, and a head with all logits at once."""
    model, ids = Albor(config, seed=0), torch.arange(B * T).view(B, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    seen = {str(k): n for k, n in counter.get_flop_counts()["Global"].items()}
    parts = flops_by_part(config, T)
    assert seen["aten.mm"] == B * T * parts["matrix products"]
    assert seen["aten.bmm"] == B * T * parts["attention"]
    assert counter.get_total_flops() == B * T * flops_per_token(config, T)


def test_the_loss_in_chunks_makes_the_same_products() -> None:
    model, ids = Albor(CONFIG, seed=0), torch.arange(B * T).view(B, T)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(ids, ids).backward()
    expected = B * T * flops_per_token(CONFIG, T)
    assert expected <= counter.get_total_flops() <= expected * 1.0001


def test_causal_flops_halve_attention_alone() -> None:
    card = PRESETS["albor-base-350m"]
    palm, causal = (flops_by_part(card, 1024, which) for which in (False, True))
    assert palm["matrix products"] == causal["matrix products"]
    assert palm["attention"] == 2 * causal["attention"]
    with pytest.raises(ValueError, match="seq_len is 0"):
        flops_per_token(card, 0)


def test_median_seconds_is_the_time_of_one_call() -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.01 if len(calls) % 4 else 0.05)  # a slow one now and then

    seconds = median_seconds(run, CPU, 0.1)
    assert 0.009 < seconds < 0.04
    assert len(calls) >= 5  # a warm-up, a look, three


def test_ceilings_of_this_machine() -> None:
    found = ceilings(CPU, "fp32", 0.1, [(64, 96, 128), (160, 160, 160)])
    assert len(found.products) == 6
    assert found.flops == max(found.products.values())
    assert 1e8 < found.flops < 1e15 and 1e8 < found.bytes < 1e14
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        ceilings(CPU, "fp8")
