"""Foreign weights enter by this door: files that others made, translated into the names our modules use.

Target names are transformers': `SamPromptEncoder`, `SamMaskDecoder`, `SamVisionEncoder`, `Sam2VisionModel`, and
MobileSAM's own for its TinyViT with every Conv+BatchNorm pair folded. One row of `FORMATS` describes a kind of file;
whatever is left unnamed by its row is refused by name. Only tensors are read (`weights_only`), never code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fusionsam.io import fetch, said
from fusionsam.types import InputError

SamKind = Literal["tinyvit", "sam", "sam2"]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
Tensors = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]  # (pattern, replacement), every matching one applied in turn

DROPPED = {
    r"image_encoder\.(norm_head|head)\.": "MobileSAM's ImageNet classifier, never run for segmentation",
    r".*\.(attention_bias_idxs|ab)$": "TinyViT's index of the bias table, computed from the window size",
    r"pixel_(mean|std)$": "normalisation constants, ours stand in models/encoders/base.py",
    r"(sam_)?mask_decoder\.(obj_score_token|pred_obj_score_head)\.": "SAM2's occlusion score for video tracking",
    r"(memory_|maskmem_|no_mem_pos_enc|no_memory_positional|mask_downsample|obj_ptr|object_pointer|no_obj|"
    r"no_object_pointer|occlusion_|temporal_positional)": "SAM2's memory of earlier video frames",
}
"""Tensors without a place in a model for single images, with the reason."""

_MLP3: Rules = (
    (r"^(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"^(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"^(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
)
_DECODER: Rules = (
    *_MLP3,
    (r"^output_upscaling\.0\.", "upscale_conv1."),
    (r"^output_upscaling\.1\.", "upscale_layer_norm."),
    (r"^output_upscaling\.3\.", "upscale_conv2."),
    (r"^transformer\.norm_final_attn\.", "transformer.layer_norm_final_attn."),
    (r"^(transformer\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^(transformer\.layers\.\d+)\.mlp\.layers\.0\.", r"\1.mlp.lin1."),  # SAM2 only
    (r"^(transformer\.layers\.\d+)\.mlp\.layers\.1\.", r"\1.mlp.lin2."),
)
_DECODER_SAM2_HF: Rules = (
    (r"^(transformer\..*attn.*)\.o_proj\.", r"\1.out_proj."),
    (r"^(transformer\.layers\.\d+)\.mlp\.proj_in\.", r"\1.mlp.lin1."),
    (r"^(transformer\.layers\.\d+)\.mlp\.proj_out\.", r"\1.mlp.lin2."),
)
_PROMPT: Rules = (
    (r"^pe_layer\.positional_encoding_gaussian_matrix$", "shared_embedding.positional_embedding"),
    (r"^point_embeddings\.", "point_embed."),
    (r"^mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"^mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"^mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"^mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"^mask_downscaling\.6\.", "mask_embed.conv3."),
)
_VIT: Rules = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.", "layers."),
    (r"^(layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
)
_HIERA: Rules = (
    (r"^trunk\.patch_embed\.proj\.", "trunk.patch_embed.projection."),
    (r"^(trunk\.blocks\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^(trunk\.blocks\.\d+)\.mlp\.layers\.0\.", r"\1.mlp.proj_in."),
    (r"^(trunk\.blocks\.\d+)\.mlp\.layers\.1\.", r"\1.mlp.proj_out."),
    (r"^trunk\.", "backbone."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"neck.convs.\1."),
    (r"^", "vision_encoder."),
)


@dataclass(frozen=True)
class Format:
    """How one kind of file names a whole SAM: a tensor only it has, prefixes of the parts, and their name rules."""

    name: str
    kind: SamKind
    marker: str
    image: tuple[str, Rules]
    prompt: tuple[str, Rules]
    decoder: tuple[str, Rules]
    single: dict[str, str] = field(default_factory=dict)  # whole names -> "part:name"


_NO_RULES: Rules = ()
FORMATS = (
    Format(
        "MobileSAM", "tinyvit", "image_encoder.patch_embed.seq.0.c.weight",
        ("image_encoder.", _NO_RULES), ("prompt_encoder.", _PROMPT), ("mask_decoder.", _DECODER),
    ),
    Format(
        "official SAM", "sam", "image_encoder.patch_embed.proj.weight",
        ("image_encoder.", _VIT), ("prompt_encoder.", _PROMPT), ("mask_decoder.", _DECODER),
    ),
    Format(
        "transformers SamModel", "sam", "vision_encoder.patch_embed.projection.weight",
        ("vision_encoder.", _NO_RULES), ("prompt_encoder.", _NO_RULES), ("mask_decoder.", _NO_RULES),
        {"shared_image_embedding.positional_embedding": "prompt:shared_embedding.positional_embedding"},
    ),
    Format(
        "official SAM2", "sam2", "image_encoder.trunk.patch_embed.proj.weight",
        ("image_encoder.", _HIERA), ("sam_prompt_encoder.", _PROMPT), ("sam_mask_decoder.", _DECODER),
        {"no_mem_embed": "image:no_memory_embedding"},
    ),
    Format(
        "transformers Sam2Model", "sam2", "vision_encoder.backbone.patch_embed.projection.weight",
        ("vision_encoder.", ((r"^", "vision_encoder."),)), ("prompt_encoder.", _NO_RULES),
        ("mask_decoder.", _DECODER_SAM2_HF),
        {
            "shared_image_embedding.positional_embedding": "prompt:shared_embedding.positional_embedding",
            "no_memory_embedding": "image:no_memory_embedding",
        },
    ),
)  # fmt: skip


@dataclass
class SamParts:
    """A foreign Segment Anything model in our modules' names, float32."""

    encoder_kind: SamKind
    image_encoder: Tensors  # names of `ImageEncoder.backbone`
    prompt_encoder: Tensors  # names of transformers' SamPromptEncoder, shared_embedding included
    mask_decoder: Tensors  # names of transformers' SamMaskDecoder
    extras: Tensors = field(default_factory=dict)  # SAM2's conv_s0.*, conv_s1.*: stride-4 and stride-8 projections


