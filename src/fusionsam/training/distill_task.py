"""Training of parts of a frozen network without labels: by what a fused picture is measured by, and by a teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fusionsam.config.schema import Config, LossConfig, ModelConfig
from fusionsam.data.dataset import PairDataset
from fusionsam.models.color import luma
from fusionsam.models.fusion import PICTURE_SETTINGS
from fusionsam.models.network import FusionSAMNetwork, Sources
from fusionsam.models.tokenizer import ENCODER_SETTINGS
from fusionsam.training.losses import fusion_measures
from fusionsam.training.segmentation_task import scheduled_optimizer
from fusionsam.training.task import Task
from fusionsam.types import Batch, InputError
from fusionsam.weights.checkpoint import Card, load_network, read_card

PICTURE = "picture"
"""What a checkpoint's card calls the training of its picture head."""
DISTILL = "distill"
"""And that of parts taught by a teacher."""
SQUARE = 32
"""Pixels a side of the squares whose mean brightness stays what it was."""
MEASURED = ("val", "as_trained_val", "calibration", "class_offsets")
"""Keys of a card that were measured with the parts of before."""
LEARNS = {"tokenizer": "tokenizer.encoders", "picture_head": "picture_head", "image_encoder": "image_encoder.backbone"}
"""Name in train.distill -> what learns of the network."""


def require_distill(config: Config) -> None:
    """InputError for settings that no training of the picture head, or by a teacher, can have."""
    train, loss, stage = config.train, config.loss, config.train.stage
    if not config.model.start_from:
        what = "whose picture learns" if stage == PICTURE else "whose parts learn"
        raise InputError(f"model.start_from: none, but train.stage is {stage}; give the checkpoint {what}")
    if config.model.steering.width:
        raise InputError(
            f"model.steering.width: {config.model.steering.width}, but train.stage is {stage}, which keeps the "
            "steering that there is; leave it out"
        )
    learns = set(parts(config))
    if not learns:
        raise InputError(f"train.distill: empty, so nothing would learn; expected some of {', '.join(LEARNS)}")
    for part, setting in (("picture_head", "new_picture_head"), ("tokenizer", "new_encoders")):
        if getattr(train, setting) and part not in learns:
            raise InputError(f"train.{setting}: true, but {part} does not learn; add it to train.distill")
    measures = (loss.vif_weight, loss.qabf_weight, loss.ssim_weight, loss.scd_weight)
    if "picture_head" in learns and not any(measures):
        raise InputError(
            "loss.vif_weight, loss.qabf_weight, loss.ssim_weight, loss.scd_weight: all 0, so nothing would be learned; "
            "give one of them a weight"
        )
    for part, name in (("image_encoder", "class_maps_weight"), ("tokenizer", "latents_weight")):
        if part in learns and not getattr(loss, name):
            raise InputError(f"loss.{name}: 0, but {part} of train.distill learns by it alone; give it a weight")


def parts(config: Config) -> list[str]:
    """The names in LEARNS of what learns."""
    return ["picture_head"] if config.train.stage == PICTURE else list(dict.fromkeys(config.train.distill))


def require_both_cameras(pairs: PairDataset, setting: str, stage: str) -> None:
    """InputError for a pair that lacks a picture: it is its own best fusion, and would pass for a good one."""
    alone = [
        one.id
        for one in pairs.entries
        if (one.visible is None or one.infrared is None) and one.rgbt is None and one.radiometric is None
    ]
    if alone:
        raise InputError(
            f"{setting}: {len(alone)} pairs have one picture (first: {alone[0]}), expected two in stage {stage}; take "
            "them off the list"
        )


def distill_task(config: Config, total_steps: int) -> tuple[DistillTask, Card]:
    """The training of parts of model.start_from, whose other parts are as they are stored, and of its card what is
    still true with other parts: how the rest was trained. Scores and calibration are not. InputError for a teacher of
    another LSTG or other classes."""
    assert config.model.start_from
    start, _ = load_network(config.model.start_from, calibrated=False)
    teacher = start if config.train.teacher is None else load_network(config.train.teacher, calibrated=False)[0]
    network = _with_new_parts(deepcopy(start), config)
    _require_teacher(teacher.config, network.config, config)
    card = read_card(config.model.start_from)[1]
    true = {key: value for key, value in card.items() if key not in MEASURED}
    return DistillTask(network, teacher, config, total_steps), true


