"""A pair that is encoded once and decoded at every prompt: what Python, the server and the page share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import torch
from numpy.typing import ArrayLike

from fusionsam.inference.interactive import InteractivePair, InteractiveSAM, Masks, Picture, shipped_sam
from fusionsam.inference.prediction import Prediction
from fusionsam.inference.prompts import Mode, given_prompts
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import Encoded, Latents, Output, Prompts


class Model(Protocol):
    """What a session asks of its model; `FusionSAM` is one."""

    network: FusionSAMNetwork
    device: torch.device

    def computing(self) -> AbstractContextManager[object]:
        """Within it the network computes in the model's precision."""

    def postprocess(self, output: Output, seconds: float = 0.0, row: int = 0) -> Prediction:
        """One image of an Output as plain arrays."""


class Session:
    """One encoded pair of one model; `FusionSAM.encode` makes it.

    >>> session = model.encode("visible.png", "infrared.png")  # doctest: +SKIP
    >>> session.predict({"points": [[320, 240]], "labels": [1]}).labels  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Model,
        encoded: Encoded,
        visible: torch.Tensor | None = None,
        infrared: torch.Tensor | None = None,
    ) -> None:
        nothing = torch.empty(0)
        self.model = model
        self._images: dict[Picture, torch.Tensor | None] = {"visible": visible, "infrared": infrared}
        self._pair: InteractivePair | None = None
        # no prompt needs the latents, and a view would keep the padding alive
        self.encoded = replace(encoded, latents=Latents(nothing, nothing), fused=encoded.fused.clone())

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pair in pixels."""
        return self.encoded.size

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the session holds."""
        kept = self.encoded
        tensors = [kept.features.embedding, *kept.features.levels, kept.fused, kept.z_f, kept.mask_prompt]
        images = [image for image in self._images.values() if image is not None]
        return sum(tensor.nbytes for tensor in (*tensors, *images))

    def mask(
        self,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        on: Picture = "fused",
        previous: torch.Tensor | None = None,
        sam: InteractiveSAM | None = None,
    ) -> Masks:
        """Masks of one object by clicks, from Segment Anything: no class, and nothing of the class map is changed.

        Args:
            points: (P,2) x, y in pixels of the pair.
            labels: (P), 1 on the object, 0 off it; all 1 when left out.
            box: x0, y0, x1, y1 in pixels.
            on: The picture that is looked at; each is encoded at its first prompt.
            previous: `logits[i]` of an earlier answer, to refine that mask.
            sam: One of your own; left out, the `sam` that ships.

        Returns:
            Three masks for a first prompt, one with `previous`; scores and low-resolution logits.

        Raises:
            InputError: For prompts that do not fit, and a picture that the pair does not have.

        >>> first = session.mask([[320, 200]])  # doctest: +SKIP
        >>> first.masks[first.best].shape  # doctest: +SKIP
        (480, 640)
        """
        if self._pair is None or (sam is not None and self._pair.sam is not sam):
            given: dict[Picture, torch.Tensor | None] = {"fused": self.encoded.fused, **self._images}
            pictures = {name: image[0] for name, image in given.items() if image is not None}
            self._pair = InteractivePair(sam or shipped_sam(str(self.model.device)), pictures)
        return self._pair.sam.mask(self._pair.encoded(on), points, labels, box, previous)

    @torch.inference_mode()
    def predict(self, prompts: Prompts | Mapping[str, object] | Mode | None = None) -> Prediction:
        """The pair under other prompts, for the time of the decoder alone.

        Args:
            prompts: As in `FusionSAM.predict`: "self", "none", a `Prompts` of tensors or arrays, or a dictionary of
                points, labels and boxes in pixels of the pair, and of the classes that they name. None = the model's
                own mode.

        Returns:
            Fused picture, class ids and confidence at the pair's own size; `seconds` are the decoder's.

        Raises:
            InputError: For prompts that contradict themselves or are for several images.
        """
        started = time.perf_counter()
        own, mode = given_prompts(prompts, self.size, self.model.network.config.classes)
        own = None if own is None else own.to(self.model.device)
        with self.model.computing():
            output = self.model.network.decode(self.encoded, own, mode)
        result = self.model.postprocess(output)
        return replace(result, seconds=time.perf_counter() - started)
