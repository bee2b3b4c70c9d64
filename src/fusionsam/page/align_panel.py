"""The part of the demo page where two cameras are brought together: two pictures to click in, the edges of one over the
other, keys that nudge, and rig.json to download."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from fusionsam.alignment.apply import Aligner
from fusionsam.page.aligning import Aligning, Kind
from fusionsam.page.session import read_uploads
from fusionsam.page.views import complaint, numbered, shown, stage
from fusionsam.types import InputError, JsonObject

RIG = "the rig of this page"
HELP = (
    "Take the pair that lies above, as its two cameras took it. Click the same thing in both pictures, four times or "
    "more, all over them; or let it search. Click the picture of edges and use the keys: arrows move infrared, + and - "
    "resize it, [ and ] turn it, ten times as far with Shift."
)
KINDS: tuple[Kind, Kind] = ("visible", "infrared")

# a press that moves less than 6 screen pixels is a point
POINT_JS = """
let start = null;
element.addEventListener('dragstart', (e) => e.preventDefault());
element.addEventListener('pointerdown', (e) => { start = e.target.closest('.stage') ? [e.clientX, e.clientY] : null; });
element.addEventListener('pointerup', (e) => {
  const svg = element.querySelector('.stage svg');
  if (!start || !svg || e.button || Math.hypot(e.clientX - start[0], e.clientY - start[1]) >= 6) return;
  const r = svg.getBoundingClientRect(), v = svg.viewBox.baseVal;
  const to = (at, low, span, size) => Math.min(size - 1, Math.max(0, (at - low) / span * size - 0.5));
  trigger('click', {point: [to(e.clientX, r.left, r.width, v.width), to(e.clientY, r.top, r.height, v.height)]});
});
"""
KEYS_JS = """
element.tabIndex = 0;
const keys = ['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown', '+', '-', '[', ']', '*', '=', '_', '{', '}'];
element.addEventListener('click', (e) => { if (e.isTrusted) { e.stopImmediatePropagation(); element.focus(); } }, true);
element.addEventListener('keydown', (e) => {
  if (!keys.includes(e.key) || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  trigger('click', {key: e.key, far: e.shiftKey && e.key !== '+'});
});
"""


@dataclass
class AlignHandlers:
    """What the controls ask. Every answer is [line, visible, infrared, edges]."""

    turn: Callable[[], AbstractContextManager[None]]
    mine: Callable[[gr.Request], Path]
    """Folder of a page's downloads."""

    def begin(self, visible: str | None, infrared: str | None, rig: Aligner | None) -> list[object]:
        """Take the uploaded pair as it is: [aligning, line, visible, infrared, edges]."""
        try:
            pair = read_uploads(visible, infrared)
            one, two = pair.visible, pair.infrared
            if one is None or two is None:
                raise InputError("align: drop a visible and an infrared image above first")
            aligning = Aligning(one, two, None if rig is None else rig.rig)
            return [aligning, *self.answer(aligning)]
        except InputError as error:
            return [None, complaint(error), "", "", ""]

    @staticmethod
    def answer(aligning: Aligning) -> list[object]:
        """How it stands."""
        with aligning.lock:
            try:
                line, edges = aligning.says(), aligning.picture()
            except InputError as error:  # of points that fold the picture: the points are still shown, to be undone
                line, edges = complaint(error), None
            stages = []
            for kind, image, size in zip(KINDS, (aligning.visible, aligning.infrared), aligning.sizes, strict=True):
                stages.append(stage(shown(image), size, numbered(aligning.of(kind), size), kind.capitalize()))
            over = gr.skip() if edges is None else stage(edges, aligning.sizes[0], "", "Edges")
            return [line, *stages, over]

    def change(self, aligning: Aligning | None, act: Callable[[Aligning], object]) -> list[object]:
        """The answer after `act`, or its complaint beside the old pictures."""
        if aligning is None:
            return [complaint(InputError("align: take a pair first")), *[gr.skip()] * 3]
        try:
            with aligning.lock:
                act(aligning)
                return self.answer(aligning)
        except InputError as error:
            return [complaint(error), *[gr.skip()] * 3]

    def visible(self, aligning: Aligning | None, event: gr.EventData) -> list[object]:
        """A point in the visible picture."""
        return self._point("visible", aligning, event)

    def infrared(self, aligning: Aligning | None, event: gr.EventData) -> list[object]:
        """A point in the infrared picture."""
        return self._point("infrared", aligning, event)

    def _point(self, kind: Kind, aligning: Aligning | None, event: gr.EventData) -> list[object]:
        point = _sent(event).get("point")
        if not isinstance(point, list) or len(point) != 2:
            return [gr.skip()] * 4
        return self.change(aligning, lambda a: a.click(kind, float(point[0]), float(point[1])))

    def key(self, aligning: Aligning | None, event: gr.EventData) -> list[object]:
        """A nudge."""
        sent = _sent(event)
        if "key" not in sent:
            return [gr.skip()] * 4
        return self.change(aligning, lambda a: a.nudge(str(sent["key"]), bool(sent.get("far"))))

    def undo(self, aligning: Aligning | None) -> list[object]:
        """Without the last point."""
        return self.change(aligning, Aligning.undo)

    def clear(self, aligning: Aligning | None) -> list[object]:
        """Without points and nudges."""
        return self.change(aligning, Aligning.clear)

    def search(self, aligning: Aligning | None) -> list[object]:
        """Found in the pair itself."""

        def act(one: Aligning) -> None:
            with self.turn():
                one.search()

        return self.change(aligning, act)

    def use(self, aligning: Aligning | None, request: gr.Request) -> list[object]:
        """[rig in use, line, rig.json to download]."""
        try:
            if aligning is None:
                raise InputError("align: take a pair first")
            with aligning.lock:
                rig = aligning.finished()
            mine = self.mine(request)
            mine.mkdir(exist_ok=True)
            path = rig.write(Path(tempfile.mkdtemp(dir=mine, prefix="rig-")) / "rig.json")
            line = f"In use, and below to download: {rig.told.get('verdict', 'the rig')}."
            return [Aligner(rig, RIG), line, str(path)]
        except InputError as error:
            return [gr.skip(), complaint(error), gr.skip()]


def _sent(event: gr.EventData) -> JsonObject:
    return event._data if isinstance(event._data, dict) else {}


def build(
    ask: AlignHandlers,
    pair: list[gr.File],
    rig: gr.State,
    reopen: tuple[Callable[..., list[object]], list[Component], list[Component]],
    shared: JsonObject,
) -> list[Dependency]:
    """The panel, within the page; `reopen` predicts the pair again once a rig is in use. The events that did so."""
    with gr.Accordion("Two cameras that see apart: align them", open=False, elem_id="align"):
        aligning = gr.State(None)
        gr.Markdown(HELP)
        with gr.Row():
            names = {"take": "Take this pair", "search": "Search", "undo": "Undo point", "clear": "Clear"}
            names |= {"use": "Use this rig", "leave": "Use no rig"}
            buttons = {
                key: gr.Button(text, size="sm", min_width=80, elem_id=f"align-{key}") for key, text in names.items()
            }
        line = gr.HTML("", elem_id="align-status")
        with gr.Row(elem_id="align-pictures"):
            visible = gr.HTML("", elem_id="align-visible", js_on_load=POINT_JS)
            infrared = gr.HTML("", elem_id="align-infrared", js_on_load=POINT_JS)
            edges = gr.HTML("", elem_id="align-edges", js_on_load=KEYS_JS)
        file = gr.File(label="rig.json", interactive=False, elem_id="align-file", height=90)

    many: JsonObject = {**shared, "show_progress_on": line, "trigger_mode": "multiple"}
    once = {**many, "trigger_mode": "once"}
    answer = [line, visible, infrared, edges]
    buttons["take"].click(ask.begin, [*pair, rig], [aligning, *answer], **once)
    visible.click(ask.visible, aligning, answer, **many)
    infrared.click(ask.infrared, aligning, answer, **many)
    edges.click(ask.key, aligning, answer, **many)
    buttons["search"].click(ask.search, aligning, answer, **once)
    buttons["undo"].click(ask.undo, aligning, answer, **many)
    buttons["clear"].click(ask.clear, aligning, answer, **once)
    used = buttons["use"].click(ask.use, aligning, [rig, line, file], **once)
    left = buttons["leave"].click(lambda: (None, "No rig is in use.", None), None, [rig, line, file], **once)
    function, inputs, outputs = reopen
    return [event.then(function, inputs, outputs, **shared) for event in (used, left)]
