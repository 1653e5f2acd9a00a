# All commands create the virtual environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint clean

demo: .venv/installed
	$(BIN)/python -m tools.demo.run --output_dir demo_output

test: .venv/installed
	$(BIN)/python -m pytest -n 2

# Everything but the tests marked slow, in less than 90 seconds on 2 cores.
test-fast: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# The lock is made by: uv pip compile --universal --no-annotate --no-header --python-version 3.10 \
#   requirements.txt requirements-dev.txt -o requirements.lock
.venv/installed: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; name it with: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

clean:
	rm -rf .venv demo_output
