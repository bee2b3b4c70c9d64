"""Stage 1: who learns when, from what, and that a resumed run ends in the same bits."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.vgg import cfgs, make_layers

from fusionsam.config.load import read_settings
from fusionsam.config.schema import Config, LossConfig, preset
from fusionsam.data.images import write_png
from fusionsam.data.loader import class_pixels, class_shares, train_loader
from fusionsam.data.synthetic.scenes import synthesize
from fusionsam.errors import InputError
from fusionsam.metrics.perceptual import EncoderLevels, Vgg16, load_vgg16, perceptual_distance
from fusionsam.metrics.reconstruction import psnr
from fusionsam.models.autoencoder import PixelPatches
from fusionsam.models.discriminator import adaptive_weight, discriminator_loss, generator_loss
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.models.tokenizer import Tokenizer
from fusionsam.training.data import open_data, open_unlabelled
from fusionsam.training.run import train
from fusionsam.training.segmentation_task import SegmentationTask
from fusionsam.training.tokenizer_task import TokenizerTask, tokenizer_task
from fusionsam.types import IGNORE, Batch
from fusionsam.weights.build import build_network
from fusionsam.weights.checkpoint import save_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**train_changes: Any) -> Config:
    config = Config(model=preset("debug"), loss=LossConfig(perceptual_weight=0.0))
    own = {"stage": "tokenizer", "discriminator_width": 5, "discriminator_stages": 2, "ema_decay": 0.0, "lr": 1e-3}
    config.train = replace(config.train, **{**own, "accelerator": "cpu", **train_changes})
    config.data.absent_classes = True  # five small scenes do not show every class
    return config


def batch(count: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 4, 24, 28, generator=generator)
    return Batch(images[:, :3], images[:, 3:], None, torch.ones(count, 2, dtype=torch.bool))


def build(config: Config, phi: Any = None, kind: type[TokenizerTask] = TokenizerTask) -> TokenizerTask:
    torch.manual_seed(1)
    tokenizer = Tokenizer(config.model.tokenizer).train()
    with torch.no_grad():
        tokenizer(batch().visible, batch().infrared)
    return kind(tokenizer, config, lambda step: 1.0, phi)


def fit(task: TokenizerTask, data: Batch, steps: int, folder: Path) -> None:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, DataLoader([data] * steps, batch_size=None))  # type: ignore[arg-type]


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


class Watched(TokenizerTask):
    """Records who had changed, and who held gradients, at the border of the two phases."""

    def training_step(self, batch: Batch, batch_index: int) -> None:
        self.start = state(self.discriminators), state(self.tokenizer)
        self.seen: dict[str, Any] = {}
        super().training_step(batch, batch_index)

    def _judge(self, *args: Any) -> None:
        self.seen["discriminators in the generator's phase"] = changed(self.discriminators, self.start[0])
        self.seen["their gradients"] = [p.grad for p in self.discriminators.parameters() if p.grad is not None]
        self.seen["the generator in its phase"] = changed(self.tokenizer, self.start[1])
        before = state(self.tokenizer)
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in self.tokenizer.named_parameters()}
        super()._judge(*args)
        self.seen["the generator in the discriminators' phase"] = changed(self.tokenizer, before)
        self.seen["its gradients"] = [
            n
            for n, p in self.tokenizer.named_parameters()
            if (p.grad is None) != (gradients[n] is None)
            or (p.grad is not None and not torch.equal(p.grad, gradients[n]))
        ]
        self.seen["the discriminators in their phase"] = changed(self.discriminators, self.start[0])


def test_each_learns_in_its_own_phase_only(tmp_path: Path) -> None:
    task = build(settings(adversarial_start=0), kind=Watched)
    fit(task, batch(), 1, tmp_path)
    assert isinstance(task, Watched)
    seen = task.seen
    assert seen["discriminators in the generator's phase"] == set()
    assert seen["their gradients"] == []
    learned = {name for name, _ in task.tokenizer.named_parameters()} - {"missing"}
    assert learned <= seen["the generator in its phase"]
    assert "missing" not in seen["the generator in its phase"]
    assert any("_codebook.embed_avg" in name for name in seen["the generator in its phase"])
    assert seen["the generator in the discriminators' phase"] == set()
    assert seen["its gradients"] == []
    assert seen["the discriminators in their phase"] == set(task.discriminators.state_dict())


def test_the_discriminator_waits_for_its_step(tmp_path: Path) -> None:
    task = build(settings(adversarial_start=2))
    before = state(task.discriminators)
    fit(task, batch(), 2, tmp_path)
    assert changed(task.discriminators, before) == set()
    assert all(p.grad is None for p in task.discriminators.parameters())
    assert task.trainer.global_step == 2
    after = build(settings(adversarial_start=2))
    fit(after, batch(), 3, tmp_path)
    assert changed(after.discriminators, before) == set(before)
    assert after.trainer.global_step == 3, "the discriminator's steps are not counted: one step a batch"


@pytest.mark.parametrize("form", ["log", "hinge"])
def test_the_gradient_is_that_of_the_whole_sum(form: Any) -> None:
    """All four terms at once, against plain backward of their sum with VQ-GAN's weight taken at the last layer."""
    config = settings(adversarial_start=0, adversarial_loss=form)
    config.loss = LossConfig(
        reconstruction_weight=2.0, commitment_weight=0.7, perceptual_weight=0.3, adversarial_weight=0.4,
        perceptual_share=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    filters = torch.nn.Conv2d(3, 6, 3).requires_grad_(False)
    task = build(config, phi=lambda image: [filters(image)])
    plain = copy.deepcopy(task.tokenizer)
    task.discriminators.requires_grad_(False)
    image = batch().infrared
    rebuilt, gradient, terms = task.generate(1, image)
    ((rebuilt * gradient).sum() + terms["commitment"]).backward()

    latents, _, commitment = plain.encode(1, image)
    again = plain.reconstruct(1, latents)
    kept = 2.0 * ((image - again) ** 2).mean() + 0.3 * perceptual_distance(lambda x: [filters(x)], image[:1], again[:1])
    fooled = generator_loss(task.discriminators[1](again), form)
    last: Any = plain.decoders[1]
    norms = [torch.autograd.grad(x, last.out[-1].weight, retain_graph=True)[0].norm() for x in (kept, fooled)]
    weight = float(0.4 * norms[0] / (norms[1] + 1e-6))
    (kept + weight * fooled + 0.7 * commitment).backward()

    assert float(terms["adversarial_weight"]) == pytest.approx(weight, rel=1e-4)
    for (name, ours), theirs in zip(task.tokenizer.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in task.discriminators.parameters())


def test_what_no_camera_saw_is_no_example(tmp_path: Path) -> None:
    start = build(settings(adversarial_start=0))
    width = start.settings.model.tokenizer.dim
    start.tokenizer.encoders[1] = PixelPatches(1, width)  # whose cells see their own pixels alone
    data = batch()
    covered = torch.ones(2, 2, 24, 28, dtype=torch.bool)
    covered[:, 1, :, 12:] = False
    blank = torch.where(covered[:, 1:], data.infrared, 0.0)
    books = []
    for infrared in (data.infrared, blank):
        task = copy.deepcopy(start)
        fit(task, replace(data, infrared=infrared, covered=covered), 1, tmp_path)
        books.append(task.tokenizer.quantizers[1])
        assert torch.equal(books[0].codebook, books[-1].codebook)
    assert not torch.equal(books[0].codebook, start.tokenizer.quantizers[1].codebook)

    rebuilt, _, _ = start.generate(1, blank, covered[:, 1:])
    assert torch.equal(rebuilt[..., 12:], blank[..., 12:])  # a discriminator cannot tell them apart there
    assert not torch.equal(rebuilt[..., :12], blank[..., :12])
    whole = start.discriminators[1](blank)  # 5 x 6 logits, of which the last three columns are of blank pixels alone
    assert torch.equal(start._judged(1, blank, covered[:, 1:]), whole[..., :3].flatten())

    covered[:, 1] = False  # crops beside infrared's view
    task, before = copy.deepcopy(start), state(start)
    fit(task, replace(data, covered=covered), 1, tmp_path)
    moved = changed(task, before)
    assert any(name.startswith("discriminators.0.") for name in moved)
    assert [name for name in moved if ".encoders.1." in name or ".decoders.1." in name or "quantizers.1." in name] == []
    assert not any(name.startswith("discriminators.1.") for name in moved)


@pytest.mark.parametrize("term", ["reconstruction", "commitment", "perceptual", "adversarial"])
def test_each_term_reaches_what_it_should(term: str) -> None:
    config = settings(adversarial_start=0)
    weights = {f"{name}_weight": 0.0 for name in ("reconstruction", "commitment", "perceptual", "adversarial")}
    config.loss = replace(config.loss, **{**weights, f"{term}_weight": 1.0})
    task = build(config, phi=lambda image: [image.cumsum(-1)])
    if term == "adversarial":  # its weight is a ratio to the reconstruction's gradient: one that vanishes elsewhere
        config.loss.reconstruction_weight = 1.0
    rebuilt, gradient, terms = task.generate(0, batch().visible)
    if term == "adversarial":
        without = 2 * (rebuilt - batch().visible) / rebuilt.numel()
        gradient = gradient - without.detach()
    ((rebuilt * gradient).sum() + terms["commitment"]).backward()

    def reached(module: Any) -> bool:
        return any(p.grad is not None and float(p.grad.abs().max()) > 1e-9 for p in module.parameters())

    tokenizer = task.tokenizer
    assert reached(tokenizer.encoders[0]), "straight through the quantiser"
    assert reached(tokenizer.decoders[0]) == (term != "commitment")
    assert not reached(tokenizer.encoders[1])
    assert not reached(tokenizer.decoders[1])
    assert tokenizer.missing.grad is None


def test_adversarial_terms_by_hand() -> None:
    real, rebuilt = torch.tensor([0.0, math.log(3)]), torch.tensor([0.0, -math.log(3)])  # D: 1/2, 3/4 and 1/2, 1/4
    expected = (math.log(0.5) + math.log(0.75)) / 2
    assert float(discriminator_loss(real, rebuilt, "log")) == pytest.approx(-2 * expected)
    assert float(generator_loss(rebuilt, "log")) == pytest.approx(expected)
    real, rebuilt = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.25])
    assert float(discriminator_loss(real, rebuilt, "hinge")) == pytest.approx(0.25 + 0.625)
    assert float(generator_loss(rebuilt, "hinge")) == pytest.approx(0.875)
    far = torch.tensor([1e4, -1e4])
    assert float(discriminator_loss(far, far, "log")) == pytest.approx(1e4)  # (0 + 1e4)/2 twice, and no overflow


