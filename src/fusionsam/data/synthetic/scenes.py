"""Procedural street scenes, visible and infrared with labels, in MFNet's ids and layout: for tests, documentation and a
first run. Warm people stand out in infrared; headlights, signs and cones in visible: neither modality suffices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from fusionsam.data.images import write_png
from fusionsam.data.synthetic import objects
from fusionsam.data.synthetic.objects import Canvas, Rng
from fusionsam.io import progress_bar, write_json, write_text
from fusionsam.types import LARGEST, InputError, Sample

_CARD = "synthetic.json"
_ROAD = 3.7  # metres from the middle to the kerb
_WALK = 6.6  # metres from the middle to the houses
_FAR = 75.0
_SMALLEST = 32  # pixels a side; the largest is what predict takes

Floats = NDArray[np.float32]


def scene_id(index: int) -> str:
    """Id of scene `index`: even ones by day (00001D), odd ones at night (00002N)."""
    return f"{index + 1:05d}{'N' if index % 2 else 'D'}"


def draw_scene(seed: int, index: int, size: tuple[int, int] = (480, 640)) -> Sample:
    """Scene `index` of `seed`: uint8 visible (3,H,W), infrared (1,H,W), label int64 (H,W) with MFNet's ids 0-8.

    A pure function of its arguments. InputError for a size outside of 32x32 to 4096x4096. The id ends in D or N."""
    height, width = size
    if min(size) < _SMALLEST or max(size) > LARGEST:
        raise InputError(f"size {height}x{width}: expected {_SMALLEST} to {LARGEST} pixels a side; give such a size")
    rng, night = np.random.default_rng([seed, index]), bool(index % 2)
    canvas = Canvas(height, width, rng.uniform(0.36, 0.47) * height, rng.uniform(0.4, 0.6) * width)
    _ground(canvas, rng, night)
    _furnish(canvas, rng, night)
    albedo, light, heat = (_reduced(layer) for layer in canvas.layers[:3])
    half = objects.SUPERSAMPLING
    label = np.array(canvas.layers[3])[half // 2 :: half, half // 2 :: half]
    visible = _camera(canvas, rng, albedo, light, night)
    infrared = _thermal_camera(rng, heat, night)
    return Sample(
        scene_id(index),
        torch.from_numpy(visible.transpose(2, 0, 1).copy()),
        torch.from_numpy(infrared[None].copy()),
        torch.from_numpy(label.astype(np.int64)),
    )


def _reduced(layer: Image.Image) -> Floats:
    return np.asarray(layer.reduce(objects.SUPERSAMPLING), dtype=np.float32)


def _ground(canvas: Canvas, rng: Rng, night: bool) -> None:
    """Sky, the far end of the street, walks, road with kerb and paint."""
    height, width, horizon = canvas.height, canvas.width, canvas.horizon
    haze = rng.uniform(0, 1)
    for y in range(int(horizon) + 2):
        t = y / horizon
        color = (int(96 + 110 * t + 20 * haze), int(140 + 76 * t), int(196 + 30 * t))
        color = (40, 44, 60) if night else color
        canvas.shape("polygon", [(0, y), (width, y), (width, y + 1), (0, y + 1)], color, 14 + 24 * t)
    for _ in range(14):
        x, w, h = rng.uniform(-40, 40), rng.uniform(5, 14), rng.uniform(4, 12)
        color = objects.tint(rng, (128, 132, 138) if rng.uniform() < 0.5 else (74, 96, 70))
        canvas.box(x, 0, w, h, _FAR, color=color, heat=72 + rng.uniform(-8, 12))
    earth = objects.tint(rng, (118, 116, 110), 12)
    canvas.shape("polygon", [(0, horizon), (width, horizon), (width, height), (0, height)], earth, 92)
    grey = int(rng.integers(72, 100))
    road = objects.tint(rng, (grey, grey, grey + 4), 3)
    canvas.ground(-_ROAD, _ROAD, 1.0, _FAR, color=road, heat=100 if night else 112)
    for _ in range(26):  # patches and stains
        x, z = rng.uniform(-_ROAD, _ROAD - 1), rng.uniform(3, 30)
        shade = objects.tint(rng, road, 7)
        canvas.ground(
            x, x + rng.uniform(0.3, 1.2), z, z + rng.uniform(0.4, 3), color=shade, heat=108 + rng.uniform(-5, 5)
        )
    for z in np.arange(rng.uniform(2, 5), 60, 6.0):
        canvas.ground(-0.08, 0.08, float(z), float(z) + 3.0, color=(208, 208, 202), heat=104)
    for side in (-1, 1):
        inner, outer = side * _ROAD, side * (_ROAD + 0.22)
        canvas.ground(outer, side * 30, 1.0, _FAR, 0.14, color=objects.tint(rng, (146, 140, 132), 10), heat=96)
        for z in np.arange(2.0, 40.0, 1.6):
            canvas.ground(outer, side * _WALK, float(z), float(z) + 0.05, 0.14, color=(118, 114, 108), heat=93)
        canvas.ground(inner, outer, 1.0, 45.0, 0.14, color=(182, 180, 174), heat=104, label=objects.CURVE)
        face = [canvas.at(inner, y, z) for y, z in ((0.0, 1.0), (0.0, 45.0), (0.14, 45.0), (0.14, 1.0))]
        canvas.shape("polygon", face, (132, 130, 126), 110, objects.CURVE)


def _furnish(canvas: Canvas, rng: Rng, night: bool) -> None:
    """Everything that stands, painted from far to near."""
    things: list[tuple[float, Callable[[], None]]] = []

    def add(z: float, draw: Callable[..., None], *arguments: object) -> None:
        things.append((z, lambda: draw(canvas, rng, *arguments)))

    for side in (-1, 1):
        z = rng.uniform(5, 16)
        while z < 60:
            length = rng.uniform(8, 16)
            if rng.uniform() < 0.75:
                add(z + length, objects.building, side * _WALK * rng.uniform(1.0, 1.25), z, z + length, night)
            z += length + rng.uniform(1, 6)
        for _ in range(int(rng.integers(1, 4))):
            z = rng.uniform(8, 40)
            add(z, objects.tree, side * rng.uniform(5.4, 6.4), z)
        for z in np.arange(rng.uniform(9, 16), 50, 17.0):
            add(float(z), objects.lamp_post, side * 4.5, float(z), night)
    if rng.uniform() < 0.8:
        z = rng.uniform(8, 22)
        add(z, objects.sign, rng.choice([-1, 1]) * rng.uniform(4.1, 4.8), z, night)
    for _ in range(int(rng.integers(0, 3))):  # traffic: one lane each way
        z, lane = rng.uniform(9, 40), int(rng.choice([-1, 1]))
        add(z, objects.car, lane * rng.uniform(1.6, 2.0), z, night, -lane, True)
    z = rng.uniform(6, 14)
    for _ in range(int(rng.integers(0, 4))):  # parked along one side
        add(z, objects.car, 2.75, z, night, -1, bool(rng.uniform() < 0.15))
        z += rng.uniform(6, 11)
    for _ in range(int(rng.integers(1, 5))):
        z = rng.uniform(6.5, 26)
        crossing = rng.uniform() < 0.3
        x = rng.uniform(-3, 2) if crossing else rng.choice([-1, 1]) * rng.uniform(4.2, 5.6)
        add(z, objects.person, x, z, night)
    for _ in range(int(rng.integers(0, 3))):
        z, rider = rng.uniform(6, 18), bool(rng.uniform() < 0.5)
        x = rng.uniform(-3, 1.5) if rider else rng.choice([-1, 1]) * rng.uniform(4.2, 5.4)
        add(z, objects.bike, x, z, night, rider)
    if rng.uniform() < 0.45:
        x, z = rng.uniform(-2.8, 0.6), rng.uniform(5, 9)
        for step in range(int(rng.integers(2, 5))):
            add(z + 2.2 * step, objects.cone, x + 0.3 * step, z + 2.2 * step)
    if rng.uniform() < 0.45:
        z = rng.uniform(6, 13)
        for step in range(int(rng.integers(1, 3))):
            add(z + 3.0 * step, objects.car_stop, -3.6, z + 3.0 * step)
    if rng.uniform() < 0.35:
        z = rng.uniform(4.5, 8)
        add(z + 6, objects.guardrail, -_ROAD - 0.35, z, z + rng.uniform(12, 26))
    if rng.uniform() < 0.4:
        z = rng.uniform(7, 16)
        add(z, objects.bump, -_ROAD, _ROAD, z)
    for _, draw in sorted(things, key=lambda thing: -thing[0]):
        draw()


def _camera(canvas: Canvas, rng: Rng, albedo: Floats, light: Floats, night: bool) -> NDArray[np.uint8]:
    """The visible sensor: daylight or darkness with lamps' pools, glow of what shines, blur, noise."""
    height, width = albedo.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    scale = width / 640
    if night:
        depth = np.maximum(y - canvas.horizon, 0) / height
        beam = np.exp(-(((x - canvas.vanishing) / (0.30 * width)) ** 2)) * np.clip(depth / 0.25, 0, 1) ** 2
        pools = gaussian_filter(light.max(axis=2), 46 * scale) / 255
        brightness = rng.uniform(0.055, 0.11) + rng.uniform(0.14, 0.28) * beam + 2.2 * pools
        warm = np.array([1.06, 0.98, 0.86], dtype=np.float32)
        image = albedo * brightness[..., None] * warm
        glow = sum(
            gaussian_filter(light, (s * scale, s * scale, 0)) * g for s, g in ((2.5, 0.7), (9.0, 0.8), (28.0, 0.7))
        )
        image = image + 0.9 * light + glow
        noise = rng.uniform(2.5, 5.0)
    else:
        exposure, contrast = rng.uniform(0.8, 1.12), rng.uniform(0.85, 1.1)
        fall = 1 + rng.uniform(-0.15, 0.15) * (x / width - 0.5)
        texture = gaussian_filter(rng.standard_normal((height, width)).astype(np.float32), 1.2) * 7
        image = ((albedo + texture[..., None]) * exposure * fall[..., None] - 118) * contrast + 118
        noise = rng.uniform(1.5, 3.0)
    sigma = rng.uniform(0.35, 0.8) * scale
    image = gaussian_filter(image, (sigma, sigma, 0)) + noise * rng.standard_normal(image.shape)
    return np.clip(image, 0, 255).round().astype(np.uint8)


