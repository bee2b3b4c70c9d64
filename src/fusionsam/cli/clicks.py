"""The command `fusionsam clicks`."""

from __future__ import annotations

from fusionsam.evaluation.click_options import ClicksOptions as Options


def main(options: Options) -> int:
    """Measure, and print the table."""
    from fusionsam.evaluation.tables.formats import to_markdown

    if options.steer:
        from fusionsam.evaluation.steered import measure_steering, steering_table

        print(to_markdown(steering_table(measure_steering(options))))
        return 0
    from fusionsam.evaluation.click_report import table
    from fusionsam.evaluation.clicks import measure

    print(to_markdown(table(measure(options))))
    return 0
