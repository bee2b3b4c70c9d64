# Two commands do all the set-up: `make demo` and `make test`. PYTHON may be any Python from 3.11 on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
# of `make ablation`: ImageNet weights of EfficientNet-Lite0 (a file, or hub for timm's) and a Segment Anything model
ENCODER_WEIGHTS ?= hub
SAM_WEIGHTS ?= ../shared/weights/mobilesam.safetensors
MFNET ?= $(DATA)/mfnet156
EXTRAS := dev
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow check ablation clean

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

# A run that training.json or report.json says is finished is skipped, one that was killed goes on.
ABLATIONS := a b c continuous
ablation: $(STAMP) $(ABLATIONS:%=runs/ablation_%/evaluation/report.json)
	$(BIN)/fusionsam report --reports $(ABLATIONS:%=runs/ablation_%/evaluation) --out out/ablation

.PRECIOUS: runs/ablation_%/final/training.json
runs/ablation_%/final/training.json: | $(STAMP)
	$(BIN)/fusionsam train --config configs/mfnet_tiny.yaml --config configs/ablation_$*.yaml \
		--data.root $(MFNET) --model.encoder.weights $(ENCODER_WEIGHTS) --model.sam_weights $(SAM_WEIGHTS) \
		$$(test ! -e runs/ablation_$*/last.ckpt || echo --resume)

runs/ablation_%/evaluation/report.json: runs/ablation_%/final/training.json
	$(BIN)/fusionsam evaluate --dataset mfnet --root $(MFNET) --split val \
		--weights runs/ablation_$*/final --out runs/ablation_$*/evaluation

clean:
	rm -rf $(VENV) out runs build dist
