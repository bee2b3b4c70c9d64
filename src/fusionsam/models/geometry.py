"""Sizes, padding and coordinates of a pair on its way through the network. No weights, no stages.

Four sizes, each (height, width): that of the input; `small`, at which it is segmented (the input's own unless it
exceeds max_side); `padded`, `small` after padding at right and bottom to the network's multiple; the latent grid,
padded / 4."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fusionsam.models.color import luma
from fusionsam.models.layers import resize, rounded, same_size, size_tensor
from fusionsam.types import LARGEST, SMALLEST, Encoded, Frame, InputError, Prompts

STRIDE = 4
"""Pixels a side that a latent cell covers."""

Size = tuple[int, int]


def pair_size(visible: Tensor | None, infrared: Tensor | None) -> Size:
    """(H, W) of a pair (B,3,H,W) and (B,1,H,W), either of which may be None.

    Raises InputError for other shapes, sides outside of 64 to 4096 pixels, images that differ, and no image at all.
    """
    shapes = []
    for name, image, channels in (("visible", visible, 3), ("infrared", infrared, 1)):
        if image is None:
            continue
        if image.ndim != 4 or image.shape[1] != channels:
            raise InputError(f"{name}: found shape {tuple(image.shape)}, expected (batch, {channels}, height, width)")
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


def reduced_size(size: Size, max_side: int) -> Size:
    """`size` where neither side exceeds `max_side`, else scaled so that the longer one is `max_side`."""
    if all(side <= max_side for side in size):
        return size
    scale = max_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def fit(image: Float[Tensor, "B C H W"], size: Size, multiple: int) -> Float[Tensor, "B C H_padded W_padded"]:
    """(B,C,H,W) reduced to `size` where larger, then padded at right and bottom to a multiple (border repeated)."""
    if not same_size(image.shape[2:], size):
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
    # in this form a multiple stays one where sizes are symbols
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in size)
    if same_size((bottom, right), (0, 0)):
        return image
    return F.pad(image, (0, right, 0, bottom), mode="replicate")


def stand_in(visible: Tensor | None, infrared: Tensor | None, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both images for the fused picture: an absent one is replaced by what the other one shows.

    visible (B,3,H,W), infrared (B,1,H,W); `present` bool (B,2) marks absent images within a batch."""
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


