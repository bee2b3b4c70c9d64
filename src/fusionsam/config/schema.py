"""Every default once. The field docstrings become the help text of the command line.

A YAML file or a flag overrides any field; the resolved configuration is stored in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from fusionsam.config.datasets import CATALOG, MFNET_CLASSES, MFNET_PALETTE, require_classes
from fusionsam.errors import InputError
from fusionsam.types import LARGEST, SMALLEST


def _numbers() -> dict[str, tuple[float, float]]:
    """Full name of a setting -> smallest and largest value, of each part where it has several."""
    sections: dict[tuple[float, float], dict[str, str]] = {
        (0, math.inf): {
            "model.tokenizer": "blocks codebook_tokens dead_code_threshold commitment_beta",
            "model.prompts": "separation",
            "model.head": "pyramid",
            "loss": "dice_weight fot_weight prompt_weight fusion_weight intensity_weight gradient_weight color_weight "
            "ssim_weight reconstruction_weight commitment_weight perceptual_weight adversarial_weight "
            "class_weight_power",
            "data": "shift workers",
            "train": "epochs lr encoder_lr_factor sam_lr_factor weight_decay warmup_steps gradient_clip "
            "checkpoint_minutes adversarial_start",
        },
        (1, math.inf): {
            "model.tokenizer": "dim codebook_size codebook_dim codebooks",
            "model.fusion": "heads picture_dilations",
            "model.encoder": "lora_rank dims depths",
            "model.decoder": "hidden mlp_dim heads layers",
            "model.head": "width",
            "train": "max_steps batch_size validate_every num_nodes discriminator_width discriminator_stages",
        },
        (1, 64): {"model.fusion": "kv_stride"},
        (2, math.inf): {"model.tokenizer": "width", "model.fusion": "picture_width"},
        (0, 1): {
            "model.tokenizer": "ema_decay",
            "model.prompts": "threshold dropout",
            "model.head": "dropout",
            "loss": "reconstruction_share perceptual_share",
            "data": "flip photometric harsh infrared_style night rare_crop rare_sampling paste extra_share",
            "train": "ema_decay",
        },
        (0, 0.5): {"data": "modality_dropout"},
        (0, 1000): {"model.prompts": "points"},
        (0.01, 100): {"data": "scale", "model.fusion": "ffn_ratio"},
        (16, LARGEST): {"data": "crop"},
        (SMALLEST, LARGEST): {"model": "max_side"},
        (0, 2**32 - 1): {"train": "seed"},
    }
    return {
        f"{section}.{name}": bounds
        for bounds, found in sections.items()
        for section, names in found.items()
        for name in names.split()
    }


_BOUNDS = _numbers()


@dataclass  # jsonargparse takes a class for settings only if its bases are such, too
class _Bounded:
    """A section of the settings whose numbers are held to `_BOUNDS`."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        """InputError for a number out of its bounds, named as the user typed it."""
        for key, value in vars(self).items():
            low, high = _BOUNDS.get(f"{self.section}.{key}", (-math.inf, math.inf))
            parts = value if isinstance(value, tuple | list) else [value]
            numbers = [part for part in parts if isinstance(part, int | float)]
            if not all(low <= part <= high and math.isfinite(part) for part in numbers):
                wanted = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                wanted = wanted if math.inf not in numbers else f"a finite number, {wanted}"
                raise InputError(f"{self.section}.{key}: {value}; expected {wanted}")


@dataclass
class TokenizerConfig(_Bounded):
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
class FusionConfig(_Bounded):
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
    picture_head: Literal["blend", "decode"] = "blend"
    """How I_f is made: per-pixel blending of luma and infrared plus a residual, or convolutions on z_f alone."""
    picture_width: int = 16
    """Channels of the picture head at full resolution."""
    picture_dilations: tuple[int, ...] = ()
    """blend only: dilations of further 3x3 convolutions at full resolution. Which camera's detail to keep is told from
    more than the 5x5 pixels that the head sees without them."""


@dataclass
class PromptConfig(_Bounded):
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
class EncoderConfig(_Bounded):
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
class DecoderConfig(_Bounded):
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
class HeadConfig(_Bounded):
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
class ModelConfig(_Bounded):
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
        if len(self.classes) == 1:
            raise InputError("model.classes: 1 class; expected at least 2, the background among them")
        if self.decoder.hidden % self.decoder.heads:
            raise InputError(
                f"model.decoder.heads: {self.decoder.heads} does not divide model.decoder.hidden {self.decoder.hidden}"
            )
        if self.tokenizer.dim % 4:
            raise InputError(f"model.tokenizer.dim: {self.tokenizer.dim} must be a multiple of 4 (2-D positions)")


@dataclass
class LossConfig(_Bounded):
    """Weights of the joint objective (eq. 1)."""

    section: ClassVar[str] = "loss"

    segmentation: Literal["ce_dice", "ce_lovasz", "focal_dice"] = "ce_dice"
    """f_s on the head's logits."""
    dice_weight: float = 1.0
    """Dice (or Lovasz) beside cross-entropy."""
    fot_weight: float = 0.4
    """The same loss on the FOT logits."""
    prompt_weight: float = 0.3
    """Binary cross-entropy and Dice of the mask prompt to foreground: only a loss, the label never enters forward."""
    fusion_weight: float = 4.0
    """f_f as a whole; at 0.5 segmentation holds the picture near the plain average (docs/findings.md)."""
    intensity_weight: float = 0.2
    """L1 to max(Y1, I2)."""
    gradient_weight: float = 25.0
    """L1 of grad I_f to whichever of grad Y1 and grad I2 is longer."""
    color_weight: float = 1.0
    """L1 of Cb, Cr to the visible image's."""
    ssim_weight: float = 1.0
    """1 - SSIM to both sources."""
    reconstruction_weight: float = 1.0
    """L_rec, eq. 5."""
    reconstruction_share: float = 0.25
    """Joint training: share of each batch that is reconstructed for eq. 5 (G_i is the dearest part of LSTG); at least
    one image. Stage 1 reconstructs all."""
    commitment_weight: float = 0.25
    """gamma of eq. 9 on L_commit, eq. 6."""
    perceptual_weight: float = 0.1
    """alpha of eq. 9 on L_perc, eq. 7 (stage 1)."""
    perceptual_share: float = 0.25
    """Stage 1: share of each batch that Phi of eq. 7 sees (it costs more than LSTG itself); at least one image."""
    adversarial_weight: float = 0.1
    """The second beta of eq. 9, on L_adv, eq. 8 (stage 1), before VQ-GAN's adaptive weight."""
    class_weight_power: float = 0.5
    """Class weights of the cross-entropy: (1 / log(1.02 + share)) ** power, mean 1 (ENet, arXiv 1606.02147, has 1);
    0 = none. Shares are counted on the training labels."""


