"""From a Sample to what the network sees. One geometric draw moves visible, infrared and mask together.

Every random number comes from the generator that is passed in: a training item is a pure function of its seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fusionsam.config.schema import DataConfig
from fusionsam.data.corruptions import harsh, night, reach
from fusionsam.data.dataset import IGNORE, Item
from fusionsam.data.infrared_styles import draw_style
from fusionsam.types import LUMA, Sample

_PASTE_LUMA = 40.0  # grey levels; a day car pasted into a night would teach an impossible scene


def to_unit(image: Tensor) -> Tensor:
    """uint8 0-255 -> float32 in [0,1]."""
    return image.float() / 255


def eval_transform(sample: Sample) -> Item:
    """Full size, only converted to float in [0,1]; an absent modality is zeros with present False."""
    height, width = sample.size
    present = torch.tensor([sample.visible is not None, sample.infrared is not None])
    visible = torch.zeros(3, height, width) if sample.visible is None else to_unit(sample.visible)
    infrared = torch.zeros(1, height, width) if sample.infrared is None else to_unit(sample.infrared)
    return Item(visible, infrared, sample.label, present, sample.id, sample.covered)


class Views(NamedTuple):
    """The arrays of one pair under one geometric draw, all of one size."""

    visible: tv_tensors.Image
    infrared: tv_tensors.Image
    mask: tv_tensors.Mask  # the label
    covered: Tensor | None  # bool (2,H,W)
    taught: tv_tensors.Mask | None = None  # a teacher's label


class TrainTransform:
    """Random resize, crop, flip, misalignment, photometric and harsh changes, modality dropout,
    pasting, as DataConfig says.

    `foreground` are the class ids at which rare crops aim and of which objects are pasted."""

    def __init__(self, config: DataConfig, foreground: Sequence[int]) -> None:
        self.config = config
        self.foreground = torch.tensor(sorted(foreground), dtype=torch.long)

    def __call__(self, sample: Sample, generator: torch.Generator, other: Sample | None = None) -> Item:
        """visible (3,h,w), infrared (1,h,w) in [0,1], label int64 (h,w) or None with (h,w) = config.crop, present (2,),
        covered bool (2,h,w) or None.

        `other` is the sample objects are pasted from, with probability config.paste."""
        config = self.config
        views = self._geometry(sample, generator)
        if other is not None and _chance(generator, config.paste):
            views = self._paste(views, other, generator)
        visible, infrared, mask, covered, taught = views
        present = torch.tensor([sample.visible is not None, sample.infrared is not None])
        if config.shift:
            infrared, covered = _shifted(infrared, covered, config.shift, generator)
        light, heat = to_unit(visible.as_subclass(Tensor)), to_unit(infrared.as_subclass(Tensor))
        if config.infrared_style and _chance(generator, config.infrared_style):
            heat = draw_style(heat, generator)
        if config.night and _chance(generator, config.night):
            light = night(light, generator)
        if _chance(generator, config.photometric):
            light = _photometric(light, generator)
        if _chance(generator, config.photometric):
            heat = _photometric(heat, generator)
        if config.harsh and _chance(generator, config.harsh):
            light = harsh(light, generator)
        if config.harsh and _chance(generator, config.harsh):
            heat = harsh(heat, generator)
        if present.all():
            draw = _uniform(generator)
            if draw < 2 * config.modality_dropout:
                present[int(draw >= config.modality_dropout)] = False
            elif config.partial_absence and _chance(generator, config.partial_absence):
                covered = _narrowed(covered, (light.shape[1], light.shape[2]), generator)
                light, heat = light * covered[0], heat * covered[1]
        # Zero after the photometric changes: an absent modality is exactly zero in training as in prediction.
        light = light if present[0] else torch.zeros_like(light)
        heat = heat if present[1] else torch.zeros_like(heat)
        label = None if sample.label is None else mask.as_subclass(Tensor).long()
        lesson = None if taught is None else taught.as_subclass(Tensor).long()
        if covered is not None:  # where no camera is left, there is nothing to learn from
            unseen = ~(covered & present[:, None, None]).any(0)
            label, lesson = (None if ids is None else ids.masked_fill(unseen, IGNORE) for ids in (label, lesson))
        return Item(light, heat, label, present, sample.id, covered, lesson)

    def _geometry(self, sample: Sample, generator: torch.Generator) -> Views:
        """Resize, crop and flip with one draw; uint8 in, uint8 out, all of size config.crop."""
        config = self.config
        height, width = sample.size
        scale = math.exp(_uniform(generator, math.log(config.scale[0]), math.log(config.scale[1])))
        # The window is cut from the source and then resized: the same as resizing first, at a fraction of the work.
        window = [max(1, round(side / scale)) for side in config.crop]
        size = [min(w, s) for w, s in zip(window, (height, width), strict=True)]
        top, left = self._corner(sample, size, generator)
        inner = [
            c if w <= s else max(1, min(c, round(s * scale)))
            for c, w, s in zip(config.crop, window, (height, width), strict=True)
        ]
        free = [c - i for c, i in zip(config.crop, inner, strict=True)]
        place = [_integer(generator, 0, room) for room in free]
        padding = [place[1], place[0], free[1] - place[1], free[0] - place[0]]
        mirror = _chance(generator, config.flip)

        def moved(array: Tensor, nearest: bool, outside: int | None = None) -> Tensor:
            mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
            array = F.crop(array, top, left, size[0], size[1])
            if size != inner:
                # resize_image also for masks: F.resize would use the older `nearest`, half a pixel off the images.
                array = F.resize_image(array.as_subclass(Tensor), inner, interpolation=mode, antialias=not nearest)
            if any(padding) and outside is None:  # as the network pads: black would move the mean of a picture
                array = F.pad(array, padding, padding_mode="edge")
            elif any(padding):
                array = F.pad(array, padding, fill=outside)
            return F.horizontal_flip(array) if mirror else array

        blank = torch.zeros(1, height, width, dtype=torch.uint8)
        visible = blank.expand(3, -1, -1) if sample.visible is None else sample.visible
        infrared = blank if sample.infrared is None else sample.infrared
        mask = blank[0] if sample.label is None else sample.label.to(torch.uint8)
        covered = None
        if sample.covered is not None:
            covered = moved(tv_tensors.Mask(sample.covered.to(torch.uint8)), nearest=True)

        def moved_ids(ids: Tensor) -> tv_tensors.Mask:
            return tv_tensors.Mask(moved(tv_tensors.Mask(ids)[None], nearest=True, outside=IGNORE)[0])

        return Views(
            tv_tensors.Image(moved(tv_tensors.Image(visible), nearest=False)),
            tv_tensors.Image(moved(tv_tensors.Image(infrared), nearest=False)),
            moved_ids(mask),
            None if covered is None else covered.as_subclass(Tensor).bool(),
            None if sample.taught is None else moved_ids(sample.taught),
        )

    def _corner(self, sample: Sample, size: list[int], generator: torch.Generator) -> tuple[int, int]:
        """Top left of the source window: anywhere, or with a rare pixel near its middle."""
        room = [s - w for s, w in zip(sample.size, size, strict=True)]
        corner = [_integer(generator, 0, r) for r in room]
        wanted = _chance(generator, self.config.rare_crop)
        if wanted and sample.label is not None and (pixel := self._rare_pixel(sample.label, generator)) is not None:
            for axis in (0, 1):
                jitter = _uniform(generator, -0.3, 0.3) * size[axis]
                corner[axis] = round(min(max(pixel[axis] - size[axis] / 2 + jitter, 0), room[axis]))
        return corner[0], corner[1]

    def _rare_pixel(self, label: Tensor, generator: torch.Generator) -> tuple[int, int] | None:
        """A pixel of a foreground class drawn uniformly among those in the label; None if there is none."""
        chosen = self._rare_class(label, generator)
        if chosen is None:
            return None
        places = (label.flatten() == chosen).nonzero()
        place = int(places[_integer(generator, 0, len(places) - 1)])
        return divmod(place, label.shape[1])

    def _rare_class(self, label: Tensor, generator: torch.Generator) -> int | None:
        counts = torch.bincount(label.flatten(), minlength=256)
        there = self.foreground[counts[self.foreground] > 0]
        return int(there[_integer(generator, 0, len(there) - 1)]) if len(there) else None

    def _paste(self, target: Views, other: Sample, generator: torch.Generator) -> Views:
        """The pixels of one foreground class of `other`, under its own geometric draw, laid over all arrays."""
        if other.visible is None or other.infrared is None or other.label is None:
            return target
        source = self._geometry(other, generator)
        chosen = self._rare_class(source[2].as_subclass(Tensor).long(), generator)
        luma = [
            (torch.tensor(LUMA)[:, None, None] * image.as_subclass(Tensor)).sum(0).mean()
            for image in (target[0], source[0])
        ]
        if chosen is None or abs(luma[0] - luma[1]) > _PASTE_LUMA:
            return target
        where = source[2].as_subclass(Tensor) == chosen
        visible, infrared, mask = (
            torch.where(where, new.as_subclass(Tensor), old.as_subclass(Tensor))
            for old, new in zip(target[:3], source[:3], strict=True)
        )
        taught = target.taught  # a teacher looked at the scene without the object
        if taught is not None:
            taught = tv_tensors.Mask(taught.as_subclass(Tensor).masked_fill(where, IGNORE))
        covered = target.covered
        if target.covered is not None or source.covered is not None:
            whole = torch.ones(2, *where.shape, dtype=torch.bool)
            old, new = (whole if views.covered is None else views.covered for views in (target, source))
            covered = torch.where(where, new, old)
        return Views(tv_tensors.Image(visible), tv_tensors.Image(infrared), tv_tensors.Mask(mask), covered, taught)


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _chance(generator: torch.Generator, probability: float) -> bool:
    return _uniform(generator) < probability


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _shifted(
    image: tv_tensors.Image, covered: Tensor | None, largest: int, generator: torch.Generator
) -> tuple[tv_tensors.Image, Tensor | None]:
    """Infrared, and where it is, moved by up to `largest` pixels along each axis, the border repeated."""
    down, right = (_integer(generator, -largest, largest) for _ in range(2))
    height, width = image.shape[-2:]

    def moved(array: Tensor) -> Tensor:
        padded = F.pad(array, [largest] * 4, padding_mode="edge")
        return F.crop(padded, largest - down, largest - right, height, width)

    if covered is not None:
        covered = torch.stack([covered[0], moved(covered[1:].to(torch.uint8)).bool()[0]])
    return tv_tensors.Image(moved(image)), covered


def _narrowed(covered: Tensor | None, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """`covered` with one camera reaching a part of the picture alone: infrared in three of four draws, as its view is
    the narrower one in most rigs."""
    covered = torch.ones(2, *size, dtype=torch.bool) if covered is None else covered.clone()
    camera = int(_chance(generator, 0.75))
    covered[camera] &= reach(size, generator) | ~covered[1 - camera]  # no pixel is left without any camera
    return covered


def _photometric(image: Tensor, generator: torch.Generator) -> Tensor:
    """Gain, offset, contrast, gamma, now and then noise and blur; saturation and hue where there are three channels.

    Its tone curve is monotone: but for noise and blur, what is warm stays brighter than what is cold."""
    gain = math.exp(_uniform(generator, -0.4, 0.4))
    contrast = math.exp(_uniform(generator, -0.4, 0.4))
    offset = _uniform(generator, -0.08, 0.08)
    gamma = math.exp(_uniform(generator, -0.35, 0.35))
    mean = image.mean()
    if image.shape[0] == 3:
        image = torch.tensordot(_color_matrix(generator), image, dims=1)
    image = ((image - mean) * (gain * contrast) + mean * gain + offset).clamp_(0, 1)
    if _chance(generator, 0.5):
        image = image.pow_(gamma)
    if _chance(generator, 0.15):
        # the kernel sums to 1 only up to rounding
        image = F.gaussian_blur_image(image, [5, 5], [_uniform(generator, 0.4, 1.4)] * 2).clamp_(0, 1)
    if _chance(generator, 0.3):
        sigma = _uniform(generator, 0.005, 0.03)
        image = (image + sigma * torch.randn(image.shape, generator=generator)).clamp_(0, 1)
    return image


def _color_matrix(generator: torch.Generator) -> Tensor:
    """(3,3) on RGB: chroma scaled (saturation) and turned (hue, up to 18 degrees) in YIQ; luma unchanged."""
    saturation = math.exp(_uniform(generator, -0.5, 0.4))
    angle = math.radians(_uniform(generator, -18, 18))
    to_yiq = torch.tensor([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle)
    turn = torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
