"""Tables and command of `fusionsam report`: published numbers as printed, upper bounds alone."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionsam.cli.main import main
from fusionsam.config.datasets import CATALOG, MFNET_PALETTE
from fusionsam.config.load import differences, read_settings
from fusionsam.config.schema import to_dict
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation.published import published
from fusionsam.evaluation.report import Report
from fusionsam.evaluation.report_files import write
from fusionsam.evaluation.report_form import plain_json
from fusionsam.evaluation.report_parts import ORACLE
from fusionsam.evaluation.tables import figures as report_figures
from fusionsam.evaluation.tables import run as report
from fusionsam.evaluation.tables.formats import latex_escape, to_csv, to_latex, to_markdown
from fusionsam.evaluation.tables.results import evaluations
from fusionsam.evaluation.tables.sources import collect, collect_fusion
from fusionsam.evaluation.tables.tables import _plain, build
from fusionsam.evaluation.tally import Tally, scores
from fusionsam.metrics.fusion import METRICS
from fusionsam.weights.checkpoint import CARD, CONFIG, WEIGHTS

CONFIGS = Path(__file__).parents[1] / "configs"


def write_report(folder, dataset="mfnet", seed=0, images=3, **changes):
    """A true report of random maps, as `fusionsam evaluate` writes it; `changes` overwrite its values."""
    rng = np.random.default_rng(seed)
    classes = CATALOG[dataset].classes
    tally = Tally(classes)
    for number in range(images):
        label = rng.integers(0, len(classes), (11, 13))
        wrong = rng.random(label.shape) < 0.4
        predicted = np.where(wrong, rng.integers(0, len(classes), label.shape), label)
        tally.update(f"{number:05d}{'DN'[number % 2]}", predicted, label)
    values = plain_json(scores(tally, dataset, 20)) | {
        "dataset": dataset, "split": "val", "split_images": images, "split_ids_sha256": f"{dataset}{images}",
        "modality": "both", "prompts": "self", "flip": False, "scales": [1.0], "leak_guard": {"leaks": 0},
        "weights": f"runs/{folder.name}/final", "weights_card": None, "weights_sha256": "0", **changes,
    }  # fmt: skip
    values.setdefault("title", f"{values['weights']} on {dataset}")
    return write(folder, Report.from_dict(values), None)


def tables(*folders):
    return {table.name: table for table in build(collect(folders), collect_fusion(folders))}


def rows(table, group=""):
    return [dict(zip(table.columns, row.cells, strict=True)) for row in table.rows if group in row.group]


def config(**changes):
    settings = to_dict(read_settings(CONFIGS / "debug.yaml"))
    for name, value in changes.items():
        *path, last = name.split("__")
        part = settings
        for key in path:
            part = part[key]
        part[last] = value
    return {"config": settings}


class TestPublishedRows:
    def test_spot_values_are_the_papers(self, tmp_path):
        write_report(tmp_path)
        found = tables(tmp_path)
        mfnet = {row["method"]: row for row in rows(found["table1_mfnet"], "published")}
        assert (mfnet["EAEFNet"]["guardrail"], mfnet["MRFS"]["bump"], mfnet["FusionSAM"]["curve"]) == (
            "14.2",
            "58.8",
            "69.6",
        )
        assert (mfnet["Sigma-B (trained on train+val)"]["mIoU"], mfnet["LASNet"]["mIoU"]) == ("61.3", "54.9")
        fmb = {row["method"]: row for row in rows(found["table3_fmb"], "published")}
        assert (fmb["SegMiF"]["truck"], fmb["ECFNet"]["lamp"], fmb["FusionSAM"]["mIoU"]) == ("42.4", "40.6", "61.8")
        ablation = {row["variant"]: row for row in rows(found["table2_ablation"], "published")}
        assert (ablation["(A) without LSTG"]["MFNet"], ablation["(B) without FMP"]["FMB"]) == ("35.6", "57.6")
        sam = {row["method"]: row for row in rows(found["table4_sam"], "published")}
        assert (sam["SAM"]["MFNet"], sam["SAM2"]["FMB"], sam["FusionSAM"]["MFNet"]) == ("32.7", "46.3", "63.0")

    def test_nine_class_means_are_the_stated_miou_but_where_a_note_says_otherwise(self):
        for row in published()["mfnet"]["rows"]:
            mean = np.mean(row["iou"])
            if "nine" in row.get("notes", ()):
                assert f"average {mean:.1f}, not the printed {row['miou']}" in published()["notes"]["nine"]
            else:  # each printed value is rounded to a tenth, and so is their mean
                assert mean == pytest.approx(row["miou"], abs=0.1), row["method"]

    def test_fusionsams_eight_classes_average_what_its_note_says_and_the_others_do_not(self):
        means = {row["method"]: (np.mean(row["iou"]), row["miou"]) for row in published()["fmb"]["rows"]}
        assert means["FusionSAM"][0] == pytest.approx(61.7, abs=0.01)
        assert all(abs(mean - stated) > 2 for method, (mean, stated) in means.items() if method != "FusionSAM")

    def test_the_doubtful_figure_carries_its_note_in_every_form(self, tmp_path):
        table = tables(write_report(tmp_path).parent)["table3_fmb"]
        (note,) = [n for row in table.rows if row.cells[0] == "FusionSAM" for n in row.notes if "61.7" in n]
        assert note in to_markdown(table)
        assert latex_escape(note) in to_latex(table)
        assert note in to_csv(table)
        assert not any("61.7" in note for note in tables(tmp_path)["table1_mfnet"].footnotes())

    def test_every_published_row_says_so_and_no_other(self, tmp_path):
        write_report(tmp_path)
        for table in tables(tmp_path).values():
            for row in table.rows:
                assert ("published" in row.cells) == row.group.startswith("published"), (table.name, row)


class TestGroups:
    def test_only_the_whole_official_test_split_stands_beside_published_rows(self, tmp_path):
        write_report(tmp_path / "val", seed=1)
        write_report(tmp_path / "whole", seed=2, split="test", n_images=393, split_images=393)
        write_report(tmp_path / "part", seed=3, split="test", n_images=392, split_images=393)
        whole = {"split": "test", "n_images": 393, "split_images": 393}
        write_report(tmp_path / "leaky", seed=4, **whole, leak_guard={"leaks": 5})
        write_report(tmp_path / "mapped", seed=5, **whole, labels_map={"0": 255, "7": 2})
        write_report(tmp_path / "renamed", seed=6, **whole, other_classes=True)
        table = tables(tmp_path)["table1_mfnet"]
        found = {row.cells[0]: row.group for row in table.rows if "this evaluation" in row.cells}
        assert found == {
            "whole/final": "this evaluation: official test split, 393 images",
            "val/final": "our split: val, 3 images: not comparable with published rows",
            "part/final": "our split: test, 392 of 393 images: not comparable with published rows",
            "leaky/final": "our split: test, 393 images, 5 of them TRAINED ON: not comparable with published rows",
            "mapped/final, labels 0 left out and 7 as 2": "our split: test, 393 images, labels 0 left out and 7 as 2: "
            "not comparable with published rows",
            "renamed/final, classes of a class file": "our split: test, 393 images, classes of a class file: "
            "not comparable with published rows",
        }

    def test_scores_are_the_reports(self, tmp_path):
        values = json.loads(write_report(tmp_path / "one", "fmb", seed=5).read_text())
        (row,) = rows(tables(tmp_path)["table3_fmb"], "our split")
        assert row["sky"] == f"{values['per_class_iou']['sky']:.2f}"
        assert row["mIoU"] == f"{values['miou']:.2f}"
        assert row["mIoU 14-zero"] == f"{values['protocols']['14-zero']['miou']:.2f}"

    def test_what_moves_the_score_stands_behind_the_name(self, tmp_path):
        aligned = {"rig": "ab12", "by": "rigs/mine.json", "refine": False}
        write_report(tmp_path / "a", align=aligned, prompts="none", leak_guard={"leaks": 0, "off": True})
        (scored,) = collect([tmp_path])
        how = "aligned by mine.json without refinement, prompts none, training list not compared"
        assert scored.label == f"a/final, {how}"
        (table,) = evaluations([scored], tmp_path)
        assert how in table.rows[0].cells
        assert not _plain(scored)

    def test_the_same_ids_with_other_labels_are_refused(self, tmp_path):
        for name, labels in (("a", "1"), ("b", "1"), ("earlier", None)):
            write_report(tmp_path / name, labels_sha256=labels)
        write_report(tmp_path / "mapped", labels_sha256="3", labels_map={"0": 255})  # stands in another group
        assert len(collect([tmp_path])) == 4
        write_report(tmp_path / "c", labels_sha256="2")
        with pytest.raises(InputError, match=r"c/report\.json: is of pairs with the ids of those in .*a/report\.json"):
            collect([tmp_path])

    def test_day_and_night_are_columns_where_known(self, tmp_path):
        values = json.loads(write_report(tmp_path / "one").read_text())
        (row,) = rows(tables(tmp_path)["table1_mfnet"], "our split")
        assert row["night (present)"] == f"{values['by_time']['night']['miou']:.2f}"

    def test_checkpoints_of_a_summary_are_not_listed_again(self, tmp_path):
        for number in (1, 2):
            path = write_report(tmp_path / "seeds" / f"checkpoint_{number}", seed=number)
        values = json.loads(path.read_text()) | {"checkpoints": [{"prompts": "self"}] * 2, "miou_deviation": 1.25}
        summary = {**values, "title": "mean", "weights": ["runs/x/best", "runs/y/best"]}
        write(tmp_path / "seeds", Report.from_dict(summary), None)
        (row,) = rows(tables(tmp_path)["table1_mfnet"], "our split")
        assert (row["method"], row["95 % interval"]) == ("x/best and 1 more", "± 1.25 over 2 checkpoints")


class TestOracle:
    def test_upper_bounds_never_stand_beside_others(self, tmp_path):
        baseline = {"sam": "w/mobilesam.safetensors", "image": "fused"}
        write_report(tmp_path / "plain", seed=1)
        write_report(tmp_path / "bound", seed=2, prompts="oracle", title=f"{ORACLE}: x")
        write_report(tmp_path / "sam", seed=3, prompts="oracle", baseline=baseline)
        write_report(tmp_path / "hidden", seed=4, checkpoints=[{"prompts": "oracle"}, {"prompts": "self"}])
        found = tables(tmp_path)
        bound = found.pop("upper_bound_mfnet")
        names = {row.cells[0] for row in bound.rows}
        assert names == {"bound/final", "mobilesam on fused", "hidden/final"}
        assert bound.title.startswith("UPPER BOUND")
        assert {row["source"] for row in rows(bound)} == {"this evaluation"}
        assert not names & {cell for table in found.values() for row in table.rows for cell in row.cells}
        assert any(row.cells[0] == "plain/final" for row in found["table1_mfnet"].rows)

    def test_figures_keep_them_apart_too(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(report_figures, "save", lambda figure, stem: [])
        monkeypatch.setattr(report_figures, "bars", lambda title, series, palette: drawn.append((title, list(series))))
        monkeypatch.setattr(report_figures, "confusion", lambda *given: None)
        write_report(tmp_path / "plain", seed=1)
        write_report(tmp_path / "bound", seed=2, prompts="oracle")
        report.figures(collect([tmp_path]), tmp_path)
        assert sorted(("UPPER BOUND" in title, series) for title, series in drawn) == [
            (False, ["plain/final (both, self)"]),
            (True, ["bound/final (both, oracle)"]),
        ]


class TestAblationAndSam:
    def test_rows_share_a_group_only_under_one_budget(self, tmp_path):
        cards = {
            "full": config(train__out="runs/full", train__seed=1),
            "pixels": config(model__tokenizer__tokens="pixels", train__out="runs/pixels", train__seed=2),
            "concat": config(model__fusion__kind="concat"),
            "smooth": config(model__tokenizer__tokens="continuous"),
            "longer": config(model__tokenizer__tokens="pixels", train__max_steps=61),
            "alone": config(train__max_steps=999),
        }
        # as experiments/ablation/*.yaml have it: (A) has no LSTG that could come from stage 1
        for card in cards.values():
            pixels = card["config"]["model"]["tokenizer"]["tokens"] == "pixels"
            card["config"]["model"]["tokenizer_weights"] = None if pixels else "tiny"
            card["config"]["train"]["freeze_tokenizer"] = not pixels
        del cards["concat"]["config"]["model"]["encoder"]["guided"]  # a run from before that setting
        cards["joint"] = config(model__fusion__kind="concat")  # LSTG from nowhere: not the budget of the others
        for number, (name, card) in enumerate(cards.items()):
            write_report(tmp_path / name, seed=number, weights_card=card)
        table = tables(tmp_path)["table2_ablation"]
        groups = {heading: [row.cells[0] for row in members] for heading, members in table.groups()}
        ours = {re.sub(r".*budget: ", "", name): found for name, found in groups.items() if "budget" in name}
        every = ["(A) without LSTG", "(B) without FMP", "(C) FusionSAM", "LSTG-continuous"]
        assert ours == {
            "60 steps of 2 pairs (settings 1)": every,
            "60 steps of 2 pairs (settings 2)": ["(A) without LSTG", "(B) without FMP"],
            "61 steps of 2 pairs (settings 3)": ["(A) without LSTG"],
        }

    def test_a_checkpoint_tells_the_variant_while_it_is_the_one_that_was_scored(self, tmp_path):
        folder = tmp_path / "concat" / "final"
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"scored")
        (folder / CONFIG).write_text("")
        (folder / CARD).write_text(json.dumps(config(model__fusion__kind="concat")))
        digest = hashlib.sha256(b"scored").hexdigest()
        write_report(tmp_path / "concat" / "evaluation", weights=str(folder), weights_sha256=digest)
        (row,) = rows(tables(tmp_path)["table2_ablation"], "budget")
        assert (row["variant"], row["weights"]) == ("(B) without FMP", "concat/final")
        (folder / WEIGHTS).write_bytes(b"trained again")
        assert rows(tables(tmp_path)["table2_ablation"], "budget") == []

    def test_prompted_sam_stands_in_table_4_only_and_ablated_runs_do_not(self, tmp_path):
        write_report(tmp_path / "ours", seed=1, weights_card=config())
        write_report(tmp_path / "pixels", seed=2, weights_card=config(model__tokenizer__tokens="pixels"))
        baseline = {"sam": "w/mobilesam.safetensors", "image": "infrared"}
        write_report(tmp_path / "sam", seed=3, baseline=baseline, modality="infrared")
        found = tables(tmp_path)
        ours = {row["method"]: row["SAM sees"] for row in rows(found["table4_sam"], "our split")}
        assert ours == {"ours/final": "fused", "mobilesam on infrared": "infrared"}
        assert {row["method"] for row in rows(found["table1_mfnet"], "our split")} == {"ours/final", "pixels/final"}

    def test_the_four_configurations_differ_in_the_part_taken_away_and_nothing_else(self):
        base = to_dict(read_settings(CONFIGS / "mfnet_tiny.yaml"))
        found, budgets = {}, set()
        schedule = {f"train.{key}" for key in ("out", "max_steps", "warmup_steps", "validate_every")}
        for name in ("a", "b", "c", "continuous"):
            merged = to_dict(
                read_settings(
                    CONFIGS / "mfnet_tiny.yaml",
                    "--config",
                    str(CONFIGS.parent / "experiments/ablation" / f"{name}.yaml"),
                )
            )
            changed = set(differences(base, merged)) - schedule
            found[name] = changed
            budget = [merged["train"][key] for key in ("max_steps", "warmup_steps", "validate_every", "seed")]
            budgets.add((*budget, *merged["data"]["crop"], merged["model"]["encoder"]["thermal"]))
        assert len(budgets) == 1
        tokens, kind = "model.tokenizer.tokens", "model.fusion.kind"
        learned = "train.freeze_tokenizer"  # a patch embedding comes with no weights
        shared = {"data.crop", "model.encoder.thermal"}  # of all four, so that they are cheap and the parts matter
        parts = {"a": {tokens, learned}, "b": {kind}, "c": set(), "continuous": {tokens}}
        assert found == {name: shared | part for name, part in parts.items()}


class TestForms:
    def test_latex_csv_and_markdown_parse_back_to_the_same_cells(self, tmp_path):
        write_report(tmp_path / "a_run & 50% #1", seed=1)
        write_report(tmp_path / "fmb|x", "fmb", seed=2)
        for table in tables(tmp_path).values():
            cells = [list(row.cells) for row in table.rows]
            parsed = list(csv.reader(io.StringIO(to_csv(table))))
            assert parsed[0] == ["group", *table.columns, "note"]
            assert [row[1:-1] for row in parsed[1:]] == cells
            assert [row[0] for row in parsed[1:]] == [row.group for row in table.rows]
            plain = [[re.sub(r"( \[\d+\])+$", "", row[0]), *row[1:]] for row in (table.marked(r) for r in table.rows)]
            assert plain == cells
            body = to_latex(table).split(r"\toprule")[1].split(r"\bottomrule")[0]
            lines = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
            split = [[unescape(cell) for cell in re.split(r" & ", line.removesuffix(r" \\"))] for line in lines]
            assert split[1:] == [list(table.marked(row)) for row in table.rows]
            assert all(
                len(re.split(r"(?<!\\)\|", line)) == len(table.columns) + 2
                for line in to_markdown(table).splitlines()
                if line.startswith("|")
            )

    def test_fusion_metrics_are_a_table_with_infinity_told(self, tmp_path):
        names = ["EN", "MI", "SD", "SF", "AG", "SCD", "VIF", "Qabf", "SSIM", "PSNR", "Nabf"]
        scores = {name: number / 7 for number, name in enumerate(names)} | {"images": 5, "PSNR": None}
        (tmp_path / "tno").mkdir()
        (tmp_path / "tno" / "fusion_metrics.json").write_text(json.dumps({"tiny": scores}))
        table = tables(tmp_path)["fusion_quality"]
        (row,) = rows(table, "tno")
        assert (row["images"], row["MI"], row["PSNR"]) == ("5", "0.1429", "inf")
        assert row["Nabf (lower is better)"] == "1.4286"


def unescape(text):
    for plain, escaped in (
        ("&", r"\&"),
        ("%", r"\%"),
        ("#", r"\#"),
        ("_", r"\_"),
        ("±", r"$\pm$"),
        ("|", r"\textbar{}"),
    ):
        text = text.replace(escaped, plain)
    return text


class TestCommand:
    @pytest.fixture(scope="class")
    def scenes(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("scenes")
        lists = synthesize(root, 7, 3, (96, 128), progress=False)
        runs = root / "runs"
        for name in ("ours", "theirs"):
            (runs / name).mkdir(parents=True)
            for id in lists["train"]:
                with Image.open(root / "labels" / f"{id}.png") as label:
                    ids = np.asarray(label)
                colored = np.array(MFNET_PALETTE, np.uint8)[np.roll(ids, 7, 1)]
                Image.fromarray(ids if name == "ours" else colored).save(runs / name / f"{id}.png")
                Image.fromarray(colored).save(runs / "ours" / f"{id}_fused.png") if name == "ours" else None
        return root, lists["train"]

    def test_from_reports_and_predictions_to_one_page(self, scenes, tmp_path, capsys):
        root, ids = scenes
        write_report(tmp_path / "in" / "one", seed=1)
        panels = ["--panels", f"ours={root}/runs/ours", f"theirs={root}/runs/theirs", "--dataset", "mfnet"]
        where = ["--root", str(root), "--split", "train", "--ids", ids[2], ids[0]]
        assert main(["report", "--reports", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *panels, *where]) == 0
        page = (tmp_path / "out" / "report.md").read_text()
        for name in re.findall(r"!\[.*\]\((.*)\)", page):
            with Image.open(tmp_path / "out" / name) as image:
                assert image.width > 600
        assert {"panels_mfnet_train.png", "bars_mfnet_val.png"} <= set(re.findall(r"\((\S+\.png)\)", page))
        assert capsys.readouterr().out.strip().endswith("report.md shows them all")
        config = report.PanelConfig("mfnet", root, "train", runs={"ours": root / "runs/ours"}, ids=[ids[2], ids[0]])
        found, _ = report.panel_rows(config)
        assert [row.id for row in found] == [ids[2], ids[0]]
        assert [*found[0].pictures, *found[0].labels] == ["visible", "infrared", "fused", "ours", "ground truth"]
        np.testing.assert_array_equal(found[0].labels["ours"], found[0].labels["ground truth"])

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("{", "cannot be read as JSON"),
            ("[1]", "holds a list, expected"),
            ('{"title": "x"}', "lacks confusion_matrix, dataset"),
            ({"miou": "high"}, "miou: found 'high', expected a number or null"),
            ({"confusion_matrix": [[1, 2]]}, "expected a square of counts"),
            ({"classes": ["car"]}, "expected the classes of per_class_iou"),
            ({"by_time": {"day": 3}}, "expected day, night -> miou"),
            ({"checkpoints": []}, "expected reports of checkpoints"),
            ({"n_images": None}, "n_images: found 'None', expected a count"),
        ],
    )
    def test_odd_reports_are_one_line(self, text, told, tmp_path, capsys):
        path = write_report(tmp_path / "in")
        path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
        assert main(["report", "--reports", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert told in said
        assert str(path) in said
        assert said.count("\n") == 1

    def test_folders_without_anything_and_odd_fusion_metrics_are_one_line(self, tmp_path):
        with pytest.raises(InputError, match="no such folder"):
            report.run([tmp_path / "gone"], tmp_path / "out")
        with pytest.raises(InputError, match=r"found no report\.json"):
            report.run([tmp_path], tmp_path / "out")
        (tmp_path / "fusion_metrics.json").write_text('{"ours": {"EN": 1}}')
        with pytest.raises(InputError, match="'ours' lacks some of EN, MI"):
            report.run([tmp_path], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_fusion_metrics_with_the_contrast_of_objects_are_read(self, tmp_path):
        scores = dict.fromkeys(METRICS, 1.0) | {"images": 2}
        contrast = {"object_contrast": {"objects": 3.0, "fused": 1.0, "infrared": 2.0, "ratio": 0.5}}
        (tmp_path / "fusion_metrics.json").write_text(json.dumps({"ours": scores | contrast}))
        assert collect_fusion([tmp_path]) == {tmp_path.name: {"ours": scores}}

    def test_without_matplotlib_the_extra_is_named_and_tables_need_none(self, tmp_path, monkeypatch):
        write_report(tmp_path / "in")
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name)
        )
        with pytest.raises(InputError, match=re.escape("fusionsam[report]")):
            report.run([tmp_path / "in"], tmp_path / "out")
        written = report.run([tmp_path / "in"], tmp_path / "out", draw=False)
        assert {path.suffix for path in written} == {".md", ".tex", ".csv"}

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["--panels", "nonsense"], "expected RUN=FOLDER"),
            (["--ids", "zz", "--no-figures"], "are of the panels; give --panels, or leave them out"),
            (["--panels", "visible=x"], "no picture's name"),
            (["--panels", "a={runs}/ours"], "needs --dataset and --root"),
            (
                ["--panels", "a={runs}/ours", "--dataset", "mfnet", "--root", "{root}", "--ids", "zz"],
                "--ids zz: not in",
            ),
        ],
    )
    def test_wrong_panels_are_one_line(self, scenes, options, told, tmp_path, capsys):
        root, _ = scenes
        write_report(tmp_path / "in")
        options = [option.format(root=root, runs=root / "runs") for option in options]
        full = [
            "report",
            "--reports",
            str(tmp_path / "in"),
            "--out",
            str(tmp_path / "out"),
            "--split",
            "train",
            *options,
        ]
        monkey = pytest.MonkeyPatch()
        monkey.setattr(report, "figures", lambda *given: [])  # not what is tested here
        try:
            assert main(full) == 2
        finally:
            monkey.undo()
        assert told in capsys.readouterr().err
