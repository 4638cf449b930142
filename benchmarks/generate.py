"""Measure decoding against `transformers` and against what the machine allows.

    python -m benchmarks.generate

Random weights in the shape of a preset, bfloat16, one copy for all arms: a step of
`albor.decode`, a step of `transformers.generate`, the linear layers alone, called
one after the other, and the reading of as many bytes as the weights have. The arms
take turns in one process, so that a busy machine slows them all; a figure is the
median over the rounds. It lands in `benchmarks/results/generate.json`.
"""

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from albor.artifacts import write_json
from albor.config import project_path
from albor.decode import Slots, decode
from albor.model import Albor
from albor.shapes import PRESETS
from albor.weights import hf_config


def per_step(times: list[float]) -> float:
    """The median time between two tokens, the first few left out."""
    return statistics.median(b - a for a, b in zip(times[1:], times[2:], strict=False))


def main() -> None:
    """Run all arms at all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="albor-base-350m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=10, help="tokens in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    config = PRESETS[given.preset]
    model = Albor(config, seed=0).to(torch.bfloat16).eval()
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**hf_config(config)))
    theirs.load_state_dict(model.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.eval()
    theirs.generation_config.eos_token_id = None
    numbers = [p for p in model.parameters() if p.dim() == 2]
    weight_bytes = 2 * sum(p.numel() for p in numbers)
    matrix = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    order = [*list(matrix.values())[1:], model.model.embed_tokens.weight]
    buffer = torch.zeros(2**26)  # 256 MiB, far more than any cache

    def linear(batch: int) -> Callable[[], float]:
        inputs = {
            n: torch.randn(batch, n).to(torch.bfloat16)
            for n in {p.shape[1] for p in order}
        }

        def once() -> float:
            start = time.perf_counter()
            for weight in order:
                F.linear(inputs[weight.shape[1]], weight)
            return time.perf_counter() - start

        return lambda: statistics.median(once() for _ in range(3))

    def ours(ids: list[list[int]]) -> float:
        times = []
        for i, _ in enumerate(
            decode(model, ids, max_new_tokens=given.new, stop=(), slots=len(ids))
        ):
            if i % len(ids) == len(ids) - 1:
                times.append(time.perf_counter())
        return per_step(times)

    def transformers(ids: list[list[int]]) -> float:
        times: list[float] = []

        def clock(*_: Any, **__: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        batch = torch.tensor(ids)
        theirs.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=given.new,
            do_sample=False,
            stopping_criteria=[clock],
            pad_token_id=3,
        )
        return per_step(times)

    def reading() -> float:
        start = time.perf_counter()
        buffer.sum()
        return buffer.nbytes / (time.perf_counter() - start)

    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    speeds = []
    with torch.inference_mode():
        for batch in given.batches:
            shape = batch, given.prompt
            ids = torch.randint(7, config.vocab_size, shape, generator=generator)
            prompts, layers = ids.tolist(), linear(batch)
            layers()
            found: dict[str, list[float]] = {}
            for _ in range(given.rounds):
                before = layers()
                one = {"albor": ours(prompts)}
                one["linear"] = (before + layers()) / 2
                one["transformers"] = transformers(prompts)
                speeds += [reading() for _ in range(3)]
                for name, seconds in one.items():
                    found.setdefault(name, []).append(seconds)
            start = time.perf_counter()
            Slots(model, batch, given.prompt + given.new)
            ready = time.perf_counter() - start
            pairs = {
                f"albor / {name}": [
                    a / b for a, b in zip(found[name], found["albor"], strict=True)
                ]
                for name in ("linear", "transformers")
            }
            rate = {k: batch / statistics.median(v) for k, v in found.items()}
            row: dict[str, Any] = {
                "batch": batch,
                "tokens_per_second": {k: round(v, 1) for k, v in rate.items()},
                "ratio": {
                    k: round(statistics.median(v), 3) for k, v in pairs.items()
                },
                "ratio_range": {
                    k: [round(min(v), 3), round(max(v), 3)] for k, v in pairs.items()
                },
                "seconds_to_lay_out_weights": round(ready, 2),
                "load": [round(x, 1) for x in os.getloadavg()][0],
            }
            rows.append(row)
            print(row, flush=True)
    speed = statistics.median(speeds)
    git = ["git", "-C", str(project_path(".")), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    result = {
        "about": {
            "hardware": f"{platform.machine()}, {given.threads} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}",
            "versions": {x: version(x) for x in ("torch", "transformers")},
            "python": platform.python_version(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit,
        },
        "settings": vars(given),
        "weight_bytes": weight_bytes,
        "bytes_per_second": round(speed),
        "reading_allows": round(speed / weight_bytes, 1),
        "rows": rows,
    }
    write_json(project_path("benchmarks/results/generate.json"), result)


if __name__ == "__main__":
    main()
