"""The figures of `fusionsam report`: per-class bars, confusion matrix, qualitative panels. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusionsam.inference.render import IGNORED, colorize
from fusionsam.io import whole
from fusionsam.types import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Color = tuple[int, int, int]
DPI = 200
EDGE = (0.45, 0.45, 0.45)
_CHARACTER = 0.6 / 72  # inches a character is wide on average, for each point of font size
# run names are not formulas; type 42 keeps the text of a PDF searchable
_STYLE: Any = {"font.size": 9, "text.parse_math": False, "pdf.fonttype": 42}


def require(otherwise: str = "give --no-figures") -> None:
    """InputError unless matplotlib is there; it ends in what can be done without."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            f"figures need matplotlib, which is not installed; pip install 'fusionsam[report]', or {otherwise}"
        )


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """A figure of so many inches that belongs to no window. InputError without matplotlib."""
    require()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]


def _wrap(text: str, inches: float, size: float) -> str:
    return textwrap.fill(text, max(8, int(inches / (size * _CHARACTER))))


def _unit(color: Color) -> tuple[float, float, float]:
    red, green, blue = (channel / 255 for channel in color)
    return red, green, blue


def save(figure: Figure, stem: Path) -> list[Path]:
    """STEM.png and STEM.pdf, each whole or not at all, the same bytes for the same figure. InputError if they cannot be
    written."""
    from matplotlib import rc_context

    written = []
    for kind, dates in (("png", {}), ("pdf", {"CreationDate": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        with whole(path) as part, rc_context(_STYLE):
            figure.savefig(part, format=kind, dpi=DPI, metadata=dates)
        written.append(path)
    return written


def bars(
    title: str, series: Mapping[str, Mapping[str, float | None]], palette: Mapping[str, Color] | None = None
) -> Figure:
    """IoU in percent by class, a bar for each method of `series` (method -> class -> IoU, None = undefined, no bar).

    With one method the bars have the classes' colours; with several a strip below the axis has them."""
    from matplotlib import colormaps, rc_context
    from matplotlib.patches import Rectangle

    classes = list(dict.fromkeys(name for scores in series.values() for name in scores))
    colours = palette or {}
    spread = max(0.6, 0.2 * len(series) + 0.2)
    width = max(5.0, 0.8 + spread * len(classes))
    methods = colormaps["tab10" if len(series) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    with rc_context(_STYLE):
        figure = new_figure(width, 4.2 + 0.25 * len(series))
        axes = figure.subplots()
        bar = 0.85 / len(series)
        for number, (method, scores) in enumerate(series.items()):
            left = np.arange(len(classes)) - 0.425 + bar * (number + 0.5)
            for x, name in zip(left, classes, strict=True):
                value = scores.get(name)
                if value is None:
                    continue
                single = len(series) == 1 and name in colours
                fill = _unit(colours[name]) if single else methods[number % len(methods)]
                axes.bar(x, value, 0.92 * bar, color=fill, edgecolor=EDGE, linewidth=0.5)
                axes.text(x, value + 1, f"{value:.1f}", ha="center", va="bottom", rotation=90, fontsize=8)
            axes.bar([np.nan], [np.nan], color=methods[number % len(methods)], label=method)
        for x, name in enumerate(classes):
            if len(series) > 1 and name in colours:
                place = Rectangle((x - 0.425, -0.04), 0.85, 0.03, transform=axes.get_xaxis_transform(), clip_on=False)
                place.set(facecolor=_unit(colours[name]), edgecolor=EDGE, linewidth=0.5)
                axes.add_patch(place)
        axes.set_xticks(range(len(classes)), classes, rotation=35, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", length=0, pad=14)
        axes.set(xlim=(-0.55, len(classes) - 0.45), ylim=(0, 115), yticks=range(0, 101, 20), ylabel="IoU (%)")
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_title(_wrap(title, width - 1, 10), fontsize=10)
        if len(series) > 1:
            columns = max(1, int((width - 0.5) / (max(map(len, series)) * 9 * _CHARACTER + 0.6)))
            figure.legend(loc="outside lower center", ncols=min(columns, len(series)), frameon=False)
    return figure


def confusion(title: str, matrix: ArrayLike, classes: Sequence[str]) -> Figure:
    """Counts (K,K), rows the ground truth, as percent of each row; rows of classes without a pixel hold dashes."""
    from matplotlib import rc_context

    counts = np.asarray(matrix, np.float64)
    totals = counts.sum(1, keepdims=True)
    share = np.divide(100 * counts, totals, out=np.zeros_like(counts), where=totals > 0)
    side = 0.5 * len(classes)
    width = side + 2.2
    with rc_context(_STYLE):
        figure = new_figure(width, side + 2.2)
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(share):
            text = f"{value:.1f}" if totals[row, 0] else "-"
            color = "white" if value > 65 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
        names = [name if total else f"{name} (absent)" for name, total in zip(classes, totals[:, 0], strict=True)]
        axes.set_yticks(range(len(classes)), names)
        axes.set(xlabel="predicted", ylabel="ground truth (each row sums to 100 %)")
        # on the whole figure, not on the axes: the title may be wider than a small matrix
        figure.suptitle(_wrap(title, width - 0.3, 9), fontsize=9)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr,call-arg]
    return figure


@dataclass(frozen=True)
class PanelRow:
    """One pair: pictures uint8 (H,W,3) or (H,W), then label maps of ids (H,W), each under the title of its column."""

    id: str
    pictures: Mapping[str, NDArray[np.uint8]]
    labels: Mapping[str, NDArray[np.integer]]


def shown_classes(rows: Iterable[PanelRow]) -> list[int]:
    """Ids that occur in any label map, ascending; 255 (ignored) last."""
    return sorted({int(i) for row in rows for ids in row.labels.values() for i in np.unique(ids)})


def panels(rows: Sequence[PanelRow], classes: Sequence[str], palette: Sequence[Color]) -> Figure:
    """A row for each pair, a column for each picture and label map, and a legend of the classes that occur.

    Label maps have the data set's own colours; ignored pixels are white. InputError for rows of differing columns or an
    id without a colour."""
    from matplotlib import rc_context
    from matplotlib.patches import Patch

    columns = [*rows[0].pictures, *rows[0].labels] if rows else []
    for row in rows:
        if [*row.pictures, *row.labels] != columns:
            raise InputError(f"panels: {row.id} has the columns {[*row.pictures, *row.labels]}, expected {columns}")
    if not columns:
        raise InputError("panels: found no pair to show; give at least one of --ids")
    present = shown_classes(rows)
    entries = [("ignored", (255, 255, 255)) if i == IGNORED else (classes[i], palette[i]) for i in present]
    # places in inches, not found by a layout engine: those let titles of several lines leave the figure
    cell, gap = 2.3, 0.05
    shapes = [next(iter({**row.pictures, **row.labels}.values())).shape for row in rows]
    heights = [cell * shape[0] / shape[1] for shape in shapes]
    titles = [_wrap(column, cell, 10) for column in columns]
    names = [_wrap(row.id, height, 9) for row, height in zip(rows, heights, strict=True)]
    head, side = (0.12 + 0.17 * (max(text.count("\n") for text in texts) + 1) for texts in (titles, names))
    width = side + (cell + gap) * len(columns)
    per_row = max(1, int((width - 0.3) / (max(len(name) for name, _ in entries) * 10 * _CHARACTER + 0.65)))
    strip = 0.25 + 0.21 * -(-len(entries) // per_row)
    height = head + sum(heights) + gap * len(rows) + strip
    with rc_context(_STYLE):
        figure = new_figure(width, height, layout=None)
        top = height - head
        for number, title in enumerate(titles):
            middle = side + (cell + gap) * number + cell / 2
            figure.text(middle / width, (top + 0.06) / height, title, ha="center", va="bottom", fontsize=10)
        for row, name, tall in zip(rows, names, heights, strict=True):
            top -= tall
            figure.text((side - 0.06) / width, (top + tall / 2) / height, name, rotation=90, ha="right", va="center")
            for number, (column, array) in enumerate((dict(row.pictures) | dict(row.labels)).items()):
                left = side + (cell + gap) * number
                axes = figure.add_axes((left / width, top / height, cell / width, tall / height))
                if column in row.labels:
                    picture = np.where(array[..., None] == IGNORED, np.uint8(255), colorize(array, palette))
                    axes.imshow(picture, interpolation="none", aspect="auto")
                else:
                    axes.imshow(array, cmap="gray", vmin=0, vmax=255, aspect="auto")
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set(color=EDGE, linewidth=0.5)
            top -= gap
        handles = [Patch(facecolor=_unit(color), edgecolor=EDGE, label=name) for name, color in entries]
        columns_of_legend = min(per_row, len(handles))
        figure.legend(handles=handles, loc="lower center", ncols=columns_of_legend, frameon=False, fontsize=10)
    return figure
