"""Fingerprints of pairs: hashes by which an image is known again, and from which none can be made.

The leak guard compares those of two splits; a checkpoint carries those of what it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusionsam.data.dataset import PairDataset, read_pictures
from fusionsam.data.notices import CHECK_TELLS, NoticeBook
from fusionsam.data.splits import FLIP, Entry
from fusionsam.io import progress_bar, write_text
from fusionsam.types import InputError, Sample

FILE = "training_fingerprints.json"
"""Beside the weights of a checkpoint."""
_MARGINS = [(m, m, m, m) for m in (0.0, 0.025, 0.05)] + [
    (0.05, 0.0, 0.0, 0.0), (0.0, 0.05, 0.0, 0.0), (0.0, 0.0, 0.05, 0.0), (0.0, 0.0, 0.0, 0.05)
]  # fmt: skip
"""Borders cut off before hashing: shares of width and height at left, top, right, bottom; the first is the whole."""
_FLAT = 2.0  # grey levels; the hash of a picture flatter than this is noise
_PROGRESS_FROM = 200

Digests = tuple[str | None, str | None]
"""Of the visible and the infrared pixels; None for one that is absent or of a single value, which tells nothing."""


@dataclass
class Fingerprints:
    """What is remembered of the images of one split."""

    places: list[set[tuple[str, str]]] = field(default_factory=list)  # (folder, id without _flip) of each file
    content: list[Digests] = field(default_factory=list)
    mirrored: list[Digests] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)  # (2 * borders, 2): as it is, mirrored, in turn
    known: list[NDArray[np.bool_]] = field(default_factory=list)  # (2,): visible, infrared there and not flat

    def add(self, entry: Entry, sample: Sample) -> None:
        """Remember one pair."""
        stem = entry.id.removesuffix(FLIP)
        files = [path for path in (entry.rgbt, entry.radiometric, entry.visible, entry.infrared) if path is not None]
        self.places.append({(str(Path(path).resolve().parent), stem) for path in files})
        arrays = [sample.visible, sample.infrared]
        self.content.append((_digest(sample.visible), _digest(sample.infrared)))
        mirrored = [None if array is None else array.flip(-1) for array in arrays]
        self.mirrored.append((_digest(mirrored[0]), _digest(mirrored[1])))
        both = [_variants(array) for array in arrays]
        self.hashes.append(np.stack([hashes for hashes, _ in both], axis=1))
        self.known.append(np.array([known for _, known in both]))

    def extend(self, other: Fingerprints) -> None:
        """Take over what `other` remembers of further pairs."""
        known = {pair for pair in self.content if any(pair)}
        new = []
        for place, pair in enumerate(other.content):
            if pair not in known:
                new.append(place)
            if any(pair):
                known.add(pair)
        for each in fields(self):
            theirs = getattr(other, each.name)
            getattr(self, each.name).extend(theirs[place] for place in new)

    def write(self, folder: str | Path) -> None:
        """Store FILE beside weights: of each pair and modality the content's digest and the perceptual hashes of its
        borders, from which no picture can be made. InputError if it cannot be written."""
        rows = [
            {
                "content": list(content),
                "hashes": [_as_text(hashes[::2, m]) if known[m] else None for m in (0, 1)],
            }
            for content, hashes, known in zip(self.content, self.hashes, self.known, strict=True)
        ]
        text = "\n".join(["[", ",\n".join(json.dumps(row) for row in rows), "]"]) + "\n"
        write_text(Path(folder) / FILE, text, "choose a writable folder")

    @classmethod
    def read(cls, folder: str | Path) -> Fingerprints | None:
        """What weights in `folder` were trained on; None where nothing is told. Its `places` and `mirrored` are empty.
        InputError for a damaged file."""
        path, found = Path(folder) / FILE, cls()
        if not path.is_file():
            return None
        try:
            for row in json.loads(path.read_text(encoding="utf-8")):
                visible, infrared = row["content"]
                columns = [_from_text(text) for text in row["hashes"]]
                found.places.append(set())
                found.content.append((visible, infrared))
                found.mirrored.append((None, None))
                found.hashes.append(np.stack([hashes for hashes, _ in columns], axis=1))
                found.known.append(np.array([known for _, known in columns]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({str(error)[:80]}); fetch the checkpoint again") from None
        return found

    @classmethod
    def together(cls, folders: Iterable[str | Path]) -> Fingerprints | None:
        """What weights of all `folders` together were trained on; None where none of them tells."""
        known = [seen for folder in folders if (seen := cls.read(folder)) is not None]
        if not known:
            return None
        found = cls()
        for seen in known:
            found.extend(seen)
        return found


def _as_text(hashes: NDArray[np.uint64]) -> str:
    return hashes.astype(">u8").tobytes().hex()


def _from_text(text: str | None) -> tuple[NDArray[np.uint64], bool]:
    if text is None:
        return np.zeros(2 * len(_MARGINS), dtype=np.uint64), False
    hashes = np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64)
    if len(hashes) != len(_MARGINS):
        raise ValueError(f"{len(hashes)} hashes, expected {len(_MARGINS)}")
    return np.repeat(hashes, 2), True


def _digest(array: Tensor | None) -> str | None:
    if array is None or array.min() == array.max():
        return None
    return hashlib.sha256(repr(tuple(array.shape)).encode() + array.contiguous().numpy().tobytes()).hexdigest()[:16]


def _variants(array: Tensor | None) -> tuple[NDArray[np.uint64], bool]:
    """dHashes (2 * margins,) of the picture and its mirror under every margin, and whether they mean anything."""
    count = 2 * len(_MARGINS)
    if array is None:
        return np.zeros(count, dtype=np.uint64), False
    pixels = array.numpy().transpose(1, 2, 0)
    grey = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("L")
    width, height = grey.size
    # Shrunk once, so that the fourteen variants cost little; the box of a resize may have fractions of pixels.
    small = grey.resize((min(width, 144), min(height, 128)), Image.Resampling.BOX).convert("F")
    hashes, known = [], True
    for left, top, right, bottom in _MARGINS:
        box = (left * small.width, top * small.height, (1 - right) * small.width, (1 - bottom) * small.height)
        cells = np.asarray(small.resize((9, 8), Image.Resampling.BOX, box=box))
        known = known and float(cells.std()) >= _FLAT
        for view in (cells, cells[:, ::-1]):
            bits = np.packbits((view[:, 1:] > view[:, :-1]).ravel())
            hashes.append(int.from_bytes(bits.tobytes(), "big"))
    return np.array(hashes, dtype=np.uint64), known


def fingerprint(name: str, entries: Sequence[Entry], progress: bool = True) -> Fingerprints:
    """Read every pair of a split once. Raises InputError for unreadable files."""
    found = Fingerprints()
    quiet = not progress or len(entries) < _PROGRESS_FROM
    for entry in progress_bar(entries, desc=f"leak guard: {name}", disable=quiet):
        found.add(entry, read_pictures(entry))
    return found


def of_training(data: PairDataset, started_from: Sequence[Path] = ()) -> Fingerprints:
    """Every pair of a training set, and what the checkpoint folders it `started_from` had seen before.

    Samples are read through the data set, so that a cache is filled and not read past. What was guessed of their files
    is said."""
    found, notices = Fingerprints(), NoticeBook()
    for index, entry in enumerate(data.entries):
        sample = data[index] if data.align is None else read_pictures(entry)
        found.add(entry, sample)
        notices.add(sample)
    notices.close(CHECK_TELLS)
    if (earlier := Fingerprints.together(started_from)) is not None:
        found.extend(earlier)
    return found
