from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from fusionsam.cli.main import main as cli
from fusionsam.config.datasets import MFNET_CLASSES, MFNET_PALETTE, find
from fusionsam.config.model import SteeringConfig
from fusionsam.config.schema import preset
from fusionsam.data.dataset import open_split
from fusionsam.data.fingerprints import of_training
from fusionsam.data.images import write_png
from fusionsam.data.predictions import PredictionFolder
from fusionsam.data.synthetic.scenes import draw_scene, synthesize
from fusionsam.errors import InputError
from fusionsam.evaluation import run as evaluation
from fusionsam.evaluation.comparison import compare
from fusionsam.evaluation.options import EvaluateConfig
from fusionsam.evaluation.report import Report
from fusionsam.evaluation.report_files import read_comparable
from fusionsam.evaluation.report_parts import PublishedScore
from fusionsam.evaluation.run import evaluate, read_otherwise
from fusionsam.evaluation.tally import Tally
from fusionsam.inference.predictor import FusionSAM
from fusionsam.metrics.segmentation import PROTOCOLS, ImageMatrices, paired_bootstrap
from fusionsam.weights.build import build_network
from fusionsam.weights.checkpoint import save_checkpoint

LEAK = "allow_train_test_leak_and_know_that_scores_are_worthless"


def save(folder, seed, **changes):
    torch.manual_seed(seed)
    config = preset("debug")
    for name, value in changes.items():
        setattr(config, name, value)
    network = build_network(config)
    with torch.no_grad():  # untrained logits name one class almost everywhere; noise makes the maps worth scoring
        for parameter in network.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return save_checkpoint(folder, network, {"seed": seed, "name": folder.name})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    lists = synthesize(folder / "data", 17, 3, (96, 128), progress=False)
    held = [*lists["val"], *lists["test"]]
    (folder / "data" / "held.txt").write_text("\n".join(held))
    (folder / "data" / "mixed.txt").write_text("\n".join([*lists["val"], lists["train"][1]]))
    save(folder / "a", 1)
    save(folder / "b", 2)
    return folder


def run(home, **options):
    options = {"split": "held", "weights": [home / "a"], "bootstrap": 50, **options}
    if "predictions" in options:
        options["weights"] = ()
    return evaluate(EvaluateConfig("mfnet", options.pop("root", home / "data"), **options))


@pytest.fixture(scope="module")
def direct(home):
    """What the network predicts, by a loop of our own: id -> (prediction, label)."""
    model = FusionSAM.from_pretrained(home / "a", "cpu")
    found = {}
    for sample in open_split("mfnet", home / "data", "held"):
        output = model.infer(sample.visible[None] / 255, sample.infrared[None] / 255)
        found[sample.id] = (output.logits.argmax(1)[0].numpy().astype(np.uint8), sample.label.numpy())
    return found


@pytest.fixture(scope="module")
def scored(home):
    return run(home, out=home / "scored").to_dict()


def write_predictions(folder, direct, form="ids"):
    folder.mkdir()
    palette = np.array(MFNET_PALETTE, np.uint8)
    for number, (id, (ids, _)) in enumerate(direct.items()):
        name = f"{id}_labels.png" if number % 2 else f"{id}.png"
        if form == "palette":
            image = Image.fromarray(ids, "P")
            image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
        elif form == "grey":
            image = Image.fromarray(np.repeat(ids[..., None], 3, axis=2))
        else:
            array = {"ids": ids, "rgb": palette[ids], "bgr": palette[ids][..., ::-1]}[form]
            image = Image.fromarray(np.ascontiguousarray(array))
        image.save(folder / name)
    return folder


def test_scores_equal_scikit_learn_and_torchmetrics_on_what_the_network_predicts(scored, direct):
    predicted = np.concatenate([ids.ravel() for ids, _ in direct.values()])
    truth = np.concatenate([label.ravel() for _, label in direct.values()])
    assert len(np.unique(predicted)) > 3  # or the comparison proves little
    np.testing.assert_array_equal(scored["confusion_matrix"], confusion_matrix(truth, predicted, labels=range(9)))
    theirs = multiclass_jaccard_index(torch.tensor(predicted).int(), torch.tensor(truth).int(), 9, average="none")
    present = np.isin(np.arange(9), truth)
    assert scored["miou"] == pytest.approx(100 * theirs.numpy()[present].mean(), abs=1e-4)
    assert scored["protocol"] == "present"
    assert scored["protocols"]["zero"]["miou"] == pytest.approx(100 * np.nan_to_num(theirs.numpy()).mean(), abs=1e-4)
    for index, name in enumerate(MFNET_CLASSES):
        if present[index]:
            assert scored["per_class_iou"][name] == pytest.approx(100 * float(theirs[index]), abs=1e-4)
    assert scored["pixel_accuracy"] == pytest.approx(100 * (predicted == truth).mean())


