"""Is what runs on this device right? One check after the other, as numbers.

    python -m benchmarks.gpu_checks --to gpu-correctness.json

Notable:
- The yardstick is the same model on the CPU in float64; nothing is compared with a
  figure written down here.
- A check returns what it measured and `ok`; one that fails or cannot run leaves its
  error, and the next one runs. The file is written after each.
- What counts copies has a control of its own: planted ones must be seen.
- `--rehearse` runs all of it on a CPU, with what a CPU has no part in left out, and
  says so in the file.
"""

import argparse
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by cuBLAS

import torch
from torch import Tensor

from albor.artifacts import write_json
from albor.batches import Batches
from albor.checkpoint import load_state, save_state
from albor.config import ModelConfig, OptimizerConfig
from albor.model import Albor
from albor.optimizer import build_optimizer
from albor.profiling import count_events, refuse_waits, step_parts
from albor.resident import Stepper, compiled_loss
from albor.step import make_scaler, train_step
from benchmarks.machine import ROOT, about

SHAPE = ModelConfig(  # small, and wide enough for tensor cores and fused attention
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
ROWS, LENGTH, RATE = 4, 64, 1e-3
ADAMW = OptimizerConfig(lr=RATE)
START = 2.0**26  # of fp16's loss scale: some halvings too large
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Found = dict[str, Any]


class NotHere(RuntimeError):
    """The device or the machine has no such thing: no fault, and no evidence."""


# ---- What the checks share ----


def text(device: torch.device, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Random ids and targets (rows, LENGTH), the same on every device."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPE.vocab_size, (rows, LENGTH + 1), generator=draw)
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def gradients(model: Albor) -> dict[str, Tensor]:
    """Every gradient, as float64 on the CPU."""
    return {n: p.grad.double().cpu() for n, p in model.named_parameters()}


def distance(found: Tensor, exact: Tensor) -> float:
    """Of two tensors, relative to the second: |a - b| / |b|."""
    found, exact = found.double().cpu(), exact.double().cpu()
    return float((found - exact).norm() / exact.norm())


def fingerprint(model: Albor) -> str:
    """SHA-256 of all weights, in order."""
    parts = (p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def begin(
    device: torch.device, seed: int = 0
) -> tuple[Albor, torch.optim.Optimizer]:
    """A small model on the device, and its optimizer."""
    model = Albor(SHAPE, seed=seed).to(device)
    return model, build_optimizer(model, ADAMW)


def stream(device: torch.device) -> Batches:
    """Batches whose tokens lie on the device."""
    draw = torch.Generator().manual_seed(1)
    size = (ROWS * LENGTH * 40,)
    tokens = torch.randint(SHAPE.vocab_size, size, generator=draw).numpy()
    return Batches(tokens.astype("uint16"), LENGTH, ROWS, seed=1, device=device)


def number(device: torch.device) -> int:
    """Of steps in a short run; even."""
    return 8 if device.type == "cuda" else 4


def train_some(
    model: Albor,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    span: range,
    precision: str = "fp32",
) -> list[float]:
    """Take the steps of `span`; return their losses."""
    how: dict[str, Any] = {"lr": RATE, "precision": precision, "micro_batch": 2}
    return [
        train_step(model, optimizer, *batches.step(n), **how).loss for n in span
    ]


@contextmanager
def deterministic() -> Iterator[list[str]]:
    """Deterministic kernels; the list gets the warnings of those that have none."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield said
        finally:
            torch.use_deterministic_algorithms(False)
            said += sorted({str(one.message).split(". ")[0] for one in caught})


# ---- Numbers against float64 ----


def agreement(device: torch.device) -> Found:
    """Logits, loss and gradients in float32 on the device against float64."""
    torch.set_float32_matmul_precision("highest")
    ids, targets = text(torch.device("cpu"))
    exact, model = Albor(SHAPE, seed=0).double(), Albor(SHAPE, seed=0).to(device)
    wanted, logits = exact(ids), model(ids.to(device))
    loss64 = exact.loss(ids, targets)
    loss = model.loss(ids.to(device), targets.to(device))
    loss64.backward()
    loss.backward()
    there, right = gradients(model), gradients(exact)
    errors = {name: distance(there[name], right[name]) for name in right}
    worst = max(errors, key=lambda name: errors[name])
    found = {
        "logits": distance(logits.detach(), wanted.detach()),
        "loss": abs(loss.item() - loss64.item()),
        "gradient_worst": errors[worst],
        "gradient_worst_of": worst,
        "tensors": len(errors),
    }
    return found | {"ok": found["logits"] < 1e-5 and errors[worst] < 1e-4}


def halves(device: torch.device) -> Found:
    """bf16 and fp16 under autocast against float32, on the device."""
    ids, targets = text(device)
    model = Albor(SHAPE, seed=0).to(device)
    model.loss(ids, targets).backward()
    right, found, ok = gradients(model), {}, True
    logits32 = model(ids).detach()
    loss32 = model.loss(ids, targets).item()
    for name, kind in HALVES.items():
        model.zero_grad()
        scale = (
            2.0**12 if name == "fp16" else 1.0
        )  # small gradients live through it
        with torch.autocast(device.type, dtype=kind):
            logits, loss = model(ids), model.loss(ids, targets)
        (loss * scale).backward()
        there = {key: part / scale for key, part in gradients(model).items()}
        flat = [torch.cat([g[k].flatten() for k in right]) for g in (there, right)]
        found[name] = one = {
            "logits": distance(logits.detach(), logits32),
            "loss": abs(loss.item() - loss32),
            "gradient": distance(*flat),
            "cosine": float(torch.cosine_similarity(*flat, dim=0)),
        }
        ok = ok and one["cosine"] > 0.999 and one["loss"] < 0.02
    return found | {"ok": ok}


def overflow(device: torch.device) -> Found:
    """fp16 with a loss scale far too large: skipped, halved, and then it learns."""
    model, optimizer = begin(device)
    scaler = make_scaler("fp16", device)
    assert scaler is not None
    scaler.load_state_dict(scaler.state_dict() | {"scale": START})
    rows = ROWS if device.type == "cuda" else 1  # in fp16 a CPU crawls
    batch = text(device, rows)
    how: dict[str, Any] = {"lr": RATE, "precision": "fp16", "scaler": scaler}
    before, scales, unchanged = fingerprint(model), [START], True
    while (result := train_step(model, optimizer, *batch, **how)).skipped:
        unchanged = unchanged and fingerprint(model) == before
        scales.append(result.scale)
        if len(scales) > 60:
            raise RuntimeError("60 steps, and fp16 has not found its scale")
    moved = fingerprint(model) != before
    first = result.loss
    for _ in range(8):
        result = train_step(model, optimizer, *batch, **how)
    halved = all(b == a / 2 for a, b in pairwise(scales))
    return {
        "skipped": len(scales) - 1,
        "scale_found": result.scale,
        "weights_unchanged_while_skipping": unchanged,
        "halved_each_time": halved,
        "loss_first": first,
        "loss_8_steps_later": result.loss,
        "ok": unchanged
        and halved
        and moved
        and len(scales) > 1
        and result.loss < first,
    }


# ---- Copies and waits ----

WAIT = re.compile(r"cuda(Device|Stream|Event)Synchronize|cudaMemcpy")


def read_again(work: Callable[[], object]) -> Found:
    """Copies and waits from the profiler's own list of events.

    `albor.profiling` reads them from the trace that the profiler writes; the two
    must agree. Waits count if they begin while `work` runs: closing waits as well.
    """
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        with torch.profiler.record_function("the work"):
            work()
        torch.cuda.synchronize()
    events = [*profile.events()]
    host = [e for e in events if "cuda" not in str(e.device_type).lower()]
    names = [e.name for e in events if "cuda" in str(e.device_type).lower()]
    whole = next(e.time_range for e in host if e.name == "the work")
    inside = [e for e in host if whole.start <= e.time_range.start <= whole.end]
    return {
        "up": sum("Memcpy HtoD" in name for name in names),
        "down": sum("Memcpy DtoH" in name for name in names),
        "waits": sum(bool(WAIT.fullmatch(e.name)) for e in inside),
    }


def count(work: Callable[[], object], device: torch.device) -> Found:
    """Copies and waits of `work` in two readings, and what else the trace says."""
    seen = count_events(work, device)
    found: Found = {
        "up": seen.number("HtoD"),
        "down": seen.number("DtoH"),
        "waits": sum(seen.waits.values()),
        "bytes": {kind: size for kind, (_, size) in seen.copies.items()},
        "launches": seen.launches,
    }
    if device.type == "cuda":
        found["read_again"] = read_again(work)
    return found


def three(found: Found) -> tuple[int, ...]:
    """Copies up, copies down, waits."""
    return tuple(found[kind] for kind in ("up", "down", "waits"))


def stepper(device: torch.device, graph: bool = False) -> tuple[Albor, Stepper]:
    """A small model and what queues its steps."""
    model, optimizer = begin(device)
    return model, Stepper(
        model, optimizer, [RATE] * 64, capacity=64, graph=graph, precision="bf16"
    )


def queue_steps(device: torch.device) -> tuple[Callable[[int], None], Stepper]:
    """A function that takes steps of the device-resident loop, and their log."""
    (_, steps), batches, at = stepper(device), stream(device), 0

    def take(number: int) -> None:
        nonlocal at
        for _ in range(number):
            steps.queue(at, *batches.step(at))
            at += 1

    take(3)  # allocate, choose kernels, take the rotary table up
    steps.read()
    return take, steps


def copies(device: torch.device) -> Found:
    """Copies and waits of ten steps, of a log, of planted ones, of a naive loop."""
    one, there = torch.ones(1, device=device), torch.ones(1000)

    def plant() -> None:
        one.item()
        there.to(device)

    take, steps = queue_steps(device)
    model, optimizer = begin(device)
    batch = text(torch.device("cpu"))

    def naive() -> None:
        ids, targets = (part.to(device) for part in batch)
        optimizer.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        norms = [p.grad.norm().item() for p in model.parameters()]
        assert math.isfinite(loss.item()) and all(map(math.isfinite, norms))
        optimizer.step()

    naive()
    found = {
        "planted": count(plant, device),
        "ten_steps": count(lambda: take(10), device),
        "a_log": count(steps.read, device),
        "naive_step": count(naive, device),
    }
    if device.type != "cuda":
        raise NotHere("on a CPU there is no one to copy to or to wait for")
    found["attention_kernels"] = step_parts(
        lambda: take(2), device
    ).attention_kernels
    agree = all(
        three(found[k]) == three(found[k]["read_again"])
        for k in found
        if k in ("planted", "ten_steps")
    )
    seen = three(found["planted"]) == (1, 1, 2)
    none = three(found["ten_steps"]) == (0, 0, 0)
    ok = agree and seen and none
    return found | {"control_seen": seen, "readings_agree": agree, "ok": ok}


def no_waits(device: torch.device) -> Found:
    """Ten steps where PyTorch raises an error at the first wait; a planted one."""
    take, _ = queue_steps(device)
    one, planted = torch.ones(1, device=device), ""
    refuse_waits(lambda: take(10), device)
    if device.type != "cuda":
        raise NotHere("on a CPU there is no one to wait for")
    try:
        refuse_waits(one.item, device)
    except RuntimeError as error:
        planted = str(error).split("\n")[0]
    return {"steps": 10, "planted_wait_raised": planted, "ok": bool(planted)}


# ---- The same bits ----


def determinism(device: torch.device) -> Found:
    """Two runs of a seed with deterministic kernels; of another; plain kernels."""

    def run(seed: int = 0) -> str:
        model, optimizer = begin(device, seed)
        train_some(model, optimizer, stream(device), range(number(device)), "bf16")
        return fingerprint(model)

    with deterministic() as said:
        first, second, other = run(), run(), run(seed=1)
    return {
        "sha256": [first, second],
        "without_deterministic_kernels": run() == run(),
        "kernels_that_have_none": said,
        "ok": first == second != other,
    }


def resume(device: torch.device) -> Found:
    """A run at once; and half of it, a state, and the rest in another model."""
    batches, end = stream(device), number(device)
    with deterministic() as said, tempfile.TemporaryDirectory() as folder:
        model, optimizer = begin(device)
        train_some(model, optimizer, batches, range(end), "bf16")
        whole = fingerprint(model)
        model, optimizer = begin(device)
        train_some(model, optimizer, batches, range(end // 2), "bf16")
        state = save_state(folder, end // 2, model, optimizer, {})
        again, optimizer = begin(device, seed=9)
        load_state(state, again, optimizer)
        train_some(again, optimizer, batches, range(end // 2, end), "bf16")
    found = fingerprint(again)
    return {
        "sha256": [whole, found],
        "kernels_that_have_none": said,
        "ok": whole == found,
    }


# ---- Faster ways to the same numbers ----


def compiled(device: torch.device) -> Found:
    """The compiled loss and its gradients against the eager ones, in bf16."""
    batch, model = text(device), Albor(SHAPE, seed=0).to(device)
    fast = compiled_loss(model)
    if device.type != "cuda":  # traced as it would be there, without a compiler
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        fast = torch.compile(model.loss, backend="aot_eager", **how)
    found: dict[str, tuple[float, Tensor]] = {}
    seconds = {}
    for name, loss in (("compiled", fast), ("eager", model.loss)):
        began = time.monotonic()
        model.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss(*batch)
        value.backward()
        flat = torch.cat([part.flatten() for part in gradients(model).values()])
        found[name] = (value.item(), flat)
        seconds[name] = time.monotonic() - began
    gap = abs(found["compiled"][0] - found["eager"][0])
    error = distance(found["compiled"][1], found["eager"][1])
    return {
        "seconds_with_compiling": seconds["compiled"],
        "loss": gap,
        "gradient": error,
        "ok": gap < 0.01 and error < 0.03,
    }


def graph(device: torch.device) -> Found:
    """Steps recorded as one CUDA graph and launched whole, against eager steps."""
    if device.type != "cuda":
        raise NotHere("CUDA graphs need CUDA")
    batches, losses, models = stream(device), [], []
    for recorded in (False, True):
        model, steps = stepper(device, recorded)
        for at in range(10):
            steps.queue(at, *batches.step(at))
        losses.append([one.loss for one in steps.read()])
        models.append(model)
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    pairs = zip(*(model.parameters() for model in models), strict=True)
    error = max(distance(b.detach(), a.detach()) for a, b in pairs)
    return {
        "losses": losses,
        "loss": gap,
        "weights_worst": error,
        "ok": gap < 0.01 and error < 0.01,
    }


# ---- The kernels of the bug chapters ----


def triton_kernel(device: torch.device) -> Found:
    """ALB-059 in Triton: right against float64; where rows land, built wrong."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    try:
        from gemm_backward import BackwardA
    except ImportError as error:
        raise NotHere(str(error)) from None
    small = device.type != "cuda"  # interpreted, and slow
    m, n, k = (8, 256, 32) if small else (128, 32768, 512)
    draw = torch.Generator().manual_seed(0)
    grad_c = torch.randn(m, n, generator=draw).to(device)
    b = torch.randn(k, n, generator=draw).to(device)
    exact = grad_c.double() @ b.double().T
    memory = torch.full(((m - 1) * n + k,), math.nan, device=device)
    BackwardA(m, n, k)(grad_c, b, memory, m, n, k)
    error = distance(memory[: m * k].view(m, k), exact)
    inside = bool(memory[m * k :].isnan().all())
    memory.fill_(math.nan)
    BackwardA(m, k, n)(grad_c, b, memory, m, n, k)
    home = int((~memory[: m * k].isnan()).sum())
    away = int((~memory[m * k :].isnan()).sum())
    return {
        "shape": [m, n, k],
        "error": error,
        "swapped_inside": home,
        "swapped_outside": away,
        "interpreted": small,
        "ok": error < 3e-5 and inside and away > 0 and home + away == m * k,
    }


def cuda_kernel(device: torch.device) -> Found:
    """The same in CUDA C++, compiled here by nvcc; its own two lines."""
    if not shutil.which("nvcc"):
        raise NotHere("no nvcc on the PATH")
    source = ROOT / "tests" / "kernels" / "gemm_backward.cu"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "gemm_backward"
        subprocess.run(["nvcc", "-O2", "-o", binary, source], check=True)
        done = subprocess.run([binary], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 77:
        raise NotHere(f"compiled; {lines[0]}")
    right = "right grad_a 65536 m 0 v 0 beyond 0 negative_v 0"
    return {
        "printed": lines,
        "ok": lines[0] == right and " v 1024 " in lines[1],
    }


def gpu_tests(device: torch.device, seconds: float = 150) -> Found:
    """The project's tests that ask for a GPU, by pytest: which passed."""
    asks = re.compile(r"cuda\.is_available|set_sync_debug_mode")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    files = [file for file in files if asks.search(file.read_text("utf-8"))]
    which = "gpu or cuda or device or kernels"
    if device.type != "cuda":  # a few, to see them skipped
        files, which = [ROOT / "tests/test_kernels.py"], "full_size"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", "-k", which]
        command += ["--continue-on-collection-errors", f"--junitxml={report}"]
        command += [str(file) for file in files]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise NotHere(f"pytest was not done after {seconds:g} s") from None
        if not report.exists():
            tail = (done.stdout + done.stderr).strip().splitlines()[-3:]
            raise NotHere("pytest: " + " | ".join(tail))
        tree = ElementTree.parse(report)
    outcomes: dict[str, list[str]] = {"passed": [], "skipped": [], "failed": []}
    for case in tree.iter("testcase"):
        kinds = {part.tag for part in case}
        bad = "failed" if kinds & {"failure", "error"} else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes["skipped" if "skipped" in kinds else bad].append(name)
    return outcomes | {
        "files": [file.name for file in files],
        "ok": not outcomes["failed"] and any(outcomes.values()),
    }


CHECKS: dict[str, Callable[[torch.device], Found]] = {
    one.__name__: one
    for one in (
        agreement,
        halves,
        copies,
        no_waits,
        determinism,
        resume,
        overflow,
        triton_kernel,
        cuda_kernel,
        graph,
        compiled,
        gpu_tests,
    )
}


def check(name: str, device: torch.device) -> Found:
    """Run one check; what goes wrong is its result."""
    began = time.monotonic()
    try:
        found = CHECKS[name](device)
    except NotHere as why:
        found = {"ok": None, "not_run": str(why)}
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        found = {"ok": False, "error": "\n".join(lines[-12:])}
    return found | {"seconds": round(time.monotonic() - began, 2)}


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; write the file after each."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = (
            "1"  # Triton asks once, when it is imported
        )
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--to", type=Path, required=True, help="JSON file")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    given = parser.parse_args(arguments)
    device = torch.device("cpu" if given.rehearse else "cuda")
    record: Found = about(device) | {"finished": False, "checks": {}}
    write_json(given.to, record)
    for name in given.only:
        record["checks"][name] = found = check(name, device)
        word = {True: "ok", False: "FAILED", None: "not run"}[found["ok"]]
        print(f"{name:14} {word:8} {found['seconds']:7.1f} s", flush=True)
        write_json(given.to, record)
    verdicts = [one["ok"] for one in record["checks"].values()]
    record |= {"finished": True, "ok": False not in verdicts}
    write_json(given.to, record)
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
