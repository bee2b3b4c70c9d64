"""The picture in the README: `python examples/panel.py` draws docs/panel.png from the two synthetic pairs."""

from pathlib import Path

import numpy as np
from PIL import Image

from fusionsam import FusionSAM
from fusionsam.render import side_by_side

if __name__ == "__main__":
    root = Path(__file__).parent
    model = FusionSAM.from_pretrained("tiny")
    panels = []
    for name in ("day", "night"):
        paths = [root / "pairs" / folder / f"{name}.png" for folder in ("visible", "infrared")]
        out = model.predict(*paths)
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        legend = np.asarray(out.overlay())
        titles = (f"visible, {name}", "infrared", "fused", "classes")
        panels += list(zip(titles, [*pictures, out.fused, legend], strict=True))
    picture = side_by_side(panels, columns=4)
    picture.thumbnail((1600, 1600))
    picture.save(root.parent / "docs" / "panel.png", optimize=True)
