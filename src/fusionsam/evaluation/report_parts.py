"""The parts of a report: the scores of a protocol, a time of day, a checkpoint, what the leak guard found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fusionsam.types import FROM_TRUTH, JsonObject

ORACLE = "ORACLE PROMPTS (upper bound, ground truth was used)"
"""How the title of a report begins whose prompts were drawn from the labels."""

ByClass = dict[str, float | None]
"""Class name -> percent, None where undefined."""
Interval = list[float | None]
"""Lower and upper end of a 95 % interval, percent."""


@dataclass
class ProtocolScore:
    """The mIoU of one protocol, and the classes in that mean."""

    miou: float | None = None
    classes: list[str] = field(default_factory=list)


@dataclass
class TimeScore:
    """The scores of the pictures of one time of day, `present` protocol."""

    n_images: int = 0
    protocol: str = "present"
    miou: float | None = None
    interval: Interval | None = None
    per_class_iou: ByClass = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    """In the mean: those that the labels have."""


@dataclass
class SequenceScore:
    """The interval of the mIoU when whole recording sequences are resampled, as frames of one are much alike."""

    n_sequences: int = 0
    interval: Interval | None = None


@dataclass
class AwayScore:
    """What points that name their class change where they do not lie: mIoU (`present` protocol) and IoU of the pixels
    away from all of them, and of the same pixels without the points."""

    share: float | None = None
    """Percent of the labelled pixels that are scored."""
    miou: float | None = None
    per_class_iou: ByClass = field(default_factory=dict)
    miou_without: float | None = None
    per_class_iou_without: ByClass = field(default_factory=dict)


@dataclass
class LeakFindings:
    """What the leak guard compared with (`checked`), and how many pictures of the split it found there."""

    checked: list[str] = field(default_factory=list)
    off: bool = False
    leaks: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    look_alikes: int = 0


@dataclass
class PublishedScore:
    """A figure of the literature on the same split."""

    method: str = ""
    miou: float = 0.0
    protocol: str = ""


@dataclass
class Baseline:
    """An unmodified SAM: which, on which picture, how prompted, and where its classes came from."""

    sam: str = ""
    image: str = ""
    prompts: str = ""
    class_rule: str = ""
    points: int = 0


@dataclass
class CheckpointScore:
    """One of the checkpoints of a summary."""

    weights: str | None = None
    weights_card: JsonObject | None = None
    weights_sha256: str | None = None
    prompts: str | None = None
    miou: float | None = None
    interval: Interval | None = None
    per_class_iou: ByClass = field(default_factory=dict)
    fitted: dict[str, int] = field(default_factory=dict)

    @property
    def oracle(self) -> bool:
        """Whether its prompts were drawn from the ground truth."""
        return self.prompts in FROM_TRUTH


def shared_mean(parts: Sequence[tuple[Sequence[str], ByClass]]) -> tuple[list[str], list[float]] | None:
    """Means over different classes cannot be compared; means over the classes that all have can.

    Args:
        parts: Of each figure the classes in its mean, and class -> IoU in percent.

    Returns:
        The shared classes and each part's mean IoU over them; None where all have the same classes, or none in common.

    >>> shared_mean([(["car", "person"], {"car": 80.0, "person": 60.0}), (["car"], {"car": 70.0, "person": None})])
    (['car'], [80.0, 70.0])
    """
    if not parts or all(set(classes) == set(parts[0][0]) for classes, _ in parts):
        return None
    shared = [name for name in parts[0][0] if all(name in classes for classes, _ in parts)]
    if not shared:
        return None
    return shared, [sum(by_class.get(name) or 0.0 for name in shared) / len(shared) for _, by_class in parts]
