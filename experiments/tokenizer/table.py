"""The table of the tokenizer study from the runs that `make -f experiments/tokenizer/Makefile` made.

    python experiments/tokenizer/table.py --runs runs/tokenizer_study --out results/tokenizer_study

reads ROW/history.jsonl and ROW/final/training.json of every finished run, and the report of its stage 2 (in the folder
runs/tokenizer_stage_2) where there is one, and writes table.json and table.md. PSNR, SSIM, usage and mIoU are those of
the last step on the validation split, so no step is picked on the split it is scored on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fusionsam.evaluation.reconstruct import load_tokenizer
from fusionsam.io import write_json, write_text

COLUMNS = ("psnr", "ssim", "codebook_usage", "perplexity")
MODALITIES = ("visible", "infrared")


def read_row(run: Path) -> dict[str, Any]:
    """Last validation of a run by modality, with its steps, hours, commit, seed and command."""
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])
    card = json.loads((run / "final" / "training.json").read_text())
    scores = {m: {c: last.get(f"val/{m}_{c}") for c in COLUMNS} for m in MODALITIES}
    kept = {key: card.get(key) for key in ("step", "hours", "commit", "seed", "command")}
    after = run.parent.with_name("tokenizer_stage_2") / run.name
    report = after / "evaluation" / "report.json"
    stage_2 = None
    if report.is_file():
        values = json.loads(report.read_text())
        stage_2 = {key: values[key] for key in ("miou", "protocol", "interval", "command")}
        stage_2["step"] = json.loads((after / "final" / "training.json").read_text())["step"]
    bits = load_tokenizer(str(run / "final"))[0].bits_per_pixel
    return {"row": run.name, "bits_per_pixel": bits, **scores, **kept, "stage_2": stage_2}


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """One line a row: PSNR (dB), SSIM, share of codes in use (percent) and perplexity, visible then infrared; mIoU
    after the stage 2 that followed."""
    columns = " | ".join(f"{m} {c}".replace("codebook_", "") for m in MODALITIES for c in COLUMNS)
    head = f"| row | steps | bits a pixel | {columns} | stage 2: steps, mIoU, interval |"
    lines = [head, "|---" * (4 + len(MODALITIES) * len(COLUMNS)) + "|"]
    for row in rows:
        values = [row["bits_per_pixel"], *(row[m][c] for m in MODALITIES for c in COLUMNS)]
        cells = ["" if v is None else f"{v:.3f}" if v < 1 else f"{v:.1f}" for v in values]
        after = row["stage_2"]
        spread = "" if after is None else "-".join(f"{end:.1f}" for end in after["interval"])
        cells.append("" if after is None else f"{after['step']}, {after['miou']:.1f}, {spread}")
        lines.append(f"| {row['row']} | {row['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/tokenizer_study"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("results/tokenizer_study"), help="folder for the table")
    args = parser.parse_args()
    finished = sorted(file.parent.parent for file in args.runs.glob("*/final/training.json"))
    if not finished:
        print(
            f"{args.runs}: no finished run in it; `make -f experiments/tokenizer/Makefile` makes them", file=sys.stderr
        )
        return 2
    rows = sorted((read_row(run) for run in finished), key=lambda row: (row["row"] != "base", row["row"]))
    write_json(args.out / "table.json", rows)
    write_text(args.out / "table.md", as_markdown(rows))
    print(as_markdown(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
