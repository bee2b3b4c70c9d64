from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_jaccard_index

from fusionsam.config.datasets import find
from fusionsam.errors import InputError
from fusionsam.metrics import boundary
from fusionsam.metrics import segmentation as metrics
from fusionsam.metrics.boundary import BoundaryScore
from fusionsam.metrics.segmentation import (
    PROTOCOLS,
    CalibrationError,
    ConfusionMatrix,
    ImageMatrices,
    id_pair,
)


@st.composite
def maps(draw, classes=None):
    """A label with absent classes and ignored pixels, and a prediction with its own absent classes."""
    k = classes or draw(st.integers(2, 11))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    in_label = draw(st.sets(st.integers(0, k - 1), min_size=1))
    in_prediction = draw(st.sets(st.integers(0, k - 1), min_size=1))
    label = rng.choice(sorted(in_label), size=(7, 13))
    prediction = rng.choice(sorted(in_prediction), size=(7, 13))
    agree = rng.random((7, 13)) < 0.6
    prediction[agree] = label[agree]
    label[rng.random((7, 13)) < draw(st.sampled_from([0.0, 0.3]))] = 255
    label[0, 0] = min(in_label)
    return k, prediction.astype(np.uint8), label.astype(np.uint8)


def slow_miou(prediction, label, ids, absent, ignored=()):
    """Pixel sets instead of matrices: nothing shared with the code under test."""
    truth = {p: int(v) for p, v in np.ndenumerate(label) if v != 255 and v not in ignored}
    values = []
    for c in ids:
        t = {p for p, v in truth.items() if v == c}
        m = {p for p in truth if prediction[p] == c}
        if t | m and not (absent == "present" and not t):
            values.append(len(t & m) / len(t | m))
        elif absent == "zero":
            values.append(0.0)
    return 100 * sum(values) / len(values) if values else math.nan


