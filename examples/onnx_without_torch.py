"""Predict a pair with nothing but numpy, pillow and onnxruntime; copy this file and the ONNX file to any machine.

fusionsam export --weights tiny --out onnx   # once, where the package is installed
python examples/onnx_without_torch.py --model onnx/fusionsam.onnx --visible rgb.png --infrared thermal.png --out out
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def read(path: Path, mode: str) -> np.ndarray:
    """(H, W, 3) or (H, W) in [0, 1] of a picture of 8 bits; exit code 2 for a deeper one, which would be cut off."""
    with Image.open(path) as picture:
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            print(f"{path}: has more than 8 bits (mode {picture.mode}); make 8 bits of it first, by the range of the "
                  "scene as `fusionsam predict` does", file=sys.stderr)  # fmt: skip
            raise SystemExit(2)
        return np.asarray(picture.convert(mode), np.float32) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict a pair with ONNX Runtime alone.")
    parser.add_argument("--model", type=Path, required=True, help="fusionsam.onnx")
    parser.add_argument("--visible", type=Path, required=True)
    parser.add_argument("--infrared", type=Path, required=True, help="8 bit, one channel, warm is bright")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    session = onnxruntime.InferenceSession(str(args.model))
    facts = json.loads(session.get_modelmeta().custom_metadata_map["fusionsam"])

    visible, infrared = read(args.visible, "RGB"), read(args.infrared, "L")
    if visible.shape[:2] != infrared.shape:
        sizes = f"{visible.shape[1]}x{visible.shape[0]}, {args.infrared} {infrared.shape[1]}x{infrared.shape[0]} pixels"
        parser.error(f"{args.visible} is {sizes}; expected one aligned size")
    images = {"visible": visible.transpose(2, 0, 1)[None], "infrared": infrared[None, None]}
    fused, logits = session.run(["fused", "logits"], images)
    labels = logits[0].argmax(0).astype(np.uint8)

    args.out.mkdir(parents=True, exist_ok=True)
    picture = (fused[0].transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(picture).save(args.out / "fused.png")
    Image.fromarray(labels).save(args.out / "labels.png")
    Image.fromarray(np.array(facts["palette"], np.uint8)[labels]).save(args.out / "colors.png")
    for index, name in enumerate(facts["classes"]):
        if (share := 100 * (labels == index).mean()) > 0:
            print(f"{name}: {share:.2f} %")


if __name__ == "__main__":
    main()
