# Generated from book/provenance.md: edit the chapter, not this file.
"""Provenance: a record of every file and shard, and its verification.

Notable:
- Each file has a row: distribution, version, licence, path, SHA-256, bytes, tokens,
  tier and split. Each shard has its hashes.
- Every digest in the record can be recomputed from the record's own rows with a
  JSON library and SHA-256; nothing of this package is needed for it.
- `verify` compares the record with itself, and with texts, tokenizer and shards
  where they are at hand. It stops at the first difference and names it.
"""

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from albor import __version__
from albor.artifacts import digest, read_json, sha256_file
from albor.corpus import Corpus
from albor.tokenizer import Tokenizer

__all__ = ["FORMAT", "ProvenanceError", "by_distribution", "record", "verify"]


FORMAT = 1  # of the record


class ProvenanceError(ValueError):
    """A record differs from what it speaks of; the text names the first case."""


def _shards(folder: Path) -> list[dict[str, Any]]:
    """The shards of a prepared folder, with their hashes, training first."""
    splits = read_json(folder / "meta.json")["splits"]
    return [{"split": x, **one} for x in splits for one in splits[x]["shards"]]


def _content(files: list[dict[str, Any]]) -> list[list[Any]]:
    """What the corpus digest is the digest of, from the rows of the record."""
    keys = ("split", "package", "path", "sha256", "tier")
    return [[row[key] for key in keys] for row in files]


def record(
    corpus: Corpus, tokenizer: Tokenizer, folder: str | Path
) -> dict[str, Any]:
    """All there is to know of a corpus, its tokenizer and its folder of shards.

    `files` is in the corpus's order, training first. A file's `tokens` are those of
    its first copy in the shards, without `</s>` and signs of infilling; `copies`
    says how often it stands there. `digest` is that of everything else.
    """
    folder = Path(folder)
    tokens: dict[tuple[str, str], int] = {}
    copies: Counter[tuple[str, str]] = Counter()
    shards = _shards(folder)
    for shard in shards:
        sidecar = read_json(folder / f"{shard['name']}.json")
        for path, copy, count in sidecar["documents"]:
            copies[shard["split"], path] += 1
            if copy == 0:
                tokens[shard["split"], path] = count
    owners = corpus.report["licences"]
    unknown = {"version": "", "licence": "not stated"}
    files: list[dict[str, Any]] = []
    for split, documents in (("train", corpus.train), ("val", corpus.val)):
        for one in documents:
            place, owner = (split, one.path), owners.get(one.distribution, unknown)
            row: dict[str, Any] = {"split": split, "package": one.package}
            row |= {"path": one.path, "sha256": one.sha256, "bytes": one.size}
            row |= {"distribution": one.distribution, **owner, "tier": one.tier}
            files.append(row | {"tokens": tokens[place], "copies": copies[place]})
    tools = {name: version(name) for name in ("tokenizers", "numpy", "joblib")}
    tools |= {"albor": __version__, "python": platform.python_version()}
    vocabulary = tokenizer.vocab_size
    inputs = read_json(folder / "meta.json")["inputs"]
    content = {
        "format": FORMAT,
        "corpus": {"digest": corpus.digest, "report": corpus.report},
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": vocabulary},
        "data": {"folder": folder.name, **inputs},
        "files": files,
        "shards": shards,
        "tools": tools,
    }
    return {**content, "digest": digest(content)}


def by_distribution(made: dict[str, Any]) -> list[dict[str, Any]]:
    """The record's files summed by distribution and split, the largest first."""
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for row in made["files"]:
        name = row["distribution"] or row["package"]
        key = name, row["split"]
        about = {what: row[what] for what in ("split", "version", "licence")}
        zero = {"files": 0, "bytes": 0, "tokens": 0, "tier_1": 0}
        one = sums.setdefault(key, {"distribution": name, **about, **zero})
        one["files"] += 1
        one["bytes"] += row["bytes"]
        one["tokens"] += row["tokens"]
        one["tier_1"] += row["tier"] == 1
    largest = sorted(sums.values(), key=lambda one: one["distribution"])
    return sorted(largest, key=lambda one: -one["tokens"])


def _expect(what: str, recorded: object, found: object) -> None:
    """Raise where something differs from the record."""
    if recorded != found:
        raise ProvenanceError(f"{what}: recorded {recorded}, found {found}")


def _verify_corpus(files: list[dict[str, Any]], corpus: Corpus) -> None:
    """Hold the record's files to a corpus built again."""
    found = {("train", one.path): one for one in corpus.train}
    found |= {("val", one.path): one for one in corpus.val}
    for row in files:
        one = found.pop((row["split"], row["path"]), None)
        what = f"{row['path']} ({row['split']})"
        if one is None:
            raise ProvenanceError(f"{what}: recorded, and not in the corpus now")
        _expect(f"{what}, SHA-256", row["sha256"], one.sha256)
        _expect(f"{what}, bytes", row["bytes"], one.size)
        _expect(f"{what}, tier", row["tier"], one.tier)
        _expect(f"{what}, distribution", row["distribution"], one.distribution)
    for split, path in found:
        raise ProvenanceError(f"{path} ({split}): in the corpus now, not recorded")


def _verify_data(made: dict[str, Any], folder: Path) -> None:
    """Hold the record to a folder of shards, every file hashed again."""
    inputs = {key: made["data"][key] for key in made["data"] if key != "folder"}
    _expect("name of the data folder", digest(inputs)[:16], folder.resolve().name)
    for link in ("corpus", "tokenizer"):
        _expect(f"{link} of the shards", made[link]["digest"], inputs[link])
    for shard in made["shards"]:
        for suffix, recorded in shard["sha256"].items():
            file = folder / f"{shard['name']}.{suffix}"
            found = sha256_file(file) if file.is_file() else "no file"
            _expect(f"{file.name}, SHA-256", recorded, found)


def verify(
    made: dict[str, Any] | str | Path,
    *,
    corpus: Corpus | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    data: str | Path | None = None,
) -> dict[str, int]:
    """Compute everything again; ProvenanceError at the first difference.

    `made` is a record, or a file that holds one: by itself, or a run's
    `provenance.json`. `corpus`, `tokenizer` and `data` (the folder of shards) are
    compared where they are given. Returns how many files and shards were compared.
    """
    found = made if isinstance(made, dict) else read_json(made)
    try:
        made = dict(found["corpus"].get("record", found))
        content = {key: made[key] for key in made if key != "digest"}
        _expect("format", FORMAT, made["format"])
        _expect("digest of the record", made["digest"], digest(content))
        rows = digest(_content(made["files"]))
        _expect("digest of the corpus", made["corpus"]["digest"], rows)
        if tokenizer is not None:
            if not isinstance(tokenizer, Tokenizer):
                tokenizer = Tokenizer.load(tokenizer)
            _expect("tokenizer", made["tokenizer"]["digest"], tokenizer.digest)
        if corpus is not None:
            _verify_corpus(made["files"], corpus)
        if data is not None:
            _verify_data(made, Path(data))
    except (AttributeError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ProvenanceError(f"this is no provenance record ({why})") from None
    compared = {"files": len(made["files"]) if corpus is not None else 0}
    return compared | {"shards": len(made["shards"]) if data is not None else 0}
