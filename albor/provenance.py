# Generated from book/provenance.md: edit the chapter, not this file.
"""Provenance: a record of every file and shard, and its verification.

Notable:
- Each file has a row: distribution, version, licence, path, SHA-256, bytes, tokens,
  tier and split. Each shard has its hashes.
- Every digest in the record can be recomputed from the record's own rows with a
  JSON library and SHA-256; nothing of this package is needed for it.
- `verify` compares the record with itself, and with texts, tokenizer and shards
  where they are at hand. It stops at the first difference and names it.
- A record is returned only if it verifies: of a corpus, a tokenizer and shards that
  do not belong together there is none.
"""

import contextlib
import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from albor import __version__
from albor.artifacts import digest, read_json, sha256_file
from albor.corpus import Corpus
from albor.shards import TokenStream
from albor.tokenizer import Tokenizer

__all__ = [
    "FORMAT",
    "UNKNOWN",
    "Counts",
    "ProvenanceError",
    "by_distribution",
    "record",
    "verify",
]


class ProvenanceError(ValueError):
    """A record differs from what it speaks of; the text names the first case."""


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever goes wrong inside says that this is no such thing, and why."""
    try:
        yield
    except (OSError, ValueError) as error:  # these name the file and the place
        raise ProvenanceError(str(error)) from None
    except (AttributeError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ProvenanceError(f"this is no {what} ({why})") from None


def _compare(what: str, recorded: Any, found: Any) -> None:
    """Raise at the first place where two JSON values differ."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in sorted(recorded.keys() | found.keys()):
            pair = recorded.get(key, "nothing"), found.get(key, "nothing")
            _compare(f"{what}, {key}" if what else key, *pair)
    elif isinstance(recorded, list) and isinstance(found, list):
        pairs = zip_longest(recorded, found, fillvalue="nothing")
        for number, pair in enumerate(pairs):
            _compare(f"{what}, {number}", *pair)
    elif type(recorded) is not type(found) or recorded != found:
        raise ProvenanceError(f"{what}: recorded {recorded}, found {found}")


Counts = dict[str, dict[str, int]]  # "PATH (SPLIT)" -> tokens and copies


def _read_shard(folder: Path, name: str, hashes: dict[str, str]) -> dict[str, Any]:
    """The record beside a shard, if its three files have these hashes."""
    for suffix in ("bin", "idx", "json"):
        file = folder / f"{name}.{suffix}"
        found = sha256_file(file) if file.is_file() else "no file"
        _compare(f"{file.name}, SHA-256", hashes.get(suffix), found)
    sidecar = read_json(folder / f"{name}.json")
    own = sidecar.pop("digest")
    _compare(f"{name}.json, digest", own, digest(sidecar))
    _compare(f"{name}.json, folder", sidecar["data"], folder.name)
    sidecar["sha256"]["json"] = hashes["json"]
    _compare(f"{name}.json, sha256", sidecar["sha256"], hashes)
    return sidecar


def _read_folder(folder: Path) -> tuple[dict[str, Any], list[Any], Counts]:
    """A folder's meta.json, shards, and counts of its documents, all checked."""
    for split in ("train", "val"):
        meta = TokenStream.open(folder, split).meta  # sizes, format, folder's name
    names, counts = {"meta.json"}, Counts()
    splits: dict[str, Any] = {}
    for split, told in meta["splits"].items():
        shards, total = [], Counter[str]()
        for number, shard in enumerate(told["shards"]):
            name = f"{split}-{number:05}"
            sidecar = _read_shard(folder, name, shard["sha256"])
            names |= {f"{name}.{suffix}" for suffix in ("bin", "idx", "json")}
            for path, copy, tokens in sidecar["documents"]:
                none = {"tokens": 0, "copies": 0}
                one = counts.setdefault(f"{path} ({split})", none)
                one["copies"] += 1
                one["tokens"] += tokens if copy == 0 else 0
            sidecar |= {"name": name, "documents": len(sidecar["documents"])}
            shards.append({key: sidecar.get(key) for key in shard})
            sums = {key: sidecar.get(key, 0) for key in told if key != "shards"}
            total.update(sums)
        splits[split] = {**total, "shards": shards}
    _compare("meta.json, splits", meta["splits"], splits)
    for odd in sorted(x.name for x in folder.iterdir() if x.name not in names):
        if not odd.startswith("."):
            raise ProvenanceError(f"{odd}: in the data folder, and in no record")
    both = [{"split": x, **y} for x in sorted(splits) for y in splits[x]["shards"]]
    return meta, both, counts


FORMAT = 2  # of the record
UNKNOWN = {"version": "", "licence": "not stated"}  # of files without an owner


def _label(row: dict[str, Any]) -> str:
    """How errors call a file."""
    return f"{row['path']} ({row['split']})"


def _rows(corpus: Corpus) -> list[dict[str, Any]]:
    """A row for every document, training first: all but what shards know."""
    rows: list[dict[str, Any]] = []
    for split, documents in (("train", corpus.train), ("val", corpus.val)):
        for one in documents:
            row: dict[str, Any] = {"split": split, "package": one.package}
            row |= {"path": one.path, "sha256": one.sha256, "bytes": one.size}
            row |= {"distribution": one.distribution, "tier": one.tier}
            owner = corpus.report["licences"].get(one.distribution, UNKNOWN)
            rows.append(row | owner)
    return rows