@dataclass
class DataConfig(_Bounded):
    """Which pairs, and how they are varied."""

    section: ClassVar[str] = "data"

    dataset: str = "mfnet"
    """Row of the catalogue (config.datasets.CATALOG)."""
    root: str = "data"
    """Folder of the data set (or the manifest file)."""
    train_split: str = "train"
    """Name of the split, or of a list NAME.txt beside the data."""
    val_split: str = "val"
    """Split for selection."""
    class_file: str | None = None
    """YAML with classes and palette, for pairs and manifest."""
    align: str | None = None
    """rig.json of `fusionsam align`, or auto to find one in the training pairs: for cameras that see apart. Labels are
    in the visible camera's frame; where infrared does not reach, the luma of the visible picture stands."""
    align_refine: bool = True
    """With data.align: each pair is shifted by a little where its edges then agree better by a set margin."""
    crop: tuple[int, int] = (352, 480)
    """Height and width of the training crops."""
    scale: tuple[float, float] = (0.75, 1.75)
    """Range of the random resize before the crop."""
    flip: float = 0.5
    """Probability of a mirror image."""
    photometric: float = 0.8
    """Probability of brightness, contrast, gamma, noise changes, drawn per modality."""
    harsh: float = 0.0
    """Probability, drawn per modality, of one strong disturbance on top: exposure, noise, blur, fog, a dead infrared
    frame. The fused picture is still taught to show what the cameras gave, disturbed or not."""
    infrared_style: float = 0.0
    """Probability that an infrared picture is shown in another style: haze removed by the dark channel (as MSRS's is),
    another tone curve, gamma or mean. Cameras differ in what they do between heat and grey value."""
    night: float = 0.0
    """Probability that a bright visible picture is shown as after dark (gamma, gain, noise), infrared untouched."""
    modality_dropout: float = 0.1
    """Probability that visible is dropped, and the same again for infrared; never both."""
    shift: int = 0
    """Largest random misalignment of infrared against visible, pixels."""
    rare_crop: float = 0.5
    """Probability that a crop is centred on a pixel of a rare class, drawn with equal chance per class."""
    rare_sampling: float = 0.5
    """0 = uniform over images, 1 = images drawn so that every class is equally likely to be in one."""
    paste: float = 0.0
    """Probability of pasting rare objects from another pair (all three arrays)."""
    workers: int = 1
    """Loader processes."""
    extra_pairs: list[str] = field(default_factory=list)
    """More folders of pairs (visible/ or vi/, infrared/ or ir/) to learn from; no labels are needed. Stage 2 learns
    fusion alone from them, unless extra_labels has label maps for them."""
    extra_labels: list[str] = field(default_factory=list)
    """For each of extra_pairs, in their order, a folder of label maps ID.png or ID_labels.png ('' for none): class ids,
    255 = unknown. `fusionsam predict --min-confidence` writes them (self-training, arXiv 1911.04252). A pair without
    one teaches fusion alone."""
    extra_share: float = 0.1
    """Stage 2: share of the training pairs that come from extra_pairs. Stage 1 draws all pairs alike."""
    allow_train_test_leak_and_know_that_scores_are_worthless: bool = False
    """Train although ids or content are shared between the splits."""

    def __post_init__(self) -> None:
        """InputError for impossible settings."""
        super().__post_init__()
        if self.dataset not in CATALOG:
            raise InputError(f"data.dataset: {self.dataset!r} is not known; choose one of {', '.join(CATALOG)}")
        if self.class_file is not None and not self.class_file.strip():
            raise InputError("data.class_file: is empty, as of an unset shell variable; give a YAML file, or null")
        if self.scale[0] > self.scale[1]:
            raise InputError(f"data.scale: {self.scale}; expected the smaller factor first")


