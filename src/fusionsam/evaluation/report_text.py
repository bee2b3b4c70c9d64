"""A report as the table that the terminal shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusionsam.evaluation.comparison import Comparison

if TYPE_CHECKING:
    from fusionsam.evaluation.report import Report


def cell(value: float | None, sign: str = "") -> str:
    """Two digits; a dash where there is no value."""
    return "-" if value is None else f"{value:{sign}.2f}"


def table(report: Report) -> str:
    """A report as text: classes, protocols with the headline marked, day and night, published rows, a comparison."""
    columns = report.columns()
    width = max(len("pixel accuracy"), *map(len, report.classes)) + 2
    heads = ("bound. F" if name == "boundary F" else name for name in columns)
    lines = [report.title, "", "class".ljust(width) + "".join(f"{name:>12}" for name in heads)]
    for name in report.classes:
        lines.append(name.ljust(width) + "".join(f"{cell(by[name]):>12}" for by in columns.values()))
    lines += ["", *_means(report, width)]
    if report.published:
        lines += ["", "Published on this split (mIoU, protocol):"]
        lines += [f"  {row.miou:.1f}  {row.method} ({row.protocol})" for row in report.published]
    if report.against is not None:
        lines += ["", *side_by_side(report.against, width)]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _means(report: Report, width: int) -> list[str]:
    """A line for each protocol and each figure over all pixels, then day and night."""
    from fusionsam.evaluation.report import shared_mean

    lines = []
    for name, score in report.protocols.items():
        line = f"mIoU {name}".ljust(width) + f"{cell(score.miou):>12}  over {len(score.classes)} classes"
        lines.append(line + (_headline(report) if name == report.protocol else ""))
    for name, value in (
        ("pixel accuracy", report.pixel_accuracy),
        ("boundary F", report.boundary_f),
        ("ECE", report.ece),
    ):
        lines.append(name.ljust(width) + f"{cell(value):>12}")
    times = report.by_time or {}
    for name, part in times.items():
        lines.append(f"mIoU {name}".ljust(width) + f"{cell(part.miou):>12}  {part.n_images} images, present")
    if (shared := shared_mean([(part.classes, part.per_class_iou) for part in times.values()])) is not None:
        classes, means = shared
        shown = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(times, means, strict=True))
        lines.append(f"over the {len(classes)} classes that both have: {shown}")
    return lines


def _headline(report: Report) -> str:
    """What stands behind the headline mIoU: its intervals, or its deviation over checkpoints."""
    line = "  <- headline"
    if report.interval:
        line += f", 95 % interval {' to '.join(map(cell, report.interval))}"
    if report.by_sequence is not None and report.by_sequence.interval:
        ends = " to ".join(map(cell, report.by_sequence.interval))
        line += f" ({ends} over {report.by_sequence.n_sequences} recording sequences)"
    if report.miou_deviation is not None:
        line += f", deviation {report.miou_deviation:.2f} over {len(report.checkpoints or ())} checkpoints"
    return line


def side_by_side(against: Comparison, width: int) -> list[str]:
    """Ours, theirs and the difference for each class, and in words whether it is real."""
    lines = [f"Against: {against.title}", "IoU".ljust(width) + f"{'ours':>12}{'theirs':>12}{'difference':>12}"]
    for name, row in against.per_class_iou.items():
        cells = (cell(row.ours), cell(row.theirs), cell(row.difference, "+"))
        lines.append(name.ljust(width) + "".join(f"{text:>12}" for text in cells))
    ours, theirs = against.miou
    cells = (cell(ours), cell(theirs), cell(against.difference, "+"))
    lines += ["mIoU".ljust(width) + "".join(f"{text:>12}" for text in cells), against.words]
    if against.by_sequence is not None:
        lines.append(against.by_sequence.words)
    return [*lines, *([against.images.words] if against.images is not None else [])]