def test_eq_8_is_ascended_by_d_and_descended_by_g() -> None:
    logits = torch.zeros(1, requires_grad=True)
    (for_d,) = torch.autograd.grad(discriminator_loss(torch.zeros(1), logits, "log"), logits)
    (for_g,) = torch.autograd.grad(generator_loss(logits, "log"), logits)
    assert float(for_d) == pytest.approx(0.5)  # descent lowers the logit of a rebuilt image
    assert float(for_g) == pytest.approx(-0.5)  # and the generator raises it, by the same term


def test_adaptive_weight_by_hand() -> None:
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.5]))) == pytest.approx(2.0, rel=1e-5)
    assert float(adaptive_weight(torch.ones(4), torch.zeros(4))) == 1e4
    assert float(adaptive_weight(torch.zeros(4), torch.ones(4))) == 0


# -- Phi ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def vgg(tmp_path: Path) -> tuple[Path, torch.nn.Sequential]:
    torch.manual_seed(2)
    layers = make_layers(cfgs["D"], batch_norm=False)[:9].eval()  # conv1_1 to relu2_2
    path = tmp_path / "vgg.safetensors"
    save_file({f"features.{n}": t for n, t in layers.state_dict().items()}, path)
    return path, layers


def test_vgg16_equals_torchvisions(vgg: tuple[Path, torch.nn.Sequential]) -> None:
    path, layers = vgg
    image = torch.rand(2, 3, 13, 17)
    levels = load_vgg16(path)(image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image - mean[:, None, None]) / std[:, None, None]
    assert len(levels) == 2
    torch.testing.assert_close(levels[0], layers[:4](x))
    torch.testing.assert_close(levels[1], layers(x))


