"""The page of `fusionsam demo`: what is on it and what each control asks. Gradio is imported here alone."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import ipaddress
import itertools
import logging
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionsam.alignment.apply import Aligner
from fusionsam.data.images import write_png
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError
from fusionsam.inference.predictor import FusionSAM
from fusionsam.page import align_panel
from fusionsam.page.align_panel import AlignHandlers
from fusionsam.page.session import PairSession, Use, read_pair
from fusionsam.page.views import (
    CSS,
    STAGE_JS,
    complaint,
    describe,
    marks,
    preview,
    shown,
    stage,
    swatches,
    waiting,
    write_files,
)

UPLOAD = "64mb"
SESSIONS = 20
"""Pages that keep their pair at the same time; the one unused longest starts anew."""
WAITING = 20
"""Questions that wait for the model at the same time."""
ANSWER = "answer-"
"""Begins the name of the folder of an answer's downloads."""
KEPT = 2
"""Answers of a page whose downloads are there: the newest, and the one that may be on its way."""
SEED = 7  # of examples/make_pairs.py, so that the page shows the pairs of the README
DRAWN = re.compile(r"scene\d+_(?:visible|infrared)\.png")
"""Names of the built-in pairs' files."""
BUILT_IN = {"Day": 0, "Night": 3}
OTHERS = range(4, 200)
"""Scenes that "Draw another" chooses from: each is kept on disk while the page is served."""
USES: dict[str, Use] = {"both": "both", "visible only": "visible", "infrared only": "infrared"}
TOOLS = ["on the object", "off the object", "box"]
HELP = "Mouse: click the object, right click what is not part of it, drag a box. Finger: choose here what it does."
NO_CLASS = "no class: pick a mask"
NAMED = "A class corrects the class map around the click; off the object it says that nothing is there."
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


class OwnServerOnly:
    """A header on every answer that keeps the browser from asking any other server than this one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI request."""

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, sealed)


def built_in(index: int, folder: Path) -> tuple[str, str]:
    """The two files of synthetic scene `index`, drawn unless they are there: gradio clears them away after an hour."""
    paths = folder / f"scene{index}_visible.png", folder / f"scene{index}_infrared.png"
    if not all(path.is_file() for path in paths):
        scene = draw_scene(SEED, index)
        for path, image in zip(paths, (scene.visible, scene.infrared), strict=True):
            assert image is not None
            write_png(path, image)
    return str(paths[0]), str(paths[1])


class Turns:
    """A lock that is given in the order in which it was asked for (threading.Lock may be taken again by whoever has
    just released it), to at most WAITING at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._now = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One's turn. Raises InputError where too many wait: each keeps a thread that serves the page's files, too."""
        with self._changed:
            if self._next - self._now >= WAITING:
                raise InputError(f"{WAITING} questions are waiting for the model already; ask again in a moment")
            mine, self._next = self._next, self._next + 1
            self._changed.wait_for(lambda: self._now == mine)
        try:
            yield
        finally:
            with self._changed:
                self._now += 1
                self._changed.notify_all()


