# Generated from book/config.md: edit the chapter, not this file.
"""What a run is made of, and the arithmetic that must hold before it starts.

A recipe is a YAML file of four parts: model, data, optimizer, training. Notable:

- reading is strict: what is unknown, given twice, of the wrong type or impossible
  is refused with the key, the value and the mend;
- every rule stands in the class it is about, so Python and YAML obey the same;
- `preflight` is the contract C-TRAINCFG-001: no run ends before its schedule does.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from albor.shapes import (
    FULL_TOKENS,
    ConfigError,
    ModelConfig,
    build,
    check,
    count_parameters,
    memory_estimate,
    require,
    suggest,
    within,
)

__all__ = [
    "DataConfig",
    "OptimizerConfig",
    "Preflight",
    "Recipe",
    "TrainingConfig",
    "fit_micro_batch",
    "load_recipe",
    "preflight",
    "project_path",
    "refuse_traps",
    "sequences",
    "steps_per_epoch",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is cut into sequences."""

    train: str = ""  # folders or packages, split at os.pathsep; "": this Python
    val: str = ""  # the same; "": packages held out of `train`
    batch_size: int = within(1)  # sequences per forward pass (a micro-batch)
    seq_len: int = within(1)  # T: tokens that the model sees at once
    tokenizer: str = ""  # folder or tokenizer.json; "": train one on the corpus
    input_column: str = "text"  # column to read where `train` is a table
    rows: Literal["pack", "truncate"] = "pack"  # cut rows up, or keep their heads
    max_bytes: int = within(0, default=0)  # source text to take; 0: all there is
    val_bytes: int = within(1, default=262_144)  # source text to hold out
    licences: Literal["auto", "permissive", "any"] = "auto"  # auto: as you choose
    benchmarks: str = ""  # problems never to train on: a file or a folder of them
    upsample: int = within(1, default=1)  # times that tier 1 is read in an epoch
    fim_rate: float = within(0, 1, 0.0)  # share of fragments to fill in the middle
    fim_style: Literal["psm", "spm"] = "psm"  # prefix and suffix, or the reverse

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with the card's constants, or Muon for the matrices of the blocks."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = within(1e-9, 1)  # peak learning rate, reached after the warm-up
    beta1: float = within(0, 0.999999, 0.9)  # memory of the gradient's mean
    beta2: float = within(0, 0.999999, 0.95)  # memory of its square
    eps: float = within(1e-20, 1, 1e-8)  # keeps the first steps finite
    momentum: float = within(0, 0.999999, 0.95)  # Muon's memory of the gradient
    weight_decay: float = within(0, 10, 0.1)  # pull to zero, times the rate
    decay: Literal["matrices", "all"] = "matrices"  # the card decays norms as well

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast, how exactly, and what is written when."""

    mode: Literal["pretrain"] = "pretrain"
    epochs: int = within(1)  # passes over the data that are allowed: a ceiling
    max_steps: int = within(1)  # optimizer steps that run, and the schedule's end
    grad_clip: float = within(1e-6, default=1.0)  # largest global gradient norm
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"  # the decay
    warmup_steps: int = within(0, default=0)  # steps in which the rate rises
    min_lr_ratio: float = within(0, 1, 0.1)  # end of the decay, of the peak
    scaled_init: bool = False  # o_proj and down_proj start smaller by sqrt(2 L)
    gradient_accumulation: int = within(1, default=1)  # batches per step
    micro_batch: int = within(0, default=0)  # sequences at a time, at most; 0: fit
    mixed_precision: Literal["fp16", "bf16", "fp32", "auto"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"  # auto: on a GPU
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    recompute: bool = False  # activations anew in the backward pass: less memory
    deterministic: bool = False  # on a GPU: the same bits every time, and slower
    output_dir: str = ""  # "": checkpoints/NAME
    save_interval: int = within(0, default=0)  # steps; 0: by the clock alone
    eval_interval: int = within(0, default=0)  # steps; 0: at the end alone
    eval_sequences: int = within(1, default=64)  # validation sequences to look at

    def __post_init__(self) -> None:
        check(self)
        end, warmup = self.max_steps, self.warmup_steps
        why = f"the peak must be reached; write less than max_steps = {end}"
        require(warmup < end, "warmup_steps", warmup, why)
        for key in ("save_interval", "eval_interval"):
            why = f"never comes in max_steps = {end}; lower it, or write 0"
            require(getattr(self, key) <= end, key, getattr(self, key), why)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run does."""

    name: str  # of the file, and of the folder that the run writes
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig

    def __post_init__(self) -> None:
        check(self)
        why = "it names a folder; use letters, digits, '.', '_' and '-'"
        require(bool(re.fullmatch(r"\w[\w.-]*", self.name)), "name", self.name, why)
        length, longest = self.data.seq_len, self.model.max_position_embeddings
        why = f"the model ends at max_position_embeddings = {longest}; lower it"
        require(length <= longest, "data.seq_len", length, why)

    def with_training(self, **changes: Any) -> "Recipe":
        """Return the recipe with other `training` values.

        With a new `max_steps` the warm-up keeps its share of the run, rounded up
        (but ends before it), and intervals past the end move to the end.
        """
        plan, steps = dataclasses.asdict(self.training), changes.get("max_steps")
        if type(steps) is int and steps > 0:
            share = -(-plan["warmup_steps"] * steps // plan["max_steps"])
            plan["warmup_steps"] = min(share, steps - 1)
            for key in ("save_interval", "eval_interval"):
                plan[key] = min(plan[key], steps)
        training = build(TrainingConfig, plan | changes, "training.")
        return dataclasses.replace(self, training=training)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values as the YAML file has them, the preset spelled out."""
        values = dataclasses.asdict(self)
        return values | {"model": {"architecture": values["model"]}}


def project_path(path: str | Path) -> Path:
    """Resolve a relative `path` from the project: the nearest parent with _toc.yml.

    Outside a project, relative paths start at the working directory, as usual.
    """
    here = Path.cwd()
    roots = (root for root in (here, *here.parents) if (root / "_toc.yml").exists())
    return next(roots, here) / Path(path).expanduser()


def refuse_traps(node: Any, where: str = "") -> None:
    """Refuse keys given twice and whole numbers in base 8, 16 or 60."""
    seen: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        line, dotted = key.start_mark.line + 1, f"{where}{key.value}"
        first = seen.setdefault(str(key.value), line)
        why = f"given twice, on lines {first} and {line}; keep one"
        require(first == line, dotted, value.value, why)
        plain = re.fullmatch(r"[-+]?(0|[1-9][\d_]*)", str(value.value))
        why = "YAML reads this in another base; write plain digits"
        require(bool(plain) or value.tag[-4:] != ":int", dotted, value.value, why)
        refuse_traps(value, f"{dotted}.")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe: the file, or by its name `configs/train/NAME.yaml`."""
    text = str(name_or_path)
    is_name = isinstance(name_or_path, str) and re.fullmatch(r"[\w-]+", text)
    path = project_path(f"configs/train/{text}.yaml" if is_name else text)
    try:
        source = path.read_text(encoding="utf-8")
        refuse_traps(yaml.compose(source, yaml.SafeLoader))
        raw = yaml.safe_load(source)
        if isinstance(raw, dict):
            raw.setdefault("name", path.stem)
        return build(Recipe, raw)
    except OSError as error:
        known = [file.stem for file in project_path("configs/train").glob("*.yaml")]
        why = f"{error.strerror} at {path}; {suggest(text, known)}"
        raise ConfigError(f"recipe = {text!r}: {why}") from None
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name}: not YAML in UTF-8: {error}") from None


