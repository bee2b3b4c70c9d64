"""The range of a deep infrared picture is that of its scene, whatever else is in the file."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from fusionsam.data.stretch import find_range, given_range, stretch
from fusionsam.errors import InputError

H, W = 211, 307


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """Counts 21000 to 25000 of a cool street with a few warm people, uint16."""
    rng = np.random.default_rng(3)
    field = ndimage.gaussian_filter(rng.normal(0, 1, (H, W)), 6)
    field = (field - field.min()) / np.ptp(field) * 0.5
    for row, column in ((60, 80), (120, 210), (90, 150)):
        field[row : row + 30, column : column + 9] += 0.45
    return (21000 + 4000 * ndimage.gaussian_filter(field, 1).clip(0, 1)).round().astype(np.uint16)


def _damaged(kind: str, scene: np.ndarray) -> tuple[np.ndarray, float | None]:
    celsius, declared = scene.astype(np.float32) / 100 - 200, None
    if kind == "zero border":
        out = np.zeros((2 * H, W), np.uint16)
        out[H // 2 : H // 2 + H] = scene
    elif kind == "interpolated zero border":
        out = np.pad(scene, 90).astype(np.float32)
        out = ndimage.shift(out, 0.4, order=1).round().astype(np.uint16)
    elif kind == "65535 border":
        out = np.pad(scene, 60, constant_values=65535)
    elif kind == "-9999":
        out = np.pad(celsius, 60, constant_values=-9999)
    elif kind == "-32768":
        out = np.pad(scene.astype(np.int16), 60, constant_values=-32768)
    elif kind == "NaN":
        out = np.pad(celsius, 60, constant_values=np.nan)
    elif kind == "declared":
        out, declared = np.pad(scene, 60, constant_values=22000), 22000.0
    elif kind == "saturated rows":
        out = scene.copy()
        out[10:14] = 65535
        out[:, 100] = 65535
    elif kind == "float minimum":
        out = celsius.copy()
        out[:9] = np.finfo(np.float32).min
    elif kind == "double minimum":  # what GDAL writes where nothing else is said
        out = np.pad(scene / 100 - 200, 60, constant_values=np.finfo(np.float64).min)
    else:
        assert kind == "glowing fire"
        glow = np.zeros((H, W))
        glow[150:180, 20:60] = 1
        glow = ndimage.gaussian_filter(glow, 1.5)
        noise = np.random.default_rng(0).normal(0, 20, (H, W))
        out = (celsius * (1 - glow) + (400 + noise) * glow).astype(np.float32)
    return out, declared


KINDS = [
    "zero border", "interpolated zero border", "65535 border", "-9999", "-32768", "NaN", "declared", "saturated rows",
    "float minimum", "double minimum", "glowing fire",
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_temperature_leaves_the_range_of_the_scene(kind, scene):
    damaged, declared = _damaged(kind, scene)
    clean = find_range(scene)
    found = find_range(damaged, declared)
    low, high = (found.low, found.high) if abs(found.low) > 1000 else ((v + 200) * 100 for v in (found.low, found.high))
    assert max(abs(low - clean.low), abs(high - clean.high)) < 0.05 * (clean.high - clean.low)
    assert found.left_out > 0.5
    assert found.levels > 100
    assert any(notice.kind == "range" for notice in found.notices()) == (found.left_out >= 1)


@pytest.mark.parametrize("kind", [*KINDS[:7], "double minimum", "saturated rows"])
def test_nodata_is_shown_as_the_coldest(kind, scene):
    damaged, declared = _damaged(kind, scene)
    grey = stretch(damaged, find_range(damaged, declared))
    assert (grey[0] == 0).all() or kind == "saturated rows"
    if kind == "saturated rows":
        assert (grey[10:14] == 0).all()


def test_a_clean_picture_has_the_percentiles_of_all_its_pixels(scene):
    found = find_range(scene)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(scene.astype(np.float32), (0.5, 99.5))))
    assert found.left_out == 0
    assert found.notices() == []


def test_a_fire_stays_hot_and_people_stay_inside_the_range(scene):
    damaged, _ = _damaged("glowing fire", scene)
    grey = stretch(damaged, find_range(damaged))
    assert (grey[158:172, 30:50] == 255).all()
    clean = stretch(scene, find_range(scene))
    assert np.abs(grey[60:90, 80:89].astype(int) - clean[60:90, 80:89]).max() <= 6


def test_hot_pixels_at_the_end_of_the_sensor_belong_to_the_scene(scene):
    ramp = np.linspace(20000, 60000, H * W).reshape(H, W).round().astype(np.uint16)
    ramp[100:120, 100:130] = 65535
    assert stretch(ramp, find_range(ramp))[110, 110] == 255
    assert find_range(ramp).left_out == 0


def test_few_levels_and_fixed_ranges_are_told(scene):
    coarse = (scene >> 8) << 8
    assert find_range(coarse).levels <= 17
    assert any("grey levels" in notice.text for notice in find_range(coarse).notices())
    fixed = given_range(scene, 20000, 30000)
    assert fixed.how == "given"
    np.testing.assert_array_equal(stretch(scene, fixed), np.round((scene.astype(float) - 20000) / 10000 * 255))
    with pytest.raises(InputError, match="the lower first"):
        given_range(scene, 3, 3)
    with pytest.raises(InputError, match="no finite"):
        find_range(np.full((5, 5), np.nan, np.float32))


def test_constant_and_tiny_pictures_are_black():
    for shape in ((1, 1), (3, 4)):
        values = np.full(shape, 4711, np.uint16)
        assert (stretch(values, find_range(values)) == 0).all()


@pytest.mark.parametrize("declared", [float("nan"), -32767, 1e6])
def test_a_nodata_that_no_pixel_can_have_is_none(declared, scene):
    scene = scene.copy()
    scene[100, 100:110] = 32769  # what -32767 is in 16 bits without a sign
    for found in (find_range(scene, declared), given_range(scene, 20000, 40000, declared)):
        assert found.nodata == ()
        assert stretch(scene, found)[100, 105] == (255 if found.how == "found" else 163)