def stand_in_where(visible: Tensor, infrared: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    """`stand_in` pixel by pixel: `covered` bool (B,2,H,W) says where the visible and where the infrared image is."""
    there, warm = covered[:, :1], covered[:, 1:]
    return torch.where(there, visible, infrared.expand_as(visible)), torch.where(warm, infrared, luma(visible))


def require_mask(covered: Tensor, size: Size) -> Tensor:
    """`covered` as it is. InputError unless it is bool (B,2,H,W) of the images' size."""
    if covered.dtype != torch.bool or covered.ndim != 4 or covered.shape[1] != 2 or tuple(covered.shape[2:]) != size:
        raise InputError(
            f"covered: found {covered.dtype} of shape {tuple(covered.shape)}, expected bool (batch, 2, {size[0]}, "
            f"{size[1]}): where the visible, and where the infrared image is"
        )
    return covered


def covered_cells(covered: Tensor, size: Size, multiple: int) -> Tensor:
    """`covered` bool (B,2,H,W) of an input -> bool (B,2,h,w) of the latent cells of its padded network size: those of
    which at least half is there."""
    return F.avg_pool2d(fit(covered.float(), size, multiple), STRIDE) >= 0.5


def content_of(level: Float[Tensor, "B C h w"], frame: Frame) -> Float[Tensor, "B C h_content w_content"]:
    """A map over an encoder's frame (B,C,h,w) -> the part of it that covers the picture."""
    if same_size(frame.content, frame.size):
        return level
    height, width = (rounded(level.shape[i + 2] * frame.content[i], frame.size[i]) for i in (0, 1))
    return level[:, :, :height, :width]


def to_input(logits: Float[Tensor, "B K h w"], encoded: Encoded) -> Float[Tensor, "B K H W"]:
    """Logits on the latent grid (B,K,h,w) -> the input's own size. Logits are resized, never label maps."""
    at_network = resize(logits, encoded.padded)[:, :, : encoded.small[0], : encoded.small[1]]
    return resize(at_network, encoded.size)


def mask_to_grid(mask: Tensor, grid: Size, small: Size) -> Tensor:
    """A given mask prompt (B,1,h,w) over the picture -> over the picture and its padding, as the model's own is."""
    mask = mask.float()  # numpy's own floats are doubles
    if same_size(mask.shape[2:], grid) or torch.compiler.is_exporting():
        return mask
    rows, columns = cells(small)
    return F.pad(resize(mask, (rows, columns)), (0, grid[1] - columns, 0, grid[0] - rows))


def cells(size: Size) -> Size:
    """Latent cells that cover `size`, the last of a row or column perhaps in part."""
    return (size[0] + STRIDE - 1) // STRIDE, (size[1] + STRIDE - 1) // STRIDE


def scale_prompts(prompts: Prompts, source: Size, target: Size) -> Prompts:
    """Points and boxes in pixels of `source` -> pixels of `target`; the mask prompt stays as it is."""

    def move(xy: Tensor | None) -> Tensor | None:
        if xy is None:
            return None
        xy = xy.to(torch.promote_types(xy.dtype, torch.float32))  # whole numbers would make the factor 0
        if same_size(source, target):
            return xy
        factor = xy.new_tensor([target[1] / source[1], target[0] / source[0]])
        pairs = xy.reshape(*xy.shape[:-1], -1, 2)
        return ((pairs + 0.5) * factor - 0.5).reshape(xy.shape)

    return replace(prompts, points=move(prompts.points), boxes=move(prompts.boxes))


def keep_inside(prompts: Prompts, size: Size) -> Prompts:
    """Points and boxes that reach past the right or lower edge of (H, W) = `size`, as the last cell and a box that ends
    at W and H do, moved to the last pixel."""

    def move(xy: Tensor | None) -> Tensor | None:
        if xy is None:
            return None
        edge = size_tensor((size[1] - 1, size[0] - 1), xy).repeat(xy.shape[2] // 2)
        return torch.minimum(xy, edge)

    return replace(prompts, points=move(prompts.points), boxes=move(prompts.boxes))


def split_classes(given: Prompts | None) -> tuple[Prompts | None, Prompts | None]:
    """The prompts that name a class, and the others; None where there are none of a kind, the very prompts that were
    given where none names one. Within a batch a point of the other kind becomes padding, a box likewise among those
    that name a class. Raises InputError for a box that names a class in one image of a batch and none in another.
    """
    if given is None or not any(_named(classes) for classes in (given.point_classes, given.box_classes)):
        return None, None if given is None else replace(given, point_classes=None, box_classes=None)
    named, rest = Prompts(), replace(given, points=None, point_labels=None, boxes=None)
    rest = replace(rest, point_classes=None, box_classes=None)
    if given.points is not None and given.point_labels is not None:
        classes = _or_none_named(given.point_classes, given.points)
        some, free = (classes >= 0).any(0), ((classes < 0) & (given.point_labels >= 0)).any(0)
        if bool(some.any()):
            named = replace(named, points=given.points[:, some], point_classes=classes[:, some])
        if bool(free.any()):
            labels = given.point_labels.masked_fill(classes >= 0, -1)[:, free]
            rest = replace(rest, points=given.points[:, free], point_labels=labels)
    if given.boxes is not None:
        classes = _or_none_named(given.box_classes, given.boxes)
        some, free = (classes >= 0).any(0), (classes < 0).any(0)
        if bool((some & free).any()):
            raise InputError("prompts.box_classes: a box names a class in one image of the batch and none in another")
        if bool(some.any()):
            named = replace(named, boxes=given.boxes[:, some], box_classes=classes[:, some])
        if bool(free.any()):
            rest = replace(rest, boxes=given.boxes[:, free])
    empty = rest.points is None and rest.boxes is None and rest.mask is None
    return named, None if empty else rest


def _named(classes: Tensor | None) -> bool:
    return classes is not None and bool((classes >= 0).any())


def _or_none_named(classes: Tensor | None, places: Tensor) -> Tensor:
    return places.new_full(places.shape[:2], -1, dtype=torch.long) if classes is None else classes.long()


def require_inside(given: Prompts, size: Size) -> None:
    """Raises InputError for points, but for padding, and boxes that reach outside of (H, W) = `size`."""
    points, labels = given.points, given.point_labels
    if points is not None and labels is not None:
        points = points[labels >= 0]
    for name, found in (("points", points), ("boxes", given.boxes)):
        if found is None:
            continue
        xy = found.reshape(-1, 2)
        limit = xy.new_tensor([size[1], size[0]])
        outside = ((xy < 0) | (xy > limit)).any(1)
        if bool(outside.any()):
            x, y = xy[outside][0].tolist()
            raise InputError(f"prompts.{name}: {x:g}, {y:g} lies outside of the picture of {size[1]}x{size[0]} pixels")


def require_classes_known(given: Prompts, classes: int, untaught: str | None) -> None:
    """Raises InputError for classes of points and boxes that there are not, that do not fit the points, or that the
    network cannot use: `untaught` says why and what to do, None = it can."""
    for name, places, found in (
        ("point_classes", given.points, given.point_classes),
        ("box_classes", given.boxes, given.box_classes),
    ):
        if found is None:
            continue
        wanted = None if places is None else tuple(places.shape[:2])
        if tuple(found.shape) != wanted:
            raise InputError(f"prompts.{name}: found shape {tuple(found.shape)}, expected {wanted}: one class id each")
        low, high = (int(found.min()), int(found.max())) if found.numel() else (-1, -1)
        if found.is_floating_point() or low < -1 or high >= classes:
            odd = "numbers with a point" if found.is_floating_point() else f"{low if low < -1 else high}"
            raise InputError(f"prompts.{name}: found {odd}, expected class ids 0 to {classes - 1}, or -1 for none")
        if high >= 0 and untaught:
            raise InputError(f"prompts.{name}: {untaught}")
    labels, named = given.point_labels, given.point_classes
    if named is not None and labels is not None and bool(((named >= 0) & (labels != 1)).any()):
        raise InputError(
            "prompts.point_classes: a point off the object (label 0) names a class; give the class that is there, with "
            "label 1"
        )


def require_prompts(given: Prompts, batch: int, size: Size) -> None:
    """Raises InputError for prompts that contradict themselves or the `batch` images of `size` (H, W) they are for."""
    named = {"points": (given.points, 2), "boxes": (given.boxes, 4)}
    for name, (value, columns) in named.items():
        if value is not None and (value.ndim != 3 or value.shape[2] != columns):
            raise InputError(f"prompts.{name}: found shape {tuple(value.shape)}, expected (batch, {name}, {columns})")
    counts = [None if x is None else tuple(x.shape[:2]) for x in (given.points, given.point_labels)]
    if counts[0] != counts[1]:
        raise InputError(
            f"prompts.point_labels: found {counts[1]} for points {counts[0]} (batch, points); give every point 1 "
            "(on the object), 0 (off it) or -1 (padding)"
        )
    if given.mask is not None and (given.mask.ndim != 4 or given.mask.shape[1] != 1 or 0 in given.mask.shape):
        raise InputError(f"prompts.mask: found shape {tuple(given.mask.shape)}, expected (batch, 1, height, width)")
    if given.mask is not None and not given.mask.is_floating_point():
        raise InputError(
            f"prompts.mask: found {given.mask.dtype}, expected logits as floats: below 0 off the object, above 0 on it"
        )
    if torch.compiler.is_exporting():  # a graph cannot look at values
        return
    for name, found in (("points", given.points), ("boxes", given.boxes), ("mask", given.mask)):
        if found is None:
            continue
        if found.shape[0] != batch:
            raise InputError(
                f"prompts.{name}: found prompts for {found.shape[0]} images, expected {batch}, one an image"
            )
        if not bool(found.isfinite().all()):
            wanted = "logits" if name == "mask" else "pixels of the image"
            raise InputError(f"prompts.{name}: holds values that are not finite; give {wanted}")
    if given.boxes is not None and bool((given.boxes[..., :2] > given.boxes[..., 2:]).any()):
        raise InputError("prompts.boxes: a box ends before it begins; expected x0, y0, x1, y1 with x0 <= x1, y0 <= y1")
    require_inside(given, size)
