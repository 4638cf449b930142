"""The arms of `benchmarks.training`: ways to train one model on the same tokens.

All load the weights and read the tokens that the job names, so that they start
alike and see the same. Every peer is run at its best: fused AdamW, fused attention,
freed memory kept, no key/value cache, and no wait for the device unless the loop
that it stands for has one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from albor.batches import Batches
from albor.config import ModelConfig, OptimizerConfig
from albor.hardware import attention_kernel
from albor.model import Albor
from albor.optimizer import build_optimizer, parameter_groups
from albor.resident import GRAPH_TOKENS, Stepper, compiled_loss
from albor.shapes import LOSS_ROWS

# The arm that the ratios are taken to.
REFERENCE = "transformers-eager"


class Unavailable(RuntimeError):
    """This arm cannot run here; the message says what is missing."""


@dataclass
class Job:
    """What all arms have in common; kept as JSON."""

    folder: str  # holds weights.safetensors, stream.npy and rows.npy
    model: dict[str, Any]
    optimizer: dict[str, Any]
    rates: list[float]  # the learning rate of every step
    sequences: int  # per step
    seq_len: int
    seed: int = 0  # of the order of the rows
    grad_clip: float = 1.0
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    warm_up: int = 10
    timed: int = 30
    after: int = 0  # steps behind the timed ones: for losses, and to count copies
    hold: float = 0.0  # seconds an arm may have the device at a time; 0: no limit
    micro_batch: int = 0  # 0: the arm looks for its best
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # what differs from usual
    ready_to_run: Callable[[], object] | None = None  # waits for the device's lock


class Loop(Protocol):
    """What takes a step."""

    def step(self, number: int) -> None:
        """Take step 0, 1, 2, ..., or leave it in the device's queue."""

    def losses(self) -> list[float]:
        """The loss of every step up to now, in nats."""


def weights(job: Job) -> dict[str, Tensor]:
    """The weights that every arm starts from."""
    held = load_file(Path(job.folder) / "weights.safetensors")
    return {name: tensor.clone() for name, tensor in held.items()}  # no file behind


def optimizer_for(model: nn.Module, job: Job) -> torch.optim.AdamW:
    """AdamW as Albor builds it: fused, unless the settings say otherwise."""
    config = OptimizerConfig(**job.optimizer)
    if job.settings.get("fused", True):
        return build_optimizer(model, config)
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, config.decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        capturable=job.device != "cpu",  # the rate may live on the device
    )


def lower_precision(job: Job) -> torch.autocast:
    """Autocast to the job's type; for fp32 it does nothing."""
    half, kind = job.precision == "bf16", torch.device(job.device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=half)


