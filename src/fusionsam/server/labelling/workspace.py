"""What the labelling page works on: the pairs that are open, their pictures, masks and drawings; the next pair is made
ready in the background."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusionsam.alignment.apply import Aligner
from fusionsam.data.dataset import read_sample
from fusionsam.data.labelling.drawing import Drawing, apply, cropped
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.data.splits import Entry
from fusionsam.inference.interactive import InteractivePair, InteractiveSAM, Picture
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.temperatures import Reading, of_instances
from fusionsam.server.labelling.training import training_command
from fusionsam.server.labelling.uncertainty import uncertainty
from fusionsam.types import InputError, JsonObject

Order = Literal["name", "uncertainty"]
ReadCelsius = Callable[[Path], NDArray[np.floating] | None]
OPEN = 4
"""Pairs held in memory: the current one, the next, and the two before."""
ANSWERS = 32
"""Masks of earlier clicks that can be fed back."""


class OpenPair:
    """One pair in memory. Pictures and prediction are made when they are first asked for; pictures of the cameras never
    wait for a network."""

    def __init__(
        self,
        entry: Entry,
        drawing: Drawing,
        model: FusionSAM,
        sam: InteractiveSAM,
        predicting: threading.Lock,
        align: Aligner | None = None,
    ) -> None:
        self.entry, self.drawing = entry, drawing
        self.lock = threading.Lock()
        """Held while the drawing changes."""
        self.left = False
        """Whether the user has gone on, and what was not begun for this pair need not be made any more."""
        self.logits: OrderedDict[str, Tensor] = OrderedDict()
        """Of earlier answers, by their token: (N,h,w)."""
        self._model, self._sam, self._predicting, self._align = model, sam, predicting, align
        self._covered: Tensor | None = None  # where each camera of a rig reaches; read with the pictures
        self._reading, self._making = threading.Lock(), threading.Lock()
        self._pictures: dict[Picture, Tensor] | None = None
        self._prediction: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
        self._masks: InteractivePair | None = None
        self._celsius: list[NDArray[np.floating] | None] = []  # empty until it was read

    def celsius(self, read: ReadCelsius | None) -> NDArray[np.floating] | None:
        """As `degrees`, read once."""
        with self._reading:
            if not self._celsius:
                self._celsius.append(None if read is None else degrees(self.entry, read, self._align))
            return self._celsius[0]

    def pictures(self) -> dict[Picture, Tensor]:
        """visible uint8 (3,H,W) and infrared uint8 (1,H,W), as far as the pair has them."""
        with self._reading:
            if self._pictures is None:
                sample = read_sample(self.entry, align=self._align)
                both: dict[Picture, Tensor | None] = {"visible": sample.visible, "infrared": sample.infrared}
                self._pictures = {name: image for name, image in both.items() if image is not None}
                self._covered = sample.covered
            return self._pictures

    def prediction(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """What the model makes of the pair: fused picture (H,W,3) and class map (H,W). InputError where the user has
        gone on to other pairs before its turn came."""
        given = self.pictures()
        with self._making, self._predicting:
            if self._prediction is None:
                if self.left:
                    raise InputError(f"{self.entry.id}: is no longer open; open it again")
                made = self._model.predict(given.get("visible"), given.get("infrared"), covered=self._covered)
                self._prediction = (made.fused, made.labels)
            return self._prediction

    def masks(self) -> InteractivePair:
        """SAM on every picture of the pair."""
        fused, given = self.prediction()[0], self.pictures()
        with self._making:
            if self._masks is None:
                self._masks = InteractivePair(self._sam, {"fused": fused, **given})
            return self._masks

    def picture(self, name: str) -> NDArray[np.uint8]:
        """visible, infrared or fused as uint8 (H,W,3) or (H,W). InputError where the pair has no such picture."""
        if name == "fused":
            return self.prediction()[0]
        image = {str(there): image for there, image in self.pictures().items()}.get(name)
        if image is None:
            raise InputError(f"{self.entry.id}: has no {name} picture")
        array = image.permute(1, 2, 0).numpy()
        return np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array)


class Workspace:
    """A labelling in progress: the folder, the models, and the pairs in the order they are shown."""

    def __init__(
        self,
        folder: LabelFolder,
        model: FusionSAM,
        sam: InteractiveSAM,
        order: Order = "name",
        celsius: ReadCelsius | None = None,
        align: Aligner | None = None,
    ) -> None:
        self.folder, self.model, self.sam, self.celsius, self.align = folder, model, sam, celsius, align
        self.names = {
            theirs: folder.classes.index(theirs) for theirs in model.config.classes if theirs in folder.classes
        }
        self.entries = list(folder.entries)
        self.unsure_of = uncertainty(folder, model, align) if order == "uncertainty" else {}
        if self.unsure_of:
            self.entries.sort(key=lambda entry: -self.unsure_of.get(entry.id, -1))
        self.order = order
        self._open: OrderedDict[int, OpenPair] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._predicting = threading.Lock()  # two at once take twice the memory and are no faster
        self._pool = ThreadPoolExecutor(1, "prepare")
        self._current = 0

    def close(self) -> None:
        """End the background thread."""
        self._pool.shutdown(cancel_futures=True)

    def describe(self) -> JsonObject:
        """Classes, pairs and progress."""
        rows = []
        for entry in self.entries:
            progress = self.folder.progress[entry.id]
            row = {"id": entry.id, "status": progress.status, "unsure": progress.unsure, "objects": progress.objects}
            if entry.id in self.unsure_of:
                row["uncertainty"] = round(self.unsure_of[entry.id], 4)
            rows.append(row)
        classes = zip(self.folder.classes, self.folder.palette, strict=True)
        return {
            "classes": [{"id": i, "name": name, "color": list(color)} for i, (name, color) in enumerate(classes)],
            "pairs": rows,
            "order": self.order,
            "weights": self.model.name,
            "proposed": sorted(i for i in self.names.values() if i),
            "train": training_command(self.folder),
        }

    def pair(self, index: int) -> OpenPair:
        """The pair at `index`, opened unless it is. InputError where there is none, or it cannot be read."""
        if not 0 <= index < len(self.entries):
            raise InputError(f"pair {index}: expected 0 to {len(self.entries) - 1}")
        if (held := self._held(index)) is not None:
            return held
        with self._opening:  # whoever asks for a pair that is open already does not wait for the file of another
            if (held := self._held(index)) is not None:
                return held
            entry = self.entries[index]
            opened = OpenPair(entry, self.folder.open(entry), self.model, self.sam, self._predicting, self.align)
            # else a page of an earlier opening might have the same number, and change what it has not seen
            opened.drawing.revision = secrets.randbelow(1 << 48)
            with self._lock:
                self._open[index] = opened
                while len(self._open) > OPEN:
                    self._open.popitem(last=False)[1].left = True
            return opened

    def _held(self, index: int) -> OpenPair | None:
        with self._lock:
            held = self._open.get(index)
            if held is not None:
                self._open.move_to_end(index)
            return held

    def show(self, index: int) -> JsonObject:
        """Everything the page needs of a pair; it and the next one are made ready in the background."""
        pair = self.pair(index)
        self._current = index
        self._pool.submit(self._prepare, index)
        if index + 1 < len(self.entries):
            self._pool.submit(self._prepare, index + 1)
        height, width = pair.drawing.instances.shape
        there = [name for name in ("visible", "infrared") if getattr(pair.entry, name) is not None]
        state = self._state(pair, [0, 0, width, height])
        return {"id": pair.entry.id, "size": [height, width], "pictures": ["fused", *there], **state}

    def _prepare(self, index: int) -> None:
        """Errors are told to whoever asks for the pair."""
        if index not in (self._current, self._current + 1):
            return  # the user has gone on
        with suppress(InputError):
            masks = self.pair(index).masks()
            order: Sequence[Picture] = ("fused", "visible", "infrared") if index == self._current else ("fused",)
            for on in order:
                if on in masks.pictures and index in (self._current, self._current + 1):
                    masks.encoded(on)

    def _state(self, pair: OpenPair, box: list[int]) -> JsonObject:
        drawing = pair.drawing
        return {
            "revision": drawing.revision,
            "objects": drawing.objects(),
            "unsure": drawing.unsure,
            "done": drawing.done,
            "clicks": drawing.clicks,
            "patch": {"box": box, "values": drawing.values(box)},
        }

    def proposal(self, pair: OpenPair) -> NDArray[np.uint8]:
        """The model's class map with the ids of this labelling; classes without a name in common are nothing."""
        _, labels = pair.prediction()
        table = np.zeros(256, np.uint8)
        for theirs, name in enumerate(self.model.config.classes):
            table[theirs] = self.names.get(name, 0)
        return table[labels]

    def change(self, index: int, change: Mapping[str, object]) -> JsonObject:
        """Apply and save one change of the page; with `revision`, only to the state the page has seen.

        InputError for a change that cannot be, or cannot be saved, and one that another window has overtaken; then
        nothing is changed, in memory and on disk."""
        pair = self.pair(index)
        if change.get("kind") == "propose":
            pair.prediction()  # not while the drawing is held
        with pair.lock:
            seen = change.get("revision")
            if seen is not None and seen != pair.drawing.revision:
                raise InputError(f"{pair.entry.id}: was opened anew or changed in another window; load the page again")
            before = pair.drawing.copy()
            try:
                touched = self._apply(pair, change)
                details = {key: change[key] for key in ("class", "tool", "on", "clicks") if key in change}
                details = {key: value for key, value in details.items() if isinstance(value, int | str)}
                kind = str(change["kind"])
                self.folder.save(pair.entry, pair.drawing, kind, object=touched["object"], **details)
            except Exception:
                pair.drawing = before
                raise
            return {**self._state(pair, touched["box"]), "object": touched["object"]}

    def _apply(self, pair: OpenPair, change: Mapping[str, object]) -> JsonObject:
        if change.get("kind") == "mark":
            return self._mark(pair, change)
        class_id = change.get("class")
        if isinstance(class_id, int) and not 0 < class_id < len(self.folder.classes):
            raise InputError(f"class {class_id}: is not known; expected 1 to {len(self.folder.classes) - 1}")
        return apply(pair.drawing, change, lambda: self.proposal(pair))

    def _mark(self, pair: OpenPair, change: Mapping[str, object]) -> JsonObject:
        for key in ("unsure", "done"):
            if key in change:
                setattr(pair.drawing, key, bool(change[key]))
        return {"box": [0, 0, 0, 0], "object": 0}

    def mask(self, index: int, asked: JsonObject) -> JsonObject:
        """Masks by clicks: {"points", "labels", "box", "on", "previous": [token, number]}. InputError as
        `InteractiveSAM.mask`, and for a previous answer that is no longer held."""
        pair = self.pair(index)
        previous = None
        if asked.get("previous") is not None:
            token, number = (*asked["previous"], None)[:2] if isinstance(asked["previous"], list) else (None, None)
            held = pair.logits.get(token) if isinstance(token, str) else None
            if held is None or type(number) is not int or not 0 <= number < len(held):
                raise InputError("previous: is no longer held; click again without it")
            previous = held[number]
        encoded = pair.masks().encoded(asked.get("on", "fused"))
        answer = self.sam.mask(encoded, asked.get("points"), asked.get("labels"), asked.get("box"), previous)
        token = secrets.token_hex(8)
        with self._lock:
            pair.logits[token] = answer.logits  # not the masks: of 12 megapixels they would be 36 MB an answer
            while len(pair.logits) > ANSWERS:
                pair.logits.popitem(last=False)
        found = [
            {**cropped(mask), "score": round(float(score), 4)}
            for mask, score in zip(answer.masks, answer.scores, strict=True)
        ]
        return {"token": token, "best": answer.best, "masks": found}

    def temperatures(self, index: int) -> JsonObject:
        """Degrees Celsius under every object and every class of the pair, where its infrared file is radiometric."""
        pair = self.pair(index)
        heat = pair.celsius(self.celsius)
        if heat is None:
            return {"radiometric": False, "objects": [], "classes": []}
        with pair.lock:
            instances, kinds = pair.drawing.instances.copy(), dict(pair.drawing.classes)
        rows = [
            {"id": one.object, "class": one.class_id, **vars(one.temperatures)}
            for one in of_instances(heat, instances, kinds, self.folder.classes)
        ]
        objects, classes = ([row for row in rows if bool(row["id"]) is wanted] for wanted in (True, False))
        return {"radiometric": True, "objects": objects, "classes": classes}


