"""Stage 2: fusion and segmentation trained together (eq. 1). A batch in, named losses out."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import Config, TrainConfig
from fusionsam.metrics.segmentation import PROTOCOLS, ConfusionMatrix, iou, plain
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.training.losses import (
    class_weights,
    fusion_loss,
    fusion_terms,
    prompt_loss,
    reconstruction_loss,
    segmentation_loss,
    teacher_loss,
)
from fusionsam.training.task import Task, schedule_factor
from fusionsam.types import IGNORE, Batch, InputError, Output, PromptMode

NEW = ("lateral", "neck.", "guide.", "inject.")
"""What an image encoder has beside foreign weights: it learns at the rate of new parts."""


def parameter_groups(
    network: FusionSAMNetwork, config: TrainConfig, new: tuple[str, ...] = NEW
) -> list[dict[str, object]]:
    """Trainable parameters with their rate and decay: the image encoder but for what begins with `new`, SAM's
    pretrained parts, everything else; no weight decay on vectors (norms, biases) and tables (embeddings, tokens of a
    missing modality)."""
    factors = {
        "image_encoder": config.encoder_lr_factor,
        "prompt_encoder": config.sam_lr_factor,
        "mask_decoder": config.sam_lr_factor,
    }
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    of_tables = ("tokenizer.missing", "_codebook.embed")  # the second where it learns by gradient
    tables |= {id(p) for name, p in network.named_parameters() if name.endswith(of_tables)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for part, module in network.parts().items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            plain = parameter.ndim < 2 or id(parameter) in tables
            fresh = part == "image_encoder" and name.startswith(new)
            key = (config.lr * (1.0 if fresh else factors.get(part, 1.0)), 0.0 if plain else config.weight_decay)
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]


def scheduled_optimizer(
    network: FusionSAMNetwork,
    config: TrainConfig,
    total_steps: int,
    more: list[nn.Parameter] | None = None,
    new: tuple[str, ...] = NEW,
) -> OptimizerLRSchedulerConfig:
    """Adam or AdamW over `parameter_groups` (`new` as there) and `more`, new parameters of the training alone, with
    `schedule_factor` stepped every step, for Lightning."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    groups = parameter_groups(network, config, new)
    if more:
        groups.append({"params": more, "lr": config.lr, "weight_decay": config.weight_decay})
    optimizer = kind(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(step, total_steps, config))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _seen_by_teacher_head(network: FusionSAMNetwork) -> int:
    """Channels of the features that the auxiliary head sees; InputError for a network that has none."""
    channels = network.head.feature_channels if isinstance(network, FusionSAMNetwork) else 0
    if not channels:
        raise InputError(
            "data.teacher_labels: the classification head sees no level of the image encoder, so a teacher has nothing "
            "to teach; set model.head.multi_level to true, or leave teacher_labels out"
        )
    return channels


