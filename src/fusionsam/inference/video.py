"""Aligned films, or folders of frames, as one overlay video; one frame in memory at a time. PyAV reads and writes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from os.path import realpath
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusionsam.alignment.apply import Aligner
from fusionsam.alignment.orientation import grey
from fusionsam.data.dataset import read_sample
from fusionsam.data.infrared import DEFAULT, Heat, InfraredOptions
from fusionsam.data.pairing import pair_folders
from fusionsam.data.rigs import AUTO, Agreement, Fit, fit, fit_frames, keep, open_aligner
from fusionsam.data.splits import by_stem
from fusionsam.data.storage import Folder
from fusionsam.inference.batch import SOME_FAILED
from fusionsam.inference.films import (
    FILM_RATE,
    Film,
    Pairing,
    Reading,
    at,
    frames_reading,
    one_reading,
    pair_frames,
    pyav,
)
from fusionsam.inference.inputs import ImageLike
from fusionsam.inference.onnx import FILLED
from fusionsam.inference.options import PredictOptions
from fusionsam.inference.prompts import Mode, prompt_mode, prompts_file, read_prompts
from fusionsam.inference.render import Color, legend_strip, overlay
from fusionsam.inference.results import describe, open_model
from fusionsam.io import OutputFolder, progress_bar, say, whole, write_json
from fusionsam.types import InputError, Prompts

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

Frame = tuple[str, tuple[int, int], ImageLike | None, ImageLike | None, Tensor | None]
"""Name, (H, W), visible and infrared of a frame, as a model's `predict` takes them, and where each camera reaches
(bool (2,H,W), None: everywhere)."""
Frames = Iterator[Frame]
TICK = Fraction(1, 12800)
"""Unit of time of films of a variable rate, in seconds."""
Align = Callable[[Callable[[], Fit]], Aligner | None]
"""Makes the aligner of films, given what finds a rig in them."""


class Labelled(Protocol):
    """What is drawn of a prediction."""

    fused: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    classes: list[str]
    palette: list[Color]


class Predictor(Protocol):
    """What `FusionSAM` offers."""

    def predict(
        self,
        visible: ImageLike | None,
        infrared: ImageLike | None,
        prompts: Prompts | Mode | None = None,
        *,
        covered: Tensor | None = None,
    ) -> Labelled:
        """A pair, either of them None, and prompts -> fused picture and class ids; `covered` bool (2,H,W)."""


@dataclass
class Source:
    """Frames, and what is known of them before the first is decoded."""

    frames: Frames
    count: int | None
    rate: Fraction
    times: list[float] | None = None
    """Seconds of each frame where they are not those of the rate."""
    alone: list[str] = field(default_factory=list)
    """Frames without a partner, in words."""
    partly: bool = False
    """Whether a camera did not reach all of a frame, of those decoded so far."""
    heat: Heat | None = None
    """How the infrared film was read: facts and notices."""
    facts: dict[str, object] = field(default_factory=dict)
    """What was found of the films, and how they were paired: plain JSON types."""

    names: list[str] = field(default_factory=list)
    """Of the frames, as prompts call them."""
    aligner: Aligner | None = None
    agreement: Agreement = field(default_factory=Agreement)
    """How well the two cameras lie on one another, of the frames decoded so far."""

    def told(self) -> dict[str, object]:
        """What was found and guessed, for the JSON beside the film."""
        moved: dict[str, object] = {}
        if self.aligner is not None:
            score = None if self.agreement.median is None else round(self.agreement.median, 4)
            done = {"rig": self.aligner.rig.digest, "frame": self.aligner.frame, "frames": self.agreement.pairs}
            moved = {"alignment": {**done, "median_score": score, "applied": self.agreement.pairs > 0}}
        rate = {"frames_a_second": round(float(self.rate), 4), "times": "constant" if self.times is None else "kept"}
        heat = {} if self.heat is None else {"infrared_read_as": self.heat.facts}
        notices = [] if self.heat is None else [notice.sentence(options=True) for notice in self.heat.notices]
        return {**rate, **self.facts, **moved, **heat, "notices": notices, "left_out": self.alone}


def open_source(
    visible: Path | None,
    infrared: Path | None,
    fps: float | None = None,
    align: Align = lambda find: None,
    reading: InfraredOptions = DEFAULT,
) -> Source:
    """Two videos frame by frame, or two folders of images paired by name in the order of their names (f2 before f10).

    Either may be None. `align` brings the two cameras into one frame. `fps` replaces the film's own rate (25 for
    folders). `reading` says how infrared frames become heat; of a deep film one range is found for all of it. Films of
    different rates, or of a variable one, are paired by time. InputError when they do not fit: a file with a folder,
    frames of two sizes without `align`, nothing that can be decoded.
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
        return _open_folders(visible, infrared, rate, align, reading)
    return _open_films(visible, infrared, rate, align, reading)