def test_report_file_holds_everything_and_its_images_add_up(home, scored):
    stored = json.loads((home / "scored" / "report.json").read_text())
    keys = """title miou per_class_iou per_class_accuracy per_class_f1 per_class_boundary_f protocol protocols interval
    prompts modality n_images confusion_matrix pixel_accuracy boundary_f ece weights weights_card commit command dataset
    split split_ids_sha256 multi_scale flip scales seconds by_time leak_guard per_image weights_sha256"""
    assert set(keys.split()) <= set(stored)
    assert (stored["prompts"], stored["n_images"], stored["multi_scale"], stored["flip"]) == ("self", 6, False, False)
    assert stored["interval"][0] <= stored["interval"][1]
    assert stored["leak_guard"]["checked"] == ["mfnet/train"]
    assert sum(part["n_images"] for part in stored["by_time"].values()) == 6
    for part in stored["by_time"].values():
        assert part["interval"][0] <= part["miou"] <= part["interval"][1]
    images = json.loads((home / "scored" / "per_image.json").read_text())
    total = np.zeros(81, np.int64)
    for cells, counts in images["images"].values():
        total[cells] += counts
    np.testing.assert_array_equal(total.reshape(9, 9), stored["confusion_matrix"])
    assert sorted(p.name for p in (home / "scored").iterdir()) == ["per_image.json", "report.json"]


def test_labels_are_known_by_the_pixels_of_each_class(home, scored):
    images = read_comparable(home / "scored", "mfnet", scored["split_ids_sha256"])[1]
    rows = zip(images.ids, images.dense().sum(2).tolist(), strict=True)
    lines = "".join(f"{id} {counts}\n" for id, counts in sorted(rows))
    assert scored["labels_sha256"] == hashlib.sha256(lines.encode()).hexdigest()


def test_changing_the_labels_changes_no_prediction_unless_the_prompts_are_oracles(home, tmp_path, monkeypatch):
    shutil.copytree(home / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "labels").iterdir():
        Image.fromarray((np.asarray(Image.open(path))[::-1] + 1) % 9).save(path)
    seen = []
    monkeypatch.setattr(
        Tally,
        "update",
        lambda self, id, ids, label, confidence: (
            seen.append(ids),
            self.images.add(id, self.confusion.update(ids, label)),
        ),
    )
    for prompts, equal in (("self", True), ("none", True), ("oracle", False)):
        seen.clear()
        run(home, prompts=prompts)
        run(home, prompts=prompts, root=tmp_path / "data")
        assert np.array_equal(np.stack(seen[:6]), np.stack(seen[6:])) == equal, prompts


@pytest.mark.parametrize("form", ["ids", "palette", "grey", "rgb", "bgr"])
def test_predictions_in_any_form_score_as_the_network_itself(home, scored, direct, tmp_path, form):
    folder = write_predictions(tmp_path / "p", direct, form)
    values = run(home, predictions=folder).to_dict()
    same = ("miou", "interval", "per_class_iou", "per_class_boundary_f", "confusion_matrix", "protocols", "by_time")
    assert {key: values[key] for key in same} == {key: scored[key] for key in same}
    assert values["prediction_format"] == (form if form in ("rgb", "bgr") else "ids")
    assert values["ece"] is None
    assert values["prompts"] is None


def test_form_is_decided_over_the_folder_and_asked_for_where_nothing_tells(direct, tmp_path):
    black = np.zeros((5, 7, 3), np.uint8)
    Image.fromarray(black).save(tmp_path / "1.png")
    assert PredictionFolder(tmp_path, ["1"], MFNET_PALETTE).format == "ids"  # every form reads the same
    bike = np.full((5, 7, 3), MFNET_PALETTE[3][::-1], np.uint8)
    Image.fromarray(bike).save(tmp_path / "2.png")
    found = PredictionFolder(tmp_path, ["1", "2"], MFNET_PALETTE)
    assert (found.format, int(found["1"].max()), int(found["2"].min())) == ("bgr", 0, 3)
    Image.fromarray(bike[..., ::-1].copy()).save(tmp_path / "3.png")
    with pytest.raises(InputError, match=r"3\.png: is in the form rgb, files before it in bgr"):
        PredictionFolder(tmp_path, ["1", "2", "3"], MFNET_PALETTE)
    # In PST900's palette red and blue are classes both, so that the order of channels cannot be seen.
    both = np.zeros((5, 7, 3), np.uint8)
    both[:, :3] = (255, 0, 0)
    Image.fromarray(both).save(tmp_path / "4.png")
    palette = find("pst900").palette
    with pytest.raises(InputError, match="--prediction-format"):
        PredictionFolder(tmp_path, ["4"], palette)
    assert int(PredictionFolder(tmp_path, ["4"], palette, "rgb")["4"].max()) == 3
    assert int(PredictionFolder(tmp_path, ["4"], palette, "bgr")["4"].max()) == 1
    both[0, 0] = (1, 2, 3)
    Image.fromarray(both).save(tmp_path / "5.png")
    with pytest.raises(InputError, match=r"5\.png: holds neither ids 0 to 4 nor"):
        PredictionFolder(tmp_path, ["5"], palette)
    shutil.copy(tmp_path / "1.png", tmp_path / "1.PNG")
    with pytest.raises(InputError, match=r"1\.png: has the same stem as 1\.PNG; keep one"):
        PredictionFolder(tmp_path, ["1"], palette)


