# What the experiments share. Each is started from the root of the repository: make -f experiments/NAME/Makefile
include Makefile
.DEFAULT_GOAL := all
DATA ?= ../shared/data
MFNET ?= $(DATA)/mfnet156
# weights of the image encoder: a file, or hub for timm's of ImageNet. MobileNetV2's, and EfficientNet-Lite0's of the tokenizer study
ENCODER_WEIGHTS ?= hub
LITE0_WEIGHTS ?= hub
SAM_WEIGHTS ?= ../shared/weights/mobilesam.safetensors
# LSTG of stage 1: of the checkpoint that ships, or runs/tokenizer_tiny/final after configs/tokenizer_tiny.yaml
TOKENIZER_WEIGHTS ?= tiny
