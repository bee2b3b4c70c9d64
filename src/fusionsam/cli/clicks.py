"""The command `fusionsam clicks`."""

from __future__ import annotations

from fusionsam.evaluation.click_options import ClicksOptions as Options


def main(options: Options) -> int:
    """Measure, and print the table."""
    from fusionsam.evaluation.click_report import table
    from fusionsam.evaluation.clicks import measure
    from fusionsam.evaluation.tables.formats import to_markdown

    print(to_markdown(table(measure(options))))
    return 0
