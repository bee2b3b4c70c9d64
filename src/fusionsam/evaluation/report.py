"""What one evaluation found, as named fields; on disk it is the report.json of `fusionsam evaluate`.

`Scores` follow from the counts alone, a `Report` adds what was scored and how. The JSON is flat: a key a field, keys of
`OMITTED` only where they say something. Reports of earlier versions load; keys that no field knows are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fusionsam.evaluation.comparison import Comparison
from fusionsam.evaluation.report_form import build, plain_json, require_form
from fusionsam.evaluation.report_parts import (
    AwayScore,
    Baseline,
    ByClass,
    CheckpointScore,
    Interval,
    LeakFindings,
    ProtocolScore,
    PublishedScore,
    SequenceScore,
    TimeScore,
    shared_mean,
)
from fusionsam.types import FROM_TRUTH, IGNORE, InputError, JsonObject

if TYPE_CHECKING:
    import pandas


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
    away: AwayScore | None = None
    """Of the pixels away from points that named their class (prompts named)."""


def aligned_by(align: Mapping[str, object] | None) -> list[str]:
    """What brought the pairs into one frame, from a report's `align`, in words; empty where nothing did."""
    if not align:
        return []
    words = f"aligned by {Path(str(align.get('by') or 'a rig')).name}"
    return [words if align.get("refine", True) else f"{words} without refinement"]


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
    labels_sha256: str | None = None
    """Of how many pixels of each class every label of the split has; the same ids may name other pictures."""
    split_images: int | None = None
    as_trained: bool = False
    modality: str | None = None
    flip: bool = False
    scales: list[float] = field(default_factory=lambda: [1.0])
    precision: str = "fp32"
    multi_scale: bool = False
    leak_guard: LeakFindings = field(default_factory=LeakFindings)
    notes: list[str] = field(default_factory=list)
    commit: str = ""
    command: str = ""
    labels_map: dict[str, int] | None = None
    """Id in the label files -> class id, or 255 (left out), where they were read otherwise than stored."""
    other_classes: bool = False
    """A class file took the place of the data set's own classes."""
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
    """What steered SAM: self, none, oracle, named (oracle's points, each with its class), mixed; None for label maps of
    others."""
    weights: str | list[str] | None = None
    weights_sha256: str | None = None
    calibrated: str | None = None
    """Digest of what calibrate stored in the weights; None for label maps of others."""
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
        return self.prompts in FROM_TRUTH or self.title.startswith("ORACLE")

    @property
    def inference(self) -> list[str]:
        """How the weights were run other than once at full size in float32 on the pairs as they are, in words."""
        told = ["flip"] if self.flip else []
        told += ["scales " + " ".join(f"{scale:g}" for scale in self.scales)] if self.scales != [1.0] else []
        told += [self.precision] if self.precision != "fp32" else []
        return told + aligned_by(self.align)

    @property
    def conditions(self) -> list[str]:
        """All but modality and prompts of the truth that a reader must know before comparing the score, in words."""
        told = self.inference + self.relabelled
        told += ["prompts none"] if self.prompts == "none" else []
        told += ["as trained"] if self.as_trained else []
        told += ["class offsets fitted on these pairs"] if self.fitted.get("class_offsets") else []
        return told + (["training list not compared"] if self.leak_guard.off else [])

    @property
    def relabelled(self) -> list[str]:
        """In what the truth differs from the data set's own, in words."""
        pairs = sorted((int(was), now) for was, now in (self.labels_map or {}).items())
        mapped = " and ".join(f"{was} left out" if now == IGNORE else f"{was} as {now}" for was, now in pairs)
        told = [f"labels {mapped}"] if mapped else []
        return told + (["classes of a class file"] if self.other_classes else [])

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
        return _table(self)


OMITTED = frozenset(
    {
        "align", "away", "by_sequence", "by_time", "labels_map", "labels_sha256", "predictions", "missing", "extra",
        "missing_ids", "extra_files", "weights_sha256", "published", "against", "baseline", "peer", "checkpoints",
        *(each.name for each in fields(Report) if each.name.endswith("_deviation")),
    }
)  # fmt: skip
"""Keys that the JSON leaves out where they are None."""


