"""The whole network. The only file that knows the order of the stages."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import ModelConfig
from fusionsam.errors import InputError
from fusionsam.models.color import luma
from fusionsam.models.encoders.create import create_image_encoder
from fusionsam.models.fusion import PICTURE_HEADS, FusionMaskPrompting
from fusionsam.models.head import ClassificationHead
from fusionsam.models.layers import resize, rounded, same_size, size_tensor
from fusionsam.models.mask_decoder import FullFledgedMaskDecoder
from fusionsam.models.prompts import PromptEncoder, cut, self_prompts
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.types import LARGEST, SMALLEST, Encoded, Frame, Output, Prompts


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

    @property
    def multiple(self) -> int:
        """Height and width are padded to a multiple of this inside."""
        return math.lcm(self.image_encoder.stride, Tokenizer.STRIDE * self.config.fusion.kv_stride)

    def forward(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        prompts: Prompts | None = None,
        *,
        mode: Literal["self", "none"] | None = None,
        present: Tensor | None = None,
    ) -> Output:
        """The one forward pass of training, evaluation, prediction, export and serving. It takes no label.

        visible (B,3,H,W) or None, infrared (B,1,H,W) or None, in [0,1], the same H and W from 64 to 4096. `prompts`
        (user or oracle) replace the model's own points and boxes, in pixels of this input; `mode` overrides the
        configured one; `present` bool (B,2) marks absent images within a batch. Raises InputError on a wrong size and
        on prompts that contradict themselves.
        """
        return self.decode(self.encode(visible, infrared, present), prompts, mode)

    def encode(self, visible: Tensor | None, infrared: Tensor | None, present: Tensor | None = None) -> Encoded:
        """The first half of `forward`, its dear one: everything that no prompt changes, up to SAM's image embedding.

        Arguments and InputError as in `forward`. One Encoded serves any number of calls of `decode`.
        """
        size = self._check(visible, infrared)
        full_visible, full_infrared = self._stand_in(visible, infrared, present)
        small = self._network_size(size)
        images = [None if x is None else self._fit(x, small) for x in (visible, infrared)]
        # the same tensor is fitted once; only a stand-in needs fitting of its own
        shown = images[0] if images[0] is not None and full_visible is visible else self._fit(full_visible, small)
        heat = images[1] if images[1] is not None and full_infrared is infrared else self._fit(full_infrared, small)

        latents = self.tokenizer(images[0], images[1], present)
        z_f, mask_prompt = self.fusion(latents.visible, latents.infrared)
        controls = self.picture_head(z_f, shown, heat)
        picture = self.picture_head.compose(controls, shown, heat)
        if small == size:
            fused = picture[:, :, : size[0], : size[1]]
        else:
            scale_back = resize(controls[:, :, : small[0], : small[1]], size)
            fused = self.picture_head.compose(scale_back, full_visible, full_infrared)
        return Encoded(
            features=self.image_encoder(picture, z_f, heat),
            fused=fused,
            latents=latents,
            z_f=z_f,
            mask_prompt=mask_prompt,
            size=size,
            small=small,
            padded=(picture.shape[2], picture.shape[3]),
        )

    def decode(
        self, encoded: Encoded, prompts: Prompts | None = None, mode: Literal["self", "none"] | None = None
    ) -> Output:
        """The second half of `forward`, cheap enough to run at every click: prompts -> masks and logits.

        `prompts` and `mode` as in `forward`, in pixels of the images that were encoded. Raises InputError on prompts
        that contradict themselves.
        """
        size, small, padded = encoded.size, encoded.small, encoded.padded
        features, z_f, mask_prompt = encoded.features, encoded.z_f, encoded.mask_prompt
        used = self._prompts(prompts, mode or self.config.prompts.mode, mask_prompt, size, small)
        grid = (features.embedding.shape[2], features.embedding.shape[3])
        sparse, dense = self.prompt_encoder(used, padded, features.frame, grid, self.config.prompts.mask)
        positions = self.prompt_encoder.positions(grid)
        fot, mask_features = self.mask_decoder(features.embedding, positions, sparse, dense, features.levels)

        cells = (z_f.shape[2], z_f.shape[3])
        fot = cut(fot, features.frame, cells)
        levels = [self._level(level, features.frame) for level in features.levels]
        logits = self.head(cut(mask_features, features.frame, cells), fot, z_f, levels)
        return Output(
            fused=encoded.fused,
            logits=self._back(logits, padded, small, size),
            fot_logits=self._back(fot, padded, small, size),
            prompts=self._scale_prompts(used, small, size),
            latents=encoded.latents,
            mask_prompt=mask_prompt,
            features=z_f,
        )

    # -- sizes ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _check(visible: Tensor | None, infrared: Tensor | None) -> tuple[int, int]:
        shapes = []
        for name, image, channels in (("visible", visible, 3), ("infrared", infrared, 1)):
            if image is None:
                continue
            if image.ndim != 4 or image.shape[1] != channels:
                raise InputError(
                    f"{name}: found shape {tuple(image.shape)}, expected (batch, {channels}, height, width)"
                )
            if not all(SMALLEST <= side <= LARGEST for side in image.shape[2:]):
                raise InputError(
                    f"{name}: found {image.shape[2]}x{image.shape[3]} pixels, expected {SMALLEST} to {LARGEST} a side; "
                    "resize the pair"
                )
            shapes.append((image.shape[0], image.shape[2], image.shape[3]))
        if not shapes:
            raise InputError("visible and infrared are both None; give at least one of the two images")
        if any(shape != shapes[0] for shape in shapes):
            raise InputError(
                f"visible and infrared differ: (batch, height, width) {shapes[0]} and {shapes[1]}; give an aligned pair"
            )
        return shapes[0][1], shapes[0][2]

    def _network_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if all(side <= self.config.max_side for side in size):
            return size
        scale = self.config.max_side / max(size)
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def _fit(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Reduced to `size` where larger, then padded at right and bottom to the network's multiple."""
        if not same_size(image.shape[2:], size):
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
        m = self.multiple
        # in this form a multiple stays one where sizes are symbols
        bottom, right = ((side + m - 1) // m * m - side for side in size)
        if same_size((bottom, right), (0, 0)):
            return image
        return F.pad(image, (0, right, 0, bottom), mode="replicate")

    @staticmethod
    def _stand_in(visible: Tensor | None, infrared: Tensor | None, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """For the picture only, an absent image is replaced by what the other one shows."""
        if visible is None:
            assert infrared is not None
            return infrared.expand(-1, 3, -1, -1), infrared
        if infrared is None:
            return visible, luma(visible)
        if present is None or (not torch.compiler.is_exporting() and bool(present.all())):
            return visible, infrared
        there = present[:, :, None, None, None]
        return (
            torch.where(there[:, 0], visible, infrared.expand_as(visible)),
            torch.where(there[:, 1], infrared, luma(visible)),
        )

    def _level(self, level: Tensor, frame: Frame) -> Tensor:
        if same_size(frame.content, frame.size):
            return level
        height, width = (rounded(level.shape[i + 2] * frame.content[i], frame.size[i]) for i in (0, 1))
        return level[:, :, :height, :width]

    @staticmethod
    def _back(logits: Tensor, padded: tuple[int, int], small: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Logits on the latent grid -> the input's own size. Logits are resized, never label maps."""
        at_network = resize(logits, padded)[:, :, : small[0], : small[1]]
        return resize(at_network, size)

    # -- prompts -------------------------------------------------------------------------------------------------

    def _prompts(
        self,
        given: Prompts | None,
        mode: str,
        mask_prompt: Tensor,
        size: tuple[int, int],
        small: tuple[int, int],
    ) -> Prompts:
        if given is not None:
            self._check_prompts(given)
            scaled = self._scale_prompts(given, size, small)
            scaled.mask = mask_prompt if given.mask is None else self._on_grid(given.mask, mask_prompt, small)
            return scaled
        if mode == "none":
            return Prompts(mask=mask_prompt, source="none")
        if mode != "self":
            raise InputError(
                f"mode: found {mode!r}, expected self or none; hand user and oracle prompts in as `prompts`"
            )
        # peaks and box are sought inside the image, not in its padding
        rows, columns = ((side + Tokenizer.STRIDE - 1) // Tokenizer.STRIDE for side in small)
        # the copy spares a traced graph the question whether what was cut out is contiguous
        inside = mask_prompt[:, :, :rows, :columns].clone(memory_format=torch.contiguous_format)
        own = self_prompts(inside, self.config.prompts)
        own.mask = mask_prompt
        # the last cell may reach past the image
        for name in ("points", "boxes"):
            if (xy := getattr(own, name)) is not None:
                edge = size_tensor((small[1] - 1, small[0] - 1), xy)
                setattr(own, name, torch.minimum(xy, edge.repeat(xy.shape[2] // 2)))
        return own

    @staticmethod
    def _on_grid(mask: Tensor, mask_prompt: Tensor, small: tuple[int, int]) -> Tensor:
        """A given mask over the picture -> over the picture and its padding, as the model's own is."""
        if same_size(mask.shape[2:], mask_prompt.shape[2:]) or torch.compiler.is_exporting():
            return mask
        height, width = mask_prompt.shape[2:]
        rows, columns = ((side + Tokenizer.STRIDE - 1) // Tokenizer.STRIDE for side in small)
        return F.pad(resize(mask, (rows, columns)), (0, width - columns, 0, height - rows))

    @staticmethod
    def _check_prompts(given: Prompts) -> None:
        for name, axes in (("points", "(batch, points, 2)"), ("boxes", "(batch, boxes, 4)")):
            value = getattr(given, name)
            if value is not None and not torch.compiler.is_exporting() and not bool(value.isfinite().all()):
                raise InputError(f"prompts.{name}: holds values that are not finite; give pixels of the image")
            if value is not None and (value.ndim != 3 or value.shape[2] != int(axes[-2])):
                raise InputError(f"prompts.{name}: found shape {tuple(value.shape)}, expected {axes}")
        counts = [None if x is None else tuple(x.shape[:2]) for x in (given.points, given.point_labels)]
        if counts[0] != counts[1]:
            raise InputError(
                f"prompts.point_labels: found {counts[1]} for points {counts[0]} (batch, points); give every point 1 "
                "(on the object), 0 (off it) or -1 (padding)"
            )

    @staticmethod
    def _scale_prompts(prompts: Prompts, source: tuple[int, int], target: tuple[int, int]) -> Prompts:
        def move(xy: Tensor | None) -> Tensor | None:
            if xy is None:
                return None
            xy = xy.to(torch.promote_types(xy.dtype, torch.float32))  # whole numbers would make the factor 0
            if same_size(source, target):
                return xy
            factor = xy.new_tensor([target[1] / source[1], target[0] / source[0]])
            pairs = xy.reshape(*xy.shape[:-1], -1, 2)
            return ((pairs + 0.5) * factor - 0.5).reshape(xy.shape)

        return Prompts(move(prompts.points), prompts.point_labels, move(prompts.boxes), prompts.mask, prompts.source)

    def parts(self) -> dict[str, nn.Module]:
        """The stages by name, in the order they run."""
        names = ("tokenizer", "fusion", "picture_head", "image_encoder", "prompt_encoder", "mask_decoder", "head")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """The preset this network was built from."""
        return f"preset={self.config.preset}"


def parameter_table(network: FusionSAMNetwork) -> list[dict[str, Any]]:
    """Parameters a part: name, total, trainable."""
    return [
        {
            "part": name,
            "parameters": sum(p.numel() for p in part.parameters()),
            "trainable": sum(p.numel() for p in part.parameters() if p.requires_grad),
        }
        for name, part in network.parts().items()
    ]
