"""The demo page in a real Chromium, against a real `fusionsam demo`: uploads, clicks, boxes, classes, one modality,
downloads, a phone's width, and no word to any other server."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.geometry import centre, similarity
from fusionsam.alignment.points import rig_from_points
from fusionsam.alignment.rig import Rig, read_rig
from fusionsam.alignment.warp import Warp
from fusionsam.config.schema import SteeringConfig, preset
from fusionsam.data.images import read_infrared, read_visible, write_png
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.inference.predictor import FusionSAM
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.types import Prompts
from fusionsam.weights.checkpoint import save_checkpoint

H, W = 96, 128
COUNT_QUESTIONS = """
const ask = window.fetch; window.questions = 0; window.unanswered = 0;
window.fetch = async (...what) => {
  if (!String(what[0]?.url ?? what[0]).includes("/run/")) return ask(...what);
  window.questions++; window.unanswered++;
  try { return await ask(...what) } finally { window.unanswered-- }
};"""
PNG_END = b"IEND\xaeB`\x82"
PATIENCE = 240  # seconds: the machine may be busy; a healthy page answers in a few


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    config = preset("debug")
    config.steering = SteeringConfig(width=8)  # so that the page lets a click name a class
    return save_checkpoint(tmp_path_factory.mktemp("w") / "small", FusionSAMNetwork(config).eval(), {})


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder, drawn = tmp_path_factory.mktemp("pair"), draw_scene(5, 0, (H, W))
    write_png(folder / "street.png", drawn.visible)
    write_png(folder / "heat.png", drawn.infrared)
    (folder / "notes.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def address(weights, tmp_path_factory):
    """A server of its own, ended as a service manager would; it takes its files with it."""
    scratch = tmp_path_factory.mktemp("scratch")
    command = [sys.executable, "-m", "fusionsam", "demo", "--weights", str(weights), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    ) as server:
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        yield found[0]
        assert list(scratch.glob("fusionsam-demo-*/*"))
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    assert list(scratch.iterdir()) == []


class Page:
    """What a person does and sees."""

    def __init__(self, browser, address):
        self.browser, self.address = browser, address
        browser.get(address)
        self.wait(lambda: self.all("#visible-file input[type=file]") and self.all("#tool input"))
        browser.execute_script(COUNT_QUESTIONS)

    def wait(self, true):
        return WebDriverWait(self.browser, PATIENCE, 0.1).until(lambda _: true())

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.browser.execute_script("return document.querySelector(arguments[0])?.innerText || ''", selector)

    def says(self, *words):
        self.wait(lambda: all(word in self.text("#status") for word in words))

    def upload(self, which, path):
        self.wait(lambda: self.all(f"#{which}-file input[type=file]"))
        self.all(f"#{which}-file input[type=file]")[0].send_keys(str(path))

    def press(self, selector):
        self.browser.execute_script("document.querySelector(arguments[0]).click()", selector)

    def at(self, x, y):
        """Screen position of a pixel's centre, and the pixels' size on the screen."""
        script = "const r = document.querySelector('.stage svg').getBoundingClientRect(); return [r.x, r.y, r.width]"
        left, top, width = self.browser.execute_script(script)
        return left + (x + 0.5) * width / W, top + (y + 0.5) * width / W, width / W

    def pointer(self, *steps):
        chain = ActionChains(self.browser, duration=50)
        for x, y, act in steps:
            left, top, _ = self.at(x, y)
            chain.w3c_actions.pointer_action.move_to_location(round(left), round(top))
            for name in act.split():
                getattr(chain, name)()
        chain.perform()

    def marks(self, kind, *attributes):
        found = "[...document.querySelectorAll('.stage ' + arguments[0])]"
        script = f"return {found}.map(mark => arguments[1].map(name => +mark.getAttribute(name)))"
        return self.browser.execute_script(script, kind, list(attributes))

    def visible_marks(self):
        """How many points and boxes are drawn, whatever is in the page."""
        found = "[...document.querySelectorAll('.stage circle, .stage rect.box')]"
        return self.browser.execute_script(f"return {found}.filter(mark => mark.checkVisibility()).length")

    def fetch(self, url):
        """The picture at `url`."""
        for _ in range(5):  # gradio saves a picture again that it is serving when the same one is shown again
            with suppress(HTTPException), urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                content = answer.read()
                if content.endswith(PNG_END):
                    return np.array(Image.open(BytesIO(content)))
            time.sleep(0.2)
        raise AssertionError(f"{url}: cut short five times")

    def downloads(self):
        # in one step: between two, an answer may replace the elements
        links = self.browser.execute_script("return [...document.querySelectorAll('#files a[href]')].map(a => a.href)")
        return {link.rsplit("/", 1)[1]: link for link in links}

    def download(self, name):
        return self.fetch(self.downloads()[name])

    def downloaded(self, name, expected, wrong=0.002):
        """Whether the file offered shows `expected`, but for pixels that another number of threads may flip."""

        def arrived():
            try:
                found = self.download(name)
            except (KeyError, OSError):  # not there yet, or of an answer that a newer one has replaced
                return False
            return found.shape == expected.shape and (found != expected).mean() <= wrong

        self.wait(arrived)

    def picture(self, selector):
        # one that is being replaced has no address for a moment
        script = "const i = document.querySelector(arguments[0]); return i?.complete && i.naturalWidth ? i.src : null"
        address = self.wait(lambda: self.browser.execute_script(script, f"{selector} img"))
        return self.fetch(address)


@pytest.fixture(scope="module")
def page(browser, address, scene):
    page = Page(browser, address)
    page.upload("visible", scene / "street.png")
    page.says("from the visible image alone")
    page.upload("infrared", scene / "heat.png")
    page.says(f"{W}x{H} pixels", "the model gave itself")
    return page


@pytest.fixture(scope="module")
def model(weights):
    return FusionSAM.from_pretrained(weights, "cpu")


@pytest.fixture
def fresh(page):
    """The pair with the model's own prompts."""
    asked = "return [window.questions, window.unanswered]"
    before, _ = page.browser.execute_script(asked)
    page.press("#clear")

    def answered():  # what the page said already must not be taken for the answer, nor arrive amid the test
        questions, unanswered = page.browser.execute_script(asked)
        return questions > before and not unanswered

    page.wait(answered)
    page.says("the model gave itself")
    return page


