"""Masks of objects by clicks: a Segment Anything on the visible, the infrared or the fused picture.

The image encoder runs once a picture, the mask decoder at every click. Of a first prompt the decoder gives three masks
(part, object, group) with predicted IoUs; of later ones a single mask, to which the low-resolution logits of the
earlier answer are fed back, as the authors of Segment Anything do (Kirillov et al. 2023, arXiv 2304.02643, section 3).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fusionsam.inference.segment_anything import Encoded, PlainSam
from fusionsam.types import Array, InputError

Picture = Literal["visible", "infrared", "fused"]
PICTURES: tuple[Picture, ...] = ("visible", "infrared", "fused")
SHIPPED = "sam"
MAX_POINTS = 256
"""Points of one object. Each costs the decoder a token, and more than a few dozen help nobody."""


@dataclass(frozen=True)
class Masks:
    """What one prompt gives: N masks of one object, N = 3 for a first prompt and 1 for later ones."""

    masks: NDArray[np.bool_]  # (N,H,W)
    scores: NDArray[np.float32]  # (N), IoU as SAM predicts it, about 0..1
    logits: Tensor  # (N,h,w) low resolution, 256 x 256 for SAM: `previous` of the next prompt

    @property
    def best(self) -> int:
        """Index of the highest score."""
        return int(self.scores.argmax())


class InteractiveSAM:
    """A Segment Anything model that answers clicks and boxes.

    >>> sam = InteractiveSAM.from_pretrained("sam")  # doctest: +SKIP
    >>> picture = sam.encode(image)  # doctest: +SKIP
    >>> first = sam.mask(picture, [[320, 200]])  # three masks  # doctest: +SKIP
    >>> again = sam.mask(picture, [[320, 200], [300, 90]], [1, 0], previous=first.logits[first.best])  # doctest: +SKIP
    """

    def __init__(self, sam: PlainSam, name: str = "") -> None:
        self.sam, self.name = sam, name
        # two threads must not be in one module at once; a click need not wait for the next picture's embedding
        self._encoding, self._decoding = threading.Lock(), threading.Lock()

    @classmethod
    def from_pretrained(cls, source: str | Path = SHIPPED, device: str = "cpu") -> InteractiveSAM:
        """`sam`, which ships with the package (MobileSAM, float16), or whatever `PlainSam.open` takes: a SamModel or
        Sam2Model folder or hub name, a SAM or MobileSAM file. InputError if it cannot be loaded."""
        return cls(PlainSam.open(locate(source), device), Path(source).name)

    def encode(self, picture: Array | Tensor) -> Encoded:
        """The image embedding of one picture, for any number of prompts.

        Args:
            picture: uint8, or float in [0, 1]; an array (H,W,3) or (H,W), or a tensor (3,H,W), (1,H,W) or (H,W).

        Raises:
            InputError: for another shape or range.
        """
        ready = _as_rgb(picture)
        with self._encoding:
            return self.sam.encode(ready)

    def mask(
        self,
        encoded: Encoded,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        previous: Tensor | NDArray[np.float32] | None = None,
        several: bool | None = None,
    ) -> Masks:
        """Masks of the one object that all prompts together describe.

        Args:
            encoded: of `encode`.
            points: (P,2) x, y in pixels of the picture.
            labels: (P), 1 on the object, 0 off it; all 1 when left out.
            box: x0, y0, x1, y1 in pixels.
            previous: (h,w) logits of an earlier answer (`Masks.logits[i]`), to refine it.
            several: three masks instead of one; when left out, three unless `previous` is given.

        Raises:
            InputError: for prompts that are outside of the picture, not finite, inverted, too many, or none at all.
        """
        spots, marks = _points(points, labels, encoded.size)
        corners = _box(box, encoded.size)
        if spots is None and corners is None:
            raise InputError("prompts: found no point and no box; give at least one")
        mask = None if previous is None else self._previous(previous)
        with self._decoding, torch.inference_mode():
            logits, scores = self.sam.decode(
                encoded, spots, marks, corners, mask, previous is None if several is None else several
            )
            full = self.sam.full(logits[:, None], encoded)[:, 0] > 0
        return Masks(full.numpy(), scores.numpy(), logits)

    def _previous(self, previous: Tensor | NDArray[np.float32]) -> Tensor:
        mask = torch.as_tensor(previous)
        if mask.ndim == 3 and len(mask) == 1:
            mask = mask[0]
        side = self.sam.side // 4
        if mask.shape != (side, side) or not mask.is_floating_point() or not bool(mask.isfinite().all()):
            raise InputError(
                f"previous: found {mask.dtype} of shape {tuple(mask.shape)}, expected finite logits ({side}, {side}), "
                "as `logits[i]` of an earlier answer"
            )
        return mask


class InteractivePair:
    """The pictures of one pair, each encoded at its first prompt or in the background.

    >>> pair = InteractivePair(sam, {"visible": visible, "fused": prediction.fused})  # doctest: +SKIP
    >>> sam.mask(pair.encoded("fused"), [[320, 200]]).masks  # doctest: +SKIP
    """

    def __init__(self, sam: InteractiveSAM, pictures: Mapping[Picture, Array | Tensor]) -> None:
        if not pictures:
            raise InputError("pair: found no picture; give visible, infrared or fused")
        for name in pictures:
            if name not in PICTURES:
                raise InputError(f"on {name!r}: expected one of {', '.join(PICTURES)}")
        self.sam, self.pictures = sam, dict(pictures)
        self._encoded: dict[str, Future[Encoded]] = {}
        self._lock = threading.Lock()

    def encoded(self, on: Picture) -> Encoded:
        """The embedding of the picture `on` for `sam.mask`, made now unless it is there or on its way. InputError where
        the pair has no such picture, or it cannot be encoded."""
        there = tuple(self.pictures)
        if on not in there:  # not asked of the dictionary: what comes from JSON may have no hash
            raise InputError(f"on {on!r}: this pair has no such picture; choose one of {', '.join(there)}")
        with self._lock:
            waiting = self._encoded.get(on)
            if waiting is None:
                waiting, mine = Future[Encoded](), True
                self._encoded[on] = waiting
            else:
                mine = False
        if mine:
            try:
                waiting.set_result(self.sam.encode(self.pictures[on]))
            except BaseException as error:
                with self._lock:
                    self._encoded.pop(on, None)
                waiting.set_exception(error)
        return waiting.result()


@lru_cache(maxsize=2)
def shipped_sam(device: str = "cpu") -> InteractiveSAM:
    """The weights that ship, read once a process and device."""
    return InteractiveSAM.from_pretrained(SHIPPED, device)


def locate(source: str | Path) -> str | Path:
    """The file of the weights that ship, for their name; anything else as it is."""
    if str(source) != SHIPPED or Path(source).exists():
        return source
    file = Path(str(resources.files("fusionsam") / "checkpoints" / SHIPPED / "model.safetensors"))
    if not file.is_file():
        raise InputError(f"weights {SHIPPED}: {file} is not there; install the package again, or give your own")
    return file


def _as_rgb(picture: Array | Tensor) -> Tensor:
    """(3,H,W) float in [0, 1]."""
    if isinstance(picture, Tensor):
        tensor = picture[None] if picture.ndim == 2 else picture
    else:
        array = np.ascontiguousarray(picture)
        tensor = torch.from_numpy(array[..., None] if array.ndim == 2 else array)
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or not tensor.numel():
        raise InputError(f"picture: found shape {tuple(tensor.shape)} (channels first); expected 1 or 3 channels")
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    elif not tensor.is_floating_point() or not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise InputError(f"picture: found {tensor.dtype} outside of [0, 1]; give uint8, or float in [0, 1]")
    return tensor.float().expand(3, -1, -1)


def _numbers(values: ArrayLike, what: str, columns: int) -> Tensor:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{what}: found no list of numbers; expected {columns} numbers each") from None
    array = array.reshape(-1, columns) if array.ndim == 1 and array.size == columns else array
    if array.ndim != 2 or array.shape[1] != columns:
        raise InputError(f"{what}: found shape {array.shape}; expected {columns} numbers each")
    if not np.isfinite(array).all():
        raise InputError(f"{what}: found nan or infinity; expected finite pixels")
    return torch.from_numpy(array).float()


def _inside(array: Tensor, what: str, size: tuple[int, int]) -> None:
    height, width = size
    limit = array.new_tensor([width, height]).repeat(array.shape[1] // 2)
    outside = ((array < 0) | (array >= limit)).any(1)
    if bool(outside.any()):
        shown = ", ".join(f"{value:g}" for value in array[outside][0].tolist())
        raise InputError(f"{what}: found ({shown}) outside of the picture; expected inside of {width}x{height}")


def _points(
    points: ArrayLike | None, labels: ArrayLike | None, size: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    if points is None or np.size(np.asarray(points, object)) == 0:
        if labels is not None and np.size(np.asarray(labels, object)):
            raise InputError("labels: found labels without points; give a point for each")
        return None, None
    array = _numbers(points, "points", 2)
    if len(array) > MAX_POINTS:
        raise InputError(f"points: found {len(array)}; expected at most {MAX_POINTS} for one object")
    _inside(array, "points", size)
    if labels is None:
        return array, torch.ones(len(array), dtype=torch.long)
    marks = np.asarray(labels, object).ravel()
    if len(marks) != len(array):
        raise InputError(f"labels: found {len(marks)} for {len(array)} points; expected one for each")
    for mark in marks:
        if mark not in (0, 1):
            raise InputError(f"labels: found {mark!r}; expected 1 (on the object) or 0 (off it)")
    return array, torch.tensor([int(mark) for mark in marks])


def _box(box: ArrayLike | None, size: tuple[int, int]) -> Tensor | None:
    if box is None:
        return None
    array = _numbers(box, "box", 4)
    if len(array) != 1:
        raise InputError(f"box: found {len(array)} boxes; expected one for one object")
    x0, y0, x1, y1 = array[0].tolist()
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"box: found ({x0:g}, {y0:g}, {x1:g}, {y1:g}); expected x0 < x1 and y0 < y1")
    _inside(array, "box", size)
    return array[0]
