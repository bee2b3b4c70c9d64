"""One reader for every row of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.maker import MakerAligner
from fusionsam.config.datasets import DatasetRow, find
from fusionsam.data.infrared import DEFAULT, InfraredOptions
from fusionsam.data.label_files import read_label
from fusionsam.data.pairs import read_pair
from fusionsam.data.splits import Entry, entries
from fusionsam.types import IGNORE, Batch, InputError, LabelledSample, Sample


class Item(NamedTuple):
    """One pair as the network sees it."""

    visible: Tensor  # float (3,H,W) in [0,1]
    infrared: Tensor  # float (1,H,W) in [0,1]
    label: Tensor | None  # int64 (H,W)
    present: Tensor  # bool (2)
    id: str
    covered: Tensor | None = None  # bool (2,H,W): where the visible, where the infrared camera reaches
    taught: Tensor | None = None  # int64 (H,W): ids of a teacher's classes, 255 = unsure


CACHE = 4 << 30
"""Bytes of decoded pairs that a data set keeps; what does not fit is read from disk each time."""


class PairDataset(Dataset[Sample]):
    """Samples of a list of entries, read from disk at each access, or with `cache` once, up to CACHE bytes of them.

    With a `row` that names classes, label ids outside of 0..K-1 (and 255, ignore) raise InputError naming the file.
    So do arrays of one pair whose sizes differ, unless `align` brings the pairs (those of data.extra_pairs aside) into
    one frame."""

    def __init__(
        self, entries: Sequence[Entry], row: DatasetRow | None = None, cache: bool = False, align: Aligner | None = None
    ) -> None:
        self.align = align
        self.entries = list(entries)
        self.row = row
        self._cache: dict[int, Sample] | None = {} if cache else None
        self._room = CACHE

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        if self._cache is None:
            return self._read(index)
        if (kept := self._cache.get(index)) is not None:
            return replace(kept, label=None if kept.label is None else kept.label.long())
        sample = self._read(index)
        # Ids are kept in 8 bits: as int64 the label would take twice the room of both images together.
        small = None if sample.label is None else sample.label.to(torch.uint8)
        size = sum(
            array.nbytes
            for array in (sample.visible, sample.infrared, small, sample.covered, sample.taught)
            if array is not None
        )
        if size > self._room:
            self._room = 0  # full: where labels alone are asked for, labels alone are read from now on
            return sample
        self._room -= size
        self._cache[index] = replace(sample, label=small)
        return sample

    def _read(self, index: int) -> Sample:
        entry = self.entries[index]
        return read_sample(entry, self.row, None if entry.extra else self.align)  # those are of cameras of their own

    def label(self, index: int) -> Tensor | None:
        """int64 (H,W) of one pair without decoding its images (unless the cache has them or will want them)."""
        entry = self.entries[index]
        if self._cache is not None and (index in self._cache or self._room > 0):
            return self[index].label
        return None if entry.label is None else _read_label(entry, self.row)

    @property
    def num_classes(self) -> int:
        """K of the row; 0 without one."""
        return 0 if self.row is None else self.row.num_classes


class LabelledPairs(PairDataset):
    """Pairs of a data set with classes, each of them with a label."""

    row: DatasetRow

    def __init__(self, entries: Sequence[Entry], row: DatasetRow, cache: bool = False) -> None:
        super().__init__(entries, row, cache)

    def __getitem__(self, index: int) -> LabelledSample:
        sample = super().__getitem__(index)
        return LabelledSample(**{**vars(sample), "label": _told(sample.label, sample.id)})

    def label(self, index: int) -> Tensor:
        """As of any data set; InputError where there is none."""
        return _told(super().label(index), self.entries[index].id)


def _told(label: Tensor | None, id: str) -> Tensor:
    if label is None:
        raise InputError(f"{id}: has no label; add it or leave the pair off the list")
    return label


def open_labelled_split(
    dataset: str, root: str | Path, split: str, class_file: str | Path | None = None
) -> LabelledPairs:
    """The split of a data set with classes, to be scored on. InputError as `open_split`, if the data set has no
    classes, and if a pair has no label."""
    data = open_split(dataset, root, split, class_file)
    if data.row is None or not data.row.classes:
        raise InputError(f"dataset {dataset!r} has no classes of its own; give --class-file with classes, palette")
    unlabelled = [entry.id for entry in data.entries if entry.label is None]
    if unlabelled:
        raise InputError(
            f"{root}: {len(unlabelled)} pairs of split {split!r} have no label (first: {', '.join(unlabelled[:5])}); "
            "add their labels or take them off the list"
        )
    return LabelledPairs(data.entries, data.row)


def open_split(
    dataset: str,
    root: str | Path,
    split: str,
    class_file: str | Path | None = None,
    cache: bool = False,
    align: Aligner | None = None,
) -> PairDataset:
    """The split of a data set, ready to read. Raises InputError as `splits.entries` and `catalog.find` do."""
    return PairDataset(entries(dataset, root, split, class_file), find(dataset, class_file), cache, align)


def read_pictures(entry: Entry, reading: InfraredOptions = DEFAULT) -> Sample:
    """Both images of one entry as they are, of whatever sizes. `reading` says how the infrared picture becomes heat.
    Raises InputError for unreadable files."""
    pair = read_pair(entry, reading)
    visible, infrared = pair.visible, pair.infrared
    if entry.mirrored:
        visible = None if visible is None else visible.flip(-1)
        infrared = None if infrared is None else infrared.flip(-1)
    return Sample(entry.id, visible, infrared, input=pair.facts, notices=pair.notices)


def read_sample(
    entry: Entry, row: DatasetRow | None = None, align: Aligner | None = None, reading: InfraredOptions = DEFAULT
) -> Sample:
    """Both images and the label of one entry, of two cameras that `align` brings into one frame (the label's is that
    frame). `reading` says how the infrared picture becomes heat. Raises InputError for unreadable files, differing
    sizes, strange ids."""
    pictures = read_pictures(replace(entry, mirrored=False), reading)  # a rig is of the pictures as they were taken
    visible, infrared = pictures.visible, pictures.infrared
    label = None if entry.label is None else _read_label(entry, row)
    taught = _read_taught(entry)
    covered, told = None, {}
    if isinstance(align, MakerAligner) and entry.radiometric is None:
        raise InputError(f"{entry.id}: is no radiometric file, which --align maker is for; give a rig.json, or auto")
    # the maker's own alignment of a radiometric file is applied already, and stands beside that of a rig
    if align is not None and entry.radiometric is not None and not isinstance(align, MakerAligner):
        align = None
    if align is not None and visible is not None and infrared is not None:
        try:
            aligned = align(visible, infrared)
        except InputError as error:
            raise InputError(f"{entry.id}: {error}") from None
        visible, infrared, covered, told = aligned.visible, aligned.infrared, aligned.covered, aligned.told
    if entry.mirrored:
        covered = None if covered is None else covered.flip(-1)
        visible = None if visible is None else visible.flip(-1)
        infrared = None if infrared is None else infrared.flip(-1)
    sizes = {
        str(path): tuple(array.shape[-2:])
        for path, array in (
            (entry.rgbt or entry.radiometric or entry.visible, visible),
            (entry.rgbt or entry.radiometric or entry.infrared, infrared),
            (entry.label, label),
            (entry.taught, taught),
        )
        if array is not None
    }
    if len(set(sizes.values())) > 1:
        turned = {
            str(path): pictures.input.get(camera, {}).get("orientation")
            for camera, path in (("visible", entry.visible), ("infrared", entry.infrared))
        }
        found = ", ".join(
            f"{path} is {height}x{width}{f' after its orientation {turn}' if (turn := turned.get(path)) else ''}"
            for path, (height, width) in sizes.items()
        )
        raise InputError(
            f"{entry.id}: sizes differ: {found} (height x width); expected one aligned size; give --align auto, or "
            "a rig.json of `fusionsam align`"
        )
    return Sample(entry.id, visible, infrared, label, covered, told, pictures.input, pictures.notices, taught)


def _read_taught(entry: Entry) -> Tensor | None:
    if entry.taught is None:
        return None
    taught = read_label(entry.taught, None)
    return (taught.flip(-1) if entry.mirrored else taught).to(torch.uint8)


def _read_label(entry: Entry, row: DatasetRow | None) -> Tensor:
    assert entry.label is not None
    label = read_label(entry.label, row.palette if row is not None and row.palette else None)
    if row is not None and row.labels_map and not entry.extra:  # label maps of extra pairs have the classes' own ids
        stored = label
        label = stored.clone()
        for found, meant in row.labels_map.items():
            label[stored == found] = meant
    if row is not None and row.classes:
        # counting is far cheaper than sorting, but takes no negative ids
        low, high = (int(end) for end in label.aminmax())
        seen = label.unique() if low < 0 or high > IGNORE else torch.bincount(label.flatten()).nonzero().flatten()
        bad = [i for i in seen.tolist() if not 0 <= i < row.num_classes and i != IGNORE]
        if bad:
            mend = f"give --ignore {' '.join(map(str, bad[:8]))} or --labels-map {bad[0]}:CLASS"
            if bad == [row.num_classes] and not bool((label == 0).any()):
                mend = f"if they count from 1, give --labels-map {counted_from_1(row.num_classes)}; else {mend}"
            if entry.extra:
                mend = "a label map of data.extra_labels holds the ids of the classes that are trained"
            raise InputError(
                f"{entry.label}: label ids {bad[:8]} are outside of 0..{row.num_classes - 1} ("
                f"{row.num_classes} classes of {row.name!r}; {IGNORE} = ignore); {mend}, or the right class file"
            )
    return label.flip(-1) if entry.mirrored else label


def counted_from_1(classes: int) -> str:
    """What --labels-map takes where ids count from 1: "1:0 2:1"."""
    return " ".join(f"{index + 1}:{index}" for index in range(classes))


def collate(items: Sequence[Item]) -> Batch:
    """Items of one size as a Batch. Where only some have a label, the others get the ignore id everywhere."""
    visible, infrared, labels, present, ids, masks, taught = zip(*items, strict=True)
    size = visible[0].shape[-2:]
    covered = None
    blank = torch.full(size, IGNORE, dtype=torch.long)
    label, lesson = (
        torch.stack([blank if item is None else item for item in maps]) if any(m is not None for m in maps) else None
        for maps in (labels, taught)
    )
    if any(item is not None for item in masks):
        everywhere = torch.ones(2, *size, dtype=torch.bool)
        covered = torch.stack([everywhere if item is None else item for item in masks])
    return Batch(torch.stack(visible), torch.stack(infrared), label, torch.stack(present), list(ids), covered, lesson)
