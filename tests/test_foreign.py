"""Foreign weights: names, folding, refusals. The renaming here is written apart from the package's, in reverse."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from timm.models.tiny_vit import TinyVit
from torch import nn
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from conftest import SAM_DECODER, SAM_PROMPT
from fusionsam.errors import InputError
from fusionsam.models.encoders.tinyvit import TinyViT
from fusionsam.weights import pretrained as foreign

SAM = {
    "vision_encoder.": "image_encoder.",
    "patch_embed.projection": "patch_embed.proj",
    "neck.conv1": "neck.0",
    "neck.layer_norm1": "neck.1",
    "neck.conv2": "neck.2",
    "neck.layer_norm2": "neck.3",
    "mask_embed.conv1": "mask_downscaling.0",
    "mask_embed.layer_norm1": "mask_downscaling.1",
    "mask_embed.conv2": "mask_downscaling.3",
    "mask_embed.layer_norm2": "mask_downscaling.4",
    "mask_embed.conv3": "mask_downscaling.6",
    "prompt_encoder.point_embed": "prompt_encoder.point_embeddings",
    "shared_embedding.positional_embedding": "pe_layer.positional_encoding_gaussian_matrix",
    "upscale_conv1": "output_upscaling.0",
    "upscale_layer_norm": "output_upscaling.1",
    "upscale_conv2": "output_upscaling.3",
    "layer_norm_final_attn": "norm_final_attn",
    ".layer_norm": ".norm",
}
SAM2 = {
    "vision_encoder.neck": "image_encoder.neck",
    "vision_encoder.backbone.": "image_encoder.trunk.",
    "prompt_encoder.": "sam_prompt_encoder.",
    "mask_decoder.": "sam_mask_decoder.",
    "o_proj": "out_proj",
    "no_memory_embedding": "no_mem_embed",
    **SAM,
}


def to_official(name: str, table: dict[str, str]) -> str:
    """A transformers name as the original repositories write it."""
    if table is SAM:
        name = name.replace("vision_encoder.layers", "vision_encoder.blocks")
    else:
        name = re.sub(r"(neck\.convs\.\d)\.", r"\1.conv.", name)
        name = re.sub(r"(transformer|backbone)(.*mlp)\.proj_in", r"\1\2.layers.0", name)
        name = re.sub(r"(transformer|backbone)(.*mlp)\.proj_out", r"\1\2.layers.1", name)
    name = re.sub(r"(hypernetworks_mlps\.\d|_head)\.layers\.0", r"\1.layers.1", name)
    name = re.sub(r"(hypernetworks_mlps\.\d|_head)\.proj_in", r"\1.layers.0", name)
    name = re.sub(r"(hypernetworks_mlps\.\d|_head)\.proj_out", r"\1.layers.2", name)
    for theirs, original in table.items():
        name = name.replace(theirs, original)
    return name


def same(left: dict, right: dict) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=0, msg=name)


def parts_equal(left: foreign.SamParts, right: foreign.SamParts) -> None:
    assert left.encoder_kind == right.encoder_kind
    for part in ("image_encoder", "prompt_encoder", "mask_decoder", "extras"):
        same(getattr(left, part), getattr(right, part))


def test_sam_folder_fills_transformers_own_modules(sam):
    model, folder = sam
    parts = foreign.sam_parts(folder)
    same(parts.image_encoder, model.vision_encoder.state_dict())
    same(parts.prompt_encoder, model.prompt_encoder.state_dict())
    same(parts.mask_decoder, model.mask_decoder.state_dict())


def test_official_sam_names_give_the_same_tensors(sam, tmp_path):
    model, folder = sam
    state = {to_official(n, SAM): t for n, t in model.state_dict().items() if not n.startswith("shared_image")}
    assert "image_encoder.blocks.1.norm2.bias" in state
    assert "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight" in state
    torch.save(state, tmp_path / "sam_vit_x.pth")
    parts_equal(foreign.sam_parts(tmp_path / "sam_vit_x.pth"), foreign.sam_parts(folder))


def test_a_file_takes_another_decoder_and_keeps_its_names_and_all_else(sam, tmp_path):
    state = {to_official(n, SAM): t for n, t in sam[0].state_dict().items() if not n.startswith("shared_image")}
    torch.save(state, tmp_path / "sam.pth")
    parts = foreign.sam_parts(tmp_path / "sam.pth")
    other = {name: tensor + 1 for name, tensor in parts.mask_decoder.items()}
    found = foreign.with_prompted_parts(tmp_path / "sam.pth", parts.prompt_encoder, other)
    assert set(found) == set(state)
    for name, tensor in state.items():
        wanted = tensor + 1 if name.startswith("mask_decoder.") else tensor
        torch.testing.assert_close(found[name], wanted.half(), rtol=0, atol=0, msg=name)
    other.pop("iou_token.weight")
    with pytest.raises(InputError, match=r"mask_decoder\.iou_token\.weight has no tensor"):
        foreign.with_prompted_parts(tmp_path / "sam.pth", parts.prompt_encoder, other)
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="own format"):
        foreign.with_prompted_parts(tmp_path / "other.pth", parts.prompt_encoder, other)


def test_official_sam2_names_give_the_same_tensors(sam2, tmp_path):
    model, folder = sam2
    state = {to_official(n, SAM2): t for n, t in model.state_dict().items() if not n.startswith("shared_image")}
    stacked = state.pop("sam_prompt_encoder.point_embeddings.weight")
    state |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": stacked[i : i + 1] for i in range(4)}
    state |= {"memory_attention.norm.weight": torch.ones(3), "obj_ptr_proj.layers.0.bias": torch.ones(3)}
    assert "image_encoder.trunk.blocks.2.mlp.layers.1.bias" in state
    assert "image_encoder.neck.convs.0.conv.weight" in state
    torch.save({"model": state}, tmp_path / "sam2.1_x.pt")
    parts_equal(foreign.sam_parts(str(tmp_path / "sam2.1_x.pt")), foreign.sam_parts(folder))


def test_sam2_decoder_runs_as_sams(sam2):
    model, folder = sam2
    parts = foreign.sam_parts(folder)
    changed = {"iou_head_hidden_dim": 32, "layer_norm_eps": 1e-5}  # SAM2's two-way layers keep PyTorch's epsilon
    config = SamConfig(prompt_encoder_config=SAM_PROMPT, mask_decoder_config={**SAM_DECODER, **changed})
    config.mask_decoder_config._attn_implementation = "eager"
    config.vision_config.num_pos_feats = 16
    prompt = SamPromptEncoder(config).eval()
    decoder = SamMaskDecoder(config.mask_decoder_config).eval()
    foreign.load_exactly(prompt, parts.prompt_encoder, "prompt encoder")
    foreign.load_exactly(decoder, parts.mask_decoder, "mask decoder")
    assert {"conv_s0.weight", "conv_s0.bias", "conv_s1.weight", "conv_s1.bias"} == set(parts.extras)
    tokens, image, place = torch.randn(2, 1, 5, 32), torch.randn(2, 32, 3, 4), torch.randn(2, 32, 3, 4)
    ours = decoder.transformer(tokens, image, place, attention_similarity=None)
    theirs = model.mask_decoder.transformer(tokens, image, place, attention_similarity=None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    points, labels = torch.rand(1, 1, 3, 2) * 64, torch.tensor([[[1, 0, -1]]])
    torch.testing.assert_close(
        prompt(points, labels, None, None)[0], model.prompt_encoder(points, labels, None, None)[0], rtol=0, atol=1e-6
    )


def mobile_names(state: dict) -> dict:
    """timm's TinyViT names as MobileSAM's: merges stand at the end of a stage there, at the start here."""
    out = {}
    for name, tensor in state.items():
        name = re.sub(r"^patch_embed\.conv([12])\.", lambda m: f"patch_embed.seq.{2 * int(m[1]) - 2}.", name)
        name = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        name = name.replace("stages.", "layers.").replace(".conv.weight", ".c.weight")
        out[f"image_encoder.{name}"] = tensor
    return out


def test_unfolded_mobile_sam_equals_timms_tiny_vit(sam, tmp_path):
    torch.manual_seed(2)
    theirs = TinyVit(num_classes=5, embed_dims=(8, 32, 64, 96), depths=(2, 1, 2, 1), num_heads=(1, 1, 2, 3))
    theirs.stages[3].downsample.conv2.conv.stride = (1, 1)  # MobileSAM's last merge keeps the size
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.3)
    theirs.eval()
    ours = TinyViT((8, 32, 64, 96), (2, 1, 2, 1), embed_dim=32).eval()
    state = {n: t for n, t in mobile_names(theirs.state_dict()).items() if ".head." not in n}
    state |= {f"image_encoder.{n}": t for n, t in ours.state_dict().items() if n.startswith("neck.")}
    state |= {"image_encoder.norm_head.weight": torch.ones(7), "image_encoder.head.bias": torch.ones(7)}
    rest = {n: t for n, t in sam[0].state_dict().items() if n.startswith(("prompt_encoder.", "mask_decoder."))}
    torch.save({**state, **{to_official(n, SAM): t for n, t in rest.items()}}, tmp_path / "mobile_sam.pt")
    parts = foreign.sam_parts(tmp_path / "mobile_sam.pt")
    assert parts.encoder_kind == "tinyvit"
    same(parts.mask_decoder, sam[0].mask_decoder.state_dict())
    foreign.load_exactly(ours, parts.image_encoder, "image encoder")
    image = torch.randn(2, 3, 80, 208)  # 20 x 52, 10 x 26, 5 x 13: no multiple of a window
    with torch.no_grad():
        expected = theirs.stages(theirs.patch_embed(image))
        embedding, levels = ours(image)
    torch.testing.assert_close(levels[2], expected, rtol=1e-4, atol=1e-4)
    assert embedding.shape == (2, 32, 5, 13)


def test_folded_convolution_equals_convolution_and_batch_norm():
    torch.manual_seed(3)
    conv, norm = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 2)
    state = {"a.c.weight": conv.weight, **{f"a.bn.{n}": t for n, t in norm.state_dict().items()}}
    folded = foreign.fold_batch_norms(state)
    assert set(folded) == {"a.c.weight", "a.c.bias"}
    x = torch.randn(2, 4, 7, 5)
    ours = nn.functional.conv2d(x, folded["a.c.weight"], folded["a.c.bias"], groups=2)
    torch.testing.assert_close(ours, norm(conv(x)))
    del state["a.bn.bias"]
    with pytest.raises(InputError, match=r"a\.bn\.bias missing"):
        foreign.fold_batch_norms(state)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("1.bias"), r"mine: tensor 1\.bias missing"),
        (lambda t: t.update(stray=torch.ones(1)), r"mine: tensor stray not in the model"),
        (lambda t: t.update({"0.weight": torch.ones(3, 5)}), r"mine: 0\.weight has shape \(3, 5\).*\(5, 3\)"),
    ],
)
def test_load_exactly_refuses_by_name_and_copies_nothing(change, told):
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    before = {n: t.clone() for n, t in module.state_dict().items()}
    tensors = {n: t + 1 for n, t in before.items()}
    change(tensors)
    with pytest.raises(InputError, match=told) as caught:
        foreign.load_exactly(module, tensors, "mine")
    assert "\n" not in str(caught.value)
    same(before, module.state_dict())


def test_load_exactly_leaves_only_what_is_allowed():
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    kept = module[1].weight.clone()
    foreign.load_exactly(module, {"0.weight": torch.ones(5, 3), "0.bias": torch.ones(5)}, "mine", ("1.",))
    assert bool((module[0].weight == 1).all())
    torch.testing.assert_close(module[1].weight, kept)


def test_load_exactly_sees_through_adapters_unless_the_names_are_our_own():
    module = nn.Module()
    module.proj = nn.ModuleDict({"base_layer": nn.Linear(3, 5), "lora_A": nn.Linear(3, 2)})
    adapter = module.proj["lora_A"].weight.clone()
    plain = {"proj.weight": torch.ones(5, 3), "proj.bias": torch.ones(5)}
    foreign.load_exactly(module, plain, "mine")
    assert bool((module.proj["base_layer"].weight == 1).all())
    torch.testing.assert_close(module.proj["lora_A"].weight, adapter)
    with pytest.raises(InputError, match=r"proj\.base_layer\.weight.* missing"):
        foreign.load_exactly(module, plain, "mine", own_names=True)
    own = {n: t + 2 for n, t in module.state_dict().items()}
    foreign.load_exactly(module, own, "mine", own_names=True)
    torch.testing.assert_close(module.proj["lora_A"].weight, adapter + 2)


def test_a_tensor_without_a_place_is_refused(sam, tmp_path):
    state = {to_official(n, SAM): t for n, t in sam[0].state_dict().items() if not n.startswith("shared_image")}
    torch.save({**state, "surprise.weight": torch.ones(2)}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"surprise\.weight has no place in official SAM"):
        foreign.sam_parts(tmp_path / "odd.pth")
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"none of MobileSAM.*first tensor layer\.weight"):
        foreign.sam_parts(tmp_path / "other.safetensors")


class Trap:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    "kind", ["text.pth", "empty.pt", "cut.safetensors", "cut.pth", "trap.pt", "list.pt", "absent.pth"]
)
def test_unreadable_files_are_told_in_one_line(kind, tmp_path, capsys):
    path = tmp_path / kind
    whole = tmp_path / f"whole{path.suffix}"
    save_file({"a": torch.ones(99)}, whole) if path.suffix == ".safetensors" else torch.save(
        {"a": torch.ones(99)}, whole
    )
    if kind.startswith("cut"):
        path.write_bytes(whole.read_bytes()[:-200])
    elif kind.startswith(("text", "empty")):
        path.write_text("not a tensor\n" if kind.startswith("text") else "")
    elif not kind.startswith("absent"):
        torch.save(Trap() if kind.startswith("trap") else [1, 2], path)
    with pytest.raises(InputError) as caught:
        foreign.read_tensors(path)
    assert kind in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def test_read_ordered_goes_by_place_and_checks_every_shape(tmp_path):
    torch.save({"x": torch.ones(2, 3), "y": torch.full((3,), 2.0)}, tmp_path / "o.pth")
    names = ["conv.weight", "bn.weight", "bn.num_batches_tracked"]
    read = foreign.read_ordered(tmp_path / "o.pth", names, [(2, 3), (3,), ()])
    assert list(read) == names
    assert read["bn.weight"].tolist() == [2, 2, 2]
    assert read["bn.num_batches_tracked"].item() == 0
    with pytest.raises(InputError, match=r"y has shape \(3,\), bn\.weight needs \(4,\)"):
        foreign.read_ordered(tmp_path / "o.pth", names, [(2, 3), (4,), ()])
    with pytest.raises(InputError, match="2 tensors, 1 expected"):
        foreign.read_ordered(tmp_path / "o.pth", names[:1], [(2, 3)])
