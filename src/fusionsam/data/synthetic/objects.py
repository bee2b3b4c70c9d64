"""The things that stand in a synthetic street, drawn in a pinhole camera on four layers at once.

A Canvas holds colour (albedo), emitted light, heat and label; every shape is drawn on all of them, so that the
modalities and the label cannot come apart. World coordinates are metres: x right, y up from the road, z away from the
camera."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Rng = np.random.Generator
Color = tuple[int, int, int]
Point = tuple[float, float]

CAR, PERSON, BIKE, CURVE, CAR_STOP, GUARDRAIL, CONE, BUMP = range(1, 9)
SUPERSAMPLING = 2
CAMERA_HEIGHT = 1.45  # metres


class Canvas:
    """Four layers of one picture, supersampled; points are (x, y) in output pixels."""

    def __init__(self, height: int, width: int, horizon: float, vanishing: float) -> None:
        self.height, self.width, self.horizon, self.vanishing = height, width, horizon, vanishing
        self.focal = 0.86 * width
        size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
        self.layers = [Image.new("RGB", size), Image.new("RGB", size), Image.new("L", size), Image.new("L", size)]
        self._draws = [ImageDraw.Draw(layer) for layer in self.layers]

    def at(self, x: float, y: float, z: float) -> Point:
        """Picture position of a world point."""
        scale = self.focal / max(z, 0.3)
        return self.vanishing + scale * x, self.horizon + scale * (CAMERA_HEIGHT - y)

    def shape(
        self,
        kind: str,
        points: Sequence[Point],
        color: Color,
        heat: float,
        label: int | None = None,
        light: Color = (0, 0, 0),
        **options: float,
    ) -> None:
        """One PIL shape (polygon, ellipse, line) on all layers; label None leaves what is labelled behind it."""
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        if kind == "ellipse":
            (x0, y0), (x1, y1) = scaled
            scaled = [(min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))]
        if "width" in options:
            options["width"] = max(1, round(options["width"] * SUPERSAMPLING))
        inks: list[Color | int | None] = [color, light, int(np.clip(heat, 0, 255)), label]
        for draw, ink in zip(self._draws, inks, strict=True):
            if ink is not None:
                getattr(draw, kind)(scaled, fill=ink, **options)

    def box(self, x: float, y: float, w: float, h: float, z: float, **ink: object) -> None:
        """An upright rectangle facing the camera, its lower left corner at (x, y) at depth z."""
        corners = [self.at(x, y, z), self.at(x + w, y, z), self.at(x + w, y + h, z), self.at(x, y + h, z)]
        self.shape("polygon", corners, **ink)  # type: ignore[arg-type]

    def disc(self, x: float, y: float, rx: float, ry: float, z: float, **ink: object) -> None:
        """An upright ellipse round (x, y) at depth z."""
        self.shape("ellipse", [self.at(x - rx, y + ry, z), self.at(x + rx, y - ry, z)], **ink)  # type: ignore[arg-type]

    def ground(self, x0: float, x1: float, z0: float, z1: float, y: float = 0.0, **ink: object) -> None:
        """A rectangle lying on the ground (or at height y)."""
        corners = [self.at(x0, y, z0), self.at(x1, y, z0), self.at(x1, y, z1), self.at(x0, y, z1)]
        self.shape("polygon", corners, **ink)  # type: ignore[arg-type]


def tint(rng: Rng, color: Color, spread: int = 18) -> Color:
    """A colour near the given one."""
    red, green, blue = (int(np.clip(c + rng.integers(-spread, spread + 1), 0, 255)) for c in color)
    return red, green, blue


def _shade(color: Color, factor: float) -> Color:
    red, green, blue = (int(np.clip(c * factor, 0, 255)) for c in color)
    return red, green, blue


def car(canvas: Canvas, rng: Rng, x: float, z: float, night: bool, facing: int, running: bool) -> None:
    """A car seen from front (facing 1) or rear (-1) with the side that perspective shows; warm only if it runs."""
    paint = tint(rng, [(150, 30, 32), (190, 192, 195), (46, 52, 66), (228, 228, 224), (32, 70, 120)][rng.integers(5)])
    body = 92 + rng.uniform(-18, 22) + (14 if running else -12)
    w, h, length = rng.uniform(1.7, 1.95), rng.uniform(1.4, 1.75), rng.uniform(3.8, 4.6)
    left, ink = x - w / 2, {"label": CAR}
    canvas.ground(left - 0.1, left + w + 0.1, z - 0.1, z + length, color=(26, 26, 28), heat=84)
    near = left if x > 0 else left + w  # the flank that can be seen
    flank = [(0.25, 0.0), (0.25, length), (0.85, length), (h, length * 0.72), (h, length * 0.22), (0.85, 0.0)]
    side = [canvas.at(near, y, z + d) for y, d in flank]
    canvas.shape("polygon", side, _shade(paint, 0.72), body - 6, CAR)
    glass = [(0.9, length * 0.14), (0.9, length * 0.85), (h - 0.12, length * 0.7), (h - 0.12, length * 0.25)]
    canvas.shape("polygon", [canvas.at(near, y, z + d) for y, d in glass], (38, 46, 56), 52, CAR)
    for d in (0.17, 0.8):
        wheel = [canvas.at(near, 0.64, z + length * d - 0.3), canvas.at(near, 0.0, z + length * d + 0.3)]
        canvas.shape("ellipse", wheel, (22, 22, 24), 172 if running else 84, CAR)
    canvas.box(left, 0.28, w, 0.62, z, color=paint, heat=body, **ink)
    cabin = [(left + 0.06, 0.88), (left + w - 0.06, 0.88), (left + w - 0.26, h), (left + 0.26, h)]
    canvas.shape("polygon", [canvas.at(px, py, z + 0.35) for px, py in cabin], _shade(paint, 0.92), body, CAR)
    screen = [(left + 0.2, 0.93), (left + w - 0.2, 0.93), (left + w - 0.34, h - 0.1), (left + 0.34, h - 0.1)]
    canvas.shape("polygon", [canvas.at(px, py, z + 0.3) for px, py in screen], (44, 54, 66), 46, CAR)
    for px in (left + 0.06, left + w - 0.3):
        canvas.box(px, 0.0, 0.24, 0.34, z, color=(20, 20, 22), heat=165 if running else 80, **ink)
    if running:  # radiator or exhaust: the warmest part
        canvas.box(
            left + 0.35, 0.3, w - 0.7, 0.3 if facing > 0 else 0.14, z, color=_shade(paint, 0.55), heat=205, **ink
        )
    else:
        canvas.box(left + 0.35, 0.36, w - 0.7, 0.16, z, color=_shade(paint, 0.6), heat=body - 4, **ink)
    lit = night and running
    lamp: Color = (246, 240, 216) if facing > 0 else (150, 20, 18)
    glow: Color = ((255, 246, 214) if facing > 0 else (190, 14, 10)) if lit else (0, 0, 0)
    for px in (left + 0.24, left + w - 0.24):
        canvas.disc(px, 0.72, 0.17, 0.1, z, color=lamp, heat=body + (35 if lit else 0), light=glow, **ink)
    canvas.box(x - 0.26, 0.42, 0.52, 0.12, z, color=(226, 226, 220), heat=body - 4, **ink)


def person(canvas: Canvas, rng: Rng, x: float, z: float, night: bool, ride: float = 0.0) -> None:
    """Somebody walking, or sitting `ride` metres up on a bike. The warmest thing in the picture, by day and night."""
    h = rng.uniform(1.58, 1.88)
    cloth = [(40, 44, 60), (58, 40, 38), (86, 92, 98), (150, 48, 44), (196, 190, 176)]
    coat, trousers = tint(rng, cloth[rng.integers(2 if night else 5)]), tint(rng, (44, 46, 58))
    skin, heat, stride = tint(rng, (196, 150, 124), 26), rng.uniform(196, 224), rng.uniform(0.04, 0.2)
    if not ride:
        canvas.disc(x, 0.02, 0.32, 0.03, z, color=(30, 30, 32), heat=88)
    width = canvas.focal / z
    hip, neck = ride + 0.48 * h, ride + 0.83 * h
    if ride:
        hip, neck = ride + 0.1, ride + 0.66

    def limb(points: list[Point], thick: float, color: Color, warm: float) -> None:
        line = [canvas.at(px, py, z) for px, py in points]
        canvas.shape("line", line, color, warm, PERSON, width=thick * width, joint="curve")  # type: ignore[arg-type]

    for sign in (-1, 1):
        foot = (x + sign * stride, 0.06 if not ride else ride - 0.5)
        limb(
            [(x + sign * 0.08, hip), (x + sign * (0.1 + stride / 3), (hip + foot[1]) / 2), foot],
            0.17,
            trousers,
            heat - 34,
        )
    torso = [(x - 0.16, hip - 0.04), (x + 0.16, hip - 0.04), (x + 0.23, neck - 0.06), (x - 0.23, neck - 0.06)]
    canvas.shape("polygon", [canvas.at(px, py, z) for px, py in torso], coat, heat - 12, PERSON)
    for sign in (-1, 1):
        hand = (x + sign * (0.26 + stride / 4), hip - 0.02)
        limb([(x + sign * 0.2, neck - 0.09), (x + sign * 0.3, (neck + hip) / 2), hand], 0.1, coat, heat - 18)
        canvas.disc(hand[0], hand[1], 0.055, 0.055, z, color=skin, heat=heat + 12, label=PERSON)
    canvas.disc(x, neck + 0.13, 0.1, 0.14, z, color=skin, heat=min(heat + 30, 252), label=PERSON)
    hair = [canvas.at(x - 0.105, neck + 0.29, z), canvas.at(x + 0.105, neck + 0.13, z)]
    canvas.shape("ellipse", hair, tint(rng, (42, 32, 26)), heat - 4, PERSON)


def bike(canvas: Canvas, rng: Rng, x: float, z: float, night: bool, rider: bool) -> None:
    """A bicycle from the side, perhaps ridden. Cold metal: clearer in the visible image."""
    if rider:
        person(canvas, rng, x - 0.1, z + 0.05, night, ride=0.85)
    paint, heat, width = (
        tint(rng, [(168, 40, 40), (36, 74, 140), (60, 62, 66)][rng.integers(3)]),
        70.0,
        canvas.focal / z,
    )
    for wheel in (-0.52, 0.52):
        # Spokes let the background through, but labels are drawn as whole discs, as annotators do.
        ring = [canvas.at(x + wheel - 0.33, 0.66, z), canvas.at(x + wheel + 0.33, 0.0, z)]
        canvas.shape("ellipse", ring, (58, 58, 58), heat + 12, BIKE)
        canvas.disc(x + wheel, 0.33, 0.27, 0.27, z, color=(104, 104, 104), heat=heat + 20, label=BIKE)
        canvas.disc(x + wheel, 0.33, 0.05, 0.05, z, color=(40, 40, 40), heat=heat, label=BIKE)
    a, b, c, d, e = (-0.52, 0.33), (-0.02, 0.3), (0.4, 0.82), (-0.18, 0.8), (0.52, 0.33)
    bars = [(a, b), (b, c), (c, d), (d, b), (d, a), (c, e), (c, (0.36, 0.98)), (d, (-0.2, 0.92))]
    for (px, py), (qx, qy) in bars:
        line = [canvas.at(x + px, py, z), canvas.at(x + qx, qy, z)]
        canvas.shape("line", line, paint, heat, BIKE, width=0.07 * width)
    canvas.box(x - 0.32, 0.9, 0.26, 0.07, z, color=(24, 24, 24), heat=heat + 10, label=BIKE)


def cone(canvas: Canvas, rng: Rng, x: float, z: float) -> None:
    """An orange cone with a reflecting band, as cold as the road: seen in the visible image alone."""
    h, heat = rng.uniform(0.6, 0.85), 93
    canvas.box(x - 0.24, 0.0, 0.48, 0.06, z, color=(214, 84, 26), heat=heat, label=CONE)
    for low, high, color in ((0.06, 0.35, (226, 86, 24)), (0.35, 0.6, (236, 236, 228)), (0.6, 1.0, (226, 86, 24))):
        corners = [
            (-0.2 + 0.16 * low, low),
            (0.2 - 0.16 * low, low),
            (0.2 - 0.16 * high, high),
            (-0.2 + 0.16 * high, high),
        ]
        canvas.shape("polygon", [canvas.at(x + px, py * h, z) for px, py in corners], color, heat, CONE)  # type: ignore[arg-type]


def car_stop(canvas: Canvas, rng: Rng, x: float, z: float) -> None:
    """A low block that keeps wheels off the walk, striped yellow and black."""
    for part in range(5):
        color: Color = (206, 172, 44) if part % 2 else (44, 42, 40)
        canvas.ground(
            x + part * 0.32,
            x + part * 0.32 + 0.32,
            z,
            z + 0.24,
            0.2,
            color=_shade(color, 1.1),
            heat=104,
            label=CAR_STOP,
        )
        canvas.box(x + part * 0.32, 0.0, 0.32, 0.2, z, color=color, heat=99, label=CAR_STOP)


def guardrail(canvas: Canvas, rng: Rng, x: float, z0: float, z1: float) -> None:
    """A steel rail on posts along the road; it reflects the cold sky."""
    for z in np.arange(z0, z1, 2.0)[::-1]:
        canvas.box(x - 0.06, 0.0, 0.12, 0.75, float(z), color=(120, 122, 124), heat=72, label=GUARDRAIL)
    for low, high, color, heat in (
        (0.4, 0.56, (150, 153, 156), 60),
        (0.56, 0.62, (98, 100, 104), 74),
        (0.62, 0.78, (176, 179, 182), 58),
    ):
        corners = [canvas.at(x, low, z0), canvas.at(x, low, z1), canvas.at(x, high, z1), canvas.at(x, high, z0)]
        canvas.shape("polygon", corners, color, heat, GUARDRAIL)


def bump(canvas: Canvas, rng: Rng, x0: float, x1: float, z: float) -> None:
    """A speed bump across the road in painted stripes."""
    stripes = 12
    for part in range(stripes):
        a, b = (x0 + (x1 - x0) * (part + k) / stripes for k in (0, 1))
        color: Color = (212, 178, 52) if part % 2 else (52, 50, 48)
        canvas.ground(a, b, z + 0.2, z + 0.5, 0.09, color=color, heat=103, label=BUMP)
        corners = [
            canvas.at(a, 0.0, z),
            canvas.at(b, 0.0, z),
            canvas.at(b, 0.09, z + 0.22),
            canvas.at(a, 0.09, z + 0.22),
        ]
        canvas.shape("polygon", corners, _shade(color, 0.8), 100, BUMP)


def tree(canvas: Canvas, rng: Rng, x: float, z: float) -> None:
    """Trunk and crown of many leaves' clusters."""
    h, r = rng.uniform(4.0, 7.5), rng.uniform(1.2, 2.1)
    canvas.box(x - 0.16, 0.0, 0.32, h * 0.6, z, color=tint(rng, (78, 60, 44)), heat=84, label=0)
    green = tint(rng, (58, 92, 44), 22)
    for step in range(46):
        angle, radius = rng.uniform(0, 2 * np.pi), r * np.sqrt(rng.uniform(0, 1))
        px, py = x + radius * np.cos(angle), h * 0.72 + 0.85 * radius * np.sin(angle)
        size = rng.uniform(0.18, 0.5) * r
        color = _shade(tint(rng, green, 12), 0.6 + 0.5 * step / 46 + 0.12 * np.sin(angle))
        canvas.disc(px, py, size, size * 0.85, z, color=color, heat=68 + rng.uniform(-6, 10), label=0)


