"""Training of the picture head alone, on a frozen network: what a fused picture is measured by, made its loss."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fusionsam.config.schema import Config, LossConfig
from fusionsam.data.dataset import PairDataset
from fusionsam.models.color import luma
from fusionsam.models.fusion import PICTURE_HEADS, PICTURE_SETTINGS
from fusionsam.models.network import FusionSAMNetwork, Sources
from fusionsam.training.losses import fusion_measures
from fusionsam.training.segmentation_task import scheduled_optimizer
from fusionsam.training.task import Task
from fusionsam.types import Batch, InputError
from fusionsam.weights.checkpoint import Card, load_network, read_card

PICTURE = "picture"
"""What a checkpoint's card calls the training of its picture head."""
SQUARE = 32
"""Pixels a side of the squares whose mean brightness stays what it was."""
MEASURED = ("val", "as_trained_val", "calibration", "class_offsets")
"""Keys of a card that were measured with the picture of before."""


def require_picture(config: Config) -> None:
    """InputError for settings that no training of the picture head can have."""
    if not config.model.start_from:
        raise InputError("model.start_from: none, but train.stage is picture; give the checkpoint whose picture learns")
    loss = config.loss
    if not any((loss.vif_weight, loss.qabf_weight, loss.ssim_weight, loss.scd_weight)):
        raise InputError(
            "loss.vif_weight, loss.qabf_weight, loss.ssim_weight, loss.scd_weight: all 0, so nothing would be learned; "
            "give one of them a weight"
        )
    if config.model.steering.width:
        raise InputError(
            f"model.steering.width: {config.model.steering.width}, but train.stage is picture, which keeps the "
            "steering that there is; leave it out"
        )


def require_both_cameras(pairs: PairDataset, setting: str) -> None:
    """InputError for a pair that lacks a picture: it is its own best fusion, and would pass for a good one."""
    alone = [
        one.id
        for one in pairs.entries
        if (one.visible is None or one.infrared is None) and one.rgbt is None and one.radiometric is None
    ]
    if alone:
        raise InputError(
            f"{setting}: {len(alone)} pairs have one picture (first: {alone[0]}), expected two in stage picture; take "
            "them off the list"
        )


def picture_task(config: Config, total_steps: int) -> tuple[PictureTask, Card]:
    """The training of the picture head of model.start_from, whose other parts are as they are stored, and of its card
    what is still true with another picture: how its other parts were trained. Scores and calibration are not."""
    assert config.model.start_from
    network, _ = load_network(config.model.start_from, calibrated=False)
    before = deepcopy(network.picture_head).requires_grad_(False)
    shape, stored = (
        {name: getattr(fusion, name) for name in PICTURE_SETTINGS}
        for fusion in (config.model.fusion, network.config.fusion)
    )
    if config.train.new_picture_head:
        fusion = network.config.fusion = replace(network.config.fusion, **shape)
        network.picture_head = PICTURE_HEADS[fusion.picture_head](network.config.tokenizer.dim, fusion)
    elif shape != stored:
        kept = ", ".join(f"{name} {value}" for name, value in stored.items())
        tqdm.write(
            f"the picture head stays as {config.model.start_from} has it: {kept}; --train.new_picture_head true builds "
            "one by the settings of model.fusion",
            file=sys.stderr,
        )
    card = read_card(config.model.start_from)[1]
    true = {key: value for key, value in card.items() if key not in MEASURED}
    return PictureTask(network, before, config, total_steps), true


SWAPPED = 0.2
"""Share of the training pairs whose cameras change places: what to keep should hang on the picture, not on the camera,
or it is learned for the cameras of the training pairs alone."""


