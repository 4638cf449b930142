# Generated from book/train.md: edit the chapter, not this file.
"""The training loop: take a batch, take a step, write it down, now and then save.

Notable here:
- `metrics.jsonl` gets one line per optimizer step: on a CPU before the next step
  begins, on a GPU whenever the host looks, about once a second;
- all that decides a step is a function of its number: a run that was killed and
  resumed ends with the weights of one that was not, bit for bit on a CPU;
- a step that is not finite ends the run and names step, rows and last good state;
- Ctrl-C and SIGTERM wait for the end of the step, save, and then do as they should.

The loop takes callables for what it does not own: evaluating, saving, inspecting.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from albor.artifacts import append_jsonl, read_jsonl, truncate_jsonl
from albor.batches import Batches
from albor.checkpoint import latest_state
from albor.config import ConfigError, Recipe, TrainingConfig
from albor.hardware import memory_explained
from albor.model import Albor
from albor.optimizer import scheduled_rate as scheduled_rate  # to be had here
from albor.resident import Stepper, collection_paused, signals_held_back
from albor.shards import DataError, TokenStream
from albor.step import StepResult

__all__ = [
    "LOG_SECONDS",
    "MEND",
    "METRICS",
    "MOST_STEPS",
    "NonFiniteError",
    "Summary",
    "evaluate_loss",
    "metrics_record",
    "next_log",
    "progress_line",
    "refuse_mismatch",
    "resume_metrics",
    "train",
]


@torch.no_grad()
def evaluate_loss(
    model: Albor,
    tokens: TokenStream | np.ndarray,
    seq_len: int,
    *,
    sequences: int = 0,
    micro_batch: int = 8,
    precision: str = "fp32",
) -> tuple[float, int]:
    """Mean cross-entropy in nats over rows of `tokens`, and how many it judged.

    The stream is cut every `seq_len` tokens, each row's last target being the next
    row's first token; a stream too short for that is one shorter row. Of the rows
    `sequences` are taken, evenly spaced, the same ones each time; 0 takes all.
    """
    stream = TokenStream.of(tokens)
    if len(stream) < 2:
        raise DataError(
            f"{len(stream)} validation tokens: 2 are the least, one to predict the "
            "other from; hold out more text (data.val_bytes)"
        )
    seq_len = min(seq_len, len(stream) - 1)
    rows = (len(stream) - 1) // seq_len
    count = min(sequences or rows, rows)
    chosen = np.arange(count) * rows // count  # evenly spaced, first row included
    device = next(model.parameters()).device
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(0, count, micro_batch):
        some = stream.gather(chosen[i : i + micro_batch] * seq_len, seq_len + 1)
        taken = torch.from_numpy(some.astype(np.int64)).to(device)
        with torch.autocast(device.type, dtype=half) if half else nullcontext():
            mean = model.loss(taken[:, :-1].contiguous(), taken[:, 1:].contiguous())
        total += mean.double() * len(taken)
    return float(total) / count, count * seq_len


class NonFiniteError(RuntimeError):
    """A step came out infinite or not a number; it has changed nothing."""

    def __init__(
        self, step: int, result: StepResult, rows: list[int], good: Path | None
    ) -> None:
        self.step, self.rows, self.last_state = step, rows, good
        scale = f", loss scale {result.scale:g}" if result.scale != 1 else ""
        back = f"the last good state is {good}" if good else "none is saved"
        super().__init__(
            f"step {step} is not finite: loss {result.loss}, gradient norm "
            f"{result.grad_norm}{scale}, on the training rows {rows}. It changed "
            f"no weight and no moment; {back}. Look at those rows, or "
            "lower optimizer.lr, or use precision fp32"
        )


METRICS = "metrics.jsonl"
MEND = (
    "Set training.micro_batch to fewer sequences than the run takes at a time, or "
    "training.recompute, or free the device. What is saved is safe: resume"
)


def resume_metrics(path: Path, start_step: int) -> None:
    """Drop what was logged from `start_step` on; refuse a log with gaps before.

    It may begin late, or not be there: of a run that went on from a state alone.
    """
    if not path.exists():
        return
    truncate_jsonl(path, lambda record: record["step"] < start_step)
    steps = [record["step"] for record in read_jsonl(path)]
    if steps and steps != list(range(steps[0], start_step)):
        raise ConfigError(
            f"{path}: steps from {steps[0]} to {steps[-1]}, with gaps before step "
            f"{start_step}, at which this run goes on; restore the file"
        )


def progress_line(
    record: dict[str, Any], max_steps: int, seconds_left: float
) -> str:
    """One line of live progress, for people."""
    done = f"{record['step'] + 1}/{max_steps}"
    judged = (
        f"  validation {record['val_loss']:.3f}" if "val_loss" in record else ""
    )
    left = f"{int(seconds_left) // 60}m{int(seconds_left) % 60:02d}s left"
    speed = f"{record['tokens_per_second']:,.0f} tokens/s  {left}{judged}"
    return f"step {done}  loss {record['loss']:.3f}  lr {record['lr']:.1e}  {speed}"


def metrics_record(
    step: int, result: StepResult, lr: float, tokens: int
) -> dict[str, Any]:
    """A line of the log. JSON knows no NaN, so a skipped step has no norm."""
    return {
        "step": step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm if result.finite else None,
        "clip": result.clip,
        "scale": result.scale,
        "tokens": tokens,
    }


def refuse_mismatch(batches: Batches, recipe: Recipe, start_step: int) -> None:
    """Refuse to train on other batches than the recipe's, or past its end."""
    end, data = recipe.training.max_steps, recipe.data
    sequences = data.batch_size * recipe.training.gradient_accumulation
    if (batches.batch_size, batches.seq_len) != (sequences, data.seq_len):
        raise ConfigError(
            f"a batch is {batches.batch_size} x {batches.seq_len} tokens, but the "
            f"recipe says {sequences} x {data.seq_len}; make them agree"
        )
    if not 0 <= start_step <= end:
        raise ConfigError(
            f"start_step = {start_step}: not in 0 .. max_steps = {end}"
        )


