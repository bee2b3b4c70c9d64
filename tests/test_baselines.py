from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)

from fusionsam.config.datasets import find
from fusionsam.data.dataset import open_labelled_split
from fusionsam.data.synthetic.scenes import draw_scene, synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation import sam_baseline as baselines
from fusionsam.evaluation.options import BaselineConfig
from fusionsam.evaluation.report_files import read_comparable, split_digest
from fusionsam.evaluation.sam_baseline import assemble, baseline, drawn_prompts
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.segment_anything import PlainSam
from fusionsam.io import write_json
from fusionsam.types import Prompts, Sample
from fusionsam.weights.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Ten scenes of 71 x 97 in MFNet's layout; val has two."""
    root = tmp_path_factory.mktemp("street") / "data"
    synthesize(root, 10, seed=3, size=(71, 97), progress=False)
    return root


def test_masks_become_the_label_map_worked_by_hand():
    labels = np.array(
        [
            [2, 2, 0, 0, 3, 3],
            [2, 2, 0, 0, 3, 255],
            [0, 0, 0, 1, 1, 255],
        ]
    )
    masks = np.zeros((5, 3, 6), bool)
    masks[0, :2, :3] = True  # 4 x id 2, 2 x id 0: class 2
    masks[1, :2, 2:] = True  # 4 x id 0, 3 x id 3, one that does not vote: unlabeled, left out though it scores highest
    masks[2, :, 4:] = True  # 3 x id 3, 1 x id 1, two that do not vote: class 3
    masks[3, 1:, 1:5] = True  # ids 2 0 0 3 / 0 0 1 1: 4 x id 0, left out
    masks[4, 2, 2:5] = True  # 1 x id 0, 2 x id 1: class 1, loses its last pixel to mask 2
    scores = np.array([0.5, 0.99, 0.8, 0.7, 0.6])
    wanted = [
        [2, 2, 2, 0, 3, 3],
        [2, 2, 2, 0, 3, 3],
        [0, 0, 1, 1, 3, 3],
    ]
    np.testing.assert_array_equal(assemble(masks, scores, labels, 4), wanted)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):  # the order of the masks does not matter, their scores do
        np.testing.assert_array_equal(assemble(masks[order], scores[order], labels, 4), wanted)
    scores[4] = 0.81
    assert assemble(masks, scores, labels, 4)[2].tolist() == [0, 0, 1, 1, 1, 3]
    scores[4] = scores[2]  # a tie: the earlier mask stays on top
    assert assemble(masks, scores, labels, 4)[2].tolist() == [0, 0, 1, 1, 3, 3]


def test_no_mask_and_masks_of_nothing_leave_all_unlabeled():
    labels = np.full((5, 7), 255)
    assert not assemble(np.zeros((0, 5, 7), bool), np.zeros(0), labels, 3).any()
    assert not assemble(np.stack([labels > 0, labels < 0]), np.ones(2), labels, 3).any()


def test_oracle_points_lie_on_their_class_and_its_box_encloses_it_exactly():
    label = draw_scene(3, 2, (71, 97)).label
    present = [i for i in label.unique().tolist() if i > 0]
    assert len(present) > 1
    points, boxes = drawn_prompts(label, 9, 7, seed=11)
    hit = [label[int(y), int(x)].item() for x, y in points.tolist()]
    assert hit == [index for index in present for _ in range(7)]
    for index, box in zip(present, boxes.tolist(), strict=True):
        rows, columns = np.nonzero(label.numpy() == index)
        assert box == [columns.min(), rows.min(), columns.max(), rows.max()]


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_are_those_of_the_models_own_processor(request, kind):
    folder = request.getfixturevalue(kind)[1]
    picture = torch.from_numpy(np.asarray(Image.effect_mandelbrot((113, 79), (-2, -1, 1, 1), 90)).copy())
    picture = picture.expand(3, -1, -1).float() / 255
    points = torch.tensor([[17.0, 5.0], [101.0, 70.0], [56.0, 31.0]])
    boxes = torch.tensor([[11.0, 13.0, 71.0, 53.0]])
    ours = PlainSam.open(folder)
    masks, scores = ours.masks(ours.encode(picture), points, boxes)

    if kind == "sam":
        image = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
        model, processor = SamModel.from_pretrained(folder).eval(), SamProcessor(image)
        sizes = ("original_sizes", "reshaped_input_sizes")
    else:
        image = Sam2ImageProcessor(size={"height": 64, "width": 64})
        model, processor = Sam2Model.from_pretrained(folder).eval(), Sam2Processor(image, target_size=64)
        sizes = ("original_sizes",)
    shown = (picture * 255).to(torch.uint8)
    for prompt, first in (({"input_points": [points[:, None].tolist()]}, 0), ({"input_boxes": [boxes.tolist()]}, 3)):
        if "input_points" in prompt:
            prompt["input_labels"] = [[[1]] * 3]
        inputs = processor(images=shown, return_tensors="pt", **prompt)
        given = {k: v for k, v in inputs.items() if k not in ("original_sizes", "reshaped_input_sizes")}
        with torch.inference_mode():
            out = model(**given, multimask_output=first == 0)
            full = processor.post_process_masks(out.pred_masks, *(inputs[name] for name in sizes))[0]
        best = out.iou_scores[0].argmax(1)
        for row in range(len(best)):
            # the processor resizes in 8 bits, ours in floats
            torch.testing.assert_close(scores[first + row], out.iou_scores[0, row, best[row]], atol=0.01, rtol=0.01)
            assert (masks[first + row] == full[row, best[row]]).float().mean() > 0.98
    assert 0.02 < masks.float().mean() < 0.98  # masks of nothing or everything would agree by chance


