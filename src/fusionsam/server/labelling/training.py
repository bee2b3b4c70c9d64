"""The training that the page proposes."""

from __future__ import annotations

import shlex

from fusionsam.data.labelling.folder import LabelFolder

STEPS = 100
"""Some minutes, for a first look."""


def training_command(folder: LabelFolder) -> str:
    """What fine-tunes the shipped checkpoint on the pairs that are done."""
    words = [
        "fusionsam", "train", "--model.preset", "tiny", "--model.start_from", "tiny",
        "--train.freeze_tokenizer", "true", "--train.max_steps", str(STEPS), "--data.dataset", "manifest",
        "--data.root", str(folder.out / "manifest.csv"), "--data.class_file", str(folder.out / "classes.yaml"),
        "--train.out", str(folder.out / "run"), *([] if folder.rig is None else ["--data.align", str(folder.rig)]),
    ]  # fmt: skip
    return shlex.join(words)