def lamp_post(canvas: Canvas, rng: Rng, x: float, z: float, night: bool) -> None:
    """A street lamp, lit at night."""
    arm = -1.2 if x > 0 else 1.2
    canvas.box(x - 0.07, 0.0, 0.14, 5.6, z, color=(92, 94, 96), heat=76, label=0)
    canvas.box(min(x, x + arm), 5.5, abs(arm), 0.09, z, color=(92, 94, 96), heat=76, label=0)
    glow: Color = (255, 216, 150) if night else (0, 0, 0)
    canvas.disc(x + arm, 5.42, 0.28, 0.1, z, color=(226, 226, 214), heat=130 if night else 80, light=glow, label=0)


def sign(canvas: Canvas, rng: Rng, x: float, z: float, night: bool) -> None:
    """A traffic sign: bright in the visible image (at night it throws light back), nothing in infrared."""
    canvas.box(x - 0.04, 0.0, 0.08, 2.2, z, color=(124, 126, 128), heat=84, label=0)
    rim, face = [((190, 28, 30), (236, 236, 232)), ((24, 76, 168), (32, 92, 190))][rng.integers(2)]
    back = 0.75 if night else 0.0
    canvas.disc(x, 2.4, 0.36, 0.36, z, color=rim, heat=82, light=_shade(rim, back), label=0)
    canvas.disc(x, 2.4, 0.27, 0.27, z, color=face, heat=82, light=_shade(face, back * 0.8), label=0)
    canvas.box(x - 0.17, 2.35, 0.34, 0.1, z, color=(28, 28, 30), heat=82, label=0)


