"""An exported model in ONNX Runtime behind the network's own interface: encode, decode, forward."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusionsam.config.schema import ModelConfig, from_dict
from fusionsam.models.geometry import pair_size, require_classes_known, require_mask, stand_in_where
from fusionsam.models.layers import resize
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import (
    Array,
    Encoded,
    FirstPass,
    Frame,
    ImageFeatures,
    InputError,
    JsonObject,
    Latents,
    Notice,
    Output,
    PromptMode,
    Prompts,
)

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

WHOLE, ENCODER, DECODER = "fusionsam.onnx", "encoder.onnx", "decoder.onnx"
WHOLE_INT8 = "fusionsam_int8.onnx"
Arrays = dict[str, Array]
UNTAUGHT = "exported models take no clicks that name a class; leave the classes out, or use --backend torch"
FILLED = Notice(
    "filled",
    "what a camera does not reach is taken from the other one, as exported models have no input that tells it",
    "--backend torch uses the token of a missing camera there",
)
"""Of pairs that a rig does not cover whole."""


def runtime() -> ModuleType:
    """The module onnxruntime; InputError where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError('ONNX Runtime is not installed; pip install "fusionsam[export]"') from None
    onnxruntime.set_default_logger_severity(3)  # warnings about nodes it moves are no use to anybody
    return onnxruntime


