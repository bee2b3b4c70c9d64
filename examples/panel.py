"""Three pictures of the documentation: `python examples/panel.py` draws docs/panel.png, docs/reconstruction.png and
docs/conditions.png from the synthetic pairs."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusionsam import FusionSAM
from fusionsam.evaluation.reconstruct import error_map
from fusionsam.evaluation.robustness import disturb
from fusionsam.inference.render import side_by_side
from fusionsam.metrics.reconstruction import psnr


def as_picture(image: Tensor) -> np.ndarray:
    """(1,C,H,W) in [0,1] -> uint8 (H,W,3)."""
    return (255 * image.clamp(0, 1)).round().byte()[0].expand(3, -1, -1).permute(1, 2, 0).numpy()


CONDITIONS = ("full", "objects a third as large", "coarse infrared", "black-hot infrared", "infrared shifted 16 px")


def disturbed(model: FusionSAM, visible: Tensor, infrared: Tensor, name: str) -> list[tuple[str, np.ndarray]]:
    """What the checkpoint makes of (1,3,H,W) and (1,1,H,W) under each of CONDITIONS."""
    found = []
    for condition in CONDITIONS:
        light, heat = (as_picture(image[None]) for image in disturb(condition, visible[0], infrared[0], name))
        out = model.predict(light, heat[:, :, 0])
        found += [(f"{name}: {condition}", np.asarray(out.overlay()))]
    return found


def save(panels: list[tuple[str, np.ndarray]], columns: int, name: str) -> None:
    picture = side_by_side(panels, columns=columns)
    picture.thumbnail((1600, 1600))
    picture.save(Path(__file__).parents[1] / "docs" / name, optimize=True)


if __name__ == "__main__":
    root = Path(__file__).parent
    model = FusionSAM.from_pretrained("tiny")
    panels, rebuilt_panels, conditions = [], [], []
    for name in ("day", "night"):
        paths = [root / "pairs" / folder / f"{name}.png" for folder in ("visible", "infrared")]
        out = model.predict(*paths)
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        legend = np.asarray(out.overlay())
        titles = (f"visible, {name}", "infrared", "fused", "classes")
        panels += list(zip(titles, [*pictures, out.fused, legend], strict=True))
        images = model.preprocess(*paths)
        conditions += disturbed(model, *images, name)
        for index, image in enumerate(images):
            assert image is not None
            with torch.no_grad():
                rebuilt, _ = model.network.tokenizer.rebuild(index, image)
            kind = ("visible", "infrared")[index]
            rebuilt_panels += [
                (f"{kind}, {name}", as_picture(image)),
                (f"from its codes, {psnr(image, rebuilt):.1f} dB", as_picture(rebuilt)),
                ("error", as_picture(error_map(image, rebuilt)[None] / 255)),
            ]
    save(panels, 4, "panel.png")
    save(rebuilt_panels, 6, "reconstruction.png")
    save(conditions, 5, "conditions.png")
