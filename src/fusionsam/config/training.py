"""Settings of a training: losses, data, optimisation. The docstring under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fusionsam.config.bounds import Bounded
from fusionsam.config.datasets import CATALOG
from fusionsam.types import InputError


@dataclass
class LossConfig(Bounded):
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
    vif_weight: float = 0.7
    """Stages picture and distill: VIF, summed over both sources."""
    qabf_weight: float = 4.0
    """Stages picture and distill: Qabf."""
    scd_weight: float = 0.3
    """Stages picture and distill: SCD."""
    brightness_weight: float = 15.0
    """Stages picture and distill: L1 between the mean brightness of squares of 32 pixels and the teacher's. Without it
    the picture becomes a copy of one source, which these measures like best."""
    class_maps_weight: float = 0.0
    """Stages picture and distill: Kullback-Leibler divergence of the class maps from the teacher's, its mean over
    latent cells. Makes a step three times as long."""
    latents_weight: float = 1.0
    """Stage distill: mean squares between E_i's latents and the teacher's, in parts of their variance."""
    teacher_weight: float = 0.4
    """Cross-entropy of the auxiliary head to data.teacher_labels, where there are any."""
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
class DataConfig(Bounded):
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
    labels_map: dict[int, int] = field(default_factory=dict)
    """Id in the label files: class id, or 255 to leave its pixels out; wins over labels_map of the class file. Short:
    --labels-map 255:1, --ignore 7."""
    absent_classes: bool = False
    """Train although a class has no pixel in the training split: it will never be predicted."""
    align: str | None = None
    """rig.json of `fusionsam align`, or auto to find one in the training pairs: for cameras that see apart. Labels are
    in the visible camera's frame; where infrared does not reach, its token of a missing camera learns."""
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
    partial_absence: float = 0.0
    """Of pairs that keep both cameras: probability that one, mostly infrared, reaches a part of the picture alone, as
    with --align where its view is narrower; the rest is marked as without it."""
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
    teacher_labels: str | None = None
    """Folder of label maps ID.png that networks of other classes gave for the training pairs, 255 = unsure; a pair may
    have none. An auxiliary head learns them from the features of the classification head, and is then dropped."""
    teacher_classes: int = 20
    """How many classes the maps of teacher_labels have: ids 0 to one less."""
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
class TrainConfig(Bounded):
    """The optimisation."""

    section: ClassVar[str] = "train"

    stage: Literal["segmentation", "tokenizer", "steering", "picture", "distill"] = "segmentation"
    """Joint training (stage 2), LSTG alone as a VQ-GAN (stage 1), or parts of the frozen network of model.start_from
    (where all other settings of `model` come from): steering, by clicks that name a class; the picture head, by the
    measures of fused pictures; or those of `distill`, by a teacher. The last two need no label."""
    distill: list[Literal["tokenizer", "picture_head", "image_encoder"]] | None = None
    """Stage distill: the parts that learn; null = all three. tokenizer: E_i, by the teacher's latents. picture_head: as
    in stage picture. image_encoder: all of it, to give the teacher's class maps with the others."""
    teacher: str | None = None
    """Stages picture and distill: the checkpoint whose latents, brightness and class maps are kept; null =
    model.start_from."""
    new_picture_head: bool = False
    """Stages picture and distill: a random head with the picture_ settings of model.fusion learns in the place of the
    stored one."""
    new_encoders: bool = False
    """Stage distill: random E_i with the encoder_width and separable of model.tokenizer learn in the place of the
    stored ones."""
    steering_pairs: int = 500
    """Stage steering: varied training pairs whose features are kept in memory (2 MB each at data.crop 256x320)."""
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
    """Factor on the rate of the image encoder's backbones, in stage distill of all of it; else what joins them to the
    rest is new."""
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
    freeze_picture: bool = False
    """Joint training: LSTG, FMP and the picture head stay as model.start_from has them, and with them the picture."""
