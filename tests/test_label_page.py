"""The labelling page in a real Chromium, against a real `fusionsam label`, by mouse and keys alone: clicks, boxes,
brush, polygon, undo, classes, a kill in the middle, COCO, a phone's width."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fusionsam.config.schema import preset
from fusionsam.data.images import write_png
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.weights.checkpoint import save_checkpoint

H, W = 96, 128
PAIRS = 5
PATIENCE = 240  # seconds: the machine may be busy
CLASSES = {
    "classes": ["none", "car", "person", "lamp"],
    "palette": [[0, 0, 0], [230, 60, 60], [60, 200, 90], [70, 110, 240]],
}


def truth(number):
    """Two rectangles and where their corners are: class -> x0, y0, x1, y1, the last pixel excluded."""
    return {1: (10 + 4 * number, 20, 52 + 4 * number, 60), 2: (80, 30 + 3 * number, 110, 70 + 3 * number)}


def drawn(number):
    label = np.zeros((H, W), np.uint8)
    for class_id, (x0, y0, x1, y1) in truth(number).items():
        label[y0:y1, x0:x1] = class_id
    return label


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label")
    for number in range(PAIRS):
        label = drawn(number)
        write_png(
            folder / f"vi/p{number}.png",
            np.stack([40 + 80 * (label == 1), 60 + 70 * (label == 2), label + 50], -1).astype(np.uint8),
        )
        write_png(folder / f"ir/p{number}.png", (30 + 90 * label).astype(np.uint8))
    (folder / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    torch.manual_seed(3)
    save_checkpoint(folder / "small", FusionSAMNetwork(preset("debug")).eval(), {})
    return folder


SHOWS_STACKS = "import faulthandler as f, signal, sys; f.register(signal.SIGUSR1); from fusionsam.cli.main import main"


class Server:
    def __init__(self, home, sam):
        command = [
            sys.executable,
            "-c",
            f"{SHOWS_STACKS}; sys.exit(main())",
            "label",
            "--visible",
            home / "vi",
            "--infrared",
            home / "ir",
            "--out",
        ]
        command += [home / "out", "--classes", home / "classes.yaml", "--weights", home / "small", "--sam", sam]
        command += ["--port", "0", "--device", "cpu", "--who", "tester"]
        self.process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        self.address = found[0]

    def kill(self):
        self.process.kill()
        self.process.wait(PATIENCE)
        self.process.stdout.close()


class Page:
    """What a person does and sees."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server
        browser.get(server.address)
        self.settle()

    def settle(self):
        busy = "return document.body.dataset.busy"
        try:
            WebDriverWait(self.browser, PATIENCE, 0.05).until(lambda _: self.browser.execute_script(busy) == "0")
        except TimeoutException:
            self.server.process.send_signal(signal.SIGUSR1)  # what its threads wait for, in the report of the test
            raise

    def says(self):
        return self.browser.find_element(By.ID, "status").text

    def keys(self, *keys):
        for key in keys:
            ActionChains(self.browser, duration=0).send_keys(key).perform()
            self.settle()

    def pointer(self, *steps):
        """x, y in pixels of the picture, and what the mouse does there."""
        script = (
            "const r = document.querySelector('#stage canvas').getBoundingClientRect(); return [r.x, r.y, state.view]"
        )
        left, top, view = self.browser.execute_script(script)
        chain = ActionChains(self.browser, duration=20)
        for x, y, act in steps:
            place = (left + view["x"] + (x + 0.5) * view["scale"], top + view["y"] + (y + 0.5) * view["scale"])
            chain.w3c_actions.pointer_action.move_to_location(round(place[0]), round(place[1]))
            for name in act.split():
                getattr(chain, name)()
        chain.perform()
        self.settle()

    def press(self, selector):
        self.browser.find_element(By.CSS_SELECTOR, selector).click()
        self.settle()

    def count(self, selector):
        return len(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def rectangle(self, x0, y0, x1, y1):
        corners = [(x0 - 0.5, y0 - 0.5), (x1 - 0.5, y0 - 0.5), (x1 - 0.5, y1 - 0.5), (x0 - 0.5, y1 - 0.5)]
        self.pointer(*((x, y, "click") for x, y in corners))
        self.keys(Keys.ENTER)


@pytest.fixture(scope="module")
def run(home, sam):
    """A server that can be killed and begun again."""
    servers = [Server(home, sam[1])]
    yield servers
    servers[-1].kill()


@pytest.fixture
def page(browser, run):
    page = Page(browser, run[-1])
    yield page
    severe = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    expected = ("422", "CONNECTION_REFUSED")  # refusals, and the server that was killed
    assert [line for line in severe if not any(word in line for word in expected)] == []


def saved(home, number):
    return np.asarray(Image.open(home / f"out/labels/p{number}.png"))


def test_a_click_gives_three_masks_and_the_chosen_one_becomes_an_object(page, home):
    page.pointer((40, 30, "click"))
    assert page.count("#masks button") == 3
    shown = "const m = state.candidate.mask; return [m.box, m.runs]"
    page.browser.find_elements(By.CSS_SELECTOR, "#masks button")[1].click()
    (x, y, w, h), runs = page.browser.execute_script(shown)
    page.keys("3")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)
    wanted = np.zeros((H, W), np.uint8)
    wanted[y : y + h, x : x + w] = 3 * inside
    np.testing.assert_array_equal(saved(home, 0), wanted)
    assert page.count("#objects button") == 1
    page.pointer((70, 50, "click"))
    page.pointer((20, 80, "context_click"))  # off the object: one mask, the last one fed back
    assert page.count("#masks button") == 1
    assert page.browser.execute_script("return state.points.map((p) => p.on)") == [1, 0]
    page.keys("z")
    assert page.count("#masks button") == 3  # the last click is taken back, not the object
    page.keys(Keys.ESCAPE)
    page.pointer((20, 20, "click_and_hold"), (40, 40, ""), (90, 70, "release"))
    assert page.browser.execute_script("return state.box") == [20, 20, 90, 70]
    page.keys(Keys.ENTER)
    assert page.count("#objects button") >= 1
    page.keys("z", "z")
    assert not saved(home, 0).any()
    page.keys("y", "z")
    assert not saved(home, 0).any()
    with (home / "out/log.jsonl").open() as lines:
        log = [json.loads(line) for line in lines]
    assert {line["who"] for line in log} == {"tester"}
    assert [line["action"] for line in log] == ["paint", "paint", "undo", "undo", "redo", "undo"]


