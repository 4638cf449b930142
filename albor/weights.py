# Generated from book/weights.md: edit the chapter, not this file.
"""Weights in Hugging Face's Llama layout: what others can load, and what we can.

Notable:
- the names and shapes of the parameters are Llama's, so nothing is converted
- the head is the embedding: it is one tensor in the model and one in the file
- a file is held to its names, shapes, types, checksum and finite values before use
- a configuration key that would change the computation is refused, never skipped
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from albor import artifacts
from albor.model import Albor
from albor.shapes import ConfigError, ModelConfig, parameter_shapes
from albor.tokenizer import BOS, EOS, PAD, Tokenizer

__all__ = [
    "COMPUTES",
    "HARMLESS",
    "CheckpointError",
    "data_sha256",
    "disk_errors",
    "hf_config",
    "load_model",
    "opened",
    "read_config",
    "read_tensors",
    "refuse_nonfinite",
    "save_model",
    "write_sealed",
]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that must not be used as it is."""


@contextlib.contextmanager
def disk_errors(folder: Path, needed: int) -> Iterator[None]:
    """Make `folder`; refuse if `needed` bytes are not free; name both in errors."""
    known = "free space is unknown"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        known = f"{free:,} are free"
        if free < needed:
            raise OSError("not enough space")
        yield
    except (OSError, SafetensorError, artifacts.ArtifactError) as error:
        raise CheckpointError(
            f"cannot write {folder}: {error}. {needed:,} bytes are needed, {known}:"
            " make room, make the folder writable, or give another one"
        ) from error


def refuse_nonfinite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Name the first tensor with a NaN or an infinity; a GPU is asked once."""
    counts = {name: (~torch.isfinite(t)).sum() for name, t in tensors.items()}
    for device in {count.device for count in counts.values()}:
        there = [name for name, count in counts.items() if count.device == device]
        found = torch.stack([counts[name] for name in there]).tolist()
        for name, bad in zip(there, found, strict=True):
            if bad:
                raise CheckpointError(
                    f"{where}: {bad} of {tensors[name].numel()} values of {name} "
                    "are not finite; go back to an earlier checkpoint"
                )


# What this model computes, in the words of Llama's configuration. The first value
# is also what an absent key means there.
COMPUTES: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
}
HARMLESS = {  # keys that change no logit
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
    *("torch_dtype", "use_cache", "transformers_version", "_name_or_path"),
    *("pretraining_tp", "is_llama_config"),
}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` for `transformers` 4 and 5: a Llama with tied embeddings."""
    return {
        **dataclasses.asdict(config),
        **{key: values[0] for key, values in COMPUTES.items()},
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "rope_scaling": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
        },
        **{"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
        **{"dtype": "float32", "torch_dtype": "float32", "use_cache": True},
    }


