"""What `fusionsam benchmark` measures: this model in several runtimes, and what one would use in its place.

Weights of the others are random: time does not depend on them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fusionsam.inference.device import computing, knows_bfloat16
from fusionsam.inference.onnx import WHOLE, WHOLE_INT8, open_session, run_session
from fusionsam.types import InputError, JsonObject

Size = tuple[int, int]
Run = Callable[[], object]
OURS = "fusionsam"


@dataclass(frozen=True)
class Setting:
    """What a model is built for."""

    size: Size  # (height, width)
    threads: int
    weights: str
    onnx: str | None = None  # folder of `fusionsam export`


Built = tuple[nn.Module | None, Run]
"""The network, None where a runtime holds it, and one prediction to time."""


def _pair(size: Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, *size, generator=generator), torch.rand(1, 1, *size, generator=generator)


def _ours(of: Setting) -> Built:
    from fusionsam.inference.predictor import FusionSAM

    model = FusionSAM.from_pretrained(of.weights, device="cpu")
    visible, infrared = _pair(of.size)
    return model.network, lambda: model.infer(visible, infrared)


def _in_bfloat16(build: Callable[[Setting], Built]) -> Callable[[Setting], Built]:
    """The same network in bfloat16, on CPUs with instructions for it."""

    def built(of: Setting) -> Built:
        cpu = torch.device("cpu")
        if not knows_bfloat16(cpu):
            raise InputError("this CPU has no instructions for bfloat16")
        network, run = build(of)

        def lower() -> object:
            with computing("bf16", cpu):
                return run()

        return network, lower

    return built


def _compiled(of: Setting) -> Built:
    from fusionsam.inference.predictor import FusionSAM

    network = FusionSAM.from_pretrained(of.weights, device="cpu").network
    compiled = torch.compile(network)
    visible, infrared = _pair(of.size)
    return network, lambda: compiled(visible, infrared)


class TwoStreams(nn.Module):
    """The obvious alternative: two backbones of ours, features summed, an FPN decoder, a 1x1 convolution."""

    def __init__(self, source: str = "mobilenetv2_100", classes: int = 9) -> None:
        import timm
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from timm.models import FeatureInfo

        super().__init__()
        self.streams = nn.ModuleList(timm.create_model(source, features_only=True) for _ in range(2))
        info = self.streams[0].feature_info
        assert isinstance(info, FeatureInfo)
        self.decoder = FPNDecoder(info.channels()[-4:], 3, 128, segmentation_channels=96)
        self.head = nn.Conv2d(96, classes, 1)

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor:
        """(B,3,H,W) and (B,1,H,W), sides multiples of 32 -> logits (B,K,H/4,W/4)."""
        images = (visible, infrared.expand(-1, 3, -1, -1))
        levels = [stream(image)[-4:] for stream, image in zip(self.streams, images, strict=True)]
        out: Tensor = self.head(self.decoder([a + b for a, b in zip(*levels, strict=True)]))
        return out


def _two_streams(of: Setting) -> Built:
    network = TwoStreams().eval().to(memory_format=torch.channels_last)
    visible, infrared = _pair((of.size[0] + -of.size[0] % 32, of.size[1] + -of.size[1] % 32))
    return network, lambda: network(visible, infrared)


def _sam_vit_b(of: Setting) -> Built:
    from transformers import SamConfig, SamModel

    network = SamModel(SamConfig()).eval()
    image, points = torch.rand(1, 3, 1024, 1024), torch.tensor([[[[300.0, 400.0]]]])
    return network, lambda: network(pixel_values=image, input_points=points)


def _sam2_tiny(of: Setting) -> Built:
    from transformers import Sam2Config, Sam2Model

    network = Sam2Model(Sam2Config()).eval()
    image, points = torch.rand(1, 3, 1024, 1024), torch.tensor([[[[300.0, 400.0]]]])
    return network, lambda: network(pixel_values=image, input_points=points)


def _mit_b2() -> JsonObject:
    # SegFormer (arXiv 2105.15203), table 6: B2
    return {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768, "num_labels": 9}


def _segformer_b2(of: Setting) -> Built:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    network = SegformerForSemanticSegmentation(SegformerConfig(**_mit_b2())).eval()
    visible, _ = _pair(of.size)
    return network, lambda: network(pixel_values=visible)


class _TwoMiT(nn.Module):
    """Two MiT-B2 whose features are summed before SegFormer's decoder: CMX (arXiv 2203.04838) without its own fusion
    blocks, so a little less than CMX costs."""

    def __init__(self) -> None:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        super().__init__()
        config = SegformerConfig(**_mit_b2())
        self.one, self.two = (SegformerForSemanticSegmentation(config) for _ in range(2))
        self.two.decode_head = nn.Identity()  # type: ignore[assignment]

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor:
        images = (visible, infrared.expand(-1, 3, -1, -1))
        levels = [
            network.segformer(image, output_hidden_states=True).hidden_states
            for network, image in zip((self.one, self.two), images, strict=True)
        ]
        out: Tensor = self.one.decode_head([a + b for a, b in zip(*levels, strict=True)])
        return out


def _two_mit_b2(of: Setting) -> Built:
    network = _TwoMiT().eval()
    visible, infrared = _pair(of.size)
    return network, lambda: network(visible, infrared)


def _arrays(of: Setting) -> JsonObject:
    visible, infrared = _pair(of.size)
    return {"visible": visible.numpy(), "infrared": infrared.numpy()}


def _exported(of: Setting, name: str) -> Path:
    if of.onnx is None or not (Path(of.onnx) / name).is_file():
        raise InputError(f"needs {name} of a folder that fusionsam export wrote; give it as --onnx")
    return Path(of.onnx) / name


def _onnx(of: Setting, name: str = WHOLE) -> Built:
    session, arrays = open_session(_exported(of, name), of.threads), _arrays(of)
    return None, lambda: run_session(session, arrays)


def _int8(of: Setting) -> Built:
    return _onnx(of, WHOLE_INT8)


def _openvino(of: Setting) -> Built:
    if importlib.util.find_spec("openvino") is None:
        raise InputError("OpenVINO is not installed; pip install openvino")
    import openvino

    options = {"INFERENCE_NUM_THREADS": of.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(_exported(of, WHOLE), "CPU", options).create_infer_request()
    arrays = _arrays(of)
    return None, lambda: request.infer(arrays)


MODELS: dict[str, tuple[str, Callable[[Setting], Built]]] = {
    OURS: ("FusionSAM", _ours),
    "bf16": ("FusionSAM, bfloat16", _in_bfloat16(_ours)),
    "compiled": ("FusionSAM, torch.compile", _compiled),
    "onnx": ("FusionSAM, ONNX Runtime", _onnx),
    "int8": ("FusionSAM, ONNX Runtime, int8", _int8),
    "openvino": ("FusionSAM, OpenVINO", _openvino),
    "two_streams": ("two-stream FPN of the same backbones", _two_streams),
    "two_streams_bf16": ("two-stream FPN, bfloat16", _in_bfloat16(_two_streams)),
    "segformer_b2": ("SegFormer-B2 on the visible image (random weights)", _segformer_b2),
    "two_mit_b2": ("two MiT-B2, summed (CMX-like, random weights)", _two_mit_b2),
    "sam2_tiny": ("SAM2 tiny at 1024x1024 (random weights)", _sam2_tiny),
    "sam_vit_b": ("SAM ViT-B at 1024x1024 (random weights)", _sam_vit_b),
}
"""Name -> what the table calls it, and how it is built."""
