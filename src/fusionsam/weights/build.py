"""A network from a configuration: random, then filled with whatever foreign weights the configuration names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from fusionsam.config.schema import EncoderConfig, ModelConfig
from fusionsam.io import said, say
from fusionsam.models.encoders.base import ImageEncoder
from fusionsam.models.encoders.create import create_image_encoder
from fusionsam.models.fusion import PICTURE_SETTINGS
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.models.tokenizer import ENCODER_SETTINGS
from fusionsam.types import InputError
from fusionsam.weights import pretrained
from fusionsam.weights.checkpoint import read_checkpoint, require_whole

FREE_SETTINGS = ("ema_decay", "codebook_tokens", "dead_code_threshold", "kmeans_init", "commitment_beta")
"""Settings of model.tokenizer by which a codebook learns, and which leave no trace in its shape."""
HYPERNETWORKS = "mask_decoder.sam.output_hypernetworks_mlps."
CLASS_ROWS = re.compile(
    r"(head\.(direct|mlp\.\d+)|mask_decoder\.sam\.(iou_prediction_head\.proj_out|mask_tokens))\.(weight|bias)"
)
"""Tensors with a row for each class."""


def build_image_encoder(config: EncoderConfig, embed_dim: int = 256, latent_dim: int = 64) -> ImageEncoder:
    """The encoder `config` asks for with its foreign weights, in its training mode; `embed_dim` is E, `latent_dim` d.

    InputError for an unknown kind, source or weights, and for an encoder that cannot be guided or see infrared."""
    encoder = create_image_encoder(config, embed_dim, latent_dim)
    load_image_encoder(encoder, config)
    return encoder


def load_image_encoder(encoder: ImageEncoder, config: EncoderConfig) -> None:
    """Fill `encoder.backbone`, and `thermal` beside it, as `config.weights` says: None = leave it random, 'hub' =
    download by `config.source`, otherwise a file or folder. InputError if it does not fit exactly."""
    if config.weights is None:
        return
    if config.kind == "timm":
        tensors = _timm_tensors(encoder.backbone, config)
    else:
        if config.kind == "tinyvit" and config.weights == "hub":
            raise InputError(
                "model.encoder.weights: 'hub' does not exist for tinyvit; download mobile_sam.pt from "
                "github.com/ChaoningZhang/MobileSAM and give its path"
            )
        parts = pretrained.sam_parts(config.source if config.weights == "hub" else config.weights)
        if parts.encoder_kind != config.kind:
            raise InputError(
                f"model.encoder.weights: {config.weights} holds a {parts.encoder_kind} encoder, model.encoder.kind is "
                f"{config.kind}; make them agree"
            )
        tensors = parts.image_encoder
    for backbone in (encoder.backbone, getattr(encoder, "thermal", None)):
        if backbone is not None:
            pretrained.load_exactly(backbone, tensors, f"model.encoder.weights {config.weights}")


def _timm_tensors(backbone: nn.Module, config: EncoderConfig) -> pretrained.Tensors:
    if config.weights == "hub":
        try:
            return timm.create_model(config.source, pretrained=True, features_only=True).state_dict()
        except Exception as error:  # network, cache and naming errors share no type
            raise InputError(
                f"model.encoder.weights: hub has no {config.source} within reach ({said(error)}); give a file"
            ) from None
    path = Path(str(config.weights))
    tensors = pretrained.read_tensors(path)
    with torch.device("meta"):
        whole = timm.create_model(config.source, pretrained=False).state_dict()
    # timm's feature extractors write stages.0 as stages_0
    original = {name: re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name) for name in backbone.state_dict()}
    original = {name: old if old in whole else name for name, old in original.items()}
    if not any(old in tensors for old in original.values()):
        tensors = pretrained.read_ordered(path, list(whole), [t.shape for t in whole.values()])
    picked = {name: tensors[old] for name, old in original.items() if old in tensors}
    unknown = {name: t for name, t in tensors.items() if name not in whole and name not in original}
    return {**picked, **unknown}  # unknown ones go on to be refused by name


def build_network(config: ModelConfig, to_train: bool = False) -> FusionSAMNetwork:
    """A new network with whatever foreign weights its configuration names.

    `encoder.weights` fills the image encoder; `sam_weights` fills prompt encoder and mask decoder, and the image
    encoder too where its kind matches and nothing else was named; `tokenizer_weights` fills LSTG from a checkpoint.
    With `to_train`, an encoder that would stay random for good (frozen or lora, and nothing fills it) is an InputError.
    """
    needed = to_train and config.encoder.training != "full" and config.encoder.weights is None
    needed = needed and config.start_from is None
    if needed and config.sam_weights is None:
        raise _random_encoder(config, "model.sam_weights are given")
    network = FusionSAMNetwork(config)
    load_image_encoder(network.image_encoder, config.encoder)
    network.to(memory_format=torch.channels_last)  # a third less time a training step on CPUs
    if config.sam_weights:
        parts = pretrained.sam_parts(config.sam_weights)
        if needed and parts.encoder_kind != config.encoder.kind:
            raise _random_encoder(config, f"a {config.encoder.kind} encoder is in model.sam_weights")
        what = f"model.sam_weights {config.sam_weights}"
        pretrained.load_exactly(network.prompt_encoder.sam, parts.prompt_encoder, what)
        decoder = network.mask_decoder.start_from_sam(parts.mask_decoder)
        pretrained.load_exactly(network.mask_decoder.sam, decoder, what)
        for stride, name in (("4", "conv_s0"), ("8", "conv_s1")):  # SAM2 brings its own way to the finer features
            if parts.extras and parts.encoder_kind == config.encoder.kind and stride in network.mask_decoder.fine:
                skip = {key: parts.extras[f"{name}.{key}"] for key in ("weight", "bias")}
                pretrained.load_exactly(network.mask_decoder.fine[stride], skip, what)
        if parts.encoder_kind == config.encoder.kind and config.encoder.weights is None:
            pretrained.load_exactly(network.image_encoder.backbone, parts.image_encoder, what)
    if config.start_from:
        start_from(network, config)
    if config.tokenizer_weights:
        tensors, stored, _ = read_checkpoint(config.tokenizer_weights)
        unquantised = stored.tokenizer.tokens == "quantized" and config.tokenizer.tokens == "continuous"
        same = replace(stored.tokenizer, **{name: getattr(config.tokenizer, name) for name in FREE_SETTINGS})
        asked = replace(config.tokenizer, tokens="quantized") if unquantised else config.tokenizer
        pairs = {f"model.tokenizer.{n}": (value, getattr(same, n)) for n, value in vars(asked).items()}
        _require_same(pairs, f"{config.tokenizer_weights} of model.tokenizer_weights")
        prefix = "tokenizer."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if unquantised:  # E_i and G_i serve, the codebooks have no place
            own = {name: t for name, t in own.items() if not name.startswith("quantizers.")}
        pretrained.load_exactly(network.tokenizer, own, f"model.tokenizer_weights {config.tokenizer_weights}")
    return network


def start_from(network: FusionSAMNetwork, config: ModelConfig) -> None:
    """Fine-tuning: fill `network` with what the checkpoint named by `config.start_from` has for it.

    Left as they are: what belongs to a class whose name the checkpoint does not know; another architecture of image
    encoder with what its widths shape (`encoder.weights` must fill it); LSTG if `tokenizer_weights` will fill it; and
    what begins as if it were not there (encoder.guided, encoder.thermal, LoRA's adapters, fusion.picture_dilations).

    Raises InputError for any other difference."""
    assert config.start_from is not None
    tensors, stored, _ = read_checkpoint(config.start_from)
    require_whole(tensors, f"model.start_from {config.start_from}")
    # of another network's logits: it is trained again, by train.stage steering
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("steering.")}
    own = network.state_dict()
    anew = tuple(["tokenizer."] if config.tokenizer_weights else [])
    shaped = ("dims", "depths") if stored.encoder.kind == "tinyvit" else ()
    architecture = ("kind", "source", *shaped)
    other = [name for name in architecture if getattr(config.encoder, name) != getattr(stored.encoder, name)]
    if other:
        if config.encoder.weights is None:
            raise InputError(
                f"model.encoder.{other[0]}: {getattr(config.encoder, other[0])}, but {config.start_from} of "
                f"model.start_from has {getattr(stored.encoder, other[0])}; give model.encoder.weights to begin with "
                "another image encoder, or make them agree"
            )
        follows = ("mask_decoder.fine.", "head.")  # their widths follow the encoder's levels
        levels = [name for name in own.keys() ^ tensors.keys() if name.startswith(follows)]
        anew += ("image_encoder.", *levels, *_reshaped(own, tensors, follows))
    adapted = stored.encoder.training == "lora"
    if adapted and config.encoder.training != "lora" and not other:
        raise InputError(
            f"model.encoder.training: {config.encoder.training}, but {config.start_from} of model.start_from has LoRA "
            "adapters; give lora"
        )
    if config.encoder.guided and not stored.encoder.guided:
        anew += ("image_encoder.guide.",)
    if config.encoder.thermal and not stored.encoder.thermal and not other:
        # it sees infrared as the picture's backbone has learned to
        anew += ("image_encoder.inject.",)
        shared = {n: t for n, t in tensors.items() if n.startswith("image_encoder.backbone.")}
        tensors |= {n.replace(".backbone.", ".thermal.", 1): t for n, t in shared.items()}
    shaping: list[tuple[str, tuple[str, ...]]] = [("fusion", (*PICTURE_SETTINGS, "heads"))]
    if not config.tokenizer_weights:
        shaping += [("tokenizer", ENCODER_SETTINGS)]
    settings: dict[str, tuple[object, object]] = {}
    for section, names in shaping:
        both = [getattr(model, section) for model in (config, stored)]
        settings |= {f"model.{section}.{name}": (getattr(both[0], name), getattr(both[1], name)) for name in names}
    if not stored.fusion.picture_dilations:
        del settings["model.fusion.picture_dilations"]
    _require_same(
        settings,
        f"{config.start_from} of model.start_from",
        " (stages picture and distill build other picture heads and encoders of LSTG)",
    )
    if config.fusion.picture_dilations and not stored.fusion.picture_dilations:
        anew += ("picture_head.context.",)
    if stored.head != config.head:
        other_head = [name for name in own.keys() ^ tensors.keys() if name.startswith("head.")]
        anew += (*other_head, *_reshaped(own, tensors, ("head.",)))
    if stored.classes != config.classes:
        tensors = _by_class_name(own, tensors, stored.classes, config.classes)
        anew += _reshaped(own, tensors, ("mask_decoder.", "head."))
        known = [name for name in config.classes if name in stored.classes]
        new = [name for name in config.classes if name not in stored.classes]
        kept_new = f"kept by name: {', '.join(known) or 'none'}; new: {', '.join(new) or 'none'}"
        say(f"{config.start_from} of model.start_from has other classes; {kept_new}")
    kept = {name: t for name, t in tensors.items() if not name.startswith(anew)}
    what = f"model.start_from {config.start_from}"
    pretrained.load_exactly(network, kept, what, allow_missing=anew, own_names=adapted)


def _by_class_name(
    own: pretrained.Tensors, tensors: pretrained.Tensors, stored: Sequence[str], wanted: Sequence[str]
) -> pretrained.Tensors:
    """`tensors` with what belongs to a class, a row or a hypernetwork, where the class of that name is in `wanted`.
    A new class has the row of `own`, and a hypernetwork that no other class takes."""
    places = [stored.index(name) if name in stored else None for name in wanted]
    spare = iter(sorted(set(range(len(stored))) - set(places)))
    moved = {name: tensor for name, tensor in tensors.items() if not name.startswith(HYPERNETWORKS)}
    for name in (name for name in moved if CLASS_ROWS.fullmatch(name) and name in own):
        there, here = moved[name].shape, own[name].shape
        # else an inner layer, or one of another head, which begins anew
        if there[0] == len(stored) and here[0] == len(wanted) and there[1:] == here[1:]:
            rows = [own[name][row] if place is None else moved[name][place] for row, place in enumerate(places)]
            moved[name] = torch.stack(rows)
    first = "head.mlp.0.weight"  # it sees the mask features, then the logits of the classes, then the rest
    there, here = moved[first].shape, own[first].shape
    if there[0] == here[0] and there[1] - len(stored) == here[1] - len(wanted):  # else of another head
        start = tensors[f"{HYPERNETWORKS}0.proj_out.weight"].shape[0]
        seen, fresh = moved[first], own[first][:, start : start + len(wanted)]
        columns = [fresh[:, row] if place is None else seen[:, start + place] for row, place in enumerate(places)]
        parts = [seen[:, :start], torch.stack(columns, 1), seen[:, start + len(stored) :]]
        moved[first] = torch.cat(parts, 1)
    for row, place in enumerate(places):
        source = next(spare, None) if place is None else place
        ours, theirs = f"{HYPERNETWORKS}{row}.", f"{HYPERNETWORKS}{source}."
        origin, prefix = (own, ours) if source is None else (tensors, theirs)
        moved |= {ours + n.removeprefix(prefix): t for n, t in origin.items() if n.startswith(prefix)}
    return moved


def _require_same(settings: dict[str, tuple[object, object]], source: str, hint: str = "") -> None:
    """InputError that names each of `settings` whose two values, asked for and stored in `source`, differ."""
    other = {name: pair for name, pair in settings.items() if pair[0] != pair[1]}
    if other:
        asked = ", ".join(f"{name}: {pair[0]}" for name, pair in other.items())
        there = ", ".join(str(pair[1]) for pair in other.values())
        raise InputError(f"{asked}, but {source} has {there}; make them agree{hint}")


def _reshaped(own: dict[str, Tensor], tensors: dict[str, Tensor], parts: tuple[str, ...]) -> tuple[str, ...]:
    both = [name for name in own if name.startswith(parts) and name in tensors]
    return tuple(name for name in both if tensors[name].shape != own[name].shape)


def _random_encoder(config: ModelConfig, absent: str) -> InputError:
    return InputError(
        f"model.encoder.training: {config.encoder.training}, but neither model.encoder.weights nor {absent}, so the "
        "image encoder would stay random; give one of them, or model.encoder.training full"
    )