def read_tensors(path: str | Path) -> Tensors:
    """Every tensor of a .safetensors, .pth, .pt or .bin file, or of a transformers folder, on the CPU, floats as
    float32. InputError if it is missing, unreadable or holds no tensors."""
    path = Path(path)
    if path.is_dir():
        shards = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not shards:
            raise InputError(f"weights {path}: the folder holds no model.safetensors; give a folder that does")
        return {name: tensor for shard in shards for name, tensor in read_tensors(shard).items()}
    if not path.is_file():
        raise InputError(f"weights {path}: no such file or folder; give a .safetensors, .pth, .pt or a folder")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: object = load_file(path)
        else:
            found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the readers raise a dozen types on damaged bytes, none of them ours
        raise InputError(f"weights {path}: not a readable tensor file ({said(error)}); fetch the file again") from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise InputError(f"weights {path}: holds no named tensors; give a state dict of tensors")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def fold_batch_norms(tensors: Tensors, eps: float = 1e-5) -> Tensors:
    """MobileSAM's `X.c.weight` + `X.bn.*` as `X.c.weight`, `X.c.bias` of one equal convolution:
    w' = w g / sqrt(var + eps), b' = beta - mean g / sqrt(var + eps). Tensors without a `bn` neighbour pass through."""
    folded = {name: tensor for name, tensor in tensors.items() if ".bn." not in name}
    for name in [n for n in tensors if n.endswith(".bn.running_var")]:
        stem = name.removesuffix(".bn.running_var")
        needed = [f"{stem}.c.weight", *(f"{stem}.bn.{part}" for part in ("weight", "bias", "running_mean"))]
        absent = [n for n in needed if n not in tensors]
        if absent:
            raise InputError(f"weights: {_listed(absent)} missing beside {name}; give the whole checkpoint")
        weight, gain, shift, mean = (tensors[n] for n in needed)
        scale = gain / torch.sqrt(tensors[name] + eps)
        folded[f"{stem}.c.weight"] = weight * scale[:, None, None, None]
        folded[f"{stem}.c.bias"] = shift - mean * scale
    return folded


def sam_parts(source: str | Path) -> SamParts:
    """A whole SAM from `source`: official SAM .pth, official SAM2 .pt, MobileSAM (mobile_sam.pt, or the same names
    with BatchNorm folded), a transformers SamModel / Sam2Model folder, or a hub name of one. The format is told by
    its tensors' names. InputError for a file that is none of these or that holds a tensor with no place."""
    local = Path(source)
    is_path = local.exists() or local.suffix in SUFFIXES or len(local.parts) != 2  # a hub name is owner/name
    tensors = read_tensors(local if is_path else fetch(str(source), "model.safetensors"))
    form = next((f for f in FORMATS if f.marker in tensors), None)
    if form is None:
        raise InputError(
            f"weights {source}: none of {', '.join(f.name for f in FORMATS)} (first tensor {next(iter(tensors))}); "
            "give one of these"
        )
    tensors = {n: t for n, t in tensors.items() if not any(re.match(pattern, n) for pattern in DROPPED)}
    parts: dict[str, Tensors] = {"image": {}, "prompt": {}, "decoder": {}}
    homeless = []
    for name, tensor in tensors.items():
        if name in form.single:
            part, target = form.single[name].split(":")
            parts[part].setdefault(target, tensor)  # transformers may store the positions under both names
            continue
        for part, (prefix, rules) in (("image", form.image), ("prompt", form.prompt), ("decoder", form.decoder)):
            if name.startswith(prefix):
                parts[part][_renamed(name.removeprefix(prefix), rules)] = tensor
                break
        else:
            homeless.append(name)
    if homeless:
        raise InputError(f"weights {source}: {_listed(homeless)} has no place in {form.name}; give an original file")
    if form.kind == "tinyvit":
        parts["image"] = fold_batch_norms(parts["image"])
    points = parts["prompt"].pop("point_embed.weight", None)  # Sam2Model stacks what SamModel keeps apart
    if points is not None:
        parts["prompt"].update({f"point_embed.{i}.weight": row[None].clone() for i, row in enumerate(points)})
    extras = {n: parts["decoder"].pop(n) for n in list(parts["decoder"]) if n.startswith(("conv_s0.", "conv_s1."))}
    return SamParts(form.kind, parts["image"], parts["prompt"], parts["decoder"], extras)


