"""What `fusionsam reconstruct` writes and says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fusionsam.config.schema import ModelConfig, preset
from fusionsam.data.images import write_png
from fusionsam.errors import InputError
from fusionsam.evaluation import reconstruct
from fusionsam.evaluation.options import ReconstructOptions
from fusionsam.evaluation.reconstruct import ERROR_GAIN, codes_map, load_tokenizer
from fusionsam.metrics.reconstruction import CodeUsage, psnr
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.training.tokenizer_task import TokenizerNetwork
from fusionsam.weights.checkpoint import save_checkpoint


def run(visible, infrared, out, weights, device, vgg16=None, vgg16_input="auto"):
    files = {"visible": visible, "infrared": infrared, "out": out, "vgg16": vgg16, "vgg16_input": vgg16_input}
    return reconstruct.run(ReconstructOptions(**files, weights=weights, device=device))


def stage_1(folder: Path, **changes: object) -> Path:
    config: ModelConfig = preset("debug")
    config.tokenizer = replace(config.tokenizer, **changes)  # type: ignore[arg-type]
    torch.manual_seed(3)
    tokenizer = Tokenizer(config.tokenizer).train()
    with torch.no_grad():
        tokenizer(torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32))  # k-means fills the codebooks
    return save_checkpoint(folder, TokenizerNetwork(tokenizer, config), {"step": 7})  # type: ignore[arg-type]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    generator = np.random.default_rng(5)
    for name, size in (("a", (37, 43)), ("b", (40, 29))):  # no multiples of 4, and not of one size
        ramp = np.linspace(30, 220, size[0] * size[1]).reshape(size)
        noise = generator.normal(0, 12, (*size, 3))
        write_png(tmp_path / "vi" / f"{name}.png", (ramp[..., None] + noise).clip(0, 255).astype(np.uint8))
        write_png(tmp_path / "ir" / f"{name}.png", (255 - ramp + noise[..., 0]).clip(0, 255).astype(np.uint8))
    return tmp_path


def test_figures_equal_skimage_on_the_written_pictures(pairs: Path) -> None:
    out = pairs / "out"
    run(pairs / "vi", pairs / "ir", out, str(stage_1(pairs / "weights")), "cpu")
    summary = json.loads((out / "summary.json").read_text())
    for modality, folder in (("visible", "vi"), ("infrared", "ir")):
        values = []
        for name in ("a", "b"):
            original = np.asarray(Image.open(pairs / folder / f"{name}.png"))
            np.testing.assert_array_equal(np.asarray(Image.open(out / f"{name}_{modality}.png")), original)
            rebuilt = np.asarray(Image.open(out / f"{name}_{modality}_reconstruction.png"))
            values.append(peak_signal_noise_ratio(original, rebuilt, data_range=255))
            figures = summary["images"][name][modality]
            assert figures["psnr"] == pytest.approx(values[-1], abs=1e-3)
            if modality == "infrared":
                expected = structural_similarity(original, rebuilt, data_range=255, use_sample_covariance=False)
                assert figures["ssim"] == pytest.approx(expected, abs=1e-4)
            error = np.abs(original.astype(int) - rebuilt).reshape(*original.shape[:2], -1).mean(-1)
            written = np.asarray(Image.open(out / f"{name}_{modality}_error.png"))
            np.testing.assert_allclose(written, (ERROR_GAIN * error).clip(0, 255), atol=0.51)
        assert summary[modality]["psnr"] == pytest.approx(np.mean(values), abs=1e-3)


def test_neither_inputs_nor_files_of_other_people_are_overwritten(pairs: Path) -> None:
    weights = str(stage_1(pairs / "weights"))
    (pairs / "ir" / "a.png").rename(pairs / "vi" / "a_infrared.png")
    before = (pairs / "vi" / "a_infrared.png").read_bytes()
    with pytest.raises(InputError, match=r"a_infrared.png: would be overwritten by a result of that name"):
        run(pairs / "vi" / "a.png", pairs / "vi" / "a_infrared.png", pairs / "vi", weights, "cpu")
    with pytest.raises(InputError, match=r"vi: is the folder of the inputs"):
        run(pairs / "vi", None, pairs / "vi", weights, "cpu")
    assert (pairs / "vi" / "a_infrared.png").read_bytes() == before
    (pairs / "out").mkdir()
    (pairs / "out" / "summary.json").write_text('{"total": 3}')
    with pytest.raises(InputError, match=r"summary.json: was not written by reconstruct"):
        run(pairs / "vi", None, pairs / "out", weights, "cpu")
    assert [path.name for path in (pairs / "out").iterdir()] == ["summary.json"]
    (pairs / "theirs").mkdir()
    (pairs / "theirs" / "a_visible.png").write_bytes(before)
    with pytest.raises(InputError, match=r"a_visible.png: is there, and no summary.json of ours tells of it"):
        run(pairs / "vi", None, pairs / "theirs", weights, "cpu")
    assert (pairs / "theirs" / "a_visible.png").read_bytes() == before
    run(pairs / "vi" / "a.png", None, pairs / "a", weights, "cpu")
    kept = {path.name: path.read_bytes() for path in (pairs / "a").iterdir()}
    (pairs / "other").mkdir()
    (pairs / "other" / "a.png").write_bytes((pairs / "vi" / "b.png").read_bytes())
    # the figures of the first would be lost
    for given, words in (("vi/b.png", "tells of image a, which would be lost"), ("other/a.png", "is of .*, not of ")):
        with pytest.raises(InputError, match=rf"summary\.json: {words}"):
            run(pairs / given, None, pairs / "a", weights, "cpu")
    assert {path.name: path.read_bytes() for path in (pairs / "a").iterdir()} == kept
    assert list(run(pairs / "vi", None, pairs / "a", weights, "cpu")["images"]) == ["a", "a_infrared", "b"]
    (pairs / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no image"):
        run(pairs / "empty", None, pairs / "new", weights, "cpu")


def test_a_run_that_was_killed_is_started_again_over_its_own_pictures(pairs: Path, monkeypatch) -> None:
    weights = str(stage_1(pairs / "weights"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusionsam.evaluation.reconstruct.error_map", stop)
    with pytest.raises(KeyboardInterrupt):
        run(pairs / "vi", None, pairs / "out", weights, "cpu")
    monkeypatch.undo()
    assert list((pairs / "out").glob("*_reconstruction.png"))
    assert json.loads((pairs / "out" / "summary.json").read_text())["unfinished"] is True
    summary = run(pairs / "vi", None, pairs / "out", weights, "cpu")
    assert json.loads((pairs / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert "unfinished" not in summary
    monkeypatch.setattr("fusionsam.evaluation.reconstruct.error_map", stop)
    with pytest.raises(KeyboardInterrupt):
        run(pairs / "vi", None, pairs / "out", weights, "cpu")
    kept = json.loads((pairs / "out" / "summary.json").read_text())  # what the run before found is not lost
    assert {**kept, "unfinished": None} == {**json.loads(json.dumps(summary)), "unfinished": None}


def test_codes_picture_lies_over_the_image_and_usage_is_counted_over_all_images(pairs: Path) -> None:
    folder, out = stage_1(pairs / "weights"), pairs / "out"
    summary = run(pairs / "vi", None, out, str(folder), "cpu")
    assert "infrared" not in summary
    tokenizer, card = load_tokenizer(folder)
    assert card["step"] == 7
    seen: set[int] = set()
    for name, (height, width) in (("a", (37, 43)), ("b", (40, 29))):
        image = torch.from_numpy(np.array(Image.open(pairs / "vi" / f"{name}.png"))).permute(2, 0, 1)[None] / 255
        bottom, right = -height % 4, -width % 4
        padded = torch.nn.functional.pad(image, (0, right, 0, bottom), mode="replicate")
        codes = tokenizer.encode(0, padded)[1]
        assert codes is not None
        own = set(codes.flatten().tolist())
        seen |= own
        assert summary["images"][name]["visible"]["codebook_usage"] == pytest.approx(100 * len(own) / 32, abs=1e-3)
        picture = np.asarray(Image.open(out / f"{name}_visible_codes.png"))
        assert picture.shape == (height, width, 3)
        # one colour a code and one code a colour: cell (2, 3) covers rows 8-11 and columns 12-15
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) == len(own)
        assert (picture[8:12, 12:16] == picture[8, 12]).all()
    assert summary["visible"]["codebook_usage"] == pytest.approx(100 * len(seen) / 32, abs=1e-3)
    assert summary["visible"]["bits_per_pixel"] == 5 / 16


def test_usage_and_perplexity_by_hand() -> None:
    counter = CodeUsage(8)
    counter.update(torch.tensor([[[0], [0]], [[3], [5]]]))  # 0 twice, 3 and 5 once: H = 1.5 bits
    assert counter.usage == pytest.approx(37.5)
    assert counter.perplexity == pytest.approx(2**1.5)
    counter.update(torch.tensor([[3], [5]]))  # now 2, 2, 2
    assert counter.usage == pytest.approx(37.5)
    assert counter.perplexity == pytest.approx(3)
    two = CodeUsage(4)
    two.update(torch.tensor([[0, 1], [0, 2]]))  # first book 1 of 4, second 2 of 4
    assert two.usage == pytest.approx(37.5)
    assert two.perplexity == pytest.approx(1.5)


def test_psnr_by_hand_and_finite_for_equal_images() -> None:
    image = torch.zeros(1, 1, 2, 2)
    off = image.clone()
    off[0, 0, 0, 0] = 0.2  # mse 0.01
    assert psnr(image, off) == pytest.approx(20)
    assert math.isfinite(psnr(image, image))


@pytest.mark.parametrize(
    ("changes", "bits", "books"),
    [
        ({"codebooks": 2}, 2 * 5 / 16, 2),
        ({"shared_codebook": True}, 5 / 16, 1),
        ({"quantizer": "fsq"}, math.log2(240) / 16, 1),
        ({"tokens": "continuous"}, None, 0),
    ],
)
def test_every_kind_of_codebook(pairs: Path, changes: dict, bits: float | None, books: int) -> None:
    folder = stage_1(pairs / "weights", **changes)
    summary = run(pairs / "vi" / "a.png", pairs / "ir" / "a.png", pairs / "out", str(folder), "cpu")
    assert load_tokenizer(folder)[0].bits_per_pixel == bits
    for modality in ("visible", "infrared"):
        assert summary[modality].get("bits_per_pixel") == bits
        picture = pairs / "out" / f"a_{modality}_codes.png"
        assert picture.exists() == (books > 0)
        if books:
            assert Image.open(picture).size == (43 * books, 37)


def test_codes_of_two_books_stand_side_by_side() -> None:
    codes = torch.tensor([[[0, 1], [1, 1]]])  # (1, 2, 2)
    picture = codes_map(codes, 4, 7)
    assert picture.shape == (4, 14, 3)
    assert (picture[0, 4] == picture[0, 7]).all()  # code 1 in either book
    assert (picture[0, 0] != picture[0, 4]).any()


def test_refusals_are_one_line(pairs: Path) -> None:
    folder = stage_1(pairs / "weights", tokens="pixels")
    with pytest.raises(InputError, match="has no decoder"):
        run(pairs / "vi", None, pairs / "out", str(folder), "cpu")
    for more, told in (
        ((None, "caffe"), "--vgg16-input caffe: .* none is given"),
        ((pairs / "no.pt",), "--vgg16 .*no.pt"),
    ):
        with pytest.raises(InputError, match=told):
            run(pairs / "vi", None, pairs / "out", str(stage_1(pairs / "stage_1")), "cpu", *more)
    write_png(pairs / "thin.png", np.zeros((5, 40), np.uint8))
    with pytest.raises(InputError, match="5x40, expected 7 to 4096 a side"):
        run(None, pairs / "thin.png", pairs / "out", str(stage_1(pairs / "other")), "cpu")
    write_png(pairs / "long.png", np.zeros((8, 4097), np.uint8))
    with pytest.raises(InputError, match="8x4097, expected 7 to 4096 a side"):
        run(None, pairs / "long.png", pairs / "out", str(pairs / "other"), "cpu")
