"""The terms of eq. 1 and eq. 5-9 as pure functions, each with its formula and source."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusionsam.config.schema import LossConfig
from fusionsam.metrics.fusion import VIF_WINDOWS
from fusionsam.metrics.reconstruction import ssim
from fusionsam.models.color import luma
from fusionsam.models.geometry import stand_in, stand_in_where
from fusionsam.types import IGNORE, InputError


def class_weights(shares: Tensor, power: float) -> Tensor:
    """(1 / log(1.02 + share)) ** power, normalised to mean 1 (ENet, arXiv 1606.02147, has power 1).

    shares (K) sum to 1; power 0 gives ones.
    """
    weights = (1.0 / torch.log(1.02 + shares)) ** power
    return weights / weights.mean()


def dice_loss(logits: Tensor, label: Tensor, ignore: int = IGNORE) -> Tensor:
    """1 - mean over the classes that occur in the batch of 2|P.T| / (|P|+|T|) (V-Net, arXiv 1606.04797).

    logits (B,K,H,W), label int64 (B,H,W). Sums run over the whole batch, so that a class too small for one image
    still counts once.
    """
    logits = logits.float()  # sums over all pixels saturate in half precision
    probabilities = logits.softmax(1)
    valid = label != ignore
    ids = torch.where(valid, label, 0)
    # sums by class instead of a one-hot target: that one would be the largest tensor of a training step
    hit = probabilities.gather(1, ids[:, None])[:, 0] * valid
    overlap = hit.new_zeros(logits.shape[1]).index_add(0, ids.flatten(), hit.flatten())
    count = torch.bincount(label[valid], minlength=logits.shape[1])
    size = (probabilities * valid[:, None]).sum((0, 2, 3)) + count
    there = count > 0
    if not bool(there.any()):
        return logits.sum() * 0
    return 1 - (2 * overlap / size.clamp(min=1e-6))[there].mean()


def lovasz_loss(logits: Tensor, label: Tensor, ignore: int = IGNORE) -> Tensor:
    """Lovasz-Softmax over the classes present (arXiv 1705.08790): a convex surrogate of the mean Jaccard loss.

    logits (B,K,H,W), label int64 (B,H,W).
    """
    logits = logits.float()  # sums over all pixels saturate in half precision
    valid = label.flatten() != ignore
    probabilities = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, logits.shape[1])[valid]
    target = label.flatten()[valid]
    losses = []
    for class_id in target.unique().tolist():
        truth = (target == class_id).to(logits.dtype)
        errors, order = (truth - probabilities[:, class_id]).abs().sort(descending=True)
        truth = truth[order]
        union = truth.sum() + (1 - truth).cumsum(0)
        jaccard = 1 - (truth.sum() - truth.cumsum(0)) / union
        gradient = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
        losses.append(errors @ gradient)
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def focal_loss(logits: Tensor, label: Tensor, weights: Tensor | None, gamma: float = 2.0) -> Tensor:
    """Mean of w (1 - p)^gamma (-log p) over valid pixels (arXiv 1708.02002)."""
    plain = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    scaled = (1 - torch.exp(-plain)) ** gamma * plain
    valid = label != IGNORE
    if weights is not None:
        scaled = scaled * weights[torch.where(valid, label, 0)]
    return (scaled * valid).sum() / valid.sum().clamp(min=1)


def segmentation_loss(logits: Tensor, label: Tensor, config: LossConfig, weights: Tensor | None) -> Tensor:
    """f_s of eq. 1 on (B,K,H,W) logits: cross-entropy + Dice, or one of the alternatives of the configuration."""
    if config.segmentation == "focal_dice":
        pixel = focal_loss(logits, label, weights)
    elif bool((label != IGNORE).any()):
        pixel = F.cross_entropy(logits, label, weight=weights, ignore_index=IGNORE)
    else:
        pixel = logits.sum() * 0  # cross_entropy is nan where nothing counts
    region = lovasz_loss if config.segmentation == "ce_lovasz" else dice_loss
    return pixel + config.dice_weight * region(logits, label)


def teacher_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B,C,h,w) to a teacher's ids int64 (B,H,W), read at each cell's middle; 255 counts
    nowhere. InputError for an id of C or more."""
    cells = F.interpolate(taught[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0].long()
    valid = cells != IGNORE
    if not bool(valid.any()):
        return logits.sum() * 0
    if int(highest := cells[valid].max()) >= logits.shape[1]:
        raise InputError(
            f"data.teacher_labels: id {int(highest)}, but data.teacher_classes is {logits.shape[1]}; set it to one "
            "more than the highest id"
        )
    return F.cross_entropy(logits, cells, ignore_index=IGNORE)


def prompt_loss(mask_prompt: Tensor, label: Tensor, foreground: list[int]) -> Tensor:
    """Binary cross-entropy plus Dice of the mask prompt (B,1,h,w) to the share of foreground among the labelled pixels
    of each cell; a cell counts as far as it is labelled.

    label int64 (B,4h,4w), or smaller where the network padded at right and bottom. Only a loss: the label never enters
    forward.
    """
    bottom, right = (max(0, 4 * mask_prompt.shape[i] - label.shape[i - 1]) for i in (2, 3))
    label = F.pad(label, (0, right, 0, bottom), value=IGNORE)
    table = torch.zeros(256, device=label.device)
    table[torch.tensor(foreground, device=label.device, dtype=torch.long)] = 1
    cells = (mask_prompt.shape[2], mask_prompt.shape[3])
    found = F.adaptive_avg_pool2d(table[label][:, None], cells)
    valid = F.adaptive_avg_pool2d((label != IGNORE).float()[:, None], cells)
    target = found / valid.clamp(min=1e-6)
    weight = valid * (1 + 4 * target)
    pixel = F.binary_cross_entropy_with_logits(mask_prompt, target, weight=weight, reduction="sum")
    pixel = pixel / valid.sum().clamp(min=1)
    probability = mask_prompt.sigmoid() * valid
    dice = 1 - (2 * (probability * target).sum() + 1) / (probability.sum() + found.sum() + 1)
    return pixel + dice


def gradient(grey: Tensor) -> Tensor:
    """Sobel_x and Sobel_y (B,2,H,W) of (B,1,H,W), replicated border."""
    kernel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), torch.stack([kernel, kernel.T])[:, None])


