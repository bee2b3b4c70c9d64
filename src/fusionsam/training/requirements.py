"""What a run is refused for before it begins: settings that contradict one another, a folder that holds another run,
sources that are not those it began with."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import yaml

from fusionsam.config.load import differences, read_settings
from fusionsam.config.schema import Config, ModelConfig, TrainConfig, to_dict
from fusionsam.io import OutputFolder, digest, require_writable
from fusionsam.training.callbacks import LAST
from fusionsam.training.distill_task import DISTILL, PICTURE, require_distill
from fusionsam.training.steering_task import STEERING, require_steering
from fusionsam.training.tokenizer_task import require_crop
from fusionsam.types import SMALLEST, InputError, JsonObject
from fusionsam.weights.checkpoint import WEIGHTS, locate, read_card

BY_TEACHER = (PICTURE, DISTILL)
"""Stages in which parts of a frozen network learn from it, or from another."""
UNLABELLED = ("tokenizer", *BY_TEACHER)
"""Stages that look at no label."""

SETTINGS = "settings.yaml"
SOURCES = "sources.json"
"""Digests of what is read at every start and decides the numbers: the files of the parts that do not learn, or that
others learn from, and of the data (`training.data.data_digests`)."""
# where and how often, not what: these may differ when a run is resumed
FREE_ON_RESUME = {
    "data.root", "data.workers", "train.out", "train.validate_every", "train.checkpoint_minutes", "train.accelerator",
    "train.devices", "train.num_nodes", "train.strategy",  # which devices; how many they are is compared apart
}  # fmt: skip


def world(train: TrainConfig) -> int:
    """Devices of all nodes; where Lightning counts those of a node, one a node."""
    return (given_devices(train) or 1) * train.num_nodes


def given_devices(train: TrainConfig) -> int | None:
    """How many devices of a node train.devices asks for; None where Lightning counts what is there (auto, -1)."""
    asked = str(train.devices).strip()
    if "," in asked:
        return sum(bool(part.strip()) for part in asked.split(","))
    return int(asked) if asked.isdigit() else None


def require_place(config: Config, resume: bool) -> None:
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
    # now, not after the data were read; where it is new its parent, so that a run that is refused leaves no folder
    standing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    require_writable(standing, "choose another train.out")


def require_settings(config: Config, resume: bool) -> None:
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
        require_crop(config)
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


def require_same_settings(file: Path, config: Config, resume: bool) -> bool:
    """Whether `file` holds the settings of the run that is resumed; InputError where they are not those of `config`."""
    if resume and file.exists():
        begun = read_settings(file)  # first: it tells what is no YAML
        _require_whole_network(file)
        changed = set(differences(to_dict(begun), to_dict(config))) - FREE_ON_RESUME
        if world(begun.train) != world(config.train):
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


def _weights_read(config: Config) -> JsonObject:
    """Digests of the checkpoints and files of weights that the stage reads at every start, by their settings."""
    model, train, loss = config.model, config.train, config.loss
    checkpoints, files = {"model.start_from": model.start_from}, {}
    if train.stage == "tokenizer" and loss.perceptual_weight > 0 and train.perceptual == "vgg16":
        checkpoints, files = {}, {"train.perceptual_weights": train.perceptual_weights}
    elif train.stage == "tokenizer" and loss.perceptual_weight > 0:  # Phi is the image encoder
        files = {"model.encoder.weights": model.encoder.weights, "model.sam_weights": model.sam_weights}
    elif train.stage in (STEERING, *BY_TEACHER):
        checkpoints["train.teacher"] = train.teacher
    else:
        return {}  # all that a resumed run needs is in its own checkpoint
    found = {key: digest(locate(source) / WEIGHTS) for key, source in checkpoints.items() if source}
    # a folder, or a name of a hub, has no digest; what is not there is refused by who reads it
    return found | {key: digest(Path(file)) for key, file in files.items() if file and Path(file).is_file()}


def require_same_sources(config: Config, resume: bool, data: JsonObject) -> JsonObject:
    """Digests of what is read at every start and decides the numbers, those of the `data` among them. InputError where
    a resumed run began with others of these names (tiny is another one in another version), or their list is damaged;
    what an earlier version did not list is taken as it is."""
    found = {**_weights_read(config), **data}
    folder = OutputFolder(config.train.out, "train", "restore it, or give another train.out")
    begun = (folder.read(SOURCES) if resume else None) or found
    for key, value in found.items():
        if begun.get(key, value) != value:
            raise InputError(
                f"{key}: {attrgetter(key)(config)} is not what was there under that name when {config.train.out} "
                "began, so it cannot go on to the same numbers; take the version of then, or another train.out"
            )
    return found