def _open_folders(
    visible: Path | None, infrared: Path | None, rate: Fraction | None, align: Align, reading: InfraredOptions
) -> Source:
    for folder in (visible, infrared):
        if folder is not None and not by_stem(folder):
            raise InputError(f"{folder}: holds no image; expected the frames of a film")
    found = pair_folders(visible, infrared)
    alone = [found.alone[name] for name in sorted(found.alone, key=_natural)]
    entries = sorted(found.entries, key=lambda entry: _natural(entry.id))
    if not entries:
        raise InputError(f"{alone[0]} ({len(alone)} of {len(alone)} frames lack one); name both alike")
    aligner = align(partial(fit, entries))
    heats = [entry.infrared for entry in entries if entry.infrared is not None]
    reading, told = frames_reading(heats, reading)
    agreement = Agreement()

    def listed() -> Frames:
        for entry in entries:
            sample = read_sample(entry, align=aligner, reading=reading)
            if sample.alignment:
                agreement.add(sample.alignment)
            yield sample.id, sample.size, sample.visible, sample.infrared, sample.covered

    return Source(
        listed(),
        len(entries),
        rate or FILM_RATE,
        alone=alone,
        heat=told,
        facts={"pairing": {"by": "name"}},
        names=[entry.id for entry in entries],
        aligner=aligner,
        agreement=agreement,
    )


def _open_films(
    visible: Path | None, infrared: Path | None, rate: Fraction | None, align: Align, reading: InfraredOptions
) -> Source:
    films = [None if path is None else Film(path) for path in (visible, infrared)]
    known = [film for film in films if film is not None]
    sizes = [f"{film.width}x{film.height}" for film in known]
    pairing = None
    if len(known) == 2:
        pairing = pair_frames(*known)
        if not pairing.frames:
            raise InputError(f"{visible} and {infrared}: no frame of one is near in time to one of the other")
    ready = one_reading(films[0], films[1], reading)

    def find() -> Fit:
        if pairing is None:
            raise InputError(f"{known[0].path}: is one film, and --align auto looks at two; give both, or leave it out")
        return fit_frames((_tensors(frame) for frame in _paired(films, pairing, ready)), len(pairing.frames))

    aligner = align(find)  # a rig that cannot be read is told of one film too
    if len(set(sizes)) > 1 and aligner is None:
        raise InputError(
            f"{visible} is {sizes[0]}, {infrared} {sizes[1]} pixels; give an aligned pair of films, or --align auto"
        )
    frames = _paired(films, pairing, ready)
    agreement = Agreement()
    source = Source(
        frames if aligner is None or pairing is None else _aligned(frames, aligner, agreement),
        known[0].count if pairing is None else len(pairing.frames),
        rate or known[0].rate,
        heat=ready.told,
        names=[known[0].path.stem],
        aligner=aligner,
        agreement=agreement,
    )
    named = zip(("visible", "infrared"), films, strict=True)
    source.facts = {name: film.facts() for name, film in named if film is not None}
    if pairing is not None:
        source.alone = pairing.alone
        source.facts["pairing"] = {"by": "time" if pairing.by_time else "number", "pairs": len(pairing.frames)}
    slow, place = min(((film, place) for place, film in enumerate(known)), key=lambda item: item[0].pace)
    if rate is None and (slow.variable or (pairing is not None and pairing.by_time)):
        indices = range(len(slow.times)) if pairing is None else [pair[place] for pair in pairing.frames]
        source.times, source.rate = [slow.times[index] for index in indices], slow.rate
    return source