def longer_gradient(one: Tensor, two: Tensor) -> Tensor:
    """At each pixel the gradient (B,2,H,W) of that of two (B,1,H,W) images whose gradient is longer, with its sign: the
    magnitude alone would be content with an edge turned round."""
    a, b = gradient(one), gradient(two)
    return torch.where((a * a).sum(1, keepdim=True) >= (b * b).sum(1, keepdim=True), a, b)


def fusion_terms(
    fused: Tensor,
    visible: Tensor,
    infrared: Tensor,
    present: Tensor | None = None,
    covered: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of f_f (no ground truth exists): intensity, gradient, color, ssim, unweighted.

    fused, visible (B,3,H,W), infrared (B,1,H,W) in [0,1]. L1 to max(Y1, I2); L1 of grad I_f to the longer of the
    sources' (as vectors; PIAFusion, Inf. Fusion 83-84, 2022, compares magnitudes); L1 of Cb, Cr to the visible image's;
    1 - SSIM to both. Where a modality is absent (`present` bool (B,2)), or its camera does not reach (`covered` bool
    (B,2,H,W)), the other one stands for both.
    """
    # variances and edges are small differences, which half precision rounds away
    with torch.autocast(fused.device.type, enabled=False):
        precision = torch.promote_types(fused.dtype, torch.float32)
        visible, infrared = stand_in(visible.to(precision), infrared.to(precision), present)
        if covered is not None:
            visible, infrared = stand_in_where(visible, infrared, covered)
        return _fusion_terms(fused.to(precision), visible, infrared)


def _fusion_terms(fused: Tensor, visible: Tensor, infrared: Tensor) -> dict[str, Tensor]:
    y1 = luma(visible)
    y = luma(fused)
    color = (fused - y) - (visible - y1)
    return {
        "intensity": F.l1_loss(y, torch.maximum(y1, infrared)),
        "gradient": (gradient(y) - longer_gradient(y1, infrared)).abs().sum(1).mean(),
        # R-Y and B-Y are Cr and Cb up to their constant factors
        "color": 0.5 * ((color[:, 0] / 1.402).abs().mean() + (color[:, 2] / 1.772).abs().mean()),
        "ssim": 1 - 0.5 * (ssim(y, y1) + ssim(y, infrared)),
    }


def fusion_loss(terms: dict[str, Tensor], config: LossConfig) -> Tensor:
    """f_f of eq. 1: the weighted sum of `fusion_terms`."""
    return (
        config.intensity_weight * terms["intensity"]
        + config.gradient_weight * terms["gradient"]
        + config.color_weight * terms["color"]
        + config.ssim_weight * terms["ssim"]
    )


def reconstruction_loss(image: Tensor, reconstruction: Tensor, there: Tensor | None = None) -> Tensor:
    """L_rec, eq. 5, as a mean over pixels: ||I - I^||^2; of those that are `there` (bool (B,1,H,W))."""
    if there is None:
        return F.mse_loss(reconstruction, image)
    square = (reconstruction - image).square() * there
    return square.sum() / (there.sum() * image.shape[1]).clamp(min=1)


def _windows(x: Tensor, size: int, sigma: float, step: int = 1) -> Tensor:
    """Separable Gaussian of `size` taps over each channel of (B,C,H,W), only where the window lies inside."""
    offset = torch.arange(size, device=x.device, dtype=x.dtype) - (size - 1) / 2
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, size)
    rows = F.conv2d(x, kernel[..., None], stride=(step, 1), groups=x.shape[1])
    return F.conv2d(rows, kernel[:, :, None], stride=(1, step), groups=x.shape[1])


def _moments(source: Tensor, fused: Tensor, size: int, sigma: float) -> tuple[Tensor, ...]:
    """Local means, variances and covariance of two (B,1,H,W), each (B,h,w)."""
    stacked = torch.cat([source, fused, source * source, fused * fused, source * fused], 1)
    mean_s, mean_f, ss, ff, sf = _windows(stacked, size, sigma).unbind(1)
    return mean_s, mean_f, (ss - mean_s**2).clamp(min=0), (ff - mean_f**2).clamp(min=0), sf - mean_s * mean_f


def _vif(source: Tensor, fused: Tensor) -> Tensor:
    kept = whole = source.new_zeros(len(source))
    for size in VIF_WINDOWS:
        if size < VIF_WINDOWS[0]:
            source, fused = (_windows(x, size, size / 5, step=2) for x in (source, fused))
        _, _, var_s, var_f, covariance = _moments(source, fused, size, size / 5)
        # a hundredth of a grey level: flat places must not make the gradient explode
        gain = (covariance / (var_s + 1e-2)).clamp(min=0)
        rest = (var_f - gain * covariance).clamp(min=1e-6)
        kept = kept + torch.log1p(gain**2 * var_s / (rest + 2)).sum((1, 2))
        whole = whole + torch.log1p(var_s / 2).sum((1, 2))
    return kept / whole.clamp(min=1e-3)


def _ssim(source: Tensor, fused: Tensor) -> Tensor:
    mean_s, mean_f, var_s, var_f, covariance = _moments(source, fused, 11, 1.5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_s * mean_f + c1) / (mean_s**2 + mean_f**2 + c1)
    return (light * (2 * covariance + c2) / (var_s + var_f + c2)).mean((1, 2))


def _edges_kept(source: Tensor, fused: Tensor) -> tuple[Tensor, Tensor]:
    """Qabf's two sums (B) for one source."""
    one, two = gradient(source) * 8, gradient(fused) * 8
    strength, drawn = ((x * x).sum(1).add(1e-3).sqrt() for x in (one, two))
    ratio = torch.minimum(strength, drawn) / torch.maximum(strength, drawn)
    turned = ((one * two).sum(1).abs() / (strength * drawn)).clamp(max=0.9999)
    agreement = 1 - torch.acos(turned) / (torch.pi / 2)
    quality = 0.9994 * torch.sigmoid(15 * (ratio - 0.5)) * 0.9879 * torch.sigmoid(22 * (agreement - 0.8))
    return (quality * strength).sum((1, 2)), strength.sum((1, 2))


def _correlation(one: Tensor, two: Tensor) -> Tensor:
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (one, two))
    return (a * b).sum(1) / ((a * a).sum(1) * (b * b).sum(1)).clamp(min=1e-3).sqrt()


def fusion_measures(fused: Tensor, visible: Tensor, infrared: Tensor) -> dict[str, Tensor]:
    """VIF, Qabf, SSIM and SCD as `metrics.fusion` has them, but with a gradient: (B) each, of grey (B,1,H,W) in [0,1]
    with sides of at least 41 pixels.

    Two things differ, by a hundredth on pictures of 240x320: Qabf has no edge along the border, which those measure
    against black, and an edge near the vertical does not jump from +90 to -90 degrees.
    """
    with torch.autocast(fused.device.type, enabled=False):
        precision = torch.promote_types(fused.dtype, torch.float32)
        f, a, b = (255 * x.to(precision) for x in (fused, visible, infrared))
        (kept_a, whole_a), (kept_b, whole_b) = _edges_kept(a, f), _edges_kept(b, f)
        return {
            "VIF": _vif(a, f) + _vif(b, f),
            "Qabf": (kept_a + kept_b) / (whole_a + whole_b).clamp(min=1),
            "SSIM": (_ssim(a, f) + _ssim(b, f)) / 2,
            "SCD": _correlation(f - b, a) + _correlation(f - a, b),
        }
