"""What the controls of the page ask, and what each answers with."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import numpy as np

from fusionsam.alignment.apply import Aligner
from fusionsam.data.images import write_png
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.inference.predictor import FusionSAM
from fusionsam.page.session import PairSession, Use, read_pair
from fusionsam.page.views import complaint, describe, marks, preview, shown, stage, waiting, write_files
from fusionsam.types import InputError

WAITING = 20
"""Questions that wait for the model at the same time."""
ANSWER = "answer-"
"""Begins the name of the folder of an answer's downloads."""
KEPT = 2
"""Answers of a page whose downloads are there: the newest, and the one that may be on its way."""
SEED = 7  # of examples/make_pairs.py, so that the page shows the pairs of the README
DRAWN = re.compile(r"scene\d+_(?:visible|infrared)\.png")
"""Names of the built-in pairs' files."""
OTHERS = range(4, 200)
"""Scenes that "Draw another" chooses from: each is kept on disk while the page is served."""
USES: dict[str, Use] = {"both": "both", "visible only": "visible", "infrared only": "infrared"}
TOOLS = ["on the object", "off the object", "box"]


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
    ) -> list[object]:
        """Read and predict what lies in the two drop areas, brought together by `rig`; no change if the page opened
        another pair meanwhile."""
        page, number = str(request.session_hash), next(self.numbers)
        self.newest[page] = number
        nothing = [None, None, None, None]
        if visible is None and infrared is None:
            return [*nothing, "", waiting(), None]
        try:
            pair, told = read_pair(visible, infrared, None if self._drawn(visible) else rig)
            images = (pair.visible, pair.infrared)
            with self.turn():
                if self.newest.get(page) != number:
                    return [gr.skip()] * 7
                session = PairSession(
                    self.model, *images, pair.covered, "both" if None in images else USES[use], pair.told, told
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
    def _answer(session: PairSession, on: list[str]) -> list[object]:
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
    ) -> list[object]:
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
