"""Checkpoints: one folder with safetensors, the resolved configuration and what is known of the training."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusionsam.config.schema import ModelConfig, from_dict
from fusionsam.data.fingerprints import FILE as FINGERPRINTS
from fusionsam.io import said, whole, write_json, write_text
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import VERSION, InputError, JsonObject
from fusionsam.weights import hub, pretrained

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "training.json"
HUB_CONFIG = "config.json"
"""The place of CONFIG in a repository of the hub, which knows models by this name."""
LAST_BIAS = "head.mlp.6.bias"
Card = JsonObject
"""What the training.json of a checkpoint says: how it was trained and what was fitted afterwards."""
CALIBRATED = ("calibration", "class_offsets")
"""What `fusionsam calibrate` adds to the card; the weights stay as they were trained."""
HALF_MAX = torch.finfo(torch.float16).max


class Configured(Protocol):
    """A module with the configuration it was built from: the whole network, or LSTG alone after stage 1."""

    config: ModelConfig

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""


def save_checkpoint(folder: str | Path, network: Configured, card: Card, half: bool = False) -> Path:
    """Write weights, configuration and `card` into `folder`, each whole or not at all.

    `half` stores floats as float16. Raises InputError when the folder cannot be written.
    """
    folder, remedy = Path(folder), "choose a writable folder with room"
    tensors: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        kept = value.detach().cpu().contiguous().clone()
        if half and kept.is_floating_point():
            # counters of a codebook may lie beyond float16
            kept = kept.clamp(-HALF_MAX, HALF_MAX).half()
        tensors[name] = kept
    with whole(folder / WEIGHTS, remedy, also=(SafetensorError,)) as part:  # SafetensorError is its for a full disk
        save_file(tensors, part, metadata={"format": "fusionsam", "version": VERSION})
    write_text(folder / CONFIG, yaml.safe_dump(_plain(asdict(network.config)), sort_keys=False), remedy)
    write_json(folder / CARD, {**card, "version": VERSION}, remedy)
    return folder


def read_checkpoint(source: str | Path) -> tuple[dict[str, Tensor], ModelConfig, Card]:
    """Tensors (float32), configuration and card of a checkpoint folder or of a shipped name such as 'tiny'."""
    folder = locate(source)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:  # type: ignore[no-untyped-call]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder, error) from None
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    return tensors, *read_card(source)


def read_card(source: str | Path) -> tuple[ModelConfig, JsonObject]:
    """Configuration and card of a checkpoint, without its tensors."""
    folder = locate(source)
    try:
        path = config_file(folder)
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
        card = json.loads((folder / CARD).read_text(encoding="utf-8")) if (folder / CARD).exists() else {}
    except (OSError, yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _unreadable(folder, error) from None
    if not isinstance(card, dict) or not isinstance(card.get("config", {}), dict):
        raise InputError(
            f"{folder / CARD}: is no training card (a mapping was expected); give an intact checkpoint folder"
        )
    _require_calibration(card, folder / CARD)
    return from_dict(ModelConfig, raw, str(path)), card


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError(f"weights {folder}: cannot be read ({said(error)}); give an intact checkpoint folder")


def _require_calibration(card: Card, path: Path) -> None:
    """InputError for what `fusionsam calibrate` would not have written."""
    found = {key: card.get(key) or {} for key in CALIBRATED}
    try:
        temperature = float(found["calibration"].get("temperature", 1))
        offsets = [float(offset) for offset in (found["class_offsets"].get("offsets") or {}).values()]
        sound = 0 < temperature < math.inf and all(map(math.isfinite, offsets))
    except (AttributeError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(
            f"{path}: its calibration or class_offsets hold no finite numbers, or no temperature above 0; give an "
            "intact checkpoint folder, or remove them"
        )


def load_network(source: str | Path, calibrated: bool = True) -> tuple[FusionSAMNetwork, Card]:
    """The network of a checkpoint, in eval mode, and its card. Anything missing, extra or of a wrong shape is refused
    by name (InputError). The offsets of `fusionsam calibrate` are in its class logits; without `calibrated` it is as it
    was trained, and its card tells of no calibration."""
    tensors, config, card = read_checkpoint(source)
    # foreign files are history by now: everything is in the checkpoint
    config.sam_weights = config.start_from = config.tokenizer_weights = config.encoder.weights = None
    require_whole(tensors, f"weights {source}")
    network = FusionSAMNetwork(config)
    network.to(memory_format=torch.channels_last)  # a third less time a pair on CPUs
    pretrained.load_exactly(network, tensors, f"weights {source}", own_names=True)
    name = os.path.basename(os.path.abspath(source))  # of . and .., too
    card = {"name": name.partition("@")[0], **card}
    if not calibrated:
        return network.eval(), {key: value for key, value in card.items() if key not in CALIBRATED}
    offsets = (card.get("class_offsets") or {}).get("offsets") or {}
    with torch.no_grad():
        network.get_parameter(LAST_BIAS).add_(torch.tensor([float(offsets.get(c, 0)) for c in config.classes]))
    return network.eval(), card


def calibrated_digest(card: Card) -> str:
    """16 hex digits that change with what `fusionsam calibrate` put into the card: the weights' file does not."""
    return hashlib.sha256(json.dumps([card.get(key) for key in CALIBRATED]).encode()).hexdigest()[:16]


def require_whole(tensors: dict[str, Tensor], what: str) -> None:
    """InputError for tensors of LSTG alone, and for any that hold nan or infinity; `what` names their source."""
    if tensors and all(name.startswith("tokenizer.") for name in tensors):
        raise InputError(
            f"{what}: holds LSTG alone (stage 1); give it as model.tokenizer_weights of a training, or to fusionsam "
            "reconstruct"
        )
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise InputError(
            f"{what}: {broken[0]} holds nan or infinity ({len(broken)} such tensors), so the training diverged; train "
            "with a lower train.lr"
        )


def shipped() -> list[str]:
    """Names of our checkpoints inside the package; a SAM that lies beside them has no CONFIG."""
    root = resources.files("fusionsam") / "checkpoints"
    found = root.iterdir() if root.is_dir() else ()
    return sorted(p.name for p in found if (p / WEIGHTS).is_file() and (p / CONFIG).is_file())


def config_file(folder: Path) -> Path:
    """The configuration in a checkpoint folder: config.yaml, or config.json as the hub has it."""
    return folder / (CONFIG if (folder / CONFIG).is_file() else HUB_CONFIG)


def locate(source: str | Path) -> Path:
    """Folder of a checkpoint: a path, a name that ships with the package, or owner/name of the Hugging Face hub, which
    is downloaded. InputError if there is none."""
    path = Path(source)
    if _is_checkpoint(path):
        return path
    if str(source) in shipped():
        return Path(str(resources.files("fusionsam") / "checkpoints" / str(source)))
    names = ", ".join(shipped()) or "none"
    remedy = f"give a checkpoint folder, a shipped name ({names}) or owner/name of the Hugging Face hub"
    if not path.exists() and hub.is_repository(str(source)):
        folder = hub.download(str(source), (WEIGHTS, CONFIG, HUB_CONFIG, CARD, FINGERPRINTS))
        if _is_checkpoint(folder):
            return folder
        raise InputError(f"weights {source}: a repository without {WEIGHTS} and {HUB_CONFIG}; {remedy}")
    found = f"a folder without {WEIGHTS}" if path.is_dir() else "a file" if path.exists() else "no such folder"
    raise InputError(f"weights {source}: {found}; {remedy}")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and config_file(folder).is_file()


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
