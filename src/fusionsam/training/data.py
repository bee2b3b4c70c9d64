"""The pairs of a training: which lists, what is refused, and the Lightning data module."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from fusionsam.config.datasets import DatasetRow, find
from fusionsam.config.schema import Config, DataConfig
from fusionsam.data.dataset import PairDataset, read_pictures
from fusionsam.data.fingerprints import Fingerprints, fingerprint
from fusionsam.data.label_faults import require_teachable
from fusionsam.data.label_files import read_label
from fusionsam.data.leaks import compare, require_no_leak, weigh
from fusionsam.data.loader import train_loader, val_loader
from fusionsam.data.predictions import PredictionFolder
from fusionsam.data.rigs import fit, names_file, open_aligner
from fusionsam.data.splits import Entry, entries, tell_layout
from fusionsam.types import SMALLEST, Batch, InputError, JsonObject, NoSplit


class PairData(L.LightningDataModule):
    """The training stream from the step a run has reached, and the validation split."""

    def __init__(self, config: Config, train: PairDataset, val: PairDataset, total_steps: int) -> None:
        super().__init__()
        self.config, self.train, self.val, self.total_steps = config, train, val, total_steps

    def train_dataloader(self) -> DataLoader[Batch]:
        """Begins where the run stands; Lightning ends it at max_steps."""
        assert self.trainer is not None
        return train_loader(
            self.train,
            self.config.data,
            self.config.model.foreground,
            self.config.train.batch_size,
            self.config.train.seed,
            start_step=self.trainer.global_step,
            steps=self.total_steps,
            device=self.trainer.global_rank,
            devices=self.trainer.world_size,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation pair at full size."""
        return val_loader(self.val)


def _refuse_leaks(data: DataConfig, lists: dict[str, list[Entry]]) -> None:
    """InputError if the splits share pictures with one another, or with the test split where that is beside them, and
    for a test split that is there and cannot be read."""
    if data.allow_train_test_leak_and_know_that_scores_are_worthless:
        return
    absent: list[str] = []
    learnt = {entry.id: split for split, found in lists.items() for entry in found if not entry.extra}
    try:
        lists = {"test": entries(data.dataset, data.root, "test", data.class_file, absent), **lists}
    except NoSplit:
        pass  # there is none beside the data
    except InputError as error:
        raise InputError(f"{error} (training is compared with the test split beside it)") from None
    if absent:
        told = f"leak guard: {len(absent)} test pairs have no image here, so they are known by name alone"
        tqdm.write(told, file=sys.stderr)
    if shared := [id for id in absent if id in learnt]:
        raise InputError(
            f"{data.root}: {shared[0]!r} is of the test split and of {learnt[shared[0]]!r} ({len(shared)} such ids); "
            "expected none in common; remove them from one list"
        )
    require_no_leak(lists)


def _lists(data: DataConfig) -> dict[str, list[Entry]]:
    """Entries of the training split, with the extra pairs behind them, and of the validation split; InputError for a
    leak between them or with the test split."""
    if data.extra_labels and len(data.extra_labels) != len(data.extra_pairs):
        raise InputError(
            f"data.extra_labels: {len(data.extra_labels)} folders for {len(data.extra_pairs)} of data.extra_pairs; "
            "give one for each, in the same order ('' for pairs that teach fusion alone)"
        )
    if data.train_split == data.val_split and not data.allow_train_test_leak_and_know_that_scores_are_worthless:
        raise InputError(
            f"data.val_split: {data.val_split!r} is data.train_split, too; give two, for example by lists "
            "train.txt and val.txt with one id a line"
        )
    lists = {s: entries(data.dataset, data.root, s, data.class_file) for s in (data.train_split, data.val_split)}
    tell_layout(data.dataset, data.root)
    row = find(data.dataset, data.class_file)
    if data.teacher_labels is not None:
        lists[data.train_split] = _with_teacher(lists[data.train_split], data.teacher_labels)
    for folder, labels in zip_longest(data.extra_pairs, data.extra_labels, fillvalue=""):
        # labels that lie beside them may be of other classes
        extra = [replace(entry, label=None, extra=True) for entry in entries("pairs", folder, "all")]
        if labels:
            extra = _with_label_maps(extra, labels, row)
        lists[data.train_split] = lists[data.train_split] + extra
    _refuse_leaks(data, lists)
    return lists


