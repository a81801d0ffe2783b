# `make demo` shows the main job, `make test` passes the tests; both set everything up on a machine with Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
EVIDENCE := $(filter-out _%,$(basename $(notdir $(wildcard evidence/*.py))))
BENCHMARKS := $(filter-out common,$(basename $(notdir $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint docs evidence bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pliant needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

venv: $(STAMP) ## make .venv with every extra

demo: venv ## train, tune and measure a multi-exit network on real digits; writes pliant-report.html
	$(BIN)/pliant demo

lint: venv ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: venv ## build the documentation strictly into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint docs ## lint, docs, then all tests
	$(BIN)/python -m pytest -n 2 -q

evidence: venv ## run every claim and comparison again (long); goes on after a failure and names it at the end
	@for id in $(EVIDENCE); do $(BIN)/pliant reproduce $$id || failed="$$failed $$id"; done; \
	[ -z "$$failed" ] || { echo "a claim failed or the run broke:$$failed"; exit 1; }

bench: venv ## measure the ratios again (long)
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --json benchmarks/results/$$name.json || exit 1; done

clean: ## remove what was built
	rm -rf .venv site build dist .pytest_cache .ruff_cache .hypothesis
