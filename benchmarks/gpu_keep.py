"""Put what a node measured where the book reads it.

    python -m benchmarks.gpu_keep runs/gpu

Files are copied to `benchmarks/results` as they came. Each result of the bench also
gets the name that `make bench` would have given it, for the chapter on speed. A
rehearsal is refused: it measured a CPU.
"""

import argparse
import shutil
import sys
from pathlib import Path

from albor.artifacts import read_json, write_json
from benchmarks.machine import ROOT


def keep(source: Path, results: Path) -> list[str]:
    """Copy `gpu-*` from one folder to the other; the names of what was written."""
    files = sorted(path for path in source.glob("gpu-*") if path.is_file())
    records = {path: read_json(path) for path in files if path.suffix == ".json"}
    if not records:
        raise SystemExit(
            f"{source}: no gpu-*.json there; `make gpu-evidence` writes it"
        )
    for path, record in records.items():
        if record["rehearsal"] or not record["gpu"]:
            raise SystemExit(
                f"{path.name}: a rehearsal on a CPU, no evidence of a GPU"
            )
    for path in files:
        shutil.copy(path, results / path.name)
    names = [path.name for path in files]
    bench = next((r for path, r in records.items() if path.stem == "gpu-bench"), {})
    for one in bench.get("benches", {}).values():
        if result := one.get("result"):
            kind = "-ablation" if result["kind"] == "ablation" else ""
            names.append(f"training-{result['preset']}-cuda{kind}.json")
            write_json(results / names[-1], result)
    return names


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, copy, print the names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder that came back")
    results = ROOT / "benchmarks/results"
    parser.add_argument(
        "--to", type=Path, default=results, help="folder to copy to"
    )
    given = parser.parse_args(arguments)
    print(*keep(given.source, given.to), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
