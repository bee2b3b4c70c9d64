"""The demo page without a browser: what a session answers, and what becomes of bad uploads."""

import json
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from fusionsam.cli.main import main
from fusionsam.config.schema import preset
from fusionsam.data.images import write_png
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError
from fusionsam.inference.predictor import FusionSAM
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.page.handlers import WAITING, Handlers, Turns
from fusionsam.page.session import MOST, PairSession, picked, read_pair
from fusionsam.page.views import complaint, describe, marks, write_files
from fusionsam.types import Prompts
from fusionsam.weights.checkpoint import save_checkpoint

H, W = 71, 97


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(3)
    folder = save_checkpoint(tmp_path_factory.mktemp("w") / "small", FusionSAMNetwork(preset("debug")).eval(), {})
    return FusionSAM.from_pretrained(folder, "cpu")


@pytest.fixture
def session(model):
    scene = draw_scene(5, 0, (H, W))
    return PairSession(model, scene.visible, scene.infrared)


def test_clicks_answer_as_one_prediction_with_those_prompts_but_encode_once(model, session):
    runs = []
    hook = model.network.image_encoder.register_forward_hook(lambda *_: runs.append(1))
    session.click(31, 17, on=True)
    session.click(5, 60, on=False)
    session.drag(80, 50, 20, 10)  # from the lower right to the upper left
    hook.remove()
    assert not runs
    given = Prompts(
        points=torch.tensor([[[31.0, 17.0], [5.0, 60.0]]]),
        point_labels=torch.tensor([[1, 0]]),
        boxes=torch.tensor([[[20.0, 10.0, 80.0, 50.0]]]),
    )
    expected = model.predict(session.visible, session.infrared, given)
    np.testing.assert_array_equal(session.now.labels, expected.labels)
    np.testing.assert_array_equal(session.now.fused, expected.fused)
    own = model.predict(session.visible, session.infrared)
    assert session.moved() == pytest.approx(100 * (expected.labels != own.labels).mean())
    for left in ((1, 1), (0, 1), (0, 0)):
        session.undo()
        assert (len(session.points), len(session.boxes)) == left
    np.testing.assert_array_equal(session.now.labels, own.labels)
    assert session.now.prompts.source == "self"


def test_a_modality_taken_away_is_a_prediction_without_it(model, session):
    both = model.predict(session.visible, session.infrared).labels
    assert session.lost() is None
    for use, alone in (
        ("visible", model.predict(session.visible, None)),
        ("infrared", model.predict(None, session.infrared)),
    ):
        session.take(use)
        np.testing.assert_array_equal(session.own.labels, alone.labels)
        np.testing.assert_array_equal(session.own.fused, alone.fused)
        assert session.lost() == pytest.approx(100 * (alone.labels != both).mean())
    session.take("both")
    np.testing.assert_array_equal(session.own.labels, both)
    with pytest.raises(InputError, match="no visible image"):
        PairSession(model, None, session.infrared).take("visible")


def test_prompts_pick_regions_by_hand():
    labels = np.zeros((7, 11), np.uint8)
    labels[0:2, 0:3] = 4  # touches the next one, of another class
    labels[2:5, 0:3] = 2
    labels[1, 8] = labels[2, 9] = 4  # diagonal neighbours are one region
    labels[5:7, 6:11] = 3

    def ask(points=(), boxes=()):
        return picked(
            labels,
            Prompts(
                points=torch.tensor([[p[:2] for p in points]], dtype=torch.float32) if points else None,
                point_labels=torch.tensor([[p[2] for p in points]]) if points else None,
                boxes=torch.tensor([boxes], dtype=torch.float32) if boxes else None,
            ),
        )

    first, second = np.zeros((7, 11), bool), np.zeros((7, 11), bool)
    first[0:2, 0:3] = True
    second[1, 8] = second[2, 9] = True
    np.testing.assert_array_equal(ask([(2, 1, 1)]), first)
    np.testing.assert_array_equal(ask([(9, 2, 1)]), second)  # x 9, y 2
    np.testing.assert_array_equal(ask([(2, 1, 1), (9, 2, 1)]), first | second)
    np.testing.assert_array_equal(ask([(2, 1, 1), (9, 2, 1), (0, 0, 0)]), second)
    np.testing.assert_array_equal(ask([(5, 3, 1), (2, 1, -1)]), np.zeros((7, 11), bool))
    # the box holds all of the second, and 3 of the 10 pixels of the one below
    np.testing.assert_array_equal(ask(boxes=[(8, 0, 10, 5)]), second)


