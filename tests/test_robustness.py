"""Disturbances are what they say and the same for everybody; the table counts what a predictor answered to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fusionsam.cli.main import main
from fusionsam.data.corruptions import fog
from fusionsam.data.dataset import PairDataset, open_split
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation.conditions import CONDITIONS, disturb, shift
from fusionsam.evaluation.robustness import measure, read_table, table, write


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesize(folder, 20, seed=11, size=(64, 96), progress=False)
    return folder


@pytest.fixture(scope="module")
def scenes(root: Path) -> PairDataset:
    return open_split("mfnet", root, "val")


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(3, 67, 71, generator=generator), torch.rand(1, 67, 71, generator=generator)


def test_shift_moves_content_and_repeats_the_border():
    image = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    assert shift(image, 0, 1).tolist() == [[[1, 1, 2], [4, 4, 5]]]
    assert shift(image, -1, -2).tolist() == [[[6, 6, 6], [6, 6, 6]]]


@pytest.mark.parametrize("pixels", [2, 4, 8, 16])
def test_a_shifted_infrared_image_is_displaced_by_exactly_that_much(images, pixels):
    visible, infrared = images
    ways = {(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)}
    seen = set()
    for name in "abcdefghijkl":
        left, moved = disturb(f"infrared shifted {pixels} px", visible, infrared, name)
        assert left is not None
        assert (left - visible).abs().max() <= 0.5 / 255 + 1e-6
        assert moved is not None
        fits = [way for way in ways if (moved - shift(infrared, *way)).abs().max() <= 0.5 / 255 + 1e-6]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) > 1


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_depend_on_their_arguments_alone_and_leave_the_originals(name, images):
    visible, infrared = images
    before = visible.clone(), infrared.clone()
    first = disturb(name, visible, infrared, "x", 5)
    torch.manual_seed(77)
    for one, two in zip(first, disturb(name, visible, infrared, "x", 5), strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert torch.equal(one, two)
            assert one.min() >= 0
            assert one.max() <= 1
            assert torch.allclose(one * 255, (one * 255).round(), atol=1e-4)  # 8 bits
    assert torch.equal(visible, before[0])
    assert torch.equal(infrared, before[1])


def test_what_each_condition_touches(images):
    visible, infrared = images
    untouched: dict[str, tuple[bool, bool]] = {}
    for name in CONDITIONS:
        seen = disturb(name, visible, infrared, "x")
        untouched[name] = tuple(  # type: ignore[assignment]
            new is not None and new.shape == old.shape and bool((new - old).abs().max() <= 0.5 / 255 + 1e-6)
            for new, old in zip(seen, images, strict=True)
        )
    both, infrared_alone, neither = (True, True), (True, False), (False, False)
    assert untouched.pop("full") == both
    for name in ("noise", "blur", "objects half as large", "objects a third as large"):
        assert untouched.pop(name) == neither
    visible_alone = {"fog", "over-exposure", "under-exposure", "infrared only"}
    assert {name for name, kept in untouched.items() if kept == (False, True)} == visible_alone
    assert all(kept == infrared_alone for name, kept in untouched.items() if name not in visible_alone)


def test_noise_differs_from_pair_to_pair_and_seed_to_seed(images):
    first, second, third = (disturb("noise", *images, name, seed)[0] for name, seed in (("x", 0), ("y", 0), ("x", 1)))
    assert first is not None
    assert second is not None
    assert third is not None
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)


def test_fog_draws_towards_the_airlight_most_at_the_top():
    image = torch.zeros(3, 40, 50)
    image[:, :, ::2] = 0.8  # the airlight: 95 % of the luma lie at or below it
    fogged = fog(image, 2.0, torch.Generator().manual_seed(0))
    contrast = (fogged[:, :, ::2] - fogged[:, :, 1::2]).mean((0, 2)) / 0.8  # t of each row
    assert torch.allclose(fogged[:, :, ::2], torch.full((3, 40, 25), 0.8), atol=1e-5)
    assert contrast[0] < 0.4 < 0.75 < contrast[-1]
    # t = exp(-2 x distance x drift), with drifts of 0.6 to 1.4
    assert np.exp(-2 * 1.4) < contrast[0] < np.exp(-2 * 0.6)
    assert np.exp(-0.2 * 1.4) < contrast[-1] < np.exp(-0.2 * 0.6)


def test_farther_and_coarser_cameras(images):
    visible, infrared = images
    far = disturb("objects half as large", visible, infrared, "x")
    assert [image.shape[1:] for image in far] == [tuple(round(n / 2) for n in visible.shape[1:])] * 2
    _, dark = disturb("black-hot infrared", visible, infrared, "x")
    assert torch.allclose(dark, 1 - infrared, atol=0.51 / 255)
    sharp = torch.zeros(1, 480, 640)
    sharp[:, :, 320:] = 1
    _, coarse = disturb("coarse infrared", torch.zeros(3, 480, 640), sharp, "x")
    edge = coarse[0, 240, 312:328]
    assert coarse.shape == sharp.shape
    assert (edge.diff() >= 0).all()
    assert 3 <= ((edge > 0.05) & (edge < 0.95)).sum() <= 8  # an edge of four pixels and its antialiasing


def test_a_shift_is_the_same_before_and_after_it_is_taken_back(images, monkeypatch):
    nothing = SimpleNamespace(x=0.0, y=0.0, believed=False)
    monkeypatch.setattr("fusionsam.evaluation.conditions.residual", lambda *_: nothing)
    moved = [
        [disturb(f"infrared shifted 8 px{back}", *images, name)[1] for name in "abcdefgh"]
        for back in ("", ", realigned")
    ]
    assert all(torch.equal(one, two) for one, two in zip(*moved, strict=True))
    assert any(not torch.equal(one, moved[0][0]) for one in moved[0])  # the pairs are not all moved one way


def test_a_narrower_infrared_camera_is_blanked_where_the_model_is_told_so(scenes):
    asked = []

    def predict(visible, infrared, /, covered=None):
        asked.append((infrared, covered))
        return np.zeros(visible.shape[2:], int)

    measure(predict, scenes, ["infrared in the middle"], bootstrap=0)
    for (whole, nothing), (part, covered) in zip(asked[::2], asked[1::2], strict=True):
        assert nothing is None
        assert covered[0, 0].all()
        assert torch.equal(part, whole * covered[:, 1:])
        assert covered[0, 1].float().mean() == pytest.approx(0.36, abs=0.01)


def test_class_maps_of_a_smaller_picture_are_scored_at_the_size_of_the_labels(tmp_path):
    synthesize(tmp_path, 12, seed=11, size=(128, 192), progress=False)
    first = open_split("mfnet", tmp_path, "val")
    truth = iter([ids for i in range(len(first)) for ids in (first[i].label.numpy(), first[i].label[::2, ::2].numpy())])
    found = measure(lambda v, i: next(truth), first, ["objects half as large", "objects a third as large"], bootstrap=0)
    assert found["conditions"]["full"]["miou"] == 100
    assert found["conditions"]["objects a third as large"]["miou"] is None  # 43 pixels are too few for a network
    assert 40 < found["conditions"]["objects half as large"]["miou"] < 100


def warm(visible: Any, infrared: Any) -> Any:
    """Calls person what is warm; needs infrared."""
    return None if infrared is None else torch.where(infrared[0, 0] > 0.5, 2, 0).numpy()


def test_the_table_is_what_the_predictor_was_worth(scenes):
    truth = iter([scenes[i].label for i in range(len(scenes)) for _ in range(3)])
    exact = measure(lambda v, i: next(truth).numpy(), scenes, ["visible only", "dead infrared frame"], bootstrap=0)
    assert [row["miou"] for row in exact["conditions"].values()] == [100.0] * 3
    found = measure(warm, scenes, ["visible only", "infrared only", "dead infrared frame", "fog"], bootstrap=10)
    rows = found["conditions"]
    assert list(rows) == ["full", "visible only", "infrared only", "dead infrared frame", "fog"]
    assert rows["visible only"]["miou"] is None
    assert rows["infrared only"] == {**rows["full"], "note": CONDITIONS["infrared only"].note}
    assert rows["fog"]["miou"] == rows["full"]["miou"]
    # of a dead frame nothing is warm: what is left is the share of class 0, over the classes of the labels
    labels = torch.stack([scenes[i].label for i in range(len(scenes))])
    present = len(labels.unique())
    assert rows["dead infrared frame"]["miou"] == pytest.approx(100 * float((labels == 0).double().mean()) / present)
    assert rows["dead infrared frame"]["share"] == pytest.approx(
        100 * rows["dead infrared frame"]["miou"] / rows["full"]["miou"]
    )


def test_tables_stand_beside_one_another_only_for_the_same_pictures(scenes, tmp_path):
    values = {"title": "warm", **measure(warm, scenes, ["visible only"], bootstrap=0)}
    made = write(values, tmp_path)
    assert read_table(tmp_path) == values
    assert made.rows[1].cells == ("visible only", "-", "-", "-")
    beside = table(values, [{**values, "title": "rival"}])
    assert beside.columns[-1] == "rival"
    assert beside.rows[0].cells[1] == beside.rows[0].cells[-1]
    assert table(values, [{**values, "title": "rival", "notes": ["a leak"]}]).notes[-1] == "rival: a leak"
    with pytest.raises(
        InputError, match="--against, the table of rival: its seed is 1, here it is 0; measure it on this split"
    ):
        table(values, [{**values, "title": "rival", "seed": 1}])
    with pytest.raises(InputError, match="is of pairs with the ids of those here and other labels"):
        table(values, [{**values, "title": "rival", "labels_sha256": "x"}])
    earlier = {key: value for key, value in values.items() if key != "labels_sha256"}
    assert table(values, [{**earlier, "title": "rival"}]).rows == beside.rows
    for row in ("3", '{"miou": "abc"}', "{}"):
        (tmp_path / "robustness.json").write_text(f'{{"title": "t", "conditions": {{"full": {row}}}}}')
        with pytest.raises(InputError, match="no table of fusionsam robustness"):
            read_table(tmp_path)


def test_the_full_row_is_what_evaluate_says(root, tmp_path, make_debug):
    from fusionsam.weights.checkpoint import save_checkpoint

    weights = save_checkpoint(tmp_path / "weights", make_debug(), {})
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root), "--bootstrap", "0"]
    assert main(["evaluate", *given, "--out", str(tmp_path / "a"), "--worst", "2"]) == 0
    assert main(["robustness", *given, "--out", str(tmp_path / "b"), "--conditions", "noise"]) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    row = read_table(tmp_path / "b")["conditions"]["full"]
    plain = ["--conditions", "noise", "--prompts", "none", "--out", str(tmp_path / "plain")]
    assert main(["robustness", *given, *plain]) == 0
    assert read_table(tmp_path / "plain")["title"] == f"{weights}, prompts none"
    assert (row["miou"], row["per_class_iou"]) == (report["miou"], report["per_class_iou"])
    # the worst pairs come in order, and their pictures show five panels of 96 pixels at least
    listed = json.loads((tmp_path / "a" / "worst" / "worst.json").read_text())
    assert [w["miou"] for w in listed] == sorted(w["miou"] for w in listed)
    drawn = sorted((tmp_path / "a" / "worst").glob("*.png"))
    assert [path.stem for path in drawn] == [f"{n:02d}_{w['id']}" for n, w in enumerate(listed, 1)]
    assert Image.open(drawn[0]).width >= 5 * 96


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--seed", "-1"], "--seed -1, --bootstrap 0: expected at least 0"),
        (["--bootstrap", "-5"], "--seed 0, --bootstrap -5: expected at least 0"),
        (["--against", "OTHER"], "--against, the table of rival: is of"),
        (["--out", "FILE"], "file/x: cannot be written (Not a directory); choose another --out"),
        (
            ["--out", "ROWS", "--conditions", "fog"],
            "rows/robustness.json: tells of rows of visible only, which would be lost",
        ),
        (["--out", "ROWS", "--conditions", "fogg"], "--conditions 'fogg': not known; choose from full"),
        (["--out", "OTHER"], "other/robustness.json: is of other pairs (rival), not of these"),
        (["--out", "SITE"], "site/robustness.json: is of other pairs (rival), not of these"),
    ],
)
def test_what_would_spoil_the_table_is_told_before_anything_is_measured(
    changed, told, root, scenes, tmp_path, make_debug, monkeypatch, capsys
):
    from fusionsam.evaluation import robustness
    from fusionsam.weights.checkpoint import save_checkpoint

    values = measure(warm, scenes, ["visible only"], bootstrap=0)
    write({**values, "title": "rival"}, tmp_path / "other")
    (tmp_path / "other" / "robustness.json").write_text(
        json.dumps({**values, "title": "rival", "split_ids_sha256": "x"})
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "robustness.json").write_text(json.dumps({**values, "title": "rival", "labels_sha256": "x"}))
    write({**values, "title": "earlier"}, tmp_path / "rows")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(robustness, "measure", lambda *_: pytest.fail("measured"))
    weights = save_checkpoint(tmp_path / "weights", make_debug(), {})
    given = ["--weights", str(weights), "--dataset", "mfnet", "--root", str(root), "--bootstrap", "0"]
    places = {name: str(tmp_path / name.lower()) for name in ("OTHER", "ROWS", "SITE")} | {
        "FILE": str(tmp_path / "file" / "x")
    }
    more = [places.get(word, word) for word in changed]
    assert main(["robustness", *given, "--out", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in error


def test_fmb_is_scored_by_its_own_protocol(tmp_path):
    for folder in ("Visible", "Infrared", "Label"):
        (tmp_path / "test" / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(2):
        label = rng.integers(0, 15, (64, 96), dtype=np.uint8)
        label[label == 13] = 0  # bicycle, which the official test split has not
        for folder, array in (("Visible", label * 9), ("Infrared", label * 9), ("Label", label)):
            Image.fromarray(array).save(tmp_path / "test" / folder / f"0000{index}.png")
    data = open_split("fmb", tmp_path, "test")
    found = measure(lambda v, i: np.zeros((64, 96), np.int64), data, ["visible only"], bootstrap=3)
    assert found["protocol"] == "14-present"
    assert 0 <= found["conditions"]["full"]["miou"] < 20
    data.row = replace(data.row, classes=data.row.classes[::-1])  # of a class file
    found = measure(lambda v, i: np.zeros((64, 96), np.int64), data, ["visible only"], bootstrap=3)
    assert found["protocol"] == "present"
    data.entries = data.entries[:1]
    found = measure(lambda v, i: np.zeros((64, 96), np.int64), data, ["visible only"], bootstrap=3)
    assert found["conditions"]["full"]["interval"] is None  # resamples of one pair are all alike


def test_a_pair_without_an_image_is_named_before_anything_is_measured(scenes):
    entries = [*scenes.entries[:-1], replace(scenes.entries[-1], rgbt=None, visible=scenes.entries[-1].rgbt)]
    last = PairDataset(entries, scenes.row)
    with pytest.raises(InputError, match=rf"^{entries[-1].id}: has no infrared, and robustness needs both images"):
        measure(lambda *_: pytest.fail("measured"), last, ["fog"])


def test_an_unknown_condition_is_named(scenes):
    with pytest.raises(InputError, match="--conditions 'rain': not known; choose from full, visible only"):
        measure(warm, scenes, ["rain"])