@given(maps())
@settings(max_examples=60, deadline=None)
def test_matrix_equals_scikit_learn_and_jaccard_equals_torchmetrics(case):
    k, prediction, label = case
    counts = ConfusionMatrix(k)
    counts.update(prediction, torch.from_numpy(label))
    valid = label != 255
    y, p = label[valid], prediction[valid]
    np.testing.assert_array_equal(counts.matrix, confusion_matrix(y, p, labels=list(range(k))))
    wide = ConfusionMatrix(k + 11)  # more cells than a byte can number
    wide.update(prediction.astype(np.int64), label.astype(np.int64))
    np.testing.assert_array_equal(wide.matrix[:k, :k], counts.matrix)
    ours = np.nan_to_num(metrics.iou(counts.matrix))
    theirs = multiclass_jaccard_index(
        torch.from_numpy(prediction).long(), torch.from_numpy(label).long(), k, average="none", ignore_index=255
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    options = {"labels": list(range(k)), "average": None, "zero_division": np.nan}
    np.testing.assert_allclose(metrics.accuracy(counts.matrix), recall_score(y, p, **options))
    np.testing.assert_allclose(metrics.precision(counts.matrix), precision_score(y, p, **options))
    np.testing.assert_allclose(metrics.f1(counts.matrix), f1_score(y, p, **options))
    assert metrics.pixel_accuracy(counts.matrix) == pytest.approx((y == p).mean())


@given(maps())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("name", ["present", "nan", "zero"])
def test_general_protocols_equal_a_slow_reimplementation(name, case):
    k, prediction, label = case
    matrix = ConfusionMatrix(k).update(prediction, label)
    score = PROTOCOLS[name](matrix)
    assert score.miou == pytest.approx(slow_miou(prediction, label, range(k), name), nan_ok=True)
    assert PROTOCOLS[name].many(matrix[None])[0] == pytest.approx(score.miou, nan_ok=True)


@given(maps(classes=15))
@settings(max_examples=60, deadline=None)
def test_fmb_protocols_equal_a_slow_reimplementation(case):
    _, prediction, label = case
    matrix = ConfusionMatrix(15).update(prediction, label)
    every = set(range(15))
    expected = {
        "15-nan": slow_miou(prediction, label, every, "nan"),
        "15-zero": slow_miou(prediction, label, every, "zero"),
        "14-zero": slow_miou(prediction, label, every - {0}, "zero", ignored=(0,)),
        "13": slow_miou(prediction, label, every - {0, 13}, "nan", ignored=(0, 13)),
        "14-present": slow_miou(prediction, label, every - {13}, "present"),
    }
    assert set(metrics.protocols_of("fmb", find("fmb").classes)) == set(expected)
    for name, value in expected.items():
        assert PROTOCOLS[name](matrix).miou == pytest.approx(value, nan_ok=True), name


def test_protocols_on_a_worked_case():
    # Truth: 4 x id 0, 4 x id 1, id 2 absent. One pixel of id 0 is predicted as 1, one of id 1 as 2.
    matrix = np.array([[3, 1, 0], [0, 3, 1], [0, 0, 0]])
    assert PROTOCOLS["present"](matrix) == (pytest.approx(100 * (3 / 4 + 3 / 5) / 2), (0, 1))
    assert PROTOCOLS["nan"](matrix) == (pytest.approx(100 * (3 / 4 + 3 / 5) / 3), (0, 1, 2))
    without_stray = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert PROTOCOLS["nan"](without_stray) == (pytest.approx(100 * (3 / 4 + 4 / 5) / 2), (0, 1))
    assert PROTOCOLS["zero"](without_stray) == (pytest.approx(100 * (3 / 4 + 4 / 5) / 3), (0, 1, 2))


def test_negative_ids_of_one_byte_are_not_taken_for_255():
    label = np.array([[1, -1], [0, 2]], np.int8)
    assert id_pair(np.zeros((2, 2), np.uint8), label)[1].min() == -1


def test_ignored_truth_is_no_false_positive_but_an_ignored_prediction_is_a_miss():
    matrix = np.zeros((15, 15), int)
    matrix[0, 9] = 50  # unlabeled pixels called car
    matrix[9, 9] = 6
    matrix[9, 0] = 2  # car pixels called unlabeled
    assert PROTOCOLS["13"](matrix) == (pytest.approx(75.0), (9,))
    assert PROTOCOLS["14-zero"](matrix) == (pytest.approx(75.0 / 14), tuple(range(1, 15)))
    assert PROTOCOLS["14-present"](matrix) == (pytest.approx(100 * (0 + 6 / 58) / 2), (0, 9))


def test_headline_is_a_protocol_of_the_data_set_and_all_agree_when_every_class_occurs():
    rng = np.random.default_rng(0)
    matrix = rng.integers(1, 50, (15, 15))
    fmb = find("fmb").classes
    for dataset, classes in (("mfnet", find("mfnet").classes), ("fmb", fmb), ("fmb", ["a", "b"]), ("fmb", fmb[::-1])):
        for complete in (False, True):
            known = metrics.protocols_of(dataset, classes)
            assert metrics.headline(dataset, classes, [complete] * len(classes)) in known
            assert ("present" in known) == (classes is not fmb)  # FMB's protocols are of its own classes
    bicycle, truck = 13, 10
    assert metrics.headline("fmb", fmb, [i != bicycle for i in range(15)]) == "14-present"
    # a class that occurs is never left out, though another one is absent
    assert metrics.headline("fmb", fmb, [i != truck for i in range(15)]) == "15-nan"
    values = {PROTOCOLS[n](matrix).miou for n in ("present", "nan", "zero", "15-nan", "15-zero")}
    assert max(values) - min(values) < 1e-9
    with pytest.raises(InputError, match="choose a protocol"):
        PROTOCOLS["13"](matrix[:9, :9])


@given(st.lists(maps(classes=5), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None)
def test_streaming_in_parts_equals_one_pass(cases):
    whole, left, right = ConfusionMatrix(5), ConfusionMatrix(5), ConfusionMatrix(5)
    kept = ImageMatrices(5)
    for i, (_, prediction, label) in enumerate(cases):
        kept.add(f"{i}", whole.update(prediction, label))
        (left if i % 2 else right).update(prediction, label)
    left.merge(right)
    np.testing.assert_array_equal(left.matrix, whole.matrix)
    stored = ImageMatrices.from_dict(json.loads(json.dumps(kept.as_dict())))
    np.testing.assert_array_equal(stored.dense().sum(0), whole.matrix)
    np.testing.assert_array_equal(stored.dense(stored.ids[::-1]), kept.dense()[::-1])


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "never the ids"),
        (np.full((2, 3), 4), np.zeros((2, 3), int), "found ids 4 to 4, expected 0 to 3"),
        (np.zeros((2, 3), int), np.full((2, 3), -1), "label: found ids -1"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), "take the argmax"),
    ],
)
def test_impossible_maps_are_refused(prediction, label, message):
    with pytest.raises(InputError, match=message):
        ConfusionMatrix(4).update(prediction, label)