def _with_new_parts(start: FusionSAMNetwork, config: Config) -> FusionSAMNetwork:
    """`start`, with random parts of the settings of `config` in the place of those that are to be new."""
    model, train = config.model, config.train
    new = replace(start.config)
    anew = []
    for section, names, wanted, setting, part in (
        ("fusion", PICTURE_SETTINGS, train.new_picture_head, "new_picture_head", "picture_head"),
        ("tokenizer", ENCODER_SETTINGS, train.new_encoders, "new_encoders", "tokenizer"),
    ):
        asked, stored = ({name: getattr(getattr(m, section), name) for name in names} for m in (model, start.config))
        if wanted:
            setattr(new, section, replace(getattr(new, section), **asked))
            anew.append(LEARNS[part])
        elif asked != stored and part in parts(config):
            kept = ", ".join(f"{name} {value}" for name, value in stored.items())
            what = "the picture head stays" if part == "picture_head" else "E_i of LSTG stay"
            tqdm.write(
                f"{what} as {model.start_from} has {'it' if part == 'picture_head' else 'them'}: {kept}; "
                f"--train.{setting} true builds new by the settings of model.{section}",
                file=sys.stderr,
            )
    if not anew:
        return start
    network = FusionSAMNetwork(new).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kept_state = {
        name: t for name, t in start.state_dict().items() if not name.startswith(tuple(f"{p}." for p in anew))
    }
    missing, unexpected = network.load_state_dict(kept_state, strict=False)
    assert not unexpected
    assert all(name.startswith(tuple(anew)) for name in missing)
    return network


def _require_teacher(teacher: ModelConfig, student: ModelConfig, config: Config) -> None:
    """InputError where the teacher's latents or classes are no lesson for the student."""
    if teacher.classes != student.classes:
        raise InputError(f"train.teacher {config.train.teacher}: has other classes than {config.model.start_from}")
    same = {name: getattr(student.tokenizer, name) for name in ENCODER_SETTINGS}
    if replace(teacher.tokenizer, **same) != student.tokenizer:
        raise InputError(
            f"train.teacher {config.train.teacher}: has another LSTG than {config.model.start_from}; expected one that "
            f"differs in {' and '.join(ENCODER_SETTINGS)} alone"
        )


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


