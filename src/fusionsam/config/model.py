"""Settings of the network. The docstring under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fusionsam.config.bounds import Bounded
from fusionsam.config.datasets import MFNET_CLASSES, MFNET_PALETTE, require_classes
from fusionsam.types import InputError


@dataclass
class TokenizerConfig(Bounded):
    """LSTG, latent space token generation (eq. 2-9)."""

    section: ClassVar[str] = "model.tokenizer"

    tokens: Literal["quantized", "continuous", "pixels"] = "quantized"
    """What goes on to fusion: quantised latents (eq. 3), the encoder's continuous ones, or patch-embedded raw pixels
    (ablation A, no LSTG at all)."""
    quantizer: Literal["vq", "fsq"] = "vq"
    """Nearest codebook entry (eq. 3) or finite scalar quantisation (arXiv 2309.15505)."""
    dim: int = 64
    """d, latent width."""
    width: int = 32
    """Channels after the first of the two stride-2 stages; twice as many after the second."""
    blocks: int = 2
    """Residual blocks at the latent grid, in encoder and decoder each."""
    encoder_width: int = 0
    """`width` of the encoder alone; 0 = that of both."""
    separable: int = 0
    """Depthwise separable blocks in the place of the encoder's residual blocks, for less time; 0 = the paper's."""
    codebook_size: int = 1024
    """Entries of each codebook."""
    codebook_dim: int = 16
    """Width in which codes are compared (factorised codes, arXiv 2110.04627); dim = no projection."""
    codebooks: int = 1
    """Sub-vectors with a codebook each (product quantisation); 1 = the paper's."""
    codebook_update: Literal["ema", "gradient"] = "ema"
    """Exponential moving average, or the first term of eq. 6 by gradient."""
    ema_decay: float = 0.99
    """Decay of the codebook's moving average."""
    codebook_tokens: int = 8192
    """Latents a step, drawn at random, that k-means, moving average and restarts of the codebook see; 0 = all."""
    dead_code_threshold: float = 0.5
    """Codes whose moving count falls below this are restarted from the batch; 0 = never."""
    kmeans_init: bool = True
    """Start from the first batch: the codebook with k-means; fsq's latents spread over its levels."""
    shared_codebook: bool = False
    """One codebook for both modalities instead of one each."""
    commitment_beta: float = 0.25
    """beta of eq. 6, on the encoder's side of the commitment term."""


@dataclass
class FusionConfig(Bounded):
    """FMP, fusion mask prompting (eq. 10-13)."""

    section: ClassVar[str] = "model.fusion"

    kind: Literal["fmp", "concat"] = "fmp"
    """Both cross-attention units, or ablation (B): the two latents concatenated and convolved."""
    heads: int = 4
    """Attention heads; d_k = dim / heads."""
    ffn_ratio: float = 2.0
    """Hidden width of the feed-forward network over dim."""
    kv_stride: int = 1
    """Keys and values are average-pooled by this factor; 1 = the paper's."""
    query_stride: int = 1
    """Queries are average-pooled by this factor, which divides `kv_stride`, and what they are answered is enlarged
    again; the residuals stay at full size. 1 = the paper's."""
    picture_head: Literal["blend", "decode"] = "blend"
    """How I_f is made: per-pixel blending of luma and infrared plus a residual, or convolutions on z_f alone."""
    picture_width: int = 16
    """Channels of the picture head."""
    picture_stride: Literal[1, 2, 4] = 1
    """blend only: the head's convolutions run on cells of this many pixels a side, whose pixels are channels. The mask
    and the residual keep the full resolution."""
    picture_dilations: tuple[int, ...] = ()
    """blend only: dilations of further 3x3 convolutions, in cells of `picture_stride`. Which camera's detail to keep is
    told from more than the 5x5 cells that the head sees without them."""


@dataclass
class PromptConfig(Bounded):
    """How SAM is prompted: by the mask prompt of FMP, and by points and box that are drawn from it."""

    section: ClassVar[str] = "model.prompts"

    mode: Literal["self", "none"] = "self"
    """self: the model's own points and box beside the mask prompt; none: the mask prompt only."""
    points: int = 10
    """Number of self points."""
    box: bool = True
    """Add the box around what is above the threshold."""
    mask: bool = True
    """Use the mask prompt; off = SAM's learned no-mask embedding."""
    threshold: float = 0.5
    """Probability of the mask prompt above which a place belongs to the box, and a peak is a point on an object."""
    separation: int = 8
    """Two self points are farther apart than this, in latent cells (4 pixels each)."""
    dropout: float = 0.2
    """Share of training steps in which points and box are left out, so that mode none stays good."""


