"""The folder of a labelling: one PNG a pair that holds everything, written whole at every change, and what is made of
them.

    OUT/instances/ID.png  16 bits, the number of each pixel's object; classes and marks of the pair in its text chunk
    OUT/labels/ID.png     8 bits, class ids: what training and evaluation read
    OUT/log.jsonl         who did what, when, a line a change
    OUT/manifest.csv      the pairs that are done, for `--data.dataset manifest`
    OUT/classes.yaml      the classes, for `--data.class_file`

The PNG of instances is the truth: a kill between two files leaves an older label map, which is made again on opening.
"""

from __future__ import annotations

import csv
import getpass
import io
import json
import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fusionsam.data.image_files import image_size
from fusionsam.data.images import write_png
from fusionsam.data.labelling.drawing import Drawing
from fusionsam.data.splits import Entry, held_out
from fusionsam.io import require_writable, whole, write_text
from fusionsam.types import InputError

_KEY = "fusionsam"
STEPS = 100
"""Of the training that the page proposes."""
_REMEDY = "make room, or choose another --out"


@dataclass
class Progress:
    """Where one pair stands."""

    objects: int = 0
    unsure: bool = False
    done: bool = False
    clicks: int = 0

    @property
    def status(self) -> str:
        """todo, started or done."""
        return "done" if self.done else "started" if self.objects or self.clicks else "todo"