def test_caffe_input_and_what_a_file_says_of_itself(vgg: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    path, layers = vgg
    image = torch.rand(1, 3, 8, 8)
    bgr = image[:, [2, 1, 0]] * 255 - torch.tensor([104.007, 116.669, 122.679])[:, None, None]
    torch.testing.assert_close(load_vgg16(path, "caffe")(image)[1], layers(bgr))
    tensors = {f"features.{n}": t for n, t in layers.state_dict().items()}
    save_file(tensors, tmp_path / "said.safetensors", metadata={"input": "caffe"})
    torch.testing.assert_close(load_vgg16(tmp_path / "said.safetensors")(image)[1], layers(bgr))
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"input": "yuv"})
    with pytest.raises(InputError, match=r"input 'yuv'; expected imagenet or caffe"):
        load_vgg16(tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"features\.0\.weight is \(3, 3, 3, 3\)"):
        Vgg16({"features.0.weight": torch.zeros(3, 3, 3, 3), "features.0.bias": torch.zeros(3)}, "caffe")


@pytest.mark.real
def test_the_published_edge_detectors_vgg(weights_root: Path) -> None:
    path = weights_root / "vgg16_hed_to_conv3_3.safetensors"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    phi = load_vgg16(path, "caffe")
    image = torch.rand(1, 3, 16, 16)
    assert [level.shape[1] for level in phi(image)] == [64, 128, 256]
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    slightly = 0.9 * image + 0.1 * blurred
    assert perceptual_distance(phi, image, blurred) > 3 * perceptual_distance(phi, image, slightly) > 0


