"""FMP: attention against its formula, both units against eq. 10-13 written out, and the picture heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusionsam.config.schema import FusionConfig
from fusionsam.models.color import chroma, from_luma_chroma, luma
from fusionsam.models.fusion import BlendHead, DecodeHead, FusionMaskPrompting, Scales, pool
from fusionsam.models.layers import attend, resize, sincos_positions


def explicit(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V with the N x N matrix, head by head, image by image."""
    out = torch.empty(query.shape[0], value.shape[1], *query.shape[2:], dtype=query.dtype)
    width = query.shape[1] // heads
    for b in range(query.shape[0]):
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            q, k, v = (grid[b, rows].flatten(1).T for grid in (query, key, value))
            out[b, rows] = (torch.softmax(q @ k.T / math.sqrt(width), dim=1) @ v).T.reshape(width, *query.shape[2:])
    return out


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attend_is_softmax_attention(heads):
    torch.manual_seed(0)
    query, key, value = (3 * torch.randn(2, 6, *size) for size in ((5, 7), (3, 2), (3, 2)))
    torch.testing.assert_close(attend(query, key, value, heads), explicit(query, key, value, heads))


def test_keys_and_values_are_averaged_over_what_is_there():
    grid = torch.arange(15.0).reshape(1, 1, 3, 5)  # rows 0-4, 5-9, 10-14
    torch.testing.assert_close(pool(grid, 2)[0, 0], torch.tensor([[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]))
    assert pool(grid, 1) is grid
    scales = Scales.of(torch.arange(64.0).reshape(1, 1, 8, 8), FusionConfig(kv_stride=4, query_stride=2))
    assert [part.shape[-1] for part in scales] == [8, 4, 2]
    torch.testing.assert_close(scales.small, pool(scales.full, 4))


def test_positions_tell_cells_apart_and_treat_both_axes_alike():
    like = torch.zeros(())
    positions = sincos_positions(7, 11, 12, like)[0]
    cells = positions.flatten(1).T
    distances = torch.cdist(cells, cells) + 10 * torch.eye(len(cells))
    assert distances.min() > 0.1
    y_part, x_part = positions[:6], positions[6:]
    assert torch.equal(y_part, y_part[:, :, :1].expand_as(y_part))
    assert torch.equal(x_part, x_part[:, :1].expand_as(x_part))
    swapped = sincos_positions(11, 7, 12, like)[0]
    assert torch.equal(x_part, swapped[:6].transpose(1, 2))
    # sin(y), cos(y) at the first rate, 1
    torch.testing.assert_close(y_part[[0, 3], 5, 0], torch.tensor([math.sin(5), math.cos(5)]))


def set_gains(fmp: nn.Module, gain: float) -> None:
    """Of the norms after attention, which begin at zero."""
    for norm in (part for part in fmp.modules() if isinstance(part, nn.LayerNorm)):
        assert not norm.weight.any()
        nn.init.constant_(norm.weight, gain)


@pytest.mark.parametrize(("kv_stride", "query_stride"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_both_units_follow_the_equations(kv_stride, query_stride):
    torch.manual_seed(1)
    dim, heads, size = 8, 2, (6, 10)
    config = FusionConfig(heads=heads, kv_stride=kv_stride, query_stride=query_stride)
    fmp = FusionMaskPrompting(dim, config).eval()
    set_gains(fmp, 0.7)
    one, two = torch.randn(2, dim, *size), torch.randn(2, dim, *size)
    positions = sincos_positions(*size, dim, one)

    def means(grid, stride):
        return F.avg_pool2d(grid, stride, ceil_mode=True, count_include_pad=False)

    def attention(asks, key, value, projections_q):
        """At the size of the pooled queries; `key` and `value` are given at full size."""
        query = means(projections_q.query(asks) + positions, query_stride)
        return explicit(query, means(key, kv_stride), means(value, kv_stride), heads)

    def of(source, projections):
        return projections.key(source) + positions, projections.value(source)

    def large(grid):
        return F.interpolate(grid, size, mode="bilinear") if query_stride > 1 else grid

    def ln_ffn(unit, grid):
        tokens = grid.flatten(2).transpose(1, 2)
        hidden = F.gelu(F.linear(tokens, unit.up.weight, unit.up.bias))
        out = F.linear(hidden, unit.down.weight, unit.down.bias)
        out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return (out * unit.norm.weight + unit.norm.bias).transpose(1, 2).reshape(grid.shape)

    cross, comp = fmp.cross_domain, fmp.complementary
    from_two, from_one = (attention(a, *of(b, p), q) for a, b, p, q in (
        (one, two, cross.second, cross.first), (two, one, cross.first, cross.second)
    ))  # fmt: skip
    z1 = large(ln_ffn(cross.feed_first, from_two)) + cross.first.query(one)
    z2 = large(ln_ffn(cross.feed_second, from_one)) + cross.second.query(two)
    z_c = cross.merge(torch.cat([z1, z2], 1))
    shared = [attention(one, *of(two, comp.second), comp.first), attention(two, *of(one, comp.first), comp.second)]
    # each answer stands for its whole cell: the mean of what is left is the same
    cells = [F.interpolate(grid, scale_factor=query_stride)[..., : size[0], : size[1]] for grid in shared]
    z_0 = comp.distinct(torch.cat([one - cells[0], two - cells[1]], 1))
    expected = large(ln_ffn(comp.feed, attention(z_c, *of(z_0, comp.common), comp.common))) + z_c
    z_f, mask = fmp(one, two)
    torch.testing.assert_close(z_f, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mask, fmp.mask_head(expected), rtol=1e-4, atol=1e-5)


def test_attention_reaches_the_whole_picture_and_concatenation_three_cells():
    # attention adds nothing before the gains of its norms, zero at first, have learned
    for kind, gain, reach in (("fmp", 0.1, True), ("fmp", 0.0, False), ("concat", 0.0, False)):
        torch.manual_seed(2)
        fmp = FusionMaskPrompting(8, FusionConfig(kind=kind, heads=2)).eval()
        set_gains(fmp, gain)
        one, two = torch.randn(1, 8, 11, 13), torch.randn(1, 8, 11, 13)
        changed = two.clone()
        changed[..., -1, -1] += 5
        difference = (fmp(one, changed)[0] - fmp(one, two)[0]).abs().amax(1)[0]
        assert bool(difference[0, 0] > 1e-7) is reach
        assert difference[-2:, -2:].min() > 1e-4


def test_luma_and_chroma():
    torch.manual_seed(3)
    rgb = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(from_luma_chroma(luma(rgb), chroma(rgb)), rgb, rtol=1e-5, atol=1e-5)
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[:, :, None, None]
    torch.testing.assert_close(luma(colours).flatten(), torch.tensor([0.299, 0.587, 0.114, 1.0]))
    cb, cr = chroma(colours)[:, :, 0, 0].unbind(1)
    # BT.601: pure blue has Cb 0.5, pure red Cr 0.5, white neither
    assert cb[2].item() == pytest.approx(0.5, abs=1e-6)
    assert cr[0].item() == pytest.approx(0.5, abs=1e-6)
    assert chroma(colours)[3].abs().max() < 1e-6


@pytest.fixture
def scene():
    """Latents, and sources whose every mean stays inside [0,1], so that clamping hides nothing."""
    torch.manual_seed(4)
    return torch.randn(2, 8, 5, 7), 0.4 + 0.2 * torch.rand(2, 3, 20, 28), 0.4 + 0.2 * torch.rand(2, 1, 20, 28)


@pytest.mark.parametrize(("dilations", "stride"), [((), 1), ((2, 4), 1), ((2,), 2), ((), 4)])
def test_blending_begins_as_the_plain_average(scene, dilations, stride):
    z_f, visible, infrared = scene
    head = BlendHead(8, FusionConfig(picture_width=6, picture_dilations=dilations, picture_stride=stride))
    fused = head.compose(head(z_f, visible, infrared), visible, infrared)
    torch.testing.assert_close(luma(fused), (luma(visible) + infrared) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chroma(fused), chroma(visible), rtol=1e-5, atol=1e-5)


def test_compose_by_hand(scene):
    _, visible, infrared = scene

    def controls(m, r):
        return torch.tensor([m, r])[None, :, None, None].expand(2, 2, 5, 7)

    torch.testing.assert_close(BlendHead.compose(controls(1.0, 0.0), visible, infrared), visible)
    hot = BlendHead.compose(controls(0.0, 0.0), visible, infrared)
    torch.testing.assert_close(luma(hot), infrared, rtol=1e-5, atol=1e-5)
    lifted = BlendHead.compose(controls(0.25, 0.1), visible, infrared)
    torch.testing.assert_close(luma(lifted), 0.25 * luma(visible) + 0.75 * infrared + 0.1, rtol=1e-5, atol=1e-5)
    assert BlendHead.compose(controls(1.0, 0.9), visible, infrared).max() == 1
    assert BlendHead.compose(controls(1.0, -0.9), visible, infrared).min() == 0


def test_blend_controls_stay_in_their_ranges(scene):
    head = BlendHead(8, FusionConfig(picture_width=6))
    torch.nn.init.normal_(head.out.weight, std=20)
    m, r = head(*scene).split(1, dim=1)
    assert 0 <= m.min() < 0.01 < 0.99 < m.max() <= 1
    assert -0.25 <= r.min() < -0.24 < 0.24 < r.max() <= 0.25


@pytest.mark.parametrize(
    ("dilations", "stride", "seen"),
    [((), 1, (10, 14)), ((2, 4), 1, (4, 20)), ((), 2, (8, 17)), ((2,), 2, (4, 21)), ((), 4, (4, 23))],
)
def test_dilations_widen_what_a_pixel_of_the_picture_sees(dilations, stride, seen):
    """1 + 1 cells each way by the two plain convolutions, d more by each dilated one; first and last row."""
    torch.manual_seed(6)
    head = BlendHead(8, FusionConfig(picture_width=6, picture_dilations=dilations, picture_stride=stride))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z_f, visible, infrared = torch.zeros(1, 8, 6, 6), torch.rand(1, 3, 24, 24), torch.rand(1, 1, 24, 24)
    infrared.requires_grad_()
    head(z_f, visible, infrared)[0, :, 12, 12].sum().backward()
    rows = infrared.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == seen


def test_at_a_stride_every_pixel_keeps_a_mask_of_its_own():
    """A 1x1 head that hands each pixel of infrared through as the mask."""
    head = BlendHead(8, FusionConfig(picture_width=8, picture_stride=2))
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        for place in range(4):  # of a cell of 2 x 2 pixels: z_f has 4 channels of the mix, luma and infrared 4 each
            head.mix.weight[place, 8 + place, 1, 1] = 1
            head.out.weight[place, place, 1, 1] = 1
    infrared = torch.rand(1, 1, 8, 12)
    m, r = head(torch.zeros(1, 8, 2, 3), torch.zeros(1, 3, 8, 12), infrared).split(1, dim=1)
    torch.testing.assert_close(m, F.silu(infrared).sigmoid())
    assert not r.any()


def test_decoding_sees_the_latents_alone(scene):
    z_f, visible, infrared = scene
    torch.manual_seed(5)
    head = DecodeHead(8, FusionConfig(picture_width=6))
    picture = head.compose(head(z_f, visible, infrared), visible, infrared)
    assert torch.equal(picture, head.compose(head(z_f, 1 - visible, 1 - infrared), visible, infrared))
    assert not torch.allclose(picture, head.compose(head(-z_f, visible, infrared), visible, infrared))
    larger = torch.rand(2, 3, 31, 37)
    torch.testing.assert_close(head.compose(picture, larger, larger[:, :1]), resize(picture, (31, 37)))
