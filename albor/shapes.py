# Generated from book/shapes.md: edit the chapter, not this file.
"""How large a model is: its shape, checked; its parameters and memory, counted.

Notable:

- a shape that cannot work is refused with the key, the value and the mend, and the
  same few lines check every other part of a recipe;
- `parameter_shapes` counts a model without building it: 398,509,056 parameters in
  218 tensors for the card's, under the names that `transformers` uses;
- nothing here imports torch: a model can be judged in milliseconds.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

__all__ = [
    "BLOCK_LIMIT",
    "BLOCK_ROWS",
    "FULL_TOKENS",
    "LOSS_ROWS",
    "PRESETS",
    "REQUIRED",
    "ConfigError",
    "ModelConfig",
    "build",
    "build_model",
    "check",
    "count_parameters",
    "memory_estimate",
    "mend_type",
    "parameter_shapes",
    "require",
    "suggest",
    "within",
]


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names key, value and mend."""


def require(condition: bool, key: str, value: object, why: str) -> None:
    """Raise `ConfigError` "key = value: why" unless the condition holds."""
    if not condition:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise ConfigError(f"{key} = {shown}: {why}")


def suggest(word: object, known: Iterable[str]) -> str:
    """Name the known word that was probably meant, and all that there are."""
    close = difflib.get_close_matches(str(word), known := sorted(known), n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}known: {', '.join(known)}"


REQUIRED = dataclasses.MISSING  # the default of a field that has none


def within(low: float, high: float = math.inf, default: Any = REQUIRED) -> Any:
    """Declare a field that must lie in [low, high]."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


def mend_type(value: object, kind: Any) -> str:
    """Say what was expected, and how to write in YAML what was probably meant."""
    words = {int: "a whole number", float: "a number", str: "text, in quotes"}
    mend = f"expected {words.get(kind, kind)}, not {type(value).__name__}"
    text = str(value).strip().lower().replace("_", "")
    if kind is int and re.fullmatch(r"[-+]?\d+(,\d{3})*(\.0*)?", text):
        mend += f"; write {text.split('.')[0].replace(',', '')}"
    if kind is float and re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", text):
        digits, *power = text.split("e")  # YAML wants a point and a sign: 3.0e-4
        digits += "" if "." in digits else ".0"
        mend += f"; write {'e'.join([digits, *(f'{int(p):+d}' for p in power)])}"
    return mend


def check(config: Any) -> None:
    """Hold every field to its annotation and range; 1 becomes 1.0 where due.

    True is no whole number here, NaN and infinity are no numbers, and a `Literal`
    lists all that its field may be.
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
            why = f"must be a finite number, at least {low}"
            why += f" and at most {high}" if high < math.inf else ""
            require(low <= value <= high and math.isfinite(value), key, value, why)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, in the words of Hugging Face's Llama configuration."""

    vocab_size: int = within(1, 65536)  # V: tokens; a token file holds 16-bit ids
    hidden_size: int = within(1)  # D: width of the residual stream
    intermediate_size: int = within(1)  # F: width inside the feed-forward network
    num_hidden_layers: int = within(1)  # L: blocks
    num_attention_heads: int = within(1)  # H: query heads
    num_key_value_heads: int = within(1)  # K: key/value heads, each for H/K queries
    max_position_embeddings: int = within(1)  # the longest sequence, in tokens
    head_dim: int = within(0, default=0)  # Dh: width of a head; 0 means D / H
    rms_norm_eps: float = within(1e-12, 1, 1e-5)  # keeps the norm of zeros finite
    rope_theta: float = within(1, default=10000.0)  # base of the rotary wavelengths
    initializer_range: float = within(1e-6, 1, 0.02)  # spread of the first weights

    def __post_init__(self) -> None:
        check(self)
        width, heads = self.hidden_size, self.num_attention_heads
        shared, why = self.num_key_value_heads, f"must divide the {heads} heads"
        require(heads % shared == 0, "num_key_value_heads", shared, why)
        if self.head_dim == 0:
            why = f"does not divide hidden_size = {width}; give head_dim yourself"
            require(width % heads == 0, "num_attention_heads", heads, why)
            object.__setattr__(self, "head_dim", width // heads)
        why = "must be even, because the rotary embedding turns pairs"
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, why)


