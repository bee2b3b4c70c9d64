"""FusionSAM: fuse a visible and a thermal image into one picture and label every pixel.

>>> from fusionsam import FusionSAM  # doctest: +SKIP
>>> out = FusionSAM.from_pretrained("tiny").predict("visible.png", "infrared.png")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionsam.config.schema import Config, ModelConfig, preset
    from fusionsam.errors import InputError
    from fusionsam.inference.predictor import FusionSAM, Prediction
    from fusionsam.types import Prompts

__version__ = "0.1.0"

# Imported on first use, so that `fusionsam --help` answers before torch has been loaded.
_HOMES = {
    "Config": "config.schema",
    "FusionSAM": "inference.predictor",
    "InputError": "errors",
    "ModelConfig": "config.schema",
    "Prediction": "inference.predictor",
    "Prompts": "types",
    "preset": "config.schema",
}
__all__ = ["Config", "FusionSAM", "InputError", "ModelConfig", "Prediction", "Prompts", "preset"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusionsam' has no attribute {name!r}")
    return getattr(import_module(f"fusionsam.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