def degrees(entry: Entry, read: ReadCelsius, align: Aligner | None = None) -> NDArray[np.floating] | None:
    """Degrees Celsius (H,W) in the pixels of the labels; None where the infrared file is not radiometric. Of two
    cameras that see apart they are moved as the infrared picture is, and nan where that camera does not reach."""
    heat = None if entry.infrared is None else read(entry.infrared)
    if heat is None or align is None:
        return heat
    sample = read_sample(entry, align=align)  # it tells by how much this pair was shifted
    if sample.visible is None:
        return heat
    size = sample.visible.shape[1], sample.visible.shape[2]
    moved = align.moved(torch.from_numpy(heat.astype(np.float32))[None], size, sample.alignment)
    return torch.where(moved.inside, moved.image[0], torch.nan).numpy()


def readings(folder: LabelFolder, celsius: ReadCelsius, align: Aligner | None = None) -> list[Reading]:
    """Temperatures of every object, and every class, of every labelled pair whose infrared file is radiometric; `align`
    is the folder's rig."""
    found = []
    for entry in folder.entries:
        if not folder.progress[entry.id].objects:
            continue
        heat = degrees(entry, celsius, align)
        if heat is not None:
            drawing = folder.open(entry)
            found += of_instances(heat, drawing.instances, drawing.classes, folder.classes, entry.id)
    return found
