"""Training runs on Lightning: data, task, logs, checkpoints, resume."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fusionsam.config.load import as_yaml
from fusionsam.config.schema import Config, ModelConfig, TrainConfig, to_dict
from fusionsam.data.dataset import PairDataset
from fusionsam.data.fingerprints import of_training
from fusionsam.data.loader import class_shares
from fusionsam.io import commit, said, write_json, write_text
from fusionsam.training.callbacks import LAST, BestWeights, SameOnAllDevices, WholeFiles, step_bar
from fusionsam.training.data import (
    PairData,
    data_digests,
    open_data,
    open_unlabelled,
    pairs_digest,
    refuse_seen,
    require_sizes,
)
from fusionsam.training.distill_task import DistillTask, distill_task, require_both_cameras
from fusionsam.training.requirements import (
    BY_TEACHER,
    SETTINGS,
    SOURCES,
    UNLABELLED,
    given_devices,
    require_place,
    require_same_settings,
    require_same_sources,
    require_settings,
    world,
)
from fusionsam.training.segmentation_task import SegmentationTask
from fusionsam.training.steering_data import SteeringData
from fusionsam.training.steering_task import STEERING, SteeringTask, steered_network
from fusionsam.training.tokenizer_task import TokenizerTask, tokenizer_task
from fusionsam.types import InputError
from fusionsam.weights.build import build_network
from fusionsam.weights.checkpoint import Card, locate

Stage = SegmentationTask | TokenizerTask | SteeringTask | DistillTask


def total_steps(config: Config, pairs: int) -> int:
    """Optimiser steps of a run: max_steps, or epochs over `pairs` training pairs, batch_size a step and device."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return max(1, math.ceil(config.train.epochs * pairs / (config.train.batch_size * world(config.train))))


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


def _without_labels(config: Config) -> Config:
    """Nothing without labels can aim at a class, and a dropped image would teach nothing."""
    data = replace(config.data, rare_crop=0.0, rare_sampling=0.0, paste=0.0, modality_dropout=0.0, partial_absence=0.0)
    return replace(config, data=data)


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
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        asked = f"accelerator {train.accelerator!r}, devices {train.devices!r}, strategy {train.strategy!r}"
        raise InputError(
            f"train: {asked} cannot be used ({said(error)}); leave them out for what this machine has"
        ) from None


def _open_pairs(config: Config) -> tuple[PairDataset, PairDataset]:
    """The pairs to train and to validate on. InputError for pairs that could teach nothing."""
    if config.train.stage in UNLABELLED:
        train_set, val_set = open_unlabelled(config)
        if config.train.stage in BY_TEACHER:
            require_both_cameras(train_set, "data.train_split, data.extra_pairs", config.train.stage)
            require_both_cameras(val_set, "data.val_split", config.train.stage)
            require_sizes(val_set)
        return train_set, val_set
    train_set, val_set = open_data(config)
    alone = [entry.id for entry in train_set.entries if entry.label is None]
    fused = config.loss.fusion_weight and not config.train.freeze_picture
    if alone and not fused:
        why = "train.freeze_picture is true" if config.train.freeze_picture else "loss.fusion_weight is 0"
        raise InputError(
            f"data.train_split, data.extra_pairs: {len(alone)} pairs without a label map (first: {alone[0]}) teach "
            f"fusion alone in stage 2, and {why}; take them away, or give labels (data.extra_labels)"
        )
    return train_set, val_set


def _task(
    config: Config, train_set: PairDataset, val_set: PairDataset, steps: int, resume: bool, card: Card
) -> tuple[Stage, PairData | SteeringData, Card]:
    """What the stage of the run learns, from which data, and the card of its checkpoints."""
    if config.train.stage == STEERING:
        network, base = steered_network(config)
        data = SteeringData(config, network, train_set, val_set, steps)
        return SteeringTask(network, config, steps), data, _with_part(base, STEERING, card, network.config)
    if config.train.stage in BY_TEACHER:
        taught, base = distill_task(config, steps)
        pairs = PairData(_without_labels(config), train_set, val_set, steps)
        return taught, pairs, _with_part(base, config.train.stage, card, taught.network.config)
    if config.train.stage == "tokenizer":
        pairs = PairData(_without_labels(config), train_set, val_set, steps)
        return tokenizer_task(config, steps), pairs, card
    # all weights of a resumed run are in its own checkpoint, and tiny may be another one by now
    model = replace(config.model, start_from=None, tokenizer_weights=None) if resume else config.model
    network = build_network(model, to_train=not resume)
    task = SegmentationTask(network, config, steps, class_shares(train_set))
    return task, PairData(config, train_set, val_set, steps), card


