"""Every data set is a row of one table: its classes, colours, and where its files lie.

A new data set is a new row. `metrics` names those that are scored in a way of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from fusionsam.types import InputError

Color = tuple[int, int, int]
MAX_CLASSES = 255
"""Ids 0 to 254; 255 means unknown."""


@dataclass(frozen=True)
class DatasetRow:
    """One data set. `folders` maps visible, infrared, label (or rgbt and label) to the folder names in use; the
    first that exists counts."""

    name: str
    classes: tuple[str, ...]
    """Class names; the position is the id. Empty where a class file names them."""
    palette: tuple[Color, ...]
    """RGB of each class, 0-255."""
    foreground: tuple[int, ...]
    """Class ids of objects, as against the scene around them."""
    layout: Literal["lists", "split_folders", "pairs", "manifest"]
    """lists: NAME.txt beside images; split_folders: train/, test/; pairs: a folder a modality; manifest: a table."""
    folders: Mapping[str, tuple[str, ...]]
    splits: tuple[str, ...]
    """Official splits; `val` of split_folders is held out of train by us."""
    labels_map: Mapping[int, int] = field(default_factory=dict)
    """Id in the label files -> class id, or 255 to ignore it; of a class file."""

    @property
    def num_classes(self) -> int:
        """K; 0 where no class file was given."""
        return len(self.classes)

    def with_labels_map(self, more: Mapping[int, int]) -> DatasetRow:
        """The row whose label ids are also mapped by `more`, which wins over the class file. InputError, by the name of
        the flag, for an id that is no class."""
        if self.classes:
            _require_class_ids(more, self.num_classes, "--labels-map")
        return replace(self, labels_map={**self.labels_map, **more}) if more else self


MFNET_CLASSES = ("unlabeled", "car", "person", "bike", "curve", "car_stop", "guardrail", "color_cone", "bump")
MFNET_PALETTE: tuple[Color, ...] = (
    (0, 0, 0), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 192), (128, 128, 0), (64, 64, 128), (192, 128, 128),
    (192, 64, 0),
)  # fmt: skip
_FMB_CLASSES = (
    "unlabeled", "road", "sidewalk", "building", "lamp", "sign", "vegetation", "sky", "person", "car", "truck", "bus",
    "motorcycle", "bicycle", "pole",
)  # fmt: skip
_FMB_PALETTE: tuple[Color, ...] = (
    (0, 0, 0), (179, 228, 228), (181, 57, 133), (67, 162, 177), (200, 178, 50), (132, 45, 199), (66, 172, 84),
    (179, 73, 79), (76, 99, 166), (66, 121, 253), (137, 165, 91), (155, 97, 152), (105, 153, 140), (222, 215, 158),
    (135, 113, 90),
)  # fmt: skip
_ANY_FOLDERS = {
    # the first that is there counts; capitals do not matter
    "visible": ("visible", "vi", "vis", "rgb", "color", "colour", "v", "w", "crop_lr_visible", "images_rgb"),
    "infrared": (
        "infrared",
        "ir",
        "thermal",
        "tir",
        "lwir",
        "t",
        "th",
        "cropinfrared",
        "images_thermal",
        "thermal_8_bit",
        "thermal_16_bit",
    ),
    "label": ("labels", "label", "segmentation_labels", "masks", "mask", "gt"),
}

CATALOG: dict[str, DatasetRow] = {
    "mfnet": DatasetRow(
        name="mfnet",
        classes=MFNET_CLASSES,
        palette=MFNET_PALETTE,
        foreground=tuple(range(1, 9)),
        layout="lists",
        folders={"rgbt": ("images",), "label": ("labels",)},
        splits=("train", "val", "test", "test_day", "test_night"),
    ),
    "msrs": DatasetRow(
        name="msrs",
        classes=MFNET_CLASSES,
        palette=MFNET_PALETTE,
        foreground=tuple(range(1, 9)),
        layout="split_folders",
        folders={"visible": ("vi",), "infrared": ("ir",), "label": ("Segmentation_labels",)},
        splits=("train", "val", "test", "trainval"),
    ),
    "fmb": DatasetRow(
        name="fmb",
        classes=_FMB_CLASSES,
        palette=_FMB_PALETTE,
        foreground=(4, 5, 8, 9, 10, 11, 12, 13, 14),
        layout="split_folders",
        folders={"visible": ("Visible",), "infrared": ("Infrared",), "label": ("Label",)},
        splits=("train", "val", "test", "trainval"),
    ),
    "pst900": DatasetRow(
        name="pst900",
        classes=("background", "fire_extinguisher", "backpack", "hand_drill", "survivor"),
        palette=((0, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255)),
        foreground=(1, 2, 3, 4),
        layout="split_folders",
        folders={"visible": ("rgb",), "infrared": ("thermal",), "label": ("labels",)},
        splits=("train", "val", "test", "trainval"),
    ),
    "pairs": DatasetRow(
        name="pairs",
        classes=(),
        palette=(),
        foreground=(),
        layout="pairs",
        folders=_ANY_FOLDERS,
        splits=("all",),
    ),
    "manifest": DatasetRow(
        name="manifest",
        classes=(),
        palette=(),
        foreground=(),
        layout="manifest",
        folders={},
        splits=("all",),
    ),
}


def find(name: str, class_file: str | Path | None = None) -> DatasetRow:
    """The row called `name`; with `class_file` its classes, palette and foreground come from that YAML.

    Raises InputError listing the choices, or saying what is wrong with the class file."""
    if name not in CATALOG:
        raise InputError(f"dataset {name!r} is not known; choose one of {', '.join(CATALOG)}")
    row = CATALOG[name]
    return row if class_file is None else _with_class_file(row, Path(class_file))


def _with_class_file(row: DatasetRow, path: Path) -> DatasetRow:
    """The row with what a YAML says: classes: [names], palette: [[r,g,b], ...], foreground: [names or ids] (left out:
    all but the first), labels_map."""
    if not path.is_file():
        raise InputError(f"{path}: no such class file; expected a YAML with classes and palette")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:  # ValueError: a date that is none
        detail = " ".join(str(error).split())
        raise InputError(f"{path}: not readable as YAML ({detail}); expected the keys classes and palette") from error
    keys = {"classes", "palette", "foreground", "labels_map"}
    if not isinstance(content, dict) or not {"classes", "palette"} <= set(content) or not set(content) <= keys:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: found {found}; expected the keys classes and palette, and perhaps foreground and labels_map"
        )
    classes, palette = content["classes"], content["palette"]
    if not isinstance(classes, list) or not classes or not all(isinstance(item, str) for item in classes):
        raise InputError(f"{path}: classes must be a list of names, position = id; quote names such as 'no' or '1'")
    require_classes(classes, palette, f"{path}: classes", f"{path}: palette")
    foreground = content.get("foreground", list(range(1, len(classes))))
    try:
        ids = [classes.index(item) if isinstance(item, str) else int(item) for item in foreground]
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: foreground: {error}; expected names from classes, or their ids") from error
    if any(not 0 <= index < len(classes) for index in ids):
        raise InputError(f"{path}: foreground ids {ids} go beyond the {len(classes)} classes")
    colors = tuple((int(r), int(g), int(b)) for r, g, b in palette)
    mapped = _labels_map(path, content.get("labels_map", {}), len(classes))
    shown = tuple(sorted(set(ids)))
    return replace(row, classes=tuple(classes), palette=colors, foreground=shown, labels_map=mapped)


def besides(path: Path) -> dict[str, object]:
    """What a class file that `find` has read says beside classes and palette, for label maps that are drawn anew.

    What its labels_map says of class ids is left out: such maps hold what they were mapped to."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    mapped = {id: to for id, to in (content.get("labels_map") or {}).items() if id >= len(content["classes"])}
    found = {"foreground": content.get("foreground"), "labels_map": mapped or None}
    return {name: value for name, value in found.items() if value is not None}


