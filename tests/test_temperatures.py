from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fusionsam.errors import InputError
from fusionsam.inference.temperatures import (
    Temperatures,
    of_classes,
    of_objects,
    read_celsius,
    to_csv,
    under,
    write_csv,
)

HEAT = np.array([[20.0, 21.0, 22.0, 50.0], [19.0, np.nan, 35.0, 50.0], [-4.0, 18.0, 17.0, 16.0]])
NAMES = ["none", "pipe", "wall"]


def test_one_mask_worked_by_hand():
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]], bool)
    found = under(HEAT, mask)
    assert (found.area, found.unknown) == (6, 1)
    assert (found.minimum, found.maximum) == (16, 50)
    assert found.mean == pytest.approx((20 + 21 + 50 + 50 + 16) / 5)
    assert found.p95 == 50
    assert (found.coldest, found.hottest) == ((3, 2), (3, 0))  # of two hottest the upper one


def test_masks_without_a_temperature_say_so():
    assert under(HEAT, np.zeros((3, 4), bool)) == Temperatures(0, 0)
    assert under(HEAT, np.isnan(HEAT)) == Temperatures(1, 1)


@given(arrays(np.float32, (5, 7), elements=st.floats(-40, 600, width=32)), arrays(np.bool_, (5, 7)))
def test_the_marked_pixels_lie_in_the_mask_and_have_the_extremes(heat, mask):
    found = under(heat, mask)
    assert found.area == mask.sum()
    if found.hottest is None:
        assert not mask.any()
        return
    for spot, value in ((found.coldest, found.minimum), (found.hottest, found.maximum)):
        assert mask[spot[1], spot[0]]
        assert heat[spot[1], spot[0]] == value
    assert found.minimum <= found.mean + 1e-9
    assert found.minimum <= found.p95 <= found.maximum
    assert found.mean <= found.maximum + 1e-9


def test_classes_and_objects_share_the_pixels():
    labels = np.array([[1, 1, 0, 2], [0, 0, 0, 2], [2, 0, 255, 0]])
    per_class = of_classes(HEAT, labels, NAMES, "a")
    assert [(one.class_name, one.temperatures.area, one.object) for one in per_class] == [
        ("pipe", 2, 0),
        ("wall", 3, 0),
    ]
    assert [one.class_id for one in of_classes(HEAT, labels, NAMES, background=True)] == [0, 1, 2]
    per_object = of_objects(HEAT, labels, NAMES, "a", min_pixels=1)
    assert [(one.object, one.class_id, one.temperatures.maximum) for one in per_object] == [
        (1, 2, 50.0),
        (2, 1, 21.0),
        (3, 2, -4.0),
    ]
    assert [one.temperatures.area for one in of_objects(HEAT, labels, NAMES, min_pixels=2)] == [2, 2]


def test_the_table_reads_back(tmp_path):
    readings = [*of_objects(HEAT, HEAT > 30, NAMES, 'b,"x"', 1), *of_classes(HEAT, np.isnan(HEAT) * 2, NAMES, "c")]
    rows = list(csv.DictReader(io.StringIO(to_csv(readings))))
    assert rows[0]["picture"] == 'b,"x"'
    assert (rows[0]["maximum_c"], rows[0]["hottest_x"], rows[0]["hottest_y"]) == ("50.00", "3", "0")
    assert (rows[1]["mean_c"], rows[1]["area"], rows[1]["unknown"], rows[1]["hottest_x"]) == ("", "1", "1", "")
    assert write_csv(tmp_path / "t.csv", readings).read_text() == to_csv(readings)


def test_what_does_not_fit_is_one_line():
    with pytest.raises(InputError, match="are 3x4, the mask or label map is 2x4"):
        under(HEAT, np.zeros((2, 4), bool))
    with pytest.raises(InputError, match="expected numbers"):
        under(np.zeros((3, 4, 1)), np.zeros((3, 4), bool))
    with pytest.raises(InputError, match="found id 3; expected ids of 3 classes"):
        of_classes(HEAT, np.full((3, 4), 3), NAMES)


@pytest.mark.real
def test_a_cameras_own_file_is_read_and_other_pictures_have_none(data_root, tmp_path):
    folder = data_root / "rjpeg"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    heat = read_celsius(folder / "FLIR.jpg")
    found = under(heat, np.ones(heat.shape, bool))
    assert heat.shape == (320, 240)
    assert (found.minimum, found.maximum) == (pytest.approx(25.9, abs=0.2), pytest.approx(62.3, abs=0.2))
    assert read_celsius(folder / "DJI_M30T.jpg") is None  # counts without constants
    assert read_celsius(tmp_path / "nothere.png") is None
