"""A checkpoint as it ships: float16, without folder names, with the training pairs' fingerprints."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from fusionsam.data.fingerprints import Fingerprints
from fusionsam.types import InputError
from fusionsam.weights.checkpoint import Card, load_network, locate, read_card, read_checkpoint, save_checkpoint


def with_fingerprints(folder: Path, *sources: str | Path) -> Path:
    """`folder`, with the fingerprints of all pairs that weights of any of `sources` were trained on."""
    if (seen := Fingerprints.together(map(locate, sources))) is not None:
        seen.write(folder)
    return folder


def with_steering(base: str | Path, steered: str | Path, folder: str | Path) -> Path:
    """The checkpoint `base` with the steering that was trained behind `steered`, a checkpoint it is near to: of weights
    that were trained on, say, or averaged. How well it steers there is to be measured (`fusionsam clicks --steer`). The
    card is that of `base`, with what `steered` tells of its steering; the fingerprints are of both. InputError where
    `steered` has none, or another network."""
    network, _ = load_network(base, calibrated=False)
    donor, _ = load_network(steered, calibrated=False)
    if donor.steering is None:
        raise InputError(f"weights {steered}: have no steering; train it with configs/steering.yaml")
    if replace(donor.config, steering=network.config.steering) != network.config:
        raise InputError(f"weights {steered}: are of another network than {base}; expected the same `model` settings")
    network.config = donor.config
    network.add_steering()
    assert network.steering is not None
    network.steering.load_state_dict(donor.steering.state_dict())
    card = {**read_card(base)[1], "steering": read_card(steered)[1].get("steering", {})}
    return with_fingerprints(save_checkpoint(folder, network, card), base, steered)


def ship(source: str | Path, folder: str | Path, **facts: object) -> Path:
    """Store a checkpoint as it ships: float16, and of the paths it was trained with only the file names, of a run's
    weights RUN/final; the training pairs' fingerprints with it.

    Its card keeps the names of data set and training split; `facts` are added to it. The model card (README.md) is
    written by a person.
    """
    network, card = load_network(source, calibrated=False)
    _, config, calibrated = read_checkpoint(source)
    data = card.get("config", {}).get("data", {})
    origin = {
        "encoder_weights": config.encoder.weights,
        "sam_weights": config.sam_weights,
        "start_from": config.start_from,
        "tokenizer_weights": config.tokenizer_weights,
        "data": data.get("root"),
    }
    # a part that was trained alone leaves what the card of a shipped checkpoint says of the rest
    started_from = card.get("started_from", {}) | {key: _short(value) for key, value in origin.items() if value}
    kept = {key: value for key, value in (card | calibrated).items() if key not in ("config", "name")}
    if data:
        kept["data"] = {key: data[key] for key in ("dataset", "train_split") if key in data}
        for key in ("extra_pairs", "extra_labels"):
            if data.get(key):
                kept["data"][key] = [Path(folder).name for folder in data[key]]
    for part in kept.keys() & {"steering", "picture", "distill"}:
        kept[part] = _of_part(kept[part])
    card = {**{key: _without_folders(value) for key, value in kept.items()}, "started_from": started_from, **facts}
    return with_fingerprints(save_checkpoint(folder, network, card, half=True), source)


def _of_part(card: Card) -> Card:
    """What the card of a part that was trained alone keeps, of its earlier trainings too: its settings are the
    command's, the network's are beside it."""
    kept = {key: value for key, value in card.items() if key not in ("config", "earlier")}
    if start := card.get("config", {}).get("model", {}).get("start_from"):
        kept["started_from"] = _short(start)
    train = card.get("config", {}).get("train", {})
    if teacher := train.get("teacher"):
        kept["teacher"] = _short(teacher)
    if learnt := train.get("distill"):
        kept["learnt"] = learnt
    return {**kept, "earlier": _of_part(card["earlier"])} if "earlier" in card else kept


def _without_folders(value: object) -> object:
    """Absolute paths in a card's texts (commands) made short; addresses of the web are none."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"""(?<![\w.~:/-])/(?:[^/\s'",\[\]]+/)+[^/\s'",\[\]]*""", lambda path: _short(path[0]), value)


def _short(path: str) -> str:
    """The last part of a path; of weights that a training wrote, its folder too."""
    given = Path(path)
    above = given.parent.name
    return f"{above}/{given.name}" if above and given.name in ("best", "final") else given.name
