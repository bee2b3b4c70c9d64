"""Weight interpolation: between a fine-tuned checkpoint and the one it started from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import InputError
from fusionsam.weights.build import start_from
from fusionsam.weights.checkpoint import load_network, read_checkpoint, save_checkpoint
from fusionsam.weights.ship import with_fingerprints


def interpolate(start: str | Path, end: str | Path, folder: str | Path, share: float = 0.5) -> Path:
    """The weighted mean of a fine-tuned checkpoint's weights (`share`) and those it started from (WiSE-FT, arXiv
    2109.01903): often better than both, and on disturbed images as well. What `start` did not have counts as fine-
    tuning began it; an LSTG that `end` had from elsewhere stays, and so does a head of another kind. Settings (as FMP's
    strides) and card are those of `end`, less what was measured on it; the fingerprints are of both. InputError if
    `end` cannot have started from `start`, or has other classes, and for another share."""
    if not 0 <= share <= 1:
        raise InputError(f"share: {share}, expected a number from 0 to 1")
    network, card = load_network(end, calibrated=False)
    origin = read_checkpoint(end)[1]
    begun = FusionSAMNetwork(network.config)
    start_from(begun, replace(network.config, start_from=str(start), tokenizer_weights=origin.tokenizer_weights))
    before = read_checkpoint(start)[1]
    if before.classes != network.config.classes:
        raise InputError(f"weights {end}: has other classes than {start}, so half of their mean would be random")
    stays = tuple(["tokenizer."] if origin.tokenizer_weights else [])
    stays += ("head.",) if before.head != network.config.head else ()
    # random in `begun` where `start` had none: the dilated convolutions before the last
    farther = 0 if before.fusion.picture_dilations else len(network.config.fusion.picture_dilations) - 1
    stays += tuple(f"picture_head.context.{2 * i + 1}." for i in range(farther))
    middle = begun.state_dict()
    for name, tensor in network.state_dict().items():
        kept = not tensor.is_floating_point() or (stays and name.startswith(stays))
        middle[name] = tensor if kept else tensor.lerp(middle[name], 1 - share)
    network.load_state_dict(middle)
    told = {key: value for key, value in card.items() if key not in ("name", "val")}  # val is of `end`
    mean = save_checkpoint(folder, network, {**told, "interpolated_from": str(start), "share": share})
    return with_fingerprints(mean, end, start)