def _with_label_maps(pairs: list[Entry], folder: str, row: DatasetRow) -> list[Entry]:
    """The pairs with their label maps in `folder`. InputError if there is none, or if what `fusionsam predict` wrote
    beside one tells of other classes."""
    paths = PredictionFolder(folder, [entry.id for entry in pairs], row.palette, "ids").paths
    for id, path in paths.items():
        beside = path.with_name(f"{id}.json")
        try:
            told = json.loads(beside.read_text(encoding="utf-8"))["classes"]
            ids = {name: int(found["id"]) for name, found in told.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not ours: a label map of somebody's own needs no JSON
        for name, index in ids.items():
            if index >= row.num_classes or row.classes[index] != name:
                there = repr(row.classes[index]) if index < row.num_classes else "no class"
                raise InputError(
                    f"data.extra_labels: {beside} has class {index} as {name!r}, in data set {row.name} it is {there}; "
                    "give label maps of the classes that are trained"
                )
    tqdm.write(f"data.extra_labels: {len(paths)} of {len(pairs)} pairs have a label map in {folder}")
    return [replace(entry, label=paths.get(entry.id)) for entry in pairs]


def _with_teacher(pairs: list[Entry], folder: str) -> list[Entry]:
    """The pairs with a teacher's label maps in `folder`. InputError where not one of them has any."""
    files = {path.stem: path for path in Path(folder).glob("*.png")}
    found = [replace(entry, taught=files.get(entry.id)) for entry in pairs]
    count = sum(entry.taught is not None for entry in found)
    if not count:
        raise InputError(
            f"data.teacher_labels: {folder} has a label map ID.png for none of {len(pairs)} training pairs (first: "
            f"{pairs[0].id}); give the folder of the maps, or leave it out"
        )
    tqdm.write(f"data.teacher_labels: {count} of {len(pairs)} pairs have a label map in {folder}", file=sys.stderr)
    return found


def _two_sets(
    data: DataConfig, lists: dict[str, list[Entry]], row: DatasetRow | None
) -> tuple[PairDataset, PairDataset]:
    """Training and validation pairs, those of two cameras brought into the visible one's frame; InputError where no rig
    is to be believed."""
    own = [entry for entry in lists[data.train_split] if not entry.extra]
    align = open_aligner(data.align, partial(fit, own), refine=data.align_refine)
    train, val = (PairDataset(lists[split], row, True, align) for split in (data.train_split, data.val_split))
    return train, val


def open_data(config: Config) -> tuple[PairDataset, PairDataset]:
    """Training split, data.extra_pairs behind it, and validation split; InputError for a leak between them or with the
    test split."""
    data = config.data
    row = find(data.dataset, data.class_file).with_labels_map(data.labels_map)
    lists = _lists(data)
    opened = _two_sets(data, lists, row)
    if not row.classes:
        raise InputError(f"data.class_file: data set {data.dataset!r} has no classes of its own; give a YAML with them")
    require_teachable(opened[0], row, Path(data.root), data.absent_classes)
    pairs = enumerate(zip_longest(config.model.classes, row.classes))
    if (odd := next(((i, *names) for i, names in pairs if names[0] != names[1]), None)) is not None:
        raise InputError(
            f"model.classes: class {odd[0]} is {odd[1]!r}, in the data it is {odd[2]!r}; remove model.classes, "
            "model.palette and model.foreground from the YAML, they come from the data set"
        )
    unlabelled = next((entry.id for entry in lists[data.val_split] if entry.label is None), None)
    if unlabelled is not None:
        raise InputError(
            f"data.val_split: {unlabelled} of {data.val_split!r} has no label; add it, or take the pair off the list"
        )
    require_sizes(opened[1])
    return opened


def require_sizes(val: PairDataset) -> None:
    """InputError for a validation pair that is too small: not after hours, at the first validation."""
    for index, entry in enumerate(val.entries):
        height, width = val[index].size
        if min(height, width) < SMALLEST:
            raise InputError(
                f"data.val_split: {entry.id} has {height}x{width} pixels, expected at least {SMALLEST} a side; "
                "resize the pair, or take it off the list"
            )


def open_unlabelled(config: Config) -> tuple[PairDataset, PairDataset]:
    """As `open_data`, but no pair has a label."""
    data = config.data
    unlabelled = {split: [replace(entry, label=None) for entry in found] for split, found in _lists(data).items()}
    return _two_sets(data, unlabelled, None)


def refuse_seen(config: Config, val: list[Entry], earlier: Sequence[Path]) -> None:
    """InputError if a validation picture is among those that `earlier`, folders of weights this run starts from, were
    trained on."""
    for source in earlier:
        seen = Fingerprints.read(source)
        if seen is None or config.data.allow_train_test_leak_and_know_that_scores_are_worthless:
            continue
        split, name = config.data.val_split, f"{source.name} (what it was trained on)"
        numbers = [f"pair {number}" for number in range(1, len(seen.content) + 1)]
        prints = {name: seen, split: fingerprint(split, val)}
        found, _ = weigh(compare(prints, {name: numbers, split: [e.id for e in val]}), {name: numbers, split: val})
        if found:
            pictures = len({leak.second_id for leak in found})
            raise InputError(
                f"data.val_split: {pictures} pictures were seen by {source}: {found[0]}; validate on others"
            )


def data_digests(data: DataConfig, train: PairDataset, val: PairDataset) -> JsonObject:
    """What decides the numbers of a training and `pairs_digest` does not tell of, by the settings that name it: the rig
    of a file (auto finds it in the pairs, and maker has none), a teacher's label maps, the validation pictures with
    their labels."""
    digests: JsonObject = {}
    if names_file(data.align):
        assert train.align is not None
        digests["data.align"] = train.align.rig.digest
    if data.teacher_labels is not None:
        taught = hashlib.sha256()
        for entry in train.entries:
            if entry.taught is not None:
                taught.update(entry.id.encode() + read_label(entry.taught, None).numpy().tobytes())
        digests["data.teacher_labels"] = taught.hexdigest()
    seen = hashlib.sha256()
    for index, entry in enumerate(val.entries):
        sample = val[index] if val.align is None else read_pictures(entry)
        label = val.label(index)
        for array in (sample.visible, sample.infrared, None if label is None else label.to(torch.uint8)):
            seen.update(b"none" if array is None else array.contiguous().numpy().tobytes())
    digests["data.val_split"] = seen.hexdigest()
    return digests


def pairs_digest(seen: Fingerprints, train: PairDataset, val: PairDataset) -> str:
    """16 hex digits that change with the training images and labels, their order, and the validation list; `seen`
    begins with the training pairs."""
    found = hashlib.sha256(repr((seen.content[: len(train)], [entry.id for entry in val.entries])).encode())
    for index, entry in enumerate(train.entries):
        if entry.label is not None and (label := train.label(index)) is not None:
            found.update(label.to(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
