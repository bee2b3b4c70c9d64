"""A whole experiment, every default once.

A YAML file or a flag overrides any field; the resolved configuration is stored in every checkpoint. The settings of the
network stand in `config.model`, those of a training in `config.training`, both are to be had from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fusionsam.config.model import (
    DecoderConfig,
    EncoderConfig,
    FusionConfig,
    HeadConfig,
    ModelConfig,
    PromptConfig,
    SteeringConfig,
    TokenizerConfig,
)
from fusionsam.config.plain import RETIRED, from_dict, to_dict
from fusionsam.config.presets import PRESETS, preset
from fusionsam.config.training import DataConfig, LossConfig, TrainConfig
from fusionsam.types import InputError

__all__ = [
    "PRESETS",
    "RETIRED",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "FusionConfig",
    "HeadConfig",
    "LossConfig",
    "ModelConfig",
    "PromptConfig",
    "SteeringConfig",
    "TokenizerConfig",
    "TrainConfig",
    "from_dict",
    "preset",
    "to_dict",
]


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
