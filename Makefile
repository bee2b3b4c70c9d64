# For users of the repository: setup, demo, test, check, docs, bench. PYTHON may be any Python from 3.11 on.
# Studies and baselines: experiments/NAME/Makefile, started from here with make -f.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := dev
STAMP := $(VENV)/.installed

.PHONY: setup demo test coverage check docs dist bench bench-align tables test-slow test-oldest browser clean

# installed again only when what is to be installed has changed
setup: $(STAMP)
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fusionsam predict --visible examples/pairs/visible --infrared examples/pairs/infrared --out out/demo --overwrite
	@echo "Look at out/demo/*_overlay.png (class map on the fused picture) and out/demo/*_fused.png."

# Files of tests run beside one another, each process on one core: half of the time on two cores, and about 2 GB each.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test: check browser
	$(PYTEST) -m "not slow"

# Which lines and branches the tests reach. Tracing slows them, so it is no part of `make test`. TESTS picks files.
TESTS ?=
coverage: $(STAMP)
	$(PYTEST) -m "not slow" --cov=fusionsam --cov-branch --cov-report=term-missing:skip-covered $(TESTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into out/site; a broken link or a docstring that names an unknown argument fails.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and sdist, into dist, as the package index takes them
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*

# Time and memory on this machine, into out/bench. The figures in results/ were made by the same scripts.
bench: $(STAMP)
	$(BIN)/python benchmarks/evaluation_time.py --images 200 --out out/bench/evaluation_time.json
	$(BIN)/python benchmarks/onnx_runtime.py --rounds 5 --out out/bench/onnx.json
	$(BIN)/python benchmarks/serve_load.py --clients 20 --seconds 20 --out out/bench/serve.json

# How well rigs are found, and how surely unrelated pictures are refused: an hour on one core. The figures of
# results/alignment.json are of fewer rigs where the file says so.
DATA ?= ../shared/data
BENCH_ALIGN := $(BIN)/python benchmarks/alignment.py --root $(DATA)/roadscene --out out/bench/alignment.json
bench-align: $(STAMP)
	$(BENCH_ALIGN) --pairs 5 --rigs 40
	$(BENCH_ALIGN) --pairs 20 --rigs 40
	$(BENCH_ALIGN) --pairs 1 --rigs 40
	$(BENCH_ALIGN) --pairs 5 --rigs 200 --shuffled
	$(BENCH_ALIGN) --pairs 1 --rigs 200 --shuffled
	$(BIN)/python benchmarks/alignment.py --pairs 5 --rigs 40 --out out/bench/alignment.json

# results/tables.md, of the JSON reports beside it
tables: $(STAMP)
	$(BIN)/python -m fusionsam.evaluation.tables.results results

test-slow: check browser
	$(PYTEST)

# What hangs on other packages, against the oldest releases that pyproject.toml allows of those in pure Python.
OLDEST := vector-quantize-pytorch|jsonargparse|lightning|timm|peft|segmentation-models-pytorch
test-oldest: $(STAMP)
	rm -rf out/oldest
	sed -nE 's/^  "($(OLDEST))(\[[a-z]+\])?>=([0-9.]+)".*/\1==\3/p' pyproject.toml \
		| xargs $(BIN)/python -m pip install --quiet --no-deps --target out/oldest
	PYTHONPATH=out/oldest $(PYTEST) -m "not slow" tests/test_config.py tests/test_tokenizer.py \
		tests/test_network.py tests/test_network_checkpoint.py tests/test_image_encoder.py tests/test_train.py

# The demo page is tested in a real browser. As root on Debian it is installed; elsewhere the test says what it lacks, and
# fails where CI is set.
browser:
	@if command -v chromedriver > /dev/null; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	else echo "no chromedriver here: install Chromium with its driver to test the demo page"; fi

clean:
	rm -rf $(VENV) out runs build dist
