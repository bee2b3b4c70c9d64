"""An unmodified Segment Anything, as its authors prompt it: SAM, SAM2 (transformers) or MobileSAM.

Nothing here is ours but the door: pictures are placed, coordinates scaled and masks resized as each model's own
processor does, and its own mask tokens are used. The baselines of the paper's Table 4 run it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusionsam.models.encoders.base import ImageEncoder
from fusionsam.models.encoders.tinyvit import TinyViT
from fusionsam.types import Frame, InputError
from fusionsam.weights import pretrained as foreign

_CHUNK = 16  # prompts decoded at once: bounds memory for data sets of many classes
_VIT_BY_WIDTH = {768: "facebook/sam-vit-base", 1024: "facebook/sam-vit-large", 1280: "facebook/sam-vit-huge"}


@dataclass
class Encoded:
    """One picture after the image encoder; any number of prompts may follow."""

    embeddings: list[Tensor]  # SAM: the image embedding; SAM2: its two finer maps before it
    frame: Frame
    size: tuple[int, int]  # H, W of the picture


class PlainSam:
    """A Segment Anything model with its own weights and its own mask tokens, in eval mode.

    `side` is that of its square input; SAM letterboxes a picture into it, SAM2 (`stretch`) resizes both sides to it.
    """

    def __init__(
        self, model: nn.Module, embed: Callable[[Tensor], list[Tensor]], side: int, stretch: bool, device: str
    ) -> None:
        self.model = model.eval().to(device)
        self.embed, self.side, self.stretch, self.device = embed, side, stretch, device
        self.placer = ImageEncoder().to(device)  # SAM, SAM2 and MobileSAM share ImageNet's mean and deviation
        self.placer.image_size = side

    @classmethod
    def open(cls, source: str | Path, device: str = "cpu") -> PlainSam:
        """A transformers SamModel or Sam2Model (folder, or hub name), or a file in MobileSAM's or SAM's own format.

        InputError for anything else, and for weights with a tensor missing."""
        if Path(source).is_file() or Path(source).suffix in foreign.SUFFIXES:
            return _from_file(cls, source, device)
        path = Path(source) / "config.json" if Path(source).is_dir() else foreign.fetch(str(source), "config.json")
        try:
            kind = str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"--sam {source}: {path} is not a model's config.json ({error!r})") from None
        if kind != "sam" and not kind.startswith("sam2"):
            raise InputError(f"--sam {source}: is a {kind!r} model; give a SamModel or Sam2Model")
        from transformers import Sam2Model, SamModel  # here, since it takes seconds to import

        from fusionsam.models.encoders.sam import square_side

        model = _pretrained(SamModel if kind == "sam" else Sam2Model, source)
        if kind == "sam":
            side = square_side(str(source), model.config.vision_config.image_size)
            return cls(model, lambda x: [model.get_image_embeddings(x)], side, False, device)
        side = square_side(str(source), model.config.vision_config.backbone_config.image_size)
        return cls(model, lambda x: list(model.get_image_embeddings(x)), side, True, device)

    @torch.inference_mode()
    def encode(self, picture: Tensor) -> Encoded:
        """(3,H,W) in [0,1] -> its embeddings."""
        size = (int(picture.shape[1]), int(picture.shape[2]))
        square = (self.side, self.side)
        frame = Frame(square, square) if self.stretch else self.placer.frame(*size)
        return Encoded(self.embed(self.placer.place(picture[None].to(self.device), frame)), frame, size)

    @torch.inference_mode()
    def masks(
        self, encoded: Encoded, points: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One mask for each of `points` (P,2), then one for each of `boxes` (M,4), both in pixels of the picture.

        A point is ambiguous, so the best of SAM's three masks by predicted IoU is taken; a box gets the mask of its
        single-mask token, as SAM's authors advise. Returns bool (P+M,H,W) and predicted IoU (P+M) on the CPU.
        """
        height, width = encoded.size
        x, y = encoded.frame.content[1] / width, encoded.frame.content[0] / height
        found: list[Tensor] = [torch.zeros(0, height, width, dtype=torch.bool)]
        scores: list[Tensor] = [torch.zeros(0)]
        for prompts, factor in ((points, (x, y)), (boxes, (x, y, x, y))):
            if prompts is None or len(prompts) == 0:
                continue
            for chunk in prompts.float().split(_CHUNK):
                scaled = (chunk * chunk.new_tensor(factor)).to(self.device)[None]
                if prompts is points:
                    on = torch.ones((*scaled.shape[:2], 1), dtype=torch.long, device=self.device)
                    given: dict[str, object] = {"input_points": scaled[:, :, None], "input_labels": on}
                else:
                    given = {"input_boxes": scaled}
                embeddings = encoded.embeddings if self.stretch else encoded.embeddings[0]
                out = self.model(image_embeddings=embeddings, multimask_output=prompts is points, **given)
                score, best = out.iou_scores[0].max(dim=1)
                chosen = out.pred_masks[0][torch.arange(len(best), device=best.device), best]
                found.append((self.full(chosen[:, None], encoded)[:, 0] > 0).cpu())
                scores.append(score.float().cpu())
        return torch.cat(found), torch.cat(scores)

    def decode(
        self,
        encoded: Encoded,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        box: Tensor | None = None,
        mask: Tensor | None = None,
        several: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """One object from all prompts together: low-resolution logits (N,h,w) and predicted IoU (N), on the CPU.

        `points` (P,2) and `box` (4) are pixels of the picture, `labels` int (P) is 1 on the object and 0 off it,
        `mask` (h,w) the logits of an earlier answer. With `several` N is 3, otherwise 1. There are gradients,
        for training, unless the caller turns them off.
        """
        height, width = encoded.size
        x, y = encoded.frame.content[1] / width, encoded.frame.content[0] / height
        given: dict[str, object] = {}
        if points is not None and labels is not None:
            given["input_points"] = (points.float() * points.new_tensor((x, y)).float())[None, None].to(self.device)
            given["input_labels"] = labels.long()[None, None].to(self.device)
        if box is not None:
            given["input_boxes"] = (box.float() * box.new_tensor((x, y, x, y)).float())[None, None].to(self.device)
        if mask is not None:
            given["input_masks"] = mask.float()[None, None].to(self.device)
        embeddings = encoded.embeddings if self.stretch else encoded.embeddings[0]
        out = self.model(image_embeddings=embeddings, multimask_output=several, **given)
        return out.pred_masks[0, 0].float().cpu(), out.iou_scores[0, 0].float().cpu()

    def full(self, logits: Tensor, encoded: Encoded) -> Tensor:
        """Low-resolution logits (N,1,h,w) at the picture's own size, (N,1,H,W)."""
        if not self.stretch:
            height, width = encoded.frame.content
            logits = F.interpolate(logits, encoded.frame.size, mode="bilinear", align_corners=False)
            logits = logits[:, :, :height, :width]
        return F.interpolate(logits, encoded.size, mode="bilinear", align_corners=False)


def _pretrained(kind: Any, source: str | Path) -> Any:
    try:  # safetensors only: other files may hold code
        model, info = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # network, file and shape errors share no type
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"--sam {source}: cannot be loaded ({reason}); give an intact folder or hub name") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"--sam {source}: {missing[0]} and {len(missing) - 1} more tensors missing; fetch it again")
    return model