def test_brush_eraser_select_and_the_class_by_number(page, home):
    page.keys("b", "1")
    page.pointer((30, 30, "click_and_hold"), (60, 30, "release"))
    stroke = saved(home, 0)
    ys, xs = np.nonzero(stroke)
    assert set(np.unique(stroke)) == {0, 1}
    assert abs(ys.mean() - 30) < 0.5
    assert (abs(xs.min() - 25.5), abs(xs.max() - 64.5)) <= (1, 1)
    page.pointer((60, 30, "click_and_hold"), (60, 50, "release"))  # the same object grows
    assert page.count("#objects button") == 1
    page.keys("e")
    page.pointer((30, 30, "click"))
    assert saved(home, 0)[30, 30] == 0
    page.keys("s")
    page.pointer((60, 40, "click"))
    page.keys("2")
    assert set(np.unique(saved(home, 0))) == {0, 2}
    page.keys(Keys.DELETE)
    assert not saved(home, 0).any()


def hold(page, ending, until, then="real(...asked)"):
    """Answers at addresses with this ending wait until a condition of the page's script holds."""
    script = """const real = (window.real ??= window.fetch);
        window.ups = 0; window.onpointerup = () => window.ups++;
        window.downs = 0; window.onpointerdown = () => window.downs++;
        window.fetch = async (...asked) => {
          if (!asked[0].endsWith("ENDING")) return real(...asked);
          if (window.began) window.began();
          while (!(UNTIL)) await new Promise((go) => setTimeout(go, 10));
          return THEN;
        };"""
    page.browser.execute_script(script.replace("ENDING", ending).replace("UNTIL", until).replace("THEN", then))


def test_strokes_drawn_while_one_is_saved_are_kept_and_of_one_object(page, home):
    page.keys("b", "1", "n")
    hold(page, "/change", "downs >= 2")
    page.pointer((30, 20, "click_and_hold"), (60, 20, "release"), (30, 40, "click_and_hold"))
    page.pointer((60, 40, "release"))  # the first was saved in the middle of the second
    hold(page, "/change", "ups >= 2")
    page.pointer(*((x, y, act) for y in (60, 80) for x, act in ((30, "click_and_hold"), (60, "release"))))
    assert [saved(home, 0)[y, 45] for y in (20, 40, 60, 80)] == [1] * 4
    assert page.count("#objects button") == 1
    page.keys("n")
    hold(page, "/change", "ups >= 2")
    page.pointer(*((x, y, act) for y in (20, 40) for x, act in ((90, "click_and_hold"), (110, "release"))))
    assert page.count("#objects button") == 2  # a new one, and the second stroke is of it
    page.keys(*"z" * 6)
    assert not saved(home, 0).any()


