# Two commands do all set-up: `make demo` and `make test`. Both make the virtual environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python -m tools.demo.run --output_dir demo_output

test: .venv/installed
	$(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .

# The lock is made by: uv pip compile --universal --python-version 3.10 requirements.txt requirements-dev.txt -o requirements.lock
.venv/installed: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; name it with: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

clean:
	rm -rf .venv demo_output
