"""What a prediction gives: arrays at the input's own size, and their summary."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fusionsam.inference.prompts import prompts_to_json
from fusionsam.inference.render import overlay
from fusionsam.types import Prompts


@dataclass
class Prediction:
    """What one pair gives, as plain arrays at the input's own size."""

    fused: NDArray[np.uint8]  # (H,W,3) RGB
    labels: NDArray[np.uint8]  # (H,W) class ids
    confidence: NDArray[np.float32]  # (H,W) probability of the class that was chosen, 0..1
    prompts: Prompts  # what steered SAM, in pixels of the input; batch of one
    classes: list[str]
    palette: list[tuple[int, int, int]]
    seconds: float  # the network's own time, copies from the device included
    input: dict[str, object] = field(
        default_factory=dict
    )  # how the infrared picture was read: range, palette, polarity

    def overlay(self, legend: bool = True, show_prompts: bool = False) -> Image.Image:
        """The fused picture with the class colours, and a legend of the classes that occur."""
        shown = self.prompts if show_prompts else None
        return overlay(self.fused, self.labels, self.classes, self.palette, legend=legend, prompts=shown)

    def summary(self) -> dict[str, object]:
        """Pixel share (percent) and mean confidence (0..1) of each class that occurs, prompts, seconds: JSON types."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        sums = np.bincount(self.labels.ravel(), weights=self.confidence.ravel(), minlength=len(self.classes))
        return {
            "size": list(self.labels.shape),
            "classes": {
                name: {
                    "id": index,
                    "share": round(100 * float(counts[index]) / self.labels.size, 4),
                    "mean_confidence": round(float(sums[index] / counts[index]), 4),
                }
                for index, name in enumerate(self.classes)
                if counts[index]
            },
            "prompts": prompts_to_json(self.prompts),
            "seconds": round(self.seconds, 4),
        }
