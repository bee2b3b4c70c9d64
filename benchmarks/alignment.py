"""How well a rig is found: hidden rigs are laid over aligned pairs, and taken off again.

    make bench-align
    python benchmarks/alignment.py --root ../shared/data/roadscene --pairs 5 --rigs 40 --out results/alignment.json
    python benchmarks/alignment.py --root ../shared/data/roadscene --pairs 5 --rigs 200 --shuffled --out ...

A rig: the infrared frame is 0.5 to 1.6 times as wide as the visible one (log-uniform), of one of four sizes, turned by
up to 4 degrees, its centre up to 60 pixels off, its corners moved by up to 6 pixels more (perspective), each pair
jittered by up to 2 pixels; the visible picture is 480 x 640. The camera that sees more sees the whole scene. Errors are
in pixels of that picture: at its corners, and over the overlap of the two frames. They hold the data set's own error,
too, enlarged where the visible camera sees a part of the scene alone. `--own` tells how much
of the error no search can take off: `own` is what the same pictures give when it begins at the truth, `net` how far the
result lies from there. Drawn scenes (no `--root`) have no error of their own.

`--barrel 0.1` gives the infrared camera a lens that draws the corners in by 10 % of their distance from the middle, and
lets the search fit two radial terms besides; `--barrel 0.1 --no-lens` fits the homography alone.

`--with ecc` and `--with mutual_information` put OpenCV's findTransformECC and SimpleITK's Mattes mutual information
beside it (pip install opencv-python-headless SimpleITK; one pair, from the frames laid over each other).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionsam.alignment.estimate import STIFFNESS, estimate, working
from fusionsam.alignment.geometry import Matrix, Size, centre, corners, moved_corners, rescaling, similarity
from fusionsam.alignment.judge import judge
from fusionsam.alignment.lens import Lens
from fusionsam.alignment.refine import Level, refine
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.data.dataset import read_sample
from fusionsam.data.splits import Entry, entries
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.io import commit, write_json
from fusionsam.types import InputError

VISIBLE: Size = (480, 640)
INFRARED: tuple[Size, ...] = ((512, 640), (256, 320), (288, 384), (480, 640))
RIGHT, WRONG = 3.0, 15.0
"""Pixels of overlap error up to which a rig is right, and above which it is wrong."""
QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "max": 1.0}
Rng = np.random.Generator
Scenes = Callable[[int], tuple[Tensor, Tensor]]


class Hidden:
    """One rig: the frames that its two cameras see of a scene."""

    def __init__(self, rng: Rng, barrel: float = 0.0) -> None:
        self.ratio = float(np.exp(rng.uniform(np.log(0.5), np.log(1.6))))
        self.size = INFRARED[rng.integers(len(INFRARED))]
        scale = self.size[1] / (VISIBLE[1] * self.ratio)
        x, y = np.array(centre(self.size)) + rng.uniform(-60, 60, 2) * scale
        moves = torch.from_numpy(rng.uniform(-6, 6, (4, 2)))
        turned = similarity(scale, rng.uniform(-4, 4), centre(VISIBLE), (x, y))
        self.matrix: Matrix = turned @ moved_corners(VISIBLE, moves).numpy()
        x, y = centre(self.size)
        half = float(np.hypot(x, y))
        self.lens = Lens(half, half, x, y, (-barrel, 0.0, 0.0, 0.0, 0.0)) if barrel else None

    def pictures(self, visible: Tensor, infrared: Tensor, jitter: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """What the cameras take of an aligned pair; `jitter` x, y in visible pixels."""
        source: Size = (visible.shape[1], visible.shape[2])
        seen = min(1.0, 1 / self.ratio) * 0.97 * min(source[1], source[0] * 4 / 3)
        scene = similarity(seen / VISIBLE[1], 0.0, centre(VISIBLE), centre(source))
        moved = np.array([[1, 0, jitter[0]], [0, 1, jitter[1]], [0, 0, 1.0]])
        heat = scene @ moved @ np.linalg.inv(self.matrix)
        return (
            Warp(Rig(VISIBLE, source, np.linalg.inv(scene)))(visible).image,
            Warp(Rig(self.size, source, np.linalg.inv(heat), self.lens))(infrared).image,
        )

    def own(self, visible: list[Tensor], infrared: list[Tensor]) -> Matrix:
        """The matrix that these pictures give from the truth on, alone of the package's search."""
        one = torch.stack([working(v, True) for v in visible])
        two = torch.stack([working(t, False) for t in infrared])
        size: Size = (one.shape[1], one.shape[2])
        way, back = rescaling(VISIBLE, size), rescaling(self.size, (two.shape[1], two.shape[2]))
        start = back @ self.matrix @ np.linalg.inv(way)
        found = refine(Level(one, two, start, 256), size, start, 24, 8, 1.0, STIFFNESS)
        return np.linalg.inv(back) @ found.matrix @ way

    def errors(self, matrix: Matrix, lens: Lens | None = None, truth: Matrix | None = None) -> tuple[float, float]:
        """Mean distance in visible pixels at the corners, and over the overlap, from the `truth` (the rig itself)."""
        bent = self.lens if truth is None else lens
        real = Rig(VISIBLE, self.size, np.linalg.inv(self.matrix if truth is None else truth), None, bent)
        found = Rig(VISIBLE, self.size, np.linalg.inv(matrix), None, lens)
        y, x = np.mgrid[8 : VISIBLE[0] : 16, 8 : VISIBLE[1] : 16]
        grid = np.stack([x.ravel(), y.ravel()], 1).astype(float)
        there = real.visible_to_infrared(grid)
        grid = grid[((there >= 0) & (there <= np.array(self.size)[::-1] - 1)).all(1)]

        def off(points: NDArray[np.float64]) -> float:
            # where the pixels that are taken for those of `points` really lie
            taken = real.infrared_to_visible_points(found.visible_to_infrared(points))
            return float(np.linalg.norm(taken - points, axis=1).mean())

        return off(corners(VISIBLE)), off(grid)


