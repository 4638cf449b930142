# Generated from book/invariants.md: edit the chapter, not this file.
"""Invariants: what holds of every sound model, whatever its weights have learned.

Notable:
- none needs a reference: a model is asked twice, and its answers must agree, or
  must differ, as the definition says;
- each names the first place at which the property is lost;
- what could hide a fault is excluded: square matrices, weights that a fallback
  could guess, few and frequent tokens.

Shapes: B batch, T time, D width, F width of the feed-forward network, H heads, K
key/value heads, Dh width of a head, V vocabulary.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from albor.checks import CheckError, lively
from albor.model import Albor
from albor.shapes import parameter_shapes
from albor.weights import load_model, save_model

__all__ = [
    "check_causal",
    "check_initial",
    "check_order",
    "check_roundtrip",
    "check_tied",
    "stable_rank",
]


@torch.no_grad()
def check_causal(model: Albor, ids: Tensor) -> None:
    """A token reaches every position from its own on, and none before. ids: (T,)

    Row t of a batch has token t changed; a last row has none.
    """
    T, vocabulary = len(ids), model.config.vocab_size
    rows = ids.repeat(T + 1, 1)
    rows.diagonal().copy_((ids + 1) % vocabulary)
    logits = model(rows)
    change = (logits[:T] - logits[T]).abs().amax(dim=-1)  # (changed, seen at)
    slack = 1e-6 * float(logits[T].abs().amax())
    for t, s in ((change > slack).tril(-1).nonzero()).tolist():
        raise CheckError(
            f"token {t} of {T} changes the logits at position {s}, before it, by "
            f"{change[t, s]:.3g}; the causal mask is missing or misread"
        )
    for t, s in ((~(change > 0)).triu().nonzero()).tolist():
        raise CheckError(
            f"token {t} of {T} leaves the logits at position {s} as they were "
            f"(change {change[t, s]:.3g}); the mask hides too much, or is NaN"
        )


@torch.no_grad()
def check_order(model: Albor, length: int = 7, seed: int = 0) -> None:
    """In every block, the last position feels in what order the others stand.

    Attention without positions sees a bag of vectors. In a whole model the mask
    hides that, for it gives the order away from the second block on. So each block
    alone gets (1, T, D) random vectors, then the first T - 1 turned by one.
    """
    generator, D = torch.Generator().manual_seed(seed), model.config.hidden_size
    x = torch.randn(1, length, D, generator=generator)
    x = x.to(model.model.embed_tokens.weight)
    order = [*range(1, length - 1), 0, length - 1]
    table = model.model.rotations(0, length)
    for i, block in enumerate(model.model.layers):
        ours, theirs = (
            block(v, *table)[0, -1] - v[0, -1] for v in (x, x[:, order])
        )
        change = float((ours - theirs).norm() / ours.norm())
        if not change > 1e-5:
            raise CheckError(
                f"model.layers.{i}: another order of the tokens before it changes "
                f"the last output by {change:.1e} of its size; rotate q and k there"
            )


def check_tied(model: Albor, optimizer: Optimizer | None = None) -> None:
    """The head is the embedding: one storage, and one place in the optimizer.

    A second (V, D) is looked for in parameters, buffers and plain attributes.
    """
    embedding = model.model.embed_tokens.weight
    shapes = {tuple(embedding.shape), tuple(embedding.T.shape)}
    for path, module in model.named_modules():
        values = {**vars(module), **module._parameters, **module._buffers}
        for name, value in values.items():
            alike = isinstance(value, Tensor) and tuple(value.shape) in shapes
            if alike and value.data_ptr() != embedding.data_ptr():
                raise CheckError(
                    f"{f'{path}.{name}'.lstrip('.')} is a second "
                    f"{tuple(value.shape)} beside model.embed_tokens.weight; let "
                    "the head read the embedding itself, not a copy"
                )
    named = dict(model.named_parameters())
    if odd := sorted(named.keys() ^ parameter_shapes(model.config).keys()):
        raise CheckError(
            f"{odd}: not both in the model and in parameter_shapes, from which "
            "files are read and written; add to the one or drop from the other"
        )
    if optimizer is None:
        return
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in named.items():
        if (times := sum(p is other for other in held)) != 1:
            raise CheckError(f"{name} is {times} times in the optimizer; make it 1")
    if len(held) > len(named):
        raise CheckError(
            f"{len(held)} tensors in the optimizer, {len(named)} in the model; "
            "give the optimizer the model's own"
        )


@torch.no_grad()
def check_roundtrip(
    model: Albor,
    folder: str | Path,
    save: Callable[[Path, Albor], object] = save_model,
    load: Callable[[Path], Albor] = load_model,
) -> None:
    """A saved and loaded model has the logits of the one that was saved.

    With weights that no fallback could guess, and only in a shape whose dimensions
    all differ: in a square matrix rows and columns can be swapped unseen.
    """
    c = model.config
    heads = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim)
    sizes = (c.vocab_size, c.hidden_size, c.intermediate_size, *heads)
    if len({*sizes}) < len(sizes):
        raise CheckError(
            f"V, D, F, H * Dh and K * Dh are {sizes}: of a square matrix the "
            "transpose fits too; check a model in which all five differ"
        )
    busy = lively(model)
    save(Path(folder), busy)
    again = load(Path(folder)).to(busy.model.embed_tokens.weight.device)
    ids = torch.arange(min(c.max_position_embeddings, c.vocab_size))[None]
    ids = ids.to(busy.model.embed_tokens.weight.device)
    ours, theirs = busy(ids), again(ids)
    change = float((ours - theirs).abs().max() / ours.std())
    if not change < 1e-5:
        raise CheckError(
            f"{folder}: logits move by {change:.3g} of their spread on the way "
            "through the file; compare tensor by tensor what was written and read"
        )


def stable_rank(matrix: Tensor, rounds: int = 12) -> float:
    """Sum of the squared singular values, over the largest: at most the rank.

    The largest comes from `rounds` of power iteration, from below.
    """
    w = matrix.detach().float()
    x = torch.randn(w.shape[1], generator=torch.Generator().manual_seed(0)).to(w)
    for _ in range(rounds):
        x = w.T @ (w @ (x / x.norm()))
    return float(w.square().sum() / x.norm())


@torch.no_grad()
def check_initial(
    model: Albor, tokens: int = 1024, seed: int = 0, scaled: bool = False
) -> None:
    """Fresh weights are independent draws from N(0, s), and know nothing yet.

    By matrix: mean, deviation, correlation of neighbours and, on a sample, with all
    others of the same shape, to 6 standard errors; stable rank above a fifth of the
    shorter side. Gains are one. The loss on random ids is ln V + D s^2 / 2, to 0.06
    nats. `scaled`: what adds to the residual stream has s / sqrt(2 L), not s.
    """
    c, alike = model.config, dict[torch.Size, list[Tensor]]()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            if not (p == 1).all():
                raise CheckError(
                    f"{name}: gains from {p.min()} to {p.max()}, not 1"
                )
            continue
        into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
        depth = 2 * c.num_hidden_layers if scaled and into_stream else 1
        w, error = p * depth**0.5 / c.initializer_range, 6 / math.sqrt(p.numel())
        neighbours = (w[:, 1:] * w[:, :-1]).mean(), (w[1:] * w[:-1]).mean()
        some = w.flatten()[:: max(1, w.numel() // 16384)]
        others = alike.setdefault(p.shape, [])
        likeness = [float((some * other).mean()) for other in others]
        for what, found, due, slack in (
            ("mean / s", w.mean(), 0.0, error),
            ("deviation / s", w.std(), 1.0, error),
            ("correlation along rows", neighbours[0], 0.0, 1.1 * error),
            ("correlation along columns", neighbours[1], 0.0, 1.1 * error),
            (
                "correlation with one of its shape",
                max(likeness, key=abs, default=0.0),
                0.0,
                6 / math.sqrt(len(some)),
            ),
            ("stable rank / side", stable_rank(p) / min(p.shape), 1.0, 0.8),
        ):
            if not abs(float(found) - due) <= slack:
                raise CheckError(
                    f"{name}: {what} is {float(found):.4g}, not within {slack:.2g} "
                    f"of {due:g}; draw it from N(0, s = {c.initializer_range}), "
                    "independently of all others"
                )
        others.append(some)
    T = min(c.max_position_embeddings, 256)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(c.vocab_size, (2, -(-tokens // T), T), generator=generator)
    inputs, targets = ids.to(model.model.embed_tokens.weight.device)
    loss = float(model.loss(inputs, targets))
    due = math.log(c.vocab_size) + c.hidden_size * c.initializer_range**2 / 2
    if not abs(loss - due) <= 0.06:
        raise CheckError(
            f"the loss on random ids is {loss:.3f}, not within 0.06 of "
            f"ln V + D s^2 / 2 = {due:.3f}; look at the first weights and the head"
        )
