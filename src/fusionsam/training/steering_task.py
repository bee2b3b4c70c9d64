"""Training of steering alone: clicks simulated at the errors of the frozen network, one round after the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fusionsam.config.schema import Config
from fusionsam.metrics.interaction import Click, correct, next_click, objects
from fusionsam.models.layers import resize
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.models.prompts import CELL
from fusionsam.training.segmentation_task import scheduled_optimizer
from fusionsam.training.steering_data import Examples
from fusionsam.training.task import Task, require_finite
from fusionsam.types import IGNORE, Batch, ClassClicks, InputError, Prompts
from fusionsam.weights.checkpoint import Card, load_network, read_card

CLICKS = 3
"""Clicks at an object in validation."""
VALID_OBJECT = 400
"""Pixels of the smallest object that is clicked at in validation."""
OUTSIDE = 300
"""Cells added to a box's area where what changes outside of it is weighed against it."""
STEERING = "steering"
"""What a checkpoint's card calls the training of its steering."""


def require_steering(config: Config) -> None:
    """InputError for settings that no training of steering can have."""
    if not config.model.start_from:
        raise InputError("model.start_from: none, but train.stage is steering; give the checkpoint to be steered")
    if not config.model.steering.width:
        raise InputError("model.steering.width: 0, but train.stage is steering; give its channels, 16 say")


def steered_network(config: Config) -> tuple[FusionSAMNetwork, Card]:
    """The network of model.start_from with a steering that knows nothing yet, and its card. InputError for other
    classes than those that are trained."""
    assert config.model.start_from
    network, _ = load_network(config.model.start_from, calibrated=False)
    stored, card = read_card(config.model.start_from)
    if stored.classes != config.model.classes:
        raise InputError(
            f"model.start_from: {config.model.start_from} knows {', '.join(stored.classes)}, the data other classes; "
            "expected the same"
        )
    if any(side % network.multiple for side in config.data.crop):  # what was seen before is kept in whole cells
        raise InputError(
            f"data.crop: {tuple(config.data.crop)}, expected multiples of {network.multiple} in stage steering of "
            f"{config.model.start_from}"
        )
    network.config = replace(stored, steering=config.model.steering)
    network.add_steering()
    return network, card


