"""Folders of predicted label maps, whoever made them: class ids, or palette colours with channels in either order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from fusionsam.data.image_files import image_size
from fusionsam.data.images import read_visible
from fusionsam.data.label_files import read_label
from fusionsam.data.splits import by_stem
from fusionsam.io import progress_bar
from fusionsam.types import InputError

Format = Literal["ids", "rgb", "bgr"]
Color = tuple[int, int, int]

_SUFFIXES = ("", "_labels")
_COMPANIONS = ("_fused", "_overlay", "_confidence")  # `fusionsam predict` writes these beside ID_labels.png
_PROGRESS_FROM = 300


class PredictionFolder:
    """ID.png or ID_labels.png for each of `ids`, all in one format, found out over the whole folder unless given.

    `missing` ids and `extra` file names are told, not judged. Raises InputError for a folder without any prediction,
    two files for one id, a file that fits no format, files that disagree, and formats that nothing can tell apart."""

    def __init__(
        self,
        folder: str | Path,
        ids: Sequence[str],
        palette: Sequence[Color],
        format: Format | Literal["auto"] = "auto",
    ) -> None:
        self.folder, self.palette = Path(folder), list(palette)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder; expected predictions named ID.png or ID_labels.png")
        if format != "auto" and format not in get_args(Format):
            raise InputError(f"prediction format {format!r} is not known; choose auto, {', '.join(get_args(Format))}")
        names = by_stem(self.folder, (".png",))
        self.paths: dict[str, Path] = {}
        used: set[str] = set()
        for id in ids:
            found = [id + suffix for suffix in _SUFFIXES if id + suffix in names]
            if len(found) > 1:
                raise InputError(f"{self.folder}: holds both {found[0]}.png and {found[1]}.png; keep one of them")
            if found:
                self.paths[id] = names[found[0]]
                companions = (id + suffix for suffix in _COMPANIONS) if found[0] != id else ()
                used.update(found, companions)
        self.missing = [id for id in ids if id not in self.paths]
        self.extra = [path.name for stem, path in names.items() if stem not in used]
        if not self.paths:
            raise InputError(
                f"{self.folder}: none of the {len(ids)} ids has a prediction (first: {ids[0]}.png); name the files "
                "ID.png or ID_labels.png"
            )
        self.format: Format = self._found_out() if format == "auto" else format

    def size(self, id: str) -> tuple[int, int]:
        """(H, W) of a prediction, from its header."""
        return image_size(self.paths[id])

    def __getitem__(self, id: str) -> Tensor:
        """int64 (H,W) ids in 0..K-1. InputError for a colour or id that is none of the classes."""
        ids = self._read(self.paths[id], self.format)
        if ids is None:
            raise InputError(
                f"{self.paths[id]}: is not in the form {self.format!r} with the {len(self.palette)} classes of the "
                "data set; give another prediction format or the right class file"
            )
        return ids

    def _found_out(self) -> Format:
        left: dict[Format, str] = {}
        alike = True
        paths = list(self.paths.values())
        for number, path in enumerate(progress_bar(paths, desc="predictions", disable=len(paths) < _PROGRESS_FROM)):
            maps = {name: ids for name in get_args(Format) if (ids := self._read(path, name)) is not None}
            if not maps:
                raise InputError(
                    f"{path}: holds neither ids 0 to {len(self.palette) - 1} nor the palette's colours in RGB or BGR "
                    "order; check that it is a label map of this data set"
                )
            if number == 0:
                left = dict.fromkeys(maps, path.name)
            kept = {name: where for name, where in left.items() if name in maps}
            if not kept:
                raise InputError(
                    f"{path}: is in the form {'/'.join(maps)}, files before it in {'/'.join(left)}; write all "
                    "predictions in one form"
                )
            left = kept
            first = next(iter(left))
            # The black class reads alike in every form: only files whose readings differ need a decision.
            alike = alike and all(torch.equal(maps[name], maps[first]) for name in left)
        if len(left) > 1 and not alike and self._differ(list(left)):
            raise InputError(
                f"{self.folder}: reads as {' and as '.join(left)} with different classes; say which with "
                "--prediction-format"
            )
        return next(iter(left))

    def _differ(self, formats: list[Format]) -> bool:
        """Whether forms that fit every file give different ids in any of them."""
        for path in self.paths.values():
            first, *others = [self._read(path, name) for name in formats]
            assert first is not None
            if any(other is None or not torch.equal(first, other) for other in others):
                return True
        return False

    def _read(self, path: Path, format: Format) -> Tensor | None:
        """The ids if the file can be read that way."""
        image_size(path)  # the header is judged before PIL sees the file
        with Image.open(path) as image:
            mode = image.mode
        colours = mode in ("P", "PA", "RGB", "RGBA")
        if format == "ids":
            grey = [(i, i, i) for i in range(len(self.palette))]
            if colours and mode.startswith("RGB"):
                return _look_up(read_visible(path), grey)
            ids = read_label(path, grey)
            return ids if int(ids.min()) >= 0 and int(ids.max()) < len(self.palette) else None
        if not colours:
            return None
        order = self.palette if format == "rgb" else [(b, g, r) for r, g, b in self.palette]
        return _look_up(read_visible(path), order)


def _look_up(picture: Tensor, palette: Sequence[Color]) -> Tensor | None:
    """uint8 (3,H,W) -> int64 (H,W) positions in `palette`, None if any colour is not in it."""
    red, green, blue = picture.long().unbind(0)
    codes = (red << 16) | (green << 8) | blue
    ids = torch.full(codes.shape, -1, dtype=torch.long)
    for index, (r, g, b) in enumerate(palette):
        ids[codes == (r << 16 | g << 8 | b)] = index
    return None if bool((ids < 0).any()) else ids