def _from_file(cls: type[PlainSam], source: str | Path, device: str) -> PlainSam:
    from transformers import SamConfig, SamModel

    from fusionsam.models.encoders.sam import square_side, vit_config

    parts = foreign.sam_parts(source)
    if parts.encoder_kind == "sam2":
        raise InputError(f"--sam {source}: a SAM2 file; give its transformers folder or hub name instead")
    if parts.encoder_kind == "sam":
        width = int(parts.image_encoder["patch_embed.projection.weight"].shape[0])
        if width not in _VIT_BY_WIDTH:
            raise InputError(f"--sam {source}: a ViT of width {width}; expected one of {sorted(_VIT_BY_WIDTH)}")
        model = SamModel(SamConfig(vision_config=vit_config(_VIT_BY_WIDTH[width]).to_dict()))
        foreign.load_exactly(model.vision_encoder, parts.image_encoder, f"--sam {source}")
    else:
        # the ViT without layers is never run: TinyViT stands in its place
        model = SamModel(SamConfig(vision_config={"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 0}))
    foreign.load_exactly(model.prompt_encoder, parts.prompt_encoder, f"--sam {source}")
    foreign.load_exactly(model.mask_decoder, parts.mask_decoder, f"--sam {source}")
    table = parts.prompt_encoder["shared_embedding.positional_embedding"]
    model.shared_image_embedding.positional_embedding.data.copy_(table)
    side = square_side(str(source), model.vision_encoder.config.image_size)
    if parts.encoder_kind == "sam":
        return cls(model, lambda x: [model.get_image_embeddings(x)], side, False, device)
    # its convolutions are depthwise and 1x1: channels beside one another spare them copies
    backbone = TinyViT().eval().to(device).to(memory_format=torch.channels_last)
    foreign.load_exactly(backbone, parts.image_encoder, f"--sam {source}")
    return cls(model, lambda x: [backbone(x)[0].contiguous()], side, False, device)