def scenes(root: str | None, seed: int) -> tuple[Scenes, int]:
    """Aligned pairs of a folder with visible and infrared pictures, or drawn ones; and their number."""
    if root is None:

        def drawn(index: int) -> tuple[Tensor, Tensor]:
            return _both(draw_scene(seed, index, (480, 640)).visible, draw_scene(seed, index, (480, 640)).infrared)

        return drawn, 400
    listed: list[Entry] = entries("pairs", root, "all")

    def read(index: int) -> tuple[Tensor, Tensor]:
        sample = read_sample(listed[index])
        return _both(sample.visible, sample.infrared)

    return read, len(listed)


def _both(visible: Tensor | None, infrared: Tensor | None) -> tuple[Tensor, Tensor]:
    assert visible is not None
    assert infrared is not None
    return visible, infrared


class Answer(NamedTuple):
    """Of one method."""

    matrix: Matrix  # visible to infrared
    score: float
    accepted: bool
    lens: Lens | None = None  # of the infrared camera


def by_orientation(visible: list[Tensor], infrared: list[Tensor], hidden: Hidden, lens: bool) -> Answer:
    """The package's own."""
    ready = [working(v, True) for v in visible], [working(t, False) for t in infrared]
    found = estimate(*ready, VISIBLE, hidden.size, lens)
    return Answer(found.matrix, found.score, judge(found, VISIBLE, hidden.size).accepted, found.lens)


