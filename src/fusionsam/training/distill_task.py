"""Training of parts of a frozen network without labels: by what a fused picture is measured by, and by a teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fusionsam.config.schema import Config, LossConfig
from fusionsam.data.dataset import PairDataset
from fusionsam.models.color import luma
from fusionsam.models.fusion import PICTURE_SETTINGS
from fusionsam.models.network import Fitted, FusionSAMNetwork, Sources
from fusionsam.models.tokenizer import ENCODER_SETTINGS
from fusionsam.training.losses import fusion_measures
from fusionsam.training.segmentation_task import scheduled_optimizer
from fusionsam.training.task import Task
from fusionsam.types import Batch, InputError
from fusionsam.weights.build import FREE_SETTINGS
from fusionsam.weights.checkpoint import Card, load_network, read_card
from fusionsam.weights.pretrained import load_exactly

PICTURE = "picture"
"""What a checkpoint's card calls the training of its picture head."""
DISTILL = "distill"
"""And that of parts taught by a teacher."""
SQUARE = 32
"""Pixels a side of the squares whose mean brightness stays what it was."""
MEASURED = ("val", "as_trained_val", "calibration", "class_offsets")
"""Keys of a card that were measured with the parts of before."""
LEARNS = {"tokenizer": "tokenizer.encoders", "picture_head": "picture_head", "image_encoder": "image_encoder"}
"""Name in train.distill -> what learns of the network."""


def require_distill(config: Config) -> None:
    """InputError for settings that no training of the picture head, or by a teacher, can have."""
    train, loss, model, stage = config.train, config.loss, config.model, config.train.stage
    if not config.model.start_from:
        what = "whose picture learns" if stage == PICTURE else "whose parts learn"
        raise InputError(f"model.start_from: none, but train.stage is {stage}; give the checkpoint {what}")
    for setting, given, what in (
        ("model.steering.width", model.steering.width, "the steering that there is"),
        ("model.tokenizer_weights", model.tokenizer_weights, "LSTG of model.start_from"),
        ("train.freeze_tokenizer", train.freeze_tokenizer, "all but the parts that learn"),
    ):
        if given:
            found = "true" if given is True else given
            raise InputError(f"{setting}: {found}, but train.stage is {stage}, which keeps {what}; leave it out")
    learns = set(parts(config))
    if not learns:
        raise InputError(f"train.distill: empty, so nothing would learn; expected some of {', '.join(LEARNS)}")
    if learns == {"image_encoder"} and not train.encoder_lr_factor:
        raise InputError("train.encoder_lr_factor: 0, but image_encoder alone learns; give it a rate")
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
    asked = config.train.distill
    return ["picture_head"] if config.train.stage == PICTURE else [*(LEARNS if asked is None else dict.fromkeys(asked))]


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
    still true with other parts: how the rest was trained. Scores and calibration are not. InputError for a teacher that
    cannot teach this network."""
    assert config.model.start_from
    start, _ = load_network(config.model.start_from, calibrated=False)
    teacher = start if config.train.teacher is None else load_network(config.train.teacher, calibrated=False)[0]
    network = _with_new_parts(deepcopy(start), config)
    _require_teacher(teacher, network, config)
    if "image_encoder" in parts(config) and network.config.encoder.training != "full":
        raise InputError(
            f"train.distill: image_encoder, but that of {config.model.start_from} has model.encoder.training "
            f"{network.config.encoder.training}; leave it out"
        )
    card = read_card(config.model.start_from)[1]
    true = {key: value for key, value in card.items() if key not in MEASURED}
    if PICTURE in true and "picture_head" in parts(config) and config.train.stage == DISTILL:
        true[PICTURE] = {key: value for key, value in true[PICTURE].items() if key != "val"}  # of the head before
    return DistillTask(network, teacher, config, total_steps), true


def _with_new_parts(start: FusionSAMNetwork, config: Config) -> FusionSAMNetwork:
    """`start`, with random parts of the settings of `config` in the place of those that are to be new."""
    model, train = config.model, config.train
    new = replace(start.config)
    anew = []
    for section, names, setting, part, stays in (
        ("fusion", PICTURE_SETTINGS, "new_picture_head", "picture_head", "the picture head stays as {} has it"),
        ("tokenizer", ENCODER_SETTINGS, "new_encoders", "tokenizer", "E_i of LSTG stay as {} has them"),
    ):
        asked, stored = ({name: getattr(getattr(m, section), name) for name in names} for m in (model, start.config))
        if getattr(train, setting):
            setattr(new, section, replace(getattr(new, section), **asked))
            anew.append(f"{LEARNS[part]}.")
        elif asked != stored and part in parts(config):
            kept = ", ".join(f"{name} {value}" for name, value in stored.items())
            line = f"{stays.format(model.start_from)}: {kept}; --train.{setting} true builds new by the settings of "
            tqdm.write(f"{line}model.{section}", file=sys.stderr)
    if not anew:
        return start
    network = FusionSAMNetwork(new).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = {name: tensor for name, tensor in start.state_dict().items() if not name.startswith(tuple(anew))}
    load_exactly(network, state, f"model.start_from {model.start_from}", allow_missing=tuple(anew), own_names=True)
    return network


def _require_teacher(teacher: FusionSAMNetwork, student: FusionSAMNetwork, config: Config) -> None:
    """InputError where the teacher's classes, sizes or codes are not those of the student."""
    name, start = config.train.teacher, config.model.start_from

    def require(what: str, theirs: object, ours: object) -> None:
        if theirs != ours:
            raise InputError(f"train.teacher {name}: has {what} {theirs}, {start} has {ours}; expected the same")

    require("classes", list(teacher.config.classes), list(student.config.classes))
    require("model.max_side", teacher.config.max_side, student.config.max_side)
    require("an image encoder of stride", teacher.multiple, student.multiple)
    if "tokenizer" not in parts(config):
        return
    free = (*FREE_SETTINGS, *ENCODER_SETTINGS)
    for setting, value in vars(teacher.config.tokenizer).items():
        if setting not in free:
            require(f"model.tokenizer.{setting}", value, getattr(student.config.tokenizer, setting))
    theirs, ours = (_codes(network) for network in (teacher, student))
    if theirs.keys() != ours.keys() or not all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items()):
        raise InputError(f"train.teacher {name}: has other codebooks than {start}, so its latents are none of ours")


