"""A rig from the pairs of a folder: which of them are looked at, and what was thought of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fusionsam.alignment.choose import candidate, choose
from fusionsam.alignment.estimate import Estimate, estimate, working
from fusionsam.alignment.geometry import Size
from fusionsam.alignment.judge import Verdict, judge
from fusionsam.alignment.picture import sheet
from fusionsam.alignment.points import read_points, rig_from_points
from fusionsam.alignment.rig import Rig
from fusionsam.alignment.warp import Warp
from fusionsam.data.images import image_size, read_infrared, read_rgbt, read_visible
from fusionsam.data.splits import Entry
from fusionsam.errors import InputError

PAIRS = 8
"""Pairs that a rig is found from."""
CANDIDATES = 48
"""Pairs, evenly spaced, that are looked at to choose from."""


@dataclass
class Fit:
    """A rig, whether it is believed, and the pair to look at."""

    rig: Rig
    verdict: Verdict
    estimate: Estimate
    shown: Entry  # of the pairs that were used the one that fits in the middle


def fit(entries: Sequence[Entry], pairs: int = PAIRS) -> Fit:
    """Find the rig of entries that have both pictures. InputError where none has, where sizes differ from pair to pair,
    and where none can be read; a rig that is not believed is returned all the same: see its verdict."""
    both = [entry for entry in entries if entry.rgbt is not None or (entry.visible and entry.infrared)]
    if not both:
        raise InputError("align: no pair has both a visible and an infrared picture; give both folders")
    sizes = _one_size(both)
    step = max(1, -(-len(both) // CANDIDATES))
    looked, skipped = [], []
    for entry in both[::step]:
        try:
            visible, infrared = _read(entry)
        except InputError as error:
            skipped.append(str(error))
            continue
        kept = (working(visible, True), working(infrared, False))
        looked.append((entry, candidate(visible, infrared), kept))
    if not looked:
        raise InputError(f"align: none of {len(skipped)} pairs can be read; the first: {skipped[0]}")
    chosen = [looked[index] for index in choose([each[1] for each in looked], pairs)]
    found = estimate([each[2][0] for each in chosen], [each[2][1] for each in chosen], *sizes)
    verdict = judge(found, *sizes)
    warnings = list(verdict.warnings)
    if skipped:
        warnings.append(f"{len(skipped)} pairs could not be read and were left out; the first: {skipped[0]}")
    told = {
        "source": "pairs",
        "score": round(found.score, 4),
        "shuffled_score": None if len(chosen) < 2 else round(found.shuffled, 4),
        "covered": round(found.covered, 4),
        "pairs": [{"id": each[0].id, "score": round(s, 4)} for each, s in zip(chosen, found.scores, strict=True)],
        "verdict": verdict.text,
        "warnings": warnings,
    }
    rig = Rig(sizes[0], sizes[1], torch.linalg.inv(torch.from_numpy(found.matrix)).numpy(), told=told)
    order = sorted(range(len(chosen)), key=lambda index: found.scores[index])
    return Fit(rig, Verdict(verdict.accepted, verdict.text, warnings), found, chosen[order[len(order) // 2]][0])


def _one_size(entries: Sequence[Entry]) -> tuple[Size, Size]:
    """(H, W) of the visible and of the infrared pictures."""
    found: Counter[tuple[Size, Size]] = Counter()
    for entry in entries:
        first, second = entry.rgbt or entry.visible, entry.rgbt or entry.infrared
        assert first is not None
        assert second is not None
        try:
            found[image_size(first), image_size(second)] += 1
        except InputError:
            continue  # told when it is read
    if not found:
        raise InputError(
            f"{entries[0].visible or entries[0].rgbt}: cannot be read, as all {len(entries)} pairs; check them"
        )
    if len(found) > 1:
        kinds = "; ".join(f"{v[0]}x{v[1]} with {t[0]}x{t[1]} ({n})" for (v, t), n in found.most_common(3))
        raise InputError(
            f"align: pairs of {len(found)} sizes, visible with infrared: {kinds}; one rig has one size; "
            "give its pairs alone"
        )
    return next(iter(found))


def _read(entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
    if entry.rgbt is not None:
        return read_rgbt(entry.rgbt)
    assert entry.visible is not None
    assert entry.infrared is not None
    return read_visible(entry.visible), read_infrared(entry.infrared)


def clicked(entries: Sequence[Entry], points: Path) -> tuple[Rig, Entry]:
    """The rig of a file of points, and the first of the pairs in which they were clicked. InputError as `fit`, and for
    points that determine no rig."""
    both = [entry for entry in entries if entry.rgbt is not None or (entry.visible and entry.infrared)]
    if not both:
        raise InputError("align: no pair has both a visible and an infrared picture; give both")
    visible, infrared = read_points(points)
    return rig_from_points(visible, infrared, *_one_size(both), str(points)), both[0]


def picture(rig: Rig, entry: Entry) -> Image.Image:
    """The PIL image of `alignment.picture.sheet` for one pair."""
    visible, infrared = _read(entry)
    size: tuple[Size, Size] = ((visible.shape[1], visible.shape[2]), (infrared.shape[1], infrared.shape[2]))
    return sheet(visible, infrared, Warp(rig.at(*size))(infrared))