def record(
    corpus: Corpus, tokenizer: Tokenizer, folder: str | Path
) -> dict[str, Any]:
    """All there is to know of a corpus, its tokenizer and its folder of shards.

    `files` is in the corpus's order, training first. A file's `tokens` are those of
    its first copy in the shards, without `</s>` and signs of infilling; `copies`
    says how often it stands there. `digest` is that of everything else.
    ProvenanceError if the three do not belong together, or have changed since.
    """
    folder = Path(folder).resolve()
    with _refused("folder of shards"):
        meta, shards, counts = _read_folder(folder)
    none = {"tokens": 0, "copies": 0}
    files = _rows(corpus)
    for row in files:
        row |= counts.get(_label(row), none)
    tools = {name: version(name) for name in ("tokenizers", "numpy", "joblib")}
    tools |= {"albor": __version__, "python": platform.python_version()}
    about = {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    content = {
        "format": FORMAT,
        "corpus": {"digest": corpus.digest, "report": corpus.report},
        "tokenizer": about,
        "data": {
            "folder": folder.name,
            "inputs": meta["inputs"],
            "meta.json": sha256_file(folder / "meta.json"),
        },
        "files": files,
        "shards": shards,
        "tools": tools,
    }
    made = {**content, "digest": digest(content)}
    verify(made, corpus=corpus, tokenizer=tokenizer, data=folder)
    return made


def _verify_itself(made: dict[str, Any]) -> None:
    """Hold the parts of a record to each other."""
    content = {key: made[key] for key in made if key != "digest"}
    _compare("format", FORMAT, made["format"])
    _compare("digest of the record", made["digest"], digest(content))
    corpus, inputs, files = made["corpus"], made["data"]["inputs"], made["files"]
    keys = ("split", "package", "path", "sha256", "tier")
    rows = [[row[key] for key in keys] for row in files]
    _compare("digest of the corpus", corpus["digest"], digest(rows))
    _compare("name of the data folder", made["data"]["folder"], digest(inputs)[:16])
    _compare("corpus of the shards", inputs["corpus"], corpus["digest"])
    for key, name in (("digest", "tokenizer"), ("vocab_size", "vocab_size")):
        _compare(f"{name} of the shards", inputs[name], made["tokenizer"][key])
    for row in files:
        often = row["split"] == "train" and row["tier"] == 1
        owner = corpus["report"]["licences"].get(row["distribution"], UNKNOWN)
        expected = {**owner, "copies": inputs["upsample"] if often else 1}
        _compare(_label(row), {key: row[key] for key in expected}, expected)
    for split, told in corpus["report"]["splits"].items():
        some = [row for row in files if row["split"] == split]
        packages = len({row["package"] for row in some})
        found = {"files": len(some), "bytes": sum(row["bytes"] for row in some)}
        _compare(f"report, {split}", told, found | {"packages": packages})
        shards = [shard for shard in made["shards"] if shard["split"] == split]
        listed = sum(shard["documents"] for shard in shards)
        copies = sum(row["copies"] for row in some)
        _compare(f"documents in the shards of {split}", listed, copies)


def _verify_corpus(made: dict[str, Any], corpus: Corpus) -> None:
    """Hold a record to a corpus, whose texts are all read again."""
    rows = {_label(row): row for row in _rows(corpus)}
    from_shards = ("tokens", "copies")
    for row in made["files"]:
        found = rows.pop(_label(row), None)
        if found is None:
            raise ProvenanceError(
                f"{_label(row)}: recorded, and not in the corpus now"
            )
        own = {key: row[key] for key in row if key not in from_shards}
        _compare(_label(row), own, found)
    for label in rows:
        raise ProvenanceError(f"{label}: in the corpus now, not recorded")
    reports = [
        {key: one[key] for key in one if key != "spec"}
        for one in (made["corpus"]["report"], corpus.report)
    ]
    _compare("report", *reports)
    for document in corpus.train + corpus.val:
        _ = document.text  # CorpusError if it is another by now


def _verify_data(made: dict[str, Any], folder: Path) -> None:
    """Hold a record to a folder of shards, every file hashed again."""
    meta, shards, counts = _read_folder(folder)
    _compare("name of the data folder", made["data"]["folder"], folder.name)
    _compare("data, inputs", made["data"]["inputs"], meta["inputs"])
    _compare("shards", made["shards"], shards)
    rows = {
        _label(row): {"tokens": row["tokens"], "copies": row["copies"]}
        for row in made["files"]
    }
    _compare("", rows, counts)
    found = sha256_file(folder / "meta.json")
    _compare("meta.json, SHA-256", made["data"]["meta.json"], found)


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
    with _refused("provenance record"):
        outer = made if isinstance(made, dict) else read_json(made)
        made = dict(outer["corpus"].get("record", outer))
        _verify_itself(made)
        if "record" in outer["corpus"]:  # of a run, which says some things again
            run = {"corpus": {**made["corpus"], "record": made}}
            run["data"] = made["data"]["folder"]
            run["tokenizer"] = made["tokenizer"]["digest"]
            _compare("run", {key: outer[key] for key in run}, run)
        if tokenizer is not None:
            if not isinstance(tokenizer, Tokenizer):
                tokenizer = Tokenizer.load(tokenizer)
            about = {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
            _compare("tokenizer", made["tokenizer"], about)
        if corpus is not None:
            _verify_corpus(made, corpus)
        if data is not None:
            _verify_data(made, Path(data).resolve())
    compared = {"files": len(made["files"]) if corpus is not None else 0}
    return compared | {"shards": len(made["shards"]) if data is not None else 0}


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
    return sorted(sums.values(), key=lambda x: (-x["tokens"], x["distribution"]))
