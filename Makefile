# Two commands do all the set-up: `make demo` and `make test`. PYTHON may be any Python from 3.11 on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
# weights of the image encoder (a file, or hub for timm's, of ImageNet): MobileNetV2's of `make ablation`, `peers` and `study`,
# EfficientNet-Lite0's of the study's row with that name and of `make tokenizer-study`, Lite2's of its row
ENCODER_WEIGHTS ?= hub
LITE0_WEIGHTS ?= hub
LITE2_WEIGHTS ?= hub
SAM_WEIGHTS ?= ../shared/weights/mobilesam.safetensors
MFNET ?= $(DATA)/mfnet156
# LSTG of stage 1: of the checkpoint that ships, or runs/tokenizer_tiny/final after configs/tokenizer_tiny.yaml
TOKENIZER_WEIGHTS ?= tiny
EXTRAS := dev
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-oldest check browser ablation peers study study-peers tokenizer-study clean

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

# The demo page is tested in a real browser. As root on Debian it is installed; elsewhere the test says what it lacks, and
# fails where CI is set.
browser:
	@if command -v chromedriver > /dev/null; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	else echo "no chromedriver here: install Chromium with its driver to test the demo page"; fi

# Files of tests run beside one another, each process on one core: half of the time on two cores, and about 2 GB each.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test: check browser
	$(PYTEST) -m "not slow"

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

# A run that training.json or report.json says is finished is skipped, one that was killed goes on.
ABLATIONS := a b c continuous
ablation: $(STAMP) $(ABLATIONS:%=runs/ablation_%/evaluation/report.json)
	$(BIN)/fusionsam report --reports $(ABLATIONS:%=runs/ablation_%/evaluation) --out out/ablation

.PRECIOUS: runs/ablation_%/final/training.json
runs/ablation_%/final/training.json: | $(STAMP)
	$(BIN)/fusionsam train --config configs/mfnet_tiny.yaml --config configs/ablation_$*.yaml \
		--data.root $(MFNET) --model.encoder.weights $(ENCODER_WEIGHTS) --model.sam_weights $(SAM_WEIGHTS) \
		$(if $(filter a,$*),,--model.tokenizer_weights $(TOKENIZER_WEIGHTS)) \
		$$(test ! -e runs/ablation_$*/last.ckpt || echo --resume)

runs/ablation_%/evaluation/report.json: runs/ablation_%/final/training.json
	$(BIN)/fusionsam evaluate --dataset mfnet --root $(MFNET) --split val \
		--weights runs/ablation_$*/final --out runs/ablation_$*/evaluation

# The alternatives under a budget of their own, for example `make peers PEER_BUDGET="--steps 1700"`.
PEERS ?= early two_stream two_stream_late visible infrared
PEER_BUDGET ?= --minutes 30
SEED ?= 0
peers: $(STAMP) $(PEERS:%=runs/peer_%_$(SEED)/evaluation/report.json)
	$(BIN)/fusionsam report --reports $(PEERS:%=runs/peer_%_$(SEED)/evaluation) --out out/peers

.PRECIOUS: runs/peer_%_$(SEED)/final/peer.json
runs/peer_%_$(SEED)/final/peer.json: | $(STAMP)
	$(BIN)/python benchmarks/peers.py train --peer $* --config configs/mfnet_tiny.yaml $(PEER_BUDGET) --seed $(SEED) \
		--out runs/peer_$*_$(SEED) --data.root $(MFNET) --model.encoder.weights $(ENCODER_WEIGHTS) \
		$$(test ! -e runs/peer_$*_$(SEED)/last.ckpt || echo --resume)

runs/peer_%_$(SEED)/evaluation/report.json: runs/peer_%_$(SEED)/final/peer.json
	$(BIN)/python benchmarks/peers.py robustness --weights runs/peer_$*_$(SEED)/final --dataset mfnet --root $(MFNET) \
		--split val --out runs/peer_$*_$(SEED)/evaluation
	$(BIN)/python benchmarks/peers.py evaluate --weights runs/peer_$*_$(SEED)/final --dataset mfnet --root $(MFNET) \
		--split val --out runs/peer_$*_$(SEED)/evaluation

