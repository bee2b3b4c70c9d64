"""Predict pairs from Python and count what is in them.

python examples/predict.py examples/pairs/visible examples/pairs/infrared --out out/predicted
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from fusionsam import FusionSAM


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict every pair of two folders.")
    parser.add_argument("visible", type=Path, help="folder of visible images")
    parser.add_argument("infrared", type=Path, help="folder of infrared images with the same names")
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("out/predicted"))
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    model = FusionSAM.from_pretrained(args.weights)
    for visible in sorted(args.visible.iterdir()):
        out = model.predict(visible, args.infrared / visible.name)
        Image.fromarray(out.fused).save(args.out / f"{visible.stem}_fused.png")
        out.overlay().save(args.out / f"{visible.stem}_overlay.png")
        found = {name: f"{facts['share']:.2f} %" for name, facts in out.summary()["classes"].items()}
        print(f"{visible.stem}: {found}, {out.seconds:.1f} s")


if __name__ == "__main__":
    main()
