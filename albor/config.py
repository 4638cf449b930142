"""What a run is made of, and the arithmetic that must hold before it starts.

A recipe is a YAML file of four parts: model, data, optimizer, training. Notable:

- reading is strict: an unknown or repeated key, a wrong type, an impossible shape, a
  contradiction is refused with the key, the value and the mend;
- every rule stands in the class it is about, so Python and YAML obey the same ones;
- `parameter_shapes` counts a model without building it, and nothing imports torch;
- `preflight` is the contract C-TRAINCFG-001: no run may end before its schedule does.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names key, value and mend."""


def project_path(path: str | Path) -> Path:
    """Resolve a relative `path` from the project: the nearest parent with _toc.yml.

    Outside a project, relative paths start at the working directory, as usual.
    """
    here = Path.cwd()
    roots = (
        folder for folder in (here, *here.parents) if (folder / "_toc.yml").exists()
    )
    return next(roots, here) / Path(path).expanduser()


def require(condition: bool, key: str, value: object, why: str) -> None:
    """Raise `ConfigError` "key = value: why" unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {why}")


def suggest(word: object, known: Iterable[str]) -> str:
    """Name the known word that was probably meant, and all that there are."""
    close = difflib.get_close_matches(str(word), known := sorted(known), n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}known: {', '.join(known)}"


def within(
    low: float, high: float = math.inf, default: Any = dataclasses.MISSING
) -> Any:
    """Declare a field that must lie in [low, high]."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def mend_type(value: object, kind: Any) -> str:
    """Say how a value of the wrong type would be written in YAML."""
    words = {int: "a whole number", float: "a number", str: "text, in quotes"}
    mend = f"expected {words.get(kind, kind)}, not {type(value).__name__}"
    number = re.fullmatch(
        r"([-+]?\d+)(\.\d*)?e([-+]?)(\d+)", str(value).strip(), re.I
    )
    if kind is float and number:
        whole, fraction, sign, exponent = number.groups()
        mend += f"; write {whole}{fraction or '.0'}e{sign or '+'}{exponent}"
    return mend


def check(config: Any) -> None:
    """Hold every field to its annotation and range; 1 becomes 1.0 where due.

    True is no whole number here; NaN and infinity are no numbers; a `Literal` lists
    all that its field may be.
    """
    for field in dataclasses.fields(config):
        key, kind, value = field.name, field.type, getattr(config, field.name)
        if kind is float and type(value) is int:
            object.__setattr__(config, key, value := float(value))
        if choices := get_args(kind):
            require(value in choices, key, value, suggest(value, choices))
        else:
            require(type(value) is kind, key, value, mend_type(value, kind))
        if limits := field.metadata:
            low, high = limits["low"], limits["high"]
            why = f"must be finite and lie in [{low}, {high}]"
            require(low <= value <= high and math.isfinite(value), key, value, why)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, in the words of Hugging Face's Llama configuration."""

    vocab_size: int = within(1, 65536)  # V: tokens; a token file holds 16-bit ids
    hidden_size: int = within(1)  # D: width of the residual stream
    intermediate_size: int = within(1)  # F: width inside the feed-forward network
    num_hidden_layers: int = within(1)  # L: blocks
    num_attention_heads: int = within(1)  # H: query heads
    num_key_value_heads: int = within(
        1
    )  # K: key/value heads, each for H / K queries
    max_position_embeddings: int = within(1)  # the longest sequence, in tokens
    head_dim: int = within(0, default=0)  # Dh: width of a head; 0 means D / H
    rms_norm_eps: float = within(1e-12, 1, 1e-5)  # keeps the norm of zeros finite
    rope_theta: float = within(1, default=10000.0)  # base of the rotary wavelengths
    initializer_range: float = within(
        1e-6, 1, 0.02
    )  # deviation of the first weights

    def __post_init__(self) -> None:
        check(self)
        width, heads = self.hidden_size, self.num_attention_heads
        why = f"must divide num_attention_heads = {heads}"
        shared = self.num_key_value_heads
        require(heads % shared == 0, "num_key_value_heads", shared, why)
        if self.head_dim == 0:
            why = (
                f"{heads} heads do not divide hidden_size = {width}; give head_dim"
            )
            require(width % heads == 0, "num_attention_heads", heads, why)
            object.__setattr__(self, "head_dim", width // heads)
        why = "must be even, because the rotary embedding turns pairs"
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, why)


