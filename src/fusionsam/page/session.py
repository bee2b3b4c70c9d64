"""One pair on the demo page: encoded once, decoded at every click. Knows nothing of the page's library."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from fusionsam.alignment.apply import Aligned, Aligner, alone
from fusionsam.data.pairs import ReadPair
from fusionsam.data.pairs import read_pair as read_both
from fusionsam.data.radiometric import is_radiometric
from fusionsam.data.splits import Entry
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.render import overlay
from fusionsam.types import InputError, JsonObject, Prompts, told_of

Use = Literal["both", "visible", "infrared"]
MOST = 64
"""Clicks a pair takes; more help nobody and each costs the decoder a token."""


def read_uploads(visible: str | None, infrared: str | None) -> ReadPair:
    """Two uploads; either may be None. InputError and notices call a file by its camera and its own name."""
    one, two = (None if path is None else Path(path) for path in (visible, infrared))
    return _named(Entry("pair", one, two))


def _named(entry: Entry) -> ReadPair:
    def own(text: str) -> str:
        for camera in ("visible", "infrared", "radiometric"):
            if (path := getattr(entry, camera)) is not None:
                text = text.replace(str(path), f"{camera} image {path.name}")
        return text

    try:
        pair = read_both(entry)
    except InputError as error:
        raise InputError(own(str(error))) from None
    return replace(pair, notices=[notice._replace(text=own(notice.text)) for notice in pair.notices])


def read_pair(visible: str | None, infrared: str | None, aligner: Aligner | None = None) -> tuple[Aligned, JsonObject]:
    """Two uploads in one frame, and what was found and guessed of their files; either may be None. A radiometric JPEG
    alone gives both, aligned by its maker. InputError as `read_uploads`, for pairs of two sizes without `aligner`, and
    for other cameras' pairs."""
    single = infrared if visible is None else visible if infrared is None else None
    whole = single is not None and is_radiometric(single)
    pair = _named(Entry("pair", radiometric=Path(str(single)))) if whole else read_uploads(visible, infrared)
    one, two = pair.visible, pair.infrared
    if aligner is not None and not whole:
        return aligner(one, two), told_of(pair.facts, pair.notices)
    if one is None or two is None:
        return alone(one, two), told_of(pair.facts, pair.notices)
    sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in (one, two)]
    if len(set(sizes)) > 1:
        raise InputError(
            f"visible image is {sizes[0]}, infrared image {sizes[1]} pixels; give an aligned pair, "
            "or align the two below (Two cameras that see apart)"
        )
    return Aligned(one, two, torch.ones(2, *one.shape[1:], dtype=torch.bool)), told_of(pair.facts, pair.notices)


def picked(labels: NDArray[np.uint8], prompts: Prompts) -> NDArray[np.bool_]:
    """The connected regions of a class map (H,W) that prompts pick, bool (H,W).

    A point on the object picks the region below it, a box every region that lies in it by more than half, and a point
    off it takes its region away again. Class 0 (unlabeled) is no object.
    """
    regions = np.zeros(labels.shape, np.int32)
    for index in np.unique(labels[labels > 0]):
        found, _ = ndimage.label(labels == index, structure=np.ones((3, 3)))
        regions = np.where(found > 0, found + regions.max(), regions)
    on: set[int] = set()
    off = {0}
    if prompts.boxes is not None:
        total = np.bincount(regions.ravel())
        for x0, y0, x1, y1 in prompts.boxes[0].round().int().tolist():
            inside = np.bincount(regions[y0 : y1 + 1, x0 : x1 + 1].ravel(), minlength=len(total))
            on |= set(np.flatnonzero(2 * inside > total).tolist())
    if prompts.points is not None and prompts.point_labels is not None:
        for (x, y), label in zip(prompts.points[0].round().int().tolist(), prompts.point_labels[0], strict=True):
            if label >= 0:
                (on if label else off).add(int(regions[y, x]))
    return np.isin(regions, list(on - off))