class LabelFolder:
    """Reads and writes the drawings of `entries` in `out`.

    Two cameras that see apart are labelled in the visible one's pixels, the other being brought there by `rig`.
    Raises InputError for a folder that cannot be written, or was labelled with other classes."""

    def __init__(
        self,
        out: str | Path,
        entries: Sequence[Entry],
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
        who: str = "",
        rig: Path | None = None,
    ) -> None:
        self.out, self.entries, self.rig = Path(out), list(entries), rig
        self.classes, self.palette = list(classes), [(red, green, blue) for red, green, blue in palette]
        self.who = who or _user()
        self._lock = threading.Lock()  # of the log and the manifest
        require_writable(self.out)
        self._keep_classes()
        self.progress = {entry.id: self._progress(entry.id) for entry in self.entries}
        self._write_manifest()

    def instances_path(self, id: str) -> Path:
        """Where the drawing of a pair is kept."""
        return self.out / "instances" / f"{id}.png"

    def open(self, entry: Entry) -> Drawing:
        """The drawing of a pair as it was left; an empty one where there is none. InputError for a damaged file, or
        one of another size than the pair."""
        size = self.size_of(entry)
        path = self.instances_path(entry.id)
        if not path.is_file():
            return Drawing.empty(size)
        try:
            with Image.open(path) as image:
                stored = json.loads(image.info[_KEY])
                if (image.height, image.width) != size:  # before its pixels are decoded
                    raise InputError(
                        f"{path}: was drawn on {image.height}x{image.width} pixels, the pair has {size[0]}x{size[1]} "
                        "(height x width); remove it to begin this pair anew"
                    )
                instances = np.array(image)
            drawing = Drawing(
                instances.astype(np.uint16),
                {int(number): int(class_id) for number, class_id in stored["classes"].items()},
                bool(stored["unsure"]),
                bool(stored["done"]),
                int(stored["clicks"]),
            )
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{path}: is no drawing of ours ({reason}); remove it to begin this pair anew") from None
        if (bad := [c for c in drawing.classes.values() if not 0 < c < len(self.classes)]) or (
            set(np.unique(drawing.instances).tolist()) - {0, *drawing.classes}
        ):
            raise InputError(f"{path}: holds class {bad[:1]} or pixels of no object; remove it to begin this pair anew")
        return drawing

    def size_of(self, entry: Entry) -> tuple[int, int]:
        """(H, W) of a pair's labels. InputError where its two pictures differ, and no rig is given."""
        if self.rig is not None and entry.visible is not None:
            return image_size(entry.visible)
        return pair_size(entry)

    def save(self, entry: Entry, drawing: Drawing, action: str, **details: object) -> None:
        """Write the drawing and its label map, and a line of the log. InputError where that cannot be; what was saved
        before stays."""
        stored = {
            "classes": drawing.classes, "unsure": drawing.unsure, "done": drawing.done, "clicks": drawing.clicks,
        }  # fmt: skip
        text = PngInfo()
        text.add_text(_KEY, json.dumps(stored))
        with whole(self.instances_path(entry.id), _REMEDY) as part:
            Image.fromarray(drawing.instances).save(part, format="PNG", pnginfo=text, compress_level=1)
        write_png(self.out / "labels" / f"{entry.id}.png", drawing.labels)
        before = self.progress.get(entry.id)
        self.progress[entry.id] = Progress(len(drawing.classes), drawing.unsure, drawing.done, drawing.clicks)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "who": self.who, "pair": entry.id,
            "action": action, **details,
        }  # fmt: skip
        with self._lock:
            try:
                with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
            except OSError as error:
                raise InputError(f"{self.out}: the log cannot be written ({error.strerror}); {_REMEDY}") from None
            if before is None or before.done != drawing.done:
                self._write_manifest()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps a second server from the folder while this one runs; InputError where there is one already. The lock
        goes with the process, a killed one included."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self.out / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{self.out}: is being labelled by another server; end it first") from None
            yield

    def training_command(self) -> str:
        """What fine-tunes the shipped checkpoint on the pairs that are done: some minutes for a first look."""
        words = [
            "fusionsam", "train", "--model.preset", "tiny", "--model.start_from", "tiny",
            "--train.freeze_tokenizer", "true", "--train.max_steps", str(STEPS), "--data.dataset", "manifest",
            "--data.root", str(self.out / "manifest.csv"), "--data.class_file", str(self.out / "classes.yaml"),
            "--train.out", str(self.out / "run"), *([] if self.rig is None else ["--data.align", str(self.rig)]),
        ]  # fmt: skip
        return shlex.join(words)

    def _keep_classes(self) -> None:
        path = self.out / "classes.yaml"
        content = {"classes": self.classes, "palette": [list(color) for color in self.palette]}
        if path.is_file():
            try:
                stored = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, OSError, ValueError):
                stored = None
            if not isinstance(stored, dict) or stored.get("classes") != self.classes:
                raise InputError(f"{path}: this folder was labelled with other classes; choose another --out")
        write_text(path, yaml.safe_dump(content, sort_keys=False), _REMEDY)

    def _progress(self, id: str) -> Progress:
        """From the text chunk alone: a folder of 200 large pairs opens at once."""
        path = self.instances_path(id)
        if not path.is_file():
            return Progress()
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError), Image.open(path) as image:
            stored = json.loads(image.info[_KEY])
            return Progress(len(stored["classes"]), bool(stored["unsure"]), bool(stored["done"]), int(stored["clicks"]))
        return Progress()  # what is wrong with it is said when it is opened

    def _write_manifest(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", "visible", "infrared", "label", "split"])
        done = [entry for entry in self.entries if self.progress[entry.id].done]
        val = {entry.id for entry in done if held_out(entry.id)}
        if done and not val:
            val = {done[-1].id}  # training wants at least one pair to look at
        for entry in done:
            parts = [self._relative(path) for path in (entry.visible, entry.infrared)]
            split = "val" if entry.id in val else "train"
            writer.writerow([entry.id, *parts, f"labels/{entry.id}.png", split])
        write_text(self.out / "manifest.csv", text.getvalue(), _REMEDY)

    def _relative(self, path: Path | None) -> str:
        return "" if path is None else os.path.relpath(path.resolve(), self.out.resolve())


def pair_size(entry: Entry) -> tuple[int, int]:
    """(H, W) of a pair, from the headers. InputError where its two pictures differ."""
    parts = ((entry.visible, False), (entry.infrared, True))
    sizes = {str(path): image_size(path, as_infrared=infrared) for path, infrared in parts if path is not None}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{path} is {height}x{width}" for path, (height, width) in sizes.items())
        raise InputError(f"{entry.id}: sizes differ: {found} (height x width); give --align RIG")
    return next(iter(sizes.values()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a user of that number
        return "unknown"
