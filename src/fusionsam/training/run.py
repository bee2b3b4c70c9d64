"""Training runs on Lightning: data, task, logs, checkpoints, resume."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fusionsam.config.load import as_yaml, differences, read_settings
from fusionsam.config.schema import Config, ModelConfig, TrainConfig, to_dict
from fusionsam.data.dataset import PairDataset
from fusionsam.data.fingerprints import of_training
from fusionsam.data.loader import class_shares
from fusionsam.io import commit, digest, write_json, write_text
from fusionsam.metrics.perceptual import EncoderLevels, load_vgg16
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.training.callbacks import LAST, BestWeights, SameOnAllDevices, WholeFiles, step_bar
from fusionsam.training.data import PairData, open_data, open_unlabelled, pairs_digest, refuse_seen, require_sizes
from fusionsam.training.distill_task import (
    DISTILL,
    PICTURE,
    DistillTask,
    distill_task,
    require_both_cameras,
    require_distill,
)
from fusionsam.training.segmentation_task import SegmentationTask, schedule_factor
from fusionsam.training.steering_data import SteeringData
from fusionsam.training.steering_task import STEERING, SteeringTask, require_steering, steered_network
from fusionsam.training.tokenizer_task import TokenizerTask
from fusionsam.types import SMALLEST, InputError, JsonObject
from fusionsam.weights import pretrained as foreign
from fusionsam.weights.build import build_network
from fusionsam.weights.checkpoint import WEIGHTS, Card, locate, read_card

Stage = SegmentationTask | TokenizerTask | SteeringTask | DistillTask
BY_TEACHER = (PICTURE, DISTILL)
"""Stages in which parts of a frozen network learn from it, or from another."""
UNLABELLED = ("tokenizer", *BY_TEACHER)
"""Stages that look at no label."""

SETTINGS = "settings.yaml"
SOURCES = "sources.json"
"""Digests of the checkpoints that the parts which do not learn, or what they learn, are read from at every start."""
# where and how often, not what: these may differ when a run is resumed
FREE_ON_RESUME = {
    "data.root", "data.workers", "train.out", "train.validate_every", "train.checkpoint_minutes", "train.accelerator",
    "train.devices", "train.num_nodes", "train.strategy",  # which devices; how many they are is compared apart
}  # fmt: skip


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


def tokenizer_task(config: Config, steps: int) -> TokenizerTask:
    """Stage 1 with Phi of eq. 7: VGG16, or the image encoder that model.encoder.weights, model.start_from or a
    model.sam_weights of its kind fill.

    InputError where Phi would be an untrained network.
    """
    network = build_network(config.model)
    phi: EncoderLevels | torch.nn.Module | None = None
    if config.train.perceptual_weights and config.train.perceptual != "vgg16":
        raise InputError(
            f"train.perceptual_weights: {config.train.perceptual_weights}, but train.perceptual is "
            f"{config.train.perceptual}, which reads no file; set it to vgg16 or leave the file out"
        )
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


def _require_crop_of_stage_1(config: Config) -> None:
    """InputError for crops that LSTG's stride does not divide, or that leave D nothing to judge."""
    crop, stages = config.data.crop, config.train.discriminator_stages
    if any(side % Tokenizer.STRIDE for side in crop):
        raise InputError(f"data.crop: {tuple(crop)}, expected multiples of {Tokenizer.STRIDE} in stage tokenizer")
    smallest = 2 ** (stages + 1)
    if config.loss.adversarial_weight > 0 and min(crop) < smallest:
        raise InputError(
            f"data.crop: {tuple(crop)}, expected at least {smallest} a side with train.discriminator_stages {stages}"
        )


def _without_labels(config: Config) -> Config:
    """Nothing without labels can aim at a class, and a dropped image would teach nothing."""
    data = replace(config.data, rare_crop=0.0, rare_sampling=0.0, paste=0.0, modality_dropout=0.0, partial_absence=0.0)
    return replace(config, data=data)


def _require_whole_network(file: Path) -> None:
    """InputError for the settings of a run of an earlier version that lack one of the network's: the preset would fill
    it, with what the run did not have."""
    begun = yaml.safe_load(file.read_text(encoding="utf-8"))
    written = begun.get("model") if isinstance(begun, dict) else None
    for section, fields in to_dict(ModelConfig()).items():
        there = written.get(section) if isinstance(written, dict) else None
        if not (isinstance(fields, dict) and isinstance(there, dict)):
            continue
        for name, before in fields.items():
            if name not in there:
                raise InputError(
                    f"{file}: was written by an earlier version and lacks model.{section}.{name}; write "
                    f"{before!r} there, which it was then, and start again"
                )


def _begun(file: Path, config: Config, resume: bool) -> bool:
    """Whether `file` holds the settings of the run that is resumed; InputError where they are not those of `config`."""
    if resume and file.exists():
        _require_whole_network(file)
        begun = read_settings(file)
        changed = set(differences(to_dict(begun), to_dict(config))) - FREE_ON_RESUME
        if _world(begun.train) != _world(config.train):
            changed |= {"train.devices x train.num_nodes"}  # the pairs of a step hang on them
        if changed:
            raise InputError(
                f"{', '.join(sorted(changed))}: differs from {file}, so the run cannot go on to the same numbers; "
                f"use --config {file} --resume, or another train.out"
            )
        return True
    if file.exists():
        read_settings(file)  # of a run that was killed before its first checkpoint, or somebody else's
    return False


