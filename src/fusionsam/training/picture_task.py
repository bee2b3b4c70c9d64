"""Training of the picture head alone, on a frozen network: what a fused picture is measured by, made its loss."""

from __future__ import annotations

from copy import deepcopy

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from fusionsam.config.schema import Config, LossConfig
from fusionsam.metrics.fusion import SMALLEST_SIDE
from fusionsam.models.color import luma
from fusionsam.models.geometry import fit, stand_in
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.training.losses import fusion_measures
from fusionsam.training.segmentation_task import scheduled_optimizer
from fusionsam.training.task import Task, require_finite
from fusionsam.types import Batch, InputError
from fusionsam.weights.checkpoint import Card, load_network, read_card

PICTURE = "picture"
"""What a checkpoint's card calls the training of its picture head."""
SQUARE = 32
"""Pixels a side of the squares whose mean brightness stays what it was."""


def require_picture(config: Config) -> None:
    """InputError for settings that no training of the picture head can have."""
    if not config.model.start_from:
        raise InputError("model.start_from: none, but train.stage is picture; give the checkpoint whose picture learns")
    if min(config.data.crop) < SMALLEST_SIDE:
        raise InputError(
            f"data.crop: {tuple(config.data.crop)}, expected at least {SMALLEST_SIDE} a side in stage picture: VIF has "
            "no fourth scale below"
        )


def network_to_redraw(config: Config) -> tuple[FusionSAMNetwork, Card]:
    """The network of model.start_from, all of it as it is stored, and its card."""
    assert config.model.start_from
    network, _ = load_network(config.model.start_from, calibrated=False)
    return network, read_card(config.model.start_from)[1]


SWAPPED = 0.2
"""Share of the training pairs whose cameras change places: what to keep should hang on the picture, not on the camera,
or it is learned for the cameras of the training pairs alone."""


def swapped(visible: Tensor, infrared: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B,3,H,W) and (B,1,H,W), of which the `rows` (bool (B)) show infrared as grey visible light, and luma as
    infrared."""
    places = rows[:, None, None, None]
    return torch.where(places, infrared, visible), torch.where(places, luma(visible), infrared)


class PictureTask(Task[FusionSAMNetwork]):
    """Only `network.picture_head` learns, by VIF, Qabf, SSIM and SCD of the picture. Labels are not looked at.

    Each of the four alone is best served by a copy of one source, which has lost the other: so the mean brightness of
    squares of SQUARE pixels is held to that of the picture the network drew before.
    """

    monitor = "val/measures"

    def __init__(self, network: FusionSAMNetwork, config: Config, total_steps: int) -> None:
        network.requires_grad_(False)
        super().__init__(network, config)
        self.before = deepcopy(network.picture_head)
        network.picture_head.requires_grad_(True)
        self.total_steps = total_steps
        self.found: list[dict[str, Tensor]] = []

    def terms(
        self, network: FusionSAMNetwork, batch: Batch, rows: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses by name, and the four measures (B) of the picture that `network` draws; of the pairs `rows`
        (bool (B)) the cameras change places first."""
        with torch.no_grad():
            visible, infrared = stand_in(batch.visible, batch.infrared, batch.present)
            if rows is not None:
                visible, infrared = swapped(visible, infrared, rows & batch.present.all(1))
            size = (visible.shape[2], visible.shape[3])
            shown, heat = (fit(x, size, network.multiple) for x in (visible, infrared))
            latents = network.tokenizer(shown, heat, batch.present, None)
            z_f, _ = network.fusion(latents.visible, latents.infrared)
            was = luma(self.before.compose(self.before(z_f, shown, heat), shown, heat))
        head = network.picture_head
        now = luma(head.compose(head(z_f, shown, heat), shown, heat))
        measures = fusion_measures(now[:, :, : size[0], : size[1]], luma(visible), infrared)
        return self._losses(measures, now - was), measures

    def _losses(self, measures: dict[str, Tensor], change: Tensor) -> dict[str, Tensor]:
        loss: LossConfig = self.settings.loss
        weights = {"VIF": loss.vif_weight, "Qabf": loss.qabf_weight, "SSIM": loss.ssim_weight, "SCD": loss.scd_weight}
        found = {name: -weight * measures[name].mean() for name, weight in weights.items()}
        found["brightness"] = loss.brightness_weight * F.avg_pool2d(change, SQUARE, ceil_mode=True).abs().mean()
        return found

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One picture of each pair and its losses."""
        terms, _ = self.terms(self.network, batch, torch.rand(len(batch.ids), device=self.device) < SWAPPED)
        total = torch.stack(list(terms.values())).sum()
        require_finite(total, self.global_step, self.settings.train)
        self.log_dict({f"loss/{k}": v.detach() for k, v in terms.items()}, batch_size=len(batch.ids))
        self.log("loss/total", total.detach(), prog_bar=True, batch_size=len(batch.ids), sync_dist=True)
        return total

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A random state of the step's own; what does not learn is in eval mode."""
        super().on_train_batch_start(batch, batch_idx)
        self.network.eval()

    def on_validation_epoch_start(self) -> None:
        """No picture seen."""
        self.found = []

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """The measures of a pair's picture, and the change of brightness, at full size."""
        terms, measures = self.terms(self.evaluated().eval(), batch)
        total = torch.stack(list(terms.values())).sum()
        self.found.append({"measures": -total, **{name: value.mean() for name, value in measures.items()}})

    def on_validation_epoch_end(self) -> None:
        """Log the mean of each measure, and the weighted sum by which the best picture is chosen."""
        for name in self.found[0]:
            mean = torch.stack([one[name] for one in self.found]).mean()
            self.log(f"val/{name}", mean, prog_bar=name == "measures")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over the picture head's weights, one schedule."""
        return scheduled_optimizer(self.network, self.settings.train, self.total_steps)