def _tensors(frame: Frame) -> tuple[Tensor, Tensor]:
    """uint8 (3,H,W) and (1,H',W') of a frame of two films."""
    visible, infrared = (torch.from_numpy(np.ascontiguousarray(array)) for array in frame[2:4])
    heat = infrared[None] if infrared.ndim == 2 else grey(infrared.permute(2, 0, 1)).round().to(torch.uint8)[None]
    return visible.permute(2, 0, 1), heat


def _aligned(frames: Frames, aligner: Aligner, agreement: Agreement) -> Frames:
    for number, frame in enumerate(frames, 1):
        try:
            pair = aligner(*_tensors(frame))
        except InputError as error:
            raise InputError(f"frame {number} of {frame[0]}: {error}") from None
        agreement.add(pair.told)
        size = int(pair.covered.shape[1]), int(pair.covered.shape[2])
        yield frame[0], size, pair.visible, pair.infrared, pair.covered


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _paired(films: list[Film | None], pairing: Pairing | None, reading: Reading) -> Frames:
    """Frames of one film or two, as 8 bits; InputError where a film ends before its own list of frames does."""
    known = [film for film in films if film is not None]
    size = known[0].height, known[0].width
    name = known[0].path.stem
    visible, infrared = films
    if pairing is None:
        for frame in known[0]:
            shown = (reading.visible(frame), None) if visible is not None else (None, reading.infrared(frame))
            yield name, size, *shown, None
        return
    assert visible is not None
    assert infrared is not None
    streams = (at(film, [pair[place] for pair in pairing.frames]) for place, film in enumerate((visible, infrared)))
    done = 0
    for first, second in zip(*streams, strict=False):
        yield name, size, reading.visible(first), reading.infrared(second), None
        done += 1
    if done < len(pairing.frames):
        raise InputError(
            f"{visible.path} or {infrared.path}: ends after {done} of {len(pairing.frames)} frames that it lists "
            "(damaged?)"
        )


# -- writing -----------------------------------------------------------------------------------------------------


def overlay_video(
    model: Predictor,
    source: Source,
    out: Path,
    prompts: Callable[[str, tuple[int, int]], Prompts | Mode | None] = lambda name, size: None,
    keep: bool = False,
) -> tuple[int, float]:
    """Predict frame by frame and write H.264 (MPEG-4 where PyAV was built without) to `out`, an .mp4.

    `prompts` gives those of a frame by name and (H, W). Every class keeps its colour and all are named in the legend
    below, so that the size stays the same. Times of frames are kept where the source has them. Returns frames and
    frames per second; `out` is complete or absent, but with `keep` holds what comes before a frame that cannot be read,
    which `source.alone` then tells.
    """
    av = pyav()
    done, started = 0, time.perf_counter()
    with whole(out, also=(av.FFmpegError,)) as part, av.open(str(part), "w", format="mp4") as container:
        stream = None
        drawn = _drawn(model, source, prompts)
        readable = _until_damage(drawn, source) if keep else drawn
        for picture in progress_bar(readable, total=source.count, desc="video", unit="frame"):
            if stream is None:
                stream = _stream(av, container, source.rate, picture.shape)
                if source.times is not None:
                    stream.codec_context.time_base = TICK
            shown = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if source.times is not None:
                shown.pts, shown.time_base = round(source.times[done] / TICK), TICK
            for packet in stream.encode(shown):
                container.mux(packet)
            done += 1
        if stream is None:
            raise InputError("--video: the films hold no frame; give others")
        for packet in stream.encode(None):
            container.mux(packet)
    return done, done / max(time.perf_counter() - started, 1e-9)


def _drawn(
    model: Predictor, source: Source, prompts: Callable[[str, tuple[int, int]], Prompts | Mode | None]
) -> Iterator[NDArray[np.uint8]]:
    """The overlays of the frames, of one size. InputError for a frame that cannot be predicted, or has another."""
    first = None
    for number, (name, size, visible, infrared, covered) in enumerate(source.frames, 1):
        source.partly |= covered is not None and not bool(covered.all())
        try:
            prediction = model.predict(visible, infrared, prompts(name, size), covered=covered)
        except InputError as error:
            raise InputError(f"frame {number} of {name}: {error}") from None
        height, width = prediction.labels.shape
        first = first or (height, width)
        if (height, width) != first:
            raise InputError(
                f"frame {number} ({name}): is {width}x{height} pixels, the first is {first[1]}x{first[0]}; give one "
                "size a film"
            )
        yield frame_picture(prediction)