def swapped(visible: Tensor, infrared: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B,3,H,W) and (B,1,H,W), of which the `rows` (bool (B)) show infrared as grey visible light, and luma as
    infrared."""
    places = rows[:, None, None, None]
    return torch.where(places, infrared, visible), torch.where(places, luma(visible), infrared)


def log_classes(network: FusionSAMNetwork, seen: Sources, drawn: tuple[Tensor, Tensor]) -> Tensor:
    """Logarithms of the class probabilities (B,K,h,w) on the latent grid, of a picture drawn from `seen`."""
    return network.first_pass(network.look(seen, *drawn)).logits.log_softmax(dim=1)


class PictureTask(Task[FusionSAMNetwork]):
    """Only `network.picture_head` learns, by VIF, Qabf, SSIM and SCD of the picture. Labels are not looked at.

    Each of the four alone is best served by a copy of one source, which has lost the other: so the mean brightness of
    squares of SQUARE pixels is held to that of the picture the network drew before, and the class maps to those that
    the network makes of that one.
    """

    monitor = "val/measures"

    def __init__(self, network: FusionSAMNetwork, before: nn.Module, config: Config, total_steps: int) -> None:
        network.requires_grad_(False)
        super().__init__(network, config)
        self.before = before
        network.picture_head.requires_grad_(True)
        self.total_steps = total_steps
        self.found: list[dict[str, Tensor]] = []

    def terms(
        self, network: FusionSAMNetwork, batch: Batch, rows: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses by name, and the four measures (B) of the picture that `network` draws; of the pairs `rows`
        (bool (B)) the cameras change places first."""
        with torch.no_grad():
            visible, infrared, covered = batch.visible, batch.infrared, batch.covered
            if rows is not None:
                visible, infrared = swapped(visible, infrared, rows)
                if covered is not None:
                    covered = torch.where(rows[:, None, None, None], covered.flip(1), covered)
            seen = network.sources(visible, infrared, batch.present, covered)
            was = network.draw(seen, self.before)
        now = network.draw(seen)
        bright = luma(now[1])
        measures = fusion_measures(bright, luma(seen.visible), seen.infrared)
        terms = self._losses(measures, bright - luma(was[1]))
        if weight := self.settings.loss.class_maps_weight:
            with torch.no_grad():
                kept = log_classes(network, seen, was)
            found = log_classes(network, seen, now)
            terms["class_maps"] = weight * F.kl_div(found, kept, reduction="none", log_target=True).sum(dim=1).mean()
        return terms, measures

    def _losses(self, measures: dict[str, Tensor], change: Tensor) -> dict[str, Tensor]:
        loss: LossConfig = self.settings.loss
        weights = {"VIF": loss.vif_weight, "Qabf": loss.qabf_weight, "SSIM": loss.ssim_weight, "SCD": loss.scd_weight}
        found = {name: -weight * measures[name].mean() for name, weight in weights.items()}
        found["brightness"] = loss.brightness_weight * F.avg_pool2d(change, SQUARE, ceil_mode=True).abs().mean()
        return found

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One picture of each pair and its losses."""
        terms, _ = self.terms(self.network, batch, torch.rand(len(batch.ids), device=self.device) < SWAPPED)
        return self.total(terms, len(batch.ids))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A random state of the step's own; what does not learn is in eval mode."""
        super().on_train_batch_start(batch, batch_idx)
        self.network.eval()

    def on_validation_epoch_start(self) -> None:
        """No picture seen."""
        self.found = []

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """The measures of a pair's picture at full size, and how far its class maps are from those of before."""
        terms, measures = self.terms(self.evaluated().eval(), batch)
        total = torch.stack(list(terms.values())).sum()
        found = {"measures": -total, **{name: value.mean() for name, value in measures.items()}}
        if "class_maps" in terms:
            found["class_maps"] = terms["class_maps"] / self.settings.loss.class_maps_weight
        self.found.append(found)

    def on_validation_epoch_end(self) -> None:
        """Log the mean of each measure, and the weighted sum by which the best picture is chosen."""
        for name in self.found[0]:
            mean = torch.stack([one[name] for one in self.found]).mean()
            self.log(f"val/{name}", mean, prog_bar=name == "measures")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the picture head's weights, one schedule."""
        return scheduled_optimizer(self.network, self.settings.train, self.total_steps)
