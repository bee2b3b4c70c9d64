"""The command `fusionsam reconstruct`."""

from __future__ import annotations

from fusionsam.evaluation.options import ReconstructOptions as Options


def main(options: Options) -> int:
    """A line a modality, and where the rest is."""
    from fusionsam.evaluation import reconstruct

    summary = reconstruct.run(options)
    for name in reconstruct.MODALITIES:
        if name in summary:
            shown = [f"PSNR {summary[name]['psnr']:.2f} dB", f"SSIM {summary[name]['ssim']:.3f}"]
            if "perceptual" in summary[name]:
                shown.append(f"perceptual distance {summary[name]['perceptual']:.4f} ({summary['perceptual_by']})")
            if "codebook_usage" in summary[name]:
                shown.append(f"codebook usage {summary[name]['codebook_usage']:.1f} %")
                shown.append(f"{summary[name]['bits_per_pixel']:.3f} bits a pixel")
            print(f"{name}: {', '.join(shown)}")
    print(f"{summary['pairs']} pair{'s' * (summary['pairs'] != 1)} -> {options.out}")
    return 0