def with_prompted_parts(source: str | Path, prompt_encoder: Tensors, mask_decoder: Tensors) -> Tensors:
    """The tensors of a SAM or MobileSAM file, by its own names and in float16, with another prompt encoder and mask
    decoder (names of `SamParts`) in the place of its own. InputError for files of other formats, and for a tensor that
    is missing or has another shape."""
    tensors = read_tensors(source)
    form = next((f for f in FORMATS if f.marker in tensors), None)
    if form is None or form.single or form.kind == "sam2":
        raise InputError(f"weights {source}: expected a file in MobileSAM's or SAM's own format")
    for (prefix, rules), part in ((form.prompt, prompt_encoder), (form.decoder, mask_decoder)):
        for name, tensor in tensors.items():
            if not name.startswith(prefix) or any(re.match(pattern, name) for pattern in DROPPED):
                continue
            other = part.get(_renamed(name.removeprefix(prefix), rules))
            if other is None or other.shape != tensor.shape:
                raise InputError(f"weights {source}: {name} has no tensor of its shape to stand in its place")
            tensors[name] = other.detach().cpu()
    return {name: t.half().contiguous() if t.is_floating_point() else t for name, t in tensors.items()}


def read_ordered(path: str | Path, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> Tensors:
    """The tensors of a file whose names are unknown but whose order is that of `names`, each shape checked against
    `shapes`. BatchNorm's step counters (`num_batches_tracked`), which some writers leave out, are set to zero."""
    counter = "num_batches_tracked"
    found = [(n, t) for n, t in read_tensors(path).items() if not n.endswith(counter)]
    wanted = [(n, tuple(s)) for n, s in zip(names, shapes, strict=True) if not n.endswith(counter)]
    if len(found) != len(wanted):
        raise InputError(f"weights {path}: {len(found)} tensors, {len(wanted)} expected; give this architecture's file")
    for (theirs, tensor), (ours, shape) in zip(found, wanted, strict=True):
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"weights {path}: {theirs} has shape {tuple(tensor.shape)}, {ours} needs {shape}; "
                "give this architecture's file"
            )
    tensors = {ours: tensor for (_, tensor), (ours, _) in zip(found, wanted, strict=True)}
    return {n: tensors[n] if n in tensors else torch.zeros((), dtype=torch.int64) for n in names}


def load_exactly(
    module: nn.Module, tensors: Tensors, what: str, allow_missing: tuple[str, ...] = (), own_names: bool = False
) -> None:
    """Copy `tensors` into `module`, every one of them and nothing left out but names that are, or begin with, an entry
    of `allow_missing`. Adapters (LoRA) already in the module are seen through and left as they are; with `own_names`,
    for checkpoints that this package wrote, they are tensors like any other.
    InputError names what is missing, extra or of the wrong shape; then nothing has been copied."""
    state = {n: (n, t) for n, t in module.state_dict().items()}
    if not own_names:
        state = {n.replace(".base_layer.", "."): named for n, named in state.items() if ".lora_" not in n}
    missing = [n for n in state if n not in tensors and not n.startswith(tuple(allow_missing))]
    if missing:
        raise InputError(f"{what}: {_listed(missing)} missing; give weights of this architecture")
    extra = [n for n in tensors if n not in state]
    if extra:
        raise InputError(f"{what}: {_listed(extra)} not in the model; give weights of this architecture")
    for name, tensor in tensors.items():
        ours = tuple(state[name][1].shape)
        if tuple(tensor.shape) != ours:
            raise InputError(
                f"{what}: {name} has shape {tuple(tensor.shape)}, the model needs {ours}; "
                "give weights of this architecture"
            )
    module.load_state_dict({state[n][0]: t for n, t in tensors.items()}, strict=False)


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:most])}{rest}"
