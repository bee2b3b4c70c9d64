"""The folder of a labelling: one PNG a pair that holds everything, written whole at every change, and what is made of
them.

    OUT/instances/ID.png  16 bits, the number of each pixel's object; in its text chunk classes and marks of the pair,
                          and the pictures that it was drawn on
    OUT/labels/ID.png     8 bits, class ids: what training and evaluation read
    OUT/log.jsonl         who did what, when, a line a change
    OUT/manifest.csv      the pairs that are done, for `--data.dataset manifest`
    OUT/classes.yaml      the classes, for `--data.class_file`

The PNG of instances is the truth: a kill between two files leaves an older label map, which is made again on opening.
Pairs are told apart by their ids: pairs of several recordings may share a folder if no id occurs in two of them.
"""

from __future__ import annotations

import csv
import getpass
import io
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
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
from fusionsam.data.tables import ALIASES, read_csv, read_table
from fusionsam.io import digest, require_writable, whole, write_text
from fusionsam.types import InputError, JsonObject

_KEY = "fusionsam"
_ANEW = "remove it, and the label map of its name, to begin this pair anew"
_REMEDY = "make room, or choose another --out"
_CAMERAS = ("visible", "infrared")
_COLUMNS = ("id", *_CAMERAS, "label", "split")
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError)
"""What reading a file that is not ours, or was cut, may raise."""


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
    `class_file` is what else the class file says: its foreground and labels_map.
    Raises InputError for a folder that cannot be written, holds label maps of others, was labelled with other classes,
    or holds drawings of other pictures under the ids of these. What it holds of pairs that are not among `entries` is
    kept."""

    def __init__(
        self,
        out: str | Path,
        entries: Sequence[Entry],
        classes: Sequence[str],
        palette: Sequence[tuple[int, int, int]],
        who: str = "",
        rig: Path | None = None,
        class_file: Mapping[str, object] | None = None,
    ) -> None:
        self.out, self.entries, self.rig = Path(out), list(entries), rig
        self.classes, self.palette = list(classes), [(red, green, blue) for red, green, blue in palette]
        self.who, self._log = who or _user(), self.out / "log.jsonl"
        self._lock = threading.Lock()  # of the log and the manifest
        self._drawn_on: dict[str, dict[str, list[str]]] = {}
        self._listed: dict[str, dict[str, str]] = {}  # rows that the manifest has had
        self._require_ours()
        self._require_drawn()
        require_writable(self.out)
        stored = {entry.id: self._stored(entry.id) for entry in self.entries}
        self._require_same_pictures(stored)
        self._keep_classes(class_file or {})
        self._mend_labels()
        self.progress = {id: _progress(one) for id, one in stored.items()}
        self._write_manifest()
        if not self._log.is_file():
            write_text(self._log, "", _REMEDY)  # from now on the folder is ours

    def _require_ours(self) -> None:
        """InputError for label maps, or a list of them, where neither a log nor a drawing is."""
        drawings = (self.out / "instances").glob("*.png")
        if self._log.is_file() or any(self._stored(path.stem) for path in drawings):
            return
        there = [path for path in (self.out / "labels").rglob("*") if path.is_file()]
        manifest = self.out / "manifest.csv"
        if there or (manifest.is_file() and read_table(manifest)[1]):
            found = next(iter(there), manifest).relative_to(self.out)
            raise InputError(
                f"{self.out}: holds label maps that label did not draw ({found}); expected a new folder, or one that "
                "label began; choose another --out"
            )

    def _require_drawn(self) -> None:
        """InputError for a label map whose pair has no drawing: the first stroke would replace it."""
        for entry in self.entries:
            drawing = self.instances_path(entry.id)
            if (label := self.out / "labels" / drawing.name).is_file() and not drawing.is_file():
                raise InputError(f"{label}: is there, and no drawing of it; remove it, or choose another --out")

    def instances_path(self, id: str) -> Path:
        """Where the drawing of a pair is kept."""
        return self.out / "instances" / f"{id}.png"

    def open(self, entry: Entry) -> Drawing:
        """The drawing of a pair as it was left; an empty one where there is none. InputError for a damaged file, or
        one of another size than the pair."""
        size = self.size_of(entry)
        path = self.instances_path(entry.id)
        return self._read(path, size) if path.is_file() else Drawing.empty(size)

    def _read(self, path: Path, size: tuple[int, int] | None = None) -> Drawing:
        """As `open`; of any size unless one is given."""
        try:
            with Image.open(path) as image:
                stored = json.loads(image.info[_KEY])
                if size is not None and (image.height, image.width) != size:  # before its pixels are decoded
                    raise InputError(
                        f"{path}: was drawn on {image.height}x{image.width} pixels, the pair has {size[0]}x{size[1]} "
                        f"(height x width); {_ANEW}"
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
        except _DAMAGED as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{path}: is no drawing of ours ({reason}); {_ANEW}") from None
        if (bad := [c for c in drawing.classes.values() if not 0 < c < len(self.classes)]) or (
            set(np.unique(drawing.instances).tolist()) - {0, *drawing.classes}
        ):
            raise InputError(f"{path}: holds class {bad[:1]} or pixels of no object; {_ANEW}")
        return drawing

    def size_of(self, entry: Entry) -> tuple[int, int]:
        """(H, W) of a pair's labels. InputError where its two pictures differ, and no rig is given."""
        if self.rig is not None and entry.visible is not None:
            return image_size(entry.visible)
        return pair_size(entry)

    def save(self, entry: Entry, drawing: Drawing, action: str, **details: object) -> None:
        """Write the drawing and its label map, and a line of the log. InputError where that cannot be; all that was
        saved before stays."""
        stored = {
            "classes": drawing.classes, "unsure": drawing.unsure, "done": drawing.done, "clicks": drawing.clicks,
            "pictures": self._pictures(entry),
        }  # fmt: skip
        text = PngInfo()
        text.add_text(_KEY, json.dumps(stored))
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "who": self.who, "pair": entry.id,
            "action": action, **details,
        }  # fmt: skip
        before, path = self.progress.get(entry.id, Progress()), self.instances_path(entry.id)
        try:  # both take their places when all else is written, the drawing first: on a full disk neither does
            with whole(self.out / "labels" / path.name, _REMEDY) as label, whole(path, _REMEDY) as part:
                Image.fromarray(drawing.instances).save(part, format="PNG", pnginfo=text, compress_level=1)
                Image.fromarray(drawing.labels).save(label, format="PNG")
                with self._lock:
                    self._note(entry.id, drawing, line)
        except Exception:
            self.progress[entry.id] = before
            raise

    def _note(self, id: str, drawing: Drawing, line: JsonObject) -> None:
        """In the log, the progress and the manifest."""
        try:
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(f"{self.out}: the log cannot be written ({error.strerror}); {_REMEDY}") from None
        before = self.progress.get(id, Progress())
        self.progress[id] = Progress(len(drawing.classes), drawing.unsure, drawing.done, drawing.clicks)
        if before.done != drawing.done:
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

    def _keep_classes(self, class_file: Mapping[str, object]) -> None:
        """What stands in classes.yaml stays, put there by hand or not; what it lacks is added."""
        path = self.out / "classes.yaml"
        content = {"classes": self.classes, "palette": [list(color) for color in self.palette], **class_file}
        stored: JsonObject = {}
        if path.is_file():
            with suppress(yaml.YAMLError, OSError, ValueError):
                stored = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(stored, dict) or stored.get("classes") != self.classes:
                raise InputError(f"{path}: this folder was labelled with other classes; choose another --out")
        if content.keys() - stored.keys():
            write_text(path, yaml.safe_dump({**content, **stored}, sort_keys=False), _REMEDY)

    def _stored(self, id: str) -> JsonObject:
        """The text chunk of a drawing alone: a folder of 200 large pairs opens at once. Empty where there is none; what
        is wrong with a damaged one is said when it is opened."""
        path = self.instances_path(id)
        if path.is_file():
            with suppress(*_DAMAGED), Image.open(path) as image:
                return dict(json.loads(image.info[_KEY]))
        return {}

    def _pictures(self, entry: Entry) -> dict[str, list[str]]:
        """Camera -> path as in the manifest, and SHA-256, of the pictures of a pair: each file is read once."""
        if entry.id not in self._drawn_on:
            self._drawn_on[entry.id] = {
                camera: [self._relative(path), _content(path)] for camera, path in _cameras(entry).items()
            }
        return self._drawn_on[entry.id]

    def _require_same_pictures(self, stored: dict[str, JsonObject]) -> None:
        """InputError for a pair whose drawing is of other pictures: neither the same files, nor, where those were
        moved, of the same content. Drawings of earlier versions do not tell theirs; of those that are done the manifest
        does."""
        rows = {row.get("id", ""): row for row in self._rows()}
        for entry in self.entries:
            row, now = rows.get(entry.id, {}), _cameras(entry)
            known = stored[entry.id].get("pictures") or {key: [row[key], ""] for key in _CAMERAS if row.get(key)}
            differ = [key for key, path in now.items() if key in known and not self._same(path, *known[key])]
            if differ or (known and not set(known) & set(now)):
                key, given = (differ[0] if differ else next(iter(known))), next(iter(now.values()))
                raise InputError(
                    f"{self.out}: pair {entry.id!r} was drawn on {os.path.normpath(self.out / known[key][0])}, found "
                    f"{now.get(key, given)}, another picture; choose another --out, or put the first one back where it "
                    "was"
                )

    def _same(self, path: Path, drawn_on: str, content: str) -> bool:
        there = self.out / drawn_on
        if there.resolve() == path.resolve():
            return True
        content = content or _content(there)
        return bool(content) and content == _content(path)

    def _mend_labels(self) -> None:
        """Make label maps that are missing, or older than their drawings. Another server that runs makes its own."""
        stale = [
            (path, label)
            for path in sorted((self.out / "instances").glob("*.png"))
            if not (label := self.out / "labels" / path.name).is_file()
            or label.stat().st_mtime_ns < path.stat().st_mtime_ns
        ]
        if not stale:
            return
        with suppress(InputError, OSError), self.alone():
            for path, label in stale:
                with suppress(InputError):  # what is wrong with a drawing is said when it is opened
                    write_png(label, self._read(path).labels)

    def _rows(self) -> list[dict[str, str]]:
        """Of the standing manifest, with columns that are not ours, as far as their label maps are there."""
        path = self.out / "manifest.csv"
        if not path.is_file():
            return []
        others = [{name: row[name] for name in row if name.lower() not in ALIASES} for row in read_csv(path)[1]]
        rows = [other | row for other, row in zip(others, read_table(path)[1], strict=True)]
        return [row for row in rows if (self.out / row.get("label", "")).is_file()]

    def _write_manifest(self) -> None:
        """The pairs that are done, behind those of the standing manifest that are not open now. Splits and other
        columns stay as they stand there, also of a pair that is taken back and done again."""
        there = self._rows()
        self._listed |= {row.get("id", ""): row for row in there}
        rows = [row for row in there if row.get("id") not in self.progress]
        for entry in self.entries:
            if self.progress[entry.id].done:
                parts = {camera: self._relative(path) for camera, path in _cameras(entry).items()}
                ours = {"id": entry.id, **dict.fromkeys(_CAMERAS, ""), **parts, "label": f"labels/{entry.id}.png"}
                rows.append(self._listed.get(entry.id, {}) | ours)
        new = [row for row in rows if not row.get("split")]
        for row in new:
            row["split"] = "val" if held_out(row.get("id", "")) else "train"
        if new and all(row["split"] != "val" for row in rows):
            new[-1]["split"] = "val"  # training wants at least one pair to look at
        text = io.StringIO()
        columns = list(dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)]))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.out / "manifest.csv", text.getvalue(), _REMEDY)

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.resolve(), self.out.resolve())


def _progress(stored: JsonObject) -> Progress:
    with suppress(*_DAMAGED):
        return Progress(len(stored["classes"]), bool(stored["unsure"]), bool(stored["done"]), int(stored["clicks"]))
    return Progress()


def _cameras(entry: Entry) -> dict[str, Path]:
    """The pictures that a pair has."""
    return {camera: path for camera in _CAMERAS if (path := getattr(entry, camera)) is not None}


def _content(path: Path) -> str:
    """SHA-256 of a picture; empty where it cannot be read: a change is saved all the same."""
    with suppress(OSError):
        return digest(path)
    return ""


def pair_size(entry: Entry) -> tuple[int, int]:
    """(H, W) of a pair, from the headers. InputError where its two pictures differ."""
    parts = ((entry.visible, False), (entry.infrared, True))
    sizes = {str(path): image_size(path, as_infrared=infrared) for path, infrared in parts if path is not None}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{path} is {height}x{width}" for path, (height, width) in sizes.items())
        raise InputError(f"{entry.id}: sizes differ: {found} (height x width); give --align RIG")
    return next(iter(sizes.values()))


def _user() -> str:
    with suppress(OSError, KeyError):  # a container without a user of that number
        return getpass.getuser()
    return "unknown"
