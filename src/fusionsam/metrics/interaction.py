"""The protocol of interactive segmentation: a simulated user clicks at the largest error until the mask is good.

As Sofiiuk et al. 2022 (RITM, arXiv 2102.06583) and its predecessors measure it: the first click lies at the centre of
the object, every later one at the centre of the largest error region, that is at the pixel that lies deepest inside the
missing or the surplus pixels. NoC@t is the mean number of clicks until IoU t, an object that never gets there counting
as the most clicks allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.types import IGNORE, Prompts

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Click:
    """A pixel, and whether it is on the object."""

    x: int
    y: int
    on: bool


@dataclass(frozen=True)
class Object:
    """One connected region of a class in a label map."""

    class_id: int
    mask: Bools  # (H,W)
    pixels: int


Ask = Callable[[Sequence[Click]], Bools]
"""All clicks so far -> mask (H,W). What the user of a real tool does with them (mask fed back, one of three chosen) is
the asker's business."""


def objects(label: NDArray[np.integer], min_pixels: int) -> list[Object]:
    """The connected regions (8 neighbours) of at least `min_pixels` of every class above 0 in a label map (H,W)."""
    found = []
    for class_id in np.unique(label):
        if class_id in (0, IGNORE):
            continue
        regions, count = ndimage.label(label == class_id, structure=np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        for region in range(1, count + 1):
            if sizes[region] >= min_pixels:
                found.append(Object(int(class_id), regions == region, int(sizes[region])))
    return found


def iou(mask: Bools, truth: Bools, valid: Bools) -> float:
    """Intersection over union of two masks (H,W) over the `valid` pixels, 0..1; 1 where both are empty."""
    union = np.count_nonzero((mask | truth) & valid)
    return np.count_nonzero(mask & truth & valid) / union if union else 1.0


def next_click(mask: Bools, truth: Bools, valid: Bools, clicks: Sequence[Click] = ()) -> Click | None:
    """Where the protocol clicks next: the pixel deepest inside the missing or the surplus pixels (H,W), never one that
    was clicked before; None where nothing is wrong. Of equal depths the missing pixels, and the upper left one, win."""
    missing = _deepest(truth & ~mask & valid, clicks)
    surplus = _deepest(mask & ~truth & valid, clicks)
    if missing is None and surplus is None:
        return None
    if surplus is None or (missing is not None and missing[0] >= surplus[0]):
        assert missing is not None
        return Click(missing[1], missing[2], True)
    return Click(surplus[1], surplus[2], False)


def _deepest(region: Bools, clicks: Sequence[Click]) -> tuple[float, int, int] | None:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    inside = region[top : rows[-1] + 1, left : columns[-1] + 1]
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]  # the picture's edge is an edge
    for click in clicks:
        y, x = click.y - top, click.x - left
        if 0 <= y < depth.shape[0] and 0 <= x < depth.shape[1]:
            depth[y, x] = 0
    y, x = divmod(int(depth.argmax()), depth.shape[1])
    return (float(depth[y, x]), x + left, y + top) if depth[y, x] > 0 else None


def simulate(ask: Ask, truth: Bools, valid: Bools, most: int, enough: float, at_least: int = 1) -> list[float]:
    """IoU after every click of a simulated user on one object: until `most` clicks, or until IoU `enough` and
    `at_least` clicks. Shorter, too, where nothing is left to click at."""
    clicks: list[Click] = []
    ious: list[float] = []
    mask = np.zeros_like(truth)
    while len(clicks) < most and not (len(ious) >= at_least and max(ious) >= enough):
        click = next_click(mask, truth, valid, clicks)
        if click is None:
            break
        clicks.append(click)
        mask = ask(clicks)
        ious.append(iou(mask, truth, valid))
    return ious


def clicks_needed(ious: Sequence[float], target: float, most: int) -> tuple[int, bool]:
    """Clicks until IoU `target` and whether it was reached; `most` where it was not."""
    for number, value in enumerate(ious, 1):
        if value >= target:
            return number, True
    return most, False


def iou_after(ious: Sequence[float], clicks: int) -> float:
    """IoU after `clicks` clicks, or after the last where the user had nothing left to click at."""
    return ious[min(clicks, len(ious)) - 1]


@dataclass(frozen=True)
class Corrected:
    """What clicks that name a class did to one object: IoU in its box (0..1) before the first and after each, whether
    the pixel of each click got its class, and the share (0..1) of all pixels outside of the box whose class changed."""

    ious: list[float]
    obeyed: list[bool]
    elsewhere: list[float]


def box_of(mask: Bools) -> Bools:
    """The pixels (H,W) of the upright box around a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.zeros_like(mask)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def correct(
    ask: Callable[[Prompts], NDArray[np.integer]],
    own: NDArray[np.integer],
    label: NDArray[np.integer],
    one: Object,
    most: int,
) -> Corrected:
    """A simulated user who corrects a class map at one object.

    Each click lies at the middle of the largest error of the object's class in the object's box, and names the class
    that the label has there.

    Args:
        ask: All clicks so far, as points that name classes -> class ids (H,W).
        own: Class ids (H,W) before any click.
        label: The true ids (H,W), IGNORE where unknown.
        one: The object.
        most: Clicks at most; fewer where nothing is wrong any more.
    """
    box = box_of(one.mask)
    truth, valid = label == one.class_id, (label != IGNORE) & box
    clicks: list[Click] = []
    now, found = own, Corrected([iou(own == one.class_id, truth, valid)], [], [])
    while len(clicks) < most and (click := next_click(now == one.class_id, truth, valid, clicks)) is not None:
        clicks.append(click)
        named = [int(label[each.y, each.x]) for each in clicks]
        now = ask(Prompts.naming([(each.x, each.y) for each in clicks], named))
        found.ious.append(iou(now == one.class_id, truth, valid))
        found.obeyed.append(bool(now[click.y, click.x] == label[click.y, click.x]))
        found.elsewhere.append(float(((now != own) & ~box).mean()))
    return found
