"""The smallest and largest value of every number in the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fusionsam.types import LARGEST, SMALLEST, InputError


def _numbers() -> dict[str, tuple[float, float]]:
    """Full name of a setting -> smallest and largest value, of each part where it has several."""
    sections: dict[tuple[float, float], dict[str, str]] = {
        (0, math.inf): {
            "model.tokenizer": "blocks encoder_width separable codebook_tokens dead_code_threshold commitment_beta",
            "model.prompts": "separation",
            "model.head": "pyramid",
            "model.steering": "width",
            "loss": "dice_weight fot_weight prompt_weight fusion_weight intensity_weight gradient_weight color_weight "
            "ssim_weight vif_weight qabf_weight scd_weight brightness_weight class_maps_weight latents_weight "
            "teacher_weight reconstruction_weight commitment_weight perceptual_weight adversarial_weight "
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
            "train": "max_steps batch_size steering_pairs validate_every num_nodes discriminator_width "
            "discriminator_stages",
        },
        (1, 64): {"model.fusion": "kv_stride query_stride"},
        (1, 255): {"data": "teacher_classes"},
        (2, math.inf): {"model.tokenizer": "width", "model.fusion": "picture_width"},
        (0, 1): {
            "model.tokenizer": "ema_decay",
            "model.prompts": "threshold dropout",
            "model.head": "dropout",
            "loss": "reconstruction_share perceptual_share",
            "data": "flip photometric harsh infrared_style night rare_crop rare_sampling paste partial_absence "
            "extra_share",
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


BOUNDS = _numbers()


@dataclass  # jsonargparse takes a class for settings only if its bases are such, too
class Bounded:
    """A section of the settings whose numbers are held to `BOUNDS`."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        """InputError for a number out of its bounds, named as the user typed it."""
        for key, value in vars(self).items():
            low, high = BOUNDS.get(f"{self.section}.{key}", (-math.inf, math.inf))
            parts = value if isinstance(value, tuple | list) else [value]
            numbers = [part for part in parts if isinstance(part, int | float)]
            if not all(low <= part <= high and math.isfinite(part) for part in numbers):
                wanted = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
                wanted = wanted if math.inf not in numbers else f"a finite number, {wanted}"
                raise InputError(f"{self.section}.{key}: {value}; expected {wanted}")