@pytest.mark.parametrize("lost", [False, True])
def test_strokes_drawn_while_the_next_pair_comes_are_kept(page, home, lost):
    script = """const real = window.fetch, answer = LOST;
        let sent = 0, next = false;
        window.fetch = async (...asked) => {
          if (asked[0].endsWith("/change")) { sent++; while (!next) await new Promise((go) => setTimeout(go, 10)); }
          if (!asked[0].endsWith("/pairs/1")) return real(...asked);
          while (!sent) await new Promise((go) => setTimeout(go, 10));
          setTimeout(() => { next = true; }, 200);
          return answer ? answer() : real(...asked);
        };
        open(1);
        setTimeout(() => { for (const y of [20, 40]) paintRegion(() => true, [30, y, 20, 5], "brush"); }, 50);"""
    refused = """() => new Response('{"error": "no"}', { status: 422 })"""
    page.browser.execute_script(script.replace("LOST", refused if lost else "null"))
    WebDriverWait(page.browser, PATIENCE).until(lambda _: page.browser.execute_script("return state.index") == 1)
    page.settle()
    assert [bool(saved(home, 0)[y, 40]) for y in (22, 42)] == [True, True]
    page = Page(page.browser, page.server)
    assert page.count("#objects button") == 1
    page.keys(*"z" * 2)
    assert not saved(home, 0).any()


def test_the_pair_asked_for_last_is_shown_and_late_answers_of_others_are_not(page):
    refused, silent = 'new Response(`{"error": "late"}`, { status: 422 })', 'Promise.reject(new TypeError("late"))'
    shown = "state.index === 2 && $('status').textContent === 'ready'"
    for ending, then in (("/pairs/1", "real(...asked)"), ("/pairs/1", refused), ("/pairs/1/temperatures", silent)):
        again = Page(page.browser, page.server)
        hold(again, ending, shown, then)
        again.browser.execute_script("window.began = () => { window.began = null; open(2); }; open(1);")
        again.settle()
        assert again.browser.execute_script("return [state.index, state.pair.id]") == [2, "p2"]
        assert again.says() == "ready"


def test_the_boxes_stand_as_the_pair_does_after_a_refused_change(page):
    hold(page, "/change", "true", 'new Response(`{"error": "no room"}`, { status: 422 })')
    page.keys("d")
    assert page.says() == "no room"
    assert not page.browser.find_element(By.ID, "done").is_selected()


def test_two_fingers_leave_no_box_and_the_picture_stays_under_the_one_that_is_left(page):
    touch = """const c = document.querySelector("#stage canvas"), r = c.getBoundingClientRect();
        c.setPointerCapture = () => {};
        const fire = (type, pointerId, x, y) => c.dispatchEvent(
          new PointerEvent("pointer" + type, { pointerId, clientX: r.x + x, clientY: r.y + y, pointerType: "touch" }));
        fire("down", 7, 50, 50); fire("move", 7, 90, 90);
        const drawn = state.box;
        fire("down", 8, 150, 150); fire("move", 8, 190, 160); fire("up", 8, 190, 160);
        const before = { ...state.view };
        fire("move", 7, 93, 90);
        const moved = [state.view.x - before.x, state.view.y - before.y];
        fire("up", 7, 93, 90);
        return [drawn !== null, state.box, moved.map(Math.round), state.points.length];"""
    assert page.browser.execute_script(touch) == [True, None, [3, 0], 0]


def test_a_window_of_another_size_leaves_what_was_zoomed_where_it_is(page):
    resized = 'window.dispatchEvent(new Event("resize")); return [state.view.scale, state.view.x, state.view.y]'
    fitted = page.browser.execute_script(resized)
    zoomed = "zoom(canvases()[0], { clientX: 300, clientY: 300 }, 2); const v = state.view; return [v.scale, v.x, v.y]"
    there = page.browser.execute_script(zoomed)
    assert page.browser.execute_script(resized) == there != fitted
    page.keys("f")
    assert page.browser.execute_script(resized) == fitted


def test_a_pair_without_a_visible_picture_is_not_black(page):
    centre = """state.pair.pictures = ["fused", "infrared"]; delete state.images.visible; $("slider").value = 0;
        const canvas = canvases()[0]; render(canvas);
        return canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data[3]"""
    assert page.browser.execute_script(centre) == 255


