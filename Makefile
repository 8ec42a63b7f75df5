# make demo      draw with the bundled model, into out/demo
# make test      the suite, 6 minutes at most on 2 cores
# make test-all  the slow tests as well, 20 minutes at most
# make evaluate  scores of the bundled model at 64 px, into out/evaluate; ten minutes
# make check     style, types and tests

PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo evaluate test test-all check clean

.venv/installed: pyproject.toml constraints.txt
	@echo "== installing into .venv (once; torch is the large part) =="
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	@echo "== installing what the tests need =="
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

demo: .venv/installed
	@echo "== drawing with the bundled model =="
	env -u OMP_NUM_THREADS $(BIN)/python -m examples.demo out/demo

evaluate: .venv/installed-dev
	@echo "== scoring the bundled model by the built-in extractor =="
	env -u OMP_NUM_THREADS $(BIN)/python -m examples.evaluate out/evaluate --side 64

test: .venv/installed-dev
	@echo "== tests =="
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/installed-dev
	@echo "== style and types =="
	$(BIN)/ruff check .
	$(BIN)/mypy
	@echo "== all tests, the slow ones too =="
	$(BIN)/python -m pytest -n 2

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not slow"

clean:
	rm -rf .venv out
