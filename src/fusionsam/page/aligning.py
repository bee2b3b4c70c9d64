"""Two cameras brought together by hand on the demo page: corresponding points, nudges by keys, and the rig that they
make. Knows nothing of the page's library."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock
from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from fusionsam.alignment.estimate import estimate, working
from fusionsam.alignment.geometry import Matrix, Size, centre, rescaling, similarity
from fusionsam.alignment.judge import judge
from fusionsam.alignment.orientation import resized
from fusionsam.alignment.picture import SIDE, edges_over
from fusionsam.alignment.points import FEWEST, few_points, rig_from_points
from fusionsam.alignment.rig import Rig, require_sound
from fusionsam.alignment.warp import Warp
from fusionsam.types import InputError

Kind = Literal["visible", "infrared"]
MOST = 40
"""Points a picture takes."""
STEPS = {
    "ArrowLeft": (-1.0, 0.0, 0.0, 0.0), "ArrowRight": (1.0, 0.0, 0.0, 0.0),
    "ArrowUp": (0.0, -1.0, 0.0, 0.0), "ArrowDown": (0.0, 1.0, 0.0, 0.0),
    "+": (0.0, 0.0, 0.002, 0.0), "-": (0.0, 0.0, -0.002, 0.0),
    "[": (0.0, 0.0, 0.0, -0.1), "]": (0.0, 0.0, 0.0, 0.1),
}  # fmt: skip
"""Key -> pixels to the right and down, share by which infrared grows, degrees by which it turns (clockwise)."""
FAR = 10
"""Times as far with the shift key."""
SHIFTED = {"*": "+", "=": "+", "_": "-", "{": "[", "}": "]"}
"""What those keys send on some keyboards, or with the shift key held."""


@dataclass(eq=False)  # compared by identity: it lies in a page's state
class Aligning:
    """A pair as its two cameras took it, and how it has been brought together so far."""

    visible: Tensor  # uint8 (3,H,W)
    infrared: Tensor  # uint8 (1,H',W')
    start: Rig | None = None
    """What points and nudges go on from; None: infrared stretched over the visible picture."""
    points: list[tuple[Kind, float, float]] = field(default_factory=list)  # in the order of clicking
    nudges: Matrix = field(default_factory=lambda: np.eye(3))  # of infrared, in visible pixels
    found: str = ""  # verdict of a search that `start` is of
    lock: RLock = field(default_factory=RLock)
    """Held while it changes and is drawn."""

    def __post_init__(self) -> None:
        if self.start is not None:
            self.start = self.start.at(*self.sizes, "the rig of this page")

    @property
    def sizes(self) -> tuple[Size, Size]:
        """(H, W) of the visible, and of the infrared picture."""
        return tuple((image.shape[1], image.shape[2]) for image in (self.visible, self.infrared))  # type: ignore[return-value]

    def of(self, kind: Kind) -> list[tuple[float, float]]:
        """x, y of the points in one picture; the first belongs to the first of the other one."""
        return [(x, y) for one, x, y in self.points if one == kind]

    @property
    def pairs(self) -> int:
        """Points that are clicked in both pictures."""
        return min(len(self.of("visible")), len(self.of("infrared")))

    # -- what a person does ----------------------------------------------------------------------------------------

    def click(self, kind: Kind, x: float, y: float) -> None:
        """One more point, in pixels of the picture. InputError outside of it."""
        height, width = self.sizes[0] if kind == "visible" else self.sizes[1]
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise InputError(f"align: ({x:g}, {y:g}) lies outside of the {kind} picture; click on it")
        if len(self.of(kind)) >= MOST:
            raise InputError(f"align: {MOST} points a picture are enough; clear some")
        self.points.append((kind, x, y))

    def undo(self) -> None:
        """Without the point that was clicked last."""
        self.points = self.points[:-1]

    def clear(self) -> None:
        """Without points and nudges."""
        self.points, self.nudges = [], np.eye(3)

    def nudge(self, key: str, far: bool = False) -> None:
        """Move infrared a little by a key of STEPS; other keys do nothing."""
        step = STEPS.get(SHIFTED.get(key, key))
        if step is None:
            return
        right, down, grow, turn = (value * (FAR if far else 1) for value in step)
        x, y = centre(self.sizes[0])
        self.nudges = similarity(1 + grow, turn, (x, y), (x + right, y + down)) @ self.nudges

    def search(self) -> None:
        """Find the rig in this one pair. InputError where it is not to be believed; then nothing is changed."""
        pictures = [working(self.visible, True)], [working(self.infrared, False)]
        found = estimate(*pictures, *self.sizes)
        verdict = judge(found, *self.sizes)
        if not verdict.accepted:
            raise InputError(f"align: {verdict.text}; click points instead")
        told = {"source": "pairs", "score": round(found.score, 4), "verdict": verdict.text}
        self.start = Rig(*self.sizes, np.linalg.inv(found.matrix), told=told)
        self.found = verdict.text
        self.clear()

    # -- what comes of it ------------------------------------------------------------------------------------------

    def rig(self) -> Rig:
        """As it stands. InputError for points that make none."""
        lenses = (None, None) if self.start is None else (self.start.visible_lens, self.start.infrared_lens)
        visible, infrared = (np.array(self.of(kind)[: self.pairs]).reshape(-1, 2) for kind in ("visible", "infrared"))
        if self.pairs >= FEWEST:
            rig = rig_from_points(visible, infrared, *self.sizes, "align", lenses)
        else:
            visible, infrared = (
                points if lens is None else lens.undistorted(points)
                for points, lens in zip((visible, infrared), lenses, strict=True)
            )
            base = rescaling(*self.sizes[::-1]) if self.start is None else self.start.infrared_to_visible
            told = {} if self.start is None else dict(self.start.told)
            rig = Rig(*self.sizes, few_points(visible, infrared, base), *lenses, told=told)
        if not (self.nudges == np.eye(3)).all():
            verdict = f"{rig.told.get('verdict', '')}, then moved by hand".removeprefix(", then ")
            told = {**rig.told, "nudged": True, "verdict": verdict}
            rig = Rig(*self.sizes, self.nudges @ rig.infrared_to_visible, *lenses, told=told)
        require_sound(rig, "align")
        return rig

    def finished(self) -> Rig:
        """The rig to be used or saved. InputError while it is no more than infrared stretched over the visible picture,
        or is of too few points."""
        moved = self.start is not None or not (self.nudges == np.eye(3)).all()
        if self.pairs < FEWEST and not (moved and self.pairs == 0):
            raise InputError(
                f"align: {self.pairs} points are clicked in both pictures, expected at least {FEWEST}; click more, or "
                "let it search"
            )
        return self.rig()

    def picture(self) -> Image.Image:
        """The edges of infrared over the visible picture, as it stands, at most SIDE pixels a side."""
        own, other = self.sizes
        factor = min(1.0, SIDE / max(own))
        small: Size = (max(1, round(own[0] * factor)), max(1, round(own[1] * factor)))
        rig = self.rig()
        if small != own:
            to_small = rescaling(own, small)
            lens = None if rig.visible_lens is None else rig.visible_lens.rescaled(own, small)
            rig = Rig(small, other, to_small @ rig.infrared_to_visible, lens, rig.infrared_lens)
        visible = resized(self.visible.float(), small).round().clamp(0, 255).to(self.visible.dtype)
        return Image.fromarray(edges_over(visible, Warp(rig)(self.infrared)))

    def says(self) -> str:
        """One line: how far it is, what is wanted next."""
        one, two = len(self.of("visible")), len(self.of("infrared"))
        if one != two:
            less = "infrared" if one > two else "visible"
            return f"Now click point {min(one, two) + 1} in the {less} picture."
        parts = []
        if self.pairs >= FEWEST:
            parts.append(str(self.rig().told["verdict"]))
        elif self.pairs:
            parts.append(f"{self.pairs} of at least {FEWEST} points; go on, all over the picture")
        elif self.start is not None:
            parts.append(self.found or "The rig of this page")
        else:
            parts.append("Infrared stretched over the visible picture: click what you see in both, or let it search")
        if not (self.nudges == np.eye(3)).all():
            parts.append("moved by hand")
        return "; ".join(parts) + "."