class Handlers:
    """What the controls ask. Every answer is [status, fused, segmentation]; one that opens a pair has [session,
    visible, infrared, slider] before. `on` are the classes shown."""

    def __init__(self, model: FusionSAM, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.turn = Turns()  # one model, one at a time: what comes while another is answered waits
        self.newest: dict[str, int] = {}  # page -> number of the pair it opened last
        self.numbers = itertools.count()

    def scene(self, index: int | None) -> tuple[str, str]:
        """Files of a built-in pair; any of OTHERS for None."""
        with self.turn():
            return built_in(int(np.random.default_rng().choice(OTHERS)) if index is None else index, self.folder)

    def open_pair(
        self,
        visible: str | None,
        infrared: str | None,
        rig: Aligner | None,
        use: str,
        on: list[str],
        request: gr.Request,
    ) -> list[Any]:
        """Read and predict what lies in the two drop areas, brought together by `rig`; no change if the page opened
        another pair meanwhile."""
        page, number = str(request.session_hash), next(self.numbers)
        self.newest[page] = number
        nothing = [None, None, None, None]
        if visible is None and infrared is None:
            return [*nothing, "", waiting(), None]
        try:
            pair = read_pair(visible, infrared, None if self._drawn(visible) else rig)
            images = (pair.visible, pair.infrared)
            with self.turn():
                if self.newest.get(page) != number:
                    return [gr.skip()] * 7
                session = PairSession(
                    self.model, *images, pair.covered, "both" if None in images else USES[use], pair.told
                )
                answer = self._answer(session, on)
        except InputError as error:
            return [*nothing, complaint(error), waiting(), None]
        if self.newest.get(page) != number:
            return [gr.skip()] * 7
        # black where a camera does not reach: its border goes on there
        seen = zip(images, pair.covered, strict=True)
        pictures = [None if image is None else shown(image * there) for image, there in seen]
        slides = None if None in pictures else tuple(pictures)
        return [session, *pictures, slides, *answer]

    @staticmethod
    def _drawn(path: str | None) -> bool:
        """Whether an upload is a built-in pair's: those are aligned as they are."""
        return path is not None and DRAWN.fullmatch(Path(path).name) is not None

    @staticmethod
    def _answer(session: PairSession, on: list[str]) -> list[Any]:
        """The answer as it stands; to be asked for in one's turn, lest half of it is of the prompts before."""
        drawn = marks(session.now.prompts, session.size)
        return [describe(session), stage(session.masked(), session.size, drawn), preview(session.segmentation(on))]

    def redraw(self, session: PairSession | None, on: list[str]) -> list[object]:
        """The answer with other classes."""
        return [gr.skip()] * 3 if session is None else self.change(lambda _: None, session, on)

    def change(self, act: Callable[[PairSession], None], session: PairSession | None, on: list[str]) -> list[object]:
        """The answer after `act`, or its complaint beside the old pictures."""
        try:
            if session is None:
                raise InputError("there is no pair yet; drop two images or take a built-in pair")
            with self.turn():
                act(session)
                return self._answer(session, on)
        except InputError as error:
            return [complaint(error), gr.skip(), gr.skip()]

    def press(
        self, session: PairSession | None, tool: str, named: str, on: list[str], event: gr.EventData
    ) -> list[Any]:
        """A point or box from the script of the fused picture, which names the class `named`, if it is one."""
        classes = self.model.config.classes
        index = classes.index(named) if named in classes else -1
        sent = event._data if isinstance(event._data, dict) else {}
        x, y, *corner = [float(value) for value in sent.get("box") or sent.get("point") or [0, 0, 0]]
        if len(corner) == 2:
            return self.change(lambda s: s.drag(x, y, corner[0], corner[1], index), session, on)
        if not corner:
            off = bool(sent.get("off")) or tool == TOOLS[1]
            return self.change(lambda s: s.click(x, y, not off, index), session, on)
        return [gr.skip()] * 3

    def undo(self, session: PairSession | None, on: list[str]) -> list[object]:
        """Without the last prompt."""
        return self.change(PairSession.undo, session, on)

    def clear(self, session: PairSession | None, on: list[str]) -> list[object]:
        """With the model's own prompts again."""
        return self.change(lambda s: s.undo(all=True), session, on)

    def take(self, session: PairSession | None, use: str, on: list[str]) -> list[object]:
        """With both images, or one."""
        if session is None:
            return [gr.skip()] * 3
        return self.change(lambda s: s.take(USES[use]), session, on)

    def files(self, session: PairSession | None, request: gr.Request) -> list[str] | None:
        """The downloads of this page."""
        if session is None:
            return None
        mine = self.mine(request)
        try:
            mine.mkdir(exist_ok=True)
            # a folder for each answer: what is being downloaded must not change meanwhile
            with self.turn():
                paths = write_files(session, Path(tempfile.mkdtemp(dir=mine, prefix=ANSWER)))
            for older in sorted(mine.glob(f"{ANSWER}*"), key=lambda folder: folder.stat().st_mtime_ns)[:-KEPT]:
                shutil.rmtree(older, ignore_errors=True)
        except (InputError, FileNotFoundError):  # the page was closed meanwhile, its folder is gone
            return None
        return paths

    def leave(self, request: gr.Request) -> None:
        """The page was closed: its downloads go."""
        self.newest.pop(str(request.session_hash), None)
        shutil.rmtree(self.mine(request), ignore_errors=True)

    def mine(self, request: gr.Request) -> Path:
        """The folder of a page's downloads. Gradio hands on whatever name the browser sent, `../..` too, so it is
        named by a digest."""
        return self.folder / hashlib.sha256(str(request.session_hash).encode()).hexdigest()[:32]


def build(model: FusionSAM, folder: Path, aligner: Aligner | None = None) -> gr.Blocks:
    """The page of one model; `folder` takes the files it writes, `aligner` brings pairs of two cameras together."""
    classes, ask = model.config.classes, Handlers(model, folder)

    def picture(label: str) -> gr.Image:
        # reduced for the page: the full ones are among the downloads
        return gr.Image(
            label=label, elem_id=label.lower(), interactive=False, buttons=["fullscreen"], format="png", min_width=120
        )

    def small(text: str, name: str) -> gr.Button:
        return gr.Button(text, size="sm", min_width=80, elem_id=name)

    with gr.Blocks(title="FusionSAM", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        session, rig = gr.State(None), gr.State(aligner)
        gr.Markdown(
            f"# FusionSAM\nFuses a visible and a thermal image into one picture and labels every pixel: "
            f"{', '.join(classes[1:])} (weights `{model.name}`). Nothing leaves the machine that serves this page."
        )
        with gr.Row():
            # files, not gr.Image: the readers must see 16-bit and oversized uploads as they are
            visible_file = gr.File(label="Drop a visible image", elem_id="visible-file", height=130)
            infrared_file = gr.File(
                label="Drop an infrared image (a radiometric JPEG gives both)", elem_id="infrared-file", height=130
            )
            with gr.Column(min_width=260):
                with gr.Row():
                    built: list[tuple[gr.Button, int | None]] = [
                        (small(name, f"pair-{name.lower()}"), index) for name, index in BUILT_IN.items()
                    ]
                    built.append((small("Draw another", "pair-another"), None))
                use = gr.Radio(list(USES), value="both", label="Use of the pair", elem_id="use")
        status = gr.HTML("", elem_id="status")
        with gr.Row(elem_id="pictures"):
            visible, infrared = picture("Visible"), picture("Infrared")
            fused = gr.HTML(waiting(), elem_id="fused", js_on_load=STAGE_JS)
            segmentation = picture("Segmentation")
        with gr.Row():
            with gr.Column(min_width=280):
                tool = gr.Radio(TOOLS, value=TOOLS[0], label="A click or tap is", info=HELP, elem_id="tool")
                named = gr.Dropdown(
                    [NO_CLASS, *classes], value=NO_CLASS, label="It is", info=NAMED, elem_id="named",
                    visible=model.network.steering is not None,
                )  # fmt: skip
                with gr.Row():
                    undo, clear = small("Undo", "undo"), small("Clear my prompts", "clear")
                # the style sheet obeys it: a question to the server could be overtaken by an older answer
                gr.Checkbox(
                    True, label="Show prompts (dashed: the model's own)", elem_id="show-prompts", interactive=True
                )
            with gr.Column(min_width=280):
                on = gr.CheckboxGroup(classes[1:], value=classes[1:], label="Classes", elem_id="classes")
            files = gr.File(label="Download", interactive=False, file_count="multiple", elem_id="files", min_width=280)
        slider = gr.ImageSlider(
            label="Slide: visible | infrared",
            interactive=False,
            elem_id="slider",
            buttons=["fullscreen"],
            format="png",
            max_height=420,
        )

        answer = [status, fused, segmentation]
        pair, opened = [visible_file, infrared_file], [session, visible, infrared, slider, *answer]
        # no queue: its stream closes when all is answered, and what is asked in that moment hears its answer only when
        # the next question opens the stream again (seen with gradio 6.31)
        shared: dict[str, Any] = {"queue": False, "show_progress_on": status}
        many = {**shared, "trigger_mode": "multiple"}
        latest = {**shared, "trigger_mode": "always_last"}
        events = [
            listen(ask.open_pair, [*pair, rig, use, on], opened, **latest)
            for listen in (visible_file.upload, visible_file.clear, infrared_file.upload, infrared_file.clear)
        ]
        for button, index in built:
            drawn = button.click(functools.partial(ask.scene, index), None, pair, **shared)
            events.append(drawn.then(ask.open_pair, [*pair, rig, use, on], opened, **shared))
        reopen = (ask.open_pair, [*pair, rig, use, on], opened)
        events += align_panel.build(AlignHandlers(ask.turn, ask.mine), pair, rig, reopen, shared)
        events.append(fused.click(ask.press, [session, tool, named, on], answer, **many))
        events.append(undo.click(ask.undo, [session, on], answer, **many))
        events.append(clear.click(ask.clear, [session, on], answer, **shared))
        events.append(use.input(ask.take, [session, use, on], answer, **latest))
        on.input(ask.redraw, [session, on], answer, **latest)
        for event in events:  # after the answer, so that nobody waits for files
            event.then(ask.files, session, files, queue=False, show_progress="hidden", trigger_mode="always_last")
        page.unload(ask.leave)
    return page


def _failed(record: logging.LogRecord) -> bool:
    # pages that are open when the server ends are cut off: no error, though uvicorn logs it as one
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def serve(model: FusionSAM, listener: socket.socket, folder: Path, aligner: Aligner | None = None) -> None:
    """Serve the page at a bound socket until interrupted; what people upload and download lies in `folder`."""
    host, port = listener.getsockname()[:2]
    page = build(model, folder, aligner)
    page.state_session_capacity = SESSIONS
    guards = [Middleware(OwnServerOnly)]
    shown = f"[{host}]" if ":" in host else host
    if ipaddress.ip_address(host).is_loopback and ":" not in host:
        # a page elsewhere whose name was made to point here (DNS rebinding) gets no answer; older versions of the
        # middleware cannot read an IPv6 address
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", host], www_redirect=False))
    # not page.launch(): it gives up on machines too busy to answer it within seconds
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=guards),
        page,
        path="/",
        max_file_size=UPLOAD,
        ssr_mode=False,
        footer_links=[],
        enable_monitoring=False,
        show_error=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS + swatches(model.config.palette),
    )
    logging.getLogger("uvicorn.error").addFilter(_failed)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    print(f"The page is at http://{shown}:{port} (Ctrl+C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