def _labels_map(path: Path, given: object, count: int) -> dict[int, int]:
    """{id in the files: class id, or MAX_CLASSES (ignore)}."""
    pairs = list(given.items()) if isinstance(given, dict) else [(None, None)]
    if not all(type(key) is int and type(value) is int and key >= 0 for key, value in pairs):
        raise InputError(
            f"{path}: labels_map: found {given!r}; expected ids of the label files and the class ids they mean, as in "
            f"{{255: 1}} (0 to {count - 1}, or {MAX_CLASSES} to ignore)"
        )
    mapped = {key: value for key, value in pairs if isinstance(key, int) and isinstance(value, int)}
    _require_class_ids(mapped, count, f"{path}: labels_map")
    return mapped


def _require_class_ids(given: Mapping[int, int], count: int, name: str) -> None:
    if odd := [pair for pair in given.items() if not (0 <= pair[1] < count or pair[1] == MAX_CLASSES)]:
        raise InputError(
            f"{name}: {odd[0][0]}:{odd[0][1]}: there is no class {odd[0][1]}; expected a class id, 0 to {count - 1}, "
            f"or {MAX_CLASSES} to ignore"
        )


def typed_labels_map(maps: Sequence[str], ignored: Sequence[int]) -> dict[int, int]:
    """What `--labels-map 255:1 7:2` and `--ignore 9` mean: {255: 1, 7: 2, 9: 255}.

    Raises:
        InputError: no such pair of whole numbers, an id that is given twice.
    """
    found: dict[int, int] = {}
    for text in [*maps, *(f"{id}:{MAX_CLASSES}" for id in ignored)]:
        numbers = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
        if numbers is None:
            raise InputError(
                f"--labels-map {text}: expected FROM:TO, an id of the label files and the class id it means, as in "
                "255:1; --ignore ID leaves its pixels out"
            )
        if int(numbers[1]) in found:
            raise InputError(f"--labels-map, --ignore: id {numbers[1]} is given twice; give one class for it")
        found[int(numbers[1])] = int(numbers[2])
    return found


