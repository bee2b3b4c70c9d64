"""A report as fields: the JSON on disk stays as it was, sequences and shared classes say what they should."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fusionsam.data.sequences import recording_sequences
from fusionsam.data.splits import Entry, entries
from fusionsam.errors import InputError
from fusionsam.evaluation.comparison import by_sequence, compare
from fusionsam.evaluation.report import Report
from fusionsam.evaluation.report_files import read, read_comparable, write
from fusionsam.evaluation.report_parts import Baseline, LeakFindings, shared_mean
from fusionsam.evaluation.tally import Tally, scores, summarise
from fusionsam.metrics.segmentation import ImageMatrices, bootstrap_miou

CLASSES = ("ground", "car", "person")


def tally_of(ids, seed=0, classes=CLASSES, wrong=0.3, paint=None):
    """Random label maps; `paint` names the classes that the labels of an id hold."""
    tally, rng = Tally(classes), np.random.default_rng(seed)
    for number, id in enumerate(ids):
        truth = np.random.default_rng(100 + number)
        label = truth.choice((paint or {}).get(id, range(len(classes))), (11, 13))
        other = rng.integers(0, len(classes), label.shape)
        tally.update(id, np.where(rng.random(label.shape) < wrong, other, label), label)
    return tally


def report_of(tally, dataset="mfnet", sequences=None, **more):
    found = scores(tally, dataset, 40, 0, sequences)
    known = {"title": "t", "dataset": dataset, "split_ids_sha256": "x", "fitted": {"class_offsets": 0}, "weights": "w"}
    return Report(**vars(found), **{**known, **more})


IDS = ["00001D", "00003D", "00020D", "00020N"]


def test_what_is_written_is_read_back_and_keys_of_other_versions_are_kept(tmp_path):
    tally = tally_of(IDS)
    full = report_of(
        tally,
        sequences=recording_sequences([Entry(i) for i in IDS]),
        leak_guard=LeakFindings(["mfnet/train"], False, 2, {"content": 2}, 1),
        baseline=Baseline("sam", "fused", "self", "majority", 10),
        against=compare(tally.images, tally_of(IDS, 1).images, CLASSES, "present", 20, title="them"),
        notes=["a"],
        align={"rig": "r", "by": "auto", "refine": True},
    )
    path = write(tmp_path, full, tally.images)
    stored = json.loads(path.read_text()) | {"of_the_future": [1, {"a": None}]}
    again = Report.from_dict(stored)
    assert again.to_dict() == stored
    assert (again.leak_guard.leaks, again.baseline.image, again.against.per_class_iou["car"].theirs) == (
        2, "fused", full.against.per_class_iou["car"].theirs,
    )  # fmt: skip
    assert again.by_time["night"].n_images == 1
    assert read_comparable(path, "mfnet", "x")[1].ids == IDS
    old = {
        name: value for name, value in stored.items() if name not in ("fitted", "as_trained", "notes", "by_sequence")
    }
    assert Report.from_dict({**old, "notes": None}).notes == []
    assert str(again) == str(full)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"miou": "60"}, "miou: found '60', expected a number or null"),
        ({"classes": ["a"]}, "classes: .* expected the classes of per_class_iou"),
        ({"confusion_matrix": [[1]]}, "confusion_matrix: .* expected a square of counts"),
        ({"interval": [1]}, "interval: .* expected two numbers"),
        ({"notes": "text"}, "notes: .* expected a list of sentences"),
    ],
)
def test_a_key_of_another_form_is_named(tmp_path, change, words):
    values = report_of(tally_of(IDS)).to_dict() | change
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"report\.json: {words}"):
        read(tmp_path)


def test_pandas_has_the_classes_in_order():
    pandas = pytest.importorskip("pandas")
    report = report_of(tally_of(IDS))
    frame = report.to_pandas()
    assert list(frame.index) == list(CLASSES)
    assert frame.loc["car", "IoU"] == report.per_class_iou["car"]
    assert pandas.api.types.is_float_dtype(frame["boundary F"])
    assert frame.attrs["miou"] == report.miou


def test_frames_closer_than_six_are_of_one_sequence_and_day_never_of_night(tmp_path):
    ids = ["00006D", "00001D", "00012D", "00007N", "00012D_flip", "other"]
    found = recording_sequences([Entry(i) for i in ids])
    assert found == {
        "00006D": "00001D",
        "00001D": "00001D",
        "00012D": "00012D",
        "00007N": "00007N",
        "00012D_flip": "00012D",
    }
    chain = [f"{number:05d}N" for number in range(3, 60, 5)]
    assert set(recording_sequences([Entry(i) for i in chain]).values()) == {"00003N"}
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    (tmp_path / "m.csv").write_text("visible,sequence\na.png,drive 7\nb.png,\n")
    told = entries("manifest", tmp_path / "m.csv", "all")
    assert recording_sequences(told) == {"a": "drive 7"}


def test_sequences_are_resampled_whole():
    """An interval over sequences is that of their summed matrices, and is None where an image has no sequence."""
    ids = [f"{number:05d}D" for number in (1, 2, 3, 40, 41, 80)]
    tally = tally_of(ids)
    sequences = recording_sequences([Entry(i) for i in ids])
    found = scores(tally, "mfnet", 60, 3, sequences)
    stack = np.stack(
        [
            tally.images.dense([i for i in ids if sequences[i] == name]).sum(0)
            for name in dict.fromkeys(sequences.values())
        ]
    )
    assert found.by_sequence.n_sequences == 3
    assert found.by_sequence.interval == list(bootstrap_miou(stack, "present", 60, 3))
    np.testing.assert_array_equal(by_sequence(tally.images.dense(), [sequences[i] for i in ids]), stack)
    assert scores(tally, "mfnet", 60, 3, {ids[0]: "a"}).by_sequence is None
    assert "3 recording sequences" in str(report_of(tally, sequences=sequences))


def test_one_image_and_one_recording_have_no_interval_and_the_report_says_so():
    """Resamples of one thing are all alike: an interval of no width would promise what nobody knows."""
    ids = ["00001D", "00002D"]
    sequences = recording_sequences([Entry(i) for i in ids])
    two, one = (report_of(tally_of(ids[:count]), sequences=sequences) for count in (2, 1))
    assert two.interval[0] < two.interval[1]
    assert (two.by_sequence.n_sequences, two.by_sequence.interval) == (1, None)
    assert "(none over recording sequences: they are of one)" in str(two)
    assert (one.interval, one.by_time["day"].interval) == (None, None)
    assert "<- headline, no interval: one image\n" in str(one)
    assert Report.from_dict(one.to_dict()).to_dict() == one.to_dict()


def test_fmb_with_other_classes_is_scored_as_any_data_set():
    found = scores(tally_of(IDS), "fmb", 0)
    assert (found.protocol, set(found.protocols)) == ("present", {"present", "nan", "zero"})


def test_a_difference_of_one_recording_is_not_taken_for_many():
    """Forty frames of one recording all speak for us: over images that is real, over sequences nobody can tell."""
    good, bad = np.array([[50, 0], [0, 50]]), np.array([[40, 10], [10, 40]])
    ours, theirs = ImageMatrices(2), ImageMatrices(2)
    for number in range(40):
        ours.add(f"{number:05d}D", good)
        theirs.add(f"{number:05d}D", bad)
    sequences = recording_sequences([Entry(i) for i in ours.ids])
    found = compare(ours, theirs, ["a", "b"], "present", 200, sequences=sequences)
    assert found.real
    assert (found.by_sequence.n_sequences, found.by_sequence.real) == (1, False)
    assert found.by_sequence.words.endswith("too few sequences to tell")
    apart = {i: i for i in ours.ids}
    assert compare(ours, theirs, ["a", "b"], "present", 200, sequences=apart).by_sequence.real
    assert compare(ours, theirs, ["a", "b"], "present", 200).by_sequence is None


def test_where_classes_differ_the_mean_over_those_that_both_have_is_told():
    one, two = {"car": 80.0, "person": 60.0, "bike": 10.0}, {"car": 70.0, "person": None, "bike": 30.0}
    assert shared_mean([(["car", "person", "bike"], one), (["car", "bike"], two)]) == (["car", "bike"], [45.0, 50.0])
    assert shared_mean([(["car"], one), (["car"], two)]) is None
    assert shared_mean([(["person"], one), (["car"], two)]) is None
    paint = {"00001D": [0, 1], "00020N": [0, 1, 2]}
    report = report_of(tally_of(paint, paint=paint))
    day, night = report.by_time["day"], report.by_time["night"]
    assert (day.classes, night.classes) == (["ground", "car"], list(CLASSES))
    means = [np.mean([part.per_class_iou[name] for name in day.classes]) for part in (day, night)]
    assert f"over the 2 classes that both have: day {means[0]:.2f}, night {means[1]:.2f}" in str(report)


def test_a_summary_has_the_mean_and_forgets_what_is_of_one_checkpoint():
    both = [
        report_of(tally_of(IDS, seed), weights=f"w{seed}", weights_sha256=str(seed), prompts="self") for seed in (1, 2)
    ]
    before = both[0].to_dict()
    found = summarise(both)
    assert found.miou == pytest.approx((both[0].miou + both[1].miou) / 2)
    assert found.miou_deviation == pytest.approx(abs(both[0].miou - both[1].miou) / 2**0.5)
    assert found.by_time["day"].miou == pytest.approx(np.mean([one.by_time["day"].miou for one in both]))
    assert (found.interval, found.weights_sha256, found.weights) == (None, None, ["w1", "w2"])
    assert [one.weights_sha256 for one in found.checkpoints] == ["1", "2"]
    assert both[0].to_dict() == before
    assert Report.from_dict(found.to_dict()).to_dict() == found.to_dict()
