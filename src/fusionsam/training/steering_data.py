"""What steering learns from: the frozen network's outputs for varied training pairs, kept once, and examples drawn from
them in which a person would click.

On pairs it was trained on the network hardly errs, so the errors of an example are in part made: an object's logits are
weakened, moved or turned into another class, features are left out, and sometimes another class is asked for than the
one that stands there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fusionsam.config.schema import Config
from fusionsam.data.dataset import PairDataset
from fusionsam.data.loader import TrainStream, val_loader
from fusionsam.data.transforms import TrainTransform
from fusionsam.io import progress_bar
from fusionsam.metrics.interaction import Bools, box_of, objects
from fusionsam.models.network import PICTURE, FusionSAMNetwork
from fusionsam.models.prompts import CELL
from fusionsam.types import Batch, InputError

SMALLEST_OBJECT = 60
"""Pixels; smaller regions are not clicked at in training."""
OTHER_CLASS = 0.1
"""Share of the objects for which another class is asked than their own: the click decides."""
BOXED = 0.12
"""Share of the objects whose box is a prompt, too."""
ROUNDS = (1, 1, 2, 3, 4)
"""Clicks at each object of a batch: one of these by chance."""
VALIDATED = 8
"""Of so many validation pairs one is clicked at: every click costs a pass."""


@dataclass(frozen=True)
class Seen:
    """One varied pair: what steering sees of it, and its label."""

    context: Tensor  # float16 (C,h,w)
    logits: Tensor  # float16 (K,h,w), of the first pass
    label: NDArray[np.uint8]  # (H,W)


@dataclass
class Examples:
    """A batch of objects to be clicked at."""

    context: Tensor  # (B,C,h,w)
    logits: Tensor  # (B,K,h,w)
    label: Tensor  # int64 (B,H,W), in which the object has the class that is asked for
    asked: Tensor  # int64 (B), that class
    box: Tensor  # bool (B,H,W), the object's box
    truth: Tensor  # (B,K,h,w), the share of each class in a cell; all 0 where the label is unknown
    boxed: Tensor  # bool (B), whether its box is given as a prompt, too
    rounds: int  # clicks at each
    seed: int

    def to(self, device: torch.device | str) -> Examples:
        """The same on another device."""
        names = ("context", "logits", "label", "asked", "box", "truth", "boxed")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@torch.inference_mode()
def see(network: FusionSAMNetwork, data: PairDataset, config: Config) -> list[Seen]:
    """`train.steering_pairs` varied training pairs through the frozen network. InputError for one without a label."""
    transform = TrainTransform(config.data, config.model.foreground)
    number = config.train.steering_pairs
    stream = TrainStream(data, transform, config.data, 1, config.train.seed, 0, number)
    device = next(network.parameters()).device
    found = []
    for index in progress_bar(range(number), desc="frozen network", unit="pair"):
        item = stream[index]
        if item.label is None:
            raise InputError(f"data: {item.id} has no label, and steering learns from labels alone; leave it out")
        there = None if bool(item.present.all()) else item.present[None].to(device)
        reached = None if item.covered is None else item.covered[None].to(device)
        encoded = network.encode(item.visible[None].to(device), item.infrared[None].to(device), there, reached)
        first = network.first_pass(encoded)
        context = network.steering_context(encoded, first)[0].half().cpu()
        found.append(Seen(context, first.logits[0].half().cpu(), item.label.to(torch.uint8).numpy()))
    return found


def statistics(seen: Sequence[Seen]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C) of the context's channels."""
    some = torch.stack([one.context[:, ::4, ::4].float() for one in seen[:: max(1, len(seen) // 100)]])
    return some.mean((0, 2, 3)), some.std((0, 2, 3)) + 1e-3


class Drawn(Dataset[Examples]):
    """The batches of the steps from `start` on; each depends on the seed, its step, and the device of several."""

    def __init__(
        self,
        seen: Sequence[Seen],
        config: Config,
        network: FusionSAMNetwork,
        start: int,
        steps: int,
        device: int = 0,
        devices: int = 1,
    ) -> None:
        assert network.steering is not None
        self.seen, self.config, self.start, self.steps = seen, config, start, steps
        self.device, self.devices = device, devices
        self.middle, self.head_width = network.steering.mean.cpu(), network.head.feature_channels
        self.table: dict[int, list[tuple[int, Bools]]] = {}
        for number, one in enumerate(seen):
            for each in objects(one.label.astype(int), SMALLEST_OBJECT):
                self.table.setdefault(each.class_id, []).append((number, each.mask))
        if not self.table:
            raise InputError(
                f"data.train_split: no object of {SMALLEST_OBJECT} pixels in {len(seen)} varied pairs; raise "
                "train.steering_pairs or data.crop"
            )

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, index: int) -> Examples:
        step = (self.start + index) * self.devices + self.device  # each device has examples of its own
        rng = np.random.default_rng((self.config.train.seed, step))
        parts = [self._example(rng) for _ in range(self.config.train.batch_size)]
        context, logits, label, asked, box = (list(values) for values in zip(*parts, strict=True))
        shares = [_shares(each, logits[0].shape[0]) for each in label]
        return Examples(
            torch.stack(context),
            torch.stack(logits),
            torch.from_numpy(np.stack(label)),
            torch.tensor(asked),
            torch.from_numpy(np.stack(box)),
            torch.stack(shares),
            torch.from_numpy(rng.random(len(parts)) < BOXED),
            int(rng.choice(ROUNDS)),
            step,
        )

    def _example(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, NDArray[np.int64], int, Bools]:
        """One object: by half of the draws of a class drawn alike, else any."""
        kinds = sorted(self.table)
        sizes = np.array([len(self.table[kind]) for kind in kinds])
        chance = 0.5 / len(kinds) + 0.5 * sizes / sizes.sum()
        kind = int(rng.choice(kinds, p=chance))
        number, mask = self.table[kind][int(rng.integers(len(self.table[kind])))]
        one = self.seen[number]
        box = box_of(mask)
        label, asked = one.label.astype(np.int64), kind
        if rng.random() < OTHER_CLASS:
            asked = int(rng.choice(self.config.model.foreground))
            label[box & (label == kind)] = asked
        context, logits = one.context.float(), one.logits.float()
        logits = _with_errors(logits, mask, kind, asked, self.config.model.foreground, rng)
        return self._without_features(context, rng), logits, label, asked, box

    def _without_features(self, context: Tensor, rng: np.random.Generator) -> Tensor:
        """Now and then all that the head sees, or z_f and mask features, at their mean: on training pairs they know
        the class too well."""
        width = self.head_width
        for part, share in ((slice(0, width), 0.35), (slice(width, -PICTURE), 0.2)):
            if rng.random() < share:
                context[part] = self.middle[part, None, None]
        return context


def _with_errors(
    logits: Tensor, mask: Bools, kind: int, asked: int, foreground: Sequence[int], rng: np.random.Generator
) -> Tensor:
    """First-pass logits (K,h,w) that err at an object (mask (H,W)) of class `kind`: in 4 of 10 draws as they are."""
    draw, push = rng.random(), float(rng.uniform(1, 8))
    if draw >= 0.6:
        return logits
    part = ndimage.binary_dilation(mask, iterations=int(rng.integers(1, 10)))
    if rng.random() < 0.5:  # on one side of a line through the object
        ys, xs = np.nonzero(mask)
        here, angle = int(rng.integers(len(ys))), rng.random() * 2 * np.pi
        rows, columns = np.indices(mask.shape)
        part &= (columns - xs[here]) * np.cos(angle) + (rows - ys[here]) * np.sin(angle) > 0
    if draw >= 0.45:  # too much of it
        part = np.roll(part, tuple(rng.integers(-32, 33, 2)), (0, 1))
        logits[asked] += push * _cells(part)
        return logits
    for index in {kind, asked}:
        logits[index] -= push * _cells(part)
    instead = 0 if rng.random() < 0.7 else int(rng.choice(foreground))
    if instead != asked:
        logits[instead] += push / 2 * _cells(part)
    return logits


def _shares(label: NDArray[np.int64], classes: int) -> Tensor:
    """(H,W) -> share of each class in each latent cell (K,h,w)."""
    hot = torch.from_numpy(label[None] == np.arange(classes)[:, None, None])
    return F.avg_pool2d(hot.float()[None], CELL)[0]


def _cells(mask: Bools) -> Tensor:
    """(H,W) -> share of each latent cell (h,w)."""
    return F.avg_pool2d(torch.from_numpy(mask).float()[None, None], CELL)[0, 0]


class SteeringData(L.LightningDataModule):
    """The examples from the step a run has reached, and every VALIDATED-th pair of the validation split."""

    def __init__(
        self, config: Config, network: FusionSAMNetwork, train: PairDataset, val: PairDataset, total_steps: int
    ) -> None:
        super().__init__()
        self.config, self.network, self.train, self.val, self.total_steps = config, network, train, val, total_steps

    def train_dataloader(self) -> DataLoader[Examples]:
        """Begins where the run stands; the frozen network sees its pairs first, and steering is told what is usual."""
        assert self.trainer is not None
        steering, start = self.network.steering, self.trainer.global_step
        assert steering is not None
        seen = see(self.network.eval(), self.train, self.config)
        if not start:
            steering.normalise(*statistics(seen))
        at = self.trainer.global_rank, self.trainer.world_size
        drawn = Drawn(seen, self.config, self.network, start, self.total_steps, *at)
        return DataLoader(drawn, batch_size=None, shuffle=False)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Pairs at full size."""
        return val_loader(PairDataset(self.val.entries[::VALIDATED], self.val.row, align=self.val.align))
