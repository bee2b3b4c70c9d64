"""Predict a pair with nothing but numpy, pillow and onnxruntime; copy this file and the ONNX file to any machine.

fusionsam export --weights tiny --out onnx   # once, where the package is installed
python examples/onnx_without_torch.py --model onnx/fusionsam.onnx --visible rgb.png --infrared thermal.png --out out
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict a pair with ONNX Runtime alone.")
    parser.add_argument("--model", type=Path, required=True, help="fusionsam.onnx")
    parser.add_argument("--visible", type=Path, required=True)
    parser.add_argument("--infrared", type=Path, required=True, help="8 bit, one channel, warm is bright")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    session = onnxruntime.InferenceSession(str(args.model))
    facts = json.loads(session.get_modelmeta().custom_metadata_map["fusionsam"])

    visible = np.asarray(Image.open(args.visible).convert("RGB"), np.float32) / 255
    infrared = np.asarray(Image.open(args.infrared).convert("L"), np.float32) / 255
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