def require_classes(classes: Sequence[str], palette: object, classes_name: str, palette_name: str) -> None:
    """InputError, by the name of either, for classes that are not up to 255 different ones (255 is the id of unknown
    pixels, and label maps are 8 bits deep), and for a palette that is not a colour of its own for each."""
    if len(classes) > MAX_CLASSES:
        raise InputError(
            f"{classes_name}: {len(classes)} of them; expected up to {MAX_CLASSES}, label maps hold one byte a pixel"
        )
    odd = next((name for name in classes if not name or not name.isprintable() or name != name.strip()), None)
    if odd is not None:
        raise InputError(f"{classes_name}: {odd!r}; expected a name on one line, without blanks before or after it")
    if (twice := next((name for i, name in enumerate(classes) if name in classes[:i]), None)) is not None:
        raise InputError(f"{classes_name}: {twice!r} stands there twice; expected each once")
    if not isinstance(palette, list | tuple) or len(palette) != len(classes) or not all(map(_is_color, palette)):
        given = f"{len(palette)}" if isinstance(palette, list | tuple) else type(palette).__name__
        if isinstance(palette, list | tuple) and len(palette) == len(classes):
            given = str(next(color for color in palette if not _is_color(color)))
        raise InputError(
            f"{palette_name}: must hold {len(classes)} colours [r, g, b] of 0-255, one a class; found {given}"
        )
    colors = [tuple(color) for color in palette]
    if (same := next((c for i, c in enumerate(colors) if c in colors[:i]), None)) is not None:
        names = " and ".join(name for name, color in zip(classes, colors, strict=True) if color == same)
        raise InputError(f"{palette_name}: {names} have one colour, {list(same)}; give each class its own")


def _is_color(item: object) -> bool:
    return (
        isinstance(item, list | tuple)
        and len(item) == 3
        and all(type(value) is int and 0 <= value <= 255 for value in item)
    )