def test_missing_and_extra_predictions_are_listed_and_refused(home, direct, tmp_path):
    folder = write_predictions(tmp_path / "p", direct)
    first = sorted(folder.iterdir())[0]
    first.rename(tmp_path / "away.png")
    with pytest.raises(InputError, match=f"1 predictions missing .*{first.stem.removesuffix('_labels')}"):
        run(home, predictions=folder)
    values = run(home, predictions=folder, allow_partial=True).to_dict()
    assert (values["n_images"], values["split_images"], values["missing"]) == (5, 6, 1)
    assert values["title"].startswith("PARTIAL (5 of 6 images)")
    (tmp_path / "away.png").rename(first)
    labels = next(folder.glob("*_labels.png"))
    for companion in ("fused", "overlay", "confidence"):  # what `fusionsam predict` writes beside it
        shutil.copy(labels, folder / labels.name.replace("_labels", f"_{companion}"))
    shutil.copy(first, folder / "stranger.png")
    with pytest.raises(InputError, match=r"1 predictions not in the split \(first: stranger\.png\)"):
        run(home, predictions=folder)
    assert run(home, predictions=folder, allow_partial=True).extra == 1


def test_a_prediction_of_another_size_is_refused(home, direct, tmp_path):
    folder = write_predictions(tmp_path / "p", direct)
    first = sorted(folder.iterdir())[0]
    Image.open(first).resize((64, 48)).save(first)
    with pytest.raises(InputError, match="48x64, its label is 96x128"):
        run(home, predictions=folder)


def test_oracle_reports_are_marked_and_never_compared(home, scored, tmp_path):
    report = run(home, prompts="oracle", out=tmp_path)
    assert report.title.startswith("ORACLE PROMPTS (upper bound, ground truth was used)")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["per_image_oracle.json", "report_oracle.json"]
    assert report.prompts == "oracle"
    renamed = shutil.copy(tmp_path / "report_oracle.json", tmp_path / "harmless.json")
    with pytest.raises(InputError, match="oracle"):
        run(home, against=renamed)
    with pytest.raises(InputError, match="oracle"):
        run(home, prompts="oracle", against=home / "scored" / "report.json")


def test_points_of_the_truth_that_name_their_class_need_steering_and_are_marked_too(home, tmp_path):
    with pytest.raises(InputError, match="have no steering"):
        run(home, prompts="named")
    taught = save(home / "taught", 1, steering=SteeringConfig(width=8))
    plain, named = (
        run(home, weights=[taught], prompts=prompts, out=tmp_path / str(prompts)) for prompts in (None, "named")
    )
    assert named.title.startswith("ORACLE PROMPTS (upper bound, ground truth was used)")
    assert "prompts named" in named.title
    assert named.from_truth
    assert named.miou > plain.miou  # the cells of the points have their class, whatever steering learned
    # untrained steering changes those cells alone
    assert plain.away is None
    assert named.away.miou == pytest.approx(named.away.miou_without)
    assert 5 < named.away.share < 99
    assert f"without these points {named.away.miou_without:.2f}" in str(named)
    stored = json.loads((tmp_path / "named" / "report_named.json").read_text())
    assert stored["away"]["per_class_iou"] == named.away.per_class_iou
    assert "away" not in json.loads((tmp_path / "None" / "report.json").read_text())
    other = save(home / "taught_too", 2, steering=SteeringConfig(width=8))
    two, second = (run(home, weights=which, prompts="named") for which in ([taught, other], [other]))
    assert two.away.miou == pytest.approx((named.away.miou + second.away.miou) / 2)
    with pytest.raises(InputError, match="oracle"):
        run(home, against=tmp_path / "named" / "report_named.json")
    with pytest.raises(InputError, match="prompts named: the ground truth was used"):
        run(home, weights=[taught], prompts="named", against=tmp_path / "None" / "report.json")


def test_reports_of_classes_in_another_order_are_not_compared(home, scored):
    split = json.loads((home / "scored" / "report.json").read_text())["split_ids_sha256"]
    swapped = [MFNET_CLASSES[index] for index in (0, 2, 1, *range(3, 9))]
    with pytest.raises(
        InputError, match=r"report\.json: its class 1 is 'car', here it is 'person'; compare reports of"
    ):
        read_comparable(home / "scored", "mfnet", split, swapped)
    assert read_comparable(home / "scored", "mfnet", split, MFNET_CLASSES)[0].miou is not None


