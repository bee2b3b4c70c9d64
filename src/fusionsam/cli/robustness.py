"""The command `fusionsam robustness`."""

from __future__ import annotations

from fusionsam.evaluation.options import RobustnessOptions as Options


def main(options: Options) -> int:
    """Measure, write and print the table."""
    from fusionsam.evaluation import robustness
    from fusionsam.evaluation.tables.formats import to_markdown

    print(to_markdown(robustness.run(options)))
    return 0