@dataclass
class EncoderConfig(Bounded):
    """SAM's image encoder."""

    section: ClassVar[str] = "model.encoder"

    kind: Literal["tinyvit", "timm", "sam", "sam2"] = "timm"
    """MobileSAM's TinyViT, a convolutional backbone of timm, SAM's ViT or SAM2's Hiera (both from transformers)."""
    source: str = "tf_efficientnet_lite0"
    """Architecture: a timm model name, a Hugging Face hub name or folder (sam, sam2); tinyvit has one: mobilesam."""
    weights: str | None = None
    """Foreign weights to start from: a file, a folder, 'hub' (download by source), or nothing = random."""
    training: Literal["frozen", "lora", "full"] = "full"
    """The paper freezes the encoder; lora trains rank-reduced adapters; full trains everything."""
    lora_rank: int = 8
    """Rank of the adapters."""
    guided: bool = False
    """timm's EfficientNets only: z_f also enters at stride 4 through a convolution that begins at zero, so that the
    encoder sees both modalities and not their picture alone."""
    thermal: bool = False
    """timm's EfficientNets only: a second backbone of the same kind sees the infrared image, and its features enter the
    first one's at strides 4, 8, 16 and 32 through 1x1 convolutions."""
    thermal_input: Literal["plain", "standardized"] = "plain"
    """thermal only: the second backbone sees grey values as they come, or each picture with the same mean and
    deviation, so that cameras which scale heat in other ways look alike."""
    dims: tuple[int, ...] | None = None
    """tinyvit only: widths of the four stages; None = MobileSAM's 64, 128, 160, 320."""
    depths: tuple[int, ...] | None = None
    """tinyvit only: blocks a stage; None = 2, 2, 6, 2."""


@dataclass
class DecoderConfig(Bounded):
    """SAM's prompt encoder and mask decoder with full-fledged output tokens."""

    section: ClassVar[str] = "model.decoder"

    hidden: int = 256
    """E, embedding width (SAM: 256)."""
    mlp_dim: int = 2048
    """Hidden width of the two-way transformer's MLP (SAM: 2048)."""
    heads: int = 8
    """Attention heads (SAM: 8)."""
    layers: int = 2
    """Two-way layers (SAM: 2)."""
    fine_features: bool = True
    """Add the encoder's stride-8 and stride-4 features while the mask features are upscaled (as SAM2 does)."""
    logit_scale: float = 0.05
    """Initial factor on the class tokens' logits; pretrained features times new tokens start in the hundreds."""


@dataclass
class HeadConfig(Bounded):
    """The MLP classification head."""

    section: ClassVar[str] = "model.head"

    width: int = 96
    """Hidden channels."""
    multi_level: bool = True
    """Also see the encoder's feature levels, top-down summed (FPN), beside mask features, FOT logits and z_f."""
    pyramid: int = 0
    """Channels of an FPN decoder (3x3 convolutions and normalisation at each of four levels) in the place of the plain
    sum; 0 = the plain sum. With it `width` is a multiple of 32."""
    dropout: float = 0.1
    """Channel dropout before the last layer."""


@dataclass
class SteeringConfig(Bounded):
    """Clicks that name a class: a part of its own behind the frozen network, which runs for such clicks alone."""

    section: ClassVar[str] = "model.steering"

    width: int = 0
    """Channels of its finest level; 0 = no such part, and clicks that name a class are refused."""


@dataclass
class ModelConfig(Bounded):
    """The whole network."""

    section: ClassVar[str] = "model"

    preset: str = "tiny"
    """Name of the preset this began as."""
    classes: list[str] = field(default_factory=lambda: list(MFNET_CLASSES))
    """Class names; the position is the id."""
    palette: list[tuple[int, int, int]] = field(default_factory=lambda: list(MFNET_PALETTE))
    """RGB of each class, 0-255."""
    foreground: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6, 7, 8])
    """Class ids that the mask prompt should point at."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    sam_weights: str | None = None
    """Foreign SAM weights (.pth, .pt, .safetensors, a transformers folder or hub name) for prompt encoder and mask
    decoder, and for the image encoder where its kind matches."""
    start_from: str | None = None
    """A FusionSAM checkpoint (folder or shipped name) to fine-tune: every part starts from it. With another number of
    classes the class-sized tensors start anew, with another image encoder that (from encoder.weights) and the tensors
    its widths shape; with tokenizer_weights LSTG comes from there."""
    tokenizer_weights: str | None = None
    """A checkpoint folder whose LSTG this model starts from (stage 1)."""
    max_side: int = 1024
    """Larger inputs are segmented on a copy reduced to this longer side; the fused picture keeps the full size."""

    def __post_init__(self) -> None:
        """Refuse impossible settings, named as the user typed them."""
        super().__post_init__()
        if len(self.classes) != len(self.palette):
            raise InputError(
                f"model.palette: {len(self.palette)} colours for {len(self.classes)} model.classes; give one each"
            )
        require_classes(self.classes, self.palette, "model.classes", "model.palette")
        outside = [i for i in self.foreground if not 0 <= i < len(self.classes)]
        if outside:
            raise InputError(f"model.foreground: ids {outside} are not among the {len(self.classes)} model.classes")
        if self.tokenizer.dim % self.fusion.heads:
            raise InputError(
                f"model.fusion.heads: {self.fusion.heads} does not divide model.tokenizer.dim {self.tokenizer.dim}"
            )
        if self.fusion.kv_stride % self.fusion.query_stride:
            raise InputError(
                f"model.fusion.query_stride: {self.fusion.query_stride} does not divide model.fusion.kv_stride "
                f"{self.fusion.kv_stride}; give a factor of it, 1 for queries at full size"
            )
        if len(self.classes) == 1:
            raise InputError("model.classes: 1 class; expected at least 2, the background among them")
        if self.decoder.hidden % 8 or self.decoder.hidden % (2 * self.decoder.heads):
            raise InputError(
                f"model.decoder.hidden: {self.decoder.hidden} with {self.decoder.heads} model.decoder.heads; expected "
                f"a multiple of 8 and of twice the heads (SAM has 256 and 8)"
            )
        if self.tokenizer.dim % 4:
            raise InputError(f"model.tokenizer.dim: {self.tokenizer.dim} must be a multiple of 4 (2-D positions)")
