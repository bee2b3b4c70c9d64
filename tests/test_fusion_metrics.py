from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.measure import shannon_entropy
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio
from skimage.metrics import structural_similarity as reference_ssim
from sklearn.metrics import mutual_info_score
from torchmetrics.functional.image import visual_information_fidelity as reference_vif

from fusionsam.errors import InputError
from fusionsam.evaluation.fusion_report import OBJECTS, write
from fusionsam.evaluation.simple_fusions import FUSIONS
from fusionsam.metrics import fusion as fm


def picture(seed, shape=(53, 61)):
    """Blobs with noise: edges, flat parts and all grey levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = 90 + 70 * np.sin(x / rng.uniform(4, 9)) * np.cos(y / rng.uniform(4, 9)) + rng.normal(0, 9, shape)
    image[10:25, 15:40] = 230
    return np.clip(np.rint(image), 0, 255)


A, B, F = picture(1), picture(2), picture(3)


def test_histogram_measures_equal_independent_ones():
    assert fm.entropy(F) == pytest.approx(shannon_entropy(F.astype(np.uint8), base=2))
    assert fm.mutual_information(A, F) == pytest.approx(mutual_info_score(A.ravel(), F.ravel()) / math.log(2))
    assert fm.fusion_metrics(F, F, F)["MI"] == pytest.approx(2 * fm.entropy(F))
    assert fm.entropy(np.repeat([0.0, 255.0], 50).reshape(10, 10)) == pytest.approx(1)


def test_ssim_psnr_and_vif_equal_independent_ones():
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert fm.structural_similarity(A, F) == pytest.approx(reference_ssim(A, F, **options), abs=1e-9)
    mean = (mean_squared_error(A, F) + mean_squared_error(B, F)) / 2
    assert fm.peak_signal_to_noise(A, B, F) == pytest.approx(10 * math.log10(255**2 / mean))
    assert fm.peak_signal_to_noise(A, A, F) == pytest.approx(peak_signal_noise_ratio(A, F, data_range=255))
    for source in (A, 0.6 * F + 20, 255 - F):
        f, s = (torch.from_numpy(image)[None, None] for image in (F, source))
        assert fm.visual_information_fidelity(source, F) == pytest.approx(float(reference_vif(f, s)), abs=1e-9)
    assert fm.visual_information_fidelity(F, F) == pytest.approx(1)


def test_gradient_measures_of_ramps():
    y, x = np.mgrid[:50, :60].astype(float)
    assert fm.spatial_frequency(3 * x) == pytest.approx(3)
    assert fm.spatial_frequency(3 * x + 4 * y) == pytest.approx(5)
    assert fm.average_gradient(3 * x) == pytest.approx(3 / math.sqrt(2))
    assert fm.average_gradient(3 * x + 4 * y) == pytest.approx(5 / math.sqrt(2))
    assert fm.standard_deviation(np.repeat([10.0, 20.0], 6).reshape(3, 4)) == pytest.approx(5)


def test_scd_of_sums_and_of_flat_differences():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (2, 300, 300))
    assert fm.sum_of_correlations_of_differences(a, b, a + b) == pytest.approx(2)
    # F = A: F - A is flat and correlates 0; corr(A - B, A) is 1 / sqrt 2 for independent equals.
    assert fm.sum_of_correlations_of_differences(a, b, a) == pytest.approx(1 / math.sqrt(2), abs=0.01)
    assert fm.sum_of_correlations_of_differences(A, B, F) == pytest.approx(
        np.corrcoef((F - B).ravel(), A.ravel())[0, 1] + np.corrcoef((F - A).ravel(), B.ravel())[0, 1]
    )


def _sobel_at(image, i, j):
    p = image[i : i + 3, j : j + 3]
    x = p[0, 2] + 2 * p[1, 2] + p[2, 2] - p[0, 0] - 2 * p[1, 0] - p[2, 0]
    y = p[2, 0] + 2 * p[2, 1] + p[2, 2] - p[0, 0] - 2 * p[0, 1] - p[0, 2]
    return x, y


def _loop(a, b, f, border):
    """Per pixel (x, y, strength) of the three pictures, one pixel at a time."""
    padded = [np.pad(image, 1, mode=border) for image in (a, b, f)]
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            found = [_sobel_at(image, i, j) for image in padded]
            yield [(x, y, math.hypot(x, y)) for x, y in found]


def test_qabf_equals_a_pixel_by_pixel_reading_of_the_paper():
    kept = whole = 0.0
    for pixel in _loop(A, B, F, "constant"):
        xf, yf, gf = pixel[2]
        af = math.pi / 2 if xf == 0 else math.atan(yf / xf)
        for x, y, g in pixel[:2]:
            angle = math.pi / 2 if x == 0 else math.atan(y / x)
            ratio = min(g, gf) / max(g, gf) if max(g, gf) else 0
            agreement = 1 - abs(angle - af) / (math.pi / 2)
            q = 0.9994 / (1 + math.exp(-15 * (ratio - 0.5))) * 0.9879 / (1 + math.exp(-22 * (agreement - 0.8)))
            kept, whole = kept + q * g, whole + g
    assert fm.edge_preservation(A, B, F) == pytest.approx(kept / whole)
    top = 0.9994 / (1 + math.exp(-7.5)) * 0.9879 / (1 + math.exp(-4.4))
    assert fm.edge_preservation(F, F, F) == pytest.approx(top)


def test_nabf_equals_a_pixel_by_pixel_reading_of_the_paper():
    lost = whole = 0.0
    for pixel in _loop(A, B, F, "reflect"):
        (xa, ya, ga), (xb, yb, gb), (xf, yf, gf) = [[v / 8 for v in values] for values in pixel]
        angles = [
            math.atan(x / y) if y else math.copysign(math.pi / 2, x) if x else 0.0
            for x, y in ((xa, ya), (xb, yb), (xf, yf))
        ]
        for g, angle in ((ga, angles[0]), (gb, angles[1])):
            ratio = min(g, gf) / max(g, gf) if g and gf else 0
            agreement = abs(abs(angle - angles[2]) - math.pi / 2) * 2 / math.pi
            q = 0.9999 / (1 + math.exp(-19 * (ratio - 0.5))) * 0.9995 / (1 + math.exp(-22 * (agreement - 0.5)))
            weight = g**1.5 if g >= 2 else 0.001
            whole += weight
            lost += (gf > ga and gf > gb) * (1 - math.sqrt(q)) * weight
    assert fm.fusion_artifacts(A, B, F) == pytest.approx(lost / whole)
    assert fm.fusion_artifacts(A, B, A) == 0  # no edge of A exceeds A


def test_nabf_grows_with_added_noise():
    rng = np.random.default_rng(0)
    base = (A + B) / 2
    values = [fm.fusion_artifacts(A, B, np.clip(base + s * rng.normal(size=A.shape), 0, 255)) for s in (0, 10, 40)]
    assert values == sorted(values)
    assert values[2] > 5 * values[0]


def test_flat_sources_give_finite_figures():
    flat = np.zeros_like(A)
    values = fm.fusion_metrics(flat, B, B)
    assert tuple(values) == fm.METRICS
    assert all(math.isfinite(v) for v in values.values())
    assert values["VIF"] == pytest.approx(1)


def test_a_prepared_source_gives_the_same_to_the_last_digit():
    sources = fm.prepare(A), fm.prepare(B)
    for fused in (F, picture(4), A):
        assert fm.fusion_metrics(*sources, fused) == fm.fusion_metrics(A, B, fused)


def test_the_weights_of_luma_stand_in_one_place():
    files = sorted(Path(fm.__file__).parents[1].rglob("*.py"))
    assert [path.name for path in files if "0.587" in path.read_text(encoding="utf-8")] == ["types.py"]


def test_luma_takes_both_layouts_and_keeps_grey():
    rgb = np.random.default_rng(0).integers(0, 256, (3, 43, 47), dtype=np.uint8)
    np.testing.assert_array_equal(fm.luma(rgb), fm.luma(rgb.transpose(1, 2, 0)))
    grey = np.repeat(rgb[:1], 3, axis=0)
    np.testing.assert_allclose(fm.luma(grey), grey[0])
    assert fm.luma(np.array([255, 0, 0], np.uint8).reshape(3, 1, 1))[0, 0] == pytest.approx(76.245)


@pytest.mark.parametrize(
    ("a", "f", "message"),
    [(A[:-1], F, "aligned"), (A[:40, :40], F[:40, :40], "at least 41"), (A, F * 2, "uint8 range")],
)
def test_bad_pictures_are_refused(a, f, message):
    with pytest.raises(InputError, match=message):
        fm.fusion_metrics(a, a, f)


def _pair(shape):
    rng = np.random.default_rng(4)
    visible = np.stack([picture(s, shape) for s in (1, 2, 3)]).astype(np.uint8) // 2 + 60
    return visible, rng.integers(70, 180, (1, *shape), dtype=np.uint8)


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("shape", [(64, 64), (67, 101)])
def test_every_fusion_keeps_chroma_and_lies_in_range(name, shape):
    visible, infrared = _pair(shape)
    fused = FUSIONS[name](visible, infrared)
    assert fused.dtype == np.uint8
    # Equal shift of all channels = equal chroma; only pixels that were clipped may differ.
    shift = fused.astype(int) - visible
    inside = ((fused > 0) & (fused < 255)).all(0)
    assert inside.mean() > 0.9
    assert np.ptp(shift, axis=0)[inside].max() <= 1
    # Two equal grey pictures have nothing to choose between.
    same = np.repeat(infrared, 3, axis=0)
    assert np.abs(FUSIONS[name](same, infrared).astype(int) - same).max() <= 1


def test_average_and_maximum_are_what_they_say():
    visible = np.full((3, 64, 65), 100, np.uint8)
    infrared = np.full((1, 64, 65), 200, np.uint8)
    assert np.unique(FUSIONS["average"](visible, infrared)).tolist() == [150]
    assert np.unique(FUSIONS["maximum"](visible, infrared)).tolist() == [200]
    assert np.unique(FUSIONS["maximum"](visible, infrared // 4)).tolist() == [100]


@pytest.mark.parametrize("name", ["laplacian_pyramid", "guided_filter"])
def test_detail_of_either_source_survives(name):
    """A square seen by one camera only, on a flat other: its edge is kept better than by averaging."""
    visible = np.full((3, 97, 131), 90, np.uint8)
    infrared = np.full((1, 97, 131), 90, np.uint8)
    visible[:, 20:40, 20:40] = 180
    infrared[:, 60:80, 80:110] = 180
    a, b = fm.luma(visible), infrared[0].astype(float)
    score = {key: fm.edge_preservation(a, b, fm.luma(FUSIONS[key](visible, infrared))) for key in ("average", name)}
    assert score[name] > score["average"] + 0.05


@pytest.mark.parametrize(
    ("visible", "infrared", "message"),
    [
        (np.zeros((3, 64, 64), np.uint8), np.zeros((1, 64, 65), np.uint8), "aligned"),
        (np.zeros((3, 63, 64), np.uint8), np.zeros((1, 63, 64), np.uint8), "at least 64"),
        (np.zeros((3, 64, 64)), np.zeros((1, 64, 64)), "uint8"),
    ],
)
def test_fusions_refuse_what_they_cannot_fuse(visible, infrared, message):
    with pytest.raises(InputError, match=message):
        FUSIONS["average"](visible, infrared)


def test_objects_without_contrast_in_infrared_have_no_ratio(tmp_path):
    row = dict.fromkeys(fm.METRICS, 1.0) | dict(zip(OBJECTS, (2.0, 5.0, 0.0), strict=True))
    write(tmp_path, {"ours": {"a": row}})
    told = json.loads((tmp_path / "fusion_metrics.json").read_text())["ours"]
    assert told["object_contrast"] == {"objects": 2.0, "fused": 5.0, "infrared": 0.0, "ratio": None}
    before = (tmp_path / "fusion_metrics.csv").read_bytes()
    assert before.endswith(b"\r\n")
    with pytest.raises(KeyError):
        write(tmp_path, {"theirs": {"a": row, "b": {}}})
    assert (tmp_path / "fusion_metrics.csv").read_bytes() == before