def open_session(path: Path, threads: int | None = None) -> InferenceSession:
    """An InferenceSession on the CPU of `path`, with as many threads as PyTorch uses unless told otherwise. InputError
    for a file that is absent or that ONNX Runtime refuses."""
    ort = runtime()
    if not path.is_file():
        raise InputError(f"{path}: no such file; write it with: fusionsam export --weights W --out {path.parent}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no public base
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: ONNX Runtime cannot load it ({reason}); export it again") from None


def metadata(session: InferenceSession) -> JsonObject:
    """What an exported file says of itself: version, part, name, classes, palette, preprocessing, config, card."""
    stored = session.get_modelmeta().custom_metadata_map
    if "fusionsam" not in stored:
        raise InputError("the ONNX file was not written by fusionsam export (it lacks its metadata); export it again")
    return json.loads(stored["fusionsam"])


def run_session(session: InferenceSession, inputs: Arrays) -> Arrays:
    """Outputs by name. Inputs the graph has no use for (a decoder without mask prompt, say) are left out."""
    wanted = {item.name for item in (*session.get_inputs(), *session.get_overridable_initializers())}
    values = session.run(None, {name: value for name, value in inputs.items() if name in wanted})
    return dict(zip((item.name for item in session.get_outputs()), values, strict=True))


def files(folder: str | Path) -> list[Path]:
    """The two files a prediction runs through."""
    return [Path(folder) / ENCODER, Path(folder) / DECODER]


def load(folder: str | Path, device: str = "auto") -> tuple[OnnxNetwork, str, JsonObject]:
    """The network of an exported folder, its name and its card. InputError if it is none, or for another device than
    the CPU."""
    if device not in ("auto", "cpu"):
        raise InputError(f"device {device!r}: the onnx backend runs on the CPU; use --backend torch, or --device cpu")
    absent = [path.name for path in files(folder) if not path.is_file()]
    if absent:
        raise InputError(
            f"weights {folder}: no {absent[0]} in it, which --backend onnx needs; write it with: fusionsam export "
            f"--weights {folder} --out DIR, and give --weights DIR"
        )
    network = OnnxNetwork(folder)
    return network, network.facts["name"], network.facts["card"]


class OnnxNetwork(FusionSAMNetwork):
    """encoder.onnx and decoder.onnx of one folder in the place of a FusionSAMNetwork: the same encode, decode and
    forward, the same checks, no weights in PyTorch and no gradients. Pairs above the model's max_side are refused."""

    def __init__(self, folder: str | Path, encoder: str = ENCODER) -> None:
        nn.Module.__init__(self)  # the network's own constructor would build every stage
        self.steering = None
        self.encoder_session = open_session(Path(folder) / encoder)
        self.decoder_session = open_session(Path(folder) / DECODER)
        self.facts = metadata(self.encoder_session)
        for session, mark, name in ((self.encoder_session, "z_f", encoder), (self.decoder_session, "logits", DECODER)):
            if mark not in (found := [item.name for item in session.get_outputs()]):
                raise InputError(f"{folder}/{name}: gives {', '.join(found)}, and no {mark}; export the model again")
        if metadata(self.decoder_session)["weights"] != self.facts["weights"]:
            raise InputError(f"{folder}: {encoder} and {DECODER} are of different weights; export them again")
        self.config = from_dict(ModelConfig, self.facts["config"], f"{folder}/{encoder}")
        self.eval()

    def encode(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        present: Tensor | None = None,
        covered: Tensor | None = None,
    ) -> Encoded:
        """As FusionSAMNetwork.encode, on the CPU. The file has no input for `covered`: what a camera does not reach
        is taken from the other one."""
        size = pair_size(visible, infrared)
        if max(size) > self.config.max_side:
            raise InputError(
                f"pair: {size[0]}x{size[1]} pixels, an exported model takes up to {self.config.max_side} a side; "
                "resize it, or use --backend torch"
            )
        if covered is not None and visible is not None and infrared is not None:
            visible, infrared = stand_in_where(visible, infrared, require_mask(covered, size))
        given = visible if visible is not None else infrared
        assert given is not None
        batch = given.shape[0]
        if present is None:
            present = torch.ones(batch, 2, dtype=torch.bool)
        present = present.cpu() & torch.tensor([visible is not None, infrared is not None])
        images = [
            given.new_zeros(batch, channels, *size) if image is None else image
            for image, channels in ((visible, 3), (infrared, 1))
        ]
        arrays = {"visible": _array(images[0]), "infrared": _array(images[1]), "present": present.numpy()}
        found = {k: torch.from_numpy(v) for k, v in run_session(self.encoder_session, arrays).items()}
        levels = [found[f"level_{i}"] for i in range(sum(name.startswith("level_") for name in found))]
        padded = (4 * found["z_f"].shape[2], 4 * found["z_f"].shape[3])
        return Encoded(
            features=ImageFeatures(found["image_embeddings"], levels, Frame(padded, padded)),
            fused=found["fused"],
            latents=Latents(found["visible_latents"], found["infrared_latents"]),
            z_f=found["z_f"],
            mask_prompt=found["mask_prompt"],
            size=size,
            small=size,
            padded=padded,
        )

    def decode(
        self,
        encoded: Encoded,
        prompts: Prompts | None = None,
        mode: PromptMode | None = None,
        first: FirstPass | None = None,
    ) -> Output:
        """As FusionSAMNetwork.decode; the files have no part for clicks that name a class, nor use for `first`."""
        if prompts is not None:
            require_classes_known(prompts, len(self.config.classes), UNTAUGHT)
        used = self.prompts_for(encoded, prompts, mode)
        points, labels = sam_points(used, len(encoded.fused))
        assert used.mask is not None
        arrays: Arrays = {
            "points": points,
            "point_labels": labels,
            "image_embeddings": _array(encoded.features.embedding),
            "z_f": _array(encoded.z_f),
            "mask_prompt": _array(resize(used.mask, (encoded.z_f.shape[2], encoded.z_f.shape[3]))),
            "size": np.array(encoded.size, dtype=np.int64),
            **{f"level_{i}": _array(level) for i, level in enumerate(encoded.features.levels)},
        }
        found = {k: torch.from_numpy(v) for k, v in run_session(self.decoder_session, arrays).items()}
        return Output(
            fused=encoded.fused,
            logits=found["logits"],
            fot_logits=found["masks"],
            prompts=used,
            latents=encoded.latents,
            mask_prompt=encoded.mask_prompt,
            features=encoded.z_f,
        )


def sam_points(prompts: Prompts, batch: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Prompts as SAM's exported decoder takes them: points (B,P,2) and labels (B,P), where 2 and 3 are the corners of
    a box, and points without any box get one more with label -1. P is 0 without prompts."""
    points, labels = torch.zeros(batch, 0, 2), torch.zeros(batch, 0, dtype=torch.long)
    if prompts.points is not None and prompts.point_labels is not None:
        points, labels = prompts.points.float(), prompts.point_labels
        if prompts.boxes is None:
            points = torch.cat([points, points.new_zeros(len(points), 1, 2)], dim=1)
            labels = torch.cat([labels, labels.new_full((len(labels), 1), -1)], dim=1)
    if prompts.boxes is not None:
        corners = prompts.boxes.reshape(len(prompts.boxes), -1, 2).float()
        kinds = labels.new_tensor([2, 3]).repeat(len(corners), corners.shape[1] // 2)
        points, labels = torch.cat([points, corners], dim=1), torch.cat([labels, kinds], dim=1)
    return points.expand(batch, -1, -1).numpy(), labels.long().expand(batch, -1).numpy()


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())
