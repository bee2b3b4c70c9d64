"""Figures of `fusionsam report`: the data set's colours, nothing cut, nothing invented; and what its files replace."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fusionsam.config.datasets import CATALOG, MFNET_CLASSES, MFNET_PALETTE
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation.fusion_report import write
from fusionsam.evaluation.tables import figures as report_figures
from fusionsam.evaluation.tables import run as report
from fusionsam.metrics.fusion import METRICS


def texts_inside(figure):
    """Whether every text lies on the canvas, as drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    cut = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            box = text.get_window_extent()
            if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height:
                cut.append(text.get_text())
    return cut


def scene(shift=0):
    ids = np.zeros((60, 83), np.uint8)
    ids[10:30, 5 + shift : 40 + shift] = 1
    ids[40:55, 50:70] = 5
    grey = np.tile(np.arange(83, dtype=np.uint8), (60, 1))
    return np.dstack([grey, grey[::-1], 255 - grey]), grey, ids


class TestFigures:
    def make_panels(self, methods=("a method of a rather long name", "b")):
        made = []
        for name in ("00001D", "a_rather_long_identifier_of_a_pair_N"):
            visible, infrared, ids = scene()
            labels = {method: scene(3 + k)[2] for k, method in enumerate(methods)} | {"ground truth": ids}
            made.append(report_figures.PanelRow(name, {"visible": visible, "infrared": infrared}, labels))
        made[1].labels["ground truth"][:5] = 7
        return made

    def test_the_legend_lists_exactly_the_classes_shown_in_the_data_sets_colours(self):
        figure = report_figures.panels(self.make_panels(), MFNET_CLASSES, MFNET_PALETTE)
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert names == ["unlabeled", "car", "car_stop", "color_cone"]
        for name, patch in zip(names, legend.get_patches(), strict=True):
            color = MFNET_PALETTE[MFNET_CLASSES.index(name)]
            assert patch.get_facecolor()[:3] == pytest.approx([channel / 255 for channel in color])

    def test_ignored_pixels_have_an_entry_of_their_own(self):
        visible, _, ids = scene()
        ids[0] = 255
        figure = report_figures.panels(
            [report_figures.PanelRow("x", {"visible": visible}, {"t": ids})], MFNET_CLASSES, MFNET_PALETTE
        )
        assert [t.get_text() for t in figure.legends[0].get_texts()] == ["unlabeled", "car", "car_stop", "ignored"]

    def test_files_are_pictures_without_invented_colours_and_the_same_each_time(self, tmp_path):
        for name in ("one", "two"):
            written = report_figures.save(
                report_figures.panels(self.make_panels(("m",)), MFNET_CLASSES, MFNET_PALETTE), tmp_path / name
            )
            assert [path.name for path in written] == [f"{name}.png", f"{name}.pdf"]
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
        assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "two.pdf").read_bytes()
        assert (tmp_path / "one.pdf").read_bytes().startswith(b"%PDF-")
        assert not list(tmp_path.glob(".*"))
        with Image.open(tmp_path / "one.png") as image:
            colours = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
        for index in (1, 5, 7):
            assert colours[MFNET_PALETTE[index]] > 1000

    def test_no_text_is_cut(self):
        long = {f"runs/of/a/long/name_{k}/final (both, self)": dict.fromkeys(MFNET_CLASSES, 100.0) for k in range(5)}
        palette = dict(zip(MFNET_CLASSES, MFNET_PALETTE, strict=True))
        title = "runs/mfnet_tiny/final on mfnet/val: mIoU 44.03 (present), prompts self, scales 0.75, 1, 1.25, flip"
        matrix = np.eye(15, dtype=int) * 1000 + 1
        matrix[4] = 0
        fmb = CATALOG["fmb"].classes
        assert texts_inside(report_figures.bars(title, long, palette)) == []
        assert texts_inside(report_figures.confusion(title, matrix, fmb)) == []
        assert texts_inside(report_figures.confusion(title, np.eye(2), ["background", "person"])) == []
        assert texts_inside(report_figures.panels(self.make_panels(), MFNET_CLASSES, MFNET_PALETTE)) == []
        assert texts_inside(report_figures.panels(self.make_panels()[:1], MFNET_CLASSES, MFNET_PALETTE)) == []

    def test_confusion_rows_are_percent_of_the_ground_truth(self):
        figure = report_figures.confusion("t", [[3, 1, 0], [0, 0, 0], [2, 3, 5]], ["a", "b", "c"])
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert texts == ["75.0", "25.0", "0.0", "-", "-", "-", "20.0", "30.0", "50.0"]
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b (absent)", "c"]

    def test_undefined_scores_have_no_bar(self):
        figure = report_figures.bars("t", {"m": {"a": 40.0, "b": None, "c": 7.3}})
        assert [text.get_text() for text in figure.axes[0].texts] == ["40.0", "7.3"]


class TestFiles:
    """What `fusionsam report` may replace."""

    @pytest.fixture
    def measured(self, tmp_path):
        """The --out of a fusion-metrics."""
        write(tmp_path / "fm", {"ours": {"a": dict.fromkeys(METRICS, 1.0)}})
        return tmp_path / "fm"

    def test_the_measurements_of_fusion_metrics_stay_where_the_report_goes_beside_them(self, measured):
        before = (measured / "fusion_metrics.csv").read_bytes()
        for _ in range(2):
            written = report.run([measured], measured)
            assert (measured / "fusion_quality.csv") in written
            assert (measured / "fusion_metrics.csv").read_bytes() == before
            assert all(path.is_file() for path in written)
        assert not list(measured.glob(".*"))

    def test_a_file_of_somebody_else_is_refused_and_nothing_is_written(self, measured, tmp_path):
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs/report.md").write_text("by hand")
        with pytest.raises(InputError, match=r"report\.md: is there, and no report_files\.json of ours tells of it"):
            report.run([measured], tmp_path / "docs")
        assert [path.name for path in (tmp_path / "docs").iterdir()] == ["report.md"]
        assert (tmp_path / "docs/report.md").read_text() == "by hand"

    def test_panels_that_cannot_be_drawn_leave_the_tables_as_they_were(self, measured, tmp_path):
        synthesize(tmp_path / "data", 7, 3, (64, 64), progress=False)
        report.run([measured], tmp_path / "out", draw=False)
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        write(measured, {"ours": {"a": dict.fromkeys(METRICS, 2.0)}})
        for ids, told in ((["zz"], "--ids zz: not in"), ([], "has a prediction")):
            panels = report.PanelConfig("mfnet", tmp_path / "data", runs={"a": measured}, ids=ids)
            with pytest.raises(InputError, match=told):
                report.run([measured], tmp_path / "out", panels)
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
