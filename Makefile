# Albor's commands. Every one of them does its own set-up: a virtual environment in
# .venv, made anew when the pins below or the project's requirements change.

PYTHON ?= python3
TORCH = 2.13.0
VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
ARGS ?=
MANIFEST ?= configs/corpus/v2.csv
WHEELS ?= wheelhouse
PYTHON_VERSION ?= 3.12
OUT ?= runs/gpu
STAGE ?= all

.DEFAULT_GOAL = help
.PHONY: help pretrain corpus bench test check notebooks adopt new book browse lab lock wheelhouse gpu-evidence clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

pretrain: $(READY) ## Train a model: the main job (ARGS="-p max_steps 50" for parameters)
	mkdir -p runs
	MATPLOTLIBRC=notebooks $(BIN)/papermill --log-output $(ARGS) \
		notebooks/pretrain.ipynb runs/pretrain.ipynb

corpus: $(READY) ## Fetch the pinned packages of a manifest (MANIFEST=... for another)
	$(BIN)/python -c "import sys; sys.tracebacklimit = 0; \
		from albor.manifest import fetch; fetch(sys.argv[1])" "$(MANIFEST)"

bench: $(READY) ## Time a training step beside its peers (ARGS="--help" for more)
	$(BIN)/python -m benchmarks.training $(ARGS)

test: $(READY) ## Run every test, and every cell of every notebook against its stored output
	$(BIN)/python -m pytest --nbval -n auto --dist loadfile \
		--cov=albor --cov-report=term tests notebooks

check: $(READY) ## Find what is stale or wrong: twins, modules, outputs, style, types
	@faults=0; \
	$(BIN)/python -m tools check || faults=1; \
	$(BIN)/ruff check . || faults=1; \
	$(BIN)/ruff format --check albor tools tests book/_ext conftest.py || faults=1; \
	$(BIN)/mypy albor tools book/_ext || faults=1; \
	exit $$faults

notebooks: $(READY) ## Export, execute what is stale, write the notebooks (NAME=... for one)
	$(BIN)/python -m tools notebooks $(NAME)

adopt: $(READY) ## Carry edits made in JupyterLab into the chapter's text (NAME=...)
	$(BIN)/python -m tools adopt "$(NAME)"

new: $(READY) ## Begin a chapter (NAME=... TITLE="..." and, if you like, AFTER=...)
	$(BIN)/python -m tools new "$(NAME)" "$(TITLE)" --after "$(AFTER)"

book: $(READY) ## Build the book, offline, warnings as errors, into _build/html
	rm -rf _build/html  # pages of chapters that are gone
	$(BIN)/jupyter-book build . -W -n --keep-going

browse: book ## Look at every page of the built book in a headless browser
	$(BIN)/python -m tools.browse

lab: $(READY) ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

lock: $(READY) ## Renew requirements.lock (torch is pinned here instead, with no hash)
	$(BIN)/python -m pip install --quiet uv
	echo "torch==$(TORCH)" | $(BIN)/uv pip compile --quiet --upgrade --universal \
		--python-version 3.11 --generate-hashes --no-header --no-annotate \
		--no-emit-package torch --extra run --extra dev pyproject.toml - \
		| awk '/^[a-z]/ { keep = !/^(nvidia-|cuda-)/ } keep' > requirements.lock

wheelhouse: $(READY) ## Collect what a node without a network lacks (PYTHON_VERSION=3.12)
	$(BIN)/python -m tools.wheelhouse --to "$(WHEELS)" --python $(PYTHON_VERSION) $(ARGS)

gpu-evidence: ## Measure on a bare node with a GPU, torch, no network (OUT=, STAGE=run,bench)
	$(PYTHON) -m benchmarks.gpu_evidence --out "$(OUT)" --stage "$(STAGE)" $(ARGS)

clean: ## Remove the environment and what was built (not your checkpoints and runs)
	rm -rf $(VENV) _build .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage

$(READY): requirements.lock pyproject.toml Makefile
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
		'Albor needs Python 3.11 or newer: make PYTHON=/path/to/python')"
	$(PYTHON) -m venv $(VENV)
# --no-deps: the lock is complete, and pip would take a newer release for an extra.
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(READY)