class HandMade:
    """Stands in for SAM: every prompt's mask is given."""

    def __init__(self, masks, scores):
        self.answer, self.seen = (torch.tensor(masks), torch.tensor(scores)), []

    def encode(self, picture):
        self.seen.append(picture)
        return picture

    def masks(self, encoded, points, boxes):
        self.seen.append((points.tolist(), boxes.tolist()))
        return self.answer


def test_self_prompts_take_our_points_and_our_classes_and_never_the_label():
    ours = np.array([[0, 5, 5], [0, 5, 7]], np.uint8)
    prompts = Prompts(
        points=torch.tensor([[[1.5, 0.5], [0.0, 0.0], [2.0, 1.0]]]),
        point_labels=torch.tensor([[1, -1, 1]]),
        boxes=torch.tensor([[[1.0, 0.0, 2.0, 1.0]]]),
    )
    fused = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    prediction = Prediction(fused, ours, np.ones((2, 3), np.float32), prompts, [], [], 0.0)
    label = torch.full((2, 3), 1)
    visible, infrared = torch.full((3, 2, 3), 51, dtype=torch.uint8), torch.full((1, 2, 3), 204, dtype=torch.uint8)
    sample = Sample("x", visible, infrared, label)
    right, corner = [[False, True, True], [False, True, True]], [[False, False, False], [False, False, True]]
    pictures = {
        "visible": torch.full((3, 2, 3), 0.2),
        "infrared": torch.full((3, 2, 3), 0.8),
        "fused": torch.from_numpy(fused).permute(2, 0, 1) / 255,
    }
    for image, picture in pictures.items():
        sam = HandMade([right, corner], [0.5, 0.9])
        config = BaselineConfig("mfnet", ".", sam="x", out=Path("."), image=image, prompts="self")
        painted = baselines.segment(sam, sample, find("mfnet"), config, prediction, 0)
        assert painted.tolist() == [[0, 5, 5], [0, 5, 7]]
        torch.testing.assert_close(sam.seen[0], picture)
        assert sam.seen[1] == ([[1.5, 0.5], [2.0, 1.0]], [[1.0, 0.0, 2.0, 1.0]])


def test_an_oracle_run_scores_its_own_pictures_is_marked_resumes_and_is_never_compared(sam, street, tmp_path):
    config = BaselineConfig(
        "mfnet",
        street,
        sam=str(sam[1]),
        out=tmp_path,
        image="infrared",
        prompts="oracle",
        bootstrap=20,
        device="cpu",
        points=2,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"nothere\.pth"):  # and what was mistyped can be mended
        baseline(replace(config, sam="nothere.pth"))
    report = baseline(config)
    assert report.title.startswith("ORACLE")
    assert not (tmp_path / "report.json").exists()
    stored = json.loads((tmp_path / "report_oracle.json").read_text())
    assert (stored["prompts"], stored["modality"], stored["weights"]) == ("oracle", "infrared", None)
    with pytest.raises(InputError, match="oracle"):
        read_comparable(tmp_path / "report_oracle.json", "mfnet", stored["split_ids_sha256"])

    matrix, painted = np.zeros((9, 9), int), {}
    ids = (street / "val.txt").read_text().split()
    for id in ids:
        painted[id] = np.asarray(Image.open(tmp_path / f"predictions/{id}.png"))
        label = np.asarray(Image.open(street / f"labels/{id}.png"))
        assert set(np.unique(painted[id])) <= {0, *np.unique(label)}
        np.add.at(matrix, (label, painted[id]), 1)
    assert stored["confusion_matrix"] == matrix.tolist()

    (tmp_path / f"predictions/{ids[1]}.png").unlink()
    Image.fromarray(np.zeros_like(painted[ids[0]])).save(tmp_path / f"predictions/{ids[0]}.png")
    again = baseline(config)
    assert not np.asarray(Image.open(tmp_path / f"predictions/{ids[0]}.png")).any()  # kept as it was found
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"predictions/{ids[1]}.png")), painted[ids[1]])
    assert np.sum(again.confusion_matrix) == matrix.sum()
    with pytest.raises(InputError, match="made with another image, seed"):
        baseline(replace(config, image="visible", seed=1))
    for foreign in (b'[{"a": 1}]', b"null", b"\xff"):
        (tmp_path / "settings.json").write_bytes(foreign)
        with pytest.raises(InputError, match=r"settings\.json: was not written by baselines"):
            baseline(config)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match=r"is there, and no settings\.json of ours tells of it"):
        baseline(config)