def building(canvas: Canvas, rng: Rng, x: float, z0: float, z1: float, night: bool) -> None:
    """A house front along the street (the plane x) with its wall facing us, windows in rows, some of them lit."""
    floors = int(rng.integers(2, 6))
    h, wall = 3.0 * floors + 0.8, tint(rng, [(146, 112, 92), (164, 156, 144), (126, 128, 134)][rng.integers(3)], 20)
    warm = 88 + rng.uniform(-6, 16)
    away = x + (14 if x > 0 else -14)
    facing = [canvas.at(x, 0, z0), canvas.at(away, 0, z0), canvas.at(away, h, z0), canvas.at(x, h, z0)]
    canvas.shape("polygon", facing, _shade(wall, 0.84), warm - 8, 0)
    front = [canvas.at(x, 0, z0), canvas.at(x, 0, z1), canvas.at(x, h, z1), canvas.at(x, h, z0)]
    canvas.shape("polygon", front, wall, warm, 0)

    def window(place: Callable[[float, float], Point], u: float, v: float, du: float) -> None:
        lit = night and rng.uniform() < 0.3
        glow: Color = tint(rng, (150, 112, 56), 24) if lit else (0, 0, 0)
        color: Color = (62, 74, 88) if not lit else (150, 124, 84)
        corners = [place(u, v), place(u + du, v), place(u + du, v + 1.5), place(u, v + 1.5)]
        canvas.shape("polygon", corners, color, warm + (24 if lit else 10) + rng.uniform(-4, 8), 0, glow)

    for floor in range(floors):
        for u in np.arange(z0 + 0.8, z1 - 1.4, 2.4):
            window(lambda d, y: canvas.at(x, y, d), float(u), 1.0 + 3.0 * floor, 1.3)
        for u in np.arange(1.0, 12.0, 2.6):
            window(lambda d, y: canvas.at(x + (d if x > 0 else -d), y, z0), float(u), 1.0 + 3.0 * floor, 1.3)
