from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionsam.config.schema import ModelConfig
from fusionsam.errors import InputError
from fusionsam.inference import render
from fusionsam.types import Prompts

CLASSES = ModelConfig().classes
PALETTE = [tuple(color) for color in ModelConfig().palette]


def scene(height, width, ids=range(9), seed=0):
    """A night-grey picture and nine tiles of ids."""
    y, x = np.mgrid[:height, :width]
    tiles = np.resize(list(ids), 9).reshape(3, 3)
    picture = np.random.default_rng(seed).integers(5, 60, (height, width, 3), dtype=np.uint8)
    return picture, tiles[y * 3 // height, x * 3 // width].astype(np.uint8)


@given(st.integers(1, 23), st.integers(1, 29), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_colours_can_be_read_back_as_ids(height, width, seed):
    ids = np.random.default_rng(seed).integers(0, 9, (height, width))
    colored = render.colorize(ids, PALETTE)
    back = np.array([PALETTE.index(tuple(pixel)) for pixel in colored.reshape(-1, 3).tolist()])
    np.testing.assert_array_equal(back.reshape(height, width), ids)


def test_ids_without_colour_are_refused_and_ignored_pixels_are_black():
    assert render.colorize(np.full((2, 3), 255), PALETTE).max() == 0
    for wrong in (9, 254, 300, -1):
        with pytest.raises(InputError, match="palette of this data set"):
            render.colorize(np.full((2, 3), wrong), PALETTE)


def test_every_contour_colour_stands_out_from_night_and_from_its_fill():
    for color in PALETTE[1:]:
        bright = np.array(render.brighten(color)) @ [0.299, 0.587, 0.114]
        assert bright > 90
        assert bright > 1.3 * np.array(color) @ [0.299, 0.587, 0.114]
    assert len({render.brighten(color) for color in PALETTE}) == len(PALETTE)


def test_overlay_blends_inside_draws_contours_and_leaves_unlabeled_alone():
    picture, ids = scene(90, 120, ids=(0, 1, 255))
    result = np.asarray(render.overlay(picture, ids, CLASSES, PALETTE, alpha=0.25, legend=False))
    untouched = (ids == 0) | (ids == 255)
    np.testing.assert_array_equal(result[untouched], picture[untouched])
    centre = 60
    assert ids[45, centre] == 1
    expected = 0.75 * picture[45, centre] + 0.25 * np.array(PALETTE[1])
    np.testing.assert_allclose(result[45, centre], expected, atol=1)
    assert tuple(result[45, 40]) == render.brighten(PALETTE[1])  # first column of the tile


@pytest.mark.parametrize("size", [(64, 64), (67, 401), (401, 67), (1024, 1279)])
def test_legend_is_whole_at_every_size(size):
    """A legend drawn on a wider, taller sheet shows no ink that the strip itself cuts: its margins stay empty."""
    picture, ids = scene(*size)
    image = np.asarray(render.overlay(picture, ids, CLASSES, PALETTE))
    strip = image[size[0] :]
    assert image.shape[1] >= size[1]
    for margin in (strip[:, -2:], strip[-2:], strip[:, :2], strip[:1]):
        assert (margin == 255).all()
    for index in range(1, 9):
        assert (strip == np.array(PALETTE[index])).all(-1).any(), CLASSES[index]


def test_legend_names_only_what_is_there(monkeypatch):
    seen = []
    original = render._legend
    monkeypatch.setattr(render, "_legend", lambda entries, *rest: seen.extend(entries) or original(entries, *rest))
    ids = np.zeros((100, 200), np.uint8)
    ids[:10, :10] = 2
    ids[50, 50] = 6
    render.overlay(np.zeros((100, 200, 3), np.uint8), ids, CLASSES, PALETTE)
    assert [text for text, _ in seen] == ["person  0.5 %", "guardrail  <0.1 %"]


def test_prompts_are_drawn_where_they_are_and_padding_is_not():
    picture = np.zeros((101, 151, 3), np.uint8)
    ids = np.zeros((101, 151), np.uint8)
    prompts = Prompts(
        points=torch.tensor([[[20.0, 30.0], [70.0, 30.0], [120.0, 30.0]]]),
        point_labels=torch.tensor([[1, 0, -1]]),
        boxes=torch.tensor([[[10.0, 50.0, 140.0, 90.0]]]),
    )
    result = np.asarray(render.overlay(picture, ids, CLASSES, PALETTE, legend=False, prompts=prompts)).astype(int)
    assert result[30, 20, 1] > result[30, 20, 0]
    assert result[30, 70, 0] > result[30, 70, 1]
    assert result[22:39, 112:129].sum() == 0
    for x, y in ((10, 70), (140, 70), (70, 50), (70, 90)):
        assert result[y, x, 0] > 200
        assert result[y, x, 2] < 50
    assert result[70, 70].sum() == 0


def test_overlay_refuses_another_size():
    with pytest.raises(InputError, match="predict at full size"):
        render.overlay(np.zeros((8, 9, 3), np.uint8), np.zeros((9, 8), int), CLASSES, PALETTE)


def test_confidence_map_is_linear():
    np.testing.assert_array_equal(render.confidence_map([[0.0, 0.2, 1.0]]), [[0, 51, 255]])
    with pytest.raises(InputError, match="softmax"):
        render.confidence_map([[1.5]])


def test_each_code_has_its_own_colour_wherever_it_stands():
    whole = render.codes_picture(np.arange(1024).reshape(32, 32))
    assert len({tuple(pixel) for pixel in whole.reshape(-1, 3).tolist()}) == 1024
    some = np.array([[5, 700], [700, 31], [5, 1023]])
    np.testing.assert_array_equal(render.codes_picture(some), whole.reshape(-1, 3)[some])


def test_side_by_side_holds_every_picture_unchanged_and_every_title_whole():
    pictures = [scene(64, 64 + 3 * i, seed=i)[0] for i in range(5)]
    titles = ["a", "two words that wrap", "Unbreakable-title-wider-than-its-picture", "", "e"]
    sheet = np.asarray(render.side_by_side(list(zip(titles, pictures, strict=True)), columns=3))
    for picture in pictures:
        h, w = picture.shape[:2]
        corners = np.argwhere((sheet[: -h + 1, : -w + 1] == picture[0, 0]).all(-1))
        assert any(np.array_equal(sheet[y : y + h, x : x + w], picture) for y, x in corners)
    for margin in (sheet[:, :2], sheet[:, -2:], sheet[:1], sheet[-2:]):
        assert (margin == 255).all()