def test_perceptual_distance_by_hand_and_where_its_gradient_goes() -> None:
    image, rebuilt = torch.rand(2, 1, 5, 7, requires_grad=True), torch.rand(2, 1, 5, 7, requires_grad=True)

    def phi(x: Tensor) -> list[Tensor]:  # features (3, 4) and (4, 3) where x is 0 and 1: unit vectors with cosine 24/25
        return [torch.cat([3 + x[:, :1], 4 - x[:, :1]], 1), x[:, :1] + 1]

    value = perceptual_distance(phi, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert float(value) == pytest.approx((2 - 2 * 24 / 25) / 2)  # second level: both are the unit vector (1)
    perceptual_distance(phi, image, rebuilt).backward()
    assert image.grad is None
    assert rebuilt.grad is not None
    assert float(rebuilt.grad.abs().max()) > 0


def test_phi_of_an_encoder_is_frozen_and_stays_in_eval(make_debug: Any) -> None:
    phi = EncoderLevels(make_debug().image_encoder)
    assert not any(module.training for module in phi.train(True).modules())
    rebuilt = torch.rand(1, 1, 32, 32, requires_grad=True)
    perceptual_distance(phi, torch.rand(1, 1, 32, 32), rebuilt).backward()
    assert rebuilt.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in phi.parameters())
    config = settings()
    config.loss.perceptual_weight = 0.1
    with pytest.raises(InputError, match="nothing fills the tinyvit image encoder"):
        tokenizer_task(config, 1)


