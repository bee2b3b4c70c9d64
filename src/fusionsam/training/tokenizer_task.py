"""Stage 1: LSTG alone as a VQ-GAN for each modality (eq. 2-9), generator and discriminator in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import Config, ModelConfig
from fusionsam.metrics.perceptual import EncoderLevels, load_vgg16, perceptual_distance
from fusionsam.metrics.reconstruction import MODALITIES, CodeUsage, psnr, structural_similarity
from fusionsam.models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from fusionsam.models.geometry import covered_cells
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.training.losses import reconstruction_loss
from fusionsam.training.task import Task, require_finite, schedule_factor
from fusionsam.types import Batch, InputError
from fusionsam.weights import pretrained as foreign
from fusionsam.weights.build import build_network

BETAS = (0.5, 0.9)  # Adam's, as VQ-GAN has them: the opponent changes, so old gradients mislead


class TokenizerNetwork(nn.Module):
    """LSTG under the name it has in the whole network, so that its checkpoint is what `model.tokenizer_weights` takes
    (and nothing that could be mistaken for a network able to predict)."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, config


def generator_parameters(tokenizer: Tokenizer) -> list[nn.Parameter]:
    """E, G and what Quant learns by gradient: all but the tokens that stand for a missing modality (stage 2's)."""
    return [p for name, p in tokenizer.named_parameters() if name != "missing" and p.requires_grad]


