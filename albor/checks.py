# Generated from book/checks.md: edit the chapter, not this file.
"""Checks of gradients and steps, each against the same thing done a second time.

Notable:
- `plain_loss` is the whole model again: plain operations, one per symbol of the
  formulas, none of the model's own code; in float64 it is the reference;
- `check_step` takes one step with `clip_grad_norm_` and AdamW on the whole batch;
- a check raises `CheckError` with tensor, place, value and mend, and leaves what
  it was given as it was.

Shapes: B batch, T time, N sequences of a step, D width, H heads, K key/value heads,
Dh width of a head, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from albor.model import IGNORED, Albor
from albor.shapes import ModelConfig
from albor.step import count_copies, train_step

__all__ = [
    "CheckError",
    "check_copies",
    "check_gradients",
    "check_step",
    "compare_gradients",
    "lively",
    "plain_loss",
]


class CheckError(RuntimeError):
    """A property that every sound model and every sound run has is missing here."""


def plain_loss(
    weights: Mapping[str, Tensor], config: ModelConfig, ids: Tensor, targets: Tensor
) -> Tensor:
    """Mean cross-entropy of targets (B, T), as the formulas say: the reference.

    Llama's computation in the type of the weights, with every matrix in full: slow.
    Rotations are products of complex numbers, the mask is a triangle of -inf.
    """
    T, Dh, eps = ids.shape[1], config.head_dim, config.rms_norm_eps
    dtype, device = weights["model.norm.weight"].dtype, ids.device
    speeds = config.rope_theta ** (-torch.arange(0, Dh, 2, device=device) / Dh)
    times = torch.arange(T, device=device, dtype=dtype)
    angles = torch.outer(times, speeds.to(dtype))[:, None]  # (T, 1, Dh / 2)
    future = torch.ones(T, T, device=device).triu(1).bool()

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return gain * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def turn(x: Tensor) -> Tensor:  # (B, T, heads, Dh)
        pairs = torch.complex(*x.chunk(2, dim=-1))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    embedding = weights["model.embed_tokens.weight"]
    x = embedding[ids]  # (B, T, D)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        w = {n[len(at) :]: t for n, t in weights.items() if n.startswith(at)}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, Dh))
            for part in "qkv"
        )  # (B, T, H or K, Dh)
        shared = config.num_attention_heads // config.num_key_value_heads
        k, v = (t.repeat_interleave(shared, dim=2) for t in (turn(k), v))
        scores = torch.einsum("bthd,bshd->bhts", turn(q), k) / math.sqrt(Dh)
        looks = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        seen = torch.einsum("bhts,bshd->bthd", looks, v).flatten(2)
        x = x + seen @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate = h @ w["mlp.gate_proj.weight"].T
        up = h @ w["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w["mlp.down_proj.weight"].T
    logits = norm(x, weights["model.norm.weight"]) @ embedding.T  # (B, T, V)
    right = logits.gather(-1, targets[..., None])[..., 0]
    return (logits.logsumexp(dim=-1) - right).mean()


@torch.no_grad()
def lively(model: Albor, seed: int = 0) -> Albor:
    """A copy whose weights are drawn so that every branch has something to say.

    Matrices from N(0, 1 / inputs), gains around one. At N(0, 0.02) the blocks of a
    narrow model add next to nothing to the stream, nor does what is wrong in them.
    """
    busy, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in busy.parameters():
        drawn = torch.randn(p.shape, generator=generator)
        p.copy_(1 + 0.3 * drawn if p.dim() == 1 else drawn / math.sqrt(p.shape[1]))
    return busy


def compare_gradients(
    model: Albor, ids: Tensor, targets: Tensor, precision: str = "fp32"
) -> dict[str, tuple[float, float]]:
    """By tensor: cosine and ratio of norms, the model's gradient to `plain_loss`'s.

    The model's is that of `model.loss`, in `precision`; the other is in float64. A
    tensor without a gradient has (0, 0).
    """
    named = dict(model.named_parameters())
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(ids.device.type, dtype=half) if half else nullcontext():
        loss = model.loss(ids, targets)
    ours = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    wide = {n: p.detach().double().requires_grad_() for n, p in named.items()}
    plain = plain_loss(wide, model.config, ids, targets)
    theirs = torch.autograd.grad(plain, [*wide.values()])
    found = {}
    for name, g, ref in zip(named, ours, theirs, strict=True):
        g = torch.zeros_like(ref) if g is None else g.double()
        norm, wanted = g.norm(), ref.norm()
        cosine = (g * ref).sum() / (norm * wanted) if norm else norm
        found[name] = float(cosine), float(norm / wanted)
    return found


def check_gradients(
    model: Albor,
    ids: Tensor,
    targets: Tensor,
    *,
    least: float = 0.999,
    precision: str = "fp32",
) -> None:
    """Every tensor's gradient has the direction of the reference, and its size.

    Size to 5%. `least` suits float32; bf16 is good for 0.99. Give it three blocks
    or more, and lively ones: what goes wrong between blocks shows nowhere else.
    """
    found = compare_gradients(model, ids, targets, precision)
    for name, (cosine, ratio) in found.items():
        if not (cosine >= least and abs(ratio - 1) <= 0.05):
            raise CheckError(
                f"{name}: the gradient has cosine {cosine:.4f} with the reference "
                f"and {ratio:.4g} times its norm; {least} and 1 are due. Look for "
                "what the way back to it leaves out"
            )


def check_step(
    model: Albor,
    inputs: Tensor,
    targets: Tensor,
    step: Callable[..., object] = train_step,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """One step is one update by AdamW with the clipped gradient of the whole batch.

    In slices or not, whatever was in `.grad` before, whatever the loss scale. The
    reference is autograd, `clip_grad_norm_` and `torch.optim.AdamW`. (N, T) each.
    """
    targets = targets.clone()
    targets[0, : targets.shape[1] // 2] = IGNORED  # so that rows weigh differently
    divisors = [n for n in range(1, len(inputs) + 1) if len(inputs) % n == 0]
    # Clipping hides the gradient's size, so it is looked at with and without.
    for share, rows in [(s, n) for s in (0.5, 2.0) for n in divisors]:
        plain, ours = copy.deepcopy(model), copy.deepcopy(model)
        plain.loss(inputs, targets).backward()
        every = list(plain.parameters())
        limit = share * float(nn.utils.clip_grad_norm_(every, math.inf))
        nn.utils.clip_grad_norm_(every, limit)
        torch.optim.AdamW(every, lr=0.01).step()
        for p in ours.parameters():
            p.grad = torch.ones_like(p)  # what another step may have left there
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1.0)
        how = {"lr": 0.01, "grad_clip": limit, "micro_batch": rows}
        step(ours, optimizer, inputs, targets, scaler=scaler, **how)
        both = zip(plain.named_parameters(), ours.parameters(), strict=True)
        for (name, ref), p in both:
            zero = torch.zeros_like(p)
            wanted, got = (zero if t.grad is None else t.grad for t in (ref, p))
            if not (got - wanted).norm() <= 1e-3 * wanted.norm():
                product = (got * wanted).sum() / got.norm() / wanted.norm()
                raise CheckError(
                    f"{name}: in slices of {rows} rows its gradient is "
                    f"{got.norm() / wanted.norm():.4g} times that of the batch, "
                    f"cosine {product:.4f}; look at the weights of the slices, at "
                    "zero_grad, the clipping, the loss scale"
                )
            updates = int(optimizer.state[p].get("step", 0))
            away = (p - ref).detach().norm() / math.sqrt(p.numel()) / 0.01
            if updates != (ref.grad is not None) or not away <= 0.1:
                raise CheckError(
                    f"{name}: {updates} updates in slices of {rows} rows, and "
                    f"{float(away):.3g} of an update away; step once, when all "
                    "slices are in, at the rate that was given"
                )


def check_copies(work: Callable[[], object], up: int, down: int) -> None:
    """`work` crosses between host and device as often as promised, no more."""
    copies = count_copies(work)
    if (copies.up, copies.down) != (up, down):
        raise CheckError(
            f"{copies.up} copies to the device and {copies.down} back, where {up} "
            f"and {down} were promised ({copies.up_bytes:,} and "
            f"{copies.down_bytes:,} bytes); look for .item(), .tolist(), .cpu()"
        )
