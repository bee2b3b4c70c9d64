"""Scores of the literature, all of them in published.json: the tables of the FusionSAM paper, and later methods."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from fusionsam.evaluation.report_parts import PublishedScore
from fusionsam.types import JsonObject


@cache
def published() -> JsonObject:
    """The numbers of the FusionSAM paper's Tables 1-4, in percent, with what must be said of them."""
    return dict(json.loads(resources.files("fusionsam").joinpath("published.json").read_text(encoding="utf-8")))


TEST_IMAGES: dict[str, int] = {name: part["test_images"] for name, part in published()["since"].items()}
"""Data set -> images of the official test split (of MSRS as its repository has them, of PST900 as its README says)."""

SINCE: dict[str, list[PublishedScore]] = {
    name: [PublishedScore(**row) for row in part["rows"]] for name, part in published()["since"].items()
}
"""Data set -> later methods with mIoU and protocol as published. None of them was given prompts from the ground truth.
"""
