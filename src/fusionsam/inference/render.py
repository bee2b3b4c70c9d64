"""Pictures for people: label colours, overlays with a legend, confidence, code maps, panels. Pillow and arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from fusionsam.types import InputError, Prompts

Rgb = NDArray[np.uint8]
Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

IGNORED = 255
PAPER, INK = (255, 255, 255), (20, 20, 20)


def colorize(labels: ArrayLike, palette: Sequence[Color]) -> Rgb:
    """Ids (H,W) as their palette colours, uint8 (H,W,3); ignored pixels (255) are black.

    Raises InputError if an id has no colour.
    """
    ids = np.asarray(labels)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(
            f"labels: found {ids.dtype} of shape {ids.shape}, expected integer ids (H, W); take the argmax"
        )
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = palette
    wrong = np.unique(ids[((ids < 0) | (ids >= len(palette))) & (ids != IGNORED)])
    if wrong.size:
        found = f"found ids {wrong[:5].tolist()}"
        raise InputError(f"labels: {found}, expected 0 to {len(palette) - 1}; give the palette of this data set")
    return colors[ids]


def brighten(color: Color) -> Color:
    """The same hue at full value and partly white, so that it is visible on a night picture; the darker the colour the
    whiter, because MFNet's person and car_stop differ in nothing but value."""
    top = max(color)
    full = [channel * 255 / top for channel in color] if top else [190.0, 190.0, 190.0]
    white = 0.25 + 0.6 * (1 - top / 255) ** 2
    red, green, blue = (round(channel + (255 - channel) * white) for channel in full)
    return red, green, blue


def _font_size(height: int, width: int) -> int:
    """Text of about 1/28 of the shorter side, growing half as fast above 1024; 11 is the smallest that reads well."""
    side = min(height, width)
    return max(11, round((side + min(side, 1024)) / 56))


def _contour(ids: NDArray[np.integer], thickness: int) -> NDArray[np.bool_]:
    """Pixels within `thickness` (along rows and columns) of a pixel of another id."""
    edge = np.zeros(ids.shape, bool)
    for step in range(1, thickness + 1):
        for one, two in ((np.s_[step:], np.s_[:-step]), (np.s_[:, step:], np.s_[:, :-step])):
            differs = ids[one] != ids[two]
            edge[one] |= differs
            edge[two] |= differs
    return edge


def _picture(values: ArrayLike | Image.Image, name: str) -> Rgb:
    """Any of PIL image, uint8 (H,W), (H,W,1), (H,W,3) as uint8 (H,W,3)."""
    array = np.asarray(values.convert("RGB") if isinstance(values, Image.Image) else values)
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        found = f"{array.dtype} of shape {array.shape}"
        raise InputError(f"{name}: found {found}, expected uint8 (H, W, 3) or (H, W); move the channels last")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _draw_prompts(image: Image.Image, prompts: Prompts) -> None:
    """Boxes as yellow rectangles, points as discs: green on the object, red off it. First of the batch."""
    draw = ImageDraw.Draw(image)
    unit = max(1, round(min(image.size) / 300))
    if prompts.boxes is not None:
        for x0, y0, x1, y1 in np.asarray(prompts.boxes.detach().cpu())[0].tolist():
            for grow, color, width in ((unit, (0, 0, 0), 3 * unit), (0, (255, 230, 0), unit)):
                left, right = sorted((x0, x1))
                top, bottom = sorted((y0, y1))
                draw.rectangle((left - grow, top - grow, right + grow, bottom + grow), outline=color, width=width)
    if prompts.points is not None:
        points = np.asarray(prompts.points.detach().cpu())[0]
        marks = prompts.point_labels
        labels = np.ones(len(points), int) if marks is None else np.asarray(marks.detach().cpu())[0]
        for (x, y), label in zip(points.tolist(), labels.tolist(), strict=True):
            if label < 0:
                continue
            inner = (0, 220, 70) if label else (240, 40, 40)
            for radius, color in ((4 * unit, (0, 0, 0)), (3 * unit, (255, 255, 255)), (2 * unit, inner)):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _share(count: int, total: int) -> str:
    percent = 100 * count / total
    return f"{percent:.1f} %" if percent >= 0.1 else "<0.1 %"