def _codes(network: FusionSAMNetwork) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if name.startswith("tokenizer.quantizers.")}


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
        # without a teacher of its own the network's LSTG and FMP are the teacher's, where they stay
        self.same_sources = config.train.teacher is None and "tokenizer" not in self.learns
        self.total_steps = total_steps
        self.found: list[dict[str, Tensor]] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume a run of an earlier version, which kept the picture head of before among its weights."""
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("before.")]:
            del state[name]

    @property
    def teacher(self) -> FusionSAMNetwork:
        """The network that is kept to."""
        return self._teacher[0]

    def terms(
        self, network: FusionSAMNetwork, batch: Batch, rows: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted losses by name, and what is measured beside them (B): the four measures of the picture that
        `network` draws, and without `rows` the share of LSTG's codes that are the teacher's. Of the pairs `rows` (bool
        (B)) the cameras change places first."""
        with torch.no_grad():
            visible, infrared, covered = batch.visible, batch.infrared, batch.covered
            if rows is not None:
                visible, infrared = swapped(visible, infrared, rows)
                if covered is not None:
                    covered = torch.where(rows[:, None, None, None], covered.flip(1), covered)
            pair = self.teacher.fitted(visible, infrared, batch.present, covered)
        terms: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        if "tokenizer" in self.learns:
            terms["latents"] = self._latents(network, pair)
            if rows is None:  # counted in validation alone
                found |= self._codes_kept(network, pair)
        if {"picture_head", "image_encoder"} & set(self.learns):
            with torch.no_grad():
                given = (visible, infrared, batch.present, covered)
                taught = self.teacher.sources(*given)
                seen = taught if self.same_sources else network.sources(*given)
            more, measures = self._picture(network, seen, taught)
            terms, found = terms | more, found | measures
        return terms, found

    def _latents(self, network: FusionSAMNetwork, pair: Fitted) -> Tensor:
        """The loss of E_i."""
        losses = []
        for index, image in enumerate((pair.shown, pair.heat)):
            with torch.no_grad():
                wanted = self.teacher.tokenizer.compared(index, image)
                spread = (wanted - wanted.mean(dim=(0, 1))).square().mean().clamp(min=1e-12)
            losses.append(F.mse_loss(network.tokenizer.compared(index, image), wanted) / spread)
        return self.settings.loss.latents_weight * torch.stack(losses).mean()

    @torch.no_grad()
    def _codes_kept(self, network: FusionSAMNetwork, pair: Fitted) -> dict[str, Tensor]:
        """`codes`: the share of codes (B) that are the teacher's, over both cameras; nothing where there are none."""
        same = []
        for index, image in enumerate((pair.shown, pair.heat)):
            ours, theirs = (net.tokenizer.encode(index, image)[1] for net in (network, self.teacher))
            if ours is not None and theirs is not None:
                same.append(ours.eq(theirs).float().mean(dim=(1, 2, 3)))
        return {"codes": torch.stack(same).mean(dim=0)} if same else {}

    def _picture(
        self, network: FusionSAMNetwork, seen: Sources, taught: Sources
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.no_grad():
            was = self.teacher.draw(taught)
        now = network.draw(seen)
        bright = luma(now[1])
        measures = fusion_measures(bright, luma(seen.pair.visible), seen.pair.infrared)
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
        """AdamW over what learns, one schedule; train.encoder_lr_factor is of all of the image encoder."""
        # nothing of the encoder counts as new here: all of it was taught before
        return scheduled_optimizer(self.network, self.settings.train, self.total_steps, new=())
