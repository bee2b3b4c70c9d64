"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusionsam.config import ModelConfig, preset
from fusionsam.models.fusionsam import FusionSAMNetwork

SHARED = Path(__file__).parents[2] / "shared"


def build_debug(change: Callable[[ModelConfig], object] | None = None, seed: int = 0) -> FusionSAMNetwork:
    """The debug preset, after `change`, with codebooks that k-means has filled, in eval mode."""
    config = preset("debug")
    if change is not None:
        change(config)
    torch.manual_seed(seed)
    network = FusionSAMNetwork(config)
    with torch.no_grad():  # a codebook before its first batch is all zeros and would hide the input
        network.tokenizer.train()(torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64))
    return network.eval()


@pytest.fixture(scope="session")
def make_debug() -> Callable[..., FusionSAMNetwork]:
    """`build_debug`, for tests that change the configuration or the weights."""
    return build_debug


@pytest.fixture
def debug() -> FusionSAMNetwork:
    """A debug network of one's own, seed 0, eval mode."""
    return build_debug()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two random pairs of 70 x 83 pixels: visible (2,3,70,83) and infrared (2,1,70,83)."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 70, 83, generator=generator), torch.rand(2, 1, 70, 83, generator=generator)


def _folder(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"{variable}: no folder {path}")
    return path


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with the real data sets (FUSIONSAM_DATA); skips where there is none."""
    return _folder("FUSIONSAM_DATA", SHARED / "data")


@pytest.fixture(scope="session")
def weights_root() -> Path:
    """Folder with published weights (FUSIONSAM_WEIGHTS); skips where there is none."""
    return _folder("FUSIONSAM_WEIGHTS", SHARED / "weights")
