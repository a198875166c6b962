# make help lists what there is to make. Every target sets up what it needs by itself.

# The first Python that fairchem-core 1.10 runs on.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
VENV ?= .venv
DECLARED ?= .venv-declared
RUN = $(VENV)/bin
# Test files side by side: one file's fixtures (a small teacher, say) are made once.
PARALLEL = --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

SETUP = setup.cfg pyproject.toml requirements/install.sh requirements/overrides.txt \
	compat/pyproject.toml compat/fairchem_kd_compat.pth \
	$(shell find compat/src -name '*.py')

.PHONY: help setup test fuzz train demo docs lint test-declared clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.done ## set up .venv; `. .venv/bin/activate` then gives fairchem and fairchem-kd

test: $(VENV)/.done ## run every test
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest $(PARALLEL)

FUZZ ?= 20000
fuzz: $(VENV)/.done ## try FUZZ=20000 mutated checkpoints, configs and data files (FUZZ_SEED=1 for others)
	FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(RUN)/python -m pytest -q -k whatever_stands \
		tests/models tests/stock tests/data tests/store tests/sweep tests/test_reading.py

train: $(VENV)/.done ## distil a GemNet-OC teacher into a small PaiNN, on real data
	$(RUN)/fairchem main --mode train --config-yml yaml_configs/kd/e2n.yml

demo: $(VENV)/.done ## train a student with and without its teacher, and show what that gained
	$(RUN)/fairchem-kd demo

docs: $(VENV)/.done ## build the documentation as a site, docs/_build/html
	$(RUN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lint: $(VENV)/.done ## check style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

test-declared: $(DECLARED)/.done ## plain pip, torch 2.4 as fairchem-core declares it, quick tests
	OMP_NUM_THREADS=1 $(DECLARED)/bin/python -m pytest $(PARALLEL) -m "not slow"

clean: ## remove the environments and caches; data, checkpoints and runs stay
	rm -rf $(VENV) $(VENV)-uv $(DECLARED) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.done: $(SETUP)
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10, 3.11 or 3.12 found; name one with PYTHON=..."; exit 1; }
	requirements/install.sh $(PYTHON) $(VENV)
	@touch $@

$(DECLARED)/.done: $(SETUP)
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10, 3.11 or 3.12 found; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(DECLARED)
	$(DECLARED)/bin/python -m pip install ./compat '.[test]'
	@touch $@
