"""Films of two cameras, frame by frame: all their bits, turned as they are to be shown, paired by number or by time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fusionsam.data.image_files import MAX_PIXELS
from fusionsam.data.images import read_heat, visible_bits
from fusionsam.data.infrared import DEFAULT, Heat, InfraredOptions, to_heat
from fusionsam.data.stretch import Range, find_range
from fusionsam.types import LARGEST, SMALLEST, Array, InputError, Notice

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

FILM_RATE = Fraction(25)
_SAMPLED = 32  # frames of a film that its one range, palette and polarity are found in
FEATURES = 8
"""Grey values of a frame that shows something."""


def pyav() -> ModuleType:
    """PyAV; InputError where it is not installed."""
    try:
        import av
    except ImportError:
        raise InputError('--video: PyAV is not installed; pip install "fusionsam[video]"') from None
    return av


class Film:
    """A video file: its size as it is shown, rate, and the time of each frame in seconds.

    Iterating gives uint8 (H,W,3), or of grey films deeper than 8 bits uint16 (H,W). InputError for what cannot be
    decoded."""

    def __init__(self, path: Path) -> None:
        self.path, self._av = path, pyav()
        with self._guarded(), self._av.open(str(path)) as container:
            stream = self._stream(container)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or FILM_RATE)
            listed = (packet for packet in container.demux(stream) if packet.pts is not None and packet.size)
            # films that were cut without encoding them anew hold packets that are decoded but not shown
            ticks = sorted({packet.pts for packet in listed if not packet.is_discard})
            self.times = [float((tick - ticks[0]) * stream.time_base) for tick in ticks]
        with self._guarded(), self._av.open(str(path)) as container:
            stream = self._stream(container)
            first = next(container.decode(stream), None)
            if first is None:
                raise InputError(f"{path}: holds no frame that can be decoded; give another film")
            self.turned = int(first.rotation or 0) % 360
            self.stored = (first.width, first.height)
            self.deep = max(part.bits for part in first.format.components) > 8
            self.grey = len(first.format.components) == 1
        self.width, self.height = self.stored[:: -1 if self.turned in (90, 270) else 1]
        if not 0 < self.width * self.height <= MAX_PIXELS:
            size = f"frames of {self.width}x{self.height} pixels"
            raise InputError(f"{path}: {size}; expected {SMALLEST} to {LARGEST} a side")

    @property
    def count(self) -> int | None:
        """Frames; None where the container does not tell."""
        return len(self.times) or None

    @property
    def pace(self) -> float:
        """Frames a second by their times; the rate that the container names may be another."""
        return (len(self.times) - 1) / self.times[-1] if len(self.times) > 1 else float(self.rate)

    @property
    def variable(self) -> bool:
        """Whether the times are not those of a constant rate, by more than half of a frame."""
        return any(abs(time - index / self.rate) > 0.5 / self.rate for index, time in enumerate(self.times))

    def facts(self) -> dict[str, object]:
        """What was found of the file: plain JSON types."""
        return {
            "path": str(self.path), "frames": self.count, "size": [self.height, self.width],
            "frames_a_second": round(float(self.rate), 4), "variable_rate": self.variable, "turned": self.turned,
            "bits": "more than 8" if self.deep else 8,
        }  # fmt: skip

    def _stream(self, container: InputContainer) -> VideoStream:
        if not container.streams.video:
            raise InputError(f"{self.path}: holds no video stream; give a film or a folder of frames")
        return container.streams.video[0]

    def _guarded(self) -> _Guard:
        return _Guard(self.path, self._av.FFmpegError)

    def __iter__(self) -> Iterator[Array]:
        form = ("gray16le" if self.grey else "rgb48le") if self.deep else "rgb24"
        with self._guarded(), self._av.open(str(self.path)) as container:
            stream = self._stream(container)
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if (frame.width, frame.height) != self.stored:
                    found = f"{frame.width}x{frame.height} after {self.stored[0]}x{self.stored[1]}"
                    raise InputError(f"{self.path}: frames change to {found} pixels; cut the film there")
                yield np.rot90(frame.to_ndarray(format=form), self.turned // 90)


class _Guard:
    """What FFmpeg raises becomes one line."""

    def __init__(self, path: Path, kind: type[BaseException]) -> None:
        self.path, self.kind = path, kind

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, self.kind):
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{self.path}: cannot be decoded as a video ({reason}); convert it first") from None


# -- one reading for a whole film --------------------------------------------------------------------------------


@dataclass
class Reading:
    """How the frames of two films become 8 bits, the same for all of them: nothing flickers."""

    options: InfraredOptions = DEFAULT
    range: Range | None = None
    bits: int = 16
    """Of the visible film, where it has more than 8."""
    told: Heat | None = None
    """An infrared frame, with facts and notices of the film."""

    def visible(self, frame: Array) -> NDArray[np.uint8]:
        """uint8 (H,W,3)."""
        if frame.dtype == np.uint8:
            return frame
        shallow = (frame >> (self.bits - 8)).clip(0, 255).astype(np.uint8)
        return shallow if shallow.ndim == 3 else np.repeat(shallow[..., None], 3, 2)

    def infrared(self, frame: Array) -> NDArray[np.uint8]:
        """uint8 (H,W), 0 cold."""
        return to_heat(np.ascontiguousarray(frame), self.options, film=self.range).pixels


def one_reading(visible: Film | None, infrared: Film | None, options: InfraredOptions = DEFAULT) -> Reading:
    """Look at frames from all over the films, and decide."""
    reading = Reading(options)
    if visible is not None and visible.deep:
        reading.bits = max(visible_bits(frame) for frame in sampled(visible))
    if infrared is None:
        return reading
    frames = sampled(infrared)
    if (infrared.deep or options.limits == "auto") and not isinstance(options.limits, tuple):
        plain = replace(options, limits=None, polarity="white")  # a frame is turned round after it is stretched
        found = find_range(np.concatenate([_plain(frame, plain) for frame in frames]))
        reading.range = replace(found, how="film")
    told = reading.told = _decided(to_heat(frame, options, film=reading.range) for frame in frames)
    if reading.range is not None:
        told.notices = [*reading.range.notices(), *told.notices]
    reading.options = _as_decided(options, told)
    return reading


def frames_reading(paths: Sequence[Path], options: InfraredOptions = DEFAULT) -> tuple[InfraredOptions, Heat | None]:
    """The same of a film that is a folder of infrared pictures: palette and polarity are those of most of up to
    _SAMPLED of them, and one range is for all of deep ones, between the lows and highs of these. Those of radiometric
    files keep a range each, in counts. With the facts of a frame."""
    if not paths:
        return options, None
    looked, heats = _readable(paths[:: max(1, -(-len(paths) // _SAMPLED))], options)
    told = _decided(heats)
    options = _as_decided(options, told)
    if isinstance(options.limits, tuple) or "range" not in told.facts or "radiometric" in told.facts:
        return options, told
    ranges = [read_heat(path, options).facts["range"] for path in looked]
    # a tenth at either end is left out: the frame while a shutter is closed must not set the range of a film
    low = float(np.quantile([each["low"] for each in ranges], 0.1, method="lower"))
    high = float(np.quantile([each["high"] for each in ranges], 0.9, method="higher"))
    if not low < high:
        return options, told
    one = replace(options, limits=(low, high))
    told.facts["range"] = {**read_heat(paths[0], one).facts["range"], "how": "film"}
    return one, told


def _readable(paths: Sequence[Path], options: InfraredOptions) -> tuple[list[Path], list[Heat]]:
    """Those of the files that can be read, as heat of one pixel a grey value; a damaged one is told of when its turn
    comes. InputError if it is the first."""
    found: list[tuple[Path, Heat]] = []
    for path in paths:
        try:
            heat = read_heat(path, options)
        except InputError:
            if not found:
                raise
            continue
        found.append((path, replace(heat, pixels=np.unique(heat.pixels)[None])))  # frames may be large
    return [path for path, _ in found], [heat for _, heat in found]


def _decided(heats: Iterable[Heat]) -> Heat:
    """The first frame that was read as most were, with the notices of all that were read so. A frame of few grey values
    (a shutter, a black beginning) has no say, unless no frame has more."""
    kept: list[tuple[object, Heat]] = []
    for heat in heats:
        grey = np.unique(heat.pixels)
        palette = heat.facts.get("palette", {})
        doubt = any(notice.kind == "polarity" for notice in heat.notices)
        key = (palette.get("how"), palette.get("name"), heat.facts["polarity"]["hot"], doubt)
        kept.append((key if grey.size >= FEATURES else None, replace(heat, pixels=grey[None])))  # frames may be large
    votes = Counter(key for key, _ in kept if key is not None)
    if not votes:
        told = kept[0][1]
        text = "no frame of the infrared film shows enough to tell its palette and what is hot"
        told.notices.append(Notice("film without features", text, "--palette and --polarity give them"))
        return told
    most = votes.most_common(1)[0][0]
    alike = [heat for key, heat in kept if key == most]
    notices = {notice.kind: notice for heat in reversed(alike) for notice in heat.notices}
    return replace(alike[0], notices=list(notices.values()))


def _as_decided(options: InfraredOptions, told: Heat) -> InfraredOptions:
    """For all frames the polarity and the palette of one: a guess must not change from frame to frame."""
    palette = told.facts.get("palette", {})
    found = palette["name"] if palette.get("how") == "found" else "none"
    asked = options.palette != "auto"
    return replace(options, polarity=told.facts["polarity"]["hot"], palette=options.palette if asked else found)


def _plain(frame: Array, options: InfraredOptions) -> Array:
    """A frame before it is stretched."""
    return frame if frame.dtype != np.uint8 else to_heat(np.ascontiguousarray(frame), options).pixels


def sampled(film: Film) -> list[Array]:
    """Up to 2 * _SAMPLED frames at equal distances, however long the film is; of a damaged one those before the damage.
    InputError where there are none."""
    kept: list[Array] = []
    step = 1
    try:
        for index, frame in enumerate(film):
            if index % step == 0:
                kept.append(np.ascontiguousarray(frame))
            if len(kept) > 2 * _SAMPLED:
                kept, step = kept[::2], 2 * step
    except InputError:  # told of when its turn comes
        if not kept:
            raise
    return kept


# -- pairs of frames ---------------------------------------------------------------------------------------------


@dataclass
class Pairing:
    """Which frames of two films belong together."""

    frames: list[tuple[int, int]]
    by_time: bool = False
    alone: list[str] = field(default_factory=list)
    """What has no partner, in words."""


def pair_frames(visible: Film, infrared: Film) -> Pairing:
    """By number where both films have constant rates by which they drift apart by at most half a frame; else each frame
    of the slower film with the one of the other that is nearest in time, at most half of the slower film's mean
    distance away. What a film has beyond the end of the other is told of. InputError for a film that tells no times."""
    for film in (visible, infrared):
        if not film.times:
            raise InputError(
                f"{film.path}: tells no times of its frames, by which two films are paired; convert it to .mp4 first"
            )
    counts = (len(visible.times), len(infrared.times))
    both = min(counts)
    half = 0.5 / max(visible.rate, infrared.rate)
    # 29.97 and 30 frames a second are half a frame apart after 17 s
    alike = abs((both - 1) / visible.rate - (both - 1) / infrared.rate) <= half
    same_times = counts[0] == counts[1] and np.allclose(visible.times, infrared.times, rtol=0, atol=half)
    if same_times or (alike and not visible.variable and not infrared.variable):
        longer = visible if counts[0] > both else infrared
        rest = max(counts) - both
        alone = [f"{longer.path}: its last {rest} of {max(counts)} frames have no partner"] if rest else []
        return Pairing([(index, index) for index in range(both)], alone=alone)
    slow, fast = (visible, infrared) if visible.pace <= infrared.pace else (infrared, visible)
    span = slow.times[-1] / max(1, len(slow.times) - 1)
    found, lost = [], 0
    others = np.asarray(fast.times)
    for index, time in enumerate(slow.times):
        nearest = int(np.abs(others - time).argmin())
        if abs(others[nearest] - time) > max(0.5 * span, 0.5 / float(fast.rate)) + 1e-6:
            lost += 1
            continue
        found.append((index, nearest))
    pairs = found if slow is visible else [(nearest, index) for index, nearest in found]
    alone = (
        [f"{slow.path}: {lost} of {len(slow.times)} frames have none of the other film near in time"] if lost else []
    )
    if rest := int((others > slow.times[-1] + max(span, 1 / float(fast.rate)) + 1e-6).sum()):
        alone.append(f"{fast.path}: its last {rest} of {len(others)} frames come after the end of {slow.path.name}")
    return Pairing(pairs, by_time=True, alone=alone)


def at(film: Film, indices: Sequence[int]) -> Iterator[Array]:
    """The frames at non-decreasing numbers, decoded once; ends early where the film does."""
    frames = iter(film)
    place, frame = -1, None
    for index in indices:
        while place < index:
            frame = next(frames, None)
            place += 1
            if frame is None:
                return
        assert frame is not None
        yield frame