def next_log(done: int, every: int, plan: TrainingConfig) -> int:
    """After how many steps the host looks again: `every`, or what comes before."""
    marks = [plan.save_interval, plan.eval_interval]
    due = [done + mark - done % mark for mark in marks if mark]
    return min([done + every, plan.max_steps, *due])


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended."""

    steps: int  # done since the beginning of the run, earlier calls included
    finished: bool  # False: `max_minutes` came first
    tokens: int  # trained on in this call
    seconds: float  # of this call spent in steps: no saving, no evaluating


LOG_SECONDS = 1.0  # on a GPU the host looks about so often; on a CPU at every step
MOST_STEPS = 64  # in one look


def train(
    model: Albor,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    recipe: Recipe,
    *,
    output_dir: str | Path,
    start_step: int = 0,
    evaluate: Callable[[], float] | None = None,
    save: Callable[[int], object] | None = None,
    settle: Callable[[], object] | None = None,
    inspect: Callable[[int, StepResult], object] | None = None,
    on_log: Callable[[dict[str, Any], float], object] | None = None,
    save_minutes: float = 5.0,
    max_minutes: float = 0.0,
    log_seconds: float = 5.0,
    log_interval: int = 0,
    **options: Any,
) -> Summary:
    """Train from `start_step` to `recipe.training.max_steps`.

    `evaluate()` gives a validation loss, `save(n)` keeps the state after n steps,
    `settle()` waits until it is on the disk, before a signal is obeyed,
    `inspect(step, result)` sees the last step of a look while its gradients are
    there, `on_log(record, seconds_left)` sees the first step, the last,
    evaluations, and a step every `log_seconds`. It saves every `save_interval`
    steps, every `save_minutes`, and at the end; `max_minutes` of this call end the
    run early. 0 turns any of these off.

    `log_interval`: steps from one look at the results to the next; 0 means each
    step on a CPU, and about a second on a GPU. `options`: of `Stepper`.
    """
    plan, metrics = recipe.training, Path(output_dir) / METRICS
    refuse_mismatch(batches, recipe, start_step)
    if start_step == plan.max_steps:
        return Summary(start_step, True, 0, 0.0)
    resume_metrics(metrics, start_step)
    model.train()
    rates = [scheduled_rate(recipe, step) for step in range(plan.max_steps)]
    options = {"capacity": max(MOST_STEPS, log_interval), **options}
    stepper = Stepper(model, optimizer, rates, grad_clip=plan.grad_clip, **options)
    tokens = batches.batch_size * batches.seq_len  # per step
    began = saved = told = time.monotonic()
    spent, spent_then, done_then = 0.0, 0.0, start_step  # seconds in steps alone
    done, look = start_step, start_step + 1
    with (
        signals_held_back() as signals,
        collection_paused() as collect,
        memory_explained(batches.device, MEND),
    ):
        while done < plan.max_steps:
            first, tick = done, time.monotonic()
            batches.look_ahead(first, look)
            for step in range(first, look):
                stepper.queue(step, *batches.step(step))
            results = stepper.read()  # here the host waits; nowhere else
            now, done = time.monotonic(), look
            spent += now - tick
            last = done == plan.max_steps or 0 < max_minutes * 60 <= now - began
            judge = last or (plan.eval_interval and done % plan.eval_interval == 0)
            records: list[dict[str, Any]] = []
            try:
                for step, result in enumerate(results, start=first):
                    if not result.finite and not result.skipped:
                        rows, good = batches.rows_of(step), latest_state(output_dir)
                        raise NonFiniteError(step, result, rows, good)
                    line = metrics_record(step, result, rates[step], tokens)
                    records.append(line)
                if inspect:
                    inspect(done - 1, results[-1])
                if evaluate and judge and not signals:
                    records[-1]["val_loss"] = evaluate()
                tell = last or first == start_step or "val_loss" in records[-1]
                if tell or 0 < log_seconds <= now - told:
                    pace = (spent - spent_then) / (done - done_then)  # s per step
                    records[-1]["tokens_per_second"] = tokens / pace
                    told, spent_then, done_then = now, spent, done
                    collect()
                    if on_log:
                        on_log(records[-1], pace * (plan.max_steps - done))
            finally:  # whatever they raise: these steps were taken
                append_jsonl(metrics, *records)
            keep = plan.save_interval and done % plan.save_interval == 0
            stop = last or bool(signals)
            if save and (keep or stop or 0 < save_minutes * 60 <= now - saved):
                with open(metrics, "rb+") as log:
                    os.fsync(log.fileno())  # no state without its lines in the log
                save(done)
                saved = time.monotonic()
            if stop:
                break
            every = log_interval or 1
            if not log_interval and batches.device.type == "cuda":
                pace = (now - tick) / (done - first)
                every = max(1, min(MOST_STEPS, int(LOG_SECONDS / pace)))
            look = next_log(done, every, plan)
    if signals:
        if settle:
            settle()
        signal.raise_signal(signals[0])  # all is saved: now do as we are told
    return Summary(
        done, done == plan.max_steps, (done - start_step) * tokens, spent
    )
