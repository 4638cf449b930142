"""Build a corpus and its token shards, and write down how long each part took.

    python -m benchmarks.corpus configs/corpus/v2.csv --upsample 10 --fim-rate 0.5

Tokenizer and shards are made in a scratch folder: nothing is found ready. The
result lands in `benchmarks/results/corpus-NAME.json`. Peak memory is this
process's, in MB, up to the end of each part; it can only grow from one part to
the next.
"""

import argparse
import os
import platform
import resource
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from albor.artifacts import write_json
from albor.config import project_path
from albor.corpus import build_corpus
from albor.data import prepare
from albor.shards import TokenStream
from albor.tokenizer import Tokenizer

TOKENIZER_BYTES = 60_000_000  # as in the pretrain notebook


def main() -> None:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", nargs="?", default="", help="as in a recipe")
    parser.add_argument("--name", default="", help="of the result")
    parser.add_argument("--upsample", type=int, default=1)
    parser.add_argument("--fim-rate", type=float, default=0.0)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--val-bytes", type=int, default=8_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--near-copies", action="store_true")
    given = parser.parse_args()
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    began = time.monotonic()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = round(time.monotonic() - began, 1)
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks[name] = round(kilobytes / 1000)
        print(f"{name}: {seconds[name]} s, {peaks[name]} MB", flush=True)
        began = time.monotonic()

    amounts = {"val_bytes": given.val_bytes, "workers": given.workers}
    corpus = build_corpus(given.corpus, **amounts, near_copies=given.near_copies)
    lap("corpus")
    every = -(-sum(one.size for one in corpus.train) // TOKENIZER_BYTES)
    texts = (one.text for one in corpus.train[::every])
    tokenizer = Tokenizer.train(texts)
    lap("tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        how = {"upsample": given.upsample, "fim_rate": given.fim_rate}
        how |= {"row_tokens": given.row_tokens, "workers": given.workers}
        made = prepare(corpus, tokenizer, folder, **how)
        lap("shards")
        streams = {part: TokenStream.open(made, part) for part in ("train", "val")}
        splits = streams["train"].meta["splits"]
        size = sum(file.stat().st_size for file in made.iterdir())
    tokens = sum(map(len, streams.values()))
    made_in = seconds["corpus"] + seconds["shards"]
    git = ["git", "-C", str(project_path(".")), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    text_bytes = {part: v["bytes"] for part, v in corpus.report["splits"].items()}
    result: dict[str, Any] = {
        "about": {
            "hardware": f"{platform.machine()}, {given.workers} processes",
            "load": os.getloadavg(),  # of 1, 5 and 15 minutes, this run's too
            "versions": {x: version(x) for x in ("tokenizers", "numpy", "joblib")},
            "python": platform.python_version(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit,
        },
        "settings": vars(given),
        "seconds": seconds,
        "tokens_per_second": round(tokens / made_in),
        "peak_megabytes": peaks,
        "bytes": text_bytes,
        "disk_bytes": size,
        "splits": {
            part: {k: v for k, v in one.items() if k != "shards"}
            for part, one in splits.items()
        },
        "shards": {part: len(one["shards"]) for part, one in splits.items()},
        "rows": len(streams["train"]) // given.row_tokens,
        "dropped": {
            why: [one["files"], one["bytes"]]
            for why, one in corpus.report["dropped"].items()
        },
        "near_copies": corpus.report["near_copies"],
        "packages": corpus.report["packages"],
        "digests": {"corpus": corpus.digest, "tokenizer": tokenizer.digest},
    }
    name = given.name or Path(given.corpus).stem or "this-python"
    write_json(project_path(f"benchmarks/results/corpus-{name}.json"), result)
    print(f"{tokens:,} tokens, {result['tokens_per_second']:,} a second, ", end="")
    print(f"{result['rows']:,} rows")


if __name__ == "__main__":
    main()
