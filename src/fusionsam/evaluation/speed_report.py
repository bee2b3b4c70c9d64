"""What `fusionsam benchmark` measured, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusionsam.evaluation.speed import STAGES, Row, exponent
from fusionsam.evaluation.speed_models import MODELS, OURS


def reference(group: Sequence[Row]) -> Row:
    """The row of which times are multiples: ours, or the first where ours was not measured."""
    return next((row for row in group if row.name == OURS), group[0])


def as_markdown(rows: Sequence[Row]) -> str:
    """A table a size and number of threads, times as multiples of the `reference` in the same run; then the stages of
    ours."""
    lines = []
    for key in dict.fromkeys((row.size, row.threads) for row in rows):
        group = [row for row in rows if (row.size, row.threads) == key]
        one = reference(group)
        (height, width), threads = key
        lines += [f"### {height}x{width}, {_threads(threads)}", ""]
        lines += [
            f"| model | time, {MODELS[one.name][0]} = 1 | spread | GFLOP | peak memory MB | parameters M |",
            "|---|---|---|---|---|---|",
        ]
        for row in group:
            spread = f"{min(row.seconds) / row.median:.2f}-{max(row.seconds) / row.median:.2f}"
            flop = "" if row.gflop is None else f"{row.gflop:.1f}"
            size = "" if row.parameters is None else f"{row.parameters / 1e6:.1f}"
            time = f"{row.median / one.median:.2f}"
            lines.append(f"| {MODELS[row.name][0]} | {time} | {spread} | {flop} | {row.peak_mb:.0f} | {size} |")
        lines.append("")
    for threads in dict.fromkeys(row.threads for row in rows):
        lines += _stages([row for row in rows if row.name == OURS and row.threads == threads])
    return "\n".join(lines)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _stages(ours: Sequence[Row]) -> list[str]:
    """Of each stage the share of the time, what it makes of the matrix products' peak, and how it grows with pixels."""
    ours = sorted((row for row in ours if row.stages), key=lambda row: row.size)
    if not ours:
        return []
    sizes = [f"{row.size[0]}x{row.size[1]}{' (reduced)' * row.reduced}" for row in ours]
    lines = [f"### Stages of FusionSAM, {_threads(ours[0].threads)}", ""]
    lines += ["Share of the time / of the machine's measured matrix-product peak"]
    lines[-1] += ", and the power of the pixels that the time grows with:" if len(ours) > 1 else ":"
    power = " time ~ pixels^ |" if len(ours) > 1 else ""
    lines += ["", f"| stage | {' | '.join(sizes)} |{power}", "|---" * (1 + len(ours) + bool(power)) + "|"]
    for stage in STAGES:
        cells = []
        for row in ours:
            peak = row.share_of_peak(stage)
            cells.append(f"{100 * row.stages[stage]:.0f} %" + ("" if peak is None else f" / {100 * peak:.0f} %"))
        growth = exponent(ours, stage)
        tail = "" if not power else " |" if growth is None else f" {growth:.2f} |"
        lines.append(f"| {stage} | {' | '.join(cells)} |{tail}")
    if (growth := exponent(ours)) is not None:
        lines.append(f"| all | {' | '.join('' for _ in ours)} | {growth:.2f} |")
    return [*lines, ""]


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Time beside the `reference` and peak memory of every model, one row of bars each, at the first size and number of
    threads; the format is that of the suffix. InputError without matplotlib, or where it cannot be written."""
    from matplotlib import rc_context

    from fusionsam.evaluation.tables.figures import new_figure
    from fusionsam.io import whole

    group = [row for row in rows if (row.size, row.threads) == (rows[0].size, rows[0].threads)]
    one = reference(group)
    beside = f"time, {MODELS[one.name][0]} = 1 ({_threads(one.threads)})"
    names = [MODELS[row.name][0].replace(" (", "\n(") for row in group]
    height, width = group[0].size
    with (
        rc_context({"svg.hashsalt": "fusionsam", "svg.fonttype": "none", "font.size": 9}),
        whole(path, also=(ValueError,)) as part,
    ):
        figure = new_figure(9, 0.55 * len(group) + 1)
        left, right = figure.subplots(1, 2, sharey=True)
        colours = ["#1f77b4" if MODELS[row.name][0].startswith("FusionSAM") else "#999999" for row in group]
        for axes, values, label in (
            (left, [row.median / one.median for row in group], beside),
            (right, [row.peak_mb for row in group], "peak memory of the process, MB"),
        ):
            bars = axes.barh(names, values, color=colours)
            axes.bar_label(bars, [f"{value:.2f}" if values[0] < 50 else f"{value:.0f}" for value in values], padding=3)
            axes.margins(x=0.15)
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        left.invert_yaxis()
        figure.suptitle(f"One {height}x{width} pair")
        figure.savefig(part, format=path.suffix.removeprefix("."), dpi=150, metadata={})
    return path