def test_clicks_outside_are_moved_to_the_edge_and_nonsense_is_refused(session):
    session.click(-5, H + 9, on=True)
    assert session.points == [(0.0, H - 1.0, 1)]
    with pytest.raises(InputError, match="no finite position"):
        session.click(float("nan"), 3, on=True)
    session.points = [(1.0, 1.0, 1)] * MOST
    with pytest.raises(InputError, match=f"{MOST} clicks"):
        session.drag(1, 1, 5, 5)
    assert session.boxes == []


def test_bad_uploads_are_one_sentence_with_the_files_own_name(tmp_path):
    Image.fromarray(np.zeros((80, 90, 3), np.uint8)).save(tmp_path / "street.png")
    Image.fromarray(np.zeros((80, 91), np.uint8)).save(tmp_path / "heat.png")
    (tmp_path / "<b>notes.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "street.png").read_bytes()[:60])
    street, heat, notes, cut = (str(tmp_path / n) for n in ("street.png", "heat.png", "<b>notes.png", "cut.png"))
    for pair, words in [
        ((street, heat), ["visible image is 90x80", "infrared image 91x80", "aligned"]),
        ((notes, heat), ["visible image &lt;b&gt;notes.png", "not a readable image"]),
        ((street, cut), ["infrared image cut.png", "damaged or truncated"]),
    ]:
        with pytest.raises(InputError) as error:
            read_pair(*pair)
        text = complaint(error.value)
        assert all(word in text for word in words)
        assert str(tmp_path) not in text
        assert "\n" not in text


def test_deep_uploads_reach_the_reader_as_they_are(tmp_path):
    ramp = np.linspace(29000, 31000, 80 * 90).reshape(80, 90).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "heat.png")
    pair, told = read_pair(None, str(tmp_path / "heat.png"))
    visible, infrared = pair.visible, pair.infrared
    assert visible is None
    assert (int(infrared.min()), int(infrared.max())) == (0, 255)  # 8 bits of it would be flat
    assert told["infrared"]["range"]["how"] == "found"


def test_what_is_guessed_of_uploads_is_on_the_page_and_in_the_download(tmp_path, model):
    scene = draw_scene(5, 0, (H, W))
    write_png(tmp_path / "street.png", scene.visible)
    write_png(tmp_path / "heat.png", scene.infrared // 8 + 60)  # few grey values
    pair, told = read_pair(str(tmp_path / "street.png"), str(tmp_path / "heat.png"))
    session = PairSession(model, pair.visible, pair.infrared, input=told)
    assert "<br>note: the infrared picture uses the grey values" in describe(session)
    assert "(fusionsam predict: --" in describe(session)
    stored = json.loads(Path(write_files(session, tmp_path)[-1]).read_text())["input"]
    assert stored == told
    assert stored["infrared"]["polarity"]["how"] == "assumed"
    twice, told = read_pair(str(tmp_path / "street.png"), str(tmp_path / "street.png"))
    assert "visible image street.png" in told["notices"][-1]
    assert str(tmp_path) not in describe(PairSession(model, twice.visible, twice.infrared, input=told))


def test_marks_lie_where_the_prompts_are():
    prompts = Prompts(
        points=torch.tensor([[[10.0, 20.0], [30.0, 5.0], [0.0, 0.0]]]),
        point_labels=torch.tensor([[1, 0, -1]]),
        boxes=torch.tensor([[[3.0, 7.0, 12.0, 40.0]]]),
        source="self",
    )
    drawn = marks(prompts, (50, 60))
    assert re.findall(r'class="(on|off)" cx="([\d.]+)" cy="([\d.]+)"', drawn) == [
        ("on", "10.5", "20.5"),
        ("off", "30.5", "5.5"),
    ]
    assert 'x="3.0" y="7.0" width="10.0" height="34.0"' in drawn
    assert "dasharray" in drawn  # the model's own


def test_turns_come_in_the_order_of_asking_and_no_more_wait_than_may():
    turns, order, started = Turns(), [], []

    def ask(number):
        started.append(number)
        with turns():
            order.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(WAITING - 1)]
    with turns():
        for number, thread in enumerate(threads):
            thread.start()
            while thread.is_alive() and turns._next != number + 2:  # it has asked
                time.sleep(0.001)
        with pytest.raises(InputError, match="waiting for the model already"), turns():
            pass
    for thread in threads:
        thread.join(30)
    assert order == sorted(order) == started
    with turns():
        pass  # the refused one keeps no place


