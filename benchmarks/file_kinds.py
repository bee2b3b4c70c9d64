"""What nodata, saturated rows, a fire and other forms of deep infrared files change in the person IoU, on real pairs.

The infrared picture of each pair is written as a clean file of 16 bits (counts), and in every other form; each is read
and labelled as `fusionsam predict` does. Both are scored on the pixels whose heat the form left as it was.

python benchmarks/file_kinds.py --root ../shared/data/mfnet417 --ids ID ID ID [--weights tiny] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.config.datasets import find
from fusionsam.data.dataset import read_sample
from fusionsam.data.images import write_png
from fusionsam.data.splits import Entry, entries
from fusionsam.inference.predictor import FusionSAM
from fusionsam.io import commit, write_json

Array = NDArray[np.generic]
BORDER = 0.126
"""Of each side: what is inside has 56 % of the pixels, as in a picture registered to a wider camera."""
GDAL_NODATA = 42113


def _border(counts: Array, value: float) -> Array:
    height, width = (round(BORDER * side) for side in counts.shape)
    out = np.full_like(counts, value)
    out[height:-height, width:-width] = counts[height:-height, width:-width]
    return out


def _resampled(counts: Array) -> Array:
    shifted = ndimage.shift(_border(counts, 0).astype(np.float32), 0.4, order=1).round().astype(np.uint16)
    inside = ndimage.binary_erosion(_border(counts, 0) > 0, iterations=2)
    return np.where(inside, counts, shifted)  # mixed with nodata at its edge alone, so that the heat stays comparable


def _saturated(counts: Array) -> Array:
    out = counts.copy()
    out[20:24], out[:, 100] = 65535, 65535
    return out


def _fire(celsius: Array) -> Array:
    glow = np.zeros(celsius.shape)
    height, width = celsius.shape
    glow[: height // 7, : width // 7] = 1
    glow = ndimage.gaussian_filter(glow, 1.5)
    noise = np.random.default_rng(0).normal(0, 20, celsius.shape)
    return (celsius * (1 - glow) + (400 + noise) * glow).astype(np.float32)


def _celsius(counts: Array) -> Array:
    return (counts.astype(np.float32) / 100 - 200).astype(np.float32)


KINDS: dict[str, Callable[[Array], tuple[Array, str | None]]] = {
    "44 % border of 0": lambda counts: (_border(counts, 0), None),
    "44 % border of 0, resampled": lambda counts: (_resampled(counts), None),
    "44 % border of 65535": lambda counts: (_border(counts, 65535), None),
    "44 % border of -32768": lambda counts: (_border(counts.astype(np.int16), -32768), None),
    "44 % border of NaN": lambda counts: (_border(_celsius(counts), np.nan), None),
    "44 % border of -9999": lambda counts: (_border(_celsius(counts), -9999), None),
    "44 % border declared by GDAL": lambda counts: (_border(_celsius(counts), 7), "7"),
    "saturated rows": lambda counts: (_saturated(counts), None),
    "a fire on 2 %": lambda counts: (_fire(_celsius(counts)), None),
    "12 bits": lambda counts: ((counts - 20000) >> 1, None),
    "degrees Celsius": lambda counts: (_celsius(counts), None),
}


def labelled(model: FusionSAM, folder: Path, visible: Path, heat: Array, nodata: str | None = None) -> Array:
    """Class ids (H,W) of the pair, its infrared picture read from a TIFF."""
    tags = [] if nodata is None else [(GDAL_NODATA, "s", 0, nodata, True)]
    tifffile.imwrite(folder / "heat.tif", heat, extratags=tags)
    sample = read_sample(Entry("pair", visible=visible, infrared=folder / "heat.tif"))
    return model.predict(sample.visible, sample.infrared).labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--ids", nargs="+", required=True)
    parser.add_argument("--weights", default="tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, row = FusionSAM.from_pretrained(args.weights, "cpu"), find("mfnet")
    person = row.classes.index("person")
    counted = {kind: np.zeros((2, 2), np.int64) for kind in KINDS}  # (clean, this kind) x (intersection, union)
    left = {entry.id: entry for entry in entries("mfnet", args.root, args.split)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for id in args.ids:
            sample = read_sample(left[id], row)
            assert sample.visible is not None
            assert sample.infrared is not None
            assert sample.label is not None
            write_png(folder / "visible.png", sample.visible)
            counts = 21000 + 16 * sample.infrared[0].numpy().astype(np.uint16)
            truth = sample.label.numpy() == person
            clean = labelled(model, folder, folder / "visible.png", counts) == person
            for kind, form in KINDS.items():
                heat, nodata = form(counts)
                found = labelled(model, folder, folder / "visible.png", heat, nodata) == person
                untouched = _untouched(kind, counts, heat)
                for place, guess in enumerate((clean, found)):
                    counted[kind][place] += ((truth & guess & untouched).sum(), ((truth | guess) & untouched).sum())
    rows = {}
    for kind, each in counted.items():
        before, after = (100 * inner / outer for inner, outer in each)
        rows[kind] = {"clean": round(before, 2), "kind": round(after, 2), "difference": round(after - before, 2)}
        print(f"{kind:32} {before:6.2f} {after:6.2f} {after - before:+6.2f}")
    command = shlex.join(["python", *sys.argv])
    if args.out is not None:
        told = {"command": command, "commit": commit(), "weights": args.weights, "split": args.split, "ids": args.ids}
        write_json(args.out, {**told, "person_iou": rows})


def _untouched(kind: str, counts: Array, heat: Array) -> Array:
    """bool (H,W): where the form left the heat as it was."""
    if kind == "12 bits":
        return np.ones(counts.shape, bool)
    plain = counts if heat.dtype.kind in "iu" else _celsius(counts)
    return np.abs(heat.astype(np.float64) - plain) < 0.01


if __name__ == "__main__":
    main()