def _images(n, accuracy, seed, k=4):
    rng = np.random.default_rng(seed)
    stack = []
    for _ in range(n):
        label = rng.integers(0, k, (11, 13))
        prediction = np.where(rng.random((11, 13)) < accuracy, label, rng.integers(0, k, (11, 13)))
        stack.append(ConfusionMatrix(k).update(prediction, label))
    return np.stack(stack)


def test_bootstrap_is_seeded_contains_the_estimate_and_narrows_with_more_images():
    few, many = _images(20, 0.7, 0), _images(320, 0.7, 0)
    low, high = metrics.bootstrap_miou(few, "nan", draws=400, seed=3)
    assert (low, high) == metrics.bootstrap_miou(few, "nan", draws=400, seed=3)
    assert (low, high) != metrics.bootstrap_miou(few, "nan", draws=400, seed=4)
    assert low < PROTOCOLS["nan"](few.sum(0)).miou < high
    low_many, high_many = metrics.bootstrap_miou(many, "nan", draws=400, seed=3)
    assert 2.5 < (high - low) / (high_many - low_many) < 6.5  # root of 16 is 4


def test_bootstrap_of_equal_images_has_no_width():
    stack = np.repeat(_images(1, 0.7, 0), 7, axis=0)
    low, high = metrics.bootstrap_miou(stack, "present", draws=50)
    assert low == pytest.approx(high)
    assert low == pytest.approx(PROTOCOLS["present"](stack[0]).miou)


def test_paired_bootstrap_sees_what_the_unpaired_cannot():
    rng = np.random.default_rng(0)
    # Images differ widely in difficulty; a is better than b by one pixel in a hundred on each.
    hits = rng.integers(20, 90, 40)
    b = np.stack([np.array([[h, 100 - h], [100 - h, h]]) for h in hits])
    a = b + np.array([[1, -1], [-1, 1]])
    paired, unpaired = (metrics.paired_bootstrap(a, b, "nan", draws=400, paired=p) for p in (True, False))
    assert paired.difference == unpaired.difference > 0
    assert paired.p < 0.01
    assert paired.interval[0] > 0
    assert unpaired.p > 0.2
    assert unpaired.interval[0] < 0
    same = metrics.paired_bootstrap(a, a, "nan", draws=100)
    assert (same.difference, same.p) == (0, 1)
    with pytest.raises(InputError, match="same images"):
        metrics.paired_bootstrap(a, b[:-1], "nan", draws=100)


