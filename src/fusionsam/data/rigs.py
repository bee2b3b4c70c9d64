"""A rig from the pairs of a folder: which of them are looked at, and what was thought of the result."""

from __future__ import annotations

import itertools
import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from fusionsam.alignment.apply import Aligner, Frame
from fusionsam.alignment.calibration import Camera, read_camera
from fusionsam.alignment.choose import Candidate, candidate, choose
from fusionsam.alignment.estimate import Estimate, estimate, working
from fusionsam.alignment.geometry import Size
from fusionsam.alignment.judge import Verdict, judge
from fusionsam.alignment.lens import Lens
from fusionsam.alignment.maker import MAKER, MakerAligner
from fusionsam.alignment.picture import sheet
from fusionsam.alignment.points import read_points, rig_from_points
from fusionsam.alignment.rig import Rig, read_rig
from fusionsam.alignment.warp import Warp, undistorted
from fusionsam.data.dataset import read_pictures
from fusionsam.data.splits import Entry
from fusionsam.data.storage import Folder
from fusionsam.types import InputError, JsonObject

AUTO = "auto"
UNRELATED = 0.1
"""Median score below which a rig is thought to be of other cameras."""
PAIRS = 8
"""Pairs that a rig is found from."""
CANDIDATES = 48
"""Pairs, evenly spaced, that are looked at to choose from."""
STRIDE = 25
"""Most frames of a film from one that is looked at to the next: a second."""


@dataclass
class Fit:
    """A rig, whether it is believed, and the pair to look at."""

    rig: Rig
    verdict: Verdict
    estimate: Estimate
    shown: Entry  # of the pairs that were used the one that fits in the middle


@dataclass(frozen=True)
class Cameras:
    """What is known of the two cameras beforehand, from calibration files."""

    visible: Camera | None = None
    infrared: Camera | None = None

    def lenses(self, visible: Size, infrared: Size) -> tuple[Lens | None, Lens | None]:
        """For pictures of these sizes (H, W); InputError for other shapes."""
        one, two = self.visible, self.infrared
        return None if one is None else one.lens_for(visible), None if two is None else two.lens_for(infrared)

    def notes(self) -> list[str]:
        """What a person should know of how the files were read."""
        return [note for camera in (self.visible, self.infrared) if camera is not None for note in camera.notes()]


UNKNOWN = Cameras()


def read_cameras(visible: str | None, infrared: str | None) -> Cameras:
    """From calibration files as `calibration.read_camera` takes them. InputError as there."""
    one, two = (None if source is None else read_camera(source) for source in (visible, infrared))
    return Cameras(one, two)