def test_what_is_read_otherwise_than_in_training_is_told():
    config = EvaluateConfig("mfnet", "x", "val", weights=["tiny"])
    mapped = {"config": {"data": {"labels_map": {"255": 1}, "align": "rig.json"}}}
    told = read_otherwise(config, [mapped, mapped, {}])
    assert len(told) == 2
    assert told[0].startswith("the weights were trained with --labels-map 255:1, these labels were read without")
    assert told[1].endswith("these were read without --align")
    assert read_otherwise(replace(config, labels_map=["255:1"], align="rig.json"), [mapped]) == []


def test_against_itself_nothing_is_real_and_against_the_truth_everything(home, scored, direct, tmp_path):
    against = run(home, against=home / "scored").to_dict()["against"]
    assert (against["difference"], against["interval"], against["real"], against["n_common"]) == (0, [0, 0], False, 6)
    assert "not real" in against["words"]
    images = against["images"]
    assert (images["difference"], images["better"], images["worse"]) == (0, 0, 0)
    truth = {id: (label.astype(np.uint8), label) for id, (_, label) in direct.items()}
    values = run(home, predictions=write_predictions(tmp_path / "p", truth), against=home / "scored")
    report, values = values, values.to_dict()
    against = values["against"]
    assert values["miou"] == 100
    assert against["real"]
    assert against["difference"] == pytest.approx(100 - scored["miou"])
    assert against["per_class_iou"]["car"]["theirs"] == scored["per_class_iou"]["car"]
    assert "is real at 95 %" in str(report)
    alone = read_comparable(home / "scored", values["dataset"], values["split_ids_sha256"])[1].dense()
    own = [PROTOCOLS["present"](matrix).miou for matrix in alone]
    images = against["images"]
    assert images["miou"] == pytest.approx([100, np.mean(own)])
    assert images["better"] == sum(score < 100 for score in own)
    low, high = images["interval"]
    assert low < images["difference"] < high
    assert f"better on {images['better']} and worse on 0 of 6" in str(report)
    one = dict(list(truth.items())[:1])
    lone = run(
        home, predictions=write_predictions(tmp_path / "q", one), against=home / "scored", allow_partial=True
    ).to_dict()["against"]
    assert lone["n_common"] == 1
    assert not lone["real"]
    assert lone["words"].endswith("too few images to tell")


def test_a_report_of_other_pairs_is_not_lost_and_worst_pairs_are_of_the_report(home, scored, tmp_path):
    run(home, out=tmp_path, worst=2)
    assert len(list((tmp_path / "worst").glob("*.png"))) == 2
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(InputError, match=r"report\.json: is of mfnet/held .*, not of mfnet "):
        run(home, out=tmp_path, split="val")
    assert (tmp_path / "report.json").read_bytes() == before
    # the same ids may be of another site
    with pytest.raises(InputError, match=r"report\.json: is of pairs with the labels .*, not of pairs with the labels"):
        run(home, out=tmp_path, ignore=[0])
    assert (tmp_path / "report.json").read_bytes() == before
    (tmp_path / "worst" / "mine.txt").write_text("")
    run(home, out=tmp_path)
    assert [path.name for path in (tmp_path / "worst").iterdir()] == ["mine.txt"]


def test_a_training_split_that_is_asked_for_must_be_there(home):
    for options in ({}, {"split": "val"}):
        with pytest.raises(InputError, match=r"^--train-split 'tran': .*tran\.txt: no such list .* train"):
            run(home, train_split="tran", **options)


def test_images_without_a_label_make_no_difference_real():
    void, told = np.zeros((2, 2), int), np.array([[50, 0], [0, 50]])
    worse = np.array([[49, 1], [0, 50]])

    def images(first):
        kept = ImageMatrices(2)
        for number, matrix in enumerate([first, *[void] * 9]):
            kept.add(str(number), matrix)
        return kept

    found = compare(images(told), images(worse), ["a", "b"], "present", 200)
    assert (found.n_common, found.real) == (1, False)
    assert found.words.endswith("too few images to tell")
    both = np.stack([told, *[void] * 9]), np.stack([worse, *[void] * 9])
    assert paired_bootstrap(*both, "present", 200).p > 0.5  # a third of the draws tell nothing


