"""The page of `fusionsam demo`: what is on it, and which question each control asks."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import socket
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusionsam.alignment.apply import Aligner
from fusionsam.inference.predictor import FusionSAM
from fusionsam.page import align_panel
from fusionsam.page.align_panel import AlignHandlers
from fusionsam.page.handlers import TOOLS, USES, Handlers
from fusionsam.page.views import CSS, STAGE_JS, swatches, waiting
from fusionsam.types import JsonObject

UPLOAD = "64mb"
SESSIONS = 20
"""Pages that keep their pair at the same time; the one unused longest starts anew."""
BUILT_IN = {"Day": 0, "Night": 3}
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


def _picture(label: str) -> gr.Image:
    # reduced for the page: the full ones are among the downloads
    return gr.Image(
        label=label, elem_id=label.lower(), interactive=False, buttons=["fullscreen"], format="png", min_width=120
    )


def _small(text: str, name: str) -> gr.Button:
    return gr.Button(text, size="sm", min_width=80, elem_id=name)


class _Source:
    """The row where a pair is chosen."""

    def __init__(self) -> None:
        with gr.Row():
            # files, not gr.Image: the readers must see 16-bit and oversized uploads as they are
            self.visible = gr.File(label="Drop a visible image", elem_id="visible-file", height=130)
            self.infrared = gr.File(
                label="Drop an infrared image (a radiometric JPEG gives both)", elem_id="infrared-file", height=130
            )
            with gr.Column(min_width=260):
                with gr.Row():
                    self.built: list[tuple[gr.Button, int | None]] = [
                        (_small(name, f"pair-{name.lower()}"), index) for name, index in BUILT_IN.items()
                    ]
                    self.built.append((_small("Draw another", "pair-another"), None))
                self.use = gr.Radio(list(USES), value="both", label="Use of the pair", elem_id="use")


class _Pictures:
    """The line that tells what was found, and the row of pictures."""

    def __init__(self) -> None:
        self.status = gr.HTML("", elem_id="status")
        with gr.Row(elem_id="pictures"):
            self.visible, self.infrared = _picture("Visible"), _picture("Infrared")
            self.fused = gr.HTML(waiting(), elem_id="fused", js_on_load=STAGE_JS)
            self.segmentation = _picture("Segmentation")


class _Prompts:
    """The row of what a click means, which classes are shown, and the downloads."""

    def __init__(self, classes: list[str], steered: bool) -> None:
        with gr.Row():
            with gr.Column(min_width=280):
                self.tool = gr.Radio(TOOLS, value=TOOLS[0], label="A click or tap is", info=HELP, elem_id="tool")
                self.named = gr.Dropdown(
                    [NO_CLASS, *classes], value=NO_CLASS, label="It is", info=NAMED, elem_id="named", visible=steered
                )
                with gr.Row():
                    self.undo, self.clear = _small("Undo", "undo"), _small("Clear my prompts", "clear")
                # the style sheet obeys it: a question to the server could be overtaken by an older answer
                gr.Checkbox(
                    True, label="Show prompts (dashed: the model's own)", elem_id="show-prompts", interactive=True
                )
            with gr.Column(min_width=280):
                self.on = gr.CheckboxGroup(classes[1:], value=classes[1:], label="Classes", elem_id="classes")
            self.files = gr.File(
                label="Download", interactive=False, file_count="multiple", elem_id="files", min_width=280
            )


def build(model: FusionSAM, folder: Path, aligner: Aligner | None = None) -> gr.Blocks:
    """The page of one model; `folder` takes the files it writes, `aligner` brings pairs of two cameras together."""
    classes, ask = list(model.config.classes), Handlers(model, folder)
    with gr.Blocks(title="FusionSAM", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        session, rig = gr.State(None), gr.State(aligner)
        gr.Markdown(
            f"# FusionSAM\nFuses a visible and a thermal image into one picture and labels every pixel: "
            f"{', '.join(classes[1:])} (weights `{model.name}`). Nothing leaves the machine that serves this page."
        )
        source, pictures = _Source(), _Pictures()
        prompts = _Prompts(classes, model.network.steering is not None)
        slider = gr.ImageSlider(
            label="Slide: visible | infrared",
            interactive=False,
            elem_id="slider",
            buttons=["fullscreen"],
            format="png",
            max_height=420,
        )
        on, fused = prompts.on, pictures.fused
        answer = [pictures.status, fused, pictures.segmentation]
        pair = [source.visible, source.infrared]
        opened = [session, pictures.visible, pictures.infrared, slider, *answer]
        # no queue: its stream closes when all is answered, and what is asked in that moment hears its answer only when
        # the next question opens the stream again (seen with gradio 6.31)
        shared: JsonObject = {"queue": False, "show_progress_on": pictures.status}
        many = {**shared, "trigger_mode": "multiple"}
        latest = {**shared, "trigger_mode": "always_last"}
        reopen = (ask.open_pair, [*pair, rig, source.use, on], opened)
        files = (source.visible, source.infrared)
        events = [listen(*reopen, **latest) for file in files for listen in (file.upload, file.clear)]
        for button, index in source.built:
            drawn = button.click(functools.partial(ask.scene, index), None, pair, **shared)
            events.append(drawn.then(*reopen, **shared))
        events += align_panel.build(AlignHandlers(ask.turn, ask.mine), pair, rig, reopen, shared)
        events.append(fused.click(ask.press, [session, prompts.tool, prompts.named, on], answer, **many))
        events.append(prompts.undo.click(ask.undo, [session, on], answer, **many))
        events.append(prompts.clear.click(ask.clear, [session, on], answer, **shared))
        events.append(source.use.input(ask.take, [session, source.use, on], answer, **latest))
        on.input(ask.redraw, [session, on], answer, **latest)
        for event in events:  # after the answer, so that nobody waits for files
            event.then(
                ask.files, session, prompts.files, queue=False, show_progress="hidden", trigger_mode="always_last"
            )
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
