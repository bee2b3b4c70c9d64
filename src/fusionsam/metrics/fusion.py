"""The eleven usual measures of a fused picture, on grey (H,W) arrays in the uint8 range 0-255.

A is the visible luma, B the infrared image, F the fused luma. Everything is float64 numpy; histograms are taken after
rounding. Higher is better except where `LOWER_IS_BETTER` says so.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from fusionsam.types import LUMA, Array, InputError

Grey = NDArray[np.float64]

METRICS = ("EN", "MI", "SD", "SF", "AG", "SCD", "VIF", "Qabf", "SSIM", "PSNR", "Nabf")
"""Keys of `fusion_metrics`, in the order of the tables."""
LOWER_IS_BETTER = frozenset({"Nabf"})
VIF_WINDOWS = (17, 9, 5, 3)
"""Pixels a side of the window at each scale of VIF."""
SMALLEST_SIDE = 41
"""VIF's fourth scale is empty below this."""


def luma(image: ArrayLike) -> Grey:
    """BT.601 luma (`types.LUMA`), not rounded; uint8 range in and out.

    Accepts (3,H,W), (H,W,3), and grey (1,H,W), (H,W,1) or (H,W), which are returned as they are. InputError otherwise.
    """
    array = np.asarray(image, np.float64)
    if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
        array = array.transpose(2, 0, 1)
    if array.ndim == 3 and array.shape[0] == 3:
        return LUMA[0] * array[0] + LUMA[1] * array[1] + LUMA[2] * array[2]
    if array.ndim == 3 and array.shape[0] == 1:
        return array[0]
    if array.ndim == 2:
        return array
    raise InputError(f"image: found shape {array.shape}, expected (3,H,W), (H,W,3) or (H,W); give one picture")


def _entropy_of_counts(counts: Array) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def entropy(fused: Picture) -> float:
    """EN: entropy of the 256-bin histogram, bits a pixel, 0 to 8 (Roberts et al. 2008)."""
    return _entropy_of_counts(np.bincount(_prepared(fused).levels.ravel(), minlength=256))


def mutual_information(source: Picture, fused: Picture) -> float:
    """H(S) + H(F) - H(S,F) in bits from the 256 x 256 joint histogram (Qu et al. 2002); MI is the sum over A and B."""
    joint = np.bincount((_prepared(source).levels * 256 + _prepared(fused).levels).ravel(), minlength=65536)
    joint = joint.reshape(256, 256)
    return _entropy_of_counts(joint.sum(0)) + _entropy_of_counts(joint.sum(1)) - _entropy_of_counts(joint)


def standard_deviation(fused: Grey) -> float:
    """SD: root of the mean squared deviation from the mean, grey levels."""
    return float(fused.std())


def spatial_frequency(fused: Grey) -> float:
    """SF: root of the mean squared differences along rows plus that along columns (Eskicioglu and Fisher 1995)."""
    return float(np.sqrt((np.diff(fused, axis=0) ** 2).mean() + (np.diff(fused, axis=1) ** 2).mean()))


def average_gradient(fused: Grey) -> float:
    """AG: mean of sqrt((gx^2 + gy^2) / 2) with central differences, one-sided at the border (Cui et al. 2015)."""
    gy, gx = np.gradient(fused)
    return float(np.sqrt((gx**2 + gy**2) / 2).mean())


def _correlation(one: Grey, two: Grey) -> float:
    one, two = one - one.mean(), two - two.mean()
    norm = np.sqrt((one**2).sum() * (two**2).sum())
    return float((one * two).sum() / norm) if norm > 0 else 0.0


def sum_of_correlations_of_differences(visible: Grey, infrared: Grey, fused: Grey) -> float:
    """SCD: corr(F - B, A) + corr(F - A, B), -2 to 2 (Aslantas and Bendes 2015); a flat array correlates 0."""
    return _correlation(fused - infrared, visible) + _correlation(fused - visible, infrared)