def test_four_pictures_and_the_files_are_the_prediction(fresh, scene, model):
    expected = model.predict(scene / "street.png", scene / "heat.png")
    fresh.downloaded("labels.png", expected.labels)
    np.testing.assert_array_equal(fresh.picture("#visible"), np.array(Image.open(scene / "street.png")))
    np.testing.assert_array_equal(fresh.picture("#infrared"), np.array(Image.open(scene / "heat.png")))
    overlay = np.asarray(expected.overlay())
    assert fresh.picture("#segmentation").shape == overlay.shape
    assert np.abs(fresh.picture("#segmentation").astype(int) - overlay).mean() < 1
    boxes = fresh.marks("rect.box", "x", "y")
    own = expected.prompts
    assert len(fresh.marks("circle", "r")) == int((own.point_labels >= 0).sum())
    np.testing.assert_allclose(boxes, own.boxes[0, :, :2], atol=0.1)
    assert fresh.all("#slider img")


def test_left_right_and_dragging_are_on_off_and_box(fresh, scene, model):
    fresh.pointer((41, 30, "click"))
    fresh.says("1 point and 0 boxes of yours")
    fresh.pointer((90, 70, "context_click"))
    fresh.says("2 points and 0 boxes of yours")
    fresh.pointer((100, 80, "click_and_hold"), (60, 50, ""), (20, 10, "release"))
    fresh.says("2 points and 1 box of yours")
    (on,), (off,) = fresh.marks("circle.on", "cx", "cy"), fresh.marks("circle.off", "cx", "cy")
    (box,) = fresh.marks("rect.box", "x", "y", "width", "height")
    pixel = 1 / fresh.at(0, 0)[2]  # of the screen, in pixels of the picture
    np.testing.assert_allclose(on, [41.5, 30.5], atol=pixel)
    np.testing.assert_allclose(off, [90.5, 70.5], atol=pixel)
    np.testing.assert_allclose(box, [20, 10, 81, 71], atol=2 * pixel)
    x, y, width, height = box
    given = Prompts(
        points=torch.tensor([[on, off]]) - 0.5,
        point_labels=torch.tensor([[1, 0]]),
        boxes=torch.tensor([[[x, y, x + width - 1, y + height - 1]]]),
    )
    fresh.downloaded("labels.png", model.predict(scene / "street.png", scene / "heat.png", given).labels)
    fresh.wait(lambda: "mask.png" in fresh.downloads())
    assert set(np.unique(fresh.download("mask.png"))) <= {0, 255}
    fresh.press("#undo")
    fresh.says("1 point and 1 box of yours")


