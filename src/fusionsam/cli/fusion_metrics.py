"""The command `fusionsam fusion-metrics`."""

from __future__ import annotations

from fusionsam.evaluation.options import FusionMetricsOptions as Options


def main(options: Options) -> int:
    """Measure and print the table."""
    from fusionsam.evaluation import fusion

    print(fusion.run(options))
    return 0
