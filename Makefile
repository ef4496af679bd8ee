# `make quickstart` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV ?= .venv
# A CPU build of torch: make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: quickstart test lint setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

quickstart: setup
	$(BIN)/edgekit run quickstart -t android-arm64 -t linux-x86_64 -t ios-arm64 --allow-unverified

# One process a core, and one thread each: the tests of a file share what they made, so they stay together. A process that
# dies ends the run: with another in its place pytest-xdist 3.8 may wait for ever.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --max-worker-restart 0 --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs dist