class TokenizerTask(Task[TokenizerNetwork]):
    """min over E, G, codebook, max over D of eq. 9, both modalities in every step.

    `schedule`: factor on the learning rate at a step. `phi`: Phi of eq. 7, image (B,3,H,W) in [0,1] -> feature maps;
    None where loss.perceptual_weight is 0. Lightning's global step counts the generator's steps alone, one a batch, so
    data, seeds and schedule of a resumed run follow from it. The moving average of the weights is validated.
    """

    monitor = "val/psnr"

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Config,
        schedule: Callable[[int], float],
        phi: Callable[[Tensor], list[Tensor]] | None = None,
    ) -> None:
        tokenizer.require_decoder()
        super().__init__(TokenizerNetwork(tokenizer, config.model), config)
        self.automatic_optimization = False
        train = config.train
        if config.loss.perceptual_weight > 0 and phi is None:
            raise InputError("loss.perceptual_weight: there is no Phi to measure with; set it to 0")
        if train.precision == "16-mixed":
            # its loss scale would enter the adaptive weight and miss the discriminator
            raise InputError("train.precision: '16-mixed' does not go with train.stage tokenizer; use bf16-mixed")
        self.schedule = schedule
        self._phi = [phi]  # in a list: Phi is frozen and belongs in no checkpoint
        self.discriminators = nn.ModuleList(
            PatchDiscriminator(channels, train.discriminator_width, train.discriminator_stages)
            for channels in tokenizer.CHANNELS
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._clear()

    @property
    def tokenizer(self) -> Tokenizer:
        """LSTG as it is being trained."""
        return self.network.tokenizer

    # -- a step ----------------------------------------------------------------------------------------------------

    def adversarial(self) -> bool:
        """Whether D and eq. 8 take part in this step."""
        return self.settings.loss.adversarial_weight > 0 and self.global_step >= self.settings.train.adversarial_start

    def generate(
        self, index: int, image: Tensor, there: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One modality's rebuilt images, the gradient of eq. 9 with respect to them, and its commitment term.

        image (B,C_i,H,W) in [0,1]; what its camera did not see, where `there` bool (B,1,H,W) is false, teaches nothing:
        it stands in the rebuilt image as it is. The terms (weighted, detached) are named in the dictionary;
        `commitment` keeps its graph. Everything but the commitment reaches E and G through the rebuilt image, so its
        gradient there is taken once, and the gradient at G's last layer, which the adaptive weight compares, is one
        convolution away from it.
        """
        loss, form = self.settings.loss, self.settings.train.adversarial_loss
        cells = None
        if there is not None:
            cells = covered_cells(there, (image.shape[2], image.shape[3]), self.tokenizer.STRIDE)[:, 0]
        latents, codes, commitment = self.tokenizer.encode(index, image, cells)
        rebuilt = self.tokenizer.reconstruct(index, latents)
        if there is not None:
            rebuilt = torch.where(there, rebuilt, image)
        if codes is not None:
            self.train_codes[index].update(codes if cells is None else codes[cells])
        terms = {"commitment": loss.commitment_weight * commitment}
        terms["reconstruction"] = loss.reconstruction_weight * reconstruction_loss(image, rebuilt)
        kept = terms["reconstruction"]
        if loss.perceptual_weight > 0:
            phi, seen = self._phi[0], max(1, round(loss.perceptual_share * len(image)))
            assert phi is not None
            terms["perceptual"] = loss.perceptual_weight * perceptual_distance(phi, image[:seen], rebuilt[:seen])
            kept = kept + terms["perceptual"]
        (gradient,) = torch.autograd.grad(kept, rebuilt)
        if self.adversarial():
            fooled = generator_loss(self._judged(index, rebuilt, there), form)
            (push,) = torch.autograd.grad(fooled, rebuilt)
            decoder: Any = self.tokenizer.decoders[index]
            last = decoder.out[-1].weight
            at_last = [torch.autograd.grad(rebuilt, last, g, retain_graph=True)[0] for g in (gradient, push)]
            weight = loss.adversarial_weight * adaptive_weight(at_last[0], at_last[1])
            gradient = gradient + weight * push
            terms["adversarial"] = weight * fooled
            terms["adversarial_weight"] = weight
        return rebuilt, gradient, terms

    def _judged(self, index: int, image: Tensor, there: Tensor | None) -> Tensor:
        """D's logits of an image (B,C_i,H,W), of the patches that are `there` (B,1,H,W) in some part."""
        logits = self.discriminators[index](image)
        return logits if there is None else logits[F.adaptive_max_pool2d(there.float(), logits.shape[2:]) > 0]

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """E, G and codebooks descend eq. 9; then, from adversarial_start on, each D ascends eq. 8."""
        factor, clip = self.schedule(self.global_step), self.settings.train.gradient_clip
        optimizers: Any = self.optimizers()
        generator, critic = optimizers[0], optimizers[1]
        for group in (*generator.param_groups, *critic.param_groups):
            group["lr"] = self.settings.train.lr * factor
        adversarial = self.adversarial()  # asked now: the generator's step moves global_step on
        self.discriminators.requires_grad_(False)
        pull: list[Tensor] = []
        judged: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
        losses: list[Tensor] = []
        for index, images in enumerate((batch.visible, batch.infrared)):
            rows, there = batch.present[:, index], None
            if batch.covered is not None:  # what no camera saw is no example
                rows = rows & batch.covered[:, index].any(dim=(1, 2))
                there = batch.covered[rows, index, None]
            image = images[rows].contiguous(memory_format=torch.channels_last)
            if not len(image):
                continue
            rebuilt, gradient, terms = self.generate(index, image, there)
            pull += [(rebuilt * gradient).sum(), terms["commitment"]]
            judged.append((index, image, rebuilt.detach(), there))
            losses += [value.detach() for term, value in terms.items() if term != "adversarial_weight"]
            name = MODALITIES[index]
            self.log_dict({f"loss/{name}_{k}": v.detach() for k, v in terms.items()}, batch_size=len(image))
            if self.tokenizer.codebook_size is not None:
                self.log(f"train/{name}_perplexity", self.train_codes[index].perplexity, batch_size=len(image))
        if not pull:
            raise InputError("stage 1: a batch without any image; set data.modality_dropout to 0")
        total = torch.stack(pull).sum()
        require_finite(total, self.global_step, self.settings.train)
        # the mean over the devices; of the terms each may have others, and would wait for ever
        self.log("loss/total", torch.stack(losses).sum(), batch_size=len(batch.ids), sync_dist=True)
        generator.zero_grad()
        self.manual_backward(total)
        if clip:
            nn.utils.clip_grad_norm_(generator_parameters(self.tokenizer), clip)
        generator.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.log("lr", self.settings.train.lr * factor)
        if adversarial:
            self._judge(critic, judged, clip)

    def _judge(
        self, critic: LightningOptimizer, judged: list[tuple[int, Tensor, Tensor, Tensor | None]], clip: float
    ) -> None:
        self.discriminators.requires_grad_(True)
        total = torch.zeros((), device=self.device)
        for index, image, rebuilt, there in judged:
            real, copied = (self._judged(index, seen, there) for seen in (image, rebuilt))
            loss = discriminator_loss(real, copied, self.settings.train.adversarial_loss)
            self.log(f"loss/{MODALITIES[index]}_discriminator", loss.detach(), batch_size=len(image))
            total = total + loss
        critic.zero_grad()
        self.manual_backward(total)
        if clip:
            nn.utils.clip_grad_norm_(self.discriminators.parameters(), clip)
        # the bare optimiser: Lightning's wrapper would count this as a step of its own
        critic.optimizer.step()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A random state of the step's own, and fresh counts of the codes."""
        super().on_train_batch_start(batch, batch_idx)
        for counter in self.train_codes:
            counter.counts.zero_()

    # -- validation ------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        size = self.tokenizer.codebook_size or 1
        self.scores: dict[str, list[float]] = {}
        self.val_codes = [CodeUsage(size) for _ in MODALITIES]
        self.train_codes = [CodeUsage(size) for _ in MODALITIES]

    def on_validation_epoch_start(self) -> None:
        """Fresh counts."""
        self._clear()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Rebuild whole images; PSNR and SSIM of each, codes counted."""
        tokenizer = self.evaluated().eval().tokenizer
        for index, (name, images) in enumerate(zip(MODALITIES, (batch.visible, batch.infrared), strict=True)):
            for image in images[batch.present[:, index]]:
                rebuilt, codes = tokenizer.rebuild(index, image[None])
                self.scores.setdefault(f"val/{name}_psnr", []).append(psnr(image[None], rebuilt))
                self.scores.setdefault(f"val/{name}_ssim", []).append(structural_similarity(image[None], rebuilt))
                if codes is not None:
                    self.val_codes[index].update(codes)

    def on_validation_epoch_end(self) -> None:
        """Log the means by modality, usage (percent) and perplexity, and val/psnr, the mean over the modalities."""
        means = {name: sum(values) / len(values) for name, values in self.scores.items()}
        for name, value in means.items():
            self.log(name, value)
        sides = [value for name, value in means.items() if name.endswith("_psnr")]
        self.log(self.monitor, sum(sides) / len(sides), prog_bar=True)
        for name, counter in zip(MODALITIES, self.val_codes, strict=True):
            if len(counter.counts):
                self.log(f"val/{name}_codebook_usage", counter.usage)
                self.log(f"val/{name}_perplexity", counter.perplexity)

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Two: E, G and codebooks; the discriminators. Rates are set at each step from the schedule. No weight
        decay, as in VQ-GAN (arXiv 2012.09841): train.weight_decay is stage 2's alone."""
        config = self.settings.train
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        make = partial(kind, lr=config.lr, betas=BETAS, weight_decay=0.0)
        return [make(generator_parameters(self.tokenizer)), make(self.discriminators.parameters())]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches move by their own method; Phi, which is no submodule, follows."""
        phi = self._phi[0]
        if isinstance(phi, nn.Module):
            phi.to(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


def require_crop(config: Config) -> None:
    """InputError for crops that LSTG's stride does not divide, or that leave D nothing to judge."""
    crop, stages = config.data.crop, config.train.discriminator_stages
    if any(side % Tokenizer.STRIDE for side in crop):
        raise InputError(f"data.crop: {tuple(crop)}, expected multiples of {Tokenizer.STRIDE} in stage tokenizer")
    smallest = 2 ** (stages + 1)
    if config.loss.adversarial_weight > 0 and min(crop) < smallest:
        raise InputError(
            f"data.crop: {tuple(crop)}, expected at least {smallest} a side with train.discriminator_stages {stages}"
        )


def tokenizer_task(config: Config, steps: int) -> TokenizerTask:
    """Stage 1 with Phi of eq. 7: VGG16, or the image encoder that model.encoder.weights, model.start_from or a
    model.sam_weights of its kind fill.

    InputError where Phi would be an untrained network.
    """
    network = build_network(config.model)
    phi: EncoderLevels | torch.nn.Module | None = None
    if config.train.perceptual_weights and config.train.perceptual != "vgg16":
        raise InputError(
            f"train.perceptual_weights: {config.train.perceptual_weights}, but train.perceptual is "
            f"{config.train.perceptual}, which reads no file; set it to vgg16 or leave the file out"
        )
    if config.loss.perceptual_weight > 0 and config.train.perceptual == "vgg16":
        phi = load_vgg16(config.train.perceptual_weights, config.train.perceptual_input)
    elif config.loss.perceptual_weight > 0:
        model = config.model
        filled = bool(model.encoder.weights or model.start_from)
        if not filled and model.sam_weights:
            filled = foreign.sam_parts(model.sam_weights).encoder_kind == model.encoder.kind
        if not filled:
            raise InputError(
                f"train.perceptual: encoder, but nothing fills the {model.encoder.kind} image encoder; give "
                "model.encoder.weights, or model.sam_weights of that kind, or vgg16, or loss.perceptual_weight 0"
            )
        phi = EncoderLevels(network.image_encoder)
    if phi is not None:
        phi = phi.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TokenizerTask(network.tokenizer, config, lambda step: schedule_factor(step, steps, config.train), phi)
