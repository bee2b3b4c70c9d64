"""Aligned films, or folders of frames, as one overlay video; one frame in memory at a time. PyAV reads and writes."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from os.path import realpath
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.orientation import grey
from fusionsam.data.dataset import read_sample
from fusionsam.data.images import MAX_PIXELS
from fusionsam.data.rigs import Fit, fit, fit_frames, open_aligner
from fusionsam.data.splits import pair_entries
from fusionsam.errors import InputError
from fusionsam.inference.options import PredictOptions
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.prompts import prompts_file, read_prompts
from fusionsam.inference.render import Color, legend_strip, overlay
from fusionsam.io import whole
from fusionsam.progress import progress_bar
from fusionsam.types import LARGEST, SMALLEST

Frames = Iterator[tuple[str, tuple[int, int], Any, Any, Tensor | None]]
"""Name, (H, W), visible and infrared of each frame, as a model's `predict` takes them, and where each camera reaches
(bool (2,H,W), None: everywhere)."""
Align = Callable[[Callable[[], Fit]], Aligner | None]
"""Makes the aligner of films, given what finds a rig in them."""
FILM_RATE = Fraction(25)


class Labelled(Protocol):
    """What is drawn of a prediction."""

    fused: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    classes: list[str]
    palette: list[Color]


class Predictor(Protocol):
    """What `FusionSAM` offers."""

    def predict(self, visible: Any, infrared: Any, prompts: Any = None, *, covered: Tensor | None = None) -> Labelled:
        """A pair, either of them None, and prompts -> fused picture and class ids; `covered` bool (2,H,W)."""


@dataclass
class Source:
    """Frames, and what is known of them before the first is decoded."""

    frames: Frames
    count: int | None
    rate: Fraction


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise InputError('--video: PyAV is not installed; pip install "fusionsam[video]"') from None
    return av


def open_source(
    visible: Path | None, infrared: Path | None, fps: float | None = None, align: Align = lambda find: None
) -> Source:
    """Two videos frame by frame, or two folders of images paired by name in the order of their names (f2 before f10).

    Either may be None. `align` brings the two cameras into one frame. `fps` replaces the film's own rate (25 for
    folders). InputError when they do not fit: a file with a folder, frames of two sizes without `align`, two counts,
    nothing that can be decoded.
    """
    given = [path for path in (visible, infrared) if path is not None]
    if not given:
        raise InputError("--video: neither --visible nor --infrared was given; give at least one")
    for path in given:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; check the path")
    if len({path.is_dir() for path in given}) > 1:
        raise InputError(f"{given[0]} and {given[1]}: one is a folder and one a file; give two of a kind")
    if fps is not None and not 0.1 <= fps <= 1000:
        raise InputError(f"--fps: {fps}; expected 0.1 to 1000 frames a second")
    rate = None if fps is None else Fraction(fps).limit_denominator(1001)
    if given[0].is_dir():
        entries = sorted(pair_entries(visible, infrared), key=lambda entry: _natural(entry.id))
        if not entries:
            raise InputError(f"{given[0]}: holds no image; expected the frames of a film")
        aligner = align(partial(fit, entries))
        samples = (read_sample(entry, align=aligner) for entry in entries)
        listed = ((s.id, s.size, s.visible, s.infrared, s.covered) for s in samples)
        return Source(listed, len(entries), rate or FILM_RATE)
    films = [None if path is None else Film(path) for path in (visible, infrared)]
    known = [film for film in films if film is not None]
    sizes = [f"{film.width}x{film.height}" for film in known]
    aligner = align(lambda: fit_frames(_tensors(frame) for frame in _zipped(films, given))) if len(known) > 1 else None
    if len(set(sizes)) > 1 and aligner is None:
        raise InputError(
            f"{given[0]} is {sizes[0]}, {given[1]} {sizes[1]} pixels; give an aligned pair of films, or --align auto"
        )
    counts = [film.count for film in known]
    if len(counts) > 1 and all(counts) and counts[0] != counts[1]:
        raise _counts_differ(given, counts)
    frames = _zipped(films, given)
    return Source(frames if aligner is None else _aligned(frames, aligner), counts[0], rate or known[0].rate)


def _tensors(frame: tuple[str, tuple[int, int], Any, Any, Tensor | None]) -> tuple[Tensor, Tensor]:
    """uint8 (3,H,W) and (1,H',W') of a frame of two films."""
    visible, infrared = (torch.from_numpy(np.ascontiguousarray(array)) for array in frame[2:4])
    heat = infrared[None] if infrared.ndim == 2 else grey(infrared.permute(2, 0, 1)).round().to(torch.uint8)[None]
    return visible.permute(2, 0, 1), heat


def _aligned(frames: Frames, aligner: Aligner) -> Frames:
    for number, frame in enumerate(frames, 1):
        try:
            pair = aligner(*_tensors(frame))
        except InputError as error:
            raise InputError(f"frame {number} of {frame[0]}: {error}") from None
        size = int(pair.covered.shape[1]), int(pair.covered.shape[2])
        yield frame[0], size, pair.visible, pair.infrared, pair.covered


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _counts_differ(given: Sequence[Path], counts: Sequence[int | str | None]) -> InputError:
    return InputError(
        f"{given[0]} has {counts[0]} frames, {given[1]} {counts[1]}; cut them to the same frames, or take folders of "
        "frames, which are paired by name"
    )


class Film:
    """A video file: its size, rate and (where the container tells) number of frames; iterating gives RGB arrays
    uint8 (H,W,3). Deeper grey films keep their high byte. InputError for what cannot be decoded."""

    def __init__(self, path: Path) -> None:
        self.path, self._av = path, _av()
        with self._guarded(), self._av.open(str(path)) as container:
            stream = self._stream(container)
            self.width, self.height = stream.codec_context.width, stream.codec_context.height
            self.count: int | None = stream.frames or None
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or FILM_RATE)
        if not 0 < self.width * self.height <= MAX_PIXELS:
            found = f"frames of {self.width}x{self.height} pixels"
            raise InputError(f"{path}: {found}; expected {SMALLEST} to {LARGEST} a side")

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise InputError(f"{self.path}: holds no video stream; give a film or a folder of frames")
        return container.streams.video[0]

    def _guarded(self) -> _Guard:
        return _Guard(self.path, self._av.FFmpegError)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        with self._guarded(), self._av.open(str(self.path)) as container:
            stream = self._stream(container)
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if (frame.width, frame.height) != (self.width, self.height):
                    found = f"{frame.width}x{frame.height} after {self.width}x{self.height}"
                    raise InputError(f"{self.path}: frames change to {found} pixels; cut the film there")
                yield frame.to_ndarray(format="rgb24")


class _Guard:
    """What FFmpeg raises becomes one line."""

    def __init__(self, path: Path, kind: type[BaseException]) -> None:
        self.path, self.kind = path, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, self.kind):
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{self.path}: cannot be decoded as a video ({reason}); convert it first") from None


def _zipped(films: list[Film | None], given: Sequence[Path]) -> Frames:
    streams = {index: iter(film) for index, film in enumerate(films) if film is not None}
    size = next((film.height, film.width) for film in films if film is not None)
    for count in itertools.count():
        images = {index: next(stream, None) for index, stream in streams.items()}
        ended = [image is None for image in images.values()]
        if any(ended):
            if not all(ended):
                raise _counts_differ(given, [count if end else f"more than {count}" for end in ended])
            return
        heat = images.get(1)
        if heat is not None and (heat == heat[..., :1]).all():
            heat = heat[..., 0]  # as the readers of files do: the luma of equal channels is not exactly theirs
        yield given[0].stem, size, images.get(0), heat, None


# -- writing -----------------------------------------------------------------------------------------------------


def overlay_video(
    model: Predictor,
    source: Source,
    out: Path,
    prompts: Callable[[str, tuple[int, int]], Any] = lambda name, size: None,
) -> tuple[int, float]:
    """Predict frame by frame and write H.264 (MPEG-4 where PyAV was built without) to `out`, an .mp4.

    `prompts` gives those of a frame by name and (H, W). Every class keeps its colour and all are named in the legend
    below, so that the size stays the same. Returns frames and frames per second; `out` is complete or absent.
    """
    av = _av()
    done, started = 0, time.perf_counter()
    # the format is named, since the temporary name does not tell it
    with whole(out, also=(av.FFmpegError,)) as part, av.open(str(part), "w", format="mp4") as container:
        stream = None
        frames = progress_bar(source.frames, total=source.count, desc="video", unit="frame")
        for name, size, visible, infrared, covered in frames:
            try:
                prediction = model.predict(visible, infrared, prompts(name, size), covered=covered)
            except InputError as error:
                raise InputError(f"frame {done + 1} of {name}: {error}") from None
            picture = frame_picture(prediction)
            if stream is None:
                stream = _stream(av, container, source.rate, picture.shape)
            if (stream.height, stream.width) != picture.shape[:2]:
                raise InputError(f"frame {done + 1} ({name}): not the size of the first; give one size a film")
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
            done += 1
        if stream is None:
            raise InputError("--video: the films hold no frame; give others")
        for packet in stream.encode(None):
            container.mux(packet)
    return done, done / max(time.perf_counter() - started, 1e-9)


def _stream(av: Any, container: Any, rate: Fraction, shape: tuple[int, ...]) -> Any:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], "yuv420p"
    # thin contours and small text suffer first
    stream.options = {"crf": "18", "preset": "veryfast"} if codec == "libx264" else {"qscale:v": "3"}
    return stream


def frame_picture(prediction: Labelled) -> NDArray[np.uint8]:
    """The overlay of one frame above the legend of all classes, uint8 (H',W',3) with even sides, as codecs want."""
    picture = overlay(prediction.fused, prediction.labels, prediction.classes, prediction.palette, legend=False)
    strip = legend_strip(prediction.classes[1:], prediction.palette[1:], picture.height, picture.width)
    width = max(strip.width, picture.width)
    sheet = Image.new("RGB", (width + width % 2, (picture.height + strip.height + 1) // 2 * 2), (255, 255, 255))
    sheet.paste(picture, (0, 0))
    sheet.paste(strip, (0, picture.height))
    return np.asarray(sheet)


# -- from files to a file ----------------------------------------------------------------------------------------


def run(options: PredictOptions) -> tuple[int, float, Path]:
    """Predict the film or the frames that `options` name; returns frames, frames per second and the film written,
    NAME_overlay.mp4 in `options.out`. InputError as its parts do, and for a film that is there without `overwrite`."""

    def align(find: Callable[[], Fit]) -> Aligner | None:
        return open_aligner(options.align, find, film=True, frame=options.frame, refine=not options.no_refine)

    source = open_source(options.visible, options.infrared, options.fps, align)
    clicks = prompts_file(options.prompts)

    def prompts(name: str, size: tuple[int, int]) -> Any:
        return options.prompts if clicks is None else read_prompts(clicks, name, size)

    inputs = [path for path in (options.visible, options.infrared) if path is not None]
    out = options.out / f"{inputs[0].resolve().name if inputs[0].is_dir() else inputs[0].stem}_overlay.mp4"
    if taken := [path for path in inputs if realpath(path) == realpath(out)]:
        raise InputError(f"{taken[0]}: would be overwritten by the film of that name; choose another --out")
    if out.exists() and not options.overwrite:
        raise InputError(f"{out}: is there; choose another --out, or --overwrite")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written ({error.strerror}); choose another --out") from None
    model = FusionSAM.from_pretrained(
        options.weights, options.device, options.backend, calibrated=not options.as_trained
    )
    return *overlay_video(model, source, out, prompts), out
