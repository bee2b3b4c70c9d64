"""What an infrared picture holds, as heat: uint8, 0 cold, 255 hot. Files, films and arrays in memory all pass here.

Deep values are stretched over the range of the scene, colour maps turned back, black-hot pictures inverted. Every guess
stands in `facts`, which the JSON of a prediction repeats, and what a person should know in `notices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusionsam.data import palettes
from fusionsam.data.polarity import DOUBTFUL, Polarity, white_hot_score
from fusionsam.data.stretch import Range, find_range, given_range, stretch
from fusionsam.types import LUMA, Array, InputError, JsonObject, Notice

NARROW = 40
"""An 8-bit scene over fewer grey values than this gets a hint."""
PHOTOGRAPH = 150
"""More colours than this (`palettes.distinct_colors`) are those of a photograph."""


@dataclass(frozen=True)
class InfraredOptions:
    """How infrared pictures are read; the defaults leave 8-bit grey ones as they are."""

    limits: tuple[float, float] | Literal["auto"] | None = None
    """The values that become 0 and 255, in the picture's own unit; auto: by the scene, of 8-bit pictures too; None: by
    the scene, of deeper ones alone."""
    polarity: Polarity = "auto"
    """What hot is; auto: white unless the file, or the scene of a rainbow, says otherwise."""
    palette: str = "auto"
    """The colour map of RGB pictures: auto, none (their luma is heat) or one of `palettes.KNOWN`."""

    def __post_init__(self) -> None:
        if self.polarity not in ("white", "black", "auto"):
            raise InputError(f"polarity {self.polarity!r}: expected white, black or auto")
        if self.palette not in ("auto", "none", *palettes.KNOWN):
            raise InputError(f"palette {self.palette!r}: expected auto, none or one of {', '.join(palettes.KNOWN)}")
        if isinstance(self.limits, tuple) and not (np.isfinite(self.limits).all() and self.limits[0] < self.limits[1]):
            raise InputError(
                f"infrared range {self.limits[0]:g} {self.limits[1]:g}: expected two numbers, the lower first"
            )

    @classmethod
    def typed(cls, limits: Sequence[str], polarity: Polarity, palette: str) -> InfraredOptions:
        """Of the words of a command line: `limits` two numbers, or auto, or none. Raises InputError for others."""
        if not limits or list(limits) == ["auto"]:
            return cls("auto" if limits else None, polarity, palette)
        try:
            low, high = (float(word) for word in limits)
        except ValueError:
            raise InputError(
                f"--infrared-range {' '.join(limits)}: expected two numbers, the lower first, or auto"
            ) from None
        return cls((low, high), polarity, palette)

    def to_dict(self) -> JsonObject:
        """What differs from the defaults, as plain JSON types."""
        told: JsonObject = {}
        if self.limits is not None:
            told["infrared_range"] = list(self.limits) if isinstance(self.limits, tuple) else self.limits
        if self.polarity != "auto":
            told["polarity"] = self.polarity
        return told if self.palette == "auto" else {**told, "palette": self.palette}


DEFAULT = InfraredOptions()


@dataclass
class Heat:
    """An infrared picture as the network takes it, and how it came to be."""

    pixels: NDArray[np.uint8]
    """(H,W), 0 cold, 255 hot."""
    facts: JsonObject = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)


def to_heat(
    values: Array, options: InfraredOptions = DEFAULT, nodata: float | None = None, film: Range | None = None,
    hot_is_white: bool = False,
) -> Heat:  # fmt: skip
    """(H,W) or (H,W,3) of any number type as heat; of bool, true is hot.

    Args:
        values: counts, degrees Celsius, grey or RGB.
        options: what a person asked for.
        nodata: the value that the file declares for no temperature.
        film: the range of the film that a frame belongs to.
        hot_is_white: the file's own word: counts and temperatures of radiometric files need no guess.

    Raises:
        InputError: no finite value.
    """
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    facts: JsonObject = {"kind": _kind(values)}
    notices: list[Notice] = []
    if values.ndim == 3 and values.dtype == np.uint8:
        values = _without_colors(values, options, facts, notices)
    elif values.ndim == 3:
        values = luma(values[..., :3].astype(np.float32))
    deep = values.dtype != np.uint8
    used = film or _range(values, options, nodata, deep)
    if used is not None:
        facts["range"] = used.to_dict()
        notices += [] if film else used.notices()
    grey = values.astype(np.uint8) if used is None else stretch(values, used)
    if _hot_is_black(grey, options, facts, notices, hot_is_white):
        grey = 255 - grey if used is None else stretch(values, used, hot_is_black=True)
    if used is None:
        notices += _contrast(grey)
    return Heat(grey, facts, notices)


def luma(rgb: Array) -> Array:
    """(H,W,3) -> (H,W): one of three equal channels as it is, or else their luma as float32."""
    if (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return rgb[..., 0]
    return rgb[..., :3].astype(np.float32) @ np.array(LUMA, dtype=np.float32)


def _kind(values: Array) -> str:
    color = " colour" if values.ndim == 3 else ""
    return ("8-bit" if values.dtype == np.uint8 else str(values.dtype)) + color


def _range(values: Array, options: InfraredOptions, nodata: float | None, deep: bool) -> Range | None:
    if isinstance(options.limits, tuple):
        return given_range(values, *options.limits, nodata)
    return find_range(values, nodata) if deep or options.limits == "auto" else None


def _without_colors(
    rgb: NDArray[np.uint8], options: InfraredOptions, facts: JsonObject, notices: list[Notice]
) -> NDArray[np.uint8]:
    """uint8 (H,W,3) -> uint8 (H,W): the place on the palette, or the luma."""
    grey = luma(rgb)
    if options.palette == "none" or grey.dtype == np.uint8 or not palettes.is_colorful(rgb):
        facts["kind"] = "8-bit" if grey.dtype == np.uint8 else facts["kind"]
        return grey if grey.dtype == np.uint8 else grey.round().astype(np.uint8)
    asked = options.palette != "auto"
    found = palettes.match(rgb, options.palette) if asked else palettes.best_match(rgb)
    facts["palette"] = {**found.to_dict(), "how": "given" if asked else "found" if found.known else "unknown"}
    if found.known or asked:
        if not asked:
            notices.append(
                Notice(
                    "palette",
                    f"the infrared picture is coloured; it was turned back into heat by the palette {found.name} (mean "
                    f"colour error {found.error:.0f} of 255)",
                    "--palette NAME or none sets another",
                )
            )
        elif not found.known:
            notices.append(
                Notice(
                    "palette that does not fit",
                    f"the infrared picture's colours are not of the palette {found.name} that was given (mean colour "
                    f"error {found.error:.0f} of 255)",
                )
            )
        return palettes.heat(rgb, palettes.table(found.name))
    count = palettes.distinct_colors(rgb)
    facts["palette"]["colors"] = count
    looks = "it looks like a photograph: was the visible picture given?" if count > PHOTOGRAPH else (
        f"the nearest, {found.name}, has a mean colour error of {found.error:.0f} of 255"
    )  # fmt: skip
    notices.append(
        Notice(
            "coloured infrared",
            f"the infrared picture is coloured by no palette that is known, so its luma was taken for heat; {looks}; "
            "give the grey original, or the palette",
            "--palette NAME gives it",
        )
    )
    return grey.round().astype(np.uint8)


def _hot_is_black(
    grey: NDArray[np.uint8], options: InfraredOptions, facts: JsonObject, notices: list[Notice], sure: bool
) -> bool:
    """Whether the picture is to be inverted; `facts` and `notices` are told."""
    if sure:
        facts["polarity"] = {"hot": "white", "how": "file"}
        if options.polarity == "black":
            notices.append(
                Notice(
                    "polarity of the file",
                    "the file holds counts or temperatures, which rise with heat, so it was read as white-hot",
                    "--polarity black was not applied to it",
                )
            )
        return False
    if options.polarity != "auto":
        facts["polarity"] = {"hot": options.polarity, "how": "given"}
        return options.polarity == "black"
    score = white_hot_score(grey)
    palette = facts.get("palette", {})
    if palette.get("how") in ("found", "given") and palette["name"] in palettes.EITHER_WAY:
        black = score < 0
        facts["polarity"] = {
            "hot": "black" if black else "white",
            "how": "guessed by the scene",
            "score": round(score, 2),
        }
        hot = ("red", "blue or violet")[black]
        notices.append(
            Notice(
                "direction of a rainbow",
                f"rainbows are in use both ways; {hot} was taken for hot, by the look of the scene",
                "--polarity white says that red is hot, black that it is cold",
            )
        )
        return black
    facts["polarity"] = {"hot": "white", "how": "assumed", "score": round(score, 2)}
    if score < DOUBTFUL:
        notices.append(
            Notice(
                "polarity",
                "the infrared picture looks like black-hot (hot things dark) and was read as white-hot",
                "--polarity black where it is black-hot; where it is not, --polarity white ends this line",
            )
        )
    return False


def _contrast(grey: NDArray[np.uint8]) -> list[Notice]:
    low, high = (int(end) for end in np.percentile(grey, (0.5, 99.5)))
    if not 0 < high - low < NARROW:
        return []
    return [
        Notice(
            "low contrast",
            f"the infrared picture uses the grey values {low} to {high} of 0 to 255",
            "--infrared-range auto stretches it",
        )
    ]