def test_an_unsure_mark_stays_and_is_listed(page, home):
    page.keys("u")
    listed = "return [...document.querySelectorAll('#pair option')].map((o) => o.text.endsWith('?'))"
    assert page.browser.execute_script(listed) == [True, False, False, False, False]
    again = Page(page.browser, page.server)
    assert again.browser.execute_script(listed) == [True, False, False, False, False]
    again.keys("u")
    assert again.browser.execute_script(listed) == [False] * 5


def test_five_pairs_by_mouse_and_keys_with_a_kill_in_the_middle(browser, run, home, sam):
    page = Page(browser, run[-1])
    for number in range(PAIRS):
        if number == 2:
            run[-1].kill()
            page.keys("u")
            assert "does not answer" in page.says()
            run.append(Server(home, sam[1]))
            page = Page(browser, run[-1])
            assert page.browser.execute_script("return state.index") == 2  # the first that is not done
            assert page.browser.find_element(By.ID, "count").text == "2 of 5 done"
        page.keys("p")
        for class_id, box in truth(number).items():
            page.keys("n", str(class_id))
            page.rectangle(*box)
        page.keys("d")
        label, wanted = saved(home, number), drawn(number)
        for class_id in (1, 2):
            union = ((label == class_id) | (wanted == class_id)).sum()
            assert ((label == class_id) & (wanted == class_id)).sum() / union > 0.9
        page.keys(Keys.ARROW_RIGHT)
    assert page.browser.find_element(By.ID, "count").text == "5 of 5 done"
    coco_file = home / "coco.json"
    command = [sys.executable, "-m", "fusionsam", "label", "--visible", home / "vi", "--infrared", home / "ir", "--out"]
    tail = [home / "out", "--classes", home / "classes.yaml", "--export-coco", coco_file]
    subprocess.run([*map(str, command + tail)], check=True, timeout=PATIENCE)
    from pycocotools.coco import COCO

    read = COCO(str(coco_file))
    assert len(read.getAnnIds()) == 2 * PAIRS
    for image in read.loadImgs(read.getImgIds()):
        label = np.zeros((H, W), np.uint8)
        for one in read.loadAnns(read.getAnnIds(image["id"])):
            label[read.annToMask(one).astype(bool)] = one["category_id"]
        np.testing.assert_array_equal(label, saved(home, int(image["file_name"][1])))


def test_side_by_side_zoom_and_a_phones_width(page):
    page.keys("v")
    assert page.count("#stage canvas") == 3
    page.keys("v")
    assert page.count("#stage canvas") == 1
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        width = "return [innerWidth, document.documentElement.scrollWidth]"
        WebDriverWait(page.browser, PATIENCE).until(lambda _: page.browser.execute_script(width) == [390, 390])
        assert page.browser.execute_script("return document.querySelector('#stage canvas').clientWidth") > 350
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_another_page_may_not_draw_and_nonsense_is_one_line(run):
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    def post(path, body, **headers):
        try:
            with urlopen(Request(run[-1].address + path, body, headers), timeout=PATIENCE) as answer:
                return answer.status, json.loads(answer.read())
        except HTTPError as error:
            return error.code, json.loads(error.read())

    change = b'{"kind": "clear"}'
    assert post("/api/pairs/0/change", change, Origin="http://elsewhere.example")[0] == 403
    with pytest.raises(json.JSONDecodeError):  # refused as plain text
        post("/api/pairs/0/change", change, Host="elsewhere.example")
    for path, body, words in (
        ("/api/pairs/99/change", change, "expected 0 to 4"),
        ("/api/pairs/0/change", b"no json", "expected a JSON object"),
        ("/api/pairs/0/change", b'{"kind": "paint", "box": [0,0,1,1], "runs": [0,1], "class": 9}', "class 9"),
        ("/api/pairs/0/change", b'{"kind": "clear", "revision": 77}', "another window"),
        ("/api/pairs/0/mask", b'{"points": [[500, 3]]}', "outside of the picture"),
        ("/api/pairs/0/mask", b'{"points": [[NaN, 3]]}', "nan or infinity"),
        ("/api/pairs/0/mask", b'{"box": [9, 9, 3, 3]}', "x0 < x1"),
        ("/api/pairs/0/mask", b'{"points": [[1, 1]], "on": "depth"}', "no such picture"),
        ("/api/pairs/0/mask", b'{"points": [[1, 1]], "previous": ["x", 0]}', "no longer held"),
        ("/api/pairs/0/mask", json.dumps({"points": [[1, 1]] * 3000}).encode(), "at most 256"),
    ):
        status, answer = post(path, body)
        assert status == 422
        assert words in answer["error"]
        assert "\n" not in answer["error"]
