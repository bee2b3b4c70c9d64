"""Learning: which parameters the joint losses reach, the way through a frozen encoder, labels, and every variant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusionsam.config.schema import Config, EncoderConfig, TrainConfig
from fusionsam.training.distill_task import DistillTask
from fusionsam.training.segmentation_task import SegmentationTask, parameter_groups
from fusionsam.types import Batch

# what no step of joint training can reach, and why: it must not ask for gradients either
UNREACHED = {
    "mask_decoder.sam.iou_prediction_head.": "SAM's own estimate of mask quality, which classes have no use for",
    "prompt_encoder.sam.no_mask_embed.": "stands where there is no mask prompt; the model always has one",
    "prompt_encoder.sam.shared_embedding.": "SAM's fixed table of frequencies",
    "prompt_encoder.sam.point_embed.0.": "points off the object: only a person gives them",
}


def joint_batch(seed: int = 0, labelled: bool = True) -> Batch:
    """Three pairs of 64 x 64, one without infrared and one without visible."""
    generator = torch.Generator().manual_seed(seed)
    visible, infrared = torch.rand(3, 3, 64, 64, generator=generator), torch.rand(3, 1, 64, 64, generator=generator)
    present = torch.tensor([[True, True], [True, False], [False, True]])
    label = torch.randint(0, 9, (3, 64, 64), generator=generator) if labelled else None
    there = present[:, :, None, None, None].float()
    return Batch(visible * there[:, 0], infrared * there[:, 1], label, present, ["a", "b", "c"])


def task_for(network) -> SegmentationTask:
    config = Config(model=network.config)
    config.train.ema_decay = 0.0
    return SegmentationTask(network, config, total_steps=7, shares=torch.full((9,), 1 / 9))


def wake(network: nn.Module) -> None:
    """Layers that begin at zero stop what lies before them from learning in the first step; give them values."""
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def learn(network, batch: Batch | None = None) -> dict[str, torch.Tensor]:
    """One backward pass of all joint losses in training mode; the named terms."""
    batch = batch or joint_batch()
    torch.manual_seed(4)
    network.train()
    output = network(batch.visible, batch.infrared, present=batch.present)
    terms = task_for(network).losses(output, batch)
    torch.stack(list(terms.values())).sum().backward()
    return terms


def reached(network) -> set[str]:
    return {n for n, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())}


def check_finite(network) -> None:
    for name, parameter in network.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("training", ["full", "lora", "frozen"])
def test_joint_losses_reach_what_is_trainable_and_nothing_else(make_debug, training):
    network = make_debug(lambda config: setattr(config.encoder, "training", training))
    wake(network)
    terms = learn(network)
    assert set(terms) == {"segmentation", "fot", "prompt", "fusion", "commitment", "reconstruction"}
    check_finite(network)
    trainable = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trainable == reached(network)
    fixed = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert all(any(n.startswith(prefix) for n in fixed) for prefix in UNREACHED)
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
    frozen = sum(not p.requires_grad for p in network.image_encoder.parameters())
    assert bool(frozen) is (training != "full")


def test_backbones_learn_more_slowly_than_what_joins_them_to_the_rest(make_debug):
    network = make_debug(lambda c: setattr(c, "encoder", EncoderConfig(guided=True, thermal=True)))
    train = TrainConfig(lr=1.0, encoder_lr_factor=0.25, sam_lr_factor=0.5)
    rates = {id(p): group["lr"] for group in parameter_groups(network, train) for p in group["params"]}
    found = {name: rates[id(p)] for name, p in network.named_parameters() if p.requires_grad}
    encoder = {name.split(".")[1]: rate for name, rate in found.items() if name.startswith("image_encoder.")}
    assert {name for name, rate in encoder.items() if rate == 0.25} == {"backbone", "thermal"}
    new = {"lateral16", "lateral32", "neck", "guide", "inject"}
    assert {name for name, rate in encoder.items() if rate == 1.0} == new
    assert {rate for name, rate in found.items() if name.startswith(("prompt_encoder.", "mask_decoder."))} == {0.5}
    assert {rate for name, rate in found.items() if name.startswith(("tokenizer.", "fusion.", "head."))} == {1.0}


def test_no_table_decays(make_debug):
    network = make_debug(lambda c: setattr(c.tokenizer, "codebook_update", "gradient"))
    groups = parameter_groups(network, TrainConfig(weight_decay=0.1))
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    tables = [name for name, p in network.named_parameters() if name.endswith("_codebook.embed") and p.requires_grad]
    assert tables
    assert not [name for name, p in network.named_parameters() if name in tables and id(p) in decaying]
    assert decaying


def test_in_stage_distill_nothing_of_the_encoder_is_new(make_debug):
    whole = EncoderConfig(guided=True, thermal=True)
    student, teacher = (make_debug(lambda c: setattr(c, "encoder", whole)) for _ in range(2))
    train = TrainConfig(stage="distill", distill=["image_encoder"], lr=1.0, encoder_lr_factor=0.25, warmup_steps=0)
    task = DistillTask(student, teacher, Config(train=train), 1)
    groups = task.configure_optimizers()["optimizer"].param_groups
    assert {group["initial_lr"] for group in groups} == {0.25}
    taught = {id(p) for group in groups for p in group["params"]}
    assert taught == {id(p) for p in student.image_encoder.parameters() if p.requires_grad}


def test_a_frozen_encoder_passes_gradients_on_to_lstg_and_fmp(make_debug):
    network = make_debug(lambda config: setattr(config.encoder, "training", "frozen"))
    wake(network)
    network.train()
    seen = []
    network.image_encoder.register_forward_hook(lambda _, __, features: seen.append(features.embedding))
    batch = joint_batch()
    network(batch.visible, batch.infrared)
    torch.manual_seed(5)
    (seen[0] * torch.randn_like(seen[0])).sum().backward()  # no other loss: only the picture can carry this back
    names = reached(network)
    for index in (0, 1):
        assert f"tokenizer.encoders.{index}.stem.weight" in names
        assert f"tokenizer.quantizers.{index}.vq.project_in.weight" in names
    for name in ("fusion.cross_domain.first.query.weight", "fusion.complementary.feed.up.weight"):
        assert name in names
    assert not any(n.startswith(("image_encoder.", "mask_decoder.", "head.", "fusion.mask_head.")) for n in names)
    check_finite(network)


VARIANTS = {
    "A: pixels": lambda c: setattr(c.tokenizer, "tokens", "pixels"),
    "B: concat": lambda c: setattr(c.fusion, "kind", "concat"),
    "continuous": lambda c: setattr(c.tokenizer, "tokens", "continuous"),
    "fsq": lambda c: setattr(c.tokenizer, "quantizer", "fsq"),
    "shared codebook": lambda c: setattr(c.tokenizer, "shared_codebook", True),
    "codebooks": lambda c: setattr(c.tokenizer, "codebooks", 4),
    "codebook by gradient": lambda c: setattr(c.tokenizer, "codebook_update", "gradient"),
    "separable encoders": lambda c: (setattr(c.tokenizer, "separable", 2), setattr(c.tokenizer, "encoder_width", 6)),
    "decode": lambda c: setattr(c.fusion, "picture_head", "decode"),
    "farther sight": lambda c: setattr(c.fusion, "picture_dilations", (1, 2)),
    "guided": lambda c: setattr(c, "encoder", EncoderConfig(guided=True)),
    "thermal": lambda c: setattr(c, "encoder", EncoderConfig(thermal=True)),
    "no mask prompt": lambda c: setattr(c.prompts, "mask", False),
    "one level": lambda c: (setattr(c.head, "multi_level", False), setattr(c.decoder, "fine_features", False)),
    "pyramid": lambda c: (
        setattr(c, "encoder", EncoderConfig()),
        setattr(c.head, "pyramid", 32),
        setattr(c.head, "width", 32),
    ),
    "letterboxed ViT": None,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_end_to_end(make_debug, variant, sam):
    change = VARIANTS[variant]
    if change is None:

        def change(config):
            config.encoder = EncoderConfig(kind="sam", source=str(sam[1]))

    network = make_debug(change)
    wake(network)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.rand(2, 3, 64, 96, generator=generator),
        torch.rand(2, 1, 64, 96, generator=generator),
        torch.randint(0, 9, (2, 64, 96), generator=generator),
        torch.ones(2, 2, dtype=torch.bool),
    )
    terms = learn(network, batch)
    assert all(term.isfinite() for term in terms.values())
    assert ("reconstruction" in terms) is (variant != "A: pixels")
    check_finite(network)
    names = reached(network)
    first = "embed" if variant == "A: pixels" else "stem"
    for name in (f"tokenizer.encoders.0.{first}.weight", f"tokenizer.encoders.1.{first}.weight", "head.mlp.6.weight"):
        assert name in names
    assert any(n.startswith("image_encoder.backbone.") for n in names)
    assert any(n.startswith("fusion.mask_head.") for n in names)
    if variant == "codebook by gradient":
        assert "tokenizer.quantizers.1.vq._codebook.embed" in names
    with torch.no_grad():
        output = network.eval()(*(torch.rand(1, c, 70, 83) for c in (3, 1)))
    assert output.logits.shape == (1, 9, 70, 83)
    assert output.logits.isfinite().all()


def test_labels_cannot_enter_the_forward_pass(debug, monkeypatch):
    task = task_for(debug).train()
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    monkeypatch.setattr(task, "log_dict", lambda *_, **__: None)
    calls, start = [], {n: t.clone() for n, t in debug.state_dict().items()}

    def spy(_, args, kwargs, output):
        calls.append(([*args, *kwargs.values()], output))

    debug.register_forward_hook(spy, with_kwargs=True)
    losses = []
    for seed in (1, 2):
        debug.load_state_dict(start)
        batch = joint_batch()
        batch.label = torch.randint(0, 9, batch.label.shape, generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(6)
        losses.append(task.training_step(batch, 0))
        for given in calls[-1][0]:
            assert not isinstance(given, torch.Tensor) or given.dtype in (torch.float32, torch.bool)
    assert losses[0] != losses[1]
    for name in ("logits", "fot_logits", "fused", "mask_prompt", "features"):
        assert torch.equal(getattr(calls[0][1], name), getattr(calls[1][1], name)), name


def test_one_batch_is_learned_by_heart(debug):
    """A few steps on one pair lower every supervised term."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, 64, 64, dtype=torch.long)
    label[:, 16:48, 24:56] = 2
    heat = 0.2 + 0.6 * (label == 2).float()[:, None]
    batch = Batch(torch.rand(1, 3, 64, 64, generator=generator), heat, label, torch.ones(1, 2, dtype=torch.bool))
    optimiser = torch.optim.Adam(debug.parameters(), lr=5e-3)
    first = None
    for _ in range(40):
        optimiser.zero_grad()
        terms = learn(debug, batch)
        optimiser.step()
        first = first or {n: t.item() for n, t in terms.items()}
    for name in ("segmentation", "fot", "prompt"):
        assert terms[name].item() < 0.7 * first[name], name
    with torch.no_grad():
        prediction = debug.eval()(batch.visible, batch.infrared).logits.argmax(1)
    assert (prediction == label).float().mean() > 0.9
