"""The whole network. The only file that knows the order of the stages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import ModelConfig
from fusionsam.models.encoders.create import create_image_encoder
from fusionsam.models.fusion import PICTURE_HEADS, FusionMaskPrompting
from fusionsam.models.geometry import (
    cells,
    content_of,
    covered_cells,
    fit,
    keep_inside,
    mask_to_grid,
    pair_size,
    reduced_size,
    require_classes_known,
    require_inside,
    require_mask,
    require_prompts,
    scale_prompts,
    split_classes,
    stand_in,
    stand_in_where,
    to_input,
)
from fusionsam.models.head import ClassificationHead
from fusionsam.models.layers import resize
from fusionsam.models.mask_decoder import FullFledgedMaskDecoder
from fusionsam.models.prompts import PromptEncoder, cut, self_prompts
from fusionsam.models.steering import Steering
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.types import ClassClicks, Encoded, FirstPass, InputError, Latents, Output, PromptMode, Prompts

PICTURE = 12
"""Channels of the fused picture that steering sees: RGB of the 2 x 2 places of a latent cell."""
UNTAUGHT = (
    "these weights have no steering, so a click cannot name a class; leave the classes out, or train it with "
    "configs/steering.yaml"
)


class Fitted(NamedTuple):
    """A pair as it was given and as the network sees it."""

    visible: Tensor  # (B,3,H,W), what is absent or not reached taken from the other camera
    infrared: Tensor  # (B,1,H,W)
    shown: Tensor  # (B,3,H',W'), reduced to max_side and padded
    heat: Tensor  # (B,1,H',W')
    for_tokenizer: tuple[Tensor | None, Tensor | None]  # shown and heat, None for an absent camera
    covered: Tensor | None  # bool (B,2,H'/4,W'/4), None where both cameras reach everything
    size: tuple[int, int]
    small: tuple[int, int]


class Sources(NamedTuple):
    """A pair, and what LSTG and FMP made of it."""

    pair: Fitted
    latents: Latents
    z_f: Tensor  # (B,d,H'/4,W'/4)
    mask_prompt: Tensor  # (B,1,H'/4,W'/4)


class FusionSAMNetwork(nn.Module):
    """Pair -> LSTG -> FMP -> fused picture -> SAM's image encoder; FMP -> prompts; both -> FOT decoder -> head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        classes, dim = len(config.classes), config.tokenizer.dim
        self.tokenizer = Tokenizer(config.tokenizer)
        self.fusion = FusionMaskPrompting(dim, config.fusion)
        self.picture_head = PICTURE_HEADS[config.fusion.picture_head](dim, config.fusion)
        self.image_encoder = create_image_encoder(config.encoder, config.decoder.hidden, dim)
        levels, strides = self.image_encoder.level_channels, self.image_encoder.level_strides
        self.prompt_encoder = PromptEncoder(config.decoder)
        # it stands where there is no mask prompt, so it can learn only where the model never has one
        self.prompt_encoder.sam.no_mask_embed.requires_grad_(not config.prompts.mask)
        self.mask_decoder = FullFledgedMaskDecoder(config.decoder, classes, levels, strides)
        self.head = ClassificationHead(config.head, classes, self.mask_decoder.feature_channels, dim, levels)
        self.steering: Steering | None = None
        self.add_steering()

    def add_steering(self) -> None:
        """A new `steering`, random but for a last layer of zeros; None where `config.steering` asks for none."""
        config = self.config
        seen = self.head.feature_channels + config.tokenizer.dim + self.mask_decoder.feature_channels + PICTURE
        width, classes = config.steering.width, len(config.classes)
        self.steering = Steering(config.steering, classes, seen, config.decoder.hidden) if width else None

    @property
    def multiple(self) -> int:
        """Height and width are padded to a multiple of this inside."""
        return math.lcm(self.image_encoder.stride, Tokenizer.STRIDE)

    def forward(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        prompts: Prompts | None = None,
        *,
        mode: PromptMode | None = None,
        present: Tensor | None = None,
        covered: Tensor | None = None,
    ) -> Output:
        """The one forward pass of training, evaluation, prediction, export and serving. It takes no label.

        visible (B,3,H,W) or None, infrared (B,1,H,W) or None, in [0,1], the same H and W from 64 to 4096. `prompts`
        (user or oracle) replace the model's own points and boxes, in pixels of this input; `mode` overrides the
        configured one; `present` bool (B,2) marks absent images within a batch, and `covered` bool (B,2,H,W) pixels
        that one camera does not reach: for the picture the other one stands there, and for the tokenizer the token of
        a missing camera. Raises InputError on a wrong size and on prompts that contradict themselves.
        """
        return self.decode(self.encode(visible, infrared, present, covered), prompts, mode)

    def encode(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        present: Tensor | None = None,
        covered: Tensor | None = None,
    ) -> Encoded:
        """The first half of `forward`, the expensive one: all that no prompt changes, up to SAM's image embedding.

        Arguments and InputError as in `forward`. One Encoded serves any number of calls of `decode`.
        """
        seen = self.sources(visible, infrared, present, covered)
        return self.look(seen, *self.draw(seen))

    def look(self, seen: Sources, picture: Tensor, fused: Tensor) -> Encoded:
        """What the image encoder makes of a picture (B,3,H',W') drawn from `seen`, beside what it was drawn from."""
        return Encoded(
            features=self.image_encoder(picture, seen.z_f, seen.pair.heat),
            fused=fused,
            latents=seen.latents,
            z_f=seen.z_f,
            mask_prompt=seen.mask_prompt,
            size=seen.pair.size,
            small=seen.pair.small,
            padded=(picture.shape[2], picture.shape[3]),
        )

    def sources(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        present: Tensor | None = None,
        covered: Tensor | None = None,
    ) -> Sources:
        """The pair through LSTG and FMP: what the picture is drawn from. Arguments and InputError as in `forward`."""
        pair = self.fitted(visible, infrared, present, covered)
        latents = self.tokenizer(*pair.for_tokenizer, present, pair.covered)
        return Sources(pair, latents, *self.fusion(latents.visible, latents.infrared))

    def fitted(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        present: Tensor | None = None,
        covered: Tensor | None = None,
    ) -> Fitted:
        """The pair at the size that the network takes. Arguments and InputError as in `forward`."""
        size = pair_size(visible, infrared)
        full_visible, full_infrared = stand_in(visible, infrared, present)
        small = reduced_size(size, self.config.max_side)
        if covered is not None and (visible is None or infrared is None or bool(require_mask(covered, size).all())):
            covered = None
        if covered is not None:
            full_visible, full_infrared = stand_in_where(full_visible, full_infrared, covered)
            visible, infrared = full_visible, full_infrared
        one, two = (None if x is None else fit(x, small, self.multiple) for x in (visible, infrared))
        # the same tensor is fitted once; only a stand-in needs fitting of its own
        given = (visible, infrared)
        shown, heat = (
            image if image is not None and full is own else fit(full, small, self.multiple)
            for image, full, own in zip((one, two), (full_visible, full_infrared), given, strict=True)
        )

        there = None if covered is None else covered_cells(covered, small, self.multiple)
        return Fitted(full_visible, full_infrared, shown, heat, (one, two), there, size, small)

    def draw(self, seen: Sources) -> tuple[Tensor, Tensor]:
        """The picture (B,3,H',W') that the image encoder sees, and the fused picture (B,3,H,W)."""
        pair, head = seen.pair, self.picture_head
        controls = head(seen.z_f, pair.shown, pair.heat)
        picture = head.compose(controls, pair.shown, pair.heat)  # type: ignore[operator]
        size, small = pair.size, pair.small
        if small == size:
            return picture, picture[:, :, : size[0], : size[1]]
        scale_back = resize(controls[:, :, : small[0], : small[1]], size)
        return picture, head.compose(scale_back, pair.visible, pair.infrared)  # type: ignore[operator]

    def decode(
        self,
        encoded: Encoded,
        prompts: Prompts | None = None,
        mode: PromptMode | None = None,
        first: FirstPass | None = None,
    ) -> Output:
        """The second half of `forward`, cheap enough to run at every click: prompts -> masks and logits.

        `prompts` and `mode` as in `forward`, in pixels of the images that were encoded; `first` is what `first_pass`
        gave for the prompts that name no class, if it was run before. Raises InputError on prompts that contradict
        themselves.
        """
        if prompts is not None:
            # len() would fix the batch of an export
            require_prompts(prompts, encoded.mask_prompt.shape[0], encoded.size)
            require_classes_known(prompts, len(self.config.classes), UNTAUGHT if self.steering is None else None)
        clicks, rest = split_classes(prompts)
        first = first or self.first_pass(encoded, rest, mode)
        logits = first.logits if clicks is None else self._steer(encoded, first, clicks)
        used = scale_prompts(first.prompts, encoded.small, encoded.size)
        return Output(
            fused=encoded.fused,
            logits=to_input(logits, encoded),
            fot_logits=to_input(first.fot, encoded),
            prompts=used if clicks is None or prompts is None else replace(prompts, mask=used.mask),
            latents=encoded.latents,
            mask_prompt=encoded.mask_prompt,
            features=encoded.z_f,
        )

    def first_pass(self, encoded: Encoded, prompts: Prompts | None = None, mode: PromptMode | None = None) -> FirstPass:
        """What the network gives on the latent grid before any click names a class; arguments as in `decode`."""
        features, z_f = encoded.features, encoded.z_f
        used = self.prompts_for(encoded, prompts, mode)
        grid = (features.embedding.shape[2], features.embedding.shape[3])
        sparse, dense = self.prompt_encoder(used, encoded.padded, features.frame, grid, self.config.prompts.mask)
        positions = self.prompt_encoder.positions(grid)
        fot, mask_features = self.mask_decoder(features.embedding, positions, sparse, dense, features.levels)

        latent_grid = (z_f.shape[2], z_f.shape[3])
        fot = cut(fot, features.frame, latent_grid)
        levels = [content_of(level, features.frame) for level in features.levels]
        masks = cut(mask_features, features.frame, latent_grid)
        level_features = self.head.features(levels, latent_grid)
        # one layout with and without steering: resizing rounds each in its own way, and what no click named stays
        logits = self.head(masks, fot, z_f, level_features).contiguous()
        return FirstPass(logits, fot, masks, level_features, used)

    def steering_context(self, encoded: Encoded, first: FirstPass) -> Tensor:
        """(B,C,h,w): what steering sees of a pair, the fused picture at twice the latent grid among it."""
        picture = F.avg_pool2d(fit(encoded.fused, encoded.small, self.multiple), Tokenizer.STRIDE // 2)
        parts = [encoded.z_f, first.mask_features, F.pixel_unshuffle(picture, 2)]
        return torch.cat(parts if first.features is None else [first.features, *parts], dim=1)

    def class_clicks(self, encoded: Encoded, given: Prompts) -> ClassClicks:
        """Prompts that all name a class, in pixels of the input, as steering takes them; InputError for one outside."""
        require_inside(given, encoded.size)
        inside = scale_prompts(keep_inside(given, encoded.size), encoded.size, encoded.small)
        return self.prompt_encoder.class_clicks(inside, encoded.padded, encoded.features.frame)

    def _steer(self, encoded: Encoded, first: FirstPass, given: Prompts) -> Tensor:
        assert self.steering is not None
        clicks = self.class_clicks(encoded, given)
        logits: Tensor = self.steering(self.steering_context(encoded, first), first.logits, clicks)
        return logits

    def prompts_for(self, encoded: Encoded, given: Prompts | None, mode: PromptMode | None) -> Prompts:
        """What steers SAM, in pixels of the size at which the pair is segmented: `given` prompts, or by `mode` (of the
        configuration if None) the model's own points and box, or its mask prompt alone. Raises InputError as `decode`.
        """
        own_mask, small = encoded.mask_prompt, encoded.small
        grid = (own_mask.shape[2], own_mask.shape[3])
        if given is not None:
            require_prompts(given, own_mask.shape[0], encoded.size)
            # an exported decoder is given what was moved inside before
            inside = given if torch.compiler.is_exporting() else keep_inside(given, encoded.size)
            scaled = scale_prompts(inside, encoded.size, small)
            scaled.mask = own_mask if given.mask is None else mask_to_grid(given.mask, grid, small)
            return scaled
        mode = mode or self.config.prompts.mode
        if mode == "none":
            return Prompts(mask=own_mask, source="none")
        if mode != "self":
            raise InputError(
                f"mode: found {mode!r}, expected self or none; hand user and oracle prompts in as `prompts`"
            )
        # peaks and box are sought inside the image, not in its padding
        rows, columns = cells(small)
        # the copy spares a traced graph the question whether what was cut out is contiguous
        content = own_mask[:, :, :rows, :columns].clone(memory_format=torch.contiguous_format)
        own = keep_inside(self_prompts(content, self.config.prompts), small)
        own.mask = own_mask
        return own

    def parts(self) -> dict[str, nn.Module]:
        """The stages by name, in the order they run."""
        names = ("tokenizer", "fusion", "picture_head", "image_encoder", "prompt_encoder", "mask_decoder", "head")
        found: dict[str, nn.Module] = {name: getattr(self, name) for name in names}
        return found if self.steering is None else {**found, "steering": self.steering}

    def extra_repr(self) -> str:
        """The preset this network was built from."""
        return f"preset={self.config.preset}"


class PartSize(NamedTuple):
    """How many parameters a part of the network has."""

    part: str
    parameters: int
    trainable: int


def parameter_table(network: FusionSAMNetwork) -> list[PartSize]:
    """The size of every part, in the order they run."""
    sizes = []
    for name, part in network.parts().items():
        counts = [(p.numel(), p.requires_grad) for p in part.parameters()]
        sizes.append(PartSize(name, sum(n for n, _ in counts), sum(n for n, learns in counts if learns)))
    return sizes
