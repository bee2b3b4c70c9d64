"""Fine-tune on pairs of your own and score before and after: the commands of docs/tutorials/fine-tune.md in Python.

python examples/fine_tune.py --root mine --class-file mine/classes.yaml --out runs/mine
python examples/fine_tune.py --rehearse --out runs/rehearsal   # a tiny network on drawn scenes, in a minute
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fusionsam.config.load import read_settings
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.evaluation.run import EvaluateConfig, evaluate
from fusionsam.training.run import train

CONFIGS = Path(__file__).parents[1] / "configs"


def rehearsal(out: Path, steps: int) -> tuple[str, Path, list[str]]:
    """A drawn data set, and settings of a network that learns next to nothing."""
    root = out.with_name(out.name + "_scenes")
    synthesize(root, 8, seed=1, size=(96, 128), progress=False)
    return "mfnet", root, [str(CONFIGS / "debug.yaml"), "--train.validate_every", str(steps)]


def own_pairs(root: Path, class_file: Path) -> tuple[str, Path, list[str]]:
    """Folders of pairs with labels (docs/how-to/data.md), and the shipped checkpoint to start from."""
    flags = ["--data.dataset", "pairs", "--data.class_file", str(class_file), "--model.start_from", "tiny"]
    flags += ["--loss.reconstruction_weight", "0", "--loss.commitment_weight", "0"]  # LSTG stays as it is
    return "pairs", root, [str(CONFIGS / "mfnet_tiny.yaml"), *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the shipped checkpoint.")
    parser.add_argument("--root", type=Path, help="folder of your pairs")
    parser.add_argument("--class-file", type=Path, help="YAML of your classes")
    parser.add_argument("--rehearse", action="store_true", help="drawn scenes and a tiny network instead")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.rehearse and (args.root is None or args.class_file is None):
        parser.error("give --root and --class-file, or --rehearse")

    found = rehearsal(args.out, args.steps) if args.rehearse else own_pairs(args.root, args.class_file)
    dataset, root, settings = found
    own = ["--data.root", str(root), "--train.out", str(args.out), "--train.max_steps", str(args.steps)]
    weights = train(read_settings(*settings, *own)) / "final"
    report = evaluate(EvaluateConfig(dataset, root, "val", weights=[weights], class_file=args.class_file))
    print(report.title)


if __name__ == "__main__":
    main()
