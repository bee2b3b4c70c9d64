"""The FOT decoder against transformers' SAM from the same weights, and how it is widened."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from fusionsam.config.schema import DecoderConfig
from fusionsam.models import sam as sam_parts
from fusionsam.models.mask_decoder import FullFledgedMaskDecoder
from fusionsam.models.prompts import PromptEncoder
from fusionsam.types import Frame, Prompts
from fusionsam.weights import pretrained as foreign

EXACT = {"rtol": 1e-5, "atol": 1e-5}
OURS = DecoderConfig(hidden=32, mlp_dim=40, heads=2, fine_features=False, logit_scale=1.0)


@pytest.fixture(scope="module")
def sam() -> SamModel:
    """A whole SamModel of random weights: 64 x 64 pixels, a grid of 4 x 4."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 24, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64,
        "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 44,
    }  # fmt: skip
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 32, "mlp_dim": 40, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def decoder_from(sam: SamModel, classes: int, config: DecoderConfig = OURS, **levels) -> FullFledgedMaskDecoder:
    levels = levels or {"level_channels": [], "level_strides": []}
    decoder = FullFledgedMaskDecoder(config, classes, **levels)
    tensors = decoder.start_from_sam(sam.mask_decoder.state_dict())
    foreign.load_exactly(decoder.sam, tensors, "sam")
    return decoder.eval()


def inputs() -> tuple[torch.Tensor, ...]:
    """Embedding, positions, sparse, dense on a grid of 5 x 7, batch 2."""
    torch.manual_seed(1)
    return torch.randn(2, 32, 5, 7), torch.randn(1, 32, 5, 7), torch.randn(2, 1, 3, 32), torch.randn(2, 32, 5, 7)


def test_prompt_encoder_and_decoder_have_transformers_tensors_and_begin_alike():
    """Names, shapes and the random numbers drawn from one seed: checkpoints and runs of either fit the other."""
    vision = {"hidden_size": 8, "num_hidden_layers": 0, "num_pos_feats": 16}
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32},
        mask_decoder_config={
            "hidden_size": 32, "mlp_dim": 40, "num_attention_heads": 2, "num_multimask_outputs": 6,
            "iou_head_hidden_dim": 32,
        },
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = SamPromptEncoder(config), SamMaskDecoder(config.mask_decoder_config)
    torch.manual_seed(3)
    ours = sam_parts.SamPromptEncoder(32), sam_parts.SamMaskDecoder(32, 2, 40, 2, 7)
    for one, two in zip(theirs, ours, strict=True):
        expected, found = one.state_dict(), two.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
def test_prompts_are_transformers_to_the_last_bit(sam):
    ours = sam_parts.SamPromptEncoder(32)
    ours.load_state_dict(sam.prompt_encoder.state_dict())
    theirs = copy.deepcopy(sam.prompt_encoder)
    theirs.input_image_size = sam_parts.SIDE
    points = torch.tensor([[[[3.0, 900.5], [700.25, 11.0], [0.0, 0.0]]]])
    labels = torch.tensor([[[1, 0, -1]]])
    for pad in (True, False):
        assert torch.equal(ours.embed_points(points, labels, pad), theirs._embed_points(points, labels, pad))
    boxes = torch.tensor([[[1.0, 2.0, 300.0, 400.0], [5.0, 6.0, 7.0, 8.0]]])
    assert torch.equal(ours.embed_boxes(boxes), theirs._embed_boxes(boxes))
    mask = torch.randn(2, 1, 20, 28)
    assert torch.equal(ours.mask_embed(mask), theirs.mask_embed(mask))


@torch.no_grad()
def test_sams_four_tokens_give_sams_masks(sam):
    embedding, positions, sparse, dense = inputs()
    for tokens in (sparse, None):
        logits, _ = decoder_from(sam, 4)(embedding, positions, tokens, dense, [])
        for multimask, masks in ((False, logits[:, :1]), (True, logits[:, 1:])):
            expected, _ = sam.mask_decoder(embedding, positions.repeat(2, 1, 1, 1), tokens, dense, multimask)
            assert torch.equal(masks, expected[:, 0])