class SegmentationTask(Task[FusionSAMNetwork]):
    """Joint training of fusion and segmentation (eq. 1), LSTG learning along (stage 2) unless it is frozen.

    `total_steps` sets the schedule; `shares` (K) the class weights. The moving average of the weights is validated.
    With data.teacher_labels an auxiliary head of its own learns from a teacher; it is no part of the network.
    """

    monitor = "val/miou"

    def __init__(self, network: FusionSAMNetwork, config: Config, total_steps: int, shares: Tensor) -> None:
        super().__init__(network, config)
        self.total_steps = total_steps
        frozen_picture = config.train.freeze_picture
        # an alternative trained by this task (experiments/) has no LSTG
        self.frozen_tokenizer = config.train.freeze_tokenizer and isinstance(network, FusionSAMNetwork)
        if self.frozen_tokenizer:
            # before the optimiser picks its parameters
            network.tokenizer.requires_grad_(False)
            network.tokenizer.missing.requires_grad_(not frozen_picture)  # stage 1 never taught these
        if frozen_picture:
            network.fusion.requires_grad_(False)
            network.picture_head.requires_grad_(False)
        self.teacher_head: nn.Conv2d | None = None
        if config.data.teacher_labels is not None:
            self.teacher_head = nn.Conv2d(_seen_by_teacher_head(network), config.data.teacher_classes, 1)
        self.weights: Tensor
        self.register_buffer("weights", class_weights(shares, config.loss.class_weight_power))
        self._clear()

    def _clear(self) -> None:
        self.matrix = ConfusionMatrix(len(self.settings.model.classes))
        self.used: dict[str, Tensor] = {}  # modality -> (codebooks, size), how often each code was chosen

    def losses(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """Every named, weighted term of eq. 1 for one forward pass."""
        loss, model = self.settings.loss, self.settings.model
        terms: dict[str, Tensor] = {}
        if batch.label is not None:
            terms["segmentation"] = segmentation_loss(output.logits, batch.label, loss, self.weights)
            terms["fot"] = loss.fot_weight * segmentation_loss(output.fot_logits, batch.label, loss, self.weights)
        if self.settings.train.freeze_picture:
            return terms  # what FMP is taught by
        if batch.label is not None:
            terms["prompt"] = loss.prompt_weight * prompt_loss(output.mask_prompt, batch.label, model.foreground)
        if loss.fusion_weight:
            parts = fusion_terms(output.fused, batch.visible, batch.infrared, batch.present, batch.covered)
            terms["fusion"] = loss.fusion_weight * fusion_loss(parts, loss)
        tokens = model.tokenizer.tokens
        if self.frozen_tokenizer:
            return terms  # both terms of LSTG would cost time and teach nothing
        if tokens == "quantized" and output.latents.commitment is not None:
            terms["commitment"] = loss.commitment_weight * output.latents.commitment
        if tokens != "pixels" and loss.reconstruction_weight:
            terms["reconstruction"] = loss.reconstruction_weight * self._reconstruction(output, batch)
        return terms

    def _reconstruction(self, output: Output, batch: Batch) -> Tensor:
        total = output.logits.new_zeros(())
        pairs = ((output.latents.visible, batch.visible), (output.latents.infrared, batch.infrared))
        for index, (latents, image) in enumerate(pairs):
            rows = batch.present[:, index].nonzero()[:, 0]
            rows = rows[: max(1, round(self.settings.loss.reconstruction_share * len(rows)))]
            if len(rows):
                rebuilt = self.network.tokenizer.reconstruct(index, latents[rows])
                rebuilt = rebuilt[:, :, : image.shape[2], : image.shape[3]]
                there = None if batch.covered is None else batch.covered[rows, index, None]
                total = total + reconstruction_loss(image[rows], rebuilt, there)
        return total

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One forward and its losses; points and box are left out in a share of the steps."""
        draw = torch.rand(()).item()
        mode: PromptMode | None = "none" if draw < self.settings.model.prompts.dropout else None
        if self.teacher_head is None or batch.taught is None:
            output = self.network(
                batch.visible, batch.infrared, mode=mode, present=batch.present, covered=batch.covered
            )
            terms = self.losses(output, batch)
        else:
            encoded = self.network.encode(batch.visible, batch.infrared, batch.present, batch.covered)
            first = self.network.first_pass(encoded, mode=mode)
            terms = self.losses(self.network.decode(encoded, mode=mode, first=first), batch)
            assert first.features is not None
            beyond = [to - here for to, here in zip(encoded.padded, batch.taught.shape[-2:], strict=True)]
            taught = F.pad(batch.taught, (0, beyond[1], 0, beyond[0]), value=IGNORE)  # the features cover the padding
            lesson = teacher_loss(self.teacher_head(first.features), taught)
            terms["teacher"] = self.settings.loss.teacher_weight * lesson
        return self.total(terms, len(batch.ids))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A random state of the step's own; a frozen LSTG is in eval mode whatever a validation did to the modes."""
        super().on_train_batch_start(batch, batch_idx)
        if self.frozen_tokenizer:
            self.network.tokenizer.eval()

    def on_validation_epoch_start(self) -> None:
        """A fresh confusion matrix and no code seen."""
        self._clear()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Count argmax of the logits against the labels, at the labels' own size."""
        network = self.evaluated().eval()
        output = network(batch.visible, batch.infrared, present=batch.present, covered=batch.covered)
        assert batch.label is not None
        for prediction, label in zip(output.logits.argmax(1), batch.label, strict=True):
            self.matrix.update(prediction.cpu(), label.cpu())
        for name, codes in (("visible", output.latents.visible_codes), ("infrared", output.latents.infrared_codes)):
            if codes is not None:
                self.count_codes(name, codes)

    def count_codes(self, name: str, codes: Tensor) -> None:
        """Add codes int64 (B,h,w,codebooks) of modality `name`; -1 stands for an absent image."""
        size = self.network.tokenizer.codebook_size
        assert size is not None
        books = codes.flatten(0, 2).T.cpu()
        counts = torch.stack([torch.bincount(book[book >= 0], minlength=size) for book in books])
        self.used[name] = self.used.get(name, 0) + counts

    def on_validation_epoch_end(self) -> None:
        """Log mIoU (present), per-class IoU and the share of each modality's codes in use, all in percent."""
        self.log("val/miou", PROTOCOLS["present"](self.matrix.matrix).miou, prog_bar=True)
        for name, value in zip(self.settings.model.classes, plain(iou(self.matrix.matrix)), strict=True):
            if value is not None:
                self.log(f"val/iou_{name}", 100 * value)
        for name, counts in self.used.items():
            self.log(f"val/usage_{name}", 100 * (counts > 0).float().mean())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam or AdamW over learning-rate groups, one schedule for all, stepped every step."""
        more = [] if self.teacher_head is None else list(self.teacher_head.parameters())
        return scheduled_optimizer(self.network, self.settings.train, self.total_steps, more)
