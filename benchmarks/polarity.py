"""How sure the guess of an infrared picture's polarity is: on each data set, as it ships and fitted without that set.

Every picture is taken as white-hot, and its inversion as black-hot. The weights of the five features of
fusionsam.data.polarity are fitted by a logistic regression on all sets but one, and score that one.

python benchmarks/polarity.py --root ../shared/data [--out FILE.json]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from fusionsam.data.dataset import read_pictures
from fusionsam.data.polarity import DOUBTFUL, features, white_hot_score
from fusionsam.data.splits import Entry, entries, pair_entries
from fusionsam.io import commit, progress_bar, write_json


def pictures(root: Path) -> dict[str, list[Entry]]:
    """The pairs of each data set under `root`."""
    mfnet = [entry for split in ("train", "val", "test") for entry in entries("mfnet", root / "mfnet417", split)]
    found = {"mfnet417": mfnet}
    return found | {name: pair_entries(root / name / "vi", root / name / "ir") for name in ("roadscene", "tno")}


def fitted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (5) from features (n,5) of white-hot pictures; those of the inverted ones are their opposite."""
    both, kinds = np.concatenate([values, -values]), np.repeat([1, 0], len(values))
    weights: NDArray[np.float64] = LogisticRegression(fit_intercept=False, max_iter=1000).fit(both, kinds).coef_[0]
    return weights


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of mfnet417, roadscene and tno")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    known, scored = {}, {}
    for name, members in pictures(options.root).items():
        greys = []
        for entry in progress_bar(members, desc=name, unit="picture"):
            infrared = read_pictures(entry).infrared
            assert infrared is not None
            greys.append(infrared[0].numpy())
        known[name] = np.array([features(grey) for grey in greys])
        scored[name] = np.array([[white_hot_score(grey), white_hot_score(255 - grey)] for grey in greys])
    rows = {}
    for name, values in known.items():
        weights = fitted(np.concatenate([others for other, others in known.items() if other != name]))
        white, black = scored[name].T
        rows[name] = {
            "pictures": len(values),
            "right_fitted_without_it": round(100 * float((values @ weights > 0).mean()), 1),
            "right_as_shipped": round(100 * float((white > 0).mean()), 1),
            "white_hot_with_notice": round(100 * float((white < DOUBTFUL).mean()), 1),
            "black_hot_with_notice": round(100 * float((black < DOUBTFUL).mean()), 1),
        }
    every = np.concatenate(list(scored.values()))
    notices = [round(100 * float(share), 1) for share in (every < DOUBTFUL).mean(0)]
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "unit": "percent of the pictures",
        "sets": rows,
        "all": {"pictures": len(every), "white_hot_with_notice": notices[0], "black_hot_with_notice": notices[1]},
    }
    for name, row in found["sets"].items():
        print(name, row)
    print("all", found["all"])
    if options.out is not None:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
