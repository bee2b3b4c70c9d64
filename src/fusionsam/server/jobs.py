"""What the server asks of the model: predict a pair, encode a pair, decode prompts; equal predictions as one batch."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionsam.inference.prediction import Prediction
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import Mode
from fusionsam.inference.session import Session
from fusionsam.types import PROMPT_TENSORS, JsonObject, Prompts


@dataclass
class Images:
    """A pair as it waits: uint8, a quarter of the floats' memory, or float32 in [0,1] from who sent such."""

    visible: Tensor | None  # (3,H,W)
    infrared: Tensor | None  # (1,H,W)
    celsius: NDArray[np.float32] | None = None
    """(H',W') degrees Celsius of a radiometric file whose constants are inside."""
    covered: Tensor | None = None  # bool (2,H,W): where the visible, where the infrared camera reaches
    alignment: JsonObject = field(default_factory=dict)  # how the two were brought together; plain JSON
    input: JsonObject = field(default_factory=dict)  # what was found and guessed in the files, and the notices on it

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        image = self.visible if self.visible is not None else self.infrared
        assert image is not None
        return int(image.shape[-2]), int(image.shape[-1])


@dataclass
class Predict:
    """Pair -> Prediction."""

    images: Images
    prompts: Prompts | Mode | None

    @property
    def key(self) -> Hashable:
        """Size, which images are there, whether everywhere, and either the mode or the numbers of points and boxes, and
        whether they name classes."""
        asked: Hashable = self.prompts
        if isinstance(self.prompts, Prompts):
            given = [getattr(self.prompts, name) for name in PROMPT_TENSORS]
            asked = tuple(None if x is None else x.shape[1] for x in given)
        images = self.images
        return images.size, images.visible is None, images.infrared is None, images.covered is None, asked

    @property
    def cost(self) -> int:
        """Pixels."""
        return self.images.size[0] * self.images.size[1]


@dataclass
class Encode:
    """Pair -> (Session, its Prediction under the model's own prompts)."""

    images: Images
    key: None = None
    cost: int = 0


@dataclass
class Decode:
    """Session, prompts -> Prediction."""

    session: Session
    prompts: Prompts | Mode
    key: None = None
    cost: int = 0


Work = Predict | Encode | Decode


class Engine:
    """The one model in memory; called from one thread only, the batcher's."""

    def __init__(self, model: FusionSAM) -> None:
        self.model = model

    def warm_up(self) -> None:
        """One small prediction, so that the first request does not pay for lazy initialisation."""
        self([Predict(Images(torch.zeros(3, 64, 64, dtype=torch.uint8), None), "self")])

    def __call__(self, jobs: Sequence[Work]) -> list[object]:
        """Results in the order of `jobs`, which share one kind and key."""
        with torch.inference_mode():
            if alike := [job for job in jobs if isinstance(job, Predict)]:
                return [*self._predict(alike)]
            return [self._encode(job) if isinstance(job, Encode) else self._decode(job) for job in jobs]

    def _predict(self, jobs: Sequence[Predict]) -> list[Prediction]:
        started = time.perf_counter()
        visible, infrared = (
            self._stack([getattr(job.images, name) for job in jobs]) for name in ("visible", "infrared")
        )
        asked = [job.prompts for job in jobs]
        own = [prompts for prompts in asked if isinstance(prompts, Prompts)]
        mode = asked[0] if isinstance(asked[0], str) else None
        masks = [job.images.covered for job in jobs if job.images.covered is not None]
        covered = torch.stack(masks) if masks else None  # a key is of pairs with a mask, or without
        output = self.model.infer(visible, infrared, _stack_prompts(own) if own else None, mode, covered)
        results = [self.model.postprocess(output, row=row) for row in range(len(jobs))]
        seconds = time.perf_counter() - started
        return [replace(result, seconds=seconds) for result in results]

    def _encode(self, job: Encode) -> tuple[Session, Prediction]:
        started = time.perf_counter()
        session = self.model.encode(job.images.visible, job.images.infrared, job.images.covered)
        return session, replace(session.predict(), seconds=time.perf_counter() - started)

    def _decode(self, job: Work) -> Prediction:
        assert isinstance(job, Decode)
        return job.session.predict(job.prompts)

    def _stack(self, images: Sequence[Tensor | None]) -> Tensor | None:
        there = [image if image.is_floating_point() else image.float() / 255 for image in images if image is not None]
        return torch.stack(there).to(self.model.device) if there else None


def _stack_prompts(rows: Sequence[Prompts]) -> Prompts:
    given = [name for name in PROMPT_TENSORS if getattr(rows[0], name) is not None]
    return Prompts(**{name: torch.cat([getattr(row, name) for row in rows]) for name in given}, source="user")