def _thermal_camera(rng: Rng, heat: Floats, night: bool) -> NDArray[np.uint8]:
    """The infrared sensor: softer optics, uneven surfaces, column noise, gain."""
    width = heat.shape[1]
    scale = width / 640
    texture = gaussian_filter(rng.standard_normal(heat.shape).astype(np.float32), 5 * scale) * 22 * scale
    image = gaussian_filter(heat, rng.uniform(0.9, 1.5) * scale) + texture
    image += 1.2 * rng.standard_normal((1, width)) + rng.uniform(1.5, 3.0) * rng.standard_normal(heat.shape)
    ambient = rng.uniform(-22, -6) if night else rng.uniform(-8, 12)
    gain = rng.uniform(0.9, 1.06)
    return np.clip(image * gain + ambient, 0, 255).round().astype(np.uint8)


def synthesize(
    out: Path, pairs: int, seed: int, size: tuple[int, int] = (480, 640), progress: bool = True
) -> dict[str, list[str]]:
    """Write `pairs` scenes to `out` in MFNet's layout: images/ID.png (RGB + thermal), labels/ID.png, lists train, val
    and test (60/20/20) and each by day and night. Returns the lists.

    A folder that holds scenes of the same seed and size, at most `pairs`, is completed. Raises InputError for one that
    holds anything else or cannot be used, an unusable size or fewer than one pair."""
    out = Path(out)
    if pairs < 1:
        raise InputError(f"pairs: {pairs}; expected at least 1")
    _require_same(out, pairs, seed, size)
    ids = []
    for index in progress_bar(range(pairs), desc="drawing scenes", disable=not progress):
        sample = draw_scene(seed, index, size)
        assert sample.visible is not None
        assert sample.infrared is not None
        assert sample.label is not None
        if index == 0:
            write_json(out / _CARD, {"pairs": pairs, "seed": seed, "size": list(size)})
        write_png(out / "images" / f"{sample.id}.png", torch.cat([sample.visible, sample.infrared]))
        write_png(out / "labels" / f"{sample.id}.png", sample.label.to(torch.uint8))
        ids.append(sample.id)
    held = 0 if pairs < 3 else max(1, round(0.2 * pairs))
    cut = pairs - 2 * held
    lists = {"train": ids[:cut], "val": ids[cut : pairs - held], "test": ids[pairs - held :]}
    for name in ("train", "val", "test"):
        lists[f"{name}_day"] = [id for id in lists[name] if id.endswith("D")]
        lists[f"{name}_night"] = [id for id in lists[name] if id.endswith("N")]
    for name, members in lists.items():
        write_text(out / f"{name}.txt", "".join(f"{id}\n" for id in members))
    return lists


def _require_same(out: Path, pairs: int, seed: int, size: tuple[int, int]) -> None:
    """InputError unless `out` is new or empty, or its card tells of this seed and size and of no more pairs: images of
    one seed beside labels of another, or scenes that no list names, are found by nobody."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        card = json.loads((out / _CARD).read_text(encoding="utf-8")) if (out / _CARD).is_file() else None
    except OSError as error:
        raise InputError(f"{out}: cannot be used ({error.strerror or error}); choose a new folder") from error
    except (ValueError, RecursionError):  # no JSON
        card = None
    if not isinstance(card, dict):
        raise InputError(f"{out}: exists and holds other data; choose a new folder, so that nothing is overwritten")
    held = card.get("pairs")
    if card.get("seed") != seed or card.get("size") != list(size) or not isinstance(held, int) or held > pairs:
        raise InputError(
            f"{out}: holds {held!r} pairs of seed {card.get('seed')!r} and size {card.get('size')!r}, asked for "
            f"{pairs} of seed {seed} and size {list(size)}; choose a new folder, so that no scenes are mixed"
        )
