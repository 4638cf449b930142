# Generated from book/ceilings.md: edit the chapter, not this file.
"""How fast could it be? The FLOPs of a training step, and what a device can do.

Notable here:
- FLOPs are counted from the shapes, in the two conventions that people quote;
- ceilings are measured on the device at hand, with the products of training.

One multiplication or one addition is one FLOP. T tokens per sequence, L layers, H
heads of width Dh.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from albor.hardware import free_memory
from albor.shapes import ModelConfig, parameter_shapes

__all__ = [
    "Ceilings",
    "ceilings",
    "flops_by_part",
    "flops_per_token",
    "median_seconds",
]


def flops_by_part(
    config: ModelConfig, seq_len: int, causal: bool = False
) -> dict[str, int]:
    """Training FLOPs per token, of the matrix products and of attention.

    Forward and backward: 6 for each entry of a matrix, the tied head's included,
    the embedding's look-up not; 12 * L * H * Dh * T for the T x T scores, after
    Chowdhery et al. (2023), https://arxiv.org/abs/2204.02311, appendix B. `causal`
    takes half of those, as a kernel does that skips what the mask hides.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: it must be at least 1")
    shapes = parameter_shapes(config).values()
    entries = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    heads = config.num_attention_heads * config.head_dim
    scores = 12 * config.num_hidden_layers * heads * seq_len
    return {
        "matrix products": 6 * entries,
        "attention": scores // 2 if causal else scores,
    }


def flops_per_token(config: ModelConfig, seq_len: int, causal: bool = False) -> int:
    """Training FLOPs per token: PaLM's convention, or with attention halved."""
    return sum(flops_by_part(config, seq_len, causal).values())


def median_seconds(
    run: Callable[[], object], device: torch.device, seconds: float = 0.2
) -> float:
    """Median time of `run`, after a warm-up, over about so many seconds of runs.

    At least 3. On CUDA all are queued between pairs of events before the first is
    waited for, so that the time to launch does not count.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    tick = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    number = int(seconds / max(time.perf_counter() - tick, 1e-6))
    number, times = max(3, min(number, 1000)), []
    if device.type == "cuda":
        pairs = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            for _ in range(number)
        ]
        stream = torch.cuda.current_stream(device)
        for begin, end in pairs:
            begin.record(stream)
            run()
            end.record(stream)
        torch.cuda.synchronize(device)
        times = [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]
    else:
        for _ in range(number):
            tick = time.perf_counter()
            run()
            times.append(time.perf_counter() - tick)
    return statistics.median(times)


@dataclass(frozen=True)
class Ceilings:
    """What a device did at its best: the denominators of every share."""

    device: str
    precision: str
    flops: float  # of the best matrix product, a second
    bytes: float  # of a large copy, read and written, a second
    products: dict[str, float]  # "form rows x inner x columns": FLOPs a second


def ceilings(
    device: torch.device,
    precision: str = "bf16",
    seconds: float = 2.0,
    shapes: Iterable[tuple[int, int, int]] = (),
) -> Ceilings:
    """Measure matrix products and a memory copy, for about so many seconds.

    A shape is (tokens, in, out) of a linear layer. Each is run in the three forms
    of training: y = x W^T, dx = dy W, dW = dy^T x. Numbers are random: products of
    zeros run faster than real ones. The copy's buffers are far larger than a cache.
    """
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        raise ValueError(f"precision is {precision!r}; use {' or '.join(kinds)}")
    cuda, dtype = device.type == "cuda", kinds[precision]
    sizes = (4096, 8192) if cuda else (512, 1024)
    layer = (16384, 1024, 4096) if cuda else (1024, 1024, 4096)
    chosen = tuple(shapes) or (*((n, n, n) for n in sizes), layer)
    each = seconds / (3 * len(chosen) + 1)
    products = {}
    for tokens, inner, outer in chosen:
        x = torch.randn(tokens, inner, device=device).to(dtype)
        w = torch.randn(outer, inner, device=device).to(dtype)
        y = torch.randn(tokens, outer, device=device).to(dtype)
        forms = {
            "x W^T": lambda x=x, w=w: x @ w.T,
            "dy W": lambda y=y, w=w: y @ w,
            "dy^T x": lambda x=x, y=y: y.T @ x,
        }
        for form, run in forms.items():
            rate = 2 * tokens * inner * outer / median_seconds(run, device, each)
            products[f"{form:6} {tokens} x {inner} x {outer}"] = rate
    size = 2**30 if cuda else 2**28
    size = min(size, (free_memory(device) or 2**40) // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = median_seconds(lambda: target.copy_(source), device, each)
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    best = max(products.values())
    return Ceilings(name, precision, best, 2 * size / copied, products)
