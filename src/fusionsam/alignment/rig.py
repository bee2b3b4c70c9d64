"""rig.json: how the two cameras of one rig stand to each other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fusionsam.alignment.geometry import Matrix, Size, apply, corners, rescaling
from fusionsam.alignment.lens import Lens
from fusionsam.io import write_json
from fusionsam.types import InputError, JsonObject

FORMAT, VERSION = "fusionsam rig", 1
MOST_BYTES = 1 << 20
REMEDY = "write it anew with `fusionsam align`"


@dataclass(frozen=True)
class Rig:
    """One transformation for all pairs of two cameras that are fixed to each other.

    Pixels are counted x right, y down, from the centre of the first one at (0, 0)."""

    visible_size: Size
    """(H, W) of the visible pictures."""
    infrared_size: Size
    """(H, W) of the infrared pictures."""
    infrared_to_visible: Matrix
    """3 x 3, from infrared to visible pixels, after the lenses' distortion has been taken off."""
    visible_lens: Lens | None = None
    infrared_lens: Lens | None = None
    told: JsonObject = field(default_factory=dict, compare=False)
    """Where it came from: score, pairs, verdict, warnings."""

    @property
    def digest(self) -> str:
        """SHA-256 of sizes, matrix and lenses: two rigs of one digest move pixels alike."""
        return hashlib.sha256(json.dumps(self._numbers(), sort_keys=True).encode()).hexdigest()

    def _numbers(self) -> dict[str, object]:
        lenses = {"visible": self.visible_lens, "infrared": self.infrared_lens}
        return {
            "visible_size": list(self.visible_size),
            "infrared_size": list(self.infrared_size),
            "infrared_to_visible": self.infrared_to_visible.tolist(),
            "lens": {name: lens.as_dict() for name, lens in lenses.items() if lens is not None},
        }

    def as_dict(self) -> dict[str, object]:
        """What rig.json holds."""
        head = {"format": FORMAT, "version": VERSION}
        return {**head, **self._numbers(), "digest": self.digest, **self.told}

    def write(self, path: str | Path) -> Path:
        """Write rig.json, whole or not at all. InputError where it cannot be written."""
        return write_json(path, self.as_dict())

    def visible_to_infrared(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,2) x, y in the visible picture -> (N,2) in the infrared one."""
        ideal = points if self.visible_lens is None else self.visible_lens.undistorted(points)
        moved = apply(np.linalg.inv(self.infrared_to_visible), ideal)
        return moved if self.infrared_lens is None else self.infrared_lens.distorted(moved)

    def infrared_to_visible_points(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,2) x, y in the infrared picture -> (N,2) in the visible one."""
        ideal = points if self.infrared_lens is None else self.infrared_lens.undistorted(points)
        moved = apply(self.infrared_to_visible, ideal)
        return moved if self.visible_lens is None else self.visible_lens.distorted(moved)

    def at(self, visible_size: Size, infrared_size: Size, name: str = "the rig") -> Rig:
        """The rig for pictures of these sizes: itself, or rescaled where both sides of a picture are resized alike.
        InputError for other sizes, which are of other cameras."""
        pairs = (("visible", self.visible_size, visible_size), ("infrared", self.infrared_size, infrared_size))
        for kind, own, given in pairs:
            factor = given[1] / own[1]
            if abs(given[0] - own[0] * factor) > 1 + 0.002 * given[0]:
                raise InputError(
                    f"{name}: is of {kind} pictures of {own[0]}x{own[1]} (height x width), this one is "
                    f"{given[0]}x{given[1]}; give the rig of these cameras, or fit one with `fusionsam align`"
                )
        if visible_size == self.visible_size and infrared_size == self.infrared_size:
            return self
        into, out = rescaling(infrared_size, self.infrared_size), rescaling(self.visible_size, visible_size)
        lenses = [
            None if lens is None else lens.rescaled(own, given)
            for lens, (_, own, given) in zip((self.visible_lens, self.infrared_lens), pairs, strict=True)
        ]
        return Rig(visible_size, infrared_size, out @ self.infrared_to_visible @ into, lenses[0], lenses[1], self.told)


def require_sound(rig: Rig, name: str) -> None:
    """InputError for a matrix that turns pictures inside out or sends a part of one to infinity."""
    matrix = rig.infrared_to_visible
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise InputError(f"{name}: its infrared_to_visible cannot be inverted; {REMEDY}")
    for size, way in ((rig.infrared_size, matrix), (rig.visible_size, np.linalg.inv(matrix))):
        points = corners(size)
        depth = np.c_[points, np.ones(4)] @ way[2]
        moved = apply(way, points)
        sides = np.roll(moved, -1, 0) - moved
        after = np.roll(sides, -1, 0)
        turns = sides[:, 0] * after[:, 1] - sides[:, 1] * after[:, 0]
        if not (np.sign(depth) == np.sign(depth[0])).all() or not (turns > 0).all():
            raise InputError(f"{name}: its infrared_to_visible folds or mirrors the picture; {REMEDY}")


def read_rig(path: str | Path) -> Rig:
    """Read rig.json. InputError for what is no rig of a version that is known, is damaged or moves pixels nowhere."""
    path = Path(path)
    values = _json(path)
    if values.get("format") != FORMAT:
        raise InputError(
            f"{path}: is no rig file (its format is {values.get('format')!r}); expected {FORMAT!r}; {REMEDY}"
        )
    if values.get("version") != VERSION:
        raise InputError(f"{path}: is a rig of version {values.get('version')!r}, expected {VERSION}; {REMEDY}")
    matrix = _matrix(path, values.get("infrared_to_visible"))
    sizes = [_size(path, key, values.get(key)) for key in ("visible_size", "infrared_size")]
    lenses = values.get("lens") or {}
    if not isinstance(lenses, dict):
        raise InputError(f"{path}: lens is {type(lenses).__name__}, expected an object; {REMEDY}")
    one, two = (Lens.from_dict(lenses[name], f"{path}: lens.{name}") if name in lenses else None for name in KINDS)
    known = {"format", "version", "visible_size", "infrared_size", "infrared_to_visible", "lens", "digest"}
    rig = Rig(sizes[0], sizes[1], matrix, one, two, {key: value for key, value in values.items() if key not in known})
    require_sound(rig, str(path))
    # a hand may change it, if it takes the digest out: a file that was cut or merged by accident still has it
    if "digest" in values and values["digest"] != rig.digest:
        raise InputError(
            f"{path}: its digest does not fit its numbers; {REMEDY}, or take the digest out if you edited it"
        )
    return rig


KINDS = ("visible", "infrared")


def _json(path: Path) -> dict[str, object]:
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {found}; expected a rig.json as `fusionsam align` writes it")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected a rig file of at most {MOST_BYTES}; {REMEDY}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path}: not readable as JSON ({reason}); {REMEDY}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {type(values).__name__}, expected an object; {REMEDY}")
    return values


def _matrix(path: Path, values: object) -> Matrix:
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise InputError(f"{path}: infrared_to_visible: expected 3 x 3 finite numbers; {REMEDY}")
    return matrix


def _size(path: Path, key: str, value: object) -> Size:
    sides = value if isinstance(value, list) else []
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= 65536 for side in sides):
        raise InputError(f"{path}: {key}: found {str(value)[:60]}, expected [height, width] in pixels; {REMEDY}")
    return sides[0], sides[1]
