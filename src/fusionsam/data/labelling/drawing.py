"""What a person has drawn on one pair: objects, each with its pixels and its class, and what can be done to them.

Masks travel as runs inside a box: counts of pixels row by row, outside and inside in turn, beginning with outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fusionsam.types import InputError, JsonObject

MOST_OBJECTS = 65535
"""Objects of one pair: their numbers are stored in 16 bits."""
UNDO, UNDO_BYTES = 50, 128 << 20
"""Steps that can be taken back, and the memory of one pair's steps: what goes beyond is forgotten, the oldest first."""

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


@dataclass
class _Step:
    """What stood there before a change."""

    box: Box
    values: NDArray[np.uint16]
    classes: dict[int, int]


@dataclass
class Drawing:
    """The objects of one pair: `instances` uint16 (H,W), 0 = nothing, and the class of every number in it."""

    instances: NDArray[np.uint16]
    classes: dict[int, int] = field(default_factory=dict)
    unsure: bool = False
    done: bool = False
    clicks: int = 0
    """Clicks, boxes and strokes that were spent on it."""
    revision: int = 0
    """Counts the changes, from whatever number it has when it is opened."""

    def __post_init__(self) -> None:
        self._undo: list[_Step] = []
        self._redo: list[_Step] = []

    @classmethod
    def empty(cls, size: tuple[int, int]) -> Drawing:
        """Nothing drawn on a picture of `size` (H, W)."""
        return cls(np.zeros(size, np.uint16))

    def copy(self) -> Drawing:
        """As it is now, with all that can be taken back; changes of this one do not reach it."""
        twin = replace(self, instances=self.instances.copy(), classes=dict(self.classes))
        twin._undo, twin._redo = list(self._undo), list(self._redo)  # what stands in them is never changed
        return twin

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The class map uint8 (H,W)."""
        table = np.zeros(int(self.instances.max(initial=0)) + 1, np.uint8)
        for number, class_id in self.classes.items():
            if number < len(table):
                table[number] = class_id
        return table[self.instances]

    def paint(self, box: Sequence[int], runs: Sequence[int], number: int, class_id: int, keep: bool = False) -> int:
        """Give the pixels of a mask to object `number` (0 = a new one) of class `class_id`; the object's number.

        With `keep` only pixels that belong to nothing are taken. InputError for a mask that does not fit the picture,
        or an object that is not there."""
        mask, area = self._mask(box, runs)
        number = self._number(number)
        here = self._view(area)
        if keep:
            mask = mask & (here == 0)
        self._remember(area)
        here[mask] = number
        self.classes[number] = class_id
        self._changed(area)
        return number

    def erase(self, box: Sequence[int], runs: Sequence[int]) -> None:
        """Take the pixels of a mask from whatever they belong to."""
        mask, area = self._mask(box, runs)
        self._remember(area)
        self._view(area)[mask] = 0
        self._changed(area)

    def reclass(self, number: int, class_id: int) -> None:
        """Give an object another class."""
        self._require(number)
        self._remember((0, 0, 0, 0))
        self.classes[number] = class_id
        self.revision += 1

    def delete(self, number: int) -> Box:
        """Remove an object; where it was."""
        self._require(number)
        area = _bounds(self.instances == number)
        self._remember(area)
        here = self._view(area)
        here[here == number] = 0
        self._changed(area)
        return area

    def clear(self) -> Box:
        """Remove everything."""
        area = (0, 0, self.instances.shape[1], self.instances.shape[0])
        self._remember(area)
        self.instances[:] = 0
        self._changed(area)
        return area

    def propose(self, labels: NDArray[np.integer], min_pixels: int = 20) -> int:
        """Take every connected region of at least `min_pixels` of a class map (H,W) as an object, where nothing is
        drawn; how many. InputError for a map of another size."""
        if labels.shape != self.instances.shape:
            raise InputError(f"proposal: is {labels.shape}, the pair {self.instances.shape} (height, width)")
        self._remember((0, 0, self.instances.shape[1], self.instances.shape[0]))
        free, count = self.instances == 0, 0
        for class_id in np.unique(labels[labels > 0]):
            regions, found = ndimage.label((labels == class_id) & free, structure=np.ones((3, 3)))
            sizes = np.bincount(regions.ravel(), minlength=found + 1)
            numbers = np.zeros(found + 1, np.uint16)  # of every region; one pass over the picture, however many
            for region in range(1, found + 1):
                if sizes[region] >= min_pixels:
                    numbers[region] = self._number(0)
                    self.classes[int(numbers[region])] = int(class_id)
                    count += 1
            taken = numbers[regions]
            np.copyto(self.instances, taken, where=taken > 0)
        self.revision += 1
        return count

    def undo(self) -> Box | None:
        """Take the last change back; where it was, None where there is none."""
        return self._exchange(self._undo, self._redo)

    def redo(self) -> Box | None:
        """Make the change again that was taken back last."""
        return self._exchange(self._redo, self._undo)

    def objects(self) -> list[JsonObject]:
        """id, class, pixels and box of every object."""
        sizes = np.bincount(self.instances.ravel(), minlength=1)
        boxes = ndimage.find_objects(self.instances)
        found = []
        for number, class_id in sorted(self.classes.items()):
            place = boxes[number - 1] if number <= len(boxes) else None
            if place is None:
                continue
            rows, columns = place
            box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
            found.append({"id": number, "class": class_id, "pixels": int(sizes[number]), "box": box})
        return found

    def values(self, box: Sequence[int]) -> list[int]:
        """Object numbers inside `box`, row by row, as value, count, value, count ..."""
        return to_values(self._view(self._inside(box)))

    def _number(self, number: int) -> int:
        if number:
            self._require(number)
            return number
        free = max(self.classes, default=0) + 1
        if free > MOST_OBJECTS:
            raise InputError(f"object: {MOST_OBJECTS} are the most for one pair; delete some")
        return free

    def _require(self, number: int) -> None:
        if number not in self.classes:
            raise InputError(f"object {number}: is not there; choose one of the pair's objects")

    def _inside(self, box: Sequence[int]) -> Box:
        height, width = self.instances.shape
        if len(box) != 4 or not all(type(value) is int for value in box):
            raise InputError(f"box: found {list(box)[:5]}; expected x, y, width, height in whole pixels")
        x, y, wide, high = box
        if min(box) < 0 or x + wide > width or y + high > height:
            raise InputError(f"box: found {list(box)}; expected it inside of {width}x{height} pixels")
        return (x, y, wide, high)

    def _mask(self, box: Sequence[int], runs: Sequence[int]) -> tuple[NDArray[np.bool_], Box]:
        area = self._inside(box)
        return from_runs(runs, area[3], area[2]), area

    def _view(self, box: Box) -> NDArray[np.uint16]:
        x, y, width, height = box
        return self.instances[y : y + height, x : x + width]

    def _remember(self, box: Box) -> None:
        self._undo.append(_Step(box, self._view(box).copy(), dict(self.classes)))
        del self._undo[:-UNDO]
        while len(self._undo) > 1 and sum(step.values.nbytes for step in self._undo) > UNDO_BYTES:
            del self._undo[0]
        self._redo.clear()

    def _changed(self, box: Box) -> None:
        self.revision += 1
        left = np.flatnonzero(
            np.bincount(self.instances.ravel(), minlength=1)
        )  # of 12 megapixels far faster than unique
        self.classes = {number: self.classes[number] for number in left.tolist() if number in self.classes}

    def _exchange(self, source: list[_Step], target: list[_Step]) -> Box | None:
        if not source:
            return None
        step = source.pop()
        here = self._view(step.box)
        target.append(_Step(step.box, here.copy(), dict(self.classes)))
        here[:] = step.values
        self.classes = step.classes
        self.revision += 1
        return step.box


def from_runs(runs: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """Counts, outside first, as a mask (height, width); InputError unless they add up."""
    try:
        counts = np.asarray(runs, np.int64)
    except (TypeError, ValueError, OverflowError):
        counts = np.array([-1])
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() != height * width:
        raise InputError(f"runs: expected counts that add up to the box's {width}x{height} pixels")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(height, width)


def to_runs(mask: NDArray[np.bool_]) -> list[int]:
    """A mask (H,W) as counts, outside first."""
    flat = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1] if mask.size else False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(count) for count in np.diff(np.concatenate([[0], edges]))] if mask.size else []


def to_values(values: NDArray[np.integer]) -> list[int]:
    """An array as value, count, value, count ... row by row."""
    flat = values.ravel()
    if not flat.size:
        return []
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    counts = np.diff(np.concatenate([starts, [flat.size]]))
    return np.stack([flat[starts].astype(np.int64), counts], 1).ravel().tolist()


def cropped(mask: NDArray[np.bool_]) -> dict[str, object]:
    """A mask (H,W) as its bounding box and the runs inside; an empty mask has an empty box."""
    box = _bounds(mask)
    x, y, width, height = box
    return {"box": list(box), "runs": to_runs(mask[y : y + height, x : x + width])}


def _bounds(mask: NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))


def apply(
    drawing: Drawing, change: Mapping[str, object], proposal: Callable[[], NDArray[np.integer]]
) -> dict[str, object]:
    """One change as the page sends it: {"kind": "paint", "box", "runs", "object", "class", "keep"}, {"kind": "erase",
    "box", "runs"}, "class" and "delete" with "object", "clear", "propose", "undo", "redo". Returns what was touched:
    {"box", "object"}. InputError for anything else; then nothing has changed."""
    kind = change.get("kind")
    whole = (0, 0, drawing.instances.shape[1], drawing.instances.shape[0])
    number: int = _whole(change, "object", 0)
    touched: Box = (0, 0, 0, 0)
    if kind == "paint":
        class_id = _whole(change, "class", None)
        number = drawing.paint(_list(change, "box"), _list(change, "runs"), number, class_id, bool(change.get("keep")))
        touched = drawing._inside(_list(change, "box"))
    elif kind == "erase":
        drawing.erase(_list(change, "box"), _list(change, "runs"))
        touched = drawing._inside(_list(change, "box"))
    elif kind == "class":
        drawing.reclass(number, _whole(change, "class", None))
    elif kind == "delete":
        touched = drawing.delete(number)
    elif kind == "clear":
        touched = drawing.clear()
    elif kind == "propose":
        drawing.propose(proposal())
        touched = whole
    elif kind in ("undo", "redo"):
        place = drawing.undo() if kind == "undo" else drawing.redo()
        if place is None:
            raise InputError(f"{kind}: there is nothing to {kind}")
        touched = place
    else:
        raise InputError(f"change: found kind {str(kind)[:40]!r}; expected paint, erase, class, delete, clear or undo")
    if kind in ("paint", "erase"):
        drawing.clicks += max(0, _whole(change, "clicks", 1))
    return {"box": list(touched), "object": number}


def _list(change: Mapping[str, object], key: str) -> list[int]:
    value = change.get(key)
    if not isinstance(value, list):
        raise InputError(f"change: {key} is missing; expected a list of whole numbers")
    return value


def _whole(change: Mapping[str, object], key: str, default: int | None) -> int:
    value = change.get(key, default)
    if type(value) is not int or value < 0:
        raise InputError(f"change: {key} is {str(value)[:40]!r}; expected a whole number of 0 or more")
    return value
