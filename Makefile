# Everything needs only Python (3.10 or newer) and make: the environment is built on first use, in .venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_SECONDS ?= 2
BENCH_DEVICE ?= cpu
BENCH_FOLDER ?= benchmarks/results$(if $(filter-out cpu,$(BENCH_DEVICE)),/$(BENCH_DEVICE))

BIN := $(VENV)/bin
TEST_STAMP := $(VENV)/.installed-test
DEV_STAMP := $(VENV)/.installed-dev
PEERS_STAMP := $(VENV)/.installed-peers
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu bench lint types build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A stamp is touched after a complete installation, so that an interrupted one is taken up again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "needed Python >= 3.10, got $$($(PYTHON) --version 2>&1); call make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TEST_STAMP): $(PINS) | $(BIN)/python
	@echo "installing into $(VENV): some minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps sweeps
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps wandb-workspaces \
		|| echo "no wandb-workspaces: the tests of W&B reports will be skipped"
	@touch $@

$(DEV_STAMP): $(PINS) | $(TEST_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(PEERS_STAMP): $(PINS) | $(TEST_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[peers]" || \
		echo "the peers could not be installed: measuring without them"
	@touch $@

demo: $(TEST_STAMP) ## train a VAE (options: make demo DEMO_ARGS="--model.layer disarm")
	$(BIN)/stochastic-layers fit $(DEMO_ARGS)

test: $(TEST_STAMP) ## run the quick tests and the doctests
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(TEST_STAMP) ## run the slow tests and those on several processes
	$(BIN)/python -m pytest -m "(slow or ddp) and not gpu" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(TEST_STAMP) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench: $(PEERS_STAMP) ## measure in a short form, against the peers that can be installed, and draw the page of results
	for name in layers bandwidth estimators variance scaling memory training; do \
		$(BIN)/python -m benchmarks.$$name --seconds $(BENCH_SECONDS) --device $(BENCH_DEVICE) \
			--folder $(BENCH_FOLDER) || exit 1; done
	$(BIN)/python -m benchmarks.render --folder $(BENCH_FOLDER)

lint: $(DEV_STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP) ## check types
	$(BIN)/mypy

build: $(TEST_STAMP) ## build the sdist and the wheel into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
