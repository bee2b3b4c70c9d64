"""What the model is least sure of: the order in which pairs are shown on request."""

from __future__ import annotations

import json
import secrets
from contextlib import suppress

from tqdm import tqdm

from fusionsam.alignment.apply import Aligner
from fusionsam.data.dataset import read_sample
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.results import fingerprint
from fusionsam.io import progress_bar, write_json
from fusionsam.types import InputError, JsonObject
from fusionsam.weights.checkpoint import calibrated_digest


def uncertainty(folder: LabelFolder, model: FusionSAM, align: Aligner | None = None) -> dict[str, float]:
    """Mean of 1 - confidence of every pair, 0..1, kept in `out`/uncertainty.json: a second start with the same weights
    and the same rig asks only of new pairs. A pair that cannot be read is left out, and tried again at the next
    start."""
    path = folder.out / "uncertainty.json"
    known: dict[str, float] = {}
    made_with = _made_with(model, align)
    with suppress(OSError, ValueError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {key: stored.get(key) for key in made_with} == made_with:
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
        write_json(path, {**made_with, "pairs": known})
    return known


def _made_with(model: FusionSAM, align: Aligner | None) -> JsonObject:
    """What scores depend on. Names do not tell: the last folder of every training is called alike."""
    return {
        # a network in memory has no files: its scores are never those of another
        "weights": secrets.token_hex(8) if model.folder is None else fingerprint(str(model.folder), "torch"),
        "calibrated": calibrated_digest(model.card),
        "rig": None if align is None else align.rig.digest,
    }