def by_ecc(visible: list[Tensor], infrared: list[Tensor], hidden: Hidden, lens: bool) -> Answer:
    """OpenCV's findTransformECC on the gradients' strength, from the frames laid over each other."""
    import cv2

    factor = np.diag([hidden.size[1] / VISIBLE[1], hidden.size[0] / VISIBLE[0], 1.0])
    one = cv2.cvtColor(visible[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY).astype(np.float32)
    two = cv2.resize(infrared[0][0].numpy(), VISIBLE[::-1]).astype(np.float32)
    edges = [np.hypot(cv2.Sobel(x, cv2.CV_32F, 1, 0), cv2.Sobel(x, cv2.CV_32F, 0, 1)) for x in (one, two)]
    edges = [cv2.GaussianBlur(np.sqrt(x), (0, 0), 3) for x in edges]
    start = np.eye(3, dtype=np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 200, 1e-6)
    try:
        score, matrix = cv2.findTransformECC(edges[0], edges[1], start, cv2.MOTION_HOMOGRAPHY, criteria, None, 5)
    except cv2.error:  # it did not converge
        return Answer(factor, 0.0, False)
    return Answer(factor @ matrix.astype(np.float64), float(score), True)


def by_mutual_information(visible: list[Tensor], infrared: list[Tensor], hidden: Hidden, lens: bool) -> Answer:
    """SimpleITK's Mattes mutual information over three resolutions, affine, from the frames laid over each other."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    fixed = sitk.GetImageFromArray(visible[0].float().mean(0).numpy())
    moving = sitk.GetImageFromArray(infrared[0][0].float().numpy())
    start = sitk.AffineTransform(2)
    factor = np.diag([hidden.size[1] / VISIBLE[1], hidden.size[0] / VISIBLE[0]])
    start.SetMatrix(factor.ravel().tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(50)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.2)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 300)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    method.SetInitialTransform(start, inPlace=True)
    method.Execute(fixed, moving)
    matrix = np.eye(3)
    matrix[:2, :2] = np.array(start.GetMatrix()).reshape(2, 2)
    middle, shift = np.array(start.GetCenter()), np.array(start.GetTranslation())
    matrix[:2, 2] = shift + middle - matrix[:2, :2] @ middle
    return Answer(matrix, -method.GetMetricValue(), True)


METHODS = {"orientation": by_orientation, "ecc": by_ecc, "mutual_information": by_mutual_information}


def trials(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    read, count = scenes(args.root, args.seed)
    if args.pairs * (1 + args.shuffled) > count:
        raise InputError(f"--pairs {args.pairs}: {count} pairs are there; give fewer")
    for number in args.only or range(args.rigs):
        rng = np.random.default_rng([args.seed, number])
        hidden = Hidden(rng, args.barrel)
        ids = rng.choice(count, args.pairs * (1 + args.shuffled), replace=False)
        visible, infrared = [], []
        for first, second in zip(ids[: args.pairs], ids[-args.pairs :], strict=True):
            one, two = read(int(first)), read(int(second))
            jitter = rng.uniform(-2, 2, 2)
            visible.append(hidden.pictures(*one, jitter)[0])
            infrared.append(hidden.pictures(*two, jitter)[1])
        started = time.process_time()
        found = METHODS[args.with_](visible, infrared, hidden, bool(args.barrel) and args.lens)
        seconds = time.process_time() - started
        corner, overlap = hidden.errors(found.matrix, found.lens)
        row = {
            "rig": number, "ratio": round(hidden.ratio, 3), "size": list(hidden.size), "score": round(found.score, 4),
            "accepted": found.accepted, "corner": round(corner, 2), "overlap": round(overlap, 2),
            "seconds": round(seconds, 2),
        }  # fmt: skip
        if args.own:
            own = hidden.own(visible, infrared)
            row |= {"own": round(hidden.errors(own)[1], 2), "net": round(hidden.errors(found.matrix, truth=own)[1], 2)}
        yield row


def summary(rows: list[dict[str, Any]], shuffled: bool) -> dict[str, Any]:
    accepted = np.array([row["accepted"] for row in rows])
    scores = np.array([row["score"] for row in rows])
    told: dict[str, Any] = {
        "rigs": len(rows),
        "accepted_percent": round(100 * float(accepted.mean()), 1),
        "score": [round(float(np.quantile(scores, q)), 3) for q in (0, 0.5, 1)],
        "cpu_seconds": [round(float(np.quantile([row["seconds"] for row in rows], q)), 1) for q in (0.5, 1)],
    }
    if shuffled:
        return told
    overlap, corner = (np.array([row[name] for row in rows]) for name in ("overlap", "corner"))
    for name in "own", "net":
        if name in rows[0]:
            values = np.array([row[name] for row in rows])
            told[f"{name}_pixels"] = {key: _q(values, q) for key, q in QUANTILES.items()}
    return {
        **told,
        "overlap_pixels": {name: _q(overlap, q) for name, q in QUANTILES.items()},
        "corner_pixels": {name: _q(corner, q) for name, q in QUANTILES.items()},
        f"within_{RIGHT:g}_pixels_percent": round(100 * float((overlap <= RIGHT).mean()), 1),
        f"within_{WRONG:g}_pixels_percent": round(100 * float((overlap <= WRONG).mean()), 1),
        f"accepted_above_{WRONG:g}_pixels_percent": round(100 * float((accepted & (overlap > WRONG)).mean()), 1),
    }  # fmt: skip


def _q(values: NDArray[np.float64], q: float) -> float:
    return round(float(np.quantile(values, q)), 2)


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of aligned pairs, as data set `pairs` (default: drawn scenes)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs a rig (default: %(default)s)")
    parser.add_argument("--rigs", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="+", metavar="RIG", help="these rigs alone, by their numbers")
    parser.add_argument("--shuffled", action="store_true", help="infrared of other pairs: all should be refused")
    parser.add_argument("--own", action="store_true", help="measure the data set's own error, too")
    parser.add_argument("--barrel", type=float, default=0.0, help="distortion at the corners, as a share of the radius")
    parser.add_argument("--no-lens", dest="lens", action="store_false", help="with --barrel: fit no lens")
    parser.add_argument("--with", dest="with_", choices=list(METHODS), default="orientation", help="method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="key in the results (default: made of the settings)")
    parser.add_argument("--out", type=Path, help="JSON of results, to which this one is added")
    args = parser.parse_args(argv)
    if args.own and args.barrel:
        raise InputError("--own: is measured without a lens; leave out --barrel")
    torch.set_num_threads(1)
    rows = []
    for row in trials(args):
        rows.append(row)
        print(json.dumps(row), flush=True)
    told = summary(rows, args.shuffled)
    print(json.dumps(told, indent=1))
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.is_file() else {}
        source = "drawn" if args.root is None else Path(args.root).name
        kind = "_shuffled" * args.shuffled + (f"_barrel_{args.barrel:g}" if args.barrel else "")
        kind += "_no_lens" * (not args.lens) + ("" if args.with_ == "orientation" else f"_{args.with_}")
        known[args.name or f"{source}_{args.pairs}{kind}"] = {
            "command": shlex.join(["python", "benchmarks/alignment.py", *argv]),
            "commit": commit(),
            "seed": args.seed,
            "machine": f"{platform.machine()}, 1 thread, CPU time",
            **told,
            "wrong": [row for row in rows if not args.shuffled and row["overlap"] > RIGHT],
        }
        write_json(args.out, known)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