def fit(entries: Sequence[Entry], pairs: int = PAIRS, lens: bool = False, cameras: Cameras = UNKNOWN) -> Fit:
    """Find the rig of entries that have both pictures. InputError where none has, where sizes differ from pair to pair,
    and where none can be read; a rig that is not believed is returned all the same: see its verdict.
    With `lens` the infrared lens's distortion is found, too; that of `cameras` is taken off before."""
    both = [entry for entry in entries if entry.rgbt is not None or (entry.visible and entry.infrared)]
    if not both and any(entry.radiometric for entry in entries):
        raise InputError("align: radiometric files lie as their maker wrote; --align maker refines each of them")
    if not both:
        raise InputError("align: no pair has both a visible and an infrared picture; give both folders")
    step = max(1, -(-len(both) // CANDIDATES))
    looked, skipped = [], []
    for entry in both[::step]:
        try:
            looked.append(_Looked.at(entry, *_read(entry), cameras))
        except InputError as error:
            skipped.append(str(error))
    if not looked:
        raise InputError(f"align: none of {len(skipped)} pairs can be read; the first: {skipped[0]}")
    return _fit(looked, pairs, skipped, lens, cameras)


def fit_frames(
    frames: Iterable[tuple[torch.Tensor, torch.Tensor]], count: int | None = None, pairs: int = PAIRS
) -> Fit:
    """As `fit`, from frames of two films: uint8 (3,H,W) and (1,H',W') each, of one size, of which every STRIDE-th is
    looked at, and more of them where the films have a small `count` of frames. InputError for films without a frame."""
    stride = STRIDE if count is None else max(1, min(STRIDE, count // CANDIDATES))
    chosen = itertools.islice(frames, 0, CANDIDATES * stride, stride)
    looked = [_Looked.at(Entry(f"frame{number * stride:05d}"), *pair) for number, pair in enumerate(chosen)]
    if not looked:
        raise InputError("align: the films hold no frame; give others")
    return _fit(looked, pairs, [])


@dataclass
class _Looked:
    """What is kept of a pair that was read."""

    entry: Entry
    candidate: Candidate
    visible: torch.Tensor  # as `working` makes them
    infrared: torch.Tensor
    sizes: tuple[Size, Size]

    @classmethod
    def at(cls, entry: Entry, visible: torch.Tensor, infrared: torch.Tensor, cameras: Cameras = UNKNOWN) -> _Looked:
        sizes = (visible.shape[1], visible.shape[2]), (infrared.shape[1], infrared.shape[2])
        lenses = cameras.lenses(*sizes)
        visible, infrared = (undistorted(image, one) for image, one in zip((visible, infrared), lenses, strict=True))
        return cls(entry, candidate(visible, infrared), working(visible, True), working(infrared, False), sizes)


def _fit(
    looked: Sequence[_Looked],
    pairs: int,
    skipped: Sequence[str],
    lens: bool = False,
    cameras: Cameras = UNKNOWN,
) -> Fit:
    sizes = _one_size(looked)
    chosen = [looked[index] for index in choose([each.candidate for each in looked], pairs)]
    found = estimate([each.visible for each in chosen], [each.infrared for each in chosen], *sizes, lens)
    verdict = judge(found, *sizes)
    warnings = [*verdict.warnings, *cameras.notes()]
    if skipped:
        warnings.append(f"{len(skipped)} pairs could not be read and were left out; the first: {skipped[0]}")
    scores = zip(chosen, found.scores, strict=True)
    told = {
        "source": "pairs",
        "score": round(found.score, 4),
        "shuffled_score": None if len(chosen) < 2 else round(found.shuffled, 4),
        "covered": round(found.covered, 4),
        "pairs": [{"id": each.entry.id, "score": round(score, 4)} for each, score in scores],
        "verdict": verdict.text,
        "warnings": warnings,
    }
    matrix = torch.linalg.inv(torch.from_numpy(found.matrix)).numpy()
    one, two = cameras.lenses(*sizes)
    rig = Rig(sizes[0], sizes[1], matrix, one, two or found.lens, told)
    order = sorted(range(len(chosen)), key=lambda index: found.scores[index])
    shown = chosen[order[len(order) // 2]].entry
    return Fit(rig, Verdict(verdict.accepted, verdict.text, warnings), found, shown)


def _one_size(looked: Sequence[_Looked]) -> tuple[Size, Size]:
    """(H, W) of the visible and of the infrared pictures; InputError where they differ from pair to pair."""
    found = Counter(each.sizes for each in looked)
    if len(found) > 1:
        kinds = "; ".join(f"{v[0]}x{v[1]} with {t[0]}x{t[1]} ({n})" for (v, t), n in found.most_common(3))
        raise InputError(
            f"align: pairs of {len(found)} sizes, visible with infrared: {kinds}; one rig has one size; "
            "give its pairs alone"
        )
    return next(iter(found))


def _read(entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (3,H,W) and (1,H',W'), as every reader of pairs sees them."""
    sample = read_pictures(replace(entry, mirrored=False))
    assert sample.visible is not None
    assert sample.infrared is not None
    return sample.visible, sample.infrared


def clicked(entries: Sequence[Entry], points: Path, cameras: Cameras = UNKNOWN) -> tuple[Rig, Entry]:
    """The rig of a file of points, and the first of the pairs in which they were clicked; the distortion of `cameras`
    is taken off them. InputError as `fit`, and for points that determine no rig."""
    both = [entry for entry in entries if entry.rgbt is not None or (entry.visible and entry.infrared)]
    if not both:
        raise InputError("align: no pair has both a visible and an infrared picture; give both")
    visible, infrared = read_points(points)
    one, two = _read(both[0])
    sizes = (one.shape[1], one.shape[2]), (two.shape[1], two.shape[2])
    rig = rig_from_points(visible, infrared, *sizes, str(points), cameras.lenses(*sizes))
    rig.told["warnings"] += cameras.notes()
    return rig, both[0]


def picture(rig: Rig, entry: Entry) -> Image.Image:
    """The PIL image of `alignment.picture.sheet` for one pair."""
    visible, infrared = _read(entry)
    size: tuple[Size, Size] = ((visible.shape[1], visible.shape[2]), (infrared.shape[1], infrared.shape[2]))
    return sheet(visible, infrared, Warp(rig.at(*size))(infrared))


def read_aligner(rig: Path | None, name: str | None = None) -> Aligner | None:
    """Of a rig.json, which messages call `name` (its path unless given); None without. InputError for a bad file."""
    return None if rig is None else Aligner(read_rig(rig), name or str(rig))


def names_file(align: str | None) -> bool:
    """Whether `align` is a rig.json, and not a way to find a rig."""
    return align not in (None, AUTO, MAKER)


def open_aligner(
    align: str | None, find: Callable[[], Fit], film: bool = False, frame: Frame = "visible", refine: bool = True
) -> Aligner | None:
    """None without `align`; auto calls `find`, maker refines radiometric files. `frame` and `refine` are Aligner's.
    InputError for a bad file, and where auto finds nothing to believe."""
    if align is None:
        return None
    if align == MAKER:
        if film or frame != "visible":
            raise InputError("--align maker: is for radiometric files, in the frame of their visible picture")
        return MakerAligner() if refine else None
    if align != AUTO:
        return Aligner(read_rig(align), align, film=film, frame=frame, refine=refine)
    found = find()
    if not found.verdict.accepted:
        raise InputError(f"--align auto: {found.verdict.text}; or align them by points: fusionsam align --points")
    print(f"--align auto: {found.verdict.text}", file=sys.stderr)
    for warning in found.verdict.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return Aligner(found.rig, "--align auto", film=film, frame=frame, refine=refine)


def keep(rig: Rig, out: Folder, ids: Iterable[str], overwrite: bool) -> None:
    """Leave rig.json beside the results, so that it can be looked at and used again; not over a pair's own rig.json.
    InputError where another rig is there, unless `overwrite`."""
    if "rig" in ids:
        return
    there = out.read("rig.json")
    if there is None or overwrite:
        out.write("rig.json", (json.dumps(rig.as_dict(), indent=1) + "\n").encode())
    elif _digest(there) != rig.digest:
        raise InputError(
            f"{out / 'rig.json'}: is another rig than the one found in these pairs; give it as --align, choose another "
            "--out, or --overwrite"
        )


def _digest(rig: bytes) -> object:
    """What a rig.json says of its numbers; None where it says nothing, as one that a hand changed."""
    try:
        values = json.loads(rig)
    except ValueError:
        return None
    return values.get("digest") if isinstance(values, dict) else None


class Agreement:
    """What is kept of the alignment of many pairs: one number a pair."""

    def __init__(self) -> None:
        self.scores, self.pairs, self.small, self.least = array("f"), 0, 0, 1.0

    def add(self, told: JsonObject) -> None:
        """One pair, by the `alignment` of its JSON."""
        if not told.get("applied", True):
            return
        self.pairs += 1
        if "score" in told:
            self.scores.append(told["score"])
        if "warning" in told:
            self.small += 1
            self.least = min(self.least, told["covered"])

    @property
    def median(self) -> float | None:
        """Of the scores; None without one."""
        return sorted(self.scores)[len(self.scores) // 2] if self.scores else None

    def lines(self, name: str) -> list[str]:
        """What a person should hear of it; `name` is that of the rig."""
        found = []
        if self.median is not None and self.median < UNRELATED:
            found.append(
                f"warning: {name}: the edges of the two cameras hardly agree (score {self.median:.2f}); is it the rig "
                "of these cameras?"
            )
        if self.small:
            share = f"{self.least:.0%} of the frame or little more"
            found.append(f"warning: in {self.small} of {self.pairs} pairs one camera covers {share}")
        return found