@dataclass
class TrainConfig(_Bounded):
    """The optimisation."""

    section: ClassVar[str] = "train"

    stage: Literal["segmentation", "tokenizer"] = "segmentation"
    """Joint training (stage 2), or LSTG alone as a VQ-GAN (stage 1)."""
    out: str = "runs/fusionsam"
    """Folder for logs and checkpoints."""
    max_steps: int | None = None
    """Optimiser steps; overrides epochs."""
    epochs: float = 100.0
    """Passes over the training split, by all devices together, when max_steps is not given."""
    batch_size: int = 4
    """Pairs a step and device."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """The paper: adam."""
    lr: float = 1e-4
    """Peak learning rate of new parts."""
    encoder_lr_factor: float = 0.5
    """Factor on the rate of the image encoder's backbones; what joins them to the rest is new."""
    sam_lr_factor: float = 1.0
    """Factor on the rate of SAM's prompt encoder and mask decoder."""
    weight_decay: float = 1e-3
    """Weight decay (not on norms, biases, embeddings)."""
    warmup_steps: int = 50
    """Linear warm-up."""
    schedule: Literal["cosine", "poly", "constant"] = "poly"
    """Shape of the decay to zero at the last step; poly has power 0.9."""
    gradient_clip: float = 1.0
    """Largest norm of the gradients of one part (LSTG, FMP, image encoder, ...); 0 = any."""
    ema_decay: float = 0.998
    """Moving average of the weights that is evaluated and shipped; 0 = off."""
    validate_every: int = 200
    """Steps between validations."""
    checkpoint_minutes: float = 5.0
    """A resumable checkpoint at least this often."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Lightning's precision."""
    accelerator: str = "auto"
    """Lightning's accelerator."""
    devices: int | str = "auto"
    """Lightning's devices: a number, a list of their ids such as "0,1", or auto. With `epochs`, a given number of
    devices divides the steps; under auto the steps are those of one device."""
    num_nodes: int = 1
    """Lightning's nodes."""
    strategy: str = "auto"
    """Lightning's strategy; on more than one device auto and ddp become ddp_find_unused_parameters_true, as not every
    step reaches every parameter."""
    adversarial_start: int = 500
    """Stage 1: step at which the discriminator begins."""
    adversarial_loss: Literal["log", "hinge"] = "log"
    """Stage 1: eq. 8 as printed, or the hinge form."""
    perceptual: Literal["vgg16", "encoder"] = "encoder"
    """Stage 1: Phi of eq. 7."""
    perceptual_weights: str | None = None
    """Stage 1: file with VGG16 features (torchvision names); None = torchvision's download."""
    perceptual_input: Literal["auto", "imagenet", "caffe"] = "auto"
    """Stage 1: what VGG16 was trained on: RGB in [0,1] with ImageNet's mean and deviation, or Caffe's BGR of 0-255 less
    the mean; auto = as the file's metadata says, else imagenet."""
    discriminator_width: int = 32
    """Stage 1: channels of the discriminator's first stage, doubled at each further one."""
    discriminator_stages: int = 3
    """Stage 1: stride-2 stages of the discriminator; three see patches of 46 pixels."""
    freeze_tokenizer: bool = False
    """Stage 2: LSTG and its codebooks stay as they are (the tokens for a missing modality still learn), and its two
    losses, which would teach nothing, are left out."""


@dataclass
class Config:
    """A whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Refuse impossible pairs of settings, named as the user typed them."""
        if max(self.data.crop) > self.model.max_side:
            raise InputError(
                f"data.crop: {tuple(self.data.crop)} exceeds model.max_side {self.model.max_side}, so it "
                "would learn on reduced copies; use smaller crops or a larger max_side"
            )


