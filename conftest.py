"""What every test and every notebook cell runs under, with no flag to remember."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent

# Notebook kernels inherit this: "auto" means the CPU recipe, also where a GPU is,
# and some steps of it: `make pretrain` and `make notebooks` run the whole.
os.environ["ALBOR_TEST"] = "short"
# The package under test is the one beside this file, wherever another is installed.
PATHS = [str(ROOT), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in PATHS if path)
# A backend set for scripts would keep the figures out of the notebooks' outputs.
os.environ.pop("MPLBACKEND", None)

# Workers side by side (`make test`) share the cores. More threads than cores do not
# slow PyTorch a little: they wait for each other at the end of every operation.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    share = max(1, (os.cpu_count() or 1) // WORKERS)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

# A busy machine is slow, not wrong.
settings.register_profile("albor", deadline=None)
settings.load_profile("albor")


def pytest_configure(config: pytest.Config) -> None:
    """Set nbval's options, so that plain `pytest --nbval` is the whole command."""
    if hasattr(config.option, "nbval"):
        config.option.nbval_current_env = True
        if config.option.nbval_sanitize_with is None:
            config.option.nbval_sanitize_with = str(ROOT / "tests" / "sanitize.cfg")
        # nbval would measure coverage inside its kernels as well. A chapter runs
        # its own cells, not its module, so only what tests/ reach counts.
        config.option.cov_source = None
