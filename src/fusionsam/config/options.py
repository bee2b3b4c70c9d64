"""Options that several commands share: each name, default and help text stands here once.

A command's options are a frozen dataclass that inherits what it shares and adds its own; `cli.options` makes flags of
it. The docstring under a field is its help. Nothing heavy is imported: `--help` answers before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NewType

from fusionsam.config.datasets import CATALOG, typed_labels_map
from fusionsam.types import InputError

Address = NewType("Address", str)
"""A path, or the address of a file or folder on another machine (`data.storage`)."""


@dataclass(frozen=True)
class DataOptions:
    """Which labelled or unlabelled pairs."""

    dataset: str = field(metadata={"one_of": CATALOG})
    """row of the catalogue"""
    root: Path | str
    """folder of the data set, or the manifest file"""
    split: str = "val"
    """official split, or NAME of a list NAME.txt beside the data"""
    class_file: Path | str | None = field(default=None, kw_only=True, metadata={"metavar": "FILE"})
    """YAML with classes and palette, for pairs and manifest"""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What the ids of label files mean, where they are not those of the classes."""

    labels_map: Sequence[str] = field(default=(), metadata={"metavar": "FROM:TO"})
    """label ids that mean another class, as 255:1; wins over labels_map of the class file"""
    ignore: Sequence[int] = field(default=(), metadata={"metavar": "ID"})
    """label ids whose pixels are left out"""

    @property
    def mapped_ids(self) -> dict[int, int]:
        """Id in the files -> class id, or 255. InputError as `typed_labels_map`."""
        return typed_labels_map(self.labels_map, self.ignore)


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Two files or two folders."""

    visible: Path | None = None
    """visible image, or a folder of them; may be left out"""
    infrared: Path | None = None
    """infrared image, or a folder with the same names; may be left out"""


@dataclass(frozen=True, kw_only=True)
class AnyPairOptions(PairOptions):
    """Two files or folders, or one whose files hold both images."""

    rgbt: Path | None = None
    """instead of the two: a four-channel RGB + thermal PNG as MFNet's, or a folder of them"""


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """How two cameras that see apart are brought together."""

    align: str | None = field(default=None, metadata={"metavar": "RIG"})
    """rig.json of `fusionsam align`, or auto to find one in these pairs first: for cameras that see apart; maker:
    refine what radiometric files tell themselves"""
    no_refine: bool = False
    """with --align: the rig alone, without a small shift of each pair"""

    def __post_init__(self) -> None:
        """InputError for what does nothing without a rig."""
        if self.no_refine and self.align is None:
            raise InputError("--no-refine: is of --align; give that, or leave it out")


@dataclass(frozen=True, kw_only=True)
class WeightsOption:
    """One model."""

    weights: str = "tiny"
    """shipped name, checkpoint folder, or owner/name of the Hugging Face hub"""


DEFAULT_WEIGHTS = WeightsOption().weights


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """Where networks run."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""


@dataclass(frozen=True, kw_only=True)
class PrecisionOption(DeviceOption):
    """Where networks run, and in which numbers."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """numbers the network computes with; bf16: less time on GPUs and on CPUs that know bfloat16, and a few pixels of
    another class; fp16: GPUs alone"""


@dataclass(frozen=True, kw_only=True)
class OutOption:
    """Where results go."""

    out: Path
    """folder for the results"""


@dataclass(frozen=True, kw_only=True)
class OverwriteOption:
    """Whether finished results stay."""

    overwrite: bool = False
    """make finished results again and replace them"""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What was typed."""

    command: str = field(default="", metadata={"flag": False})
    """the command line; results repeat it"""


@dataclass(frozen=True, kw_only=True)
class BootstrapOptions:
    """What is drawn at random, and how often."""

    seed: int = 0
    """of everything that is drawn at random, the bootstrap among it"""
    bootstrap: int = 1000
    """resamples of the images, for intervals (0: none)"""