def test_a_self_run_on_the_fused_picture_names_its_prompts_and_classes(sam2, street, tmp_path, make_debug):
    ours = save_checkpoint(tmp_path / "ours", make_debug(), {})
    config = BaselineConfig(
        "mfnet", street, sam=str(sam2[1]), out=tmp_path / "out", weights=str(ours), bootstrap=0, device="cpu"
    )
    values = baseline(config).to_dict()
    assert (values["prompts"], values["weights"], values["baseline"]["image"]) == ("self", str(ours), "fused")
    assert any("majority of the prompt's model" in note for note in values["notes"])
    id = (street / "val.txt").read_text().split()[0]
    pair = np.asarray(Image.open(street / f"images/{id}.png"))
    predicted = FusionSAM.from_pretrained(ours, "cpu").predict(pair[:, :, :3].copy(), pair[:, :, 3].copy()).labels
    painted = np.asarray(Image.open(tmp_path / f"out/predictions/{id}.png"))
    assert set(np.unique(painted)) <= {0, *np.unique(predicted)}


def test_weights_with_the_classes_in_another_order_do_not_vote(sam2, street, tmp_path, make_debug):
    def exchanged(config):
        config.classes[1], config.classes[2] = config.classes[2], config.classes[1]

    ours = save_checkpoint(tmp_path / "ours", make_debug(exchanged), {})
    config = BaselineConfig(
        "mfnet", street, sam=str(sam2[1]), out=tmp_path / "out", weights=str(ours), bootstrap=0, device="cpu"
    )
    with pytest.raises(InputError, match="class 1 is 'person', in data set mfnet it is 'car'"):
        baseline(config)


def test_what_is_no_sam_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="'bert' model; give a SamModel"):
        PlainSam.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(InputError, match="cannot be loaded"):
        PlainSam.open(tmp_path)


def test_a_report_of_other_pairs_or_of_another_command_is_refused(street, tmp_path):
    config = BaselineConfig("mfnet", street, sam="nothere.pth", out=tmp_path, image="infrared", prompts="oracle")
    ids = (street / "val.txt").read_text().split()
    baseline_report = {"dataset": "fmb", "split": "val", "split_ids_sha256": "0", "baseline": {"sam": "x"}}
    evaluation = {"dataset": "mfnet", "split": "val", "split_ids_sha256": split_digest(ids)}
    for stored, told in (
        (baseline_report, r"is of fmb/val .*, not of mfnet"),
        (evaluation, r"report_oracle\.json: was not written by baselines; choose another --out"),
    ):
        (tmp_path / "report_oracle.json").write_text(json.dumps(stored))
        with pytest.raises(InputError, match=told):
            baseline(config)
    (tmp_path / "report_oracle.json").write_text(json.dumps({**evaluation, "baseline": {"sam": "x"}}))
    with pytest.raises(InputError, match=r"nothere\.pth"):  # ours: it goes on to the weights
        baseline(config)


def test_label_maps_of_other_pictures_labels_or_classes_are_not_kept(street, tmp_path, monkeypatch):
    data = Path(shutil.copytree(street, tmp_path / "data"))
    config = BaselineConfig("mfnet", data, sam="x", out=tmp_path / "out", image="infrared", prompts="oracle")

    def painted(config, data, folder, settings):
        write_json(Path(config.out) / "settings.json", settings)

    monkeypatch.setattr(baselines, "_paint", painted)
    monkeypatch.setattr(baselines, "_score", lambda *given: None)
    for _ in range(2):
        baseline(config)
    split = open_labelled_split("mfnet", data, "val")
    told = baselines._settings(config, split)
    classes, palette = list(split.row.classes), list(split.row.palette)
    for changed in ({"classes": classes[::-1]}, {"palette": palette[::-1]}, {"labels_map": {2: 1}}):
        with monkeypatch.context() as patch:
            patch.setattr(split, "row", replace(split.row, **changed))
            now = baselines._settings(config, split)
        assert [name for name in told if told[name] != now[name]] == list(changed)
    ids = (data / "val.txt").read_text().split()
    (data / "val.txt").write_text("\n".join(ids[::-1]))  # the place of a pair is part of its seed
    with pytest.raises(InputError, match="made with another ids, files;"):
        baseline(config)
    (data / "val.txt").write_text("\n".join(ids))
    Image.new("L", (97, 71)).save(data / f"labels/{ids[0]}.png")
    with pytest.raises(InputError, match="made with another files;"):
        baseline(config)