def test_a_tap_means_what_the_tool_says(fresh):
    fresh.press("#tool label:nth-of-type(2) input")
    fresh.pointer((64, 48, "click"))
    fresh.says("1 point and 0 boxes of yours")
    assert len(fresh.marks("circle.off", "cx")) == 1
    fresh.press("#tool label:nth-of-type(1) input")


def test_a_click_that_names_a_class_gives_its_pixel_that_class(fresh, scene, model):
    visible, infrared = scene / "street.png", scene / "heat.png"
    first = model.predict(visible, infrared).labels
    classes = preset("debug").classes
    wanted = next(name for index, name in enumerate(classes) if index and index != first[40, 60])
    box = fresh.all("#named input")[0]
    box.click()
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(wanted, Keys.ENTER)
    fresh.pointer((60, 40, "click"))
    fresh.says("1 point")
    prompts = {"points": [[60, 40]], "classes": [wanted]}
    expected = model.predict(visible, infrared, prompts).labels
    assert classes[expected[40, 60]] == wanted
    fresh.downloaded("labels.png", expected)
    box.click()
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("no class: pick a mask", Keys.ENTER)


def test_classes_go_and_come_back(fresh, scene, model):
    with_all = np.asarray(model.predict(scene / "street.png", scene / "heat.png").overlay())

    def complete():
        seen = fresh.picture("#segmentation")  # lower while a row of the legend lacks
        # another number of threads may flip a pixel
        return seen.shape == with_all.shape and np.count_nonzero(seen != with_all) < with_all.size * 0.01

    fresh.wait(complete)
    count = len(fresh.all("#classes input"))
    for number in range(1, count + 1):
        fresh.press(f"#classes label:nth-of-type({number}) input")
    fused = fresh.download("fused.png")
    fresh.wait(lambda: np.array_equal(fresh.picture("#segmentation")[:H, :W], fused))
    for number in range(1, count + 1):
        fresh.press(f"#classes label:nth-of-type({number}) input")
    fresh.wait(complete)


def test_one_modality_taken_away(fresh, scene, model):
    fresh.press("#use label:nth-of-type(3) input")
    fresh.says("with the infrared image alone", "get another class")
    fresh.downloaded("labels.png", model.predict(None, scene / "heat.png").labels)
    fresh.press("#use label:nth-of-type(1) input")
    fresh.says("the model gave itself")


def test_prompts_can_be_hidden_and_stay_so(fresh):
    boxes, circles = len(fresh.marks("rect.box", "x")), len(fresh.marks("circle", "cx"))
    assert boxes
    assert circles
    fresh.press("#show-prompts input")
    assert fresh.visible_marks() == 0
    fresh.pointer((41, 30, "click"))
    fresh.says("1 point and 0 boxes of yours")  # a later answer does not bring them back
    assert fresh.marks("circle.on", "cx")
    assert fresh.visible_marks() == 0
    fresh.press("#show-prompts input")
    assert fresh.visible_marks() == len(fresh.marks("circle", "cx")) + len(fresh.marks("rect.box", "x"))


def test_nothing_is_wider_than_a_phone(fresh):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    fresh.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        width = "return [innerWidth, document.documentElement.scrollWidth]"
        fresh.wait(lambda: fresh.browser.execute_script(width) == [390, 390])
        assert fresh.at(0, 0)[2] * W > 300  # the picture to click on takes the width
    finally:
        fresh.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_bad_uploads_are_one_sentence_on_the_page(browser, page, address, scene):
    other = Page(browser, address)
    other.upload("visible", scene / "notes.png")
    other.says("visible image notes.png: is not a readable image")
    text = other.text("#status .error")
    assert "Traceback" not in text
    assert "/" not in text
    assert not other.all(".stage")


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory):
    """A pair of two sizes, and the rig that it was made with."""
    folder, drawn, size = tmp_path_factory.mktemp("cameras"), draw_scene(5, 6, (H, W)), (80, 104)
    rig = Rig((H, W), size, similarity(1.15, 2.0, centre(size), (W / 2 + 4, H / 2 - 3)))
    write_png(folder / "street.png", drawn.visible)
    write_png(folder / "heat.png", Warp(rig, "infrared")(drawn.infrared).image)
    return folder, rig