def test_a_pair_that_was_replaced_meanwhile_changes_nothing(model, tmp_path):
    ask, page = Handlers(model, tmp_path), SimpleNamespace(session_hash="p")
    visible, infrared = ask.scene(0)
    assert ask.scene(0) == (visible, infrared)
    Path(visible).unlink()  # as gradio does with what is older than an hour
    assert Path(ask.scene(0)[0]).is_file()
    opened = []

    def open_pair(*files):
        opened.append(ask.open_pair(*files, None, "both", [], page))

    with ask.turn():
        first = threading.Thread(target=open_pair, args=(visible, None))
        first.start()
        while first.is_alive() and ask.turn._next - ask.turn._now != 2:
            time.sleep(0.001)
        second = threading.Thread(target=open_pair, args=(visible, infrared))
        second.start()
        while second.is_alive() and ask.turn._next - ask.turn._now != 3:
            time.sleep(0.001)
    for thread in (first, second):
        thread.join(120)
    assert opened[0] == [gr.skip()] * 7
    assert opened[1][0].size == (480, 640)
    assert None not in opened[1]


@pytest.mark.parametrize("hash", ["..", "../victim", "{folder}/../victim"])
def test_a_browser_cannot_name_the_folder_that_is_written_and_removed(model, session, tmp_path, hash):
    own, victim = tmp_path / "own", tmp_path / "victim"
    own.mkdir()
    victim.mkdir()
    for number in range(4):
        (victim / f"{number}").mkdir()
    ask, page = Handlers(model, own), SimpleNamespace(session_hash=hash.format(folder=own))
    paths = ask.files(session, page)
    assert all(own in Path(path).parents for path in paths)
    ask.leave(page)
    assert not any(Path(path).exists() for path in paths)
    assert own.is_dir()
    assert len(list(victim.iterdir())) == 4


def test_downloads_are_the_arrays(session, tmp_path):
    session.click(31, 17, on=True)
    paths = {path.rsplit("/", 1)[1]: path for path in write_files(session, tmp_path)}
    assert sorted(paths) == ["fused.png", "labels.png", "mask.png", "overlay.png", "summary.json"]
    np.testing.assert_array_equal(np.array(Image.open(paths["labels.png"])), session.now.labels)
    np.testing.assert_array_equal(np.array(Image.open(paths["fused.png"])), session.now.fused)
    np.testing.assert_array_equal(np.array(Image.open(paths["mask.png"])) > 0, session.mask())


def test_classes_switched_off_leave_the_fused_picture(session):
    names = session.now.classes
    bare = np.asarray(session.segmentation([]))[:H, :W]
    np.testing.assert_array_equal(bare, session.now.fused)
    index = int(np.bincount(session.now.labels.ravel())[1:].argmax()) + 1
    one = np.asarray(session.segmentation([names[index]]))[:H, :W]
    changed = (one != session.now.fused).any(2)
    assert changed.any()
    assert set(np.unique(session.now.labels[changed])) == {index}


def test_a_port_in_use_is_told_in_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert f"--port {port}: cannot listen" in message
    assert message.count("\n") == 1