@dataclass(eq=False)  # compared by identity: it lies in a page's state
class PairSession:
    """A pair, what the network made of it, and what a person has clicked so far."""

    model: FusionSAM
    visible: Tensor | None  # uint8 (3,H,W)
    infrared: Tensor | None  # uint8 (1,H,W)
    covered: Tensor | None = None  # bool (2,H,W): where the visible, where the infrared camera reaches
    use: Use = "both"
    alignment: JsonObject = field(default_factory=dict)  # how the two cameras were brought together; plain JSON
    input: JsonObject = field(default_factory=dict)  # how the files were read, every guess named; plain JSON
    points: list[tuple[float, float, int]] = field(default_factory=list)  # x, y, 1 on or 0 off the object
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    point_classes: list[int] = field(default_factory=list)  # id that a point names, -1 = none
    box_classes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._whole: NDArray[np.uint8] | None = None
        self._encode()

    # -- the pair ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        image = self.visible if self.visible is not None else self.infrared
        assert image is not None
        return int(image.shape[1]), int(image.shape[2])

    def take(self, use: Use) -> None:
        """Go on with both images or with one of them; clicks are kept. InputError if that image is not there."""
        if (use == "visible" and self.visible is None) or (use == "infrared" and self.infrared is None):
            raise InputError(f"there is no {use} image to go on with; drop one")
        self.use = use
        self._encode()

    def lost(self) -> float | None:
        """Percent of the pixels whose class differs from what both images give together; None when both are used."""
        if self.use == "both" or self.visible is None or self.infrared is None:
            return None
        if self._whole is None:
            self._whole = self.model.predict(self.visible, self.infrared, covered=self.covered).labels
        return 100 * float((self._whole != self.own.labels).mean())

    def _encode(self) -> None:
        started = time.perf_counter()
        self._session = self.model.encode(
            self.visible if self.use != "infrared" else None,
            self.infrared if self.use != "visible" else None,
            self.covered,
        )
        self.own = replace(self._session.predict(), seconds=time.perf_counter() - started)
        self.now = self._session.predict(self._prompts()) if self.prompted else self.own
        if self.use == "both":
            self._whole = self.own.labels

    # -- the prompts ---------------------------------------------------------------------------------------------

    @property
    def prompted(self) -> bool:
        """Whether a person has clicked."""
        return bool(self.points or self.boxes)

    def click(self, x: float, y: float, on: bool, named: int = -1) -> None:
        """A point in pixels, on or off the object; outside of the picture it is moved to its edge. With `named`, the id
        of a class, it says that this class is there, or off the object that there is none (class 0)."""
        (left, top) = self._inside(x, y)
        index = named if on or named < 0 else 0
        point = (left, top, int(on or index >= 0))
        self._ask([*self.points, point], self.boxes, [*self.point_classes, index], self.box_classes)

    def drag(self, x0: float, y0: float, x1: float, y1: float, named: int = -1) -> None:
        """A box in pixels, from corner to opposite corner; `named` as for a click."""
        (left, top), (right, bottom) = self._inside(min(x0, x1), min(y0, y1)), self._inside(max(x0, x1), max(y0, y1))
        boxes = [*self.boxes, (left, top, right, bottom)]
        self._ask(self.points, boxes, self.point_classes, [*self.box_classes, named])

    def undo(self, all: bool = False) -> None:
        """Forget what a person clicked: points from the last to the first, then boxes; or everything at once."""
        if all or not self.prompted:
            self._ask([], [], [], [])
        elif self.points:
            self._ask(self.points[:-1], self.boxes, self.point_classes[:-1], self.box_classes)
        else:
            self._ask([], self.boxes[:-1], [], self.box_classes[:-1])

    def _inside(self, x: float, y: float) -> tuple[float, float]:
        if not (np.isfinite(x) and np.isfinite(y)):
            raise InputError("click: found no finite position; click on the picture")
        height, width = self.size
        return min(max(float(x), 0.0), width - 1.0), min(max(float(y), 0.0), height - 1.0)

    def _ask(
        self,
        points: list[tuple[float, float, int]],
        boxes: list[tuple[float, float, float, float]],
        point_classes: list[int],
        box_classes: list[int],
    ) -> None:
        if len(points) + len(boxes) > MOST:
            raise InputError(f"prompts: {MOST} clicks and boxes are the most for one pair; clear some")
        self.points, self.boxes, self.point_classes, self.box_classes = points, boxes, point_classes, box_classes
        self.now = self._session.predict(self._prompts()) if self.prompted else self.own

    def _prompts(self) -> Prompts:
        points = torch.tensor([[xy[:2] for xy in self.points]]) if self.points else None
        labels = torch.tensor([[xy[2] for xy in self.points]]) if self.points else None
        boxes = torch.tensor([self.boxes]) if self.boxes else None
        named = [
            torch.tensor([ids]) if max(ids, default=-1) >= 0 else None for ids in (self.point_classes, self.box_classes)
        ]
        return Prompts(points, labels, boxes, source="user", point_classes=named[0], box_classes=named[1])

    # -- the answers ---------------------------------------------------------------------------------------------

    def mask(self) -> NDArray[np.bool_]:
        """What the clicks pick from the class map that they steered, bool (H,W); empty without clicks."""
        if not self.prompted:
            return np.zeros(self.size, bool)
        return picked(self.now.labels, self.now.prompts)

    def moved(self) -> float:
        """Percent of the pixels whose class the clicks have changed, against the model's own prompts."""
        return 100 * float((self.now.labels != self.own.labels).mean())

    def segmentation(self, shown: list[str]) -> Image.Image:
        """The fused picture with the colours of the classes named in `shown`, and their legend."""
        keep = np.array([name in shown for name in self.now.classes])
        labels = np.where(keep[self.now.labels], self.now.labels, 0).astype(np.uint8)
        return overlay(self.now.fused, labels, self.now.classes, self.now.palette)

    def masked(self) -> Image.Image:
        """The fused picture with the mask of the clicks upon it."""
        mask = self.mask().astype(np.uint8)
        return overlay(self.now.fused, mask, ["", "mask"], [(0, 0, 0), (255, 40, 200)], alpha=0.45, legend=False)
