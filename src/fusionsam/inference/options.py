"""The options of `fusionsam predict`. No torch: `--help` is made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fusionsam.config.options import (
    Address,
    AlignOptions,
    AnyPairOptions,
    OutOption,
    OverwriteOption,
    PrecisionOption,
    WeightsOption,
)
from fusionsam.data.storage import is_remote, local_path
from fusionsam.types import InputError


@dataclass(frozen=True, kw_only=True)
class PredictOptions(AnyPairOptions, OutOption, AlignOptions, WeightsOption, PrecisionOption, OverwriteOption):
    """Fuse pairs and label every pixel. For each pair NAME_fused.png, NAME_labels.png (class ids), NAME_overlay.png and
    NAME.json are written into --out; pairs that are finished there are skipped."""

    frame: Literal["visible", "infrared"] = "visible"
    """with --align: camera whose pixels the results have"""
    radiometric: Path | None = None
    """instead: a radiometric JPEG of FLIR or DJI (counts and, where it is inside, the visible picture), or a folder of
    them; NAME.json then tells the degrees Celsius of each class"""
    manifest: Address | Path | None = None
    """instead: a CSV or Parquet table with the columns visible and infrared, or radiometric, and perhaps id, or a
    pattern of files with *; a path, or s3://, gs://, http://; the results have a table OUT/results (Parquet), by which
    a run goes on"""
    match: tuple[str, ...] = field(default=(), metadata={"metavar": "PATTERN"})
    """how the files of a pair are named, visible first: '{id}_rgb' '{id}_th'; the two may lie in one folder, or of a
    pattern in two: 'vi/{id}' 'ir/{id}'"""
    infrared_range: tuple[str, ...] = field(default=(), metadata={"metavar": "LOW HIGH"})
    """the infrared values that become black and white, two numbers (degrees Celsius of radiometric files), or auto: by
    the scene, of 8-bit pictures too (left out: by the scene, of deeper ones alone)"""
    polarity: Literal["auto", "white", "black"] = "auto"
    """what hot is in the infrared picture; auto: white, with a line where it looks otherwise"""
    palette: str = field(default="auto", metadata={"metavar": "NAME"})
    """the colours of a coloured infrared picture: auto, none, ironbow, inferno, jet, rainbow, hot, viridis, coolwarm
    and others"""
    celsius: bool = False
    """of radiometric files: also write NAME_celsius.tif (float32, the camera's own size)"""
    stop_on_error: bool = False
    """end at the first pair that cannot be read (left out: go on, list it in failures.csv, exit code 3)"""
    prompts: str | None = None
    """self: the model's own points and box; none: its mask prompt only; FILE.json: yours (left out: as the weights were
    configured)"""
    backend: Literal["torch", "onnx"] = "torch"
    """onnx: --weights is a folder that export wrote"""
    overwrite: bool = OverwriteOption.overwrite
    """predict finished pairs again; replace files and films"""
    video: bool = False
    """the two are films, or folders of frames: write NAME_overlay.mp4"""
    fps: float | None = None
    """with --video: frames a second (left out: the film's, 25 for folders)"""
    confidence_map: bool = False
    """also write NAME_confidence.png (0-255)"""
    min_confidence: float = field(default=0.0, metadata={"metavar": "P"})
    """unknown (255) in labels and overlay where the class is less probable than P (0-1): for data.extra_labels"""
    as_trained: bool = False
    """without what calibrate fitted"""
    flip: bool = False
    """average with the mirrored pair: twice the time"""
    scales: tuple[float, ...] = (1.0,)
    """average over resized copies, 1 among them: 1 1.25"""
    out: Address | Path  # type: ignore[assignment]
    """folder for the results; with --manifest also s3://, gs://"""
    engine: Literal["local", "ray"] = "local"
    """with --manifest: ray runs on all processors of this machine, or of the Ray cluster that RAY_ADDRESS names"""
    workers: int | None = None
    """with --engine ray: processes that hold a model each (left out: one a GPU, or else one a CPU)"""
    batch_size: int = 1
    """with --manifest: pairs of equal size in one pass"""
    shard: int = 256
    """with --manifest: pairs of one file of the results table, the least that is done again after a kill"""
    max_failure_rate: float = field(default=1.0, metadata={"metavar": "SHARE"})
    """with --manifest: stop where more than this share (0-1) of at least 100 pairs failed"""

    def __post_init__(self) -> None:
        """InputError for options that do not go together."""
        super().__post_init__()
        if self.frame != "visible" and self.align is None:
            raise InputError(f"--frame {self.frame}: is of --align; give that, or leave it out")
        if self.radiometric is not None and self.align not in (None, "maker", "auto"):
            raise InputError(
                f"--align {self.align}: radiometric files tell themselves how their pictures lie; give --align maker, "
                "which refines that, or leave it out"
            )
        if self.as_trained and self.backend == "onnx":
            raise InputError(
                "--as-trained: what calibrate fitted is inside an export; leave it out, or use --backend torch"
            )
        if self.fps is not None and not self.video:
            raise InputError("--fps: is of films; give --video with it, or leave it out")
        sources = {"--rgbt": self.rgbt, "--radiometric": self.radiometric, "--manifest": self.manifest}
        given = [name for name, path in sources.items() if path is not None]
        both = self.visible is not None or self.infrared is not None
        if len(given) + both > 1:
            named = " and ".join([*given, *(["--visible or --infrared"] if both else [])])
            raise InputError(f"{named}: each names the pictures; give one of them")
        pattern = self.manifest is not None and "*" in str(self.manifest)
        if self.match and not pattern and (given or self.video):
            raise InputError("--match: is of folders; give it with --visible and --infrared, or with a pattern")
        self._require_manifest()
        if self.celsius and self.radiometric is None and self.manifest is None:
            raise InputError(
                "--celsius: is of radiometric files; give --radiometric or --manifest with it, or leave it out"
            )
        of_pictures = given or self.confidence_map or self.min_confidence or self.flip
        if self.video and (of_pictures or self.scales != (1.0,)):
            raise InputError(
                "--video: takes --visible and --infrared, and no --rgbt, --radiometric, --manifest, --confidence-map, "
                "--min-confidence, --flip or --scales; leave them out"
            )
        if not 0 <= self.min_confidence <= 1:
            raise InputError(
                f"--min-confidence {self.min_confidence}: expected a probability from 0 to 1, for instance 0.9"
            )

    def folder(self) -> Path:
        """`out` as a path of this machine. InputError for an address of another one."""
        if is_remote(self.out):
            raise InputError(f"--out {self.out}: is for --manifest; give a local folder, or list the pairs in a table")
        return local_path(self.out)

    def _require_manifest(self) -> None:
        """InputError for options of a table without one, and for values that none can have."""
        names = ("engine", "workers", "batch_size", "shard", "max_failure_rate")
        changed = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if changed and self.manifest is None:
            raise InputError(f"--{changed[0].replace('_', '-')}: is of a table of pairs; give --manifest with it")
        if self.workers is not None and self.engine == "local":
            raise InputError("--workers: is of --engine ray; leave it out, or give that")
        for name in ("workers", "batch_size", "shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")
        if not 0 <= self.max_failure_rate <= 1:
            raise InputError(f"--max-failure-rate {self.max_failure_rate}: expected a share from 0 to 1, such as 0.05")
        if self.batch_size > 1 and self.prompts not in (None, "self", "none"):
            raise InputError("--batch-size: your own prompts are of one pair each; leave it out")
