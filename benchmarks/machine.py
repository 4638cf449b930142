"""What must be known of a machine to read the figures that were measured on it."""

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "tokenizers", "transformers", "papermill")


def versions() -> dict[str, str | None]:
    """Version of each package; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def source_digest() -> str:
    """SHA-256 of the program, for a copy of the project that has no git."""
    files = [*ROOT.glob("albor/*.py"), *ROOT.glob("benchmarks/*.py")]
    files += ROOT.glob("notebooks/*.ipynb")
    return hashlib.sha256(
        b"".join(file.name.encode() + file.read_bytes() for file in sorted(files))
    ).hexdigest()


def commit() -> str | None:
    """The commit of the checkout, where git knows it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "")


def gpu(device: torch.device) -> dict[str, Any] | None:
    """Name, memory and software of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout
    except OSError:
        driver = ""
    return {
        "name": about.name,
        "bytes": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "capability": [about.major, about.minor],
        "driver": driver.strip().split("\n")[0] or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def about(device: torch.device) -> dict[str, Any]:
    """The head of a results file. On a CPU it is a rehearsal, and says so."""
    return {
        "device": str(device),
        "rehearsal": device.type != "cuda",
        "gpu": gpu(device),
        "cpu": processor(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "source": source_digest(),
    }