@torch.no_grad()
def test_the_prompted_path_equals_sam_from_points_to_masks(sam, tmp_path):
    sam.save_pretrained(tmp_path)
    parts = foreign.sam_parts(tmp_path)
    decoder = FullFledgedMaskDecoder(OURS, 4, [], [])
    foreign.load_exactly(decoder.sam, decoder.start_from_sam(parts.mask_decoder), "sam")
    encoder = PromptEncoder(OURS)
    foreign.load_exactly(encoder.sam, parts.prompt_encoder, "sam")

    torch.manual_seed(2)
    pixels = torch.randn(2, 3, 64, 64)
    points = torch.tensor([[[3.0, 7.0], [50.5, 61.0]], [[11.0, 13.0], [0.0, 0.0]]])
    labels = torch.tensor([[1, 0], [1, -1]])
    boxes = torch.tensor([[[5.0, 7.0, 41.0, 53.0]], [[1.0, 2.0, 30.0, 59.0]]])
    mask = torch.randn(2, 1, 16, 16)
    frame, grid = Frame((64, 64), (64, 64)), (4, 4)
    embedding = sam.get_image_embeddings(pixels)
    cases = {
        "points and box": ((points, labels, boxes, None), {"input_boxes": boxes}),
        "points and mask": ((points, labels, None, mask), {"input_masks": mask}),
    }
    for name, (ours, theirs) in cases.items():
        sparse, dense = encoder(Prompts(*ours), (64, 64), frame, grid, use_mask=True)
        logits, _ = decoder.eval()(embedding, encoder.positions(grid), sparse, dense, [])
        expected = sam(pixels, input_points=points[:, None], input_labels=labels[:, None], **theirs).pred_masks
        torch.testing.assert_close(logits[:, 1:], expected[:, 0], **EXACT, msg=lambda t, n=name: f"{n}: {t}")


@torch.no_grad()
def test_a_class_token_begins_as_one_of_sams(sam):
    torch.manual_seed(3)
    wide = decoder_from(sam, 9)
    source = sam.mask_decoder
    tokens, theirs = wide.sam.mask_tokens.weight, source.mask_tokens.weight
    noise = tokens - theirs[[0, 1, 2, 3, 0, 1, 2, 3, 0]]
    assert 0.01 * theirs.std() < noise.std() < 0.03 * theirs.std()
    assert not torch.equal(tokens[0], tokens[4])
    for k, mlp in enumerate(wide.sam.output_hypernetworks_mlps):
        for name, value in mlp.state_dict().items():
            assert torch.equal(value, source.output_hypernetworks_mlps[k % 4].state_dict()[name]), (k, name)
    for name in ("transformer.layers.0.mlp.lin1.weight", "upscale_conv1.weight", "iou_token.weight"):
        assert torch.equal(wide.sam.state_dict()[name], source.state_dict()[name])
    # without the noise, classes that share an origin share their mask
    wide.sam.mask_tokens.weight.copy_(theirs[[0, 1, 2, 3, 0, 1, 2, 3, 0]])
    logits, _ = wide(*inputs(), [])
    torch.testing.assert_close(logits[:, 4:8], logits[:, :4], **EXACT)
    assert not torch.allclose(logits[:, 0], logits[:, 1], atol=1e-2)


@torch.no_grad()
def test_skips_begin_as_nothing_and_logits_are_scaled(sam):
    fine = DecoderConfig(hidden=32, mlp_dim=40, heads=2, fine_features=True, logit_scale=0.05)
    plain = decoder_from(sam, 4)
    skipping = decoder_from(sam, 4, fine, level_channels=[3, 5, 11], level_strides=[4, 8, 16])
    levels = [torch.randn(2, 3, 20, 28), torch.randn(2, 5, 10, 14), torch.randn(2, 11, 5, 7)]
    logits, features = plain(*inputs(), [])
    scaled, same = skipping(*inputs(), levels)
    torch.testing.assert_close(same, features, **EXACT)
    torch.testing.assert_close(scaled, 0.05 * logits, **EXACT)
    for stride in ("4", "8"):
        torch.nn.init.normal_(skipping.fine[stride].weight)
        _, now = skipping(*inputs(), levels)
        assert not torch.allclose(now, same, atol=1e-2), stride
        same = now
