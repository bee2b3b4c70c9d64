"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait
from torch import nn
from transformers import Sam2Config, Sam2Model, SamConfig, SamModel

from fusionsam.config.schema import ModelConfig, preset
from fusionsam.models.network import FusionSAMNetwork

SAM_PROMPT = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
SAM_DECODER = {"hidden_size": 32, "mlp_dim": 40, "num_attention_heads": 2, "iou_head_hidden_dim": 24}
BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
    "--window-size=1400,1500",
)  # fmt: skip
BROWSER_PATIENCE = 240  # seconds: the machine may be busy
SHARED = Path(__file__).parents[2] / "shared"


def build_debug(change: Callable[[ModelConfig], object] | None = None, seed: int = 0) -> FusionSAMNetwork:
    """The debug preset, after `change`, with codebooks that k-means has filled and FMP's attention at work, in eval
    mode."""
    config = preset("debug")
    if change is not None:
        change(config)
    torch.manual_seed(seed)
    network = FusionSAMNetwork(config)
    with torch.no_grad():  # a codebook before its first batch is all zeros and would hide the input
        network.tokenizer.train()(torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64))
    for norm in (part for part in network.fusion.modules() if isinstance(part, torch.nn.LayerNorm)):
        torch.nn.init.ones_(norm.weight)  # zero at first: attention would add nothing
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


def _saved(model: nn.Module, folder: Path) -> tuple[nn.Module, Path]:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A random SAM of transformers for 64 x 64 pixels, in eval mode, and the folder it is saved in."""
    torch.manual_seed(2)
    vision = {
        "hidden_size": 24, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64,
        "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 44,
    }  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config=SAM_PROMPT, mask_decoder_config=SAM_DECODER)
    return _saved(SamModel(config), tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A random SAM2 of transformers for 64 x 64 pixels, in eval mode, and the folder it is saved in."""
    torch.manual_seed(1)
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "window_size_per_stage": [4, 2, 4, 2], "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [3, 3],
    }  # fmt: skip
    vision = {
        "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }  # fmt: skip
    decoder = {**SAM_DECODER, "iou_head_hidden_dim": 32}
    config = Sam2Config(vision_config=vision, prompt_encoder_config=SAM_PROMPT, mask_decoder_config=decoder)
    return _saved(Sam2Model(config), tmp_path_factory.mktemp("sam2"))


class Browser(webdriver.Chrome):
    """Chromium; `get` waits for the page by many short questions. The driver's own waiting is one long one, at which
    its client gives up after 120 seconds."""

    def get(self, url: str) -> None:
        """Open `url` anew, and wait until the page and all it names are there."""
        there = "return document.readyState === 'complete' && location.href.startsWith(arguments[0])"
        for address in ("about:blank", url):
            super().get(address)
            WebDriverWait(self, BROWSER_PATIENCE, 0.05).until(
                lambda _, address=address: self.execute_script(there, address), f"{address} is not loaded"
            )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium that keeps its console and its requests; skips where there is none, and fails in CI."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if not (binary and driver_path):
        missing = "no chromium and chromedriver: `make browser` installs them (Debian: chromium chromium-driver)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.page_load_strategy = "none"
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in BROWSER_FLAGS:
        options.add_argument(flag)
    with Browser(options=options, service=webdriver.ChromeService(driver_path)) as driver:
        yield driver


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