def read_config(path: Path) -> tuple[ModelConfig, bool]:
    """Read a Llama `config.json`: the shape, and whether the head is tied.

    Each key that would change what is computed is refused, and each unknown one
    that is not empty: passed over, either could give other logits in silence.
    """
    # What an absent key means to Llama, where it means something else to us.
    values: dict[str, Any] = dict(max_position_embeddings=2048, rms_norm_eps=1e-6)
    try:
        raw = artifacts.read_json(path)
        values |= {key: value for key, value in raw.items() if value is not None}
        for key, allowed in COMPUTES.items():
            if (value := values.pop(key, allowed[0])) not in allowed:
                raise ConfigError(f"{key} = {value!r}: here it is {allowed[0]!r}")
        tied = bool(values.pop("tie_word_embeddings", False))
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        ropes = [values.pop(f"rope_{key}", {}) for key in ("parameters", "scaling")]
        theta = values.setdefault("rope_theta", ropes[0].get("rope_theta", 10000.0))
        plain = {"rope_type": "default", "type": "default", "rope_theta": theta}
        for key, value in [item for rope in ropes for item in rope.items()]:
            if plain.get(key) != value:
                why = f"in the rotary embedding; here it is {plain.get(key)!r}"
                raise ConfigError(f"{key} = {value!r} {why}")
        fields = {field.name for field in dataclasses.fields(ModelConfig)}
        for key in [key for key in values if key not in fields]:
            if (value := values.pop(key)) and key not in HARMLESS:
                why = "unknown; remove it if no logit depends on it"
                raise ConfigError(f"{key} = {value!r}: {why}")
        return ModelConfig(**values), tied
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def data_sha256(path: Path) -> str:
    """SHA-256 of a safetensors file's data, that is of all after its header."""
    with open(path, "rb") as file:
        file.seek(int.from_bytes(file.read(8), "little") + 8)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file whose header records the SHA-256 of its data.

    The library writes metadata in random order, and equal weights must give equal
    bytes: the header is laid out again in a fixed order, at its length.
    """
    save_file(tensors, path, {"format": "pt", "sha256": "0" * 64})
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = {"format": "pt", "sha256": data_sha256(path)}
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(length))


def save_model(
    folder: str | Path, model: Albor, tokenizer: Tokenizer | None = None
) -> None:
    """Write `model.safetensors` and `config.json` (and the tokenizer's files).

    Float32, Hugging Face's names, no `lm_head`: it is the embedding. Each file is
    replaced atomically; equal weights give equal bytes.
    """
    folder, limit = Path(folder), model.config.vocab_size
    weights = {
        name: p.detach().to("cpu", torch.float32).contiguous()
        for name, p in model.named_parameters()
    }
    refuse_nonfinite(weights, folder)
    if tokenizer is not None and tokenizer.vocab_size > limit:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model {limit}; "
            "save the tokenizer that it was trained with"
        )
    with disk_errors(folder, sum(256 + t.nbytes for t in weights.values())):
        artifacts.write_json(folder / "config.json", hf_config(model.config))
        with artifacts.atomic_path(folder / "model.safetensors") as temporary:
            write_sealed(weights, temporary)
        if tokenizer is not None:
            tokenizer.save(folder)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; one that is missing, cut off or not one is named."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: no whole safetensors file: {error}; it is read as one file, "
            "never in shards, and never as a pickle"
        ) from error


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: tuple[str, ...]
) -> dict[str, Tensor]:
    """Read a file that must hold the tensors of `shapes` and no others.

    The values stay on the disk, mapped, until they are used: copy what is to live.
    """
    with opened(path) as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        wrong = [f"{name} is missing" for name in shapes if name not in found]
        wrong += [f"{name} is unknown" for name in found if name not in shapes]
        for name in (name for name in shapes if name in found):
            shape, dtype = tuple(found[name].get_shape()), found[name].get_dtype()
            if shape != tuple(shapes[name]) or dtype not in dtypes:
                want = f"{tuple(shapes[name])} in {' or '.join(dtypes)}"
                wrong.append(f"{name}: expected {want}, got {shape} in {dtype}")
        if not wrong:
            return {name: file.get_tensor(name) for name in shapes}
    more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
    raise CheckpointError(f"{path} does not fit: {'; '.join(wrong[:6])}{more}")


def load_model(folder: str | Path) -> Albor:
    """Build the model that a folder in Hugging Face's Llama layout describes.

    The head must be tied: no `lm_head.weight`, or one equal to the embedding. Half
    precision becomes float32. Whatever does not fit is refused by name.
    """
    path = Path(folder) / "model.safetensors"
    config, tied = read_config(path.with_name("config.json"))
    shapes, embedding = parameter_shapes(config), "model.embed_tokens.weight"
    with opened(path) as file:
        recorded = (file.metadata() or {}).get("sha256")
        if not tied or "lm_head.weight" in file.keys():  # noqa: SIM118
            shapes["lm_head.weight"] = shapes[embedding]
    weights = read_tensors(path, shapes, ("F32", "F16", "BF16"))
    if recorded not in (None, data_sha256(path)):
        raise CheckpointError(
            f"{path}: the data do not have the SHA-256 that the header records; "
            "restore the file from a copy"
        )
    refuse_nonfinite(weights, path)
    head = weights.get("lm_head.weight", weights[embedding])
    if not torch.equal(head, weights[embedding]):
        raise CheckpointError(
            f"{path}: lm_head.weight is not the embedding; this model ties the two"
        )
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        model = Albor(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model