def _gaussian_valid(image: Grey, size: int, sigma: float, step: int = 1) -> Grey:
    """Separable Gaussian of `size` taps, only where the window lies inside; of the result every `step`-th row and
    column."""
    offset = np.arange(size) - (size - 1) / 2
    kernel = np.exp(-(offset**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    half = size // 2
    rows = ndimage.correlate1d(image, kernel, axis=0)[half : image.shape[0] - half : step]
    return ndimage.correlate1d(rows, kernel, axis=1)[:, half : image.shape[1] - half : step]


class Prepared:
    """One picture (H,W) in 0-255, and what several measures need of it, computed once at most.

    Give it in the place of the array where one picture is measured many times, as the sources of several fusions are.
    """

    def __init__(self, image: Grey) -> None:
        self.image = image

    @cached_property
    def levels(self) -> NDArray[np.int64]:
        """Grey levels 0-255."""
        return np.clip(np.rint(self.image), 0, 255).astype(np.int64)

    @cached_property
    def scales(self) -> list[tuple[int, Grey, Grey, Grey]]:
        """For each of VIF's four scales the window's size, the picture, its local mean and mean square."""
        found, image = [], self.image
        for size in VIF_WINDOWS:
            if size < VIF_WINDOWS[0]:
                image = _gaussian_valid(image, size, size / 5, step=2)
            mean, square = (_gaussian_valid(part, size, size / 5) for part in (image, image**2))
            found.append((size, image, mean, square))
        return found

    @cached_property
    def ssim_moments(self) -> tuple[Grey, Grey]:
        """Local mean and mean square in SSIM's window."""
        return _gaussian_valid(self.image, 11, 1.5), _gaussian_valid(self.image**2, 11, 1.5)

    @cached_property
    def qabf_edges(self) -> tuple[Grey, Grey]:
        """Strength and angle of Qabf."""
        x, y, strength = _edges(self.image, "constant")
        return strength, _angle(y, x, np.pi / 2)

    @cached_property
    def nabf_edges(self) -> tuple[Grey, Grey]:
        """Strength and angle of Nabf."""
        x, y, strength = (part / 8 for part in _edges(self.image, "mirror"))
        # The published code divides x by y: at y = 0 the angle has the sign of x, and is 0 where both vanish.
        return strength, _angle(x, y, np.sign(x) * np.pi / 2)


Picture = Grey | Prepared


def _prepared(image: Picture) -> Prepared:
    return image if isinstance(image, Prepared) else Prepared(image)


def visual_information_fidelity(source: Picture, fused: Picture, noise: float = 2.0) -> float:
    """VIF in the pixel domain, 4 scales, windows of 17, 9, 5, 3 with sigma = size / 5, sigma_n^2 = `noise`
    (Sheikh and Bovik 2006, vifp). 1 for F = S; 0 for a flat source, which holds no information to keep.
    VIF of a fusion is the sum over A and B."""
    kept, whole, tiny = 0.0, 0.0, 1e-10
    scales = zip(_prepared(source).scales, _prepared(fused).scales, strict=True)
    for (size, image_s, mean_s, ss), (_, image_f, mean_f, ff) in scales:
        var_s = np.maximum(ss - mean_s**2, 0)
        var_f = np.maximum(ff - mean_f**2, 0)
        covariance = _gaussian_valid(image_s * image_f, size, size / 5) - mean_s * mean_f
        gain = covariance / (var_s + tiny)
        usable = (var_s >= tiny) & (var_f >= tiny) & (gain >= 0)
        gain = np.where(usable, gain, 0)
        rest = np.maximum(var_f - gain * covariance, tiny)
        var_s = np.where(var_s < tiny, 0, var_s)
        kept += float(np.log10(1 + gain**2 * var_s / (rest + noise)).sum())
        whole += float(np.log10(1 + var_s / noise).sum())
    return kept / whole if whole > 0 else 0.0


def structural_similarity(source: Picture, fused: Picture) -> float:
    """SSIM with an 11-tap Gaussian of sigma 1.5, range 255, mean over windows inside (Wang et al. 2004)."""
    source, fused = _prepared(source), _prepared(fused)
    (mean_s, ss), (mean_f, ff) = source.ssim_moments, fused.ssim_moments
    both = mean_s * mean_f
    covariance = _gaussian_valid(source.image * fused.image, 11, 1.5) - both
    squares = mean_s**2 + mean_f**2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * both + c1) / (squares + c1)
    structure = (2 * covariance + c2) / (ss + ff - squares + c2)
    return float((light * structure).mean())


def peak_signal_to_noise(visible: Grey, infrared: Grey, fused: Grey) -> float:
    """PSNR in dB: peak 255 over the mean of the two sources' MSE, as fusion papers compute it; inf if F = A = B."""
    error = (((fused - visible) ** 2).mean() + ((fused - infrared) ** 2).mean()) / 2
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")


def _edges(image: Grey, mode: str) -> tuple[Grey, Grey, Grey]:
    """Sobel responses to vertical edges (d/dx) and horizontal edges (d/dy), and their strength."""
    smooth, slope = np.array([1.0, 2.0, 1.0]), np.array([-1.0, 0.0, 1.0])
    x = ndimage.correlate1d(ndimage.correlate1d(image, smooth, axis=0, mode=mode), slope, axis=1, mode=mode)
    y = ndimage.correlate1d(ndimage.correlate1d(image, smooth, axis=1, mode=mode), slope, axis=0, mode=mode)
    return x, y, np.hypot(x, y)


def _angle(rise: Grey, run: Grey, vertical: float | Grey) -> Grey:
    """atan(rise / run) in [-pi/2, pi/2], `vertical` where run is 0."""
    ratio = np.divide(rise, run, out=np.zeros_like(rise), where=run != 0)
    return np.where(run != 0, np.arctan(ratio), vertical)


def _strength_ratio(one: Grey, two: Grey) -> Grey:
    """The smaller over the larger, 0 where either is 0."""
    larger = np.maximum(one, two)
    return np.divide(np.minimum(one, two), larger, out=np.zeros_like(one), where=larger > 0)


def _sigmoid(value: Grey, top: float, slope: float, middle: float) -> Grey:
    return top / (1 + np.exp(slope * (value - middle)))


def edge_preservation(visible: Picture, infrared: Picture, fused: Picture) -> float:
    """Qabf (Xydeas and Petrovic, Electronics Letters 2000): sum(Q_AF g_A + Q_BF g_B) / sum(g_A + g_B), 0 to 0.98.

    g is Sobel strength (zeros beyond the border, as in the published code), G the ratio of the smaller to the larger
    strength, A = 1 - |a_S - a_F| / (pi/2) with a = atan(y / x), Q = Tg / (1 + exp(kg (G - Dg))) x
    Ta / (1 + exp(ka (A - Da))), Tg .9994 kg -15 Dg .5, Ta .9879 ka -22 Da .8. 0 if neither source has an edge.
    """
    strength_f, angle_f = _prepared(fused).qabf_edges
    kept, whole = 0.0, 0.0
    for source in (visible, infrared):
        strength, angle = _prepared(source).qabf_edges
        agreement = 1 - np.abs(angle - angle_f) / (np.pi / 2)
        quality = _sigmoid(_strength_ratio(strength, strength_f), 0.9994, -15, 0.5)
        quality *= _sigmoid(agreement, 0.9879, -22, 0.8)
        kept += float((quality * strength).sum())
        whole += float(strength.sum())
    return kept / whole if whole > 0 else 0.0


def fusion_artifacts(visible: Picture, infrared: Picture, fused: Picture) -> float:
    """Nabf, the modified artefact measure of Shreyamsha Kumar (Signal, Image and Video Processing 7, 2013) on
    Petrovic and Xydeas' gradient family (2005): edges of F that neither source has. Lower is better.

    N = sum( m ((1 - Q_AF) w_A + (1 - Q_BF) w_B) ) / sum(w_A + w_B), with m = 1 where g_F > g_A and g_F > g_B, else 0;
    w = g^1.5 where g >= 2, else 0.001; Q = sqrt(.9999 / (1 + exp(-19 (G - .5))) x .9995 / (1 + exp(-22 (A - .5)))).
    g is Sobel strength / 8 with a mirrored border, G the ratio of the smaller to the larger strength (0 if either is
    0), A = | |a_S - a_F| - pi/2 | x 2/pi, a = atan of the two responses, 0 where both vanish.
    """
    strength_f, angle_f = _prepared(fused).nabf_edges
    sources = [_prepared(source).nabf_edges for source in (visible, infrared)]
    artefact = np.logical_and(*(strength_f > strength for strength, _ in sources))
    lost, whole = 0.0, 0.0
    for strength, angle in sources:
        weight = np.where(strength >= 2, strength * np.sqrt(strength), 0.001)
        whole += float(weight.sum())
        strength, weight = strength[artefact], weight[artefact]  # nothing else counts as lost
        agreement = np.abs(np.abs(angle[artefact] - angle_f[artefact]) - np.pi / 2) * 2 / np.pi
        ratio = _strength_ratio(strength, strength_f[artefact])
        quality = np.sqrt(_sigmoid(ratio, 0.9999, -19, 0.5) * _sigmoid(agreement, 0.9995, -22, 0.5))
        lost += float(((1 - quality) * weight).sum())
    return lost / whole


def prepare(image: ArrayLike | Prepared, name: str = "image") -> Prepared:
    """A picture to be measured; colour is taken through `luma`.

    InputError, which begins with `name`, for a side below 41 pixels and for values that are not finite numbers in
    0-255."""
    if isinstance(image, Prepared):
        return image
    grey = luma(image)
    if min(grey.shape) < SMALLEST_SIDE:
        raise InputError(
            f"{name}: found size {grey.shape}, expected sides of at least {SMALLEST_SIDE}; give larger pictures"
        )
    if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 255):
        raise InputError(f"{name}: found {grey.min()} to {grey.max()}, expected 0 to 255; scale to the uint8 range")
    return Prepared(grey)