def sequences(rows: int, row_tokens: int, seq_len: int, mode: str) -> int:
    """Count the sequences in `rows` rows of `row_tokens` tokens.

    "pack" lays the rows end to end and cuts that; "truncate", the original's way,
    keeps the first `seq_len` tokens of each row and throws the rest away.
    """
    modes = ("pack", "truncate")
    require(mode in modes, "data.rows", mode, suggest(mode, modes))
    require(seq_len >= 1, "data.seq_len", seq_len, "must be at least 1")
    if mode == "pack":
        return rows * row_tokens // seq_len
    why = f"rows end at {row_tokens} tokens; lower it, or write rows: pack"
    require(seq_len <= row_tokens, "data.seq_len", seq_len, why)
    return rows


def steps_per_epoch(sequences: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps in one pass: floor(sequences / batch / accumulation)."""
    for key, value in (("batch_size", batch_size), ("accumulation", accumulation)):
        require(value >= 1, key, value, "must be at least 1")
    return sequences // (batch_size * accumulation)


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a recipe comes to on a given amount of data."""

    steps_per_epoch: int
    total_steps: int  # that `epochs` allows; `max_steps` of them run
    warmup_share: float  # of max_steps
    tokens_per_step: int
    passes: float  # over the sequences, in max_steps steps
    tokens_per_parameter: float  # trained on, repetitions included
    warnings: tuple[str, ...]


def preflight(
    recipe: Recipe, sequences: int, strict_warmup: bool = False
) -> Preflight:
    """Hold a recipe to the contract C-TRAINCFG-001 before any step is taken.

    Refused on `sequences` training sequences: too few for one step, epochs that end
    before `max_steps`, and with `strict_warmup` a warm-up over a tenth of the run,
    which is otherwise a warning.
    """
    plan, batch = recipe.training, recipe.data.batch_size
    steps, accumulation = plan.max_steps, plan.gradient_accumulation
    together = batch * accumulation
    per_epoch = steps_per_epoch(sequences, batch, accumulation)
    why = f"with batch_size = {batch} a step takes {together} sequences, and there "
    why += f"are only {sequences}; lower one of the two, or add data"
    require(per_epoch > 0, "training.gradient_accumulation", accumulation, why)
    total, needed = plan.epochs * per_epoch, -(-steps // per_epoch)
    why = f"{per_epoch} steps per epoch make only {total} of max_steps = {steps}; "
    why += f"write epochs: {needed}, or lower max_steps"
    require(total >= steps, "training.epochs", plan.epochs, why)
    share, warmup, warnings = plan.warmup_steps / steps, plan.warmup_steps, []
    if 10 * warmup > steps:
        why = f"{share:.0%} of max_steps = {steps}; write {steps // 10} or less"
        require(not strict_warmup, "training.warmup_steps", warmup, why)
        warnings.append(f"training.warmup_steps = {warmup}: {why}")
    tokens = together * recipe.data.seq_len
    return Preflight(
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_share=share,
        tokens_per_step=tokens,
        passes=steps * together / sequences,
        tokens_per_parameter=steps * tokens / count_parameters(recipe.model),
        warnings=tuple(warnings),
    )


def fit_micro_batch(
    recipe: Recipe, available_bytes: int, device: str = "cpu"
) -> tuple[int, int]:
    """Choose (micro-batch, accumulation) to fit; their product stays the recipe's.

    The largest divisor of the product that fits, up to `training.micro_batch`, else
    `data.batch_size` (GPU: `FULL_TOKENS`). "auto" must fit as fp32 and bf16.
    """
    plan, batch, need = recipe.training, recipe.data.batch_size, 0
    kind, together = plan.mixed_precision, batch * plan.gradient_accumulation
    kinds = ("fp32", "bf16") if kind == "auto" else (kind,)
    full = max(batch, FULL_TOKENS[device] // recipe.data.seq_len)
    for micro in range(min(plan.micro_batch or full, together), 0, -1):
        sizes = (recipe.model, micro, recipe.data.seq_len)
        how: Any = {"device": device, "recompute": plan.recompute}
        need = max(memory_estimate(*sizes, k, **how)["total"] for k in kinds)
        if together % micro == 0 and need <= available_bytes:
            return micro, together // micro
    why = f"one sequence needs {need:,}; set training.recompute, lower data.seq_len"
    raise ConfigError(f"available_bytes = {available_bytes:,}: {why}")