PRESETS = {  # V, D, F, layers, H, K, longest sequence
    "albor-tiny": ModelConfig(1000, 64, 256, 2, 2, 2, 256),  # for tests
    "albor-small": ModelConfig(32768, 256, 768, 4, 4, 2, 256),  # for two CPU cores
    "albor-50m": ModelConfig(32768, 512, 2048, 12, 8, 2, 2048),
    "albor-base-350m": ModelConfig(
        32768, 1024, 4096, 24, 16, 4, 2048
    ),  # the card's
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the original's files.

    Names are Hugging Face's, matrices are (out, in) as in `torch.nn.Linear`. There is
    no bias anywhere, and the output head is the embedding itself.
    """
    width, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    shapes = {
        "model.embed_tokens": (config.vocab_size, width),
        "model.norm": (width,),
    }
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape for name, shape in block.items()
        }
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def count_parameters(config: ModelConfig) -> int:
    """Count the numbers that the model learns: the sizes of its tensors, added up."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


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

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with the card's constants."""

    name: Literal["adamw"] = "adamw"
    lr: float = within(1e-9, 1)  # peak learning rate, reached after the warm-up
    beta1: float = within(0, 0.999999, 0.9)  # memory of the gradient's mean
    beta2: float = within(0, 0.999999, 0.95)  # memory of its square
    eps: float = within(1e-20, 1, 1e-8)  # keeps the first steps finite
    weight_decay: float = within(
        0, 10, 0.1
    )  # pull to zero, times the learning rate
    decay: Literal["matrices", "all"] = (
        "matrices"  # the card's decays norms as well
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast, how exactly, and what is written when."""

    mode: Literal["pretrain"] = "pretrain"
    epochs: int = within(1)  # passes over the data that are allowed: a ceiling
    max_steps: int = within(1)  # optimizer steps that run, and the schedule's end
    grad_clip: float = within(1e-6, default=1.0)  # largest global gradient norm
    lr_scheduler: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    warmup_steps: int = within(0, default=0)  # steps in which the rate rises
    min_lr_ratio: float = within(0, 1, 0.1)  # end of the cosine, of the peak
    gradient_accumulation: int = within(1, default=1)  # micro-batches per step
    mixed_precision: Literal["fp16", "bf16", "fp32", "auto"] = "auto"
    output_dir: str = ""  # "": checkpoints/NAME
    save_interval: int = within(0, default=0)  # steps; 0: by the clock alone
    eval_interval: int = within(0, default=0)  # steps; 0: at the end alone
    eval_sequences: int = within(1, default=64)  # validation sequences to look at

    def __post_init__(self) -> None:
        check(self)
        end, warmup = self.max_steps, self.warmup_steps
        why = f"the peak must be reached: warm up for less than max_steps = {end}"
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
        why = (
            f"longer than the model's max_position_embeddings = {longest}; lower it"
        )
        require(length <= longest, "data.seq_len", length, why)

    def with_training(self, **changes: Any) -> "Recipe":
        """Return the recipe with other `training` values.

        With a new `max_steps` the warm-up keeps its share of the run (one step at
        least, if there was one), and intervals past the end move to the end.
        """
        old = dataclasses.asdict(self.training)
        steps = changes.get("max_steps")
        if type(steps) is int and steps > 0:
            share = old["warmup_steps"] * steps / old["max_steps"]
            old["warmup_steps"] = min(math.ceil(share), steps - 1)
            for key in ("save_interval", "eval_interval"):
                old[key] = min(old[key], steps)
        training = build(TrainingConfig, old | changes, "training.")
        return dataclasses.replace(self, training=training)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the shape of the YAML file, the preset spelled out."""
        values = dataclasses.asdict(self)
        return values | {"model": {"architecture": values["model"]}}


def build(kind: Any, raw: Any, where: str = "") -> Any:
    """Make a `kind` of the mapping `raw`, whose keys stand at the dotted `where`."""
    require(
        isinstance(raw, dict), where.rstrip(".") or "recipe", raw, "expected keys"
    )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in raw.items():
        require(
            key in fields,
            f"{where}{key}",
            value,
            f"unknown; {suggest(key, fields)}",
        )
    for key, field in fields.items():
        given = key in raw or field.default is not dataclasses.MISSING
        require(given, f"{where}{key}", None, "is missing; give it a value")
    try:
        return kind(**raw)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def build_recipe(raw: Any, name: str) -> Recipe:
    """Make a recipe of the mapping that a YAML file holds; `name` if it gives none."""
    require(isinstance(raw, dict), "recipe", raw, "expected a mapping of keys")
    parts = {"name": name} | raw
    for key, kind in (("optimizer", OptimizerConfig), ("training", TrainingConfig)):
        parts[key] = build(kind, raw.get(key), f"{key}.")
    parts["data"] = build(DataConfig, raw.get("data"), "data.")
    model = raw.get("model")
    why = "give it either `preset: NAME` or `architecture:` with its keys"
    one = isinstance(model, dict) and len(model) == 1
    require(one and {*model} <= {"preset", "architecture"}, "model", model, why)
    if "architecture" in model:
        shape = build(ModelConfig, model["architecture"], "model.architecture.")
    else:
        preset = model["preset"]
        require(preset in PRESETS, "model.preset", preset, suggest(preset, PRESETS))
        shape = PRESETS[preset]
    return build(Recipe, parts | {"model": shape})


def refuse_twice(node: yaml.Node | None, where: str = "") -> None:
    """Refuse a key that stands twice in one mapping; YAML would keep the last."""
    seen: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        line, dotted = key.start_mark.line + 1, f"{where}{key.value}"
        first = seen.setdefault(str(key.value), line)
        why = f"given twice, on lines {first} and {line}; keep one"
        require(first == line, dotted, value.value, why)
        refuse_twice(value, f"{dotted}.")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe: the file, or by its name `configs/train/NAME.yaml`."""
    text = str(name_or_path)
    is_file = isinstance(name_or_path, Path) or text.endswith((".yaml", ".yml"))
    path = project_path(text if is_file else f"configs/train/{text}.yaml")
    try:
        source = path.read_text(encoding="utf-8")
        refuse_twice(yaml.compose(source, yaml.SafeLoader))
        return build_recipe(yaml.safe_load(source), path.stem)
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
    require(
        mode in ("pack", "truncate"), "data.rows", mode, "write pack or truncate"
    )
    if mode == "pack":
        return rows * row_tokens // seq_len
    why = f"rows are shorter, {row_tokens} tokens; lower it, or write rows: pack"
    require(seq_len <= row_tokens, "data.seq_len", seq_len, why)
    return rows


def steps_per_epoch(sequences: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps in one pass: floor(sequences / batch / accumulation)."""
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

    Refused on `sequences` training sequences: data for no step, epochs that end before
    `max_steps`, and with `strict_warmup` a warm-up over a tenth of the run, which is
    otherwise a warning.
    """
    plan, batch = recipe.training, recipe.data.batch_size
    steps, together = plan.max_steps, batch * plan.gradient_accumulation
    per_epoch = steps_per_epoch(sequences, batch, plan.gradient_accumulation)
    why = (
        f"with data.batch_size = {batch} a step takes {together} sequences and there "
        f"are {sequences}; lower their product to that, or add data"
    )
    key = "training.gradient_accumulation"
    require(per_epoch > 0, key, plan.gradient_accumulation, why)
    total = plan.epochs * per_epoch
    why = (
        f"gives {plan.epochs} x {per_epoch} = {total} steps of max_steps = {steps}; "
        f"write epochs: {math.ceil(steps / per_epoch)}, or lower max_steps"
    )
    require(total >= steps, "training.epochs", plan.epochs, why)
    why = f"over 10% of max_steps = {steps}; write {steps // 10} or less"
    if over := 10 * plan.warmup_steps > steps:
        require(not strict_warmup, "training.warmup_steps", plan.warmup_steps, why)
    tokens = together * recipe.data.seq_len
    return Preflight(
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_share=plan.warmup_steps / steps,
        tokens_per_step=tokens,
        passes=steps * together / sequences,
        tokens_per_parameter=steps * tokens / count_parameters(recipe.model),
        warnings=(f"training.warmup_steps = {plan.warmup_steps}: {why}",) * over,
    )


def memory_estimate(
    config: ModelConfig, micro_batch: int, seq_len: int, precision: str
) -> dict[str, int]:
    """Estimate the bytes of one training step, by part.

    Exact: 4 bytes per parameter for weights and for gradients, 8 for AdamW's two
    moments; half precision adds a 2-byte copy of the weights. An estimate: what the
    forward pass keeps for the backward pass, counted tensor by tensor, fused attention
    assumed. Not counted: workspaces, fragmentation, what the driver takes.
    """
    require(
        precision in ("fp16", "bf16", "fp32"), "precision", precision, "unknown"
    )
    size, parameters = 4 if precision == "fp32" else 2, count_parameters(config)
    width, heads = config.hidden_size, config.num_attention_heads
    attention = (
        2 * (heads + config.num_key_value_heads) * config.head_dim
    )  # q, k, v, out
    block = 4 * 2 * width + size * (
        2 * width + attention + 4 * config.intermediate_size
    )
    tokens = micro_batch * seq_len
    parts = {
        "weights": (4 if size == 4 else 6) * parameters,
        "gradients": 4 * parameters,
        "moments": 8 * parameters,
        "activations": tokens * (config.num_hidden_layers * block + 8 * width),
        "logits": 2 * 4 * min(tokens, 1024) * config.vocab_size,
    }
    return parts | {"total": sum(parts.values())}


def fit_micro_batch(recipe: Recipe, available_bytes: int) -> tuple[int, int]:
    """Choose (micro-batch, accumulation) to fit; their product stays the recipe's.

    The micro-batch is the largest divisor of the product that fits and is not above
    the recipe's own. Precision "auto" counts as fp32, the most it can be.
    """
    precision = recipe.training.mixed_precision.replace("auto", "fp32")
    together = recipe.data.batch_size * recipe.training.gradient_accumulation
    for micro in range(recipe.data.batch_size, 0, -1):
        need = memory_estimate(recipe.model, micro, recipe.data.seq_len, precision)
        if together % micro == 0 and need["total"] <= available_bytes:
            return micro, together // micro
    raise ConfigError(
        f"memory = {available_bytes:,} bytes: one sequence of {recipe.data.seq_len} "
        f"tokens needs {need['total']:,}; lower data.seq_len or take a smaller preset"
    )
