"""The terms of eq. 1: by hand, against slow independent code, and blind where they must be blind."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.nn import functional as F

from fusionsam.config.schema import Config, LossConfig, TrainConfig
from fusionsam.errors import InputError
from fusionsam.metrics.fusion import fusion_metrics
from fusionsam.training.losses import (
    IGNORE,
    class_weights,
    dice_loss,
    focal_loss,
    fusion_loss,
    fusion_measures,
    fusion_terms,
    gradient,
    longer_gradient,
    lovasz_loss,
    prompt_loss,
    reconstruction_loss,
    segmentation_loss,
    ssim,
    teacher_loss,
)
from fusionsam.training.segmentation_task import SegmentationTask
from fusionsam.types import Batch

KINDS = ("ce_dice", "ce_lovasz", "focal_dice")


def log_odds(probabilities) -> torch.Tensor:
    """(pixels, K) probabilities -> logits (1,K,1,pixels)."""
    return torch.tensor(probabilities).log().T[None, :, None]


def test_class_weights_by_hand():
    shares = torch.tensor([0.98, 0.02])
    heavy = [1 / math.log(2.0), 1 / math.log(1.04)]  # 1.4427, 25.4968
    mean = sum(heavy) / 2
    torch.testing.assert_close(class_weights(shares, 1.0), torch.tensor([w / mean for w in heavy]))
    roots = [math.sqrt(w) for w in heavy]
    torch.testing.assert_close(class_weights(shares, 0.5), torch.tensor([2 * w / sum(roots) for w in roots]))
    assert class_weights(shares, 0.0).tolist() == [1, 1]
    assert class_weights(torch.tensor([1.0, 0.0, 0.0]), 0.5).isfinite().all()


def test_dice_by_hand():
    logits = log_odds([[0.75, 0.25, 1e-9], [0.5, 0.5, 1e-9], [0.25, 0.75, 1e-9]])
    label = torch.tensor([[[0, 0, 1]]])
    # class 0: 2 (0.75 + 0.5) / (1.5 + 2); class 1: 2 * 0.75 / (1.5 + 1); class 2 does not occur
    expected = 1 - (2.5 / 3.5 + 1.5 / 2.5) / 2
    assert dice_loss(logits, label).item() == pytest.approx(expected, abs=1e-5)
    # an ignored third pixel leaves class 0 alone: 2 * 1.25 / (1.25 + 2)
    label[0, 0, 2] = IGNORE
    assert dice_loss(logits, label).item() == pytest.approx(1 - 2.5 / 3.25, abs=1e-5)


def slow_lovasz(probabilities: np.ndarray, target: np.ndarray) -> float:
    """The Lovasz extension as it is defined: sorted errors, each times the step of the Jaccard loss it brings, the
    Jaccard loss counted anew from sets every time (arXiv 1705.08790, eq. 9)."""
    losses = []
    for class_id in np.unique(target):
        truth = {i for i, t in enumerate(target) if t == class_id}
        errors = [1 - p if i in truth else p for i, p in enumerate(probabilities[:, class_id])]
        order = sorted(range(len(errors)), key=lambda i: -errors[i])

        def jaccard(wrong: set[int], truth: set[int] = truth) -> float:
            return len(wrong) / len(truth | wrong)

        steps = [jaccard(set(order[: k + 1])) - (jaccard(set(order[:k])) if k else 0) for k in range(len(order))]
        losses.append(sum(errors[i] * step for i, step in zip(order, steps, strict=True)))
    return float(np.mean(losses))


def test_lovasz_is_the_extension_of_the_jaccard_loss():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3, 7)
    label = torch.randint(0, 4, (2, 3, 7))
    label[0, 0, :2] = IGNORE
    valid = (label != IGNORE).flatten()
    flat = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, 5)[valid].numpy()
    expected = slow_lovasz(flat, label.flatten()[valid].numpy())
    assert lovasz_loss(logits, label).item() == pytest.approx(expected, abs=1e-5)
    # for certain predictions it is the mean Jaccard loss itself: class 0 has 1/3 of its union right, class 1 has 0
    hard = 50 * F.one_hot(torch.tensor([[[0, 1, 0]]]), 3).permute(0, 3, 1, 2).float()
    assert lovasz_loss(hard, torch.tensor([[[0, 0, 1]]])).item() == pytest.approx((2 / 3 + 1) / 2, abs=1e-5)


@pytest.mark.parametrize("loss", [dice_loss, lovasz_loss])
def test_sums_over_many_pixels_survive_half_precision(loss):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 300, 300, generator=generator)
    label = torch.randint(0, 3, (1, 300, 300), generator=generator)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = logits.clone().requires_grad_()
        value = loss(given.to(dtype), label)
        value.backward()
        found.append((value.item(), given.grad.flatten()))
    assert found[1][0] == pytest.approx(found[0][0], abs=5e-3)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99


def test_fusion_terms_are_those_of_full_precision_under_autocast():
    torch.manual_seed(2)
    base = 0.5 + 0.01 * torch.randn(1, 1, 40, 40)  # flat: its variance is below what bfloat16 can tell
    fused, visible = (base + 0.01 * torch.randn(1, 3, 40, 40) for _ in range(2))
    fused = fused.bfloat16()
    exact = fusion_terms(fused.float(), visible, base)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fusion_terms(fused, visible, base)
    for name, value in exact.items():
        torch.testing.assert_close(mixed[name], value, msg=name)


def test_focal_loss():
    torch.manual_seed(1)
    logits, label = torch.randn(2, 5, 3, 7), torch.randint(0, 5, (2, 3, 7))
    label[1, 2] = IGNORE
    plain = F.cross_entropy(logits, label, ignore_index=IGNORE)
    torch.testing.assert_close(focal_loss(logits, label, None, gamma=0.0), plain)
    one = log_odds([[0.75, 0.25]])
    weights = torch.tensor([3.0, 7.0])
    # w (1 - p)^2 (-log p) with p = 0.25
    expected = 7 * 0.75**2 * -math.log(0.25)
    assert focal_loss(one, torch.tensor([[[1]]]), weights).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_segmentation_loss_is_pixel_plus_region(kind):
    torch.manual_seed(2)
    logits, label = torch.randn(2, 5, 3, 7), torch.randint(0, 5, (2, 3, 7))
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.25])
    config = LossConfig(segmentation=kind, dice_weight=0.7)
    pixel = focal_loss(logits, label, weights) if kind == "focal_dice" else F.cross_entropy(logits, label, weights)
    region = lovasz_loss(logits, label) if kind == "ce_lovasz" else dice_loss(logits, label)
    torch.testing.assert_close(segmentation_loss(logits, label, config, weights), pixel + 0.7 * region)
    sure = 50 * F.one_hot(label, 5).permute(0, 3, 1, 2).float()
    assert segmentation_loss(sure, label, config, weights).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_pixels_count_for_nothing(kind):
    torch.manual_seed(3)
    config, weights = LossConfig(segmentation=kind), torch.rand(5) + 0.5
    logits, label = torch.randn(2, 5, 3, 7), torch.randint(0, 5, (2, 3, 7))
    label[:, :, 4:] = IGNORE
    padded = logits.clone().requires_grad_()
    loss = segmentation_loss(padded, label, config, weights)
    torch.testing.assert_close(loss, segmentation_loss(logits[..., :4], label[..., :4], config, weights))
    loss.backward()
    assert padded.grad[..., 4:].abs().max() == 0
    assert padded.grad[..., :4].abs().min() > 0
    # nothing but ignored pixels: zero, with a gradient of zeros, not nan
    blank = logits.clone().requires_grad_()
    nothing = segmentation_loss(blank, torch.full_like(label, IGNORE), config, weights)
    nothing.backward()
    assert nothing == 0
    assert (blank.grad == 0).all()


# -- the mask prompt ---------------------------------------------------------------------------------------------


def test_prompt_loss_by_hand():
    label = torch.zeros(1, 4, 8, dtype=torch.long)
    label[0, :, :4] = 3
    label[0, 0, 4:] = 2  # a quarter of the second cell is foreground
    mask = torch.tensor([[[[math.log(3.0), 0.0]]]])  # probabilities 0.75 and 0.5
    pixel = (5 * -math.log(0.75) + 2 * -math.log(0.5)) / 2  # weights 1 + 4 * target
    dice = 1 - (2 * (0.75 * 1 + 0.5 * 0.25) + 1) / (1.25 + 1.25 + 1)
    assert prompt_loss(mask, label, [2, 3]).item() == pytest.approx(pixel + dice, abs=1e-5)


def test_prompt_loss_is_blind_to_padding():
    torch.manual_seed(4)
    label = torch.randint(0, 5, (2, 12, 20))
    label[:, :, 12:] = IGNORE
    mask = torch.randn(2, 1, 3, 5, requires_grad=True)
    loss = prompt_loss(mask, label, [1, 2])
    loss.backward()
    assert mask.grad[..., 3:].abs().max() == 0
    assert mask.grad[..., :3].abs().min() > 0
    assert prompt_loss(mask.detach(), torch.full_like(label, IGNORE), [1, 2]).item() == pytest.approx(0, abs=1e-6)


def test_a_cell_with_few_labelled_pixels_aims_at_the_share_among_them():
    label = torch.zeros(1, 4, 8, dtype=torch.long)
    label[0, :2, :4] = 3  # one cell whole foreground, but half of it labelled; the other background
    label[0, 2:, :4] = IGNORE
    mask = torch.tensor([[[[math.log(3.0), 0.0]]]])
    pixel = (0.5 * 5 * -math.log(0.75) - math.log(0.5)) / 1.5
    dice = 1 - (2 * 0.5 * 0.75 + 1) / (0.5 * 0.75 + 0.5 + 0.5 + 1)
    assert prompt_loss(mask, label, [3]).item() == pytest.approx(pixel + dice, abs=1e-5)


def test_prompt_loss_keeps_cells_where_the_network_padded():
    torch.manual_seed(5)
    label = torch.randint(0, 5, (2, 11, 13))
    mask = torch.randn(2, 1, 4, 5)
    padded = F.pad(label, (0, 7, 0, 5), value=IGNORE)
    torch.testing.assert_close(prompt_loss(mask, label, [1, 2]), prompt_loss(mask, padded, [1, 2]))


# -- the fused picture -------------------------------------------------------------------------------------------


def test_ssim_equals_skimage():
    torch.manual_seed(6)
    one = torch.rand(3, 1, 23, 31)
    two = (0.7 * one + 0.3 * torch.rand(3, 1, 23, 31)).clamp(0, 1)
    maps = [
        structural_similarity(
            a[0].numpy(), b[0].numpy(), win_size=7, data_range=1.0, gaussian_weights=False,
            use_sample_covariance=False, full=True,
        )[1][3:-3, 3:-3]
        for a, b in zip(one.double(), two.double(), strict=True)
    ]  # fmt: skip
    assert ssim(one.double(), two.double()).item() == pytest.approx(float(np.mean(maps)), abs=1e-9)
    assert ssim(one, two).item() == pytest.approx(float(np.mean(maps)), abs=1e-4)
    assert ssim(one, one).item() == pytest.approx(1, abs=1e-6)


def ramp(right: float, down: float) -> torch.Tensor:
    return right * torch.arange(7.0).view(1, 1, 1, 7) + down * torch.arange(5.0).view(1, 1, 5, 1)


def test_gradient_of_ramps_and_the_longer_of_two():
    def inner(found: torch.Tensor) -> list[float]:
        assert found.shape == (1, 2, 5, 7)
        assert found[0, :, 1:-1, 1:-1].std(dim=(1, 2)).max() < 1e-6
        return found[0, :, 2, 3].tolist()

    assert inner(gradient(ramp(0.1, -0.05))) == pytest.approx([0.1, -0.05], abs=1e-6)
    # (0.08, 0.08) is shorter than (-0.12, 0), though its sum of magnitudes is larger
    assert inner(longer_gradient(ramp(0.08, 0.08), ramp(-0.12, 0.0))) == pytest.approx([-0.12, 0.0], abs=1e-6)
    assert inner(longer_gradient(ramp(-0.12, 0.0), ramp(0.08, 0.08))) == pytest.approx([-0.12, 0.0], abs=1e-6)


def test_an_edge_turned_round_is_not_the_same_edge():
    visible = (0.3 + 0.05 * torch.arange(7.0)).expand(1, 3, 9, 7)
    infrared = torch.full((1, 1, 9, 7), 0.5)
    kept, turned = (fusion_terms(fused, visible, infrared)["gradient"] for fused in (visible, 1 - visible))
    assert kept.item() == pytest.approx(0, abs=1e-6)
    # at the border the replicated pixels halve the difference
    assert turned.item() == pytest.approx(2 * 0.05 * (5 + 2 * 0.5) / 7, abs=1e-6)


def grey(value: float, size=(11, 13)) -> torch.Tensor:
    return torch.full((1, 1, *size), value)


def test_fusion_terms_of_flat_pictures_by_hand():
    visible = torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1).expand(1, 3, 11, 13)
    y1 = 0.299 * 0.5 + 0.587 * 0.25 + 0.114 * 0.125
    terms = fusion_terms(grey(0.75).expand(1, 3, -1, -1), visible, grey(0.25))
    assert terms["intensity"].item() == pytest.approx(0.75 - max(y1, 0.25), abs=1e-6)
    assert terms["gradient"].item() == pytest.approx(0, abs=1e-6)
    cr, cb = (0.5 - y1) / 1.402, (0.125 - y1) / 1.772
    assert terms["color"].item() == pytest.approx((abs(cr) + abs(cb)) / 2, abs=1e-6)
    # without texture SSIM is its luminance term (float32 leaves some 1e-8 of variance beside the constant 9e-4)
    luminance = [(2 * 0.75 * v + 1e-4) / (0.75**2 + v**2 + 1e-4) for v in (y1, 0.25)]
    assert terms["ssim"].item() == pytest.approx(1 - sum(luminance) / 2, abs=5e-4)
    config = LossConfig(intensity_weight=2, gradient_weight=3, color_weight=5, ssim_weight=7)
    total = 2 * terms["intensity"] + 3 * terms["gradient"] + 5 * terms["color"] + 7 * terms["ssim"]
    torch.testing.assert_close(fusion_loss(terms, config), total)


def test_the_ideal_picture_costs_nothing():
    torch.manual_seed(7)
    same = torch.rand(2, 1, 11, 13)
    for name, term in fusion_terms(same.expand(-1, 3, -1, -1), same.expand(-1, 3, -1, -1), same).items():
        assert term.item() == pytest.approx(0, abs=1e-5), name
    # where infrared is the brighter and steeper one, its luma with the visible chroma is best but for SSIM
    visible, infrared = 0.3 * torch.rand(2, 3, 1, 1).expand(2, 3, 11, 13), 0.4 + 0.5 * same
    y1 = (visible * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    best = fusion_terms(infrared + visible - y1, visible, infrared)
    for name in ("intensity", "gradient", "color"):
        assert best[name].item() == pytest.approx(0, abs=1e-6), name


def test_an_absent_modality_is_replaced_by_the_other():
    torch.manual_seed(8)
    fused, visible, infrared = torch.rand(2, 3, 11, 13), torch.rand(2, 3, 11, 13), torch.rand(2, 1, 11, 13)
    present = torch.tensor([[True, False], [False, True]])
    y1 = (visible * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    expected = fusion_terms(
        fused,
        torch.stack([visible[0], infrared[1].expand(3, -1, -1)]),
        torch.stack([y1[0], infrared[1]]),
    )
    for name, value in fusion_terms(fused, visible, infrared, present).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_every_fusion_term_has_a_gradient():
    torch.manual_seed(9)
    visible, infrared = torch.rand(1, 3, 11, 13), torch.rand(1, 1, 11, 13)
    for name in ("intensity", "gradient", "color", "ssim"):
        fused = torch.rand(1, 3, 11, 13, requires_grad=True)
        fusion_terms(fused, visible, infrared)[name].backward()
        assert fused.grad.isfinite().all()
        assert fused.grad.abs().max() > 0, name


def test_reconstruction_loss_by_hand():
    image, rebuilt = torch.zeros(1, 1, 1, 3), torch.tensor([[[[0.1, -0.2, 0.3]]]])
    assert reconstruction_loss(image, rebuilt).item() == pytest.approx((0.01 + 0.04 + 0.09) / 3)


def test_losses_prefer_the_truth_over_every_other_labelling():
    """Small enough to try every labelling of three pixels: none scores below the truth."""
    label = torch.tensor([[[0, 1, 1]]])
    for kind in KINDS:
        config = LossConfig(segmentation=kind)
        values = {
            guess: segmentation_loss(
                8 * F.one_hot(torch.tensor([[guess]]), 2).permute(0, 3, 1, 2).float(), label, config, None
            ).item()
            for guess in itertools.product((0, 1), repeat=3)
        }
        assert min(values, key=values.get) == (0, 1, 1), kind


def test_a_frozen_tokenizer_stays_and_its_losses_are_left_out(make_debug):
    batch = Batch(
        torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64), torch.randint(9, (2, 64, 64)), torch.ones(2, 2) > 0
    )
    names = []
    for freeze in (False, True):
        network = make_debug()
        config = Config(model=network.config, train=TrainConfig(freeze_tokenizer=freeze))
        task = SegmentationTask(network.train(), config, 10, torch.full((9,), 1 / 9))
        task.on_train_batch_start(batch, 0)
        names.append(set(task.losses(network(batch.visible, batch.infrared), batch)))
        learning = {n for n, p in network.tokenizer.named_parameters() if p.requires_grad}
        assert learning == {"missing"} if freeze else len(learning) > 1
        assert network.tokenizer.training is not freeze
    assert names[0] - names[1] == {"commitment", "reconstruction"}


def test_a_frozen_picture_stays_and_everything_behind_it_learns(make_debug, pair):
    network = make_debug()
    train = TrainConfig(freeze_tokenizer=True, freeze_picture=True, lr=0.01, warmup_steps=0)
    task = SegmentationTask(network, Config(model=network.config, train=train), 10, torch.full((9,), 1 / 9))
    batch = Batch(*pair, torch.randint(9, (2, *pair[0].shape[2:])), torch.ones(2, 2) > 0)
    with torch.no_grad():
        before = network(*pair)
    optimizer = task.configure_optimizers()["optimizer"]
    network.train()
    task.on_train_batch_start(batch, 0)
    terms = task.losses(network(*pair), batch)
    assert set(terms) == {"segmentation", "fot"}
    torch.stack(list(terms.values())).sum().backward()
    optimizer.step()
    for name, part in network.parts().items():
        held = name in ("tokenizer", "fusion", "picture_head")
        assert any(p.requires_grad for p in part.parameters()) is not held, name
    with torch.no_grad():
        after = network.eval()(*pair)
    assert torch.equal(before.fused, after.fused)
    assert torch.equal(before.mask_prompt, after.mask_prompt)
    assert not torch.allclose(before.logits, after.logits, atol=1e-3)


def test_a_teacher_is_followed_where_it_is_sure():
    """Logits on a grid of 2 x 2 cells of 3 x 3 pixels: the id of a cell is that of its middle pixel."""
    taught = torch.full((1, 6, 6), IGNORE)
    taught[0, 1, 1], taught[0, 4, 4], taught[0, 0, 5] = 2, 0, 1  # the last is no middle of a cell
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    assert float(teacher_loss(logits, taught).detach()) == pytest.approx(math.log(3))
    (slope,) = torch.autograd.grad(teacher_loss(logits, taught), logits)
    assert slope[0, 2, 0, 0] < 0 < slope[0, 0, 0, 0]
    assert not slope[0, :, 0, 1].any()
    assert float(teacher_loss(logits.detach(), torch.full((1, 6, 6), IGNORE))) == 0
    with pytest.raises(InputError, match=r"^data\.teacher_labels: id 2, but data\.teacher_classes is 2; set it to"):
        teacher_loss(logits[:, :2], taught)


def smooth(seed: int, size=(240, 320)) -> torch.Tensor:
    """(1,1,H,W) in [0,1], edges in all directions."""
    rough = torch.rand(1, 1, size[0] // 6, size[1] // 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(rough, size, mode="bilinear")


def test_fusion_measures_are_those_of_numpy():
    visible, infrared = smooth(1), smooth(2)
    for fused in ((visible + infrared) / 2, torch.maximum(visible, infrared), visible):
        found = fusion_measures(fused, visible, infrared)
        wanted = fusion_metrics(*(255 * x[0, 0].double().numpy() for x in (visible, infrared, fused)))
        assert list(found) == ["VIF", "Qabf", "SSIM", "SCD"]
        for name, value in found.items():
            assert value.shape == (1,)
            assert value.item() == pytest.approx(wanted[name], abs=0.01), name


def test_fusion_measures_have_a_gradient_on_flat_pictures_too():
    flat = torch.full((2, 1, 48, 48), 0.5)
    for visible, infrared in ((flat, flat), (smooth(3, (48, 48)).repeat(2, 1, 1, 1), flat)):
        fused = ((visible + infrared) / 2).requires_grad_()
        torch.stack([value.sum() for value in fusion_measures(fused, visible, infrared).values()]).sum().backward()
        assert fused.grad.isfinite().all()