# -- as the terminal shows it ----------------------------------------------------------------------------------------


def _cell(value: float | None, sign: str = "") -> str:
    """Two digits; a dash where there is no value."""
    return "-" if value is None else f"{value:{sign}.2f}"


def _table(report: Report) -> str:
    """A report as text: classes, protocols with the headline marked, day and night, published rows, a comparison."""
    columns = report.columns()
    width = max(len("pixel accuracy"), *map(len, report.classes)) + 2
    heads = ("bound. F" if name == "boundary F" else name for name in columns)
    lines = [report.title, "", "class".ljust(width) + "".join(f"{name:>12}" for name in heads)]
    for name in report.classes:
        lines.append(name.ljust(width) + "".join(f"{_cell(by[name]):>12}" for by in columns.values()))
    lines += ["", *_means(report, width)]
    if report.published:
        lines += ["", "Published on this split (mIoU, protocol):"]
        lines += [f"  {row.miou:.1f}  {row.method} ({row.protocol})" for row in report.published]
    if report.against is not None:
        lines += ["", *_side_by_side(report.against, width)]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _means(report: Report, width: int) -> list[str]:
    """A line for each protocol and each figure over all pixels, then day and night."""
    lines = []
    for name, score in report.protocols.items():
        line = f"mIoU {name}".ljust(width) + f"{_cell(score.miou):>12}  over {len(score.classes)} classes"
        lines.append(line + (_headline(report) if name == report.protocol else ""))
    for name, value in (
        ("pixel accuracy", report.pixel_accuracy),
        ("boundary F", report.boundary_f),
        ("ECE", report.ece),
    ):
        lines.append(name.ljust(width) + f"{_cell(value):>12}")
    times = report.by_time or {}
    for name, part in times.items():
        lines.append(f"mIoU {name}".ljust(width) + f"{_cell(part.miou):>12}  {part.n_images} images, present")
    if (shared := shared_mean([(part.classes, part.per_class_iou) for part in times.values()])) is not None:
        classes, means = shared
        shown = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(times, means, strict=True))
        lines.append(f"over the {len(classes)} classes that both have: {shown}")
    if report.away is not None:
        lines.append(_away(report.away))
    return lines


def _away(away: AwayScore) -> str:
    """What points that named their class gained where they do not lie."""
    return (
        f"Away from the points that named their class ({_cell(away.share)} % of the pixels): mIoU {_cell(away.miou)}, "
        f"without these points {_cell(away.miou_without)}."
    )


def _headline(report: Report) -> str:
    """What stands behind the headline mIoU: its intervals, or its deviation over checkpoints."""
    line, sequences = "  <- headline", report.by_sequence
    if report.interval:
        line += f", 95 % interval {' to '.join(map(_cell, report.interval))}"
    elif report.n_images == 1 and report.bootstrap.get("draws"):
        line += ", no interval: one image"
    if sequences is not None and sequences.interval:
        line += f" ({' to '.join(map(_cell, sequences.interval))} over {sequences.n_sequences} recording sequences)"
    elif report.interval and sequences is not None and sequences.n_sequences == 1:
        line += " (none over recording sequences: they are of one)"
    if report.miou_deviation is not None:
        line += f", deviation {report.miou_deviation:.2f} over {len(report.checkpoints or ())} checkpoints"
    return line


def _side_by_side(against: Comparison, width: int) -> list[str]:
    """Ours, theirs and the difference for each class, and in words whether it is real."""
    lines = [f"Against: {against.title}", "IoU".ljust(width) + f"{'ours':>12}{'theirs':>12}{'difference':>12}"]
    for name, row in against.per_class_iou.items():
        cells = (_cell(row.ours), _cell(row.theirs), _cell(row.difference, "+"))
        lines.append(name.ljust(width) + "".join(f"{text:>12}" for text in cells))
    ours, theirs = against.miou
    cells = (_cell(ours), _cell(theirs), _cell(against.difference, "+"))
    lines += ["mIoU".ljust(width) + "".join(f"{text:>12}" for text in cells), against.words]
    if against.by_sequence is not None:
        lines.append(against.by_sequence.words)
    return [*lines, *([against.images.words] if against.images is not None else [])]
