"""The whole network: sizes, batches, absent modalities, prompts, large inputs, and what it refuses."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from conftest import build_debug
from fusionsam.config.schema import preset
from fusionsam.errors import InputError
from fusionsam.models.network import FusionSAMNetwork, parameter_table
from fusionsam.types import Prompts

network = functools.cache(build_debug)  # never changed by a test that takes it from here


def random_pair(batch: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator), torch.rand(
        batch, 1, height, width, generator=generator
    )


def test_debug_is_small():
    total = sum(row.parameters for row in parameter_table(network()))
    assert total == sum(p.numel() for p in network().parameters())
    assert 100_000 < total < 200_000


def test_vit_h_counts_as_published():
    with torch.device("meta"):
        rows = {row.part: row for row in parameter_table(FusionSAMNetwork(preset("vit_h")))}
    # segment-anything's sam_vit_h: image encoder 637,026,048; prompt encoder 6,220 and its 2 x 128 fixed frequencies;
    # mask decoder 4,058,340 with four tokens, and for each of five classes more a token, a hypernetwork
    # (256-256-256-32) and a row of the IoU head; then the logit scale
    hypernetwork = 2 * (256 * 256 + 256) + 256 * 32 + 32
    assert rows["image_encoder"] == ("image_encoder", 637_026_048, 0)
    assert rows["prompt_encoder"].parameters == 6_220 + 2 * 128
    assert rows["mask_decoder"].parameters == 4_058_340 + 5 * (256 + hypernetwork + 256 + 1) + 1


@torch.no_grad()
def test_coarser_keys_need_no_wider_padding():
    config = preset("debug")
    config.fusion.kv_stride = 16  # of 20 x 28 latent cells
    coarse = FusionSAMNetwork(config).eval()
    assert coarse.multiple == network().multiple
    assert coarse(*random_pair(1, 80, 112)).features.shape[2:] == (20, 28)


@torch.no_grad()
@settings(max_examples=12, deadline=None, derandomize=True)
@given(height=st.integers(64, 200), width=st.integers(64, 200), batch=st.integers(1, 2), dark=st.booleans())
def test_any_size_and_batch(height, width, batch, dark):
    visible, infrared = random_pair(batch, height, width, seed=height * width)
    output = network()(visible * 0 if dark else visible, infrared)
    assert output.logits.shape == output.fot_logits.shape == (batch, 9, height, width)
    assert output.fused.shape == (batch, 3, height, width)
    assert 0 <= output.fused.min() <= output.fused.max() <= 1
    for name, value in {"logits": output.logits, "fot_logits": output.fot_logits, "mask": output.mask_prompt}.items():
        assert value.isfinite().all(), name


@torch.no_grad()
@pytest.mark.parametrize("mode", ["self", "none"])
def test_an_image_alone_is_the_image_in_a_batch(mode):
    visible, infrared = random_pair(3, 70, 83)
    present = torch.tensor([[True, True], [True, False], [False, True]])
    together = network()(visible, infrared, mode=mode, present=present)
    for row in range(3):
        one = slice(row, row + 1)
        given = (visible[one] if present[row, 0] else None, infrared[one] if present[row, 1] else None)
        for alone in (
            network()(visible[one], infrared[one], mode=mode, present=present[one]),
            network()(*given, mode=mode),  # marked absent = not given
        ):
            for name in ("logits", "fot_logits", "fused", "mask_prompt", "features"):
                torch.testing.assert_close(
                    getattr(alone, name), getattr(together, name)[one], rtol=1e-4, atol=1e-5,
                    msg=lambda text, row=row, name=name: f"row {row}, {name}: {text}",
                )  # fmt: skip


@torch.no_grad()
def test_both_modalities_count():
    visible, infrared = random_pair(1, 70, 83)
    whole = network()(visible, infrared).logits
    for changed in (network()(visible.flip(3), infrared), network()(visible, infrared.flip(3))):
        assert (changed.logits - whole).abs().max() > 1e-2


@torch.no_grad()
def test_either_modality_serves_alone():
    visible, infrared = random_pair(2, 70, 83)
    # the picture of a lone modality is that modality, for blending begins as the average
    torch.testing.assert_close(network()(visible, None).fused, visible, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network()(None, infrared).fused, infrared.expand(2, 3, 70, 83), rtol=1e-5, atol=1e-5)
    # blank frames of absent modalities are not looked at
    present = torch.tensor([[True, False]] * 2)
    expected = network()(visible, torch.zeros_like(infrared), present=present)
    assert torch.equal(network()(visible, infrared, present=present).logits, expected.logits)


@pytest.mark.parametrize(
    ("visible", "infrared", "told"),
    [
        (None, None, "visible and infrared are both None"),
        ((1, 1, 64, 64), (1, 1, 64, 64), r"visible: found shape \(1, 1, 64, 64\), expected \(batch, 3,"),
        ((1, 3, 64, 64), (1, 3, 64, 64), r"infrared: found shape \(1, 3, 64, 64\), expected \(batch, 1,"),
        ((3, 64, 64), None, r"visible: found shape \(3, 64, 64\)"),
        ((1, 3, 63, 64), None, "visible: found 63x64 pixels, expected 64 to 4096"),
        (None, (1, 1, 64, 4097), "infrared: found 64x4097 pixels, expected 64 to 4096"),
        ((1, 3, 64, 67), (1, 1, 64, 71), r"\(1, 64, 67\) and \(1, 64, 71\); give an aligned pair"),
        ((1, 3, 64, 64), (2, 1, 64, 64), r"\(1, 64, 64\) and \(2, 64, 64\); give an aligned pair"),
    ],
)
def test_refusals_name_what_was_found(visible, infrared, told):
    images = [None if shape is None else torch.zeros(shape) for shape in (visible, infrared)]
    with pytest.raises(InputError, match=told) as caught:
        network()(*images)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_large_inputs_keep_their_detail(make_debug):
    small = make_debug(lambda config: setattr(config, "max_side", 96))
    visible, infrared = random_pair(2, 181, 130)
    output = small(visible, infrared)
    # the picture is blended at full size: pixel noise survives
    average = 0.5 * visible + 0.5 * infrared
    inside = (output.fused > 0).all(1) & (output.fused < 1).all(1)  # clamping moves luma
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(
        (output.fused * weights).sum(1)[inside], (average * weights).sum(1)[inside], rtol=1e-4, atol=1e-4
    )
    # the logits are those of the copy reduced to 96 x 69, resized
    reduced = [F.interpolate(x, size=(96, 69), mode="bilinear", antialias=True) for x in (visible, infrared)]
    alone = small(*reduced)
    expected = F.interpolate(alone.logits, size=(181, 130), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    # and its points are told in pixels of the whole input
    factor = torch.tensor([130 / 69, 181 / 96])
    torch.testing.assert_close(output.prompts.points, (alone.prompts.points + 0.5) * factor - 0.5)
    torch.testing.assert_close(
        output.prompts.boxes.reshape(2, 1, 2, 2), (alone.prompts.boxes.reshape(2, 1, 2, 2) + 0.5) * factor - 0.5
    )


@torch.no_grad()
def test_prompts_that_are_given_are_recorded_and_steer():
    visible, infrared = random_pair(1, 70, 83)
    own = network()(visible, infrared)
    assert own.prompts.source == "self"
    results = []
    for xy in ([5.0, 7.0], [61.0, 53.0]):
        clicked = Prompts(torch.tensor([[xy]]), torch.tensor([[1]]), source="user")
        output = network()(visible, infrared, clicked)
        assert output.prompts.source == "user"
        assert output.prompts.points.tolist() == [[xy]]
        assert output.prompts.boxes is None
        assert clicked.mask is None  # the caller's own object is left alone
        assert torch.equal(output.prompts.mask, own.mask_prompt)
        results.append(output.logits)
    boxed = network()(visible, infrared, Prompts(boxes=torch.tensor([[[5.0, 7.0, 61.0, 53.0]]]), source="user"))
    results += [boxed.logits, own.logits]
    for i, one in enumerate(results):
        for two in results[:i]:
            assert not torch.allclose(one, two, atol=1e-5)
    # what the network gave itself, handed back, changes nothing
    assert torch.equal(network()(visible, infrared, own.prompts).logits, own.logits)


@torch.no_grad()
def test_user_prompts_of_a_large_input_are_in_its_pixels(make_debug):
    small = make_debug(lambda config: setattr(config, "max_side", 96))
    visible, infrared = random_pair(1, 192, 128)
    clicked = Prompts(
        torch.tensor([[[30.0, 151.0]]]), torch.tensor([[1]]), torch.tensor([[[3.0, 5.0, 91.0, 187.0]]]), source="user"
    )
    output = small(visible, infrared, clicked)
    torch.testing.assert_close(output.prompts.points, clicked.points)
    torch.testing.assert_close(output.prompts.boxes, clicked.boxes)
    reduced = [F.interpolate(x, size=(96, 64), mode="bilinear", antialias=True) for x in (visible, infrared)]
    halved = Prompts((clicked.points - 0.5) / 2, clicked.point_labels, (clicked.boxes - 0.5) / 2, source="user")
    expected = F.interpolate(small(*reduced, halved).logits, size=(192, 128), mode="bilinear")
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    whole = small(visible, infrared, Prompts(clicked.points.long(), clicked.point_labels, clicked.boxes.long()))
    assert torch.equal(whole.logits, output.logits)


@torch.no_grad()
def test_a_given_mask_lies_over_the_picture_not_over_its_padding():
    visible, infrared = random_pair(1, 70, 83)
    own = network()(visible, infrared).mask_prompt
    mask = torch.randn(1, 1, 18, 21)  # cells of 4 pixels that hold 70 x 83
    assert own.shape[2:] == (20, 24)
    output = network()(visible, infrared, Prompts(mask=mask))
    assert torch.equal(output.prompts.mask, F.pad(mask, (0, 3, 0, 2)))
    finer = F.interpolate(mask, scale_factor=2, mode="nearest")  # bilinear halves it to the same
    torch.testing.assert_close(network()(visible, infrared, Prompts(mask=finer)).logits, output.logits)


@torch.no_grad()
def test_modes():
    visible, infrared = random_pair(1, 70, 83)
    bare = network()(visible, infrared, mode="none")
    assert bare.prompts.source == "none"
    assert bare.prompts.points is bare.prompts.point_labels is bare.prompts.boxes is None
    assert not torch.allclose(bare.logits, network()(visible, infrared).logits, atol=1e-5)
    with pytest.raises(InputError, match="mode: found 'oracle'"):
        network()(visible, infrared, mode="oracle")


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (Prompts(torch.zeros(1, 3, 2)), r"prompts\.point_labels: found None for points \(1, 3\)"),
        (Prompts(torch.zeros(1, 3, 2), torch.ones(1, 2)), r"found \(1, 2\) for points \(1, 3\)"),
        (Prompts(torch.zeros(1, 3, 3), torch.ones(1, 3)), r"prompts\.points: found shape \(1, 3, 3\)"),
        (Prompts(boxes=torch.zeros(1, 4)), r"prompts\.boxes: found shape \(1, 4\), expected \(batch, boxes, 4\)"),
        (Prompts(boxes=torch.tensor([[[9.0, 5, 7, 8]]])), r"prompts\.boxes: a box ends before it begins"),
        (Prompts(boxes=torch.zeros(3, 1, 4)), r"prompts\.boxes: found prompts for 3 images, expected 1"),
        (Prompts(mask=torch.zeros(1, 16, 16)), r"prompts\.mask: found shape \(1, 16, 16\)"),
        (Prompts(mask=torch.full((1, 1, 16, 16), torch.nan)), r"prompts\.mask: holds values that are not finite"),
    ],
)
def test_prompts_that_contradict_themselves_are_refused(prompts, told):
    with pytest.raises(InputError, match=told):
        network()(*random_pair(1, 64, 64), prompts)


@torch.no_grad()
def test_a_box_that_ends_at_the_edge_is_the_box_that_ends_at_the_last_pixel():
    pair = random_pair(1, 70, 83)
    edge, last = (Prompts(boxes=torch.tensor([[[5.0, 6.0, *end]]])) for end in ((83.0, 70.0), (82.0, 69.0)))
    assert torch.equal(network()(*pair, edge).logits, network()(*pair, last).logits)


def test_forward_takes_no_label():
    assert list(inspect.signature(FusionSAMNetwork.forward).parameters) == [
        "self", "visible", "infrared", "prompts", "mode", "present", "covered",
    ]  # fmt: skip
