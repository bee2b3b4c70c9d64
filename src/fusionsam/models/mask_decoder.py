"""SAM's two-way mask decoder with full-fledged output tokens (FOT): one token and one hypernetwork a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusionsam.config.schema import DecoderConfig
from fusionsam.models.layers import resize
from fusionsam.models.sam import SamMaskDecoder


class FullFledgedMaskDecoder(nn.Module):
    """SAM's mask decoder whose mask tokens are K full-fledged output tokens.

    With K = 4, `logit_scale` 1 and no fine features it computes exactly SAM's masks (a test holds it to that).
    `level_channels` and `level_strides` tell which of the image encoder's maps there are for sharper edges.
    """

    def __init__(
        self, config: DecoderConfig, classes: int, level_channels: list[int], level_strides: list[int]
    ) -> None:
        super().__init__()
        self.sam = SamMaskDecoder(config.hidden, config.heads, config.mlp_dim, config.layers, classes)
        self.sam.iou_prediction_head.requires_grad_(False)  # SAM's estimate of mask quality: no class needs it
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale))
        self.level_index: dict[str, int] = {}
        self.fine = nn.ModuleDict()
        if config.fine_features:
            for stride, width in ((8, config.hidden // 4), (4, config.hidden // 8)):
                if stride in level_strides:
                    self.level_index[str(stride)] = level_strides.index(stride)
                    skip = nn.Conv2d(level_channels[level_strides.index(stride)], width, 1)
                    nn.init.zeros_(skip.weight)  # SAM's own features first; edges are learned on top
                    nn.init.zeros_(skip.bias)  # type: ignore[arg-type]
                    self.fine[str(stride)] = skip

    @property
    def feature_channels(self) -> int:
        """Channels of the mask features."""
        return self.sam.hidden_size // 8

    def _skip(self, stride: int, x: Tensor, levels: list[Tensor]) -> Tensor:
        key = str(stride)
        if key not in self.level_index:
            return x
        return x + resize(self.fine[key](levels[self.level_index[key]]), (x.shape[2], x.shape[3]))

    def forward(
        self, embedding: Tensor, positions: Tensor, sparse: Tensor | None, dense: Tensor, levels: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Image embedding (B,E,H_e,W_e), its positions (1,E,H_e,W_e), prompts sparse (B,1,T,E) and dense
        (B or 1,E,H_e,W_e) -> FOT logits (B,K,4H_e,4W_e), mask features (B,E/8,4H_e,4W_e)."""
        sam = self.sam
        batch, channels, height, width = embedding.shape
        tokens = torch.cat([sam.iou_token.weight, sam.mask_tokens.weight])[None].expand(batch, -1, -1)
        if sparse is not None:
            tokens = torch.cat([tokens, sparse.squeeze(1).expand(batch, -1, -1)], dim=1)
        queries, keys = sam.transformer(tokens, embedding + dense, positions.expand(batch, -1, -1, -1))
        image = keys.transpose(1, 2).reshape(batch, channels, height, width)
        x = self._skip(8, sam.upscale_conv1(image), levels)
        x = sam.activation(sam.upscale_layer_norm(x))
        features = sam.activation(self._skip(4, sam.upscale_conv2(x), levels))
        outputs = queries[:, 1 : 1 + sam.num_mask_tokens]
        hyper = torch.stack([mlp(outputs[:, i]) for i, mlp in enumerate(sam.output_hypernetworks_mlps)], dim=1)
        logits = (hyper @ features.flatten(2)).reshape(batch, -1, *features.shape[2:])
        return self.logit_scale * logits, features

    @torch.no_grad()
    def start_from_sam(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """SAM's decoder weights (transformers' names) widened from its own mask tokens to K.

        Token and hypernetwork k begin as SAM's k mod 4, tokens with a little noise so that copies part ways. Returns
        the tensors for the whole of `self.sam`.
        """
        classes = self.sam.num_mask_tokens
        source = tensors["mask_tokens.weight"]
        if classes == source.shape[0]:
            return dict(tensors)
        out = {}
        for name in self.sam.state_dict():
            if name == "mask_tokens.weight":
                order = torch.arange(classes) % source.shape[0]
                noise = 0.02 * source.std() * torch.randn(classes, source.shape[1])
                out[name] = source[order] + noise
            elif name.startswith("output_hypernetworks_mlps."):
                index, rest = name.removeprefix("output_hypernetworks_mlps.").split(".", 1)
                out[name] = tensors[f"output_hypernetworks_mlps.{int(index) % source.shape[0]}.{rest}"]
            elif name.startswith("iou_prediction_head.proj_out."):
                out[name] = tensors[name][torch.arange(classes) % source.shape[0]]
            else:
                out[name] = tensors[name]
        return out
