"""Clicks that name a class: nothing without them, obeyed with them, refused where they cannot be, and trained alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fusionsam.config.load import read_settings
from fusionsam.config.schema import Config, EncoderConfig, ModelConfig, SteeringConfig
from fusionsam.data.synthetic.scenes import draw_scene, synthesize
from fusionsam.data.transforms import to_unit
from fusionsam.errors import InputError
from fusionsam.evaluation.click_options import ClicksOptions
from fusionsam.evaluation.steered import Steered, measure_steering, scores, steering_table
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import prompts_from, prompts_to_json
from fusionsam.metrics.interaction import Click, Corrected, Object, correct, iou
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.page.session import PairSession
from fusionsam.server.jobs import Engine, Images, Predict
from fusionsam.training.run import train
from fusionsam.training.steering_data import Drawn, Examples, Seen
from fusionsam.training.steering_task import SteeringTask, _User
from fusionsam.types import Batch, Prompts
from fusionsam.weights.checkpoint import CARD, load_network, save_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
H, W = 70, 83


def _with_steering(config: ModelConfig) -> None:
    config.steering = SteeringConfig(width=8)


@pytest.fixture
def steered(make_debug) -> FusionSAMNetwork:
    """A debug network whose steering is random in its last layer, too: it changes whatever it is asked about."""
    network = make_debug(_with_steering)
    torch.manual_seed(3)
    nn.init.normal_(network.steering.out.weight, std=0.5)
    return network


@pytest.fixture
def plain(steered, make_debug) -> FusionSAMNetwork:
    """The same network without steering."""
    network = make_debug()
    kept = {name: tensor for name, tensor in steered.state_dict().items() if not name.startswith("steering.")}
    network.load_state_dict(kept)
    return network


@torch.no_grad()
def test_without_a_class_every_logit_is_the_same_bit_for_bit(steered, plain, pair):
    points = Prompts(torch.tensor([[[9.0, 20.0]]] * 2), torch.tensor([[1], [0]]))
    none = replace(points, point_classes=torch.full((2, 1), -1))
    boxes = Prompts(boxes=torch.tensor([[[3.0, 4.0, 40.0, 50.0]]] * 2), box_classes=torch.full((2, 1), -1))
    for prompts in (None, points, none, boxes):
        assert torch.equal(steered(*pair, prompts).logits, plain(*pair, prompts).logits)
    assert torch.equal(steered(*pair, none).logits, plain(*pair, points).logits)
    named = replace(points, point_labels=torch.ones(2, 1, dtype=torch.long), point_classes=torch.tensor([[2], [5]]))
    assert not torch.equal(steered(*pair, named).logits, plain(*pair, points).logits)


@torch.no_grad()
@pytest.mark.parametrize("size", [(70, 83), (128, 64), (530, 600)])  # the last is reduced to max_side first
def test_the_pixel_of_a_click_gets_its_class_whatever_the_weights(steered, size):
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, channels, *size, generator=generator) for channels in (3, 1)]
    places = [(0, 0), (size[1] - 1, size[0] - 1), (31, 17), (50, 40)]
    classes = [7, 3, 1, 0]
    out = steered(*images, Prompts.naming(places, classes))
    ids = out.logits[0].argmax(0)
    assert [int(ids[y, x]) for x, y in places] == classes
    assert out.prompts.point_classes.tolist() == [classes]


@torch.no_grad()
def test_logits_of_float32_are_steered_in_bfloat16(steered, pair):
    encoded = steered.encode(pair[0][:1], pair[1][:1])
    first = steered.first_pass(encoded)
    clicks = steered.class_clicks(encoded, Prompts.naming([(9, 20)], [2]))
    with torch.autocast("cpu", torch.bfloat16):
        found = steered.steering(steered.steering_context(encoded, first), first.logits.float(), clicks)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_each_device_draws_examples_of_its_own(steered):
    config = Config(model=steered.config)
    label = np.zeros((64, 96), np.uint8)
    label[8:40, 8:40] = 2
    width = steered.steering.mean.numel()
    one = Seen(torch.zeros(width, 16, 24), torch.zeros(len(config.model.classes), 16, 24), label)
    seeds = []
    for device, devices in ((0, 1), (0, 2), (1, 2)):
        drawn = Drawn([one], config, steered, 0, 4, device, devices)
        seeds.append([drawn[index].seed for index in range(len(drawn))])
    assert seeds == [[0, 1, 2, 3], [0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("given", ["both", "covered in part", "visible", "infrared"])
def test_points_that_name_a_class_are_scored_with_and_without_from_one_encoding(steered, pair, given):
    model = FusionSAM(steered, "debug", {})
    visible, infrared = None if given == "infrared" else pair[0][:1], None if given == "visible" else pair[1][:1]
    covered = torch.ones(1, 2, *pair[0].shape[2:], dtype=torch.bool)
    covered[:, 1, :20] = False
    there = covered if given == "covered in part" else None
    named = Prompts.naming([(60, 60), (20, 30)], [2, 4])
    mixed = replace(named, point_labels=torch.tensor([[1, 0]]), point_classes=torch.tensor([[2, -1]]))
    rest = Prompts(mixed.points[:, 1:], torch.tensor([[0]]))
    for prompts, without in ((named, None), (mixed, rest)):
        output, own = model.infer_named(visible, infrared, prompts, there)
        assert torch.equal(output.logits, model.infer(visible, infrared, prompts, covered=there).logits)
        assert torch.equal(own, model.infer(visible, infrared, without, covered=there).logits)
        assert not torch.equal(own, output.logits)


@torch.no_grad()
def test_only_the_classes_that_were_asked_for_change(steered, pair):
    images = pair[0][:1], pair[1][:1]
    first = steered(*images)
    named = Prompts(
        boxes=torch.tensor([[[10.0, 10.0, 40.0, 40.0]]] * 2), box_classes=torch.tensor([[4], [-1]]),
        points=torch.tensor([[[1.0, 1.0]], [[60.0, 60.0]]]), point_labels=torch.tensor([[-1], [1]]),
        point_classes=torch.tensor([[-1], [2]]),
    )  # fmt: skip
    with pytest.raises(InputError, match="in one image of the batch and none in another"):
        steered(*pair, named)
    two = Prompts.naming([(60, 60), (20, 30)], [2, 4])
    changed = steered(*images, two).logits != first.logits
    assert changed.flatten(2).any(2)[0].nonzero().flatten().tolist() == [2, 4]
    # other points go the way they always went
    mixed = replace(two, point_labels=torch.tensor([[1, 0]]), point_classes=torch.tensor([[2, -1]]))
    alone = Prompts(two.points[:, 1:], torch.tensor([[0]]))
    keep = [index for index in range(9) if index != 2]
    assert torch.equal(steered(*images, mixed).logits[:, keep], steered(*images, alone).logits[:, keep])


def _points(*places, classes=(1,), labels=None):
    prompts = Prompts.naming(places, classes)
    return prompts if labels is None else replace(prompts, point_labels=torch.tensor([labels]))


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (_points((W + 20, 5)), f"{W + 20}, 5 lies outside of the picture of {W}x{H} pixels"),
        (_points((-3, 5)), "-3, 5 lies outside"),
        (_points((float("nan"), 5)), "not finite"),
        (_points((5, 5), classes=(9,)), "found 9, expected class ids 0 to 8"),
        (_points((5, 5), classes=(-2,)), "found -2"),
        (_points((5, 5), labels=[0]), "off the object"),
        (replace(_points((5, 5)), point_classes=torch.tensor([[1, 2]])), r"found shape \(1, 2\)"),
        (replace(_points((5, 5)), point_classes=torch.tensor([[1.0]])), "numbers with a point"),
        (Prompts(boxes=torch.tensor([[[9.0, 9, 3, 3]]]), box_classes=torch.tensor([[1]])), "ends before it begins"),
        (Prompts(boxes=torch.tensor([[[9.0, 9, 300, 30]]]), box_classes=torch.tensor([[1]])), "lies outside"),
        (Prompts(boxes=torch.tensor([[[9.0, 9, 30, 30]]]), box_classes=torch.tensor([[99]])), "found 99"),
        (Prompts(point_classes=torch.tensor([[1]])), "point_classes"),
    ],
)
def test_prompts_that_cannot_be_are_one_line(steered, pair, prompts, words):
    with pytest.raises(InputError, match=words) as refused:
        steered(pair[0][:1], pair[1][:1], prompts)
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_three_thousand_points_are_obeyed(steered, pair):
    generator = torch.Generator().manual_seed(5)
    places = [(int(x), int(y)) for x, y in torch.randint(0, H, (3000, 2), generator=generator).tolist()]
    ids = steered(pair[0][:1], pair[1][:1], Prompts.naming(places, [3] * 3000)).logits[0].argmax(0)
    assert all(ids[y, x] == 3 for x, y in places)


def test_json_names_classes_by_name_or_id():
    names = ["none", "car", "person"]
    raw = {"points": [[3, 4], [5, 6], [7, 8]], "classes": ["car", 2, None], "boxes": [[1, 2, 3, 4]]}
    found = prompts_from(raw, "p.json", "a", (H, W), names)
    assert found.point_classes.tolist() == [[1, 2, -1]]
    assert found.box_classes is None
    told = prompts_to_json(found)
    assert told["classes"] == [1, 2, None]
    assert "box_classes" not in told
    for key, wrong in (("classes", ["tree", 1, 1]), ("classes", [1]), ("classes", [9, 1, 1]), ("box_classes", [True])):
        with pytest.raises(InputError, match=key):
            prompts_from({**raw, key: wrong}, "p.json", "a", (H, W), names)


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_weights_without_steering_refuse_and_those_with_it_load(steered, plain, pair, tmp_path):
    save_checkpoint(tmp_path / "plain", plain, {})
    save_checkpoint(tmp_path / "steered", steered, {})
    images = ((pair[0][0] * 255).byte(), (pair[1][0] * 255).byte())
    asked = {"points": [[30, 40]], "classes": ["person"]}
    with pytest.raises(InputError, match="no steering"):
        FusionSAM.from_pretrained(tmp_path / "plain", "cpu").predict(*images, prompts=asked)
    model = FusionSAM.from_pretrained(tmp_path / "steered", "cpu")
    session = model.encode(*images)
    answers = [model.predict(*images, prompts=asked), session.predict(asked)]
    for answer in answers:
        assert answer.labels[40, 30] == 2
        assert answer.summary()["prompts"]["classes"] == [2]
    own = FusionSAM.from_pretrained(tmp_path / "plain", "cpu").predict(*images)
    assert np.array_equal(session.predict().labels, own.labels)


def test_page_and_server_hand_the_classes_on(steered, pair):
    model = FusionSAM(steered, "debug", {})
    images = [(image[0] * 255).byte() for image in pair]
    page = PairSession(model, *images)
    page.click(30, 40, True, 2)
    assert page.now.labels[40, 30] == 2
    page.click(30, 40, False, 2)  # off the object: nothing is there
    assert page.now.labels[40, 30] == 0
    page.drag(1, 1, 20, 20, 5)
    assert page.now.prompts.box_classes.tolist() == [[5]]
    page.undo()
    assert page.now.labels[40, 30] == 2
    page.click(3, 3, True)  # without a class
    assert page.now.prompts.point_classes.tolist() == [[2, -1]]
    two = [Predict(Images(*images), Prompts.naming([(30, 40)], [index])) for index in (2, 7)]
    assert two[0].key == two[1].key != Predict(Images(*images), replace(two[0].prompts, point_classes=None)).key
    assert [answer.labels[40, 30] for answer in Engine(model)(two)] == [2, 7]


# -- training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("street") / "data"
    synthesize(root, 10, seed=3, size=(96, 128), progress=False)
    return root


def _settings(street, weights, out, *more):
    return read_settings(
        CONFIGS / "steering.yaml", "--model.preset=debug", "--model.steering.width=8", f"--model.start_from={weights}",
        f"--data.root={street}", "--data.crop=[64,96]", "--train.steering_pairs=4", "--train.batch_size=2",
        "--train.max_steps=4", "--train.validate_every=4", "--train.accelerator=cpu", f"--train.out={out}",
        "--data.absent_classes=true", *more,
    )  # fmt: skip


def test_training_moves_steering_alone_and_resumes_to_the_same_bits(plain, street, tmp_path):
    save_checkpoint(tmp_path / "start", plain, {"seed": 7, "val": {"miou": 1.0}})
    out = train(_settings(street, tmp_path / "start", tmp_path / "run"), command="a test")
    network, card = load_network(out / "final")
    before, after = plain.state_dict(), network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name in after if name not in before} == {f"steering.{n}" for n in network.steering.state_dict()}
    assert network.steering.out.weight.abs().sum() > 0
    assert card["seed"] == 7  # of the network; steering's own card lies in it
    assert card["steering"]["step"] == 4
    assert set(card["steering"]["val"]) == {"val/iou_unsteered", "val/iou_steered"}
    two = _settings(street, tmp_path / "start", tmp_path / "halves", "--train.checkpoint_minutes=0")

    class Killed(Exception):
        pass

    step, original = [], SteeringTask.training_step

    def killed(self, batch, index):
        step.append(self.global_step)
        if self.global_step == 2:
            raise Killed
        return original(self, batch, index)

    SteeringTask.training_step = killed
    try:
        with pytest.raises(Killed):
            train(two, command="a test")
    finally:
        SteeringTask.training_step = original
    train(two, resume=True, command="a test")
    again = load_network(tmp_path / "halves/final")[0].state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_clicks_in_training_are_those_of_prediction_where_sam_takes_the_picture_letterboxed(make_debug, sam):
    def letterboxed(config):
        config.encoder = EncoderConfig(kind="sam", source=str(sam[1]))
        config.steering = SteeringConfig(width=8)

    network = make_debug(letterboxed)
    assert network.image_encoder.frame(64, 96).content != (64, 96)
    label = torch.zeros(1, 64, 96, dtype=torch.int64)
    label[0, 20:40, 30:60] = 2
    batch = Examples(
        torch.zeros(1), torch.zeros(1), label, torch.tensor([2]), label > 0, torch.zeros(1), torch.tensor([False]), 1, 0
    )
    user = _User(batch, np.random.default_rng(0))
    user.made[0] = [Click(31, 22, True), Click(80, 50, True)]
    found = user.clicks(network)
    given = Prompts(points=torch.tensor([[[31.0, 22.0], [80.0, 50.0]]]), point_classes=torch.tensor([[2, 0]]))
    with torch.no_grad():
        wanted = network.class_clicks(network.encode(torch.rand(1, 3, 64, 96), torch.rand(1, 1, 64, 96)), given)
    assert torch.equal(found.points, wanted.points)
    assert torch.equal(found.point_classes, wanted.point_classes)
    assert torch.equal(found.tokens[:, :2], wanted.tokens)


def test_validation_tells_the_network_where_the_cameras_of_a_rig_reach(steered, street, tmp_path):
    task = SteeringTask(steered, _settings(street, tmp_path, tmp_path / "run"), 1)
    scene = draw_scene(5, 0, (96, 128))
    images = to_unit(scene.visible)[None], to_unit(scene.infrared)[None]
    covered = torch.ones(1, 2, 96, 128, dtype=torch.bool)
    covered[:, 1, :, :64] = False
    with torch.no_grad():
        ids = steered.decode(steered.encode(*images, None, covered)).logits[0].argmax(0)
        whole = steered.decode(steered.encode(*images)).logits[0].argmax(0)
    kind = int(ids[(ids != whole) & (ids > 0)].mode().values)  # a class on which the two answers differ
    label = torch.zeros(96, 128, dtype=torch.int64)
    label[20:80, 10:110] = kind
    batch = Batch(*images, label[None], torch.ones(1, 2, dtype=torch.bool), covered=covered)
    inside = (label == kind).numpy()
    for given, answer in ((batch, ids), (replace(batch, covered=None), whole)):
        task.ious = []
        with torch.no_grad():
            task.validation_step(given, 0)
        assert [before for before, _ in task.ious] == [iou((answer == kind).numpy(), inside, inside)]
    assert iou((ids == kind).numpy(), inside, inside) != iou((whole == kind).numpy(), inside, inside)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.steering.width=0", "model.steering.width: 0"),
        ("--model.start_from=null", "model.start_from: none"),
        ("--data.crop=[72,96]", "multiples of 16"),
        ("--train.stage=segmentation", "trained afterwards"),
    ],
)
def test_settings_that_cannot_train_steering_are_one_line(plain, street, tmp_path, flag, words):
    save_checkpoint(tmp_path / "start", plain, {})
    with pytest.raises(InputError, match=words):
        train(_settings(street, tmp_path / "start", tmp_path / "run", flag))


# -- evaluation --------------------------------------------------------------------------------------------------


def test_a_user_corrects_an_object_worked_by_hand():
    label = np.zeros((9, 12), int)
    label[2:7, 2:7] = 1
    label[8, 11] = 255
    own = np.zeros_like(label)
    own[2:7, 2:4] = 1
    own[0, 11] = 2
    asked = []

    def ask(prompts):
        asked.append((prompts.points[0].tolist(), prompts.point_classes[0].tolist()))
        given = np.where(label == 255, 0, label)
        given[2:7, 6] = 2 if len(asked) == 1 else 1
        given[0, 0] = 2  # outside of the box
        return given

    done = correct(ask, own, label, Object(1, label == 1, 25), 5)
    assert done.ious == [10 / 25, 20 / 25, 1.0]
    assert done.obeyed == [True, True]
    assert done.elsewhere == [2 / 108, 2 / 108]  # the other is what class 2 was
    assert asked[1] == ([[5, 3], [6, 2]], [1, 1])


def test_the_figures_of_two_objects_worked_by_hand():
    done = [Corrected([0.5, 0.7, 0.8], [True, False], [0.0, 0.01]), Corrected([0.9, 0.9], [True], [0.002])]
    measured = [Steered(id, kind, 500, one) for id, kind, one in zip(["1D", "2N"], [1, 2], done, strict=True)]
    options = ClicksOptions(dataset="mfnet", root=Path(), out=Path(), bootstrap=20)
    found = scores(measured, ["none", "car", "person"], {}, options)
    assert list(found) == ["all", "below 0.8", "day", "night", "car", "person"]
    assert found["all"]["iou0"] == pytest.approx(70)
    assert found["all"]["gain1"] == pytest.approx(10)
    assert found["all"]["iou3"] == pytest.approx(85)
    assert found["all"]["obeyed"] == pytest.approx(200 / 3)
    assert found["all"]["elsewhere1"] == pytest.approx(0.1)
    assert found["below 0.8"]["gain3"] == pytest.approx(30)
    shown = steering_table({"title": "t", "groups": found})
    assert shown.rows[1].cells[:6] == ("below 0.8", "1", "50.0", "70.0", "80.0", "80.0")


def test_clicks_steer_from_end_to_end(steered, plain, street, tmp_path):
    save_checkpoint(tmp_path / "steered", steered, {})
    save_checkpoint(tmp_path / "plain", plain, {})
    config = ClicksOptions(
        dataset="mfnet", root=street, out=tmp_path / "out", weights=str(tmp_path / "steered"), steer=True,
        min_pixels=100, bootstrap=20, device="cpu",
    )  # fmt: skip
    values = measure_steering(config)
    assert values["groups"]["all"]["obeyed"] == 100
    assert json.loads((tmp_path / "out/steering.json").read_text())["groups"] == values["groups"]
    lines = (tmp_path / "out/steered.jsonl").read_text()
    (tmp_path / "out/steered.jsonl").write_text(lines[:-9])  # killed amid the last line
    assert measure_steering(config)["groups"] == values["groups"]
    assert (tmp_path / "out/steered.jsonl").read_text() == lines
    with pytest.raises(InputError, match="measured with another min_pixels"):
        measure_steering(replace(config, min_pixels=101))
    card = tmp_path / "steered" / CARD
    card.write_text(json.dumps(json.loads(card.read_text()) | {"class_offsets": {"offsets": {"car": 1.0}}}))
    with pytest.raises(InputError, match="measured with another calibration;"):  # as `fusionsam calibrate` leaves it
        measure_steering(config)
    with pytest.raises(InputError, match="have no steering"):
        measure_steering(replace(config, weights=str(tmp_path / "plain")))