class Usual:
    """The loop that people write: slices, backward, clip, step.

    `host`: rows come from pinned memory at every step, and every step reads its
    loss back, as many loops do. Without it all rows are on the device from the
    start and the losses are read once at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        job: Job,
        host: bool = False,
    ) -> None:
        self.model, self.loss, self.job, self.host = model, loss, job, host
        self.optimizer = optimizer_for(model, job)
        self.seen: list[Any] = []
        rows = np.load(Path(job.folder) / "rows.npy").view(np.int16)
        self.rows = torch.from_numpy(rows)
        if job.device != "cpu":
            self.rows = self.rows.pin_memory() if host else self.rows.to(job.device)

    def step(self, number: int) -> None:
        """Forward, backward, clip, update."""
        taken = self.rows[number].to(self.job.device, non_blocking=True)
        taken = taken.long() & 0xFFFF  # int16 back to uint16
        inputs, targets = taken[:, :-1].contiguous(), taken[:, 1:].contiguous()
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.rates[number]
        size = self.job.micro_batch
        total = torch.zeros((), device=self.job.device)
        for i in range(0, len(inputs), size):
            if self.job.settings.get("compile") == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            with lower_precision(self.job):
                part = self.loss(inputs[i : i + size], targets[i : i + size])
            part = part * (size / len(inputs))
            part.backward()
            total += part.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.job.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seen.append(total.item() if self.host else total)

    def losses(self) -> list[float]:
        """Read them from the device, if the steps have not."""
        return [float(loss) for loss in self.seen]


def patient(job: Job, how: str = "always") -> Callable:
    """Inductor, as a backend that asks for the device when all is compiled.

    So arms can compile side by side, and one at a time has the device's memory.
    `how`: "always", or the name of one of Inductor's modes.
    """
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        mode = "default" if how == "always" else how
        patches = torch._inductor.list_mode_options(mode)
        run = compile_fx(graph, inputs, config_patches=patches)

        def wait_and_run(*arguments: Any) -> Any:
            if job.ready_to_run:
                job.ready_to_run()
                job.ready_to_run = None
            return run(*arguments)

        return wait_and_run

    return backend


def compiled(function: Callable, job: Job) -> Callable:
    """`torch.compile` as the settings say, or the function itself."""
    how = job.settings.get("compile", "never")
    if how == "never":
        return function
    return torch.compile(function, dynamic=False, backend=patient(job, how))


def transformers(job: Job) -> Loop:
    """`LlamaForCausalLM`, with Liger's kernels if the settings want them."""
    if job.settings.get("liger"):
        if find_spec("liger_kernel") is None:
            raise Unavailable("not installed: pip install liger-kernel")
        if job.device == "cpu":
            raise Unavailable("needs a GPU: Liger's kernels are written in Triton")
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if job.settings.get("compile") == "reduce-overhead" and job.device == "cpu":
        raise Unavailable("needs a GPU: a CPU has no CUDA graphs")
    if find_spec("transformers") is None:
        raise Unavailable("not installed: pip install transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    from albor.weights import hf_config

    config = LlamaConfig(
        **hf_config(ModelConfig(**job.model)) | {"use_cache": False}
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights(job), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.train().to(job.device)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=ids, labels=targets, shift_labels=targets).loss

    return Usual(model, compiled(loss, job), job)


def plain(job: Job) -> Loop:
    """A loop in nanoGPT's manner: every step copies rows and reads its loss."""
    from benchmarks.plain import Plain

    model = Plain(ModelConfig(**job.model))
    model.load_state_dict(weights(job))
    model.train().to(job.device)
    return Usual(model, compiled(model, job), job, host=True)


class Ours:
    """Albor's step as `albor.train` takes it: queued, and read now and then.

    The settings switch single choices off: see `ABLATIONS`.
    """

    def __init__(self, job: Job) -> None:
        self.job, device = job, torch.device(job.device)
        if rows := job.settings.get("loss_rows"):
            LOSS_ROWS[device.type] = rows
        with torch.device("meta"):
            self.model = Albor(ModelConfig(**job.model))
        self.model.load_state_dict(weights(job), assign=True)
        self.model.train().to(device)
        self.model.model.recompute = job.settings.get("recompute", False)
        self.optimizer = optimizer_for(self.model, job)
        stream = np.load(Path(job.folder) / "stream.npy")
        self.batches = Batches(
            stream, job.seq_len, job.sequences, seed=job.seed, device=device
        )
        how: dict[str, Any] = {
            "grad_clip": job.grad_clip,
            "micro_batch": job.micro_batch,
            "precision": job.precision,
        }
        if job.settings["compile"] == "always":
            how["loss"] = compiled_loss(self.model, backend=patient(job))
        small = job.sequences * job.seq_len <= GRAPH_TOKENS
        graph = job.device != "cpu" and job.settings.get("graph", small)
        self.stepper = Stepper(
            self.model, self.optimizer, job.rates, graph=graph, **how
        )
        self.unread, self.read = 0, list[float]()

    def step(self, number: int) -> None:
        """Queue a step; on a GPU, read the numbers of ten at a time."""
        with attention_kernel(self.job.settings.get("attention", "auto")):
            self.stepper.queue(number, *self.batches.step(number))
        self.unread += 1
        if self.unread == 10 or self.job.device == "cpu":
            self.losses()

    def losses(self) -> list[float]:
        """Of all steps; those that are queued come in one copy."""
        if self.unread:
            self.read += [result.loss for result in self.stepper.read()]
            self.unread = 0
        return self.read


ARMS: dict[str, tuple[Callable[[Job], Loop], dict[str, Any]]] = {
    "ours": (Ours, {"compile": "on GPU"}),
    "ours-compiled": (Ours, {"compile": "always"}),
    "transformers-eager": (transformers, {}),
    "transformers-compiled": (transformers, {"compile": "always"}),
    "transformers-graphs": (transformers, {"compile": "reduce-overhead"}),
    "transformers-untuned": (transformers, {"keep_freed": False}),
    "plain": (plain, {"compile": "on GPU"}),
    "liger": (transformers, {"liger": True}),
}

# What is ours, switched off: name -> (devices it matters on, settings of the arm).
# Without a device: by --order alone, with a --micro-batch-of its own.
ABLATIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "allocator as it comes": (("cpu",), {"keep_freed": False}),
    "AdamW not fused": (("cpu",), {"fused": False}),
    "AdamW not fused, no CUDA graph": (("cuda",), {"fused": False, "graph": False}),
    "attention not in blocks": (("cpu",), {"attention": "flash"}),
    "logits 512 at a time": (("cpu",), {"loss_rows": 512}),
    "logits all at once": (("cuda",), {"loss_rows": 2**40}),
    "not compiled": (("cuda",), {"compile": "never"}),
    "no CUDA graph": (("cuda",), {"graph": False}),
    "one CUDA graph": (("cuda",), {"graph": True}),
    "ours at 64": ((), {}),
    "attention: flash": (("cuda",), {"attention": "flash"}),
    "activations computed again": (("cuda",), {"recompute": True}),
}