def test_reports_of_other_images_or_labels_are_not_compared(home, scored, tmp_path):
    with pytest.raises(InputError, match="other images"):
        run(home, split="val", against=home / "scored")
    shutil.copytree(home / "data", tmp_path / "data")
    changed = next((tmp_path / "data" / "labels").glob(f"{(home / 'data' / 'val.txt').read_text().split()[0]}.png"))
    label = np.array(Image.open(changed))
    label[:9] = (label[:9] + 1) % 9
    Image.fromarray(label).save(changed)
    with pytest.raises(InputError, match="1 images were scored with other labels"):
        run(home, root=tmp_path / "data", against=home / "scored")
    shutil.copytree(home / "scored", tmp_path / "scored")
    (tmp_path / "scored" / "per_image.json").unlink()
    with pytest.raises(InputError, match=r"per_image\.json: no such file"):
        run(home, against=tmp_path / "scored")


def test_day_and_night_agree_with_evaluations_of_the_day_and_night_lists(home):
    whole = run(home, split="val").to_dict()
    for name in ("day", "night"):
        part = run(home, split=f"val_{name}").to_dict()
        for key in ("miou", "per_class_iou", "n_images"):
            assert whole["by_time"][name][key] == part[key]


def test_leak_guard_refuses_pictures_of_the_training_split(home, tmp_path):
    with pytest.raises(InputError, match=r"1 of its 4 pictures are in the training split.*\(id\)"):
        run(home, split="mixed")
    report = run(home, split="mixed", **{LEAK: True})
    assert report.title.startswith("TRAIN-TEST LEAK (1 pictures")
    with pytest.raises(InputError, match="training split"):
        run(home, split="train")
    data = shutil.copytree(home / "data", tmp_path / "data")
    source, target = ((data / f"{s}.txt").read_text().split()[0] for s in ("train", "val"))
    Image.fromarray(np.asarray(Image.open(data / "images" / f"{source}.png"))[:, ::-1].copy()).save(
        data / "images" / f"{target}.png"
    )
    with pytest.raises(InputError, match="mirrored"):
        run(home, root=data)
    (data / "train.txt").unlink()
    values = run(home, root=data).to_dict()
    assert values["leak_guard"]["checked"] == []
    assert "not compared" in values["notes"][0]


def test_leak_guard_knows_what_the_weights_saw_where_no_training_list_is(home, tmp_path):
    data = shutil.copytree(home / "data", tmp_path / "data")
    weights = shutil.copytree(home / "a", tmp_path / "weights")
    of_training(open_split("mfnet", data, "train")).write(weights)
    rows = json.loads((weights / "training_fingerprints.json").read_text())
    assert len(rows) == len((data / "train.txt").read_text().split())
    assert all(len(json.dumps(row)) < 400 for row in rows)  # hashes, nothing a picture could be made of
    source, target = ((data / f"{s}.txt").read_text().split()[0] for s in ("train", "val"))
    (data / "train.txt").unlink()
    guard = run(home, root=data, weights=[weights]).to_dict()["leak_guard"]
    assert (guard["checked"], guard["leaks"]) == (["weights (fingerprints)"], 0)
    seen, image = np.asarray(Image.open(data / "images" / f"{source}.png")), data / "images" / f"{target}.png"
    for kind, picture in {"content": seen, "mirrored": seen[:, ::-1]}.items():
        Image.fromarray(picture.copy()).save(image)
        with pytest.raises(InputError, match=rf"1 of its 6 pictures .*pair 1 = held/{target} \({kind}\)"):
            run(home, root=data, weights=[weights])
    # the border cut off, and mirrored besides: a look-alike, as the guard by lists says too
    cut = Image.fromarray(seen[5:-5, 6:-6][:, ::-1].copy()).resize((128, 96), Image.Resampling.BICUBIC)
    cut.save(image)
    values = run(home, root=data, weights=[weights]).to_dict()
    assert values["leak_guard"]["look_alikes"] >= 1
    assert any(f"pair 1 = held/{target} (perceptual" in note for note in values["notes"])
    (weights / "training_fingerprints.json").write_text('[{"content": [1, 2]}]')
    with pytest.raises(InputError, match=r"training_fingerprints\.json: damaged"):
        run(home, root=data, weights=[weights])


def test_each_of_several_weights_that_nothing_tells_of_is_noted(home, tmp_path):
    data = shutil.copytree(home / "data", tmp_path / "data")
    (data / "train.txt").rename(data / "learnt.txt")
    known, listed, unknown = (tmp_path / name for name in ("known", "listed", "unknown"))
    for folder, split in ((known, "gone"), (listed, "learnt"), (unknown, "gone")):
        shutil.copytree(home / "a", folder)
        (folder / "training.json").write_text(json.dumps({"data": {"dataset": "mfnet", "train_split": split}}))
    of_training(open_split("mfnet", data, "learnt")).write(known)
    notes = run(home, root=data, weights=[known, listed, unknown], bootstrap=0).notes
    (note,) = [note for note in notes if "not compared" in note]
    assert "mfnet/gone" in note
    assert f"nor are fingerprints in {unknown}, so it was not compared" in note
    assert not any("not compared" in note for note in run(home, root=data, weights=[known, listed], bootstrap=0).notes)


