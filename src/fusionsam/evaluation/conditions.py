"""The disturbances that `fusionsam robustness` measures: what each does to a pair, and where its cameras then reach."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusionsam.alignment.residual import residual
from fusionsam.data.corruptions import blur, fog, noise
from fusionsam.data.infrared_styles import remove_haze
from fusionsam.types import InputError

Pair = tuple[Tensor | None, Tensor | None]
Change = Callable[[Tensor, Tensor, torch.Generator], Pair]

NOISE, BLUR, EXPOSURE, FOG = 0.08, 2.5, (3.0, 0.2), 2.0
"""Deviation of the noise (of 1), of the blur (pixels), factors on the light, optical depth of the fog at the top."""
REALIGNED = ", realigned"
MIDDLE = 0.6
"""Share of the visible frame's sides that a narrower infrared camera covers."""


class Condition(NamedTuple):
    """A disturbance: visible (3,H,W), infrared (1,H,W) in [0,1] and a generator -> the pair as the model sees it. Where
    infrared does not reach it is black, and models that take a mask are told."""

    change: Change
    note: str
    reach: float = 1.0  # share of both sides, round the middle, that infrared covers


def shift(image: Tensor, down: int, right: int) -> Tensor:
    """(C,H,W) moved by whole pixels, down and to the right, negative the other way; the border is repeated."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return image[:, rows][:, :, columns]


def _moved(infrared: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    down, right = ((1, 0), (-1, 0), (0, 1), (0, -1))[int(torch.randint(4, (), generator=generator))]
    return shift(infrared, pixels * down, pixels * right)


def _shifted(pixels: int) -> Condition:
    def change(visible: Tensor, infrared: Tensor, generator: torch.Generator) -> Pair:
        return visible, _moved(infrared, pixels, generator)

    return Condition(change, "up, down, left or right, drawn for each pair")


def _realigned(pixels: int) -> Condition:
    def change(visible: Tensor, infrared: Tensor, generator: torch.Generator) -> Pair:
        heat = _moved(infrared, pixels, generator)
        found = residual(visible * 255, heat * 255)
        return visible, shift(heat, round(found.y), round(found.x)) if found.believed else heat

    return Condition(change, "the same, then moved back as --align does where the edges agree better")


def _middle(size: tuple[int, int], share: float) -> Tensor:
    """bool (H,W): the middle of a picture, `share` of both sides."""
    there = torch.zeros(size, dtype=torch.bool)
    rows, columns = (slice(round(side * (1 - share) / 2), round(side * (1 + share) / 2)) for side in size)
    there[rows, columns] = True
    return there


def _reduced(image: Tensor, part: float) -> Tensor:
    size = tuple(max(1, round(side * part)) for side in image.shape[1:])
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


CONDITIONS: dict[str, Condition] = {
    "full": Condition(lambda v, i, g: (v, i), "the pair as it is"),
    "visible only": Condition(lambda v, i, g: (v, None), "no infrared image, and the model knows it"),
    "infrared only": Condition(lambda v, i, g: (None, i), "no visible image, and the model knows it"),
    **{f"infrared shifted {pixels} px": _shifted(pixels) for pixels in (2, 4, 8, 16)},
    **{f"infrared shifted {pixels} px{REALIGNED}": _realigned(pixels) for pixels in (8, 16)},
    "noise": Condition(
        lambda v, i, g: (noise(v, NOISE, g), noise(i, NOISE, g)), f"Gaussian, deviation {NOISE:g} of the range, on both"
    ),
    "blur": Condition(lambda v, i, g: (blur(v, BLUR), blur(i, BLUR)), f"Gaussian, {BLUR:g} pixels, on both"),
    "fog": Condition(lambda v, i, g: (fog(v, FOG, g), i), f"visible only, optical depth {FOG:g} at the top"),
    "over-exposure": Condition(
        lambda v, i, g: ((v * EXPOSURE[0]).clamp(0, 1), i), f"visible x {EXPOSURE[0]:g}, clipped"
    ),
    "under-exposure": Condition(lambda v, i, g: (v * EXPOSURE[1], i), f"visible x {EXPOSURE[1]:g}, in 8 bits"),
    "dead infrared frame": Condition(
        lambda v, i, g: (v, torch.zeros_like(i)), "infrared all zero, and nobody tells the model"
    ),
    **{
        f"objects {name} as large": Condition(
            lambda v, i, g, part=part: (_reduced(v, part), _reduced(i, part)),  # type: ignore[misc]
            "the whole pair reduced, as of a camera farther away; the class map is enlarged again",
        )
        for name, part in (("half", 1 / 2), ("a third", 1 / 3))
    },
    "coarse infrared": Condition(
        lambda v, i, g: (v, F.interpolate(_reduced(i, 1 / 4)[None], i.shape[1:], mode="bilinear")[0]),
        "infrared reduced to a quarter of its sides and enlarged again: 160x120 pixels of 640x480",
    ),
    "black-hot infrared": Condition(lambda v, i, g: (v, 1 - i), "infrared inverted, and nobody tells the model"),
    "infrared in the middle": Condition(
        lambda v, i, g: (v, i),
        f"infrared covers {MIDDLE:.0%} of both sides, as of a narrower lens; models that take a mask are told",
        MIDDLE,
    ),
    "haze removed from infrared": Condition(
        lambda v, i, g: (v, remove_haze(i)), "infrared with haze removed by the dark channel, as MSRS stores MFNet's"
    ),
}
"""Name -> disturbance, in the order of the table; the first is the reference."""


def disturb(name: str, visible: Tensor, infrared: Tensor, image_id: str, seed: int = 0) -> Pair:
    """One condition on one pair, (3,H,W) and (1,H,W) in [0,1]; a pure function of its arguments. The result is rounded
    to 8 bits, as a camera's. InputError for an unknown condition."""
    if name not in CONDITIONS:
        raise InputError(f"condition {name!r} is not known; choose from {', '.join(CONDITIONS)}")
    kind = name.removesuffix(REALIGNED)  # the same shift, before and after it is taken back
    drawn = hashlib.sha256(f"{seed}/{kind}/{image_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big") >> 1)
    changed = CONDITIONS[name].change(visible, infrared, generator)
    first, second = (None if image is None else (image * 255).round() / 255 for image in changed)
    if second is not None and CONDITIONS[name].reach < 1:
        second = second * _middle((second.shape[1], second.shape[2]), CONDITIONS[name].reach)
    return first, second


def reached(name: str, covered: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """bool (2,H,W): where the cameras reach under a condition; None where that is everywhere."""
    if CONDITIONS[name].reach == 1:
        return covered
    middle = torch.stack([torch.ones(size, dtype=torch.bool), _middle(size, CONDITIONS[name].reach)])
    return middle if covered is None else covered & middle
