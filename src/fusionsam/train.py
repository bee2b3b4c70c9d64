"""Training runs on Lightning: data, task, logs, checkpoints, resume; and the command `fusionsam train`."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from fusionsam import foreign
from fusionsam.checkpoint import build_network, commit, locate, save_checkpoint
from fusionsam.config import Config, DataConfig, TrainConfig, to_dict
from fusionsam.data.catalog import find
from fusionsam.data.dataset import PairDataset
from fusionsam.data.fingerprints import Fingerprints, fingerprint, of_training
from fusionsam.data.leaks import compare, require_no_leak, weigh
from fusionsam.data.loader import class_shares, train_loader, val_loader
from fusionsam.data.predictions import PredictionFolder
from fusionsam.data.splits import Entry, entries
from fusionsam.models.fusionsam import SMALLEST
from fusionsam.perceptual import EncoderLevels, load_vgg16
from fusionsam.settings import as_yaml, differences, parse_settings, read_settings
from fusionsam.structures import Batch, InputError
from fusionsam.tasks import SegmentationTask, schedule_factor
from fusionsam.tokenizer_task import TokenizerTask

LAST, SETTINGS = "last.ckpt", "settings.yaml"
# where and how often, not what: these may differ when a run is resumed
FREE_ON_RESUME = {
    "data.root", "data.workers", "train.out", "train.validate_every", "train.checkpoint_minutes", "train.accelerator",
    "train.devices", "train.num_nodes", "train.strategy",  # which devices; how many they are is compared apart
}  # fmt: skip


class PairData(L.LightningDataModule):
    """The training stream from the step a run has reached, and the validation split."""

    def __init__(self, config: Config, train: PairDataset, val: PairDataset, total_steps: int) -> None:
        super().__init__()
        self.config, self.train, self.val, self.total_steps = config, train, val, total_steps

    def train_dataloader(self) -> DataLoader[Batch]:
        """Begins where the run stands; Lightning ends it at max_steps."""
        assert self.trainer is not None
        seed = self.config.train.seed + 7919 * self.trainer.global_rank  # each device its own stream
        return train_loader(
            self.train,
            self.config.data,
            self.config.model.foreground,
            self.config.train.batch_size,
            seed,
            start_step=self.trainer.global_step,
            steps=self.total_steps,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation pair at full size."""
        return val_loader(self.val)


