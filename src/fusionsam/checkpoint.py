"""Checkpoints: one folder with safetensors, the resolved configuration and what is known of the training.

Also the place where foreign Segment Anything weights (see `foreign`) enter a network.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusionsam import __version__, foreign
from fusionsam.config import ModelConfig, from_dict
from fusionsam.data.fingerprints import Fingerprints
from fusionsam.files import whole, write_json, write_text
from fusionsam.models.fusionsam import FusionSAMNetwork
from fusionsam.structures import InputError

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "training.json"
LAST_BIAS = "head.mlp.6.bias"
CALIBRATED = ("calibration", "class_offsets")
"""What `fusionsam calibrate` adds to the card; the weights stay as they were trained."""
HALF_MAX = torch.finfo(torch.float16).max


class Configured(Protocol):
    """A module with the configuration it was built from: the whole network, or LSTG alone after stage 1."""

    config: ModelConfig

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""


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
    network.to(memory_format=torch.channels_last)  # a third less time a training step on CPUs
    beside_is_filled = not config.encoder.sam
    if config.sam_weights:
        parts = foreign.sam_parts(config.sam_weights)
        if needed and parts.encoder_kind != config.encoder.kind:
            raise _random_encoder(config, f"a {config.encoder.kind} encoder is in model.sam_weights")
        what = f"model.sam_weights {config.sam_weights}"
        foreign.load_exactly(network.prompt_encoder.sam, parts.prompt_encoder, what)
        decoder = network.mask_decoder.start_from_sam(parts.mask_decoder)
        foreign.load_exactly(network.mask_decoder.sam, decoder, what)
        for stride, name in (("4", "conv_s0"), ("8", "conv_s1")):  # SAM2 brings its own way to the finer features
            if parts.extras and parts.encoder_kind == config.encoder.kind and stride in network.mask_decoder.fine:
                skip = {key: parts.extras[f"{name}.{key}"] for key in ("weight", "bias")}
                foreign.load_exactly(network.mask_decoder.fine[stride], skip, what)
        if parts.encoder_kind == config.encoder.kind and config.encoder.weights is None:
            foreign.load_exactly(network.image_encoder.backbone, parts.image_encoder, what)
        if config.encoder.sam and parts.encoder_kind == "tinyvit":
            foreign.load_exactly(network.image_encoder.get_submodule("sam"), parts.image_encoder, what)
            beside_is_filled = True
    if config.start_from:
        beside_is_filled |= _start_from(network, config)
    if to_train and not beside_is_filled:
        raise InputError(
            "model.encoder.sam: true, but no TinyViT is in model.sam_weights (or in a checkpoint of model.start_from), "
            "so it would stay random; give MobileSAM's file as model.sam_weights"
        )
    if config.tokenizer_weights:
        tensors, stored, _ = read_checkpoint(config.tokenizer_weights)
        unquantised = stored.tokenizer.tokens == "quantized" and config.tokenizer.tokens == "continuous"
        # how a codebook learns leaves no trace in its shape
        free = ("ema_decay", "codebook_tokens", "dead_code_threshold", "kmeans_init", "commitment_beta")
        same = replace(stored.tokenizer, **{name: getattr(config.tokenizer, name) for name in free})
        if same != (replace(config.tokenizer, tokens="quantized") if unquantised else config.tokenizer):
            raise InputError(
                f"model.tokenizer_weights: {config.tokenizer_weights} was trained with other model.tokenizer settings; "
                "use the same"
            )
        prefix = "tokenizer."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if unquantised:  # E_i and G_i serve, the codebooks have no place
            own = {name: t for name, t in own.items() if not name.startswith("quantizers.")}
        foreign.load_exactly(network.tokenizer, own, f"model.tokenizer_weights {config.tokenizer_weights}")
    return network


def _start_from(network: FusionSAMNetwork, config: ModelConfig) -> bool:
    """Fine-tuning: what the checkpoint named by `start_from` has for this network; returns whether a frozen TinyViT
    beside the backbone was among it. Left as they are: class-sized tensors if the number of classes differs, another
    architecture of image encoder with what its widths shape (`encoder.weights` must fill it), LSTG if
    `tokenizer_weights` will fill it, and what begins as if it were not there (encoder.guided, encoder.thermal,
    encoder.sam with the TinyViT of `sam_weights`, LoRA's adapters, fusion.picture_dilations). InputError for any other
    difference."""
    assert config.start_from is not None
    tensors, stored, _ = read_checkpoint(config.start_from)
    _require_whole(tensors, f"model.start_from {config.start_from}")
    own = network.state_dict()
    anew = tuple(["tokenizer."] if config.tokenizer_weights else [])
    shaped = ("dims", "depths") if stored.encoder.sam or stored.encoder.kind == "tinyvit" else ()
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
    if config.encoder.sam and not stored.encoder.sam:
        anew += ("image_encoder.sam",)
    if config.fusion.picture_dilations and not stored.fusion.picture_dilations:
        anew += ("picture_head.context.",)
    if stored.head != config.head:
        other_head = [name for name in own.keys() ^ tensors.keys() if name.startswith("head.")]
        anew += (*other_head, *_reshaped(own, tensors, ("head.",)))
    if stored.classes != config.classes:
        anew += _reshaped(own, tensors, ("mask_decoder.", "head."))
        gone = [name for name in tensors if name.startswith("mask_decoder.") and name not in own]  # of further classes
        new = [name for name in own if name.startswith("mask_decoder.") and name not in tensors]
        anew += (*gone, *new)
    # a TinyViT beside another backbone is the same
    both = config.encoder.sam and stored.encoder.sam and not {"dims", "depths"} & {*other}
    beside = ("image_encoder.sam.",) if both else ()
    kept = {name: t for name, t in tensors.items() if name.startswith(beside) or not name.startswith(anew)}
    what = f"model.start_from {config.start_from}"
    foreign.load_exactly(network, kept, what, allow_missing=anew, own_names=adapted)
    return bool(beside)


def _reshaped(own: dict[str, Tensor], tensors: dict[str, Tensor], parts: tuple[str, ...]) -> tuple[str, ...]:
    both = [name for name in own if name.startswith(parts) and name in tensors]
    return tuple(name for name in both if tensors[name].shape != own[name].shape)


def _random_encoder(config: ModelConfig, absent: str) -> InputError:
    return InputError(
        f"model.encoder.training: {config.encoder.training}, but neither model.encoder.weights nor {absent}, so the "
        "image encoder would stay random; give one of them, or model.encoder.training full"
    )


def save_checkpoint(folder: str | Path, network: Configured, card: dict[str, Any], half: bool = False) -> Path:
    """Write weights, configuration and `card` into `folder`, each under a temporary name first.

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
        save_file(tensors, part, metadata={"format": "fusionsam", "version": __version__})
    write_text(folder / CONFIG, yaml.safe_dump(_plain(asdict(network.config)), sort_keys=False), remedy)
    write_json(folder / CARD, {**card, "version": __version__}, remedy)
    return folder


def read_checkpoint(source: str | Path) -> tuple[dict[str, Tensor], ModelConfig, dict[str, Any]]:
    """Tensors (float32), configuration and card of a checkpoint folder or of a shipped name such as 'tiny'."""
    folder = locate(source)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        raw = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        card = json.loads((folder / CARD).read_text(encoding="utf-8")) if (folder / CARD).exists() else {}
    except (SafetensorError, OSError, yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"weights {folder}: cannot be read ({reason}); give an intact checkpoint folder") from None
    if not isinstance(card, dict) or not isinstance(card.get("config", {}), dict):
        raise InputError(
            f"{folder / CARD}: is no training card (a mapping was expected); give an intact checkpoint folder"
        )
    _require_calibration(card, folder / CARD)
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    return tensors, from_dict(ModelConfig, raw, str(folder / CONFIG)), card


def _require_calibration(card: dict[str, Any], path: Path) -> None:
    """InputError for what `fusionsam calibrate` would not have written."""
    found: dict[str, Any] = {key: card.get(key) or {} for key in CALIBRATED}
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


def load_network(source: str | Path, calibrated: bool = True) -> tuple[FusionSAMNetwork, dict[str, Any]]:
    """The network of a checkpoint, in eval mode, and its card. Anything missing, extra or of a wrong shape is refused
    by name (InputError). The offsets of `fusionsam calibrate` are in its class logits; without `calibrated` it is as it
    was trained, and its card tells of no calibration."""
    tensors, config, card = read_checkpoint(source)
    # foreign files are history by now: everything is in the checkpoint
    config.sam_weights = config.start_from = config.tokenizer_weights = config.encoder.weights = None
    _require_whole(tensors, f"weights {source}")
    network = FusionSAMNetwork(config)
    foreign.load_exactly(network, tensors, f"weights {source}", own_names=True)
    card = {"name": Path(str(source)).name, **card}
    if not calibrated:
        return network.eval(), {key: value for key, value in card.items() if key not in CALIBRATED}
    offsets = (card.get("class_offsets") or {}).get("offsets") or {}
    with torch.no_grad():
        network.get_parameter(LAST_BIAS).add_(torch.tensor([float(offsets.get(c, 0)) for c in config.classes]))
    return network.eval(), card


def calibrated_digest(card: dict[str, Any]) -> str:
    """16 hex digits that change with what `fusionsam calibrate` put into the card: the weights' file does not."""
    return hashlib.sha256(json.dumps([card.get(key) for key in CALIBRATED]).encode()).hexdigest()[:16]


def _require_whole(tensors: dict[str, Tensor], what: str) -> None:
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


def halfway(start: str | Path, end: str | Path, folder: str | Path) -> Path:
    """The mean of a fine-tuned checkpoint's weights and those it started from (WiSE-FT, arXiv 2109.01903, with a half):
    often better than both, and on disturbed images as well. What `start` did not have counts as fine-tuning began it;
    an LSTG that `end` had from elsewhere stays, and so does a head of another kind. Fingerprints and card are those of
    `end`, less what was measured on it. InputError if `end` cannot have started from `start`, or has other classes."""
    network, card = load_network(end, calibrated=False)
    origin = read_checkpoint(end)[1]
    begun = FusionSAMNetwork(network.config)
    _start_from(begun, replace(network.config, start_from=str(start), tokenizer_weights=origin.tokenizer_weights))
    before = read_checkpoint(start)[1]
    if before.classes != network.config.classes:
        raise InputError(f"weights {end}: has other classes than {start}, so half of their mean would be random")
    stays = tuple(["tokenizer."] if origin.tokenizer_weights else [])
    stays += ("head.",) if before.head != network.config.head else ()
    # random in `begun` where `start` had none: the frozen TinyViT, and the dilated convolutions before the last
    farther = 0 if before.fusion.picture_dilations else len(network.config.fusion.picture_dilations) - 1
    stays += ("image_encoder.sam.", *(f"picture_head.context.{2 * i + 1}." for i in range(farther)))
    middle = begun.state_dict()
    for name, tensor in network.state_dict().items():
        kept = not tensor.is_floating_point() or (stays and name.startswith(stays))
        middle[name] = tensor if kept else tensor.lerp(middle[name], 0.5)
    network.load_state_dict(middle)
    told = {key: value for key, value in card.items() if key not in ("name", "val")}  # val is of `end`
    return _with_fingerprints(end, save_checkpoint(folder, network, {**told, "halfway_from": str(start)}))


def _with_fingerprints(source: str | Path, folder: Path) -> Path:
    """`folder`, with the fingerprints that lie beside `source`."""
    if (seen := Fingerprints.read(locate(source))) is not None:
        seen.write(folder)
    return folder


def ship(source: str | Path, folder: str | Path, **facts: Any) -> Path:
    """Store a checkpoint as it ships: float16, and of the paths it was trained with only the file names; the training
    pairs' fingerprints with it.

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
    started_from = {key: Path(value).name for key, value in origin.items() if value}
    kept = {key: value for key, value in (card | calibrated).items() if key not in ("config", "name")}
    if data:
        kept["data"] = {key: data[key] for key in ("dataset", "train_split") if key in data}
        for key in ("extra_pairs", "extra_labels"):
            if data.get(key):
                kept["data"][key] = [Path(folder).name for folder in data[key]]
    card = {**_without_folders(kept), "started_from": started_from, **facts}
    return _with_fingerprints(source, save_checkpoint(folder, network, card, half=True))


def _without_folders(value: Any) -> Any:
    """Absolute paths in a card's texts (commands) cut to their last part; addresses of the web are none."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return re.sub(r"""(?<![\w.~:/-])/(?:[^/\s'",\[\]]+/)+""", "", value) if isinstance(value, str) else value


def shipped() -> list[str]:
    """Names of the checkpoints inside the package."""
    root = resources.files("fusionsam") / "checkpoints"
    return sorted(p.name for p in root.iterdir() if (p / WEIGHTS).is_file()) if root.is_dir() else []


def locate(source: str | Path) -> Path:
    """Folder of a checkpoint: a path, or a name that ships with the package."""
    path = Path(source)
    if (path / WEIGHTS).is_file() and (path / CONFIG).is_file():
        return path
    if str(source) in shipped():
        return Path(str(resources.files("fusionsam") / "checkpoints" / str(source)))
    found = "a folder without " + WEIGHTS if path.is_dir() else "no such folder"
    names = ", ".join(shipped()) or "none"
    raise InputError(f"weights {source}: {found}; give a checkpoint folder or a shipped name ({names})")


def commit() -> str:
    """The commit of the source tree this runs from, '-dirty' behind it if files differ; 'unknown' outside of one."""
    try:
        # installed into some other project's folder, that project's commit would say nothing
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--match=")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return answer.stdout.strip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