def test_two_cameras_are_aligned_by_clicks_and_keys(browser, page, address, two_cameras, model):
    folder, rig = two_cameras
    other = Page(browser, address)
    other.upload("visible", folder / "street.png")
    other.says("from the visible image alone")
    other.upload("infrared", folder / "heat.png")
    other.says("align the two below")
    other.press("#align button")
    other.wait(lambda: other.all("#align-take") and other.all("#align-take")[0].is_displayed())
    other.press("#align-use")
    other.wait(lambda: "take a pair first" in other.text("#align-status"))
    other.press("#align-take")
    other.wait(lambda: other.all("#align-edges .stage img"))

    def edges():
        return browser.execute_script("return document.querySelector('#align-edges img').src")

    def click(kind, x, y):
        """On the screen, in the middle of a pixel; where it really went, in pixels."""
        script = """const s = document.querySelector(arguments[0]); s.scrollIntoView({block: 'center'});
        const r = s.getBoundingClientRect(); return [r.x, r.y, r.width, s.viewBox.baseVal.width]"""
        left, top, width, pixels = browser.execute_script(script, f"#align-{kind} .stage svg")
        place = round(left + (x + 0.5) * width / pixels), round(top + (y + 0.5) * width / pixels)
        chain = ActionChains(browser, duration=50)
        chain.w3c_actions.pointer_action.move_to_location(*place)
        chain.click().perform()
        return (place[0] - left) * pixels / width - 0.5, (place[1] - top) * pixels / width - 0.5

    went = {"visible": [], "infrared": []}
    for number, point in enumerate(([12.0, 10.0], [90.0, 14.0], [86.0, 70.0], [16.0, 66.0], [50.0, 40.0]), 1):
        before = edges()
        went["infrared"].append(click("infrared", *point))
        other.wait(lambda n=number: f"Now click point {n} in the visible picture" in other.text("#align-status"))
        went["visible"].append(click("visible", *rig.infrared_to_visible_points(np.array([point]))[0]))
        other.wait(lambda old=before: edges() != old)  # it moves
        other.wait(lambda n=number: len(other.all("#align-visible text.point")) == n)
    other.wait(lambda: "fitted to 5 points" in other.text("#align-status"))
    before = edges()
    other.all("#align-edges .stage")[0].click()
    for keys in ((Keys.ARROW_RIGHT,), (Keys.SHIFT, Keys.ARROW_LEFT)):
        chain = ActionChains(browser)
        for key in keys:
            chain.key_down(key)
        for key in reversed(keys):
            chain.key_up(key)
        chain.perform()
        other.wait(lambda old=before: edges() != old)
        before = edges()
    other.wait(lambda: "moved by hand" in other.text("#align-status"))
    other.press("#align-use")
    other.says("aligned by the rig", "infrared covers")
    links = "return [...document.querySelectorAll('#align-file a[href]')].map(a => a.href)"
    (link,) = other.wait(lambda: browser.execute_script(links))
    (folder / "rig.json").write_bytes(urllib.request.urlopen(link, timeout=PATIENCE).read())
    found = read_rig(folder / "rig.json")
    expected = rig_from_points(np.array(went["visible"]), np.array(went["infrared"]), (H, W), (80, 104), "x")
    middle = np.array([[50.0, 40.0]])
    wanted = expected.infrared_to_visible_points(middle)[0] + [1 - 10, 0]
    np.testing.assert_allclose(found.infrared_to_visible_points(middle)[0], wanted, atol=0.05)
    pair = Aligner(found)(read_visible(folder / "street.png"), read_infrared(folder / "heat.png"))
    other.downloaded("labels.png", model.predict(pair.visible, pair.infrared, covered=pair.covered).labels)
    other.press("#align-leave")
    other.says("align the two below")


def test_a_built_in_pair_and_no_other_server_was_asked(browser, address, page):
    other = Page(browser, address)
    other.press("#pair-night")
    other.says("640x480 pixels", "the model gave itself")
    time.sleep(1)
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert len(asked) > 20
    strangers = [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome", "about:"))]
    assert strangers == []
    refused = [
        entry["message"] for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]
    ]
    assert refused == []


@pytest.mark.parametrize(("name", "status"), [("127.0.0.1", 200), ("localhost", 200), ("elsewhere.example", 400)])
def test_a_name_made_to_point_here_gets_no_answer(page, address, name, status):
    connection = HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE)
    connection.request("GET", "/", headers={"Host": name})
    assert connection.getresponse().status == status
    connection.close()
