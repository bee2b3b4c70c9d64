"""The command `fusionsam evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fusionsam.evaluation.options import EvaluateConfig
from fusionsam.inference.memory import keep_memory


@dataclass(frozen=True, kw_only=True)
class Options(EvaluateConfig):
    """Score a model, or a folder of predicted label maps, on a split of a data set. Writes report.json and
    per_image.json into --out."""

    out: Path = field()
    """folder for report.json and per_image.json"""


def main(options: Options) -> int:
    """Evaluate and print the report."""
    from fusionsam.evaluation.run import evaluate

    keep_memory()
    print(evaluate(options))
    return 0
