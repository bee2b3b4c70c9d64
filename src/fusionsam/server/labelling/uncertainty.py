"""What the model is least sure of: the order in which pairs are shown on request."""

from __future__ import annotations

import json
from contextlib import suppress

from tqdm import tqdm

from fusionsam.alignment.apply import Aligner
from fusionsam.data.dataset import read_sample
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.results import made_with
from fusionsam.io import progress_bar, write_json
from fusionsam.types import InputError


def uncertainty(folder: LabelFolder, model: FusionSAM, align: Aligner | None = None) -> dict[str, float]:
    """Mean of 1 - confidence of every pair, 0..1, kept in `out`/uncertainty.json: a second start with the same weights
    and the same rig asks only of new pairs. A pair that cannot be read is left out, and tried again at the next
    start."""
    path = folder.out / "uncertainty.json"
    known: dict[str, float] = {}
    asked = {**made_with(model), "rig": None if align is None else align.rig.digest}
    with suppress(OSError, ValueError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {key: stored.get(key) for key in asked} == asked:
            known = {str(id): float(value) for id, value in stored["pairs"].items()}
    todo = [entry for entry in folder.entries if entry.id not in known]
    for entry in progress_bar(todo, desc="uncertainty", unit="pair", disable=not todo):
        try:
            sample = read_sample(entry, align=align)
            found = model.predict(sample.visible, sample.infrared, covered=sample.covered)
        except InputError as error:
            tqdm.write(f"{error}")
            continue
        known[entry.id] = float(1 - found.confidence.mean())
        write_json(path, {**asked, "pairs": known})
    return known
