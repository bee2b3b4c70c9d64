"""The command `fusionsam info`: what a model is made of, what it takes and gives, and where its weights came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusionsam.config.options import DEFAULT_WEIGHTS
from fusionsam.config.schema import PRESETS, preset
from fusionsam.types import LARGEST, SMALLEST, InputError, JsonObject

if TYPE_CHECKING:
    from fusionsam.models.network import FusionSAMNetwork


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show a model's parts, sizes, classes and where its weights came from."""

    weights: str | None = None
    """checkpoint folder, or a name that ships with the package (left out: the one that predict takes)"""
    preset: str | None = field(default=None, metadata={"one_of": PRESETS})
    """instead of --weights: an untrained model"""

    def __post_init__(self) -> None:
        """InputError for both."""
        if self.weights is not None and self.preset is not None:
            raise InputError("--weights and --preset: are two models; give one of them")


def main(options: Options) -> int:
    """Print the description."""
    import torch

    from fusionsam.models.network import FusionSAMNetwork
    from fusionsam.weights.checkpoint import load_network, shipped

    names = shipped()
    if options.preset:
        with torch.device("meta"):  # ViT-H is counted without its 2.5 GB
            network = FusionSAMNetwork(preset(options.preset))
        print(describe(network, {}, f"preset {options.preset}, untrained"))
    elif options.weights or names:
        weights = options.weights or (DEFAULT_WEIGHTS if DEFAULT_WEIGHTS in names else names[0])
        network, card = load_network(weights)
        print(describe(network, card, f"weights {weights}"))
    print(f"\nshipped weights: {', '.join(names) or 'none'}\npresets: {', '.join(PRESETS)}")
    return 0


def describe(network: FusionSAMNetwork, card: JsonObject, title: str) -> str:
    """Parts, sizes, classes and, from the checkpoint's `card`, the origin of `network`, as text."""
    return "\n\n".join([title, _parts(network), _sizes(network), _classes(network), _origin(card)]).rstrip()


def _parts(network: FusionSAMNetwork) -> str:
    from fusionsam.models.network import PartSize, parameter_table

    rows = parameter_table(network)
    total = PartSize("all", sum(row.parameters for row in rows), sum(row.trainable for row in rows))
    lines = [f"{'part':<16}{'parameters':>14}  in training"]
    for row in [*rows, total]:
        share = {0: "frozen", row.parameters: "trained"}.get(row.trainable, f"{row.trainable:,} trained")
        lines.append(f"{row.part:<16}{row.parameters:>14,}  {share}")
    return "\n".join(lines)


def _sizes(network: FusionSAMNetwork) -> str:
    side, encoder = network.config.max_side, network.image_encoder
    lines = [
        f"input            any size from {SMALLEST}x{SMALLEST} to {LARGEST}x{LARGEST}, visible (3 channels), infrared "
        "(1 channel) or both",
        f"padded inside    to multiples of {network.multiple}",
        f"max_side         {side}: larger pairs are segmented on a copy reduced to this longer side",
    ]
    if encoder.image_size is not None:
        lines.append(f"image encoder    sees the picture in a square of {encoder.image_size}")
    return "\n".join(lines)


def _classes(network: FusionSAMNetwork) -> str:
    config = network.config
    lines = [f"{'id':>3}  {'class':<20} {'colour':<8} foreground"]
    for index, (name, (r, g, b)) in enumerate(zip(config.classes, config.palette, strict=True)):
        mark = "yes" if index in config.foreground else ""
        lines.append(f"{index:>3}  {name:<20} #{r:02x}{g:02x}{b:02x}  {mark}".rstrip())
    return "\n".join(lines)


def _trainings(part: JsonObject | None) -> list[JsonObject]:
    """A part's last training and those before it."""
    return [part, *_trainings(part.get("earlier"))] if part else []


def _origin(card: JsonObject) -> str:
    if not card:
        return ""
    rows: JsonObject = {
        key: card[key] for key in ("command", "commit", "version", "seed", "step", "hours") if key in card
    }
    data = card.get("config", {}).get("data") or card.get("data") or {}
    if data:
        rows["data"] = f"{data.get('dataset')}, trained on {data.get('train_split')}"
        if data.get("val_split"):
            rows["data"] += f", chosen on {data['val_split']}"
    if card.get("started_from"):
        rows["started from"] = ", ".join(f"{key} {value}" for key, value in card["started_from"].items())
    if card.get("then"):
        rows["then"] = card["then"]
    if card.get("lineage"):
        hours = sum(float(earlier.get("hours", 0)) for earlier in card["lineage"])
        rows["before that"] = f"{len(card['lineage'])} trainings, {hours:.1f} hours (training.json has their commands)"
    for part in ("picture", "distill", "steering"):
        if trainings := _trainings(card.get(part)):
            steps, hours = (sum(float(each.get(key, 0)) for each in trainings) for key in ("step", "hours"))
            learnt = dict.fromkeys(name for each in reversed(trainings) for name in each.get("learnt", []))
            by = f" by a teacher: {', '.join(learnt)}" if learnt else " of this part alone"
            rows[part] = f"{steps:.0f} steps, {hours:.1f} hours{by}"
    offsets = card.get("class_offsets") or {}
    if moved := {name: by for name, by in offsets.get("offsets", {}).items() if by}:
        rows["class offsets"] = ", ".join(f"{name} {by:+g}" for name, by in moved.items())
        if {"miou_before", "miou_after"} <= offsets.keys():
            gain = f"{offsets['miou_before']:.2f} -> {offsets['miou_after']:.2f}"
            rows["class offsets"] += f" (mIoU {gain} on pairs they were not fitted on)"
    lines = [f"{key:<17}{value}" for key, value in rows.items()]
    scores = card.get("val") or {}
    name = "val as trained" if moved else "val"
    if "miou" in scores:  # a shipped card says how and on what it was measured
        where = ", ".join(str(scores[key]) for key in ("protocol", "split") if key in scores)
        lines.append(f"{name}: mIoU {scores['miou']}" + (f" ({where})" if where else ""))
    elif scores:
        lines.append(f"{name:<17}" + ", ".join(f"{k.removeprefix('val/')} {v}" for k, v in scores.items()))
    return "\n".join(lines)