PRESETS = {  # V, D, F, layers, H, K, longest sequence
    "albor-tiny": ModelConfig(1000, 64, 256, 2, 2, 2, 256),  # for tests
    "albor-small": ModelConfig(32768, 128, 384, 4, 4, 2, 256),  # for two CPU cores
    "albor-50m": ModelConfig(32768, 512, 2048, 12, 8, 2, 2048),
    "albor-base-350m": ModelConfig(32768, 1024, 4096, 24, 16, 4, 2048),  # the card
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of the original's files.

    Names are Hugging Face's, matrices are (out, in) as in `torch.nn.Linear`. There
    is no bias anywhere, and the output head is the embedding itself.
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
    table = (config.vocab_size, width)
    shapes = {"model.embed_tokens": table, "model.norm": (width,)}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def count_parameters(config: ModelConfig) -> int:
    """Count the numbers that the model learns: its tensors' sizes, added up."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def build(kind: Any, raw: Any, where: str = "") -> Any:
    """Make a `kind` of the mapping `raw`; the dotted `where` precedes its keys."""
    require(
        isinstance(raw, dict),
        where.rstrip(".") or "recipe",
        raw,
        "expected keys below it",
    )
    fields, values = {field.name: field for field in dataclasses.fields(kind)}, {}
    for key, value in raw.items():
        why = f"unknown; {suggest(key, fields)}"
        require(key in fields, f"{where}{key}", value, why)
        part = fields[key].type
        if part is ModelConfig:
            value = build_model(value, f"{where}{key}")
        elif dataclasses.is_dataclass(part):
            value = build(part, value, f"{where}{key}.")
        values[key] = value
    for key, field in fields.items():
        given = key in raw or field.default is not REQUIRED
        require(given, f"{where}{key}", None, "missing; give it a value")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


def build_model(raw: Any, where: str) -> ModelConfig:
    """Make the model of `{preset: NAME}` or of `{architecture: {...}}`."""
    one = isinstance(raw, dict) and len(raw) == 1
    why = "give either `preset: NAME` or `architecture:` with its keys"
    require(one and {*raw} <= {"preset", "architecture"}, where, raw, why)
    if "architecture" in raw:
        return build(ModelConfig, raw["architecture"], f"{where}.architecture.")
    name = raw["preset"]
    require(name in list(PRESETS), f"{where}.preset", name, suggest(name, PRESETS))
    return PRESETS[name]


BLOCK_ROWS, BLOCK_LIMIT = 64, 1024  # attention in blocks, on a CPU: rows, longest
LOSS_ROWS = {"cpu": 2048, "cuda": 8192}  # tokens whose logits exist at one time
FULL_TOKENS = {"cpu": 0, "cuda": 32_768}  # in a micro-batch: fewer idle the device


def memory_estimate(
    config: ModelConfig,
    micro_batch: int,
    seq_len: int,
    precision: str,
    *,
    device: str = "cpu",
    recompute: bool = False,
) -> dict[str, int]:
    """Estimate the bytes of one training step on "cpu" or "cuda", by part.

    Exact: 4 bytes per parameter for weights and for gradients, 8 for AdamW's two
    moments; half precision adds a 2-byte copy of the weights. An estimate: what the
    forward pass keeps for the backward pass, tensor by tensor, attention fused, or
    in blocks on a CPU. `recompute` keeps the inputs of the blocks alone. Not
    counted: workspaces, fragmentation, what the driver takes.
    """
    kinds = ("fp16", "bf16", "fp32")
    require(precision in kinds, "precision", precision, suggest(precision, kinds))
    tokens = micro_batch * seq_len
    require(tokens > 0, "micro_batch x seq_len", tokens, "must be above 0")
    size, inputs = (4, 2) if precision == "fp32" else (2, 5)
    parameters, vocab = count_parameters(config), config.vocab_size
    width, ffn = config.hidden_size, config.intermediate_size
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    block = 4 * (4 * width + heads + 2) + size * (
        inputs * width + 2 * (heads + shared) * config.head_dim + 4 * ffn
    )  # bytes for a token
    if device == "cpu" and seq_len <= BLOCK_LIMIT:
        mean_row = (seq_len + min(seq_len, BLOCK_ROWS)) // 2  # of the kept weights
        block += heads * (size * mean_row - 4)
    layers = config.num_hidden_layers
    kept = layers * 4 * width + block if recompute else layers * block
    rows = min(tokens, LOSS_ROWS[device])
    parts = {
        "weights": (4 if size == 4 else 6) * parameters,
        "gradients": 4 * parameters,
        "moments": 8 * parameters,
        "activations": tokens * (kept + 8 * width),
        "loss": 8 * rows * vocab + 4 * (vocab + tokens) * width,
    }
    return parts | {"total": sum(parts.values())}
