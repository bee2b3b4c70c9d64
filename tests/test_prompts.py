"""Prompts: peaks and boxes by hand, SAM's prompt encoder against transformers, frames of any shape, the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SamConfig, SamModel

from fusionsam.config.schema import DecoderConfig, PromptConfig
from fusionsam.models.prompts import PromptEncoder, cut, oracle_prompts, place, self_prompts
from fusionsam.types import Frame, Prompts

SQUARE = Frame((1024, 1024), (1024, 1024))


# -- the model's own prompts -------------------------------------------------------------------------------------


def test_peaks_and_box_by_hand():
    logits = torch.full((2, 1, 7, 11), -5.0)
    logits[0, 0, 1, 2] = 4.0  # the peak
    logits[0, 0, 1, 3] = 3.9  # its neighbour, nearer than the separation
    logits[0, 0, 5, 9] = 2.0  # the second peak
    found = self_prompts(logits, PromptConfig(points=3, separation=2, threshold=0.5))
    # cell (x, y) has its centre at pixel 4 x + 1.5, 4 y + 1.5
    assert found.points[0, :2].tolist() == [[9.5, 5.5], [37.5, 21.5]]
    assert found.point_labels.tolist() == [[1, 1, -1], [-1, -1, -1]]
    # cells 2..9 by 1..5 are pixels 8..39 by 4..23; nothing found is the whole 44 x 28 image
    assert found.boxes.tolist() == [[[8, 4, 39, 23]], [[0, 0, 43, 27]]]
    assert found.source == "self"
    assert found.mask is logits


def test_pixels_are_not_rounded_to_half_precision():
    logits = torch.full((1, 1, 120, 160), -9.0)
    logits[0, 0, 119, 157:] = 9.0
    exact, half = (self_prompts(x, PromptConfig(points=1)) for x in (logits, logits.bfloat16()))
    assert torch.equal(half.points, exact.points)
    assert torch.equal(half.boxes, exact.boxes)


def test_threshold_is_a_probability():
    logits = torch.full((1, 1, 7, 11), -5.0)
    logits[0, 0, 2, 3], logits[0, 0, 6, 10] = 0.84, 0.86  # sigmoid 0.698 and 0.703
    found = self_prompts(logits, PromptConfig(points=2, separation=1, threshold=0.7))
    assert found.points[0, 0].tolist() == [41.5, 25.5]
    assert found.point_labels.tolist() == [[1, -1]]
    assert found.boxes.tolist() == [[[40, 24, 43, 27]]]


def test_points_and_box_can_be_left_out():
    found = self_prompts(torch.randn(1, 1, 7, 11), PromptConfig(points=0, box=False))
    assert found.points is found.point_labels is found.boxes is None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), height=st.integers(3, 19), width=st.integers(3, 19), separation=st.integers(1, 5))
def test_peaks_keep_their_distance_and_the_box_holds_them(seed, height, width, separation):
    logits = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    found = self_prompts(logits, PromptConfig(points=7, separation=separation))
    cells = ((found.points[0] - 1.5) / 4).long()
    on = found.point_labels[0] == 1
    heights = logits[0, 0, cells[:, 1], cells[:, 0]]
    assert (heights[on] > 0).all()
    assert heights[0] == logits.max()
    assert (heights[on].diff() <= 0).all()
    apart = torch.pdist(found.points[0][on]) if int(on.sum()) > 1 else torch.tensor([1e9])
    assert apart.min() >= 4 * separation
    if not on.all():  # given up only where every cell above the threshold is near some peak
        ys, xs = (logits[0, 0] > 0).nonzero().unbind(1)
        near = torch.cdist(torch.stack([xs, ys], 1).float(), cells[on].float()) if len(ys) else torch.zeros(1, 1)
        assert bool(on.any()) is bool(len(ys))
        assert (near.amin(1) <= separation).all()
    ys, xs = (logits[0, 0] > 0).nonzero().unbind(1)
    if len(ys):
        expected = [4 * xs.min(), 4 * ys.min(), 4 * xs.max() + 3, 4 * ys.max() + 3]
        assert found.boxes[0, 0].tolist() == [int(v) for v in expected]


# -- SAM's prompt encoder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam() -> SamModel:
    """transformers' own, at SAM's prompt size (1024, a grid of 64), embedding width 32."""
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "output_channels": 32, "num_hidden_layers": 0, "num_pos_feats": 16, "mlp_dim": 8,
              "num_attention_heads": 1, "global_attn_indexes": []}  # fmt: skip
    decoder = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(vision_config=vision, prompt_encoder_config={"hidden_size": 32}, mask_decoder_config=decoder)
    model = SamModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def encoder(sam) -> PromptEncoder:
    ours = PromptEncoder(DecoderConfig(hidden=32))
    ours.sam.load_state_dict(sam.prompt_encoder.state_dict())
    return ours.eval()


POINTS = torch.tensor([[[3.0, 7.0], [501.5, 1000.0], [0.0, 0.0]], [[11.0, 13.0], [17.0, 19.0], [23.0, 29.0]]])
LABELS = torch.tensor([[1, 0, -1], [1, 1, 0]])
BOXES = torch.tensor([[[5.0, 7.0, 601.0, 811.0]], [[100.0, 200.0, 300.0, 401.0]]])


@torch.no_grad()
def test_a_square_frame_is_sams_own(sam, encoder):
    size, grid = (1024, 1024), (64, 64)
    mask = torch.randn(2, 1, 256, 256)
    cases = {
        "points": (Prompts(POINTS, LABELS), (POINTS[:, None], LABELS[:, None], None, None)),
        "points and box": (Prompts(POINTS, LABELS, BOXES), (POINTS[:, None], LABELS[:, None], BOXES, None)),
        "box": (Prompts(boxes=BOXES), (None, None, BOXES, None)),
        "box and mask": (Prompts(boxes=BOXES, mask=mask), (None, None, BOXES, mask)),
    }
    for name, (ours, theirs) in cases.items():
        sparse, dense = encoder(ours, size, SQUARE, grid, use_mask=True)
        expected_sparse, expected_dense = sam.prompt_encoder(*theirs)
        torch.testing.assert_close(sparse, expected_sparse, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
        torch.testing.assert_close(dense.expand_as(expected_dense), expected_dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.positions(grid), sam.get_image_wide_positional_embeddings())
    sparse, dense = encoder(Prompts(mask=mask), size, SQUARE, grid, use_mask=False)
    assert sparse is None
    assert (dense == sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)).all()


@torch.no_grad()
def test_several_boxes_are_tokens_side_by_side(sam, encoder):
    two = torch.cat([BOXES, BOXES.flip(0)], dim=1)
    sparse, _ = encoder(Prompts(boxes=two), (1024, 1024), SQUARE, (64, 64), True)
    assert sparse.shape == (2, 1, 4, 32)
    for index in range(2):
        alone = sam.prompt_encoder(None, None, two[:, index : index + 1], None)[0]
        torch.testing.assert_close(sparse[:, :, 2 * index : 2 * index + 2], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("image", "frame", "fraction"),
    [
        # native size: x over the frame's width, y over its height
        ((480, 640), Frame((480, 640), (480, 640)), (1 / 640, 1 / 480)),
        # padded at right and bottom from 97 x 131 to a multiple of 16
        ((97, 131), Frame((112, 144), (97, 131)), (1 / 144, 1 / 112)),
        # letterboxed: 300 x 500 grows by 1024 / 500 inside the square
        ((300, 500), Frame((1024, 1024), (614, 1024)), (1 / 500, 614 / 300 / 1024)),
    ],
)
def test_other_frames_normalise_by_their_own_sides(encoder, image, frame, fraction):
    points = torch.tensor([[[3.0, 7.0], [96.0, 83.0]]])
    sparse, _ = encoder(Prompts(points, torch.tensor([[1, 0]])), image, frame, (7, 11), True)
    where = (points + 0.5) * torch.tensor(fraction)
    angles = 2 * torch.pi * (2 * where - 1) @ encoder.sam.shared_embedding.positional_embedding
    kinds = torch.cat([encoder.sam.point_embed[1].weight, encoder.sam.point_embed[0].weight])
    expected = torch.cat([angles.sin(), angles.cos()], dim=-1)[0] + kinds
    torch.testing.assert_close(sparse[0, 0, :2], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse[0, 0, 2], encoder.sam.not_a_point_embed.weight[0])


@torch.no_grad()
def test_the_mask_lies_over_the_content(encoder):
    frame = Frame((112, 144), (80, 96))
    mask = torch.randn(1, 1, 20, 24)
    _, dense = encoder(Prompts(mask=mask), (80, 96), frame, (7, 9), True)
    whole = torch.zeros(1, 1, 28, 36)
    whole[:, :, :20, :24] = mask
    torch.testing.assert_close(dense, encoder.sam.mask_embed(whole))


def test_cut_undoes_place():
    grid = torch.randn(2, 3, 20, 24)
    frame = Frame((112, 144), (80, 96))
    placed = place(grid, frame, (28, 36))
    assert torch.equal(cut(placed, frame, (20, 24)), grid)
    assert placed[:, :, 20:].abs().sum() + placed[:, :, :, 24:].abs().sum() == 0
    native = Frame((80, 96), (80, 96))
    assert torch.equal(place(grid, native, (20, 24)), grid)
    # a constant stays one, whatever the sizes
    flat = cut(place(torch.full((1, 1, 19, 23), 3.0), frame, (31, 37)), frame, (11, 13))
    torch.testing.assert_close(flat, torch.full((1, 1, 11, 13), 3.0))


# -- the oracle --------------------------------------------------------------------------------------------------


def test_oracle_points_lie_on_their_class_and_the_box_round_all():
    label = torch.zeros(2, 19, 23, dtype=torch.long)
    label[0, 3:7, 5:11] = 2
    label[0, 11:13, 17:20] = 4
    label[1, 0, 0] = 255  # ignored is no class
    label[1, 10:14, 2:4] = 1  # not a foreground class
    found = oracle_prompts(label, classes=5, foreground=[2, 4], points=7, seed=3)
    xy, on = found.points.long(), found.point_labels
    assert on[0].tolist() == [1] * 14
    assert on[1].tolist() == [-1] * 14
    assert (label[0, xy[0, :7, 1], xy[0, :7, 0]] == 2).all()
    assert (label[0, xy[0, 7:, 1], xy[0, 7:, 0]] == 4).all()
    assert found.boxes.tolist() == [[[5, 3, 19, 12]], [[0, 0, 22, 18]]]
    assert found.source == "oracle"
    again = oracle_prompts(label, 5, [2, 4], 7, seed=3)
    assert torch.equal(found.points, again.points)
    assert not torch.equal(found.points, oracle_prompts(label, 5, [2, 4], 7, seed=4).points)
    assert found.point_classes is None
    named = oracle_prompts(label, 5, [2, 4], 7, seed=3, named=True)
    assert torch.equal(named.points, found.points)
    assert named.point_classes.tolist() == [[2] * 7 + [4] * 7, [-1] * 14]  # padding names nothing