class DistillTask(Task[FusionSAMNetwork]):
    """Parts of `network` learn, by the measures of its picture and by the frozen `teacher`. Labels are not looked at.

    The picture head learns by VIF, Qabf, SSIM and SCD. Each of the four alone is best served by a copy of one source,
    which has lost the other: so the mean brightness of squares of SQUARE pixels is held to that of the teacher's
    picture. Class maps are held to the teacher's, by picture head and image encoder. E_i of LSTG learn the teacher's
    latents where codes are compared; the codes hold nothing that could learn by what comes behind them.
    """

    monitor = "val/measures"

    def __init__(self, network: FusionSAMNetwork, teacher: FusionSAMNetwork, config: Config, total_steps: int) -> None:
        network.requires_grad_(False)
        super().__init__(network, config)
        # in a list: the teacher is frozen and belongs in no checkpoint
        self._teacher = [teacher.requires_grad_(False).eval()]
        self.learns: Sequence[str] = parts(config)
        for part in self.learns:
            network.get_submodule(LEARNS[part]).requires_grad_(True)
        self.total_steps = total_steps
        self.found: list[dict[str, Tensor]] = []

    @property
    def teacher(self) -> FusionSAMNetwork:
        """The network that is kept to."""
        return self._teacher[0]

    def terms(
        self, network: FusionSAMNetwork, batch: Batch, rows: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses by name, and what is measured beside them (B): the four measures of the picture that
        `network` draws, and the share of LSTG's codes that are the teacher's. Of the pairs `rows` (bool (B)) the
        cameras change places first."""
        with torch.no_grad():
            visible, infrared, covered = batch.visible, batch.infrared, batch.covered
            if rows is not None:
                visible, infrared = swapped(visible, infrared, rows)
                if covered is not None:
                    covered = torch.where(rows[:, None, None, None], covered.flip(1), covered)
            taught = self.teacher.sources(visible, infrared, batch.present, covered)
        terms: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        if "tokenizer" in self.learns:
            terms["latents"], found["codes"] = self._latents(network, taught)
        if {"picture_head", "image_encoder"} & set(self.learns):
            with torch.no_grad():
                seen = network.sources(visible, infrared, batch.present, covered)
            more, measures = self._picture(network, seen, taught)
            terms, found = terms | more, found | measures
        return terms, found

    def _latents(self, network: FusionSAMNetwork, taught: Sources) -> tuple[Tensor, Tensor]:
        """The loss of E_i, and the share of codes (B) that are the teacher's."""
        losses, same = [], []
        codes = (taught.latents.visible_codes, taught.latents.infrared_codes)
        for index, image in enumerate((taught.shown, taught.heat)):
            ours, theirs = network.tokenizer, self.teacher.tokenizer
            with torch.no_grad():
                wanted = theirs.compared(index, image)
                spread = (wanted - wanted.mean(dim=(0, 1))).square().mean().clamp(min=1e-12)
                kept, found = codes[index], ours.encode(index, image)[1]
                if kept is not None and found is not None:
                    same.append(found.eq(kept).float().mean(dim=(1, 2, 3)))
            losses.append(F.mse_loss(ours.compared(index, image), wanted) / spread)
        loss = self.settings.loss.latents_weight * torch.stack(losses).mean()
        return loss, torch.stack(same).mean(dim=0) if same else loss.detach().new_zeros(1)

    def _picture(
        self, network: FusionSAMNetwork, seen: Sources, taught: Sources
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.no_grad():
            was = self.teacher.draw(taught)
        now = network.draw(seen)
        bright = luma(now[1])
        measures = fusion_measures(bright, luma(seen.visible), seen.infrared)
        terms = self._measured(measures, bright - luma(was[1])) if "picture_head" in self.learns else {}
        if weight := self.settings.loss.class_maps_weight:
            with torch.no_grad():
                kept = log_classes(self.teacher, taught, was)
            found = log_classes(network, seen, now)
            terms["class_maps"] = weight * F.kl_div(found, kept, reduction="none", log_target=True).sum(dim=1).mean()
        return terms, measures

    def _measured(self, measures: dict[str, Tensor], change: Tensor) -> dict[str, Tensor]:
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
        """A random state of the step's own; nothing counts statistics, so all is in eval mode."""
        super().on_train_batch_start(batch, batch_idx)
        self.network.eval()

    def on_validation_epoch_start(self) -> None:
        """No picture seen."""
        self.found = []

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """What is measured of a pair at full size, and how far class maps and latents are from the teacher's."""
        terms, measures = self.terms(self.evaluated().eval(), batch)
        total = torch.stack(list(terms.values())).sum()
        found = {"measures": -total, **{name: value.mean() for name, value in measures.items()}}
        loss = self.settings.loss
        for name, weight in (("class_maps", loss.class_maps_weight), ("latents", loss.latents_weight)):
            if name in terms:
                found[name] = terms[name] / weight
        self.found.append(found)

    def on_validation_epoch_end(self) -> None:
        """Log the mean of each measure, and the weighted sum by which the best weights are chosen."""
        for name in self.found[0]:
            mean = torch.stack([one[name] for one in self.found]).mean()
            self.log(f"val/{name}", mean, prog_bar=name == "measures")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches move by their own method; the teacher, which is no submodule, follows."""
        self.teacher.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over what learns, one schedule; train.encoder_lr_factor is of the image encoder's backbones."""
        return scheduled_optimizer(self.network, self.settings.train, self.total_steps)
