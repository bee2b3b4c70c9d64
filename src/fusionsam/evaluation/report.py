"""What one evaluation found, as named fields; on disk it is the report.json of `fusionsam evaluate`.

`Scores` follow from the counts alone, a `Report` adds what was scored and how. The JSON is flat: a key a field, keys of
`OMITTED` only where they say something. Reports of earlier versions load; keys that no field knows are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from fusionsam.errors import InputError
from fusionsam.evaluation.comparison import Comparison
from fusionsam.evaluation.report_form import build, plain_json, require_form
from fusionsam.types import JsonObject

if TYPE_CHECKING:
    import pandas

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
        return self.prompts == "oracle"


@dataclass(kw_only=True)
class Scores:
    """Everything that follows from the counts of one evaluation; scores in percent, None where undefined."""

    unit: str = "percent"
    miou: float | None
    """Of the protocol `protocol`, the headline."""
    protocol: str
    protocols: dict[str, ProtocolScore]
    interval: Interval | None = None
    """Of the headline mIoU, over images (95 % bootstrap)."""
    by_sequence: SequenceScore | None = None
    """The same over recording sequences; None where the ids tell none."""
    bootstrap: dict[str, int] = field(default_factory=dict)
    """`draws` and `seed`."""
    n_images: int
    classes: list[str]
    per_class_iou: ByClass
    per_class_accuracy: ByClass = field(default_factory=dict)
    per_class_f1: ByClass = field(default_factory=dict)
    per_class_boundary_f: ByClass = field(default_factory=dict)
    pixel_accuracy: float | None = None
    boundary_f: float | None = None
    ece: float | None = None
    """Expected calibration error; None where nobody told a confidence."""
    confusion_matrix: list[list[int]]
    """Pixels (K,K), rows the truth."""
    by_time: dict[str, TimeScore] | None = None
    """`day` and `night`, where the ids tell (MFNet, MSRS)."""


@dataclass(kw_only=True)
class Report(Scores):
    """The outcome of one evaluation: print it, or ask `to_pandas` for the classes and `to_dict` for the JSON.

    >>> from fusionsam.evaluation.report_files import read
    >>> report = read("runs/a/report.json")  # doctest: +SKIP
    >>> report.miou, report.per_class_iou["person"]  # doctest: +SKIP
    (60.5, 71.2)
    """

    title: str
    dataset: str
    split: str | None = None
    split_ids_sha256: str
    split_images: int | None = None
    as_trained: bool = False
    modality: str | None = None
    flip: bool = False
    scales: list[float] = field(default_factory=lambda: [1.0])
    multi_scale: bool = False
    leak_guard: LeakFindings = field(default_factory=LeakFindings)
    notes: list[str] = field(default_factory=list)
    commit: str = ""
    command: str = ""
    align: JsonObject | None = None
    """The rig that the pairs were aligned by, where they were."""
    weights_card: JsonObject | None = None
    predictions: str | None = None
    prediction_format: str | None = None
    missing: int | None = None
    extra: int | None = None
    missing_ids: list[str] | None = None
    extra_files: list[str] | None = None
    prompts: str | None = None
    """What steered SAM: self, none, oracle, mixed; None for label maps of others."""
    weights: str | list[str] | None = None
    weights_sha256: str | None = None
    fitted: dict[str, int] = field(default_factory=dict)
    """How many of the pairs calibration and class offsets were fitted on."""
    seconds: float = 0.0
    seconds_counting: float = 0.0
    published: list[PublishedScore] | None = None
    against: Comparison | None = None
    baseline: Baseline | None = None
    peer: JsonObject | None = None
    miou_deviation: float | None = None
    pixel_accuracy_deviation: float | None = None
    boundary_f_deviation: float | None = None
    ece_deviation: float | None = None
    per_class_iou_deviation: ByClass | None = None
    per_class_accuracy_deviation: ByClass | None = None
    per_class_f1_deviation: ByClass | None = None
    per_class_boundary_f_deviation: ByClass | None = None
    checkpoints: list[CheckpointScore] | None = None
    per_image: str | None = None
    """File of the matrices of each image, beside the report."""
    other: JsonObject = field(default_factory=dict)
    """Keys of the JSON that no field knows."""

    @property
    def oracle(self) -> bool:
        """Whether its prompts were drawn from the ground truth."""
        return self.prompts == "oracle" or self.title.startswith("ORACLE")

    @property
    def counted(self) -> list[str]:
        """The classes in the headline mIoU; empty in reports that do not tell."""
        return self.protocols[self.protocol].classes if self.protocol in self.protocols else []

    @property
    def from_truth(self) -> bool:
        """Whether the ground truth drew any of its prompts, or of its checkpoints'."""
        return self.oracle or any(one.oracle for one in self.checkpoints or ())

    def to_dict(self) -> JsonObject:
        """What report.json holds, in plain JSON types."""
        values: JsonObject = {"title": self.title}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("title", "other") and not (value is None and each.name in OMITTED):
                values[each.name] = plain_json(value)
        return values | self.other

    @classmethod
    def from_dict(cls, values: Mapping[str, object], source: str = "report") -> Report:
        """The inverse of `to_dict`, for reports of earlier versions too. InputError, which begins with `source`, names
        the first key that is missing or has not its form."""
        require_form(values, source)
        report: Report = build(cls, values)
        known = {each.name for each in fields(cls)}
        report.other = {name: value for name, value in values.items() if name not in known}
        return report

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each class: IoU, accuracy, F1 and boundary F in percent; `attrs` has the headline and its source.

        InputError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise InputError("report: needs pandas, which is not installed; pip install 'fusionsam[report]'") from None
        columns = {name: [by[c] for c in self.classes] for name, by in self.columns().items()}
        frame = pandas.DataFrame(columns, index=pandas.Index(self.classes, name="class"), dtype="float64")
        frame.attrs = {"title": self.title, "miou": self.miou, "protocol": self.protocol, "interval": self.interval}
        return frame

    def columns(self) -> dict[str, ByClass]:
        """Heading -> scores by class, None where a summary lacks one."""
        parts = {
            "IoU": self.per_class_iou,
            "accuracy": self.per_class_accuracy,
            "F1": self.per_class_f1,
            "boundary F": self.per_class_boundary_f,
        }
        return {name: {c: by.get(c) for c in self.classes} for name, by in parts.items()}

    def __str__(self) -> str:
        from fusionsam.evaluation.report_text import table

        return table(self)


OMITTED = frozenset(
    {
        "align", "by_sequence", "by_time", "predictions", "missing", "extra", "missing_ids", "extra_files",
        "weights_sha256", "published", "against", "baseline", "peer", "checkpoints",
        *(each.name for each in fields(Report) if each.name.endswith("_deviation")),
    }
)  # fmt: skip
"""Keys that the JSON leaves out where they are None."""


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
