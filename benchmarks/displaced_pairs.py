"""What misaligned cameras cost in mIoU, and what `--align auto` gives back: labelled pairs with infrared displaced by a
hidden rig (scale 0.8, 30 pixels, 3 degrees, another size), and the same merely stretched over the visible frame.

    python benchmarks/displaced_pairs.py --root ../shared/data/mfnet417 --split val26 --out out/displaced
    fusionsam evaluate --dataset mfnet --root ../shared/data/mfnet417 --split val26 --weights tiny \\
        --out out/displaced/as_given
    fusionsam evaluate --dataset pairs --class-file out/displaced/classes.yaml --root out/displaced/stretched \\
        --split all --train-split none --weights tiny --out out/displaced/without
    fusionsam evaluate --dataset pairs --class-file out/displaced/classes.yaml --root out/displaced/displaced \\
        --split all --train-split none --weights tiny --align auto --out out/displaced/with

Nothing of the pairs is drawn at random: every run writes the same files.
"""  # fmt: skip

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from fusionsam.alignment.geometry import Size, centre, similarity
from fusionsam.alignment.orientation import resized
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.config.datasets import DatasetRow
from fusionsam.data.dataset import open_split
from fusionsam.data.images import write_png
from fusionsam.types import InputError, Sample

SCALE, SHIFT, TURN = 0.8, 30.0, 3.0


def write_classes(out: Path, row: DatasetRow) -> None:
    """out/classes.yaml, as --class-file takes it."""
    classes = {"classes": list(row.classes), "palette": [list(color) for color in row.palette]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.yaml").write_text(yaml.safe_dump(classes))


def write_pair(folder: Path, sample: Sample, heat: Tensor) -> None:
    """A labelled pair with another infrared picture, as a folder of the data set `pairs`."""
    assert sample.visible is not None
    assert sample.label is not None
    write_png(folder / "visible" / f"{sample.id}.png", sample.visible)
    write_png(folder / "infrared" / f"{sample.id}.png", heat)
    write_png(folder / "labels" / f"{sample.id}.png", sample.label.to(torch.uint8))


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mfnet")
    parser.add_argument("--root", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    data = open_split(args.dataset, args.root, args.split)
    assert data.row is not None
    write_classes(args.out, data.row)
    for index in tqdm(range(len(data))):
        sample = data[index]
        assert sample.infrared is not None
        size = sample.size
        other: Size = (round(size[0] * SCALE), round(size[1] * SCALE))
        x, y = centre(other)
        step = SHIFT * SCALE / np.sqrt(2)
        matrix = similarity(SCALE, TURN, centre(size), (x + step, y - step))
        infrared = Warp(Rig(size, other, np.linalg.inv(matrix)), "infrared")
        # the rig's infrared camera sees what the aligned picture shows: from the visible frame into its own
        moved = infrared(sample.infrared).image
        stretched = resized(moved.float(), size).round().clamp(0, 255).to(torch.uint8)
        for kind, heat in (("displaced", moved), ("stretched", stretched)):
            write_pair(args.out / kind, sample, heat)
    print(f"{len(data)} pairs in {args.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
