"""The command `fusionsam calibrate`."""

from __future__ import annotations

from fusionsam.evaluation.options import CalibrateOptions as Options


def main(options: Options) -> int:
    """Fit, store and tell."""
    from fusionsam.evaluation import calibrate

    for line in calibrate.run(options):
        print(line)
    return 0