def _until_damage(frames: Iterator[NDArray[np.uint8]], source: Source) -> Iterator[NDArray[np.uint8]]:
    """The frames before one that cannot be done, of which `source.alone` is told; InputError if it is the first."""
    done = 0
    try:
        for frame in frames:
            yield frame
            done += 1
    except InputError as error:
        if not done:
            raise
        source.alone.append(f"{error}; the {done} frames before it are kept")


def _stream(av: ModuleType, container: OutputContainer, rate: Fraction, shape: tuple[int, ...]) -> VideoStream:
    codec: Literal["libx264", "mpeg4"] = "libx264" if "libx264" in av.codecs_available else "mpeg4"
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


def run(options: PredictOptions) -> tuple[int, float, Path, int]:
    """Predict the film or the frames that `options` name; returns frames, frames per second, the film written,
    NAME_overlay.mp4 in `options.out` with a JSON of what was found and guessed beside it, and the exit code:
    batch.SOME_FAILED where frames are missing in it. InputError as its parts do, and for a film that is there without
    `overwrite`."""
    reading = InfraredOptions.typed(options.infrared_range, options.polarity, options.palette)

    def align(find: Callable[[], Fit]) -> Aligner | None:
        return open_aligner(options.align, find, film=True, frame=options.frame, refine=not options.no_refine)

    source = open_source(options.visible, options.infrared, options.fps, align, reading)
    if source.alone and options.stop_on_error:
        raise InputError(f"{source.alone[0]}; cut the films to the same frames, or leave out --stop-on-error")
    clicks = prompts_file(options.prompts)

    def prompts(name: str, size: tuple[int, int]) -> Prompts | Mode | None:
        if clicks is None:
            return prompt_mode(options.prompts)
        return read_prompts(clicks, name, size, model.config.classes)

    inputs = [path for path in (options.visible, options.infrared) if path is not None]
    out = options.folder() / f"{inputs[0].resolve().name if inputs[0].is_dir() else inputs[0].stem}_overlay.mp4"
    if taken := [path for path in inputs if realpath(path) == realpath(out)]:
        raise InputError(f"{taken[0]}: would be overwritten by the film of that name; choose another --out")
    if out.exists() and not options.overwrite:
        raise InputError(f"{out}: is there; choose another --out, or --overwrite")
    beside = OutputFolder(out.parent, "predict", "choose another --out, or --overwrite")
    record = out.with_suffix(".json").name
    if not options.overwrite and (stored := beside.read(record)) is not None and stored.get("film") != out.name:
        beside.foreign(record)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written ({error.strerror}); choose another --out") from None
    model = open_model(options)
    request = describe(options, model, source.aligner, source.names)
    if source.aligner is not None and options.align == AUTO:
        keep(source.aligner.rig, Folder(out.parent), [], options.overwrite)
    if source.heat is not None:
        if used := source.heat.facts.get("range"):
            say(f"{options.infrared}: range {used['low']:g} to {used['high']:g}, {used['grey_levels']} grey levels")
        for notice in source.heat.notices:
            say(f"{options.infrared}: {notice.sentence(options=True)}")
    count, rate = overlay_video(model, source, out, prompts, keep=not options.stop_on_error)
    made = {"film": out.name, "frames": count, **request.described, "run": request.settings}
    if options.precision != "fp32":
        made["precision"] = options.precision
    if options.backend == "onnx" and source.partly:
        made["filled"] = True
        say(FILLED.sentence(options=True))
    write_json(beside / record, {**made, **source.told()})
    unused = source.aligner is not None and not source.agreement.pairs
    alone = (
        [f"{options.align}: the rig was not used: a film that stands alone stays in its own frame"] if unused else []
    )
    for line in [*source.alone, *source.agreement.lines(str(options.align)), *alone]:
        say(line)
    return count, rate, out, SOME_FAILED if source.alone else 0