class WholeFiles(TorchCheckpointIO):
    """Resumable checkpoints that are never half written: a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside `path`, then rename. InputError where that fails."""
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # the latter is torch's for a full disk
            part.unlink(missing_ok=True)
            reason = str(error).splitlines()[0][:100]
            raise InputError(
                f"{path}: cannot be written ({reason}); make room there, then go on with --resume"
            ) from None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """InputError for a file that is no checkpoint."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0][:100]
            raise InputError(f"{path}: cannot be resumed from ({reason}); start again without it") from None


class BestWeights(Callback):
    """Keeps the weights of the best validation as a checkpoint folder, ready for predict and evaluate; the hours this
    run has had over all its sessions; and last.ckpt, at every validation and every `minutes` between (Lightning's
    ModelCheckpoint does not look at the clock where a task steps its optimisers itself, as stage 1 does)."""

    def __init__(self, folder: Path, card: dict[str, Any], seen: Fingerprints, pairs: str, minutes: float) -> None:
        self.folder, self.card, self.seen, self.pairs, self.minutes = folder, card, seen, pairs, minutes
        self.saved = time.monotonic()
        self.best = -math.inf
        self.validated = -1  # step of the latest validation
        self.seconds = 0.0
        self.started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return self.seconds + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on comparing."""
        return {
            "best": self.best,
            "validated": self.validated,
            "seconds": self.elapsed(),
            "pairs": self.pairs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from an interrupted run. InputError if the training pairs are no longer those it began with."""
        if state_dict.get("pairs", self.pairs) != self.pairs:
            raise InputError(
                f"data.root: the pairs (images, labels, their order, or the validation list) are not those that "
                f"{self.folder} began with, so the run cannot go on to the same numbers; restore them, or give another "
                "train.out"
            )
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]
        self.validated = state_dict.get("validated", -1)
        self.started = time.monotonic()

    def save(self, trainer: L.Trainer, task: SegmentationTask | TokenizerTask, folder: Path) -> None:
        """Write the evaluated network with its validation figures."""
        scores = {k: round(float(v), 3) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        card = {**self.card, "step": trainer.global_step, "hours": round(self.elapsed() / 3600, 3), "val": scores}
        save_checkpoint(folder, task.evaluated(), card)
        self.seen.write(folder)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the network if it is the best so far, a line of history, and a checkpoint to resume from."""
        if trainer.sanity_checking:
            return
        self.validated = trainer.global_step
        if trainer.is_global_zero:
            assert isinstance(pl_module, SegmentationTask | TokenizerTask)
            self._write_line(trainer)
            score = float(trainer.callback_metrics["val/psnr" if isinstance(pl_module, TokenizerTask) else "val/miou"])
            if score > self.best:
                self.best = score
                self.save(trainer, pl_module, self.folder / "best")
        self._save_last(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A checkpoint to resume from if it is time, by the first device's clock. Not at a step that is validated next:
        a run resumed from there would miss that validation, and after it one is written anyhow."""
        if trainer.global_step % int(trainer.val_check_interval) == 0:  # in steps, see train()
            return
        if trainer.strategy.broadcast(time.monotonic() - self.saved >= 60 * self.minutes):
            self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)  # every device takes part
        self.saved = time.monotonic()

    def _write_line(self, trainer: L.Trainer) -> None:
        """Append to history.jsonl; lines from this step on are of a session that was killed after its checkpoint."""
        file = self.folder / "history.jsonl"
        line = {"step": trainer.global_step, "hours": self.elapsed() / 3600}
        line |= {k: round(float(v), 3) for k, v in trainer.callback_metrics.items() if not k.startswith("lr")}
        lines = file.read_text().splitlines() if file.exists() else []
        lines = [kept for kept in lines if json.loads(kept)["step"] < trainer.global_step]
        part = file.with_suffix(".part")
        part.write_text("\n".join([*lines, json.dumps(line)]) + "\n")
        os.replace(part, file)


class FrozenTokenizer(Callback):
    """Stage 2 with train.freeze_tokenizer: in eval mode no codebook moves; without gradients no weight does."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before the optimiser picks its parameters."""
        assert isinstance(pl_module, SegmentationTask)
        tokenizer = pl_module.network.tokenizer.requires_grad_(False)
        tokenizer.missing.requires_grad_(True)  # stage 1 never taught these

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Whatever a validation did to the modes, LSTG is in eval."""
        assert isinstance(pl_module, SegmentationTask)
        pl_module.network.tokenizer.eval()


def pairs_digest(seen: Fingerprints, train: PairDataset, val: PairDataset) -> str:
    """16 hex digits that change with the training images and labels, their order, and the validation list; `seen`
    begins with the training pairs."""
    found = hashlib.sha256(repr((seen.content[: len(train)], [entry.id for entry in val.entries])).encode())
    for index, entry in enumerate(train.entries):
        if entry.label is not None and (label := train.label(index)) is not None:
            found.update(label.to(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def total_steps(config: Config, pairs: int) -> int:
    """Optimiser steps of a run: max_steps, or epochs over `pairs` training pairs, batch_size a step and device."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return max(1, math.ceil(config.train.epochs * pairs / (config.train.batch_size * _world(config.train))))


def _world(train: TrainConfig) -> int:
    return (given_devices(train) or 1) * train.num_nodes


def given_devices(train: TrainConfig) -> int | None:
    """How many devices of a node train.devices asks for; None where Lightning counts what is there (auto, -1)."""
    asked = str(train.devices).strip()
    if "," in asked:
        return sum(bool(part.strip()) for part in asked.split(","))
    return int(asked) if asked.isdigit() else None


def strategy(train: TrainConfig) -> str:
    """Lightning's strategy: train.strategy, but on several devices DDP has to look for parameters without a gradient
    (the tokens for a missing modality, point and box embeddings in prompt mode none)."""
    devices = given_devices(train)
    if devices is None:
        asks_gpu = train.accelerator in ("auto", "gpu", "cuda")
        devices = torch.cuda.device_count() if asks_gpu else 1
    if devices * train.num_nodes > 1 and train.strategy in ("auto", "ddp"):
        return "ddp_find_unused_parameters_true"
    return train.strategy


def _refuse_seen(config: Config, val: list[Entry]) -> None:
    """InputError if a validation picture is among those that a checkpoint this run starts from was trained on."""
    for source in (config.model.start_from, config.model.tokenizer_weights):
        seen = None if source is None else Fingerprints.read(locate(source))
        if seen is None or config.data.allow_train_test_leak_and_know_that_scores_are_worthless:
            continue
        split, name = config.data.val_split, f"{Path(str(source)).name} (what it was trained on)"
        numbers = [f"pair {number}" for number in range(1, len(seen.content) + 1)]
        prints = {name: seen, split: fingerprint(split, val)}
        found, _ = weigh(compare(prints, {name: numbers, split: [e.id for e in val]}), {name: numbers, split: val})
        if found:
            pictures = len({leak.second_id for leak in found})
            raise InputError(
                f"data.val_split: {pictures} pictures were seen by {source}: {found[0]}; validate on others"
            )


def _refuse_leaks(data: DataConfig, lists: dict[str, list[Entry]]) -> None:
    """InputError if the splits share pictures with one another, or with the test split where that is beside them."""
    if data.allow_train_test_leak_and_know_that_scores_are_worthless:
        return
    with suppress(InputError):  # no list of test pictures, or not all of them, on this machine
        lists = {"test": entries(data.dataset, data.root, "test", data.class_file), **lists}
    require_no_leak(lists)


def _lists(data: DataConfig) -> dict[str, list[Entry]]:
    """Entries of the training split, with the extra pairs behind them, and of the validation split; InputError for a
    leak between them or with the test split."""
    if data.extra_labels and len(data.extra_labels) != len(data.extra_pairs):
        raise InputError(
            f"data.extra_labels: {len(data.extra_labels)} folders for {len(data.extra_pairs)} of data.extra_pairs; "
            "give one for each, in the same order"
        )
    if data.train_split == data.val_split and not data.allow_train_test_leak_and_know_that_scores_are_worthless:
        raise InputError(
            f"data.val_split: {data.val_split!r} is data.train_split, too; give two, for example by lists "
            "train.txt and val.txt with one id a line"
        )
    lists = {s: entries(data.dataset, data.root, s, data.class_file) for s in (data.train_split, data.val_split)}
    for folder, labels in zip_longest(data.extra_pairs, data.extra_labels):
        # labels that lie beside them may be of other classes
        extra = [replace(entry, label=None, extra=True) for entry in entries("pairs", folder, "all")]
        if labels is not None:
            palette = find(data.dataset, data.class_file).palette
            paths = PredictionFolder(labels, [entry.id for entry in extra], palette, "ids").paths
            extra = [replace(entry, label=paths.get(entry.id)) for entry in extra]
        lists[data.train_split] = lists[data.train_split] + extra
    _refuse_leaks(data, lists)
    return lists


def open_data(config: Config) -> tuple[PairDataset, PairDataset]:
    """Training split, data.extra_pairs behind it, and validation split; InputError for a leak between them or with the
    test split."""
    data = config.data
    row = find(data.dataset, data.class_file)
    lists = _lists(data)
    opened = [PairDataset(lists[split], row, cache=True) for split in (data.train_split, data.val_split)]
    if not row.classes:
        raise InputError(f"data.class_file: data set {data.dataset!r} has no classes of its own; give a YAML with them")
    pairs = enumerate(zip_longest(config.model.classes, row.classes))
    if (odd := next(((i, *names) for i, names in pairs if names[0] != names[1]), None)) is not None:
        raise InputError(
            f"model.classes: class {odd[0]} is {odd[1]!r}, in the data it is {odd[2]!r}; remove model.classes, "
            "model.palette and model.foreground from the YAML, they come from the data set"
        )
    unlabelled = next((entry.id for entry in lists[data.val_split] if entry.label is None), None)
    if unlabelled is not None:
        raise InputError(
            f"data.val_split: {unlabelled} of {data.val_split!r} has no label; add it, or take the pair off the list"
        )
    for index, entry in enumerate(opened[1].entries):  # not after hours, at the first validation
        height, width = opened[1][index].size
        if min(height, width) < SMALLEST:
            raise InputError(
                f"data.val_split: {entry.id} has {height}x{width} pixels, expected at least {SMALLEST} a side; resize "
                "the pair, or take it off the list"
            )
    return opened[0], opened[1]


def open_unlabelled(config: Config) -> tuple[PairDataset, PairDataset]:
    """As `open_data`, but no pair has a label."""
    data = config.data
    lists = _lists(data)
    opened = [
        PairDataset([replace(entry, label=None) for entry in lists[split]], cache=True)
        for split in (data.train_split, data.val_split)
    ]
    return opened[0], opened[1]


def tokenizer_task(config: Config, steps: int) -> TokenizerTask:
    """Stage 1 with Phi of eq. 7: VGG16, or the image encoder that model.encoder.weights, model.start_from or a
    model.sam_weights of its kind fill.

    InputError where Phi would be an untrained network.
    """
    network = build_network(config.model)
    phi: EncoderLevels | torch.nn.Module | None = None
    if config.loss.perceptual_weight > 0 and config.train.perceptual == "vgg16":
        phi = load_vgg16(config.train.perceptual_weights, config.train.perceptual_input)
    elif config.loss.perceptual_weight > 0:
        model = config.model
        filled = bool(model.encoder.weights or model.start_from)
        if not filled and model.sam_weights:
            filled = foreign.sam_parts(model.sam_weights).encoder_kind == model.encoder.kind
        if not filled:
            raise InputError(
                f"train.perceptual: encoder, but nothing fills the {model.encoder.kind} image encoder; give "
                "model.encoder.weights, or model.sam_weights of that kind, or vgg16, or loss.perceptual_weight 0"
            )
        phi = EncoderLevels(network.image_encoder)
    if phi is not None:
        phi = phi.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TokenizerTask(network.tokenizer, config, lambda step: schedule_factor(step, steps, config.train), phi)


def _without_labels(config: Config) -> Config:
    """Nothing in stage 1 can aim at a class, and a dropped image would teach nothing."""
    data = replace(config.data, rare_crop=0.0, rare_sampling=0.0, paste=0.0, modality_dropout=0.0)
    return replace(config, data=data)


def _keep_settings(out: Path, config: Config, resume: bool) -> None:
    """Write the resolved settings into the run's folder, or hold a resumed run to the ones it began with."""
    file = out / SETTINGS
    if resume and file.exists():
        begun = read_settings(file)
        changed = set(differences(to_dict(begun), to_dict(config))) - FREE_ON_RESUME
        if _world(begun.train) != _world(config.train):
            changed |= {"train.devices x train.num_nodes"}  # the pairs of a step hang on them
        if changed:
            raise InputError(
                f"{', '.join(sorted(changed))}: differs from {file}, so the run cannot go on to the same numbers; "
                f"use --config {file} --resume, or another train.out"
            )
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")  # every device's process writes the same
        part.write_text(as_yaml(config))
        os.replace(part, file)
    except OSError as error:
        raise InputError(f"train.out: {out} cannot be written ({error.strerror}); choose another folder") from None


def _session(logs: Path) -> str:
    """Name of this session's CSV folder: Lightning's logger deletes what an earlier session wrote under its name."""
    earlier = sum(1 for folder in logs.glob("csv*") if folder.is_dir())
    return f"csv-{earlier + 1}" if earlier else "csv"


def open_trainer(train: TrainConfig, steps: int, **more: Any) -> L.Trainer:
    """Lightning's trainer for `steps` optimiser steps, validated every train.validate_every of them. InputError for
    devices that this machine does not have."""
    # the stream starts at the step a run has reached, so Lightning's doubts about resuming do not apply
    for noise in ("isinstance.treespec", "You have overridden .transfer_batch", "You're resuming", "Checkpoint dir"):
        warnings.filterwarnings("ignore", f".*{noise}")
    try:
        return L.Trainer(
            accelerator=train.accelerator,
            devices=int(train.devices) if str(train.devices).isdigit() else train.devices,
            num_nodes=train.num_nodes,
            strategy=strategy(train),
            precision=train.precision,
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=min(train.validate_every, steps),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=min(10, steps),
            use_distributed_sampler=False,
            enable_checkpointing=False,  # BestWeights does it
            plugins=[WholeFiles()],
            **more,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        asked = f"accelerator {train.accelerator!r}, devices {train.devices!r}, strategy {train.strategy!r}"
        raise InputError(
            f"train: {asked} cannot be used ({str(error).splitlines()[0][:160]}); leave them out for what this machine "
            "has"
        ) from None


def train(config: Config, resume: bool = False, command: str = "") -> Path:
    """Run (or with `resume` continue) the training that `config` describes; returns the folder it wrote into.

    `out/best` and `out/final` are checkpoint folders, `out/last.ckpt` is what resume continues from, `out/logs` holds
    CSV and TensorBoard logs. Raises InputError for bad settings or data.
    """
    out = Path(config.train.out)
    last = out / LAST
    if last.exists() and not resume:
        raise InputError(f"{out}: holds an unfinished or finished run; give --resume to continue or another train.out")
    if resume and not last.exists():
        raise InputError(f"{out}: has no {LAST} to resume from; start without --resume")
    stage_1 = config.train.stage == "tokenizer"
    if config.train.freeze_tokenizer and stage_1:
        raise InputError("train.freeze_tokenizer: there is nothing else to train in stage tokenizer; set it to false")
    model = config.model
    if (
        config.train.freeze_tokenizer
        and model.tokenizer.tokens != "pixels"
        and not (model.tokenizer_weights or model.start_from)
    ):
        raise InputError(
            "train.freeze_tokenizer: true, but LSTG would stay random; give model.tokenizer_weights (a checkpoint of "
            "stage 1, or tiny) or model.start_from, or set it to false"
        )
    if config.data.extra_pairs and not (stage_1 or config.loss.fusion_weight or config.data.extra_labels):
        raise InputError(
            "data.extra_pairs: teach fusion alone in stage 2, and loss.fusion_weight is 0; leave one of them out, or "
            "give data.extra_labels"
        )
    train_set, val_set = open_unlabelled(config) if stage_1 else open_data(config)
    _refuse_seen(config, val_set.entries)
    _keep_settings(out, config, resume)
    learnt = [entry for entry in train_set.entries if stage_1 or (entry.label is not None and not entry.extra)]
    steps = total_steps(config, len(learnt))  # extra pairs of stage 2 are a share of the steps, they make none
    L.seed_everything(config.train.seed, verbose=False)
    task: SegmentationTask | TokenizerTask
    if stage_1:
        task = tokenizer_task(config, steps)
    else:
        task = SegmentationTask(
            build_network(config.model, to_train=not resume), config, steps, class_shares(train_set)
        )
    card = {"command": command, "commit": commit(), "seed": config.train.seed, "config": to_dict(config)}
    earlier = [locate(source) for source in (config.model.tokenizer_weights, config.model.start_from) if source]
    seen = of_training(train_set, earlier)
    pairs = pairs_digest(seen, train_set, val_set)
    best = BestWeights(out, card, seen, pairs, config.train.checkpoint_minutes)
    trainer = open_trainer(
        config.train,
        steps,
        gradient_clip_val=None if stage_1 else config.train.gradient_clip or None,  # stage 1 clips each player itself
        logger=[
            CSVLogger(out, name="logs", version=_session(out / "logs")),
            TensorBoardLogger(out, name="logs", version="tensorboard"),
        ],
        callbacks=[
            best,
            *([] if stage_1 else [LearningRateMonitor("step")]),
            *([FrozenTokenizer()] if config.train.freeze_tokenizer else []),
            TQDMProgressBar(refresh_rate=1 if steps < 200 else 10),
        ],
    )
    data = PairData(_without_labels(config) if stage_1 else config, train_set, val_set, steps)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=str(last) if resume else None, weights_only=True)
        # the end of the schedule where validate_every does not divide it, and a finished run that was resumed
        if best.validated != trainer.global_step or not any(k.startswith("val/") for k in trainer.callback_metrics):
            trainer.validate(task, datamodule=data, verbose=False)
    except SystemExit as ended:
        if ended.code == 1:  # Lightning's answer to Ctrl+C
            raise KeyboardInterrupt from None
        raise
    trainer.save_checkpoint(last, weights_only=False)
    if trainer.is_global_zero:
        best.save(trainer, task, out / "final")
        if not (out / "best").exists():
            best.save(trainer, task, out / "best")
    torch.set_grad_enabled(True)
    return out


def parse(prog: str, argv: list[str]) -> argparse.Namespace:
    """Settings and --resume of `fusionsam train`."""
    return parse_settings(prog, argv, {"resume": "continue the run in train.out from its last checkpoint"})


def main(args: argparse.Namespace) -> int:
    """Train, and say where the weights are."""
    out = train(args.settings, args.resume, args.command_line)
    print(f"weights: {out / 'best'} (best validation), {out / 'final'}")
    return 0
