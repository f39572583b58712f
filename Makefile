# make demo      install into .venv, train PETS on Pendulum-v1, evaluate, draw the curve
# make test      install what development needs, lint, type-check, run the fast tests
# make lint | format | faults | slow | learning | bench | accelerator | docs | clean
#
# PYTHON=/path/to/python3.12 chooses the Python, VENV=folder the environment,
# JOBS=4 the number of test processes.
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
JOBS ?= 2
comma := ,
RUN ?= runs/demo
BIN := $(VENV)/bin
export PYTHON

# uv is quicker where it is on PATH, but knows nothing of pip's configuration (mirrors,
# certificates): when it fails, pip tries.
define install
	@PYTHON=$(BIN)/python .ci/find-python >/dev/null
	@echo "installing $(1) into $(VENV) (a minute or two)"
	@if command -v uv >/dev/null 2>&1 && uv pip install -q --python $(BIN)/python -e '$(1)'; then :; \
	else $(BIN)/python -m pip install -qq --disable-pip-version-check -e '$(1)'; fi
	@touch $@
endef

.PHONY: help demo test lint format faults slow learning bench accelerator docs clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@chosen=$$(.ci/find-python) && echo "making $(VENV) with $$chosen" && "$$chosen" -m venv --clear $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(call install,.)

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(call install,.[dev$(comma)mujoco$(comma)label])

demo: $(VENV)/.installed
	$(BIN)/mbrl train pets --env Pendulum-v1 --steps 1000 --seed 0 --out $(RUN)
	$(BIN)/mbrl evaluate $(RUN) --episodes 20
	$(BIN)/mbrl report $(RUN) --out $(RUN)/curve.png

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -n $(JOBS)

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m fault -n $(JOBS)

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow -n $(JOBS)

learning: $(VENV)/.installed-dev
	XLA_FLAGS= $(BIN)/python -m pytest -m learning

bench: $(VENV)/.installed-dev
	$(BIN)/mbrl bench planning

# What a GPU or TPU is measured by; jax for it has to be installed, see the README.
accelerator: $(VENV)/.installed-dev
	$(BIN)/mbrl bench rlhf --repeats 10 --parts full reward --out runs/accelerator/rlhf.json

docs: $(VENV)/.installed
	$(BIN)/python scripts/benchmarks_page.py

# Runs are results, not build products: they stay.
clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