def _require_same_sources(config: Config, resume: bool) -> JsonObject:
    """Digests of model.start_from and train.teacher, for stages that read them at every start. InputError where a
    resumed run began with others of these names: tiny is another one in another version."""
    if config.train.stage not in (STEERING, *BY_TEACHER):
        return {}
    given = {"model.start_from": config.model.start_from, "train.teacher": config.train.teacher}
    found = {key: digest(locate(source) / WEIGHTS) for key, source in given.items() if source}
    file = Path(config.train.out) / SOURCES
    begun = json.loads(file.read_text(encoding="utf-8")) if resume and file.exists() else found
    for key, value in found.items():
        if begun.get(key, value) != value:
            raise InputError(
                f"{key}: {given[key]} is not the checkpoint of that name that {config.train.out} began with, so it "
                "cannot go on; take the version of then, or another train.out"
            )
    return found


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
            f"train: {asked} cannot be used ({str(error).splitlines()[0][:160]}); leave them out for what this machine "
            "has"
        ) from None


def _require_place(config: Config, resume: bool) -> None:
    """InputError for folders without a name, and where train.out holds another run, or none to resume."""
    for key, given in (("train.out", config.train.out), ("data.root", config.data.root)):
        if not given.strip():
            raise InputError(f"{key}: is empty, as of an unset shell variable; give a folder")
    out = Path(config.train.out)
    last = out / LAST
    if last.exists() and not resume:
        raise InputError(f"{out}: holds an unfinished or finished run; give --resume to continue or another train.out")
    if not resume and (kept := next((out / name for name in ("best", "final") if (out / name).exists()), None)):
        raise InputError(f"{kept}: holds the weights of another run, which would be lost; choose another train.out")
    if resume and not last.exists():
        raise InputError(f"{out}: has no {LAST} to resume from; start without --resume")


def _require_settings(config: Config, resume: bool) -> None:
    """InputError for settings that contradict one another, or the stage of the run."""
    stage, model = config.train.stage, config.model
    for setting, stages in (
        ("new_picture_head", BY_TEACHER),
        ("new_encoders", (DISTILL,)),
        ("teacher", BY_TEACHER),
        ("distill", (DISTILL,)),
    ):
        given = getattr(config.train, setting)
        if given not in (None, False) and stage not in stages:
            found, expected = "true" if given is True else given, " or ".join(stages)
            raise InputError(f"train.{setting}: {found}, but train.stage is {stage}; expected stage {expected}")
    if config.train.teacher is not None and not config.train.teacher.strip():
        raise InputError("train.teacher: is empty, as of an unset shell variable; give a checkpoint, or null")
    if stage == STEERING:
        require_steering(config)
    elif stage in BY_TEACHER:
        require_distill(config)
    elif model.steering.width:
        raise InputError(
            f"model.steering.width: {model.steering.width}, but train.stage is {stage}; "
            "steering is trained afterwards, by train.stage steering; set it to 0"
        )
    if config.train.freeze_tokenizer and stage == "tokenizer":
        raise InputError("train.freeze_tokenizer: there is nothing else to train in stage tokenizer; set it to false")
    if config.train.freeze_picture and not resume:
        _require_picture_to_keep(config)
    if stage == "tokenizer":
        _require_crop_of_stage_1(config)
    elif min(config.data.crop) < SMALLEST:
        raise InputError(f"data.crop: {tuple(config.data.crop)}, expected at least {SMALLEST} a side; enlarge it")
    if config.train.freeze_tokenizer and not (model.tokenizer_weights or model.start_from):
        raise InputError(
            "train.freeze_tokenizer: true, but LSTG would stay random; give model.tokenizer_weights (a checkpoint of "
            "stage 1, or tiny) or model.start_from, or set it to false"
        )


def _require_picture_to_keep(config: Config) -> None:
    """InputError where train.freeze_picture has no picture to keep, or would keep a part of what makes it alone."""
    for wrong, found, expected in (
        (config.train.stage != "segmentation", f"train.stage {config.train.stage}", "segmentation"),
        (not config.model.start_from, "no model.start_from", "the checkpoint whose picture stays"),
        (not config.train.freeze_tokenizer, "train.freeze_tokenizer false", "true: the picture is made of its tokens"),
        (bool(config.model.tokenizer_weights), "model.tokenizer_weights", "LSTG of model.start_from: leave it out"),
    ):
        if wrong:
            raise InputError(f"train.freeze_picture: true with {found}; expected {expected}")
    assert config.model.start_from
    stored = to_dict(read_card(config.model.start_from)[0].fusion)
    for name, value in to_dict(config.model.fusion).items():
        if stored[name] != value:
            raise InputError(
                f"train.freeze_picture: true with model.fusion.{name} {value}; expected {stored[name]}, as "
                f"{config.model.start_from} of model.start_from has it"
            )


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
    _require_place(config, resume)
    _require_settings(config, resume)
    out = Path(config.train.out)
    stage_1, unlabelled = config.train.stage == "tokenizer", config.train.stage in UNLABELLED
    train_set, val_set = _open_pairs(config)
    sources = (config.model.start_from, config.model.tokenizer_weights, config.train.teacher)
    earlier = [locate(source) for source in sources if source]
    refuse_seen(config, val_set.entries, earlier)
    begun = _begun(out / SETTINGS, config, resume)
    digests = _require_same_sources(config, resume)
    learnt = [entry for entry in train_set.entries if unlabelled or (entry.label is not None and not entry.extra)]
    steps = total_steps(config, len(learnt))  # extra pairs of stage 2 are a share of the steps, they make none
    L.seed_everything(config.train.seed, verbose=False)
    card: Card = {"command": command, "commit": commit(), "seed": config.train.seed, "config": to_dict(config)}
    task, data, card = _task(config, train_set, val_set, steps, resume, card)
    if not begun:
        write_text(out / SETTINGS, as_yaml(config), "choose another train.out")
        if digests:
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