def _legend(entries: list[tuple[str, Color]], width: int, size: int) -> Image.Image:
    """Swatches with names, flowing in rows; as wide as `width`, or as the widest entry if that is more."""
    font: Font = ImageFont.load_default(size=size)
    gap = max(3, size // 3)
    row = round(size * 1.6)
    widths = [row + round(font.getlength(text)) + 2 * gap for text, _ in entries]
    width = max([width, *(needed + gap for needed in widths)])
    places, x, y = [], gap, gap
    for needed in widths:
        if x + needed > width and x > gap:
            x, y = gap, y + row
        places.append((x, y))
        x += needed + gap
    strip = Image.new("RGB", (width, y + row + gap), PAPER)
    draw = ImageDraw.Draw(strip)
    line = max(1, size // 8)
    for (text, color), (x, y) in zip(entries, places, strict=True):
        inset = (row - size) // 2
        draw.rectangle((x, y + inset, x + size, y + inset + size), fill=color, outline=brighten(color), width=line)
        draw.text((x + row, y + row // 2), text, fill=INK, font=font, anchor="lm")
    return strip


def legend_strip(classes: Sequence[str], palette: Sequence[Color], height: int, width: int) -> Image.Image:
    """The names beside their colours, as wide as a picture of `height` x `width` pixels, or as the longest name."""
    return _legend(list(zip(classes, palette, strict=True)), width, _font_size(height, width))


def overlay(
    fused: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    palette: Sequence[Color],
    alpha: float = 0.5,
    legend: bool = True,
    prompts: Prompts | None = None,
) -> Image.Image:
    """The classes drawn onto a picture, with a thin bright contour and a legend below.

    Args:
        fused: uint8 (H,W,3) or grey (H,W).
        labels: integer ids (H,W); id 0 (unlabeled, background) and 255 (ignored) stay transparent.
        classes: names, the position is the id.
        palette: RGB of each class.
        alpha: weight of the colour in an area, 0 to 1; the contour is always opaque.
        legend: add the strip that names the classes present and their share of the pixels. Pictures narrower than the
            longest entry get a margin, so that no text is cut.
        prompts: points and boxes of the first item, in pixels of `fused`.

    Returns:
        RGB picture; its upper left H x W is the picture itself.

    Raises:
        InputError: the sizes differ, or an id has no colour.
    """
    picture, ids = _picture(fused, "fused"), np.asarray(labels)
    colors = colorize(ids, palette)
    if ids.shape != picture.shape[:2]:
        raise InputError(
            f"labels: size {ids.shape} differs from the picture's {picture.shape[:2]}; predict at full size"
        )
    height, width = ids.shape
    shown = (ids != 0) & (ids != IGNORED)
    # Pillow blends bytes: a float copy of a 4096 x 4096 picture would take most of a gigabyte.
    blended = np.asarray(Image.blend(Image.fromarray(picture), Image.fromarray(colors), alpha))
    result = np.where(shown[..., None], blended, picture)
    edge = shown & _contour(ids, max(1, round(min(height, width) / 480)))
    bright = np.zeros((256, 3), np.uint8)
    bright[: len(palette)] = [brighten(color) for color in palette]
    result[edge] = bright[ids[edge]]
    image = Image.fromarray(result)
    if prompts is not None:
        _draw_prompts(image, prompts)
    if not legend:
        return image
    counts = Image.fromarray(ids.astype(np.uint8)).histogram()
    present = [index for index in range(1, len(palette)) if counts[index] and index != IGNORED]
    entries = [(f"{classes[i]}  {_share(counts[i], ids.size)}", palette[i]) for i in present]
    strip = _legend(entries or [("no class found", PAPER)], width, _font_size(height, width))
    canvas = Image.new("RGB", (strip.width, height + strip.height), PAPER)
    canvas.paste(image, (0, 0))
    canvas.paste(strip, (0, height))
    return canvas


def confidence_map(probability: ArrayLike) -> NDArray[np.uint8]:
    """Probabilities (H,W) in [0, 1] as grey levels 0-255, uint8 (H,W); InputError outside of that range."""
    values = np.asarray(probability, np.float64)
    if values.ndim != 2 or not ((values >= 0) & (values <= 1 + 1e-6)).all():
        raise InputError(f"confidence: found shape {values.shape}, expected (H, W) within [0, 1]; take the softmax")
    return np.rint(np.minimum(values, 1) * 255).astype(np.uint8)


def codes_picture(codes: ArrayLike) -> Rgb:
    """Code indices (h,w) as colours, uint8 (h,w,3): each index has its own fixed colour, neighbours far apart.

    Hue, saturation and value follow the additive recurrence with the powers of the plastic-like constant for three
    dimensions (1.2207), whose points spread evenly for any count (Roberts 2018, R_d sequence).
    """
    index = np.asarray(codes)
    if index.ndim != 2 or index.dtype.kind not in "iu" or (index.size and index.min() < 0):
        raise InputError(f"codes: found {index.dtype} of shape {index.shape}, expected indices (h, w) of 0 or more")
    unique, where = np.unique(index, return_inverse=True)
    spread = ((unique[:, None].astype(np.float64) + 1) * 1.2207440846057596 ** -np.arange(1, 4)) % 1
    hsv = np.stack([spread[:, 0] * 255, 110 + spread[:, 1] * 145, 120 + spread[:, 2] * 135], axis=1)
    table = np.asarray(Image.fromarray(np.rint(hsv).astype(np.uint8)[None], mode="HSV").convert("RGB"))[0]
    return table[where.reshape(index.shape)]


def _wrap(title: str, width: int, font: Font) -> list[str]:
    """The title in lines that fit `width` where its words allow."""
    lines: list[str] = []
    for word in title.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def side_by_side(images: Sequence[tuple[str, ArrayLike | Image.Image]], columns: int | None = None) -> Image.Image:
    """Pictures in rows of `columns` (default: one row), each under its title; titles wrap and are never cut.

    Each array is uint8 (H,W,3) or (H,W), or a PIL image; sizes may differ.
    """
    if not images:
        raise InputError("side_by_side: found no picture, expected at least one (title, array); give one")
    pictures = [_picture(array, title) for title, array in images]
    size = _font_size(*pictures[0].shape[:2])
    font: Font = ImageFont.load_default(size=size)
    gap, line = max(4, size // 2), round(size * 1.3)
    words = [word for title, _ in images for word in title.split()]
    cell_width = max([p.shape[1] for p in pictures] + [int(font.getlength(word)) + 1 for word in words])
    titles = [_wrap(title, cell_width, font) for title, _ in images]
    columns = min(columns or len(images), len(images))
    rows = [slice(start, start + columns) for start in range(0, len(images), columns)]
    heads = [max(len(lines) for lines in titles[row]) * line + gap // 2 for row in rows]
    heights = [head + max(p.shape[0] for p in pictures[row]) for row, head in zip(rows, heads, strict=True)]
    sheet = Image.new("RGB", (gap + columns * (cell_width + gap), gap + sum(heights) + gap * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, head, height in zip(rows, heads, heights, strict=True):
        for column, (picture, lines) in enumerate(zip(pictures[row], titles[row], strict=True)):
            x = gap + column * (cell_width + gap)
            for number, text in enumerate(lines):
                y = top + head - gap // 2 - (len(lines) - number - 0.5) * line
                draw.text((x + cell_width / 2, y), text, fill=INK, font=font, anchor="mm")
            sheet.paste(Image.fromarray(picture), (x + (cell_width - picture.shape[1]) // 2, top + head))
        top += height + gap
    return sheet