def test_matrices_of_a_full_split_stay_small():
    tracemalloc.start()
    kept = ImageMatrices(9)
    image = np.zeros((9, 9), int)
    image[0, :4] = image[:4, 0] = 100
    for i in range(1569):
        kept.add(str(i), image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    with pytest.raises(InputError, match="found twice"):
        kept.add("3", image)


@given(maps())
@settings(max_examples=30, deadline=None)
def test_boundary_of_identical_maps_is_one(case):
    k, _, label = case
    score = BoundaryScore(k)
    score.update(np.where(label == 255, 0, label), label)
    values = score.f_score()
    assert np.all((values == 1) | np.isnan(values))
    assert score.counts[:, 0].tolist() == score.counts[:, 3].tolist()


def test_boundary_of_a_shifted_edge():
    # Diagonal of 480 x 640 is 800, so the tolerance is 6 pixels: an edge moved by 6 matches, by 7 it does not.
    label = np.zeros((480, 640), int)
    label[:, 320:] = 1
    for shift, expected in ((6, 1.0), (7, 0.0)):
        score = BoundaryScore(3)
        score.update(np.roll(label, shift, axis=1) * (np.arange(640) >= 320), label)
        np.testing.assert_allclose(score.f_score(), [expected, expected, np.nan])
        assert score.mean() == expected


@pytest.mark.parametrize("few", [2**22, 0])  # near ones looked up, and by the search tree
@pytest.mark.parametrize(("k", "tolerance"), [(5, 0.031), (23, 0.05), (300, 0.05)])
def test_boundary_counts_equal_distance_transforms(monkeypatch, few, k, tolerance):
    monkeypatch.setattr(boundary, "_FEW", few)
    rng = np.random.default_rng(k)
    label = rng.integers(0, k, (6, 7)).repeat(13, 0).repeat(17, 1)[:71, :97]
    prediction = np.roll(label, (2, 3), (0, 1))
    prediction[rng.random(label.shape) < 0.01] = k - 1
    label[:5, 40:50] = 10_000
    score = BoundaryScore(k, tolerance)
    score.update(prediction.astype(np.int64), label, ignore=10_000)
    radius, outside = tolerance * math.hypot(71, 97), label == 10_000
    edges = []
    for ids in (prediction, label):
        around = np.pad(np.where(outside, -1, ids), 1, constant_values=-1)
        shifted = [around[1:-1, :-2], around[1:-1, 2:], around[:-2, 1:-1], around[2:, 1:-1]]
        edges.append(~outside & np.any([(s != ids) & (s >= 0) for s in shifted], 0))
    for c in range(k):
        ours, theirs = (edge & (ids == c) for edge, ids in zip(edges, (prediction, label), strict=True))
        for column, (one, two) in enumerate([(ours, theirs), (theirs, ours)]):
            near = distance_transform_edt(~two) <= radius if two.any() else np.zeros_like(two)
            assert score.counts[c, 2 * column : 2 * column + 2].tolist() == [(one & near).sum(), one.sum()]


def test_boundary_precision_and_recall_on_a_worked_case():
    # Two true stripes of one pixel, 40 columns apart; the prediction has the first only: P = 1, R = 1/2, F = 2/3.
    label = np.zeros((40, 100), int)
    label[:, 20] = label[:, 60] = 1
    prediction = np.where(np.arange(100) < 40, label, 0)
    score = BoundaryScore(3)
    score.update(prediction, label)
    assert score.counts[1].tolist() == [40, 40, 40, 80]
    assert score.f_score()[1] == pytest.approx(2 / 3)
    # A class that only the prediction contains scores 0 and stays out of the mean over the labels' classes.
    score.update(np.where(np.arange(100) < 50, 2, label), label)
    assert score.f_score()[2] == 0
    assert score.mean() == pytest.approx(score.f_score()[:2].mean())


def test_ignored_pixels_make_no_boundary():
    label = np.zeros((20, 20), int)
    label[:, 10:] = 255
    prediction = np.zeros((20, 20), int)
    prediction[:, 10:] = 1
    score = BoundaryScore(2)
    score.update(prediction, label)
    assert score.counts.sum() == 0
    assert math.isnan(score.mean())


def test_calibration_error_equals_torchmetrics_and_a_worked_case():
    rng = np.random.default_rng(0)
    probability = torch.from_numpy(rng.dirichlet(np.ones(5), (3, 17, 19))).permute(0, 3, 1, 2)
    label = rng.integers(0, 5, (3, 17, 19))
    label[:, :3] = 255
    ours, theirs = CalibrationError(15), MulticlassCalibrationError(5, n_bins=15, ignore_index=255)
    for one, truth in zip(probability, label, strict=True):
        confidence, prediction = one.max(0)
        ours.update(confidence, prediction, truth)
        theirs.update(one[None], torch.from_numpy(truth)[None])
    assert ours.value() == pytest.approx(float(theirs.compute()), abs=1e-6)
    exact = CalibrationError(10)
    exact.update(np.full((2, 2), 0.95), np.array([[1, 1], [1, 0]]), np.ones((2, 2), int))
    assert exact.value() == pytest.approx(0.2)  # sure to 0.95, right in 3 of 4
