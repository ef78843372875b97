# `make install` builds .venv from nothing but Python 3.11+; every other target does so first where it is missing.
#
#   make demo     train a tiny model in two stages and ask which rows made it say what it says
#   make test     run the tests
#   make lint     check style (make format puts it right)
#   make bench    reproduce the figures of the README
#   make docs     build the documentation into build/docs
#
# Variables: PYTHON=python3.12 picks the interpreter that makes .venv; PIP_ARGS is added to every pip install, for
# example PIP_ARGS="--index-url URL" to take torch's CPU build from an index of your choice; ARGS is passed on to
# pytest, the demo or the benchmarks (make test ARGS="-k record -x"); JOBS=0 runs the tests in one process.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
JOBS ?= auto
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)

# The models here are tiny: a second thread gains nothing on a free machine and costs much on a busy one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test lint format bench docs clean

install: $(STAMP)

# torch goes first and pinned: left to the resolver it may bring a newer build with gigabytes of GPU libraries.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[demo,test]"
	touch $@

demo: $(STAMP)
	$(VENV)/bin/hf-source demo $(ARGS)

test: $(STAMP)
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	set -e; for script in benchmarks/bench_*.py; do $(PY) $$script $(ARGS); done

docs: $(STAMP)
	$(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