def test_phi_is_filled_by_a_sam_of_its_kind_or_a_checkpoint_of_ours(
    make_debug: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_debug()
    save_checkpoint(tmp_path / "first", first, {})
    config = settings()
    config.loss.perceptual_weight = 0.1
    config.model.start_from = str(tmp_path / "first")
    seen, wanted = tokenizer_task(config, 1)._phi[0].state_dict(), first.image_encoder.state_dict()
    assert all(torch.equal(seen[f"encoder.{name}"], tensor) for name, tensor in wanted.items())
    config.model.start_from, config.model.sam_weights = None, "sam.pt"
    monkeypatch.setattr("fusionsam.training.tokenizer_task.build_network", lambda model: first)
    for kind, fits in (("tinyvit", True), ("sam", False)):
        monkeypatch.setattr(
            "fusionsam.weights.pretrained.sam_parts", lambda source, kind=kind: SimpleNamespace(encoder_kind=kind)
        )
        if fits:
            assert tokenizer_task(config, 1)._phi[0] is not None
        else:
            with pytest.raises(InputError, match="nothing fills the tinyvit image encoder"):
                tokenizer_task(config, 1)


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    synthesize(root, 5, seed=5, size=(64, 80), progress=False)
    return root


def run(root: Path, out: Path, *more: str, resume: bool = False) -> Path:
    own = [f"--data.root={root}", f"--train.out={out}", f"--train.max_steps={STEPS}", "--train.accelerator=cpu"]
    own += ["--train.validate_every=3", "--train.adversarial_start=1", "--data.crop=[32,32]", *more]
    return train(read_settings(CONFIGS / "tokenizer_debug.yaml", *own), resume)


@pytest.fixture(scope="module")
def unbroken(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return run(scenes, tmp_path_factory.mktemp("runs") / "unbroken")


class Power(Exception):
    """Gone."""


@pytest.mark.parametrize(("minutes", "saved"), [("5", 3), ("0", 4)], ids=["by the validation", "between validations"])
def test_resume_is_exact_with_two_optimisers(
    minutes: str, saved: int, scenes: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = TokenizerTask.on_train_batch_start

    def failing(self: TokenizerTask, batch: Batch, batch_idx: int) -> None:
        if self.global_step == 4:
            raise Power
        start(self, batch, batch_idx)

    out, time_between = tmp_path / "broken", f"--train.checkpoint_minutes={minutes}"
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "on_train_batch_start", failing)
        with pytest.raises(Power):
            run(scenes, out, time_between)
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == saved
    torch.manual_seed(99)  # whatever the new process drew before
    run(scenes, out, time_between, resume=True)
    ours, theirs = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (out, unbroken))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    assert [n for n, t in theirs["state_dict"].items() if not torch.equal(ours["state_dict"][n], t)] == []
    for one, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert one["state"].keys() == other["state"].keys() != set()
        for key, moments in other["state"].items():
            assert all(torch.equal(one["state"][key][name], value) for name, value in moments.items())
    for name, tensor in load_file(unbroken / "final" / "model.safetensors").items():
        assert torch.equal(load_file(out / "final" / "model.safetensors")[name], tensor), name


def test_the_best_is_chosen_by_psnr_and_both_modalities_are_logged(unbroken: Path) -> None:
    lines = [json.loads(line) for line in (unbroken / "history.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["val/psnr"] == pytest.approx((line["val/visible_psnr"] + line["val/infrared_psnr"]) / 2, abs=2e-3)
        for name in ("visible", "infrared"):
            assert 0 < line[f"val/{name}_codebook_usage"] <= 100
            assert 1 <= line[f"val/{name}_perplexity"] <= 32
            assert line[f"val/{name}_ssim"] <= 1
    card = json.loads((unbroken / "best" / "training.json").read_text())
    assert card["step"] == max(lines, key=lambda line: line["val/psnr"])["step"]


def test_stage_2_begins_with_stage_1s_tokenizer(unbroken: Path) -> None:
    config = preset("debug")
    config.tokenizer_weights = str(unbroken / "best")
    stored = load_file(unbroken / "best" / "model.safetensors")
    loaded = build_network(config).tokenizer.state_dict()
    assert {f"tokenizer.{name}" for name in loaded} == set(stored)
    assert [name for name, t in loaded.items() if not torch.equal(t, stored[f"tokenizer.{name}"])] == []
    config.tokenizer.codebook_size = 16
    with pytest.raises(InputError, match=r"^model\.tokenizer\.codebook_size: 16, but .* has 32; "):
        build_network(config)


def test_a_frozen_tokenizer_stays_bit_for_bit(scenes: Path, unbroken: Path, tmp_path: Path) -> None:
    own = [f"--data.root={scenes}", f"--train.out={tmp_path / 'joint'}", "--train.max_steps=3", "--data.crop=[64,64]"]
    own += ["--train.accelerator=cpu", "--train.validate_every=2", "--train.ema_decay=0", "--train.batch_size=1"]
    own += [f"--model.tokenizer_weights={unbroken / 'best'}", "--train.freeze_tokenizer=true"]
    train(read_settings(CONFIGS / "debug.yaml", *own, "--data.modality_dropout=0.5", "--data.absent_classes=true"))
    after = load_file(tmp_path / "joint" / "final" / "model.safetensors")
    for name, tensor in load_file(unbroken / "best" / "model.safetensors").items():
        same = torch.equal(after[name], tensor)
        assert same == (name != "tokenizer.missing"), name  # each step dropped one modality


def test_unlabelled_pairs_of_any_size_join_the_stream(scenes: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, size in (("x", (20, 90)), ("y", (51, 47))):
        write_png(tmp_path / "vi" / f"{name}.png", generator.integers(0, 255, (*size, 3), dtype=np.uint8))
        write_png(tmp_path / "ir" / f"{name}.png", generator.integers(0, 255, size, dtype=np.uint8))
    config = settings()
    config.data = replace(
        config.data, root=str(scenes), extra_pairs=[str(tmp_path)], crop=(32, 24), workers=0, rare_sampling=0.0,
        modality_dropout=0.0, rare_crop=0.0,
    )  # fmt: skip
    known, val = open_unlabelled(config)
    seen: set[str] = set()
    for found in train_loader(known, config.data, [], 1, 0, steps=len(known)):
        assert found.visible.shape == (1, 3, 32, 24)
        assert found.label is None
        seen |= set(found.ids)
    assert {"x", "y"} < seen
    assert not {entry.id for entry in val.entries} & seen
    # labels beside them may be of other classes: stage 2 does not read them
    for name, size in (("x", (20, 90)), ("y", (51, 47))):
        write_png(tmp_path / "labels" / f"{name}.png", np.full(size, 3, np.uint8))
    config.data.extra_share, config.data.crop = 0.5, (64, 64)
    labelled, _ = open_data(config)
    task = SegmentationTask(FusionSAMNetwork(config.model), config, 1, class_shares(labelled))
    for found in train_loader(labelled, config.data, [1], 2, 0, steps=40):  # stage 2
        strangers = [n in ("x", "y") for n in found.ids]
        if strangers == [True, False]:
            break
    assert (found.label[0] == IGNORE).all()
    assert (found.label[1] != IGNORE).any()
    first = (found.visible[:1], found.infrared[:1])
    alone = Batch(*first, None, found.present[:1], ["x"])
    terms = task.losses(task.network(alone.visible, alone.infrared), alone)
    assert "segmentation" not in terms
    assert terms["fusion"].item() > 0


def test_label_maps_of_extra_pairs_are_read(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for name in ("x", "y"):
        write_png(tmp_path / "pairs" / "vi" / f"{name}.png", generator.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        write_png(tmp_path / "pairs" / "ir" / f"{name}.png", generator.integers(0, 255, (64, 64), dtype=np.uint8))
    guessed = np.full((64, 64), 2, np.uint8)
    guessed[:32] = IGNORE
    write_png(tmp_path / "guessed" / "x_labels.png", guessed)
    config = settings()
    config.data = replace(
        config.data, root=str(scenes), extra_pairs=[str(tmp_path / "pairs")], extra_labels=[str(tmp_path / "guessed")]
    )
    train_set, _ = open_data(config)
    known = {entry.id: (entry, train_set.label(index)) for index, entry in enumerate(train_set.entries)}
    assert np.array_equal(known["x"][1], guessed)
    assert known["y"][1] is None
    assert [entry.id for entry, _ in known.values() if entry.extra] == ["x", "y"]
    assert int(class_pixels(train_set)[-2:].sum()) == 0
    assert f"1 of 2 pairs have a label map in {tmp_path / 'guessed'}" in capsys.readouterr().out
    config.data.extra_labels = [""]
    assert all(entry.label is None for entry in open_data(config)[0].entries if entry.extra)
    config.data.extra_labels = [str(tmp_path / "guessed"), "another"]
    with pytest.raises(InputError, match=r"^data\.extra_labels: 2 folders for 1 of data\.extra_pairs"):
        open_data(config)
    config.data.extra_labels = [str(tmp_path / "guessed")]
    told = tmp_path / "guessed" / "x.json"
    told.write_text(json.dumps({"classes": {"unlabeled": {"id": 0}, "car": {"id": 2}}}))
    with pytest.raises(InputError, match=r"x\.json has class 2 as 'car', in data set mfnet it is 'person'"):
        open_data(config)
    told.write_text(json.dumps({"classes": {"unlabeled": {"id": 0}, "person": {"id": 2}}}))
    write_png(tmp_path / "guessed" / "x_labels.png", np.full((64, 64), 9, np.uint8))
    with pytest.raises(InputError, match=r"x_labels\.png: label ids \[9\] are outside of 0\.\.8"):
        open_data(config)[0].label(len(train_set) - 2)


def test_a_validation_image_among_the_extra_pairs_is_refused(scenes: Path, tmp_path: Path) -> None:
    from fusionsam.data.dataset import open_split

    sample = open_split("mfnet", scenes, "val")[0]
    assert sample.visible is not None
    assert sample.infrared is not None
    write_png(tmp_path / "vi" / "copy.png", sample.visible)
    write_png(tmp_path / "ir" / "copy.png", sample.infrared)
    config = settings()
    config.data = replace(config.data, root=str(scenes), extra_pairs=[str(tmp_path)])
    with pytest.raises(InputError, match="share 1 images"):
        open_unlabelled(config)


def test_one_pair_is_learned_by_heart(tmp_path: Path) -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    visible = torch.stack([rows, columns, (rows > columns).float()])[None]
    pair = Batch(visible, (1 - rows)[None, None], None, torch.ones(1, 2, dtype=torch.bool))
    config = settings(lr=5e-3, adversarial_start=10_000)
    config.loss.reconstruction_weight = 10.0
    task = build(config)

    def quality() -> list[float]:
        with torch.no_grad():
            images = (pair.visible, pair.infrared)
            return [psnr(image, task.tokenizer.eval().rebuild(i, image)[0]) for i, image in enumerate(images)]

    before = quality()
    task.tokenizer.train()
    fit(task, pair, 80, tmp_path)
    after = quality()
    assert after[0] > before[0] + 8
    assert after[1] > before[1] + 8


def test_pixel_tokens_and_half_precision_are_refused() -> None:
    config = settings(precision="16-mixed")
    with pytest.raises(InputError, match="16-mixed"):
        build(config)
    config = settings()
    config.model.tokenizer.tokens = "pixels"
    with pytest.raises(InputError, match="no decoder"):
        TokenizerTask(Tokenizer(config.model.tokenizer), config, lambda step: 1.0)