def _with_part(base: Card, part: str, card: Card, model: ModelConfig) -> Card:
    """The card `base` of a network, a part of which is trained: under its name what a card says, with the settings of
    that network, which are not those of the run, and what was said of earlier trainings of the part."""
    stored = {**to_dict(model), "start_from": card["config"]["model"]["start_from"]}
    entry: Card = {**card, "config": {**card["config"], "model": stored}}
    return {**base, part: {**entry, "earlier": base[part]} if part in base else entry}


def _fit(trainer: L.Trainer, task: Stage, data: PairData | SteeringData, best: BestWeights, last: Path | None) -> None:
    """Train, from the checkpoint `last` on where one is given, and validate at the end; KeyboardInterrupt at Ctrl+C."""
    try:
        trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
        # the end of the schedule where validate_every does not divide it, and a finished run that was resumed
        if best.validated != trainer.global_step or not any(k.startswith("val/") for k in trainer.callback_metrics):
            trainer.validate(task, datamodule=data, verbose=False)
    except SystemExit as ended:
        if ended.code == 1:  # Lightning's answer to Ctrl+C
            raise KeyboardInterrupt from None
        raise
    except ValueError as error:
        if last is None or "parameter group" not in str(error):
            raise
        raise InputError(f"{last}: in this version other parts learn in such a run; choose another train.out") from None


def train(config: Config, resume: bool = False, command: str = "") -> Path:
    """Run (or with `resume` continue) the training that `config` describes; returns the folder it wrote into.

    `out/best` and `out/final` are checkpoint folders, `out/last.ckpt` is what resume continues from, `out/logs` holds
    CSV and TensorBoard logs. Raises InputError for bad settings or data.
    """
    require_place(config, resume)
    require_settings(config, resume)
    out = Path(config.train.out)
    stage_1, unlabelled = config.train.stage == "tokenizer", config.train.stage in UNLABELLED
    train_set, val_set = _open_pairs(config)
    sources = (config.model.start_from, config.model.tokenizer_weights, config.train.teacher)
    earlier = [locate(source) for source in sources if source]
    refuse_seen(config, val_set.entries, earlier)
    begun = require_same_settings(out / SETTINGS, config, resume)
    digests = require_same_sources(config, resume, data_digests(config.data, train_set, val_set))
    learnt = [entry for entry in train_set.entries if unlabelled or (entry.label is not None and not entry.extra)]
    steps = total_steps(config, len(learnt))  # extra pairs of stage 2 are a share of the steps, they make none
    L.seed_everything(config.train.seed, verbose=False)
    card: Card = {"command": command, "commit": commit(), "seed": config.train.seed, "config": to_dict(config)}
    task, data, card = _task(config, train_set, val_set, steps, resume, card)
    if not begun:
        write_text(out / SETTINGS, as_yaml(config), "choose another train.out")
        write_json(out / SOURCES, digests)
    seen = of_training(train_set, earlier)
    pairs = pairs_digest(seen, train_set, val_set)
    inside = config.train.stage if config.train.stage in (STEERING, *BY_TEACHER) else ""
    best = BestWeights(out, card, seen, pairs, config.train.checkpoint_minutes, inside)
    rates = [] if stage_1 else [LearningRateMonitor("step")]
    trainer = open_trainer(
        config.train,
        steps,
        gradient_clip_val=None if stage_1 else config.train.gradient_clip or None,  # stage 1 clips each player itself
        logger=[
            CSVLogger(out, name="logs", version=_session(out / "logs")),
            TensorBoardLogger(out, name="logs", version="tensorboard"),
        ],
        callbacks=[best, SameOnAllDevices(), *rates, step_bar(steps)],
    )
    last = out / LAST
    _fit(trainer, task, data, best, last if resume else None)
    trainer.save_checkpoint(last, weights_only=False)
    if trainer.is_global_zero:
        best.save(trainer, task, out / "final")
        if not (out / "best").exists():
            best.save(trainer, task, out / "best")
    torch.set_grad_enabled(True)
    return out
