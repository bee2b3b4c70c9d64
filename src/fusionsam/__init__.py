"""FusionSAM: fuse a visible and a thermal image into one picture and label every pixel.

>>> from fusionsam import FusionSAM  # doctest: +SKIP
>>> out = FusionSAM.from_pretrained("tiny").predict("visible.png", "infrared.png")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fusionsam.types import VERSION as __version__

if TYPE_CHECKING:
    from fusionsam.alignment.rig import Rig
    from fusionsam.config.load import read_settings as load_config
    from fusionsam.config.schema import Config, ModelConfig, preset
    from fusionsam.evaluation.report import Report
    from fusionsam.evaluation.run import evaluate
    from fusionsam.inference.prediction import Prediction
    from fusionsam.inference.predictor import FusionSAM
    from fusionsam.inference.session import Session
    from fusionsam.training.run import train
    from fusionsam.types import InputError, Prompts

# Imported on first use, so that `fusionsam --help` answers before torch has been loaded.
_HOMES = {
    "Config": "config.schema",
    "FusionSAM": "inference.predictor",
    "InputError": "types",
    "ModelConfig": "config.schema",
    "Prediction": "inference.prediction",
    "Prompts": "types",
    "Report": "evaluation.report",
    "Rig": "alignment.rig",
    "Session": "inference.session",
    "evaluate": "evaluation.run",
    "load_config": "config.load:read_settings",
    "preset": "config.schema",
    "train": "training.run",
}
__all__ = [
    "Config",
    "FusionSAM",
    "InputError",
    "ModelConfig",
    "Prediction",
    "Prompts",
    "Report",
    "Rig",
    "Session",
    "__version__",
    "evaluate",
    "load_config",
    "preset",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusionsam' has no attribute {name!r}")
    home, _, own_name = _HOMES[name].partition(":")
    return getattr(import_module(f"fusionsam.{home}"), own_name or name)


def __dir__() -> list[str]:
    return sorted(__all__)
