"""What the style of infrared pictures alone costs: the same pairs as they are stored, and with haze removed by the dark
channel, as MSRS's infrared was made.

python benchmarks/infrared_style.py --root ../shared/data/mfnet417 --split val26 [--weights tiny] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from fusionsam.data.dataset import open_labelled_split
from fusionsam.data.infrared_styles import remove_haze
from fusionsam.data.transforms import to_unit
from fusionsam.inference.predictor import FusionSAM
from fusionsam.io import write_json
from fusionsam.metrics.segmentation import PROTOCOLS, ConfusionMatrix, iou, plain
from fusionsam.weights.checkpoint import commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--split", default="val26")
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = FusionSAM.from_pretrained(args.weights, calibrated=False)
    data = open_labelled_split("mfnet", args.root, args.split)
    matrices = {style: ConfusionMatrix(data.num_classes) for style in ("as stored", "haze removed")}
    for index in tqdm(range(len(data))):
        sample = data[index]
        assert sample.visible is not None
        assert sample.infrared is not None
        light, heat = to_unit(sample.visible)[None], to_unit(sample.infrared)
        for style, seen in (("as stored", heat), ("haze removed", remove_haze(heat))):
            matrices[style].update(model.infer(light, seen[None]).logits.argmax(1)[0], sample.label)
    rows = {
        style: {
            "miou": round(float(PROTOCOLS["present"](matrix.matrix).miou), 2),
            "per_class_iou": dict(zip(data.row.classes, plain((100 * iou(matrix.matrix)).round(2)), strict=True)),
        }
        for style, matrix in matrices.items()
    }
    command = shlex.join(["python", *sys.argv])
    found = {"command": command, "commit": commit(), "weights": args.weights, "split": args.split, "rows": rows}
    for style, row in rows.items():
        print(f"{style}: {row['miou']} {row['per_class_iou']}")
    if args.out is not None:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