def test_without_a_training_list_the_title_says_so_and_what_the_weights_remember_still_counts(
    home, tmp_path, monkeypatch
):
    monkeypatch.setitem(evaluation.TEST_IMAGES, "mfnet", 3)
    monkeypatch.setitem(evaluation.SINCE, "mfnet", [PublishedScore("Someone", 61.5, "nine classes")])
    report = run(home, split="test", train_split="none")
    assert report.title.startswith("LEAK GUARD OFF")
    assert "published" not in report.to_dict()
    weights = shutil.copytree(home / "a", tmp_path / "weights")
    of_training(open_split("mfnet", home / "data", "val")).write(weights)
    for seen in ({"weights": [weights]}, {"predictions": tmp_path / "maps", "predicted_by": weights}):
        if "predictions" in seen:
            for id in (home / "data" / "held.txt").read_text().split():
                write_png(tmp_path / "maps" / f"{id}.png", np.zeros((96, 128), np.uint8))
        with pytest.raises(InputError, match=r"3 of its 6 pictures are in the training split"):
            run(home, train_split="none", **seen)
    assert run(home, predictions=tmp_path / "maps").leak_guard.leaks == 0


def test_label_maps_prompted_by_the_truth_are_known_by_the_file_beside_them(home, scored, tmp_path, monkeypatch):
    for id in (home / "data" / "held.txt").read_text().split():
        write_png(tmp_path / "run" / "predictions" / f"{id}.png", np.zeros((96, 128), np.uint8))
    folder, settings = tmp_path / "run" / "predictions", tmp_path / "run" / "settings.json"
    for text, oracle in (("{}", False), ("[]", False), ('{"prompts": "self"}', False), ('{"prompts": "oracle"}', True)):
        settings.write_text(text)
        report = run(home, predictions=folder, out=tmp_path / "out")
        assert report.title.startswith("ORACLE") == oracle
    assert (tmp_path / "out" / "report_oracle.json").exists()
    monkeypatch.chdir(folder)
    assert run(home, predictions=".").title.startswith("ORACLE")
    run(home, out=tmp_path / "ours")
    with pytest.raises(InputError, match=r"prompted by the ground truth .* leave out --against"):
        run(home, predictions=folder, against=tmp_path / "ours")


def test_flip_makes_the_prediction_of_a_mirrored_pair_the_mirrored_prediction(home, tmp_path):
    data = shutil.copytree(home / "data", tmp_path / "data")
    id = (data / "val.txt").read_text().split()[0]
    (data / "one.txt").write_text(id)
    (data / "mirror.txt").write_text(f"{id}_flip")
    matrices = {
        (split, flip): run(home, root=data, split=split, flip=flip).confusion_matrix
        for split in ("one", "mirror")
        for flip in (True, False)
    }
    assert matrices["one", True] == matrices["mirror", True]
    assert matrices["one", False] != matrices["mirror", False]


def test_scales_average_probabilities_of_resized_pairs(home, tmp_path):
    report = run(home, split="val", scales=(0.75, 1.0))
    assert report.multi_scale
    assert "scales 0.75, 1" in report.title
    model = FusionSAM.from_pretrained(home / "a", "cpu")
    expected = np.zeros((9, 9), np.int64)
    for sample in open_split("mfnet", home / "data", "val"):
        pair = [sample.visible[None] / 255, sample.infrared[None] / 255]
        small = [F.interpolate(x, (72, 96), mode="bilinear", align_corners=False, antialias=True) for x in pair]
        one, two = model.infer(*small).logits, model.infer(*pair).logits
        both = F.interpolate(one, (96, 128), mode="bilinear", align_corners=False).softmax(1) + two.softmax(1)
        expected += confusion_matrix(sample.label.flatten(), both.argmax(1).flatten(), labels=range(9))
    np.testing.assert_array_equal(report.confusion_matrix, expected)


def test_one_modality_is_all_the_network_sees(home, tmp_path, scored):
    data = shutil.copytree(home / "data", tmp_path / "data")
    for path in (data / "images").iterdir():
        array = np.array(Image.open(path))
        array[..., 3] = np.arange(128)
        Image.fromarray(array).save(path)
    options = {"modality": "visible", "train_split": "none"}
    one, two = (run(home, root=root, **options).to_dict() for root in (home / "data", data))
    assert one["confusion_matrix"] == two["confusion_matrix"] != scored["confusion_matrix"]


def test_a_pair_without_the_wanted_image_is_named_before_anything_is_predicted(home, monkeypatch):
    def opened(config):
        data = open_labelled(config)
        data.entries[-1] = replace(data.entries[-1], rgbt=None, infrared=data.entries[-1].rgbt)
        return data

    open_labelled = evaluation.open_labelled
    monkeypatch.setattr(evaluation, "open_labelled", opened)
    monkeypatch.setattr(evaluation, "_run", lambda *_: pytest.fail("predicted"))
    with pytest.raises(InputError, match="has no visible image, but --modality visible asks for it; leave it off"):
        run(home, modality="visible")