# One change at a time; configs/study/base.yaml says how a row is run.
STUDY ?= $(basename $(notdir $(wildcard configs/study/*.yaml)))
study: $(STAMP) $(STUDY:%=runs/study/%/evaluation/report.json)
	$(BIN)/fusionsam report --reports $(STUDY:%=runs/study/%/evaluation) --out out/study

runs/study/encoder_lite0/final/training.json: override ENCODER_WEIGHTS = $(LITE0_WEIGHTS)
runs/study/encoder_lite2/final/training.json: override ENCODER_WEIGHTS = $(LITE2_WEIGHTS)
runs/study/synthetic/train.txt: | $(STAMP)
	$(BIN)/fusionsam synth --out runs/study/synthetic --pairs 400
runs/study/synth/final/training.json: runs/study/synthetic/train.txt
runs/study/synth_first/final/training.json: runs/study/synth/final/training.json

.PRECIOUS: runs/study/%/final/training.json
runs/study/%/final/training.json: | $(STAMP)
	$(BIN)/fusionsam train --config configs/mfnet_tiny.yaml --config configs/study/base.yaml \
		--config configs/study/$*.yaml --model.sam_weights $(SAM_WEIGHTS) \
		$(if $(filter synth,$*),,--data.root $(MFNET)) \
		$(if $(filter encoder_tinyvit,$*),,--model.encoder.weights $(ENCODER_WEIGHTS)) \
		$(if $(filter tokenizer_joint,$*),,--model.tokenizer_weights $(TOKENIZER_WEIGHTS)) \
		$$(test ! -e runs/study/$*/last.ckpt || echo --resume)

$(patsubst %,runs/study/%/evaluation/report.json,$(filter-out base,$(STUDY))): | runs/study/base/evaluation/report.json
runs/study/%/evaluation/report.json: runs/study/%/final/training.json
	$(BIN)/fusionsam evaluate --dataset mfnet --root $(MFNET) --split val --weights runs/study/$*/final \
		--out runs/study/$*/evaluation $(if $(filter-out base,$*),--against runs/study/base/evaluation)

# How far seeds spread at this length, beside base, seed1 and seed2: two streams in the same settings, with the steps that
# fit into the same time (they take two fifths of the time a step).
study-peers: $(STAMP) $(foreach seed,0 1 2,runs/study/two_stream_$(seed)/evaluation/report.json)
	$(BIN)/fusionsam report --reports runs/study/two_stream_[012]/evaluation --out out/study-peers

.PRECIOUS: runs/study/two_stream_%/final/peer.json
runs/study/two_stream_%/final/peer.json: | $(STAMP)
	$(BIN)/python benchmarks/peers.py train --peer two_stream --config configs/mfnet_tiny.yaml --config \
		configs/study/base.yaml --steps 500 --seed $* --out runs/study/two_stream_$* --data.root $(MFNET) \
		--model.encoder.weights $(ENCODER_WEIGHTS) $$(test ! -e runs/study/two_stream_$*/last.ckpt || echo --resume)

runs/study/two_stream_%/evaluation/report.json: runs/study/two_stream_%/final/peer.json
	$(BIN)/python benchmarks/peers.py evaluate --weights runs/study/two_stream_$*/final --dataset mfnet --root $(MFNET) \
		--split val --out runs/study/two_stream_$*/evaluation

# Loss terms, codebook sizes and kinds of quantiser in stage 1, and the mIoU of a short stage 2 after each; EXTRA_PAIRS
# are folders of unlabelled pairs. `make tokenizer-study STAGE_2_STEPS=0` leaves stage 2 out.
STAGE_2_STEPS ?= 80
TOKENIZER_STUDY ?= $(filter-out stage_2,$(basename $(notdir $(wildcard configs/tokenizer_study/*.yaml))))
EXTRA_PAIRS ?= [$(DATA)/roadscene, $(DATA)/tno]
tokenizer-study: $(STAMP) $(TOKENIZER_STUDY:%=runs/tokenizer_study/%/final/training.json) \
		$(if $(filter 0,$(STAGE_2_STEPS)),,$(TOKENIZER_STUDY:%=runs/tokenizer_stage_2/%/evaluation/report.json))
	$(BIN)/python benchmarks/tokenizer_study.py

.PRECIOUS: runs/tokenizer_study/%/final/training.json
runs/tokenizer_study/%/final/training.json: | $(STAMP)
	$(BIN)/fusionsam train --config configs/tokenizer_tiny.yaml --config configs/tokenizer_study/base.yaml \
		--config configs/tokenizer_study/$*.yaml --data.root $(MFNET) --data.extra_pairs '$(EXTRA_PAIRS)' \
		--model.encoder.weights $(LITE0_WEIGHTS) $$(test ! -e runs/tokenizer_study/$*/last.ckpt || echo --resume)

.PRECIOUS: runs/tokenizer_stage_2/%/final/training.json
runs/tokenizer_stage_2/%/final/training.json: runs/tokenizer_study/%/final/training.json
	$(BIN)/fusionsam train --config configs/mfnet_tiny.yaml --config configs/tokenizer_study/base.yaml \
		--config configs/tokenizer_study/$*.yaml --config configs/tokenizer_study/stage_2.yaml --data.root $(MFNET) \
		--model.tokenizer_weights runs/tokenizer_study/$*/final --train.out runs/tokenizer_stage_2/$* \
		--train.max_steps $(STAGE_2_STEPS) --train.validate_every $(STAGE_2_STEPS) \
		$$(test ! -e runs/tokenizer_stage_2/$*/last.ckpt || echo --resume)

runs/tokenizer_stage_2/%/evaluation/report.json: runs/tokenizer_stage_2/%/final/training.json
	$(BIN)/fusionsam evaluate --dataset mfnet --root $(MFNET) --split val \
		--weights runs/tokenizer_stage_2/$*/final --out runs/tokenizer_stage_2/$*/evaluation

clean:
	rm -rf $(VENV) out runs build dist
