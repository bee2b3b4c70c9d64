"""What a user would train instead, trained and scored exactly as FusionSAM is: experiments/two_stream/Makefile.

    python experiments/two_stream/baselines.py train --peer early --config configs/mfnet_tiny.yaml --minutes 30 \
        --out runs/peer_early --data.root data/mfnet --model.encoder.weights hub
    python experiments/two_stream/baselines.py evaluate --weights runs/peer_early/final --dataset mfnet \
        --root data/mfnet --out DIR
    python experiments/two_stream/baselines.py robustness --weights runs/peer_early/final --dataset mfnet \
        --root data/mfnet --out DIR
    python experiments/two_stream/baselines.py mean runs/first/final runs/second/final --share 0.5 --out runs/mean

A baseline is called peer in flags, folders and reports.
Data lists, augmentation, class weights, loss, optimiser, schedule, moving average and seeds are the package's own, by
the same configuration file; --train.lr and any other setting may follow; --model.start_from is a peer's folder here.
`--minutes` measures a few steps, derives the number of steps from them and runs the whole schedule over these;
`--steps` gives their number. A killed run goes on with --resume. Reports have the format of `fusionsam evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from networks import LITE0, PEERS, PeerNetwork
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from fusionsam.cli.main import main as cli
from fusionsam.config.load import differences, read_settings
from fusionsam.config.schema import Config, from_dict, to_dict
from fusionsam.data.dataset import PairDataset
from fusionsam.data.fingerprints import Fingerprints, of_training
from fusionsam.data.images import write_png
from fusionsam.data.loader import class_shares, train_loader
from fusionsam.data.sequences import recording_sequences
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation import report_files, robustness
from fusionsam.evaluation.comparison import compare
from fusionsam.evaluation.report import Report
from fusionsam.evaluation.run import (
    EvaluateConfig,
    check_classes,
    evaluate,
    leak_guard,
    open_labelled,
)
from fusionsam.evaluation.tables.formats import to_markdown
from fusionsam.io import commit, digest, whole, whole_folder, write_json
from fusionsam.metrics.segmentation import CalibrationError, plain
from fusionsam.training.callbacks import LAST, BestWeights
from fusionsam.training.data import PairData, open_data, pairs_digest, refuse_seen
from fusionsam.training.losses import segmentation_loss
from fusionsam.training.requirements import FREE_ON_RESUME
from fusionsam.training.run import open_trainer
from fusionsam.training.segmentation_task import SegmentationTask
from fusionsam.training.task import require_finite
from fusionsam.types import Batch, InputError

WEIGHTS, CARD, BUDGET = "model.safetensors", "peer.json", "budget.json"
WARM_UP, MEASURED = 3, 10


class PeerTask(SegmentationTask):
    """The package's task with one loss, f_s on the logits; optimiser, schedule, average and validation are its own."""

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy + Dice with the package's class weights."""
        logits = self.network(batch.visible, batch.infrared)
        loss = segmentation_loss(logits, batch.label, self.settings.loss, self.weights)
        require_finite(loss, self.global_step, self.settings.train)
        self.log("loss/total", loss.detach(), prog_bar=True, batch_size=len(batch.ids))
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Argmax against the labels at their own size."""
        logits = self.evaluated().eval()(batch.visible, batch.infrared)
        for prediction, label in zip(logits.argmax(1), batch.label, strict=True):
            self.matrix.update(prediction.cpu(), label.cpu())


class PeerWeights(BestWeights):
    """Best and final weights, with all that a report says of them."""

    def save(self, trainer: L.Trainer, task: Any, folder: Path) -> None:
        """safetensors and peer.json, in a folder that is whole or not there."""
        hours = self.elapsed() / 3600
        rate = {"steps_per_second": trainer.global_step / max(1e-9, self.elapsed())}
        scores = {k: round(float(v), 3) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        card = {**self.card, "step": trainer.global_step, "hours": round(hours, 3), **rate, "val": scores}
        with whole_folder(folder) as part:
            tensors = {name: value.contiguous() for name, value in task.evaluated().state_dict().items()}
            with whole(part / WEIGHTS) as file:
                save_file(tensors, file)
            write_json(part / CARD, card)
            self.seen.write(part)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    return {**found, "device": "cuda" if torch.cuda.is_available() else "cpu", "torch": torch.__version__}


def settings_of(peer: str, files: list[str], flags: list[str]) -> Config:
    """The configuration, without dropping, displacing or destroying the only image where there is one."""
    config = read_settings(files[0], *(word for file in files[1:] for word in ("--config", file)), *flags)
    if not config.data.extra_labels:
        config.data.extra_pairs = []  # they make no fused picture, so pairs without a label teach them nothing
    if peer in ("visible", "infrared"):
        config.data.modality_dropout, config.data.partial_absence = 0.0, 0.0
        config.data.shift, config.data.harsh = 0, 0.0
    return config


def new_task(
    peer: str,
    config: Config,
    steps: int,
    shares: Tensor,
    weights: str | None = None,
    start: dict[str, Tensor] | None = None,
) -> PeerTask:
    """A network seeded as the configuration says, with a backbone's file or all weights of a trained peer, and its
    task."""
    L.seed_everything(config.train.seed, verbose=False)
    network = PeerNetwork(peer, len(config.model.classes), source_of(to_dict(config)), weights)
    if start is not None:
        network.load_state_dict(start)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # as FusionSAM is, for the same speed
    return PeerTask(network, config, steps, shares)


def source_of(settings: dict[str, Any]) -> str:
    """FusionSAM's own backbone where that is one of timm's, EfficientNet-Lite0 beside any other."""
    encoder = settings["model"]["encoder"]
    return str(encoder["source"]) if encoder["kind"] == "timm" else LITE0


def seconds_a_step(peer: str, config: Config, train_set: Any, shares: Tensor) -> float:
    """Measured on a network that is thrown away: loader, forward, backward, optimiser and average."""
    task = new_task(peer, config, 1000, shares).train()
    optimizer = task.configure_optimizers()["optimizer"]
    train = config.train
    loader = train_loader(
        train_set, config.data, config.model.foreground, train.batch_size, train.seed, steps=WARM_UP + MEASURED
    )
    ends = []
    task.log = lambda *args, **kwargs: None  # there is no trainer yet
    for number, batch in enumerate(tqdm(loader, desc="measuring steps")):
        optimizer.zero_grad()
        task.training_step(batch, number).backward()
        task.configure_gradient_clipping(optimizer, train.gradient_clip)
        optimizer.step()
        if task.average is not None:
            task.average.update_parameters(task.network)
        ends.append(time.perf_counter())
    return statistics.mean(b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))


def budget_of(out: Path, peer: str, config: Config, minutes: float | None, steps: int | None, resume: bool) -> Any:
    """The stored budget of a run that is resumed (InputError if it is another one), or what is asked for; `steps` is
    None until they are measured."""
    asked = {"peer": peer, "minutes": minutes, "steps": steps, "settings": to_dict(config)}
    if not resume:
        if (out / LAST).exists():
            raise InputError(f"{out}: holds a run; give --resume to continue it, or another --out")
        return asked
    if not (out / BUDGET).is_file() or not (out / LAST).is_file():
        raise InputError(f"{out}: has no run to resume; start without --resume")
    stored = json.loads((out / BUDGET).read_text())
    begun = to_dict(from_dict(Config, stored["settings"], str(out / BUDGET)))  # with what has been added since
    other = [name for name in differences(begun, asked["settings"]) if name not in FREE_ON_RESUME]
    asked_again = {"minutes": minutes, "steps": steps if minutes is None else stored["steps"]}
    other += [name for name, value in asked_again.items() if stored[name] != value]
    if stored["peer"] != peer or other:
        raise InputError(f"{out}: the run differs in {', '.join(other) or 'peer'}; resume it as it was begun")
    return stored


def train_peer(
    peer: str, config: Config, minutes: float | None, steps: int | None, resume: bool = False, command: str = ""
) -> Path:
    """Train into `config.train.out` (best, final, last.ckpt, logs); InputError for bad settings or data."""
    out = Path(config.train.out)
    budget = budget_of(out, peer, config, minutes, steps, resume)
    origin = None if resume else config.model.start_from
    start = None if origin is None else start_of(Path(origin), peer, config)
    train_set, val_set = open_data(config)
    labelled = [entry for entry in train_set.entries if entry.label is not None]  # nothing else teaches
    train_set = PairDataset(labelled, train_set.row, True, train_set.align)  # what was cached had other places
    # a resumed run no longer reads what it began from, so what that had seen lies beside its budget
    earlier = [out] if resume else [Path(origin)] if origin else []
    refuse_seen(config, val_set.entries, earlier)
    shares = class_shares(train_set)
    if budget["steps"] is None:
        budget["seconds_a_step"] = seconds_a_step(peer, config, train_set, shares)
        budget["steps"] = max(1, round(60 * minutes / budget["seconds_a_step"]))
        print(f"{budget['seconds_a_step']:.2f} s a step: {budget['steps']} steps in {minutes:g} minutes")
    seen = of_training(train_set, earlier)
    out.mkdir(parents=True, exist_ok=True)
    seen.write(out)
    write_json(out / BUDGET, budget)
    steps = budget["steps"]
    # random weights are enough where a checkpoint or a trained peer follows
    weights = None if resume or start else config.model.encoder.weights
    task = new_task(peer, config, steps, shares, weights, start)
    known = {"peer": peer, "minutes": budget["minutes"], "planned_seconds_a_step": budget.get("seconds_a_step")}
    card = {
        **known, "steps": steps, "parameters": task.network.parameters_learned(), "seed": config.train.seed,
        "classes": config.model.classes, "encoder_weights": config.model.encoder.weights, "commit": commit(),
        "command": command, "machine": machine(), "config": to_dict(config),
    }  # fmt: skip
    pairs = pairs_digest(seen, train_set, val_set)
    best = PeerWeights(out, card, seen, pairs, config.train.checkpoint_minutes)
    trainer = open_trainer(
        replace(config.train, devices="1", num_nodes=1, strategy="auto"),
        steps,
        gradient_clip_val=config.train.gradient_clip or None,
        logger=CSVLogger(out, name="logs"),
        callbacks=[best, TQDMProgressBar(refresh_rate=1 if steps < 200 else 10)],
    )
    data = PairData(config, train_set, val_set, steps)
    trainer.fit(task, datamodule=data, ckpt_path=str(out / LAST) if resume else None, weights_only=True)
    if best.validated != trainer.global_step or not any(k.startswith("val/") for k in trainer.callback_metrics):
        trainer.validate(task, datamodule=data, verbose=False)
    trainer.save_checkpoint(out / LAST)
    best.save(trainer, task, out / "final")
    torch.set_grad_enabled(True)
    return out / "final"


def start_of(folder: Path, peer: str, config: Config) -> dict[str, Tensor]:
    """The weights of a trained peer that this run continues from; InputError if it is another network."""
    network, card = load_peer(folder)
    is_there = card["peer"], card["classes"], source_of(card["config"])
    asked = peer, config.model.classes, source_of(to_dict(config))
    if is_there != asked:
        raise InputError(f"--model.start_from {folder}: is a {is_there}; expected a {asked}")
    return network.state_dict()


def load_peer(folder: Path) -> tuple[PeerNetwork, dict[str, Any]]:
    """A trained peer in eval mode and its card; InputError for a folder that holds none."""
    try:
        card = json.loads((folder / CARD).read_text())
        network = PeerNetwork(card["peer"], len(card["classes"]), source_of(card["config"]))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{folder}: holds no trained peer ({reason}); give RUN/final") from None
    return network.eval(), card


def mean_of(start: Path, end: Path, out: Path, share: float) -> Path:
    """The weighted mean of two trained peers, `share` of it `end`, as `interpolate` has it of checkpoints;
    it has seen what both saw. InputError for two networks, another share, and an `out` that is there."""
    if not 0 <= share <= 1:
        raise InputError(f"--share {share:g}: expected a number from 0 to 1")
    if out.exists():
        raise InputError(f"{out}: is there; choose another --out")
    network, card = load_peer(end)
    begun = start_of(start, card["peer"], from_dict(Config, card["config"], str(end / CARD)))
    middle = {
        name: begun[name].lerp(tensor, share).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    with whole_folder(out) as part:
        with whole(part / WEIGHTS) as file:
            save_file(middle, file)
        told = {key: value for key, value in card.items() if key != "val"}  # which is of `end`
        write_json(part / CARD, {**told, "mean_of": [str(start), str(end)], "share": share})
        if (seen := Fingerprints.together([start, end])) is not None:
            seen.write(part)
    return out


def predictor(network: PeerNetwork) -> robustness.Predict:
    """As `robustness.measure` wants it; a peer of one image gives nothing without it."""

    @torch.inference_mode()
    def predict(visible: Tensor | None, infrared: Tensor | None, /, covered: Tensor | None = None) -> Any:
        lacking = {"visible": visible, "infrared": infrared}.get(network.peer, 0) is None
        return None if lacking else network(visible, infrared)[0].argmax(0).numpy()

    return predict


@torch.inference_mode()
def evaluate_peer(config: EvaluateConfig, folder: Path) -> Report:
    """Label maps into OUT/predictions and their report by `fusionsam evaluate`, with what it cannot know of the
    network; ECE of the softmax, no temperature. InputError as that command."""
    network, card = load_peer(folder)
    data, out = open_labelled(config), Path(str(config.out))
    check_classes(card["classes"], folder, data.row)
    ours = {f"{entry.id}.png" for entry in data.entries}
    if other := sorted({path.name for path in (out / "predictions").glob("*.png")} - ours):
        raise InputError(f"{out}/predictions: holds {other[0]}, which is not in {config.split}; choose another --out")
    split = report_files.split_digest([entry.id for entry in data.entries])
    report_files.require_split(out, config.dataset, split)
    if config.bootstrap < 0 or (config.against is not None and config.bootstrap < 1):
        raise InputError(f"--bootstrap {config.bootstrap}: expected at least 1 (0 = no interval, without --against)")
    held = None
    if config.against is not None:
        held = report_files.read_comparable(config.against, config.dataset, split, data.row.classes)
    guard = leak_guard(config, data.entries, [card], [folder])
    ece = CalibrationError()
    for index in tqdm(range(len(data)), desc=f"{card['peer']} on {config.dataset}/{config.split}"):
        sample = data[index]
        visible, infrared = (
            None if image is None else to_unit(image)[None] for image in (sample.visible, sample.infrared)
        )
        confidence, ids = network(visible, infrared)[0].softmax(0).max(0)
        ece.update(confidence.clamp(max=1), ids, sample.label)
        write_png(out / "predictions" / f"{sample.id}.png", ids.to(torch.uint8))
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        known: dict[str, Any] = {"predictions": out / "predictions", "out": scratch, "prediction_format": "ids"}
        known |= {"against": None, "train_split": "none"}  # `guard` knows more
        report = evaluate(EvaluateConfig(**{**vars(config), **known}))
        report, images = report_files.read_comparable(scratch, config.dataset, report.split_ids_sha256)
    single = card["peer"] in ("visible", "infrared")
    report.weights, report.weights_sha256 = str(folder), digest(folder / WEIGHTS)
    report.ece = plain([100 * ece.value()])[0]
    report.modality, report.command = card["peer"] if single else "both", config.command
    report.peer = {key: value for key, value in card.items() if key not in ("config", "classes")}
    report.leak_guard, report.notes = guard.findings, guard.notes
    name = f"peer {card['peer']} on {config.dataset}/{config.split}"
    score = "undefined" if report.miou is None else f"{report.miou:.2f}"
    report.title = f"{name}: mIoU {score} ({report.protocol})"
    if held is not None:
        theirs, matrices = held
        how = (report.classes, report.protocol, config.bootstrap, config.seed, theirs.title)
        report.against = compare(images, matrices, *how, recording_sequences(data.entries))
        report.against.report = str(config.against)
    report_files.write(out, report, images)
    return report


def robustness_of_peer(config: EvaluateConfig, folder: Path, others: list[str]) -> str:
    """The table of `fusionsam robustness` for a peer, as Markdown; files in `config.out`."""
    network, card = load_peer(folder)
    data = open_labelled(config)
    check_classes(card["classes"], folder, data.row)
    tables, out = [robustness.read_table(path) for path in others], Path(str(config.out))
    robustness.require_usable(out, tables, data, config.seed, config.bootstrap)
    guard = leak_guard(config, data.entries, [card], [folder])
    values = robustness.measure(predictor(network), data, seed=config.seed, bootstrap=config.bootstrap)
    values = {
        "title": f"peer {card['peer']}", **values, "split": config.split, "weights": str(folder),
        "weights_sha256": digest(folder / WEIGHTS), "notes": guard.notes + values["notes"], "commit": commit(),
        "command": config.command,
    }  # fmt: skip
    return to_markdown(robustness.write(values, out, tables))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="task", required=True)
    train = commands.add_parser(
        "train", allow_abbrev=False, help="further --SECTION.NAME settings as of fusionsam train"
    )
    train.add_argument("--peer", choices=PEERS, required=True)
    train.add_argument("--config", action="append", required=True, help="YAML files, later ones win")
    train.add_argument("--out", required=True)
    budget = train.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="wall clock; the schedule runs over the steps that fit")
    budget.add_argument("--steps", type=int)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--resume", action="store_true")
    mean = commands.add_parser("mean", allow_abbrev=False, help="the weighted mean of the weights of two trained peers")
    mean.add_argument("start", type=Path)
    mean.add_argument("end", type=Path)
    mean.add_argument("--share", type=float, default=0.5, help="of END, from 0 to 1")
    mean.add_argument("--out", type=Path, required=True)
    for name in ("evaluate", "robustness"):
        scored = commands.add_parser(name, allow_abbrev=False)
        scored.add_argument("--weights", type=Path, required=True, help="RUN/final or RUN/best")
        scored.add_argument("--dataset", required=True)
        scored.add_argument("--root", required=True)
        scored.add_argument("--split", default="val")
        scored.add_argument("--out", required=True)
        scored.add_argument("--against", nargs="+", default=[], help="a report, or robustness tables")
        scored.add_argument("--bootstrap", type=int, default=EvaluateConfig.bootstrap)
    return parser


def run(argv: list[str]) -> int:
    """The command line without its error handling."""
    args, flags = _parser().parse_known_args(argv)
    command = shlex.join(["python", "experiments/two_stream/baselines.py", *argv])
    if args.task == "train":
        if (args.minutes or args.steps or 0) <= 0:
            raise InputError("--minutes, --steps: expected more than 0")
        flags += [f"--train.out={args.out}", f"--train.seed={args.seed}"]
        config = settings_of(args.peer, args.config, flags)
        print(f"weights: {train_peer(args.peer, config, args.minutes, args.steps, args.resume, command)}")
        return 0
    if flags:
        raise InputError(f"{flags[0]}: not known; see python experiments/two_stream/baselines.py {args.task} --help")
    if args.task == "mean":
        print(f"weights: {mean_of(args.start, args.end, args.out, args.share)}")
        return 0
    one = args.against[0] if args.task == "evaluate" and args.against else None
    config = EvaluateConfig(
        args.dataset, args.root, args.split, out=args.out, against=one, bootstrap=args.bootstrap, command=command
    )
    if args.task == "evaluate":
        print(evaluate_peer(config, args.weights))
    else:
        print(robustness_of_peer(config, args.weights, args.against))
    return 0


def main() -> int:
    """Exit code 2 and one line for bad input."""
    try:
        return run(sys.argv[1:])
    except InputError as error:
        print(f"baselines: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return cli.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