def test_the_report_tells_the_precision(home, scored):
    report = run(home, precision="bf16")
    assert report.precision == "bf16"
    assert ", bf16" in report.title
    assert scored["precision"] == "fp32"
    assert abs(report.miou - scored["miou"]) < 5
    with pytest.raises(InputError, match="--precision need --weights"):
        run(home, predictions=home, precision="bf16")


def test_several_checkpoints_give_mean_and_sample_deviation(home, scored, tmp_path):
    report = run(home, weights=[home / "a", home / "b"], seeds=True, out=tmp_path)
    other = run(home, weights=[home / "b"]).to_dict()
    values = report.to_dict()
    assert values["miou"] == pytest.approx((scored["miou"] + other["miou"]) / 2)
    assert values["miou_deviation"] == pytest.approx(abs(scored["miou"] - other["miou"]) / 2**0.5)
    assert values["per_class_iou"]["car"] == pytest.approx(
        (scored["per_class_iou"]["car"] + other["per_class_iou"]["car"]) / 2
    )
    assert [one["miou"] for one in values["checkpoints"]] == [scored["miou"], other["miou"]]
    assert json.loads((tmp_path / "checkpoint_2" / "report.json").read_text())["miou"] == other["miou"]
    with pytest.raises(InputError, match="summary over checkpoints"):
        run(home, against=tmp_path)
    first = (tmp_path / "checkpoint_1" / "report.json").read_bytes()
    (tmp_path / "report.json").unlink()  # of those of single checkpoints each is looked at
    with pytest.raises(InputError, match=r"checkpoint_1/report\.json: is of mfnet/held .*, not of mfnet "):
        run(home, weights=[home / "a", home / "b"], split="val", out=tmp_path)
    assert (tmp_path / "checkpoint_1" / "report.json").read_bytes() == first
    with pytest.raises(InputError, match=r"seeds \[1, 1\]"):
        run(home, weights=[home / "a", home / "a"], seeds=True)


def test_a_setting_that_json_cannot_say_is_spelt(home, tmp_path):
    weights = Path(shutil.copytree(home / "a", tmp_path / "endless"))
    (weights / "training.json").write_text('{"config": {"train": {"gradient_clip": Infinity}}}')
    run(home, weights=[weights], out=tmp_path / "out")
    card = json.loads((tmp_path / "out" / "report.json").read_text())["weights_card"]
    assert card["config"]["train"]["gradient_clip"] == "Infinity"


def test_published_rows_stand_only_beside_the_whole_official_test_split(home, monkeypatch):
    monkeypatch.setitem(evaluation.TEST_IMAGES, "mfnet", 3)
    monkeypatch.setitem(evaluation.SINCE, "mfnet", [PublishedScore("Someone", 61.5, "nine classes")])
    assert run(home, split="test").published[0].method == "Someone"
    assert "61.5  Someone (nine classes)" in str(run(home, split="test"))
    for options in ({"split": "val"}, {"split": "test", "prompts": "oracle"}, {"split": "test_day"}):
        assert run(home, **options).published is None


def test_labels_read_otherwise_and_other_classes_are_told_and_not_official(home, tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation.TEST_IMAGES, "mfnet", 3)
    monkeypatch.setitem(evaluation.SINCE, "mfnet", [PublishedScore("Someone", 61.5, "nine classes")])
    mapped = run(home, split="test", ignore=[0], labels_map=["7:2"])
    assert (mapped.labels_map, mapped.other_classes) == ({"0": 255, "7": 2}, False)
    assert "labels 0 left out and 7 as 2" in mapped.title
    classes = tmp_path / "classes.yaml"
    classes.write_text(yaml.safe_dump({"classes": list("abcdefghi"), "palette": [list(c) for c in MFNET_PALETTE]}))
    for id in (home / "data" / "test.txt").read_text().split():
        write_png(tmp_path / "maps" / f"{id}.png", np.zeros((96, 128), np.uint8))
    renamed = run(home, split="test", predictions=tmp_path / "maps", class_file=classes)
    assert "classes of a class file" in renamed.title
    for report in (mapped, renamed):
        assert report.published is None
        assert Report.from_dict(report.to_dict()).relabelled == report.relabelled != []
    assert "labels_map" not in run(home, split="test").to_dict()


