"""Draws the two synthetic example pairs beside this file: `python examples/make_pairs.py`."""

from pathlib import Path

from fusionsam.data.images import write_png
from fusionsam.data.synthetic.scenes import draw_scene

SCENES = {"day": 0, "night": 3}
SEED = 7

if __name__ == "__main__":
    root = Path(__file__).parent / "pairs"
    for name, index in SCENES.items():
        scene = draw_scene(SEED, index)
        for folder, image in (("visible", scene.visible), ("infrared", scene.infrared)):
            assert image is not None
            (root / folder).mkdir(parents=True, exist_ok=True)
            pixels = image.permute(1, 2, 0).numpy()
            write_png(root / folder / f"{name}.png", pixels if folder == "visible" else pixels[..., 0])