def _debug() -> ModelConfig:
    return ModelConfig(
        preset="debug",
        tokenizer=TokenizerConfig(dim=16, width=8, blocks=1, codebook_size=32, codebook_dim=8),
        fusion=FusionConfig(heads=2, kv_stride=4, picture_width=4),
        encoder=EncoderConfig(kind="tinyvit", source="mobilesam", dims=(8, 16, 16, 32), depths=(1, 1, 1, 1)),
        decoder=DecoderConfig(hidden=32, mlp_dim=32, heads=2),
        head=HeadConfig(width=16),
        max_side=512,
    )


def _tiny() -> ModelConfig:
    return ModelConfig(
        preset="tiny",
        tokenizer=TokenizerConfig(blocks=1, codebook_size=256, codebook_dim=32, codebooks=4),
        fusion=FusionConfig(heads=2, kv_stride=8, picture_dilations=(2, 4)),
        # a detector's backbone, which has seen cars, people and bicycles: 2 points ahead of ImageNet's Lite0
        encoder=EncoderConfig(source="mobilenetv2_100", guided=True, thermal=True),
        head=HeadConfig(pyramid=128),
    )


def _sam(preset: str, source: str) -> Callable[[], ModelConfig]:
    def build() -> ModelConfig:
        return ModelConfig(
            preset=preset,
            tokenizer=TokenizerConfig(dim=128, width=64),
            encoder=EncoderConfig(kind="sam2" if "sam2" in source else "sam", source=source, training="frozen"),
            head=HeadConfig(width=128),
        )

    return build


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "debug": _debug,
    "tiny": _tiny,
    "vit_b": _sam("vit_b", "facebook/sam-vit-base"),
    "vit_l": _sam("vit_l", "facebook/sam-vit-large"),
    "vit_h": _sam("vit_h", "facebook/sam-vit-huge"),
    "sam2_t": _sam("sam2_t", "facebook/sam2.1-hiera-tiny"),
    "sam2_s": _sam("sam2_s", "facebook/sam2.1-hiera-small"),
    "sam2_bp": _sam("sam2_bp", "facebook/sam2.1-hiera-base-plus"),
    "sam2_l": _sam("sam2_l", "facebook/sam2.1-hiera-large"),
}


def preset(name: str) -> ModelConfig:
    """The model configuration called `name`; InputError lists the choices."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dictionaries and lists, ready for YAML or JSON."""
    return asdict(config)


def _typed(hint: Any, value: Any) -> Any:
    """`value` if it is what `hint` says, lists made tuples where those are meant; TypeError if it is something else."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:
        for choice in args:
            with suppress(TypeError):
                return _typed(choice, value)
    elif origin is Literal:
        if value in args:
            return value
    elif origin is list and isinstance(value, list):
        return [_typed(args[0], item) for item in value]
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_typed(kind, item) for kind, item in zip(kinds, value, strict=True))
    elif isinstance(hint, type):
        accepted: Any = (int, float) if hint is float else hint
        if isinstance(value, accepted) and (hint is bool or not isinstance(value, bool)):
            return value
    raise TypeError


RETIRED: dict[str, tuple[Any, str]] = {
    "encoder.sam": (False, "a TinyViT beside the backbone gained nothing real in 600 steps"),
    "encoder.thermal_share": (0.0, "a share above 0 gained nothing real"),
}
"""Settings that are gone: the value that an old file may still name, which did nothing, and why there is no other."""


def _retired(name: str, value: Any, where: str) -> None:
    """InputError where an old file asks for what a retired setting did."""
    idle, why = RETIRED[name.removeprefix("model.")]
    if value != idle:
        raise InputError(f"{where}: {name}: {value!r}, but this setting is gone ({why}); remove it from the file")


def from_dict(kind: type[Any], values: Any, where: str, path: str = "") -> Any:
    """A dataclass of this file from plain dictionaries; unknown keys and wrong types are refused by their full name.

    `where` names the source in the InputError, `path` the section of it that `values` is ("tokenizer.").
    """
    if not isinstance(values, dict):
        named = f"{where}: {path.rstrip('.')}" if path else where
        raise InputError(f"{named}: found {type(values).__name__}, expected a mapping of settings")
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if f"{path}{key}".removeprefix("model.") in RETIRED:
            _retired(f"{path}{key}", value, where)
            continue
        if key not in known:
            raise InputError(f"{where}: unknown setting '{path}{key}'; expected one of {', '.join(known)}")
        hint = hints[key]
        if isinstance(hint, type) and is_dataclass(hint):
            arguments[key] = from_dict(hint, value, where, f"{path}{key}.")
            continue
        try:
            arguments[key] = _typed(hint, value)
        except TypeError:
            kind_name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise InputError(f"{where}: {path}{key}: found {value!r}, expected {kind_name}") from None
    return kind(**arguments)