def test_what_was_guessed_of_infrared_files_is_in_the_report_and_the_table(home, tmp_path, capsys):
    root = tmp_path / "pairs"
    for index in range(2):
        scene = draw_scene(4, index, (64, 80))
        write_png(root / "visible" / f"{index}.png", scene.visible)
        write_png(root / "infrared" / f"{index}.png", scene.infrared // 8 + 60)  # few grey values
        write_png(root / "labels" / f"{index}.png", scene.label.to(torch.uint8))
    classes = root / "classes.yaml"
    classes.write_text(yaml.safe_dump({"classes": list(MFNET_CLASSES), "palette": [list(c) for c in MFNET_PALETTE]}))
    told = "input files: low contrast: 2 of 2 pairs"
    asked = ["--weights", home / "a", "--dataset", "pairs", "--root", root, "--split", "all", "--class-file", classes]
    for command, name in (("evaluate", "report"), ("robustness", "robustness")):
        out = tmp_path / command
        more = ["--conditions", "fog"] if command == "robustness" else []
        given = [*asked, "--train-split", "none"] if command == "evaluate" else asked
        assert cli([command, *map(str, [*given, *more, "--bootstrap", "0", "--out", out])]) == 0
        said = capsys.readouterr()
        assert said.err.count("0: the infrared picture uses the grey values") == 1
        assert "low contrast: 2 of 2 pairs; `fusionsam data check` lists them" in said.err
        assert told in said.out
        assert told in json.loads((out / f"{name}.json").read_text())["notes"]


def test_bad_input_is_refused_by_name(home, tmp_path):
    few = save(tmp_path / "few", 0, classes=["a", "b"], palette=[(0, 0, 0), (1, 1, 1)], foreground=[1])
    with pytest.raises(InputError, match="2 classes, data set mfnet has 9"):
        run(home, weights=[few])
    other = save(tmp_path / "other", 0, classes=[*MFNET_CLASSES[:2], "bike", "person", *MFNET_CLASSES[4:]])
    with pytest.raises(InputError, match="class 2 is 'bike', in data set mfnet it is 'person'"):
        run(home, weights=[other])
    (home / "data" / "nothing.txt").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        run(home, split="nothing")
    with pytest.raises(InputError, match="either --weights or --predictions"):
        run(home, weights=())
    for options in ({"seed": -1}, {"scales": (float("nan"),)}):
        with pytest.raises(InputError, match="expected finite factors and a seed of at least 0"):
            run(home, **options)
    with pytest.raises(InputError, match=r"--align, .* need --weights; leave them out"):
        run(home, predictions=home, align="auto")
    with pytest.raises(InputError, match="leave it out without them"):
        run(home, predicted_by=home / "a")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(home, out=blocked / "out")
    for kind, channels in (("visible", 3), ("infrared", 1)):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
        Image.fromarray(np.zeros((64, 64, channels), np.uint8).squeeze()).save(tmp_path / "pairs" / kind / "lonely.png")
    classes = tmp_path / "classes.yaml"
    classes.write_text(yaml.safe_dump({"classes": list(MFNET_CLASSES), "palette": [list(c) for c in MFNET_PALETTE]}))
    config = EvaluateConfig("pairs", tmp_path / "pairs", "all", weights=[home / "a"], class_file=classes)
    with pytest.raises(InputError, match="1 pairs of split 'all' have no label \\(first: lonely\\)"):
        evaluate(config)


def test_interrupted_evaluation_leaves_no_half_files(home, scored, tmp_path, monkeypatch):
    update, calls = Tally.update, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(self, *arguments)

    monkeypatch.setattr(Tally, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(home, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    shutil.copytree(home / "scored", tmp_path / "old")
    before = (tmp_path / "old" / "report.json").read_text()

    def stop_replace(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop_replace)
    with pytest.raises(KeyboardInterrupt):
        run(home, weights=[home / "b"], out=tmp_path / "old")
    assert (tmp_path / "old" / "report.json").read_text() == before
    assert len(list((tmp_path / "old").iterdir())) == 2


def test_each_of_several_weights_is_loaded_once(home, monkeypatch):
    loaded, plain = [], FusionSAM.from_pretrained

    def counted(source, *arguments, **options):
        loaded.append(source)
        return plain(source, *arguments, **options)

    monkeypatch.setattr(FusionSAM, "from_pretrained", counted)
    run(home, weights=[home / "a", home / "b"], bootstrap=0)
    assert loaded == [home / "a", home / "b"]


def test_the_command_prints_the_table(home, tmp_path, capsys):
    needed = ["--dataset", "mfnet", "--root", str(home / "data"), "--weights", str(home / "a"), "--out", str(tmp_path)]
    assert cli(["evaluate", *needed, "--split", "held", "--prompts", "none", "--bootstrap", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["command"].startswith("fusionsam evaluate --dataset mfnet")
    row = next(line.split() for line in lines if line.startswith("car "))
    assert row[1] == f"{values['per_class_iou']['car']:.2f}"
    assert sum("<- headline" in line for line in lines) == 1
    assert "prompts none" in lines[0]
