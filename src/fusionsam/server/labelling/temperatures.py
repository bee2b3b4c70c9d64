"""The table of temperatures that `fusionsam label` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fusionsam.alignment.apply import Aligner
from fusionsam.data.labelling.exchange import Annotated, Color, SizeOf
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.inference import temperatures
from fusionsam.server.labelling.workspace import readings
from fusionsam.types import InputError


class TemperatureTable:
    """As a format of `export`, which replaces no file that it did not write itself; `align` is the folder's rig."""

    def __init__(self, folder: LabelFolder, align: Aligner | None = None) -> None:
        self.folder, self.align = folder, align
        self.labelled = sum(progress.objects > 0 for progress in folder.progress.values())
        self.without = 0
        """Of the labelled pairs, when it was written, those whose infrared file is not radiometric."""

    def read(self, path: Path, size_of: SizeOf) -> Iterator[Annotated]:
        """InputError: a table has no masks."""
        raise InputError(f"{path}: a table of temperatures holds no masks; expected another format")

    def write(self, path: Path, pictures: Iterable[Annotated], classes: Sequence[str], palette: Sequence[Color]) -> int:
        """Every object and class of every pair of the folder; how many objects."""
        found = readings(self.folder, temperatures.read_celsius, self.align)
        self.without = self.labelled - len({one.picture for one in found})
        temperatures.write_csv(path, found)
        return sum(one.object > 0 for one in found)