def fusion_metrics(
    visible_luma: ArrayLike | Prepared, infrared: ArrayLike | Prepared, fused_luma: ArrayLike | Prepared
) -> dict[str, float]:
    """All eleven measures of one fused picture, keys as in `METRICS`.

    Args:
        visible_luma: A, (H,W) in 0-255; colour is taken through `luma`. Of a source of several fusions give
            `prepare(A)`: what does not depend on the fusion is then computed once.
        infrared: B, of the same size.
        fused_luma: F, of the same size.

    Raises:
        InputError: the sizes differ, a side is below 41 pixels, or the values are not finite numbers in 0-255.

    >>> flat = np.full((48, 64), 100.0)
    >>> fusion_metrics(flat, flat, flat)["EN"]
    0.0
    """
    one, two, joint = prepare(visible_luma, "visible"), prepare(infrared, "infrared"), prepare(fused_luma, "fused")
    a, b, f = one.image, two.image, joint.image
    for name, image in (("visible", a), ("infrared", b)):
        if image.shape != f.shape:
            raise InputError(
                f"{name}: found size {image.shape}, the fused picture's is {f.shape}; give aligned pictures"
            )
    return {
        "EN": entropy(joint),
        "MI": mutual_information(one, joint) + mutual_information(two, joint),
        "SD": standard_deviation(f),
        "SF": spatial_frequency(f),
        "AG": average_gradient(f),
        "SCD": sum_of_correlations_of_differences(a, b, f),
        "VIF": visual_information_fidelity(one, joint) + visual_information_fidelity(two, joint),
        "Qabf": edge_preservation(one, two, joint),
        "SSIM": (structural_similarity(one, joint) + structural_similarity(two, joint)) / 2,
        "PSNR": peak_signal_to_noise(a, b, f),
        "Nabf": fusion_artifacts(one, two, joint),
    }