class SteeringTask(Task[FusionSAMNetwork]):
    """Only `network.steering` learns; the first pass is taken from what the frozen network gave before.

    The loss of a round: cross-entropy and Dice of the class asked for inside the object's box, and the divergence from
    the first pass outside of it, so that a click changes nothing elsewhere."""

    monitor = "val/iou_steered"

    def __init__(self, network: FusionSAMNetwork, config: Config, total_steps: int) -> None:
        network.requires_grad_(False)
        assert network.steering is not None
        network.steering.requires_grad_(True)
        super().__init__(network, config)
        self.total_steps = total_steps
        self.ious: list[tuple[float, float]] = []

    def training_step(self, batch: Examples, batch_index: int) -> Tensor:
        """As many rounds of clicks as the batch asks for; the mean of their losses."""
        steering = self.network.steering
        assert steering is not None
        rng = np.random.default_rng((self.settings.train.seed, batch.seed, 1))
        size = (batch.label.shape[1], batch.label.shape[2])
        user = _User(batch, rng)
        now, terms = _ids(batch.logits, size), []
        for round in range(batch.rounds):
            user.click(now, skip_boxed=round == 0)
            logits = steering(batch.context, batch.logits, user.clicks(self.network))
            terms.append(losses(logits, batch))
            now = _ids(logits, size)
        mean = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
        # where nothing at all is wrong in a batch no click is made, and no loss would have a gradient
        total = torch.stack(list(mean.values())).sum() + 0 * steering.out.weight.sum()
        require_finite(total, self.global_step, self.settings.train)
        self.log_dict({f"loss/{name}": value.detach() for name, value in mean.items()}, batch_size=len(batch.asked))
        self.log("loss/total", total.detach(), prog_bar=True, batch_size=len(batch.asked))
        return total

    def on_validation_epoch_start(self) -> None:
        """No object seen."""
        self.ious = []

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Click CLICKS times at every large object of a pair, as `fusionsam clicks --steer` does."""
        network = self.evaluated().eval()
        assert batch.label is not None
        encoded = network.encode(batch.visible, batch.infrared, batch.present, batch.covered)
        first = network.first_pass(encoded)
        label, device = batch.label[0].cpu().numpy(), batch.label.device

        def ask(prompts: Prompts | None) -> NDArray[np.integer]:
            given = None if prompts is None else prompts.to(device)
            ids: NDArray[np.integer] = network.decode(encoded, given, first=first).logits[0].argmax(0).cpu().numpy()
            return ids

        own = ask(None)
        for one in objects(label, VALID_OBJECT):
            ious = correct(ask, own, label, one, CLICKS).ious
            self.ious.append((ious[0], ious[-1]))

    def on_validation_epoch_end(self) -> None:
        """Log the mean IoU in the objects' boxes, in percent, before and after the clicks."""
        before, after = np.mean(self.ious or [(0.0, 0.0)], axis=0)
        self.log("val/iou_unsteered", 100 * float(before))
        self.log(self.monitor, 100 * float(after), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over steering's weights, one schedule."""
        return scheduled_optimizer(self.network, self.settings.train, self.total_steps)


def losses(logits: Tensor, batch: Examples) -> dict[str, Tensor]:
    """Steered logits (B,K,h,w) of a batch -> the mean of each term over its objects."""
    truth = batch.truth
    inside = F.max_pool2d(batch.box.to(logits.dtype)[:, None], CELL)[:, 0]
    counted = inside * truth.sum(1)
    area = counted.sum((1, 2)).clamp(min=1)
    entropy = (-(truth * logits.log_softmax(1)).sum(1) * inside).sum((1, 2)) / area
    rows = torch.arange(len(logits), device=logits.device)
    given, wanted = logits.softmax(1)[rows, batch.asked] * counted, truth[rows, batch.asked] * inside
    dice = 1 - (2 * (given * wanted).sum((1, 2)) + 1) / ((given + wanted).sum((1, 2)) + 1)
    before = batch.logits.log_softmax(1)
    divergence = (before.exp() * (before - logits.log_softmax(1))).sum(1)
    elsewhere = (divergence * (1 - inside)).sum((1, 2)) / (area + OUTSIDE)
    return {"entropy": entropy.mean(), "dice": dice.mean(), "elsewhere": elsewhere.mean()}


def _ids(logits: Tensor, size: tuple[int, int]) -> NDArray[np.integer]:
    """Class ids (B,H,W) of logits on the latent grid."""
    ids: NDArray[np.integer] = resize(logits.detach(), size).argmax(1).cpu().numpy()
    return ids


class _User:
    """Clicks at every object of a batch where the class map errs."""

    def __init__(self, batch: Examples, rng: np.random.Generator) -> None:
        self.batch, self.rng = batch, rng
        self.label, self.asked = batch.label.cpu().numpy(), batch.asked.tolist()
        self.box, self.boxed = batch.box.cpu().numpy(), batch.boxed.tolist()
        self.made: list[list[Click]] = [[] for _ in self.asked]

    def click(self, now: NDArray[np.integer], skip_boxed: bool) -> None:
        """One click more at each object that class ids (B,H,W) get wrong; where the box is a prompt, it comes first."""
        for i, kind in enumerate(self.asked):
            if skip_boxed and self.boxed[i]:
                continue
            truth, valid = self.label[i] == kind, (self.label[i] != IGNORE) & self.box[i]
            click = next_click(now[i] == kind, truth, valid, self.made[i])
            if click is not None:
                wrong = ((now[i] == kind) != truth) & valid & (self.label[i] == self.label[i][click.y, click.x])
                self.made[i].append(self._near(click, wrong))

    def _near(self, click: Click, wrong: NDArray[np.bool_]) -> Click:
        """In half of the draws a pixel beside the middle, of the same error: people do not hit the middle."""
        if self.rng.random() < 0.5:
            x, y = click.x + int(self.rng.integers(-4, 5)), click.y + int(self.rng.integers(-4, 5))
            if 0 <= y < wrong.shape[0] and 0 <= x < wrong.shape[1] and wrong[y, x]:
                return Click(x, y, click.on)
        return click

    def clicks(self, network: FusionSAMNetwork) -> ClassClicks:
        """All of them, and the boxes, as steering takes them."""
        batch, most = self.batch, max(map(len, self.made))
        points = torch.zeros(len(self.made), most, 2)
        classes = torch.full((len(self.made), most), -1)
        for i, made in enumerate(self.made):
            for j, click in enumerate(made):
                points[i, j] = torch.tensor([float(click.x), float(click.y)])
                classes[i, j] = int(self.label[i][click.y, click.x])
        boxes = torch.zeros(len(self.made), 1, 4)
        for i, box in enumerate(self.box):
            rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
            ends = np.array([columns[0], rows[0], columns[-1], rows[-1]]) + self.rng.integers(-3, 4, 4)
            boxes[i, 0] = torch.from_numpy(ends.astype(np.float32))
        named = torch.where(batch.boxed.cpu(), batch.asked.cpu(), -1)[:, None]
        size = (batch.label.shape[1], batch.label.shape[2])
        given = Prompts(points=points, point_classes=classes, boxes=boxes, box_classes=named).to(batch.logits.device)
        with torch.no_grad():
            return network.prompt_encoder.class_clicks(given, size, network.image_encoder.frame(*size))
