"""The stream of training items and the loaders. Item n depends on (seed, n) alone, so a resumed run sees exactly the
batches that an uninterrupted one would have seen."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusionsam.config.schema import DataConfig
from fusionsam.data.dataset import Item, PairDataset, collate
from fusionsam.data.transforms import TrainTransform, eval_transform
from fusionsam.io import progress_bar
from fusionsam.types import Batch, InputError

_PROGRESS_FROM = 300  # labels; fewer are read in a few seconds


def class_pixels(dataset: PairDataset, num_classes: int | None = None) -> Tensor:
    """int64 (n,K): label pixels of each class in each pair; zeros for pairs without a label and for extra ones,
    whose labels may be guesses."""
    classes = dataset.num_classes if num_classes is None else num_classes
    counts = torch.zeros(len(dataset), classes, dtype=torch.long)
    for index in progress_bar(range(len(dataset)), desc="reading labels", disable=len(dataset) < _PROGRESS_FROM):
        label = None if dataset.entries[index].extra else dataset.label(index)
        if label is not None:
            counts[index] = torch.bincount(label.flatten(), minlength=256)[:classes]
    return counts


def class_shares(dataset: PairDataset, num_classes: int | None = None) -> Tensor:
    """float (K,), sums to 1: share of each class in all label pixels. InputError if no pair has a label."""
    counts = class_pixels(dataset, num_classes).sum(0).double()
    if counts.sum() == 0:
        raise InputError("class_shares: none of the pairs has a label; expected labelled training data")
    return (counts / counts.sum()).float()


def _seeded(*parts: int | str) -> torch.Generator:
    """A generator for these parts; hashed, because neighbouring Mersenne twister seeds give related streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class TrainStream(Dataset[Item]):
    """steps * batch_size training items, the first of them number start_step * batch_size of the endless stream. Of
    several `devices` each takes its part of every step: together they see what one would with batches as large as
    theirs together.

    An index is drawn by rare_sampling: a foreground class uniformly, then an image that holds it; else the images go
    round in a new order each epoch. With extra_share, labelled pairs are drawn so; extra pairs and those without a
    label, drawn uniformly, make that share of the items."""

    def __init__(
        self,
        dataset: PairDataset,
        transform: TrainTransform,
        config: DataConfig,
        batch_size: int,
        seed: int,
        start_step: int,
        steps: int,
        device: int = 0,
        devices: int = 1,
    ) -> None:
        if len(dataset) == 0:
            raise InputError("training data: no pairs; expected at least one")
        self.dataset, self.transform, self.config, self.seed = dataset, transform, config, seed
        self.batch_size, self.start_step, self.length = batch_size, start_step, steps * batch_size
        self.rank, self.devices = device, devices
        self._order: tuple[int, list[int]] = (-1, [])
        self._with_class: list[list[int]] = []
        self._round, self._extra = list(range(len(dataset))), list[int]()
        extra = [index for index, entry in enumerate(dataset.entries) if entry.extra or entry.label is None]
        if 0 < len(extra) < len(dataset):
            self._round, self._extra = sorted(set(self._round) - set(extra)), extra
        if config.rare_sampling > 0 or config.paste > 0:
            foreground = transform.foreground.tolist()
            counts = class_pixels(dataset, max(foreground, default=0) + 1)
            holders = [counts[:, c].nonzero().flatten().tolist() for c in foreground]
            self._with_class = [images for images in holders if images]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.length:
            raise IndexError(index)
        step, place = divmod(index, self.batch_size)
        number = ((self.start_step + step) * self.devices + self.rank) * self.batch_size + place
        generator = _seeded(self.seed, number)
        sample = self.dataset[self._image(number, generator)]
        other = None
        if self.config.paste > 0 and self._with_class and sample.label is not None:
            other = self.dataset[self._rare(generator)]
        return self.transform(sample, generator, other)

    def _image(self, number: int, generator: torch.Generator) -> int:
        if self._extra and float(torch.rand((), generator=generator)) < self.config.extra_share:
            return self._extra[int(torch.randint(len(self._extra), (), generator=generator))]
        if self._with_class and float(torch.rand((), generator=generator)) < self.config.rare_sampling:
            return self._rare(generator)
        epoch, place = divmod(number, len(self._round))
        if self._order[0] != epoch:
            order = torch.randperm(len(self._round), generator=_seeded(self.seed, "epoch", epoch))
            self._order = (epoch, [self._round[i] for i in order.tolist()])
        return self._order[1][place]

    def _rare(self, generator: torch.Generator) -> int:
        images = self._with_class[int(torch.randint(len(self._with_class), (), generator=generator))]
        return images[int(torch.randint(len(images), (), generator=generator))]


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def train_loader(
    dataset: PairDataset,
    config: DataConfig,
    foreground: tuple[int, ...] | list[int],
    batch_size: int,
    seed: int,
    start_step: int = 0,
    steps: int = 1,
    device: int = 0,
    devices: int = 1,
) -> DataLoader[Batch]:
    """Batches of `steps` optimiser steps from `start_step` on, made by config.workers processes: those of one `device`
    (0 to devices - 1), `batch_size` pairs each."""
    transform = TrainTransform(config, foreground)
    stream = TrainStream(dataset, transform, config, batch_size, seed, start_step, steps, device, devices)
    return DataLoader(
        stream,  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=False,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        prefetch_factor=4 if config.workers else None,
        worker_init_fn=_one_thread,
        collate_fn=collate,
    )


class _Evaluation(Dataset[Item]):
    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        return eval_transform(self.dataset[index])


def val_loader(dataset: PairDataset, workers: int = 0) -> DataLoader[Batch]:
    """Every pair once, in order, at full size, one a batch (sizes may differ from pair to pair)."""
    return DataLoader(
        _Evaluation(dataset),  # type: ignore[arg-type]
        batch_size=1,
        shuffle=False,
        num_workers=workers,
        worker_init_fn=_one_thread,
        collate_fn=collate,
    )
