# Two commands do all the set-up: `make demo` and `make test`. PYTHON may be any Python from 3.11 on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
EXTRAS := dev
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow check bench clean

# installed again only when what is to be installed has changed
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fusionsam predict --visible examples/pairs/visible --infrared examples/pairs/infrared --out out/demo --overwrite
	@echo "Look at out/demo/*_overlay.png (class map on the fused picture) and out/demo/*_fused.png."

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -m "not slow"

test-slow: check
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) out runs build dist
