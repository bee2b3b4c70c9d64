"""The command `fusionsam baselines`."""

from __future__ import annotations

from fusionsam.evaluation.options import BaselineConfig as Options


def main(options: Options) -> int:
    """Paint, score and print the report."""
    from fusionsam.evaluation.sam_baseline import baseline

    print(baseline(options))
    return 0
