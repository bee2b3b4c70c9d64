"""How far a data set's own pairs lie off: one homography a block of frames, found from its pairs, from the identity.

    python benchmarks/own_offset.py --root ../shared/data/mfnet417 --out results/own_offset.json

A block is a hundred frame numbers of one time of day (MFNet's ids count its frames). From each up to eight pairs are
taken, the sharpest and most varied. Told are the moves of the four corners in pixels, clockwise from the top left,
and the score before and after; pairs that were not used tell whether it holds (`held_out`).

Does it gain anything? `--corrected DIR` writes the validation pairs with infrared moved by the homography (pairs
of a block that is too small stay as they are), and as they are, to be evaluated beside one another:

    python benchmarks/own_offset.py --root ../shared/data/mfnet417 --out out/own_offset.json --corrected out/own
    for kind in as_given corrected; do
    fusionsam evaluate --dataset pairs --class-file out/own/classes.yaml --root out/own/$kind --split all \\
        --train-split none --weights tiny --out out/own/report_$kind
    done
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from displaced_pairs import write_classes, write_pair
from tqdm import tqdm

from fusionsam.alignment.choose import candidate, choose
from fusionsam.alignment.estimate import STIFFNESS, working
from fusionsam.alignment.geometry import Size, apply, corners
from fusionsam.alignment.refine import Level, refine
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.data.dataset import open_split, read_sample
from fusionsam.data.splits import Entry, entries
from fusionsam.io import commit, write_json
from fusionsam.types import InputError

PAIRS, LOOKED, BLOCK, FEWEST = 8, 16, 100, 4


class Block(TypedDict):
    """What is told of one block."""

    pairs: int
    score: list[float]  # as they lie, and after
    held_out: list[float]  # the same of pairs that were not used
    corners: list[list[float]]  # x, y by which infrared's corners have to move, pixels
    mean_pixels: float
    infrared_to_visible: list[list[float]]


def block_of(id: str) -> str:
    """00312D -> 00300D."""
    return f"{int(id[:5]) // BLOCK * BLOCK:05d}{id[5]}"


def blocks(listed: list[Entry]) -> dict[str, list[Entry]]:
    """Entries by hundreds of their frame numbers and time of day; those of few pairs are left out."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in listed:
        found[block_of(entry.id)].append(entry)
    return {name: members for name, members in sorted(found.items()) if len(members) >= 2 * FEWEST}


def measured(members: list[Entry]) -> Block:
    """One block."""
    step = max(1, len(members) // LOOKED)
    samples = [read_sample(entry) for entry in members[::step][:LOOKED]]
    pictures = [(s.visible, s.infrared) for s in samples if s.visible is not None and s.infrared is not None]
    used = choose([candidate(*pair) for pair in pictures], min(PAIRS, len(pictures) - FEWEST))
    rest = [index for index in range(len(pictures)) if index not in used]
    size: Size = samples[0].size
    start = np.eye(3)

    def level(indices: list[int]) -> Level:
        ready = [(working(pictures[i][0], True), working(pictures[i][1], False)) for i in indices]
        return Level(torch.stack([v for v, _ in ready]), torch.stack([t for _, t in ready]), start, 256)

    fitted, held = level(used), level(rest)
    found = refine(fitted, size, start, 24, 8, 1.0, STIFFNESS)
    # the matrix leads from visible to infrared: where infrared's corners belong is its inverse
    back = np.linalg.inv(found.matrix)
    moves = apply(back, corners(size)) - corners(size)

    def score(of: Level, matrix: np.ndarray) -> float:
        with torch.no_grad():
            return round(float(of.score(torch.from_numpy(matrix))[0]), 4)

    return {
        "pairs": len(used),
        "score": [score(fitted, start), score(fitted, found.matrix)],
        "held_out": [score(held, start), score(held, found.matrix)],
        "corners": [[round(float(value), 1) for value in move] for move in moves],
        "mean_pixels": round(float(np.linalg.norm(moves, axis=1).mean()), 2),
        "infrared_to_visible": (back / back[2, 2]).tolist(),
    }


def write_corrected(root: str, found: dict[str, Block], out: Path) -> int:
    """The validation pairs in out/as_given and, moved, in out/corrected; how many were moved."""
    data = open_split("mfnet", root, "val")
    assert data.row is not None
    write_classes(out, data.row)
    count = 0
    for index in tqdm(range(len(data))):
        sample = data[index]
        assert sample.infrared is not None
        heat = sample.infrared
        if block := found.get(block_of(sample.id)):
            heat = Warp(Rig(sample.size, sample.size, np.array(block["infrared_to_visible"])))(heat).image
            count += 1
        write_pair(out / "as_given", sample, sample.infrared)
        write_pair(out / "corrected", sample, heat)
    return count


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="MFNet's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corrected", type=Path, metavar="DIR", help="write the validation pairs there, see above")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    listed = [entry for split in ("train", "val") for entry in entries("mfnet", args.root, split)]
    found = {name: measured(members) for name, members in tqdm(blocks(listed).items())}
    for name, block in found.items():
        print(name, block)
    means = np.array([block["mean_pixels"] for block in found.values()])
    told: dict[str, object] = {
        "command": shlex.join(["python", "benchmarks/own_offset.py", *argv]),
        "commit": commit(),
        "mean_pixels": {"least": float(means.min()), "median": float(np.median(means)), "largest": float(means.max())},
        "blocks": found,
    }
    if args.corrected is not None:
        told["corrected"] = write_corrected(args.root, found, args.corrected)
    write_json(args.out, told)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
