"""Where results go, and how far they are. Files appear whole or not at all: each is written in a hidden folder beside
its place, then moved there."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from fusionsam.types import InputError, JsonObject

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
OTHER_OUT = "choose another --out"
SCRATCH = ".fusionsam"
"""How the names of hidden folders end in which files are written."""


def given_path(text: str) -> Path:
    """A path of the command line, ~ expanded; an empty one, as of an unset variable, would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path was given")
    return Path(os.path.expanduser(text))


def given_address(text: str) -> str:
    """As `given_path`, but SCHEME://... stays as it is: a path would lose one of its slashes."""
    return text if "://" in text else str(given_path(text))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(out: str | Path, remedy: str = OTHER_OUT) -> None:
    """Make the folder `out`, and remove what killed processes left in it; InputError, ending in `remedy`, where nothing
    can be written into it."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        remove_abandoned(out)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); {remedy}") from error


class State(Enum):
    """What stands in a folder under the names of one result."""

    NEW = "new"
    UNFINISHED = "unfinished"
    """Ours and of the same inputs, to be made again."""
    FINISHED = "finished"
    """Ours, whole, made of the same inputs in the same way."""


@dataclass(frozen=True)
class Made:
    """What results were made of, and how: plain JSON values by names that a message can say."""

    inputs: Mapping[str, object]
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputFolder:
    """The folder that a command writes its results into, and the one rule for what may be replaced there.

    Beside its results every command keeps a record, a JSON file that says what they were made of.

    1. A file of a result's name that no record tells of, and a record in another form, are somebody else's: refused.
    2. A record of other inputs, of more of them, or of inputs of other names alone, is refused, since what it tells
       would be lost.
    3. Results of the same inputs are finished if they were made in the same way and every file is there; else they may
       be replaced.

    >>> OutputFolder("runs/a", "predict").read("v.json") is None  # nothing is there
    True
    """

    path: str | Path
    owner: str
    """The command."""
    remedy: str = OTHER_OUT
    """How every message ends."""

    def __truediv__(self, name: str) -> Path:
        return Path(self.path) / name

    def read(self, record: str, damaged: JsonObject | None = None) -> JsonObject | None:
        """The record of that name; None where there is none. InputError for a file that holds no JSON object, unless
        `damaged` says what such a file stands for."""
        try:
            found = json.loads((self / record).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError):
            if damaged is not None:
                return damaged
            self.foreign(record)
        if not isinstance(found, dict):
            self.foreign(record)
        return found

    def foreign(self, record: str) -> NoReturn:
        """InputError for a record that this command did not write."""
        raise InputError(f"{self / record}: was not written by {self.owner}; {self.remedy}")

    def state(
        self, record: str, stored: Made | None, now: Made, files: Sequence[str], more: Sequence[str] = ()
    ) -> State:
        """What stands there of one result.

        Args:
            record: Name of the record.
            stored: What it tells; None where there is none.
            now: What this run makes the result of, and how.
            files: The result's files, all of which a finished one has.
            more: Further names that would be replaced.

        Raises:
            InputError: rules 1 and 2.
        """
        there = [name for name in dict.fromkeys([*files, *more]) if (self / name).exists()]
        if stored is None:
            if there:
                raise InputError(f"{self / there[0]}: is there, and no {record} of ours tells of it; {self.remedy}")
            return State.NEW
        common = [name for name in stored.inputs if name in now.inputs]
        other = [name for name in common if now.inputs[name] != stored.inputs[name]]
        values = list(now.inputs.values())
        lost = [name for name in stored.inputs if name not in now.inputs and stored.inputs[name] not in values]
        was, is_now = ([inputs[name] for name in other] for inputs in (stored.inputs, now.inputs))
        if not common and not any(value in now.inputs.values() for value in stored.inputs.values()):
            other = [*stored.inputs] if now.inputs else []  # what was begun tells of none
            was, is_now = [*stored.inputs.values()][:1], [*now.inputs.values()][:1]
        if other:
            if len(was) > 1 or not all(isinstance(value, str) for value in (*was, *is_now)):
                raise InputError(f"{self / record}: was made with another {', '.join(other)}; {self.remedy}")
            raise InputError(f"{self / record}: is of {was[0]}, not of {is_now[0]}; {self.remedy}")
        if values and lost:
            raise InputError(f"{self / record}: was made with {', '.join(lost)}, too; {self.remedy}")
        return State.FINISHED if stored == now and set(files) <= set(there) else State.UNFINISHED

    def require_none_lost(self, record: str, what: str, told: Iterable[str], kept: Iterable[str]) -> None:
        """InputError if the record tells of some `what` that this run would not write again."""
        stays = set(kept)
        if lost := [name for name in told if name not in stays]:
            shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
            raise InputError(f"{self / record}: tells of {what} {shown}, which would be lost; {self.remedy}")


@contextmanager
def scratch(folder: str | Path) -> Iterator[Path]:
    """A hidden folder in `folder` to write into, which goes when the block is left.

    A killed process leaves it behind. It is locked while its process lives, and the first call in another process, or
    `require_writable`, removes those that nobody holds. Where there are no locks (Windows, some network file systems)
    they stay.
    """
    _remove_abandoned_once(os.path.realpath(folder))
    while True:
        place = Path(tempfile.mkdtemp(prefix=".", suffix=SCRATCH, dir=folder))
        with _locked(place) as held:
            if held is False:  # between its making and its lock somebody removed it as abandoned
                continue
            try:
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)
            return


def remove_abandoned(folder: str | Path) -> None:
    """Remove the `scratch` folders of processes that were killed; those of living ones stay."""
    try:
        with os.scandir(folder) as there:
            found = [place.path for place in there if place.name.startswith(".") and place.name.endswith(SCRATCH)]
    except OSError:
        return
    for place in found:
        with _locked(place) as held:
            if held:
                shutil.rmtree(place, ignore_errors=True)


_remove_abandoned_once = lru_cache(maxsize=1024)(remove_abandoned)


@contextmanager
def _locked(folder: str | Path) -> Iterator[bool | None]:
    """Whether this process holds `folder` within the block: False if another does or if it is gone, None where it
    cannot be locked. The system lets go of the locks of a killed process."""
    if fcntl is None:
        yield None
        return
    try:
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        yield False if isinstance(error, FileNotFoundError) else None
        return
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held: bool | None = os.path.samestat(os.fstat(place), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError:
            held = None
        yield held
    finally:
        os.close(place)


@contextmanager
def whole(path: str | Path, remedy: str = OTHER_OUT, also: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """The temporary path to write to, of the same name; it becomes `path` when the block ends, and goes when the block
    is left by an exception, an interrupt included: what stood at `path` stays. Folders are made.

    InputError, which ends in `remedy`, for an OSError or one of `also`: what else a writer raises for a full disk.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path.parent) as folder:
            yield folder / path.name
            _as_usual(folder / path.name)
            os.replace(folder / path.name, path)
    except Exception as error:
        if not isinstance(error, (OSError, *also)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise InputError(f"{path}: cannot be written ({reason}); {remedy}") from error


def _as_usual(path: Path) -> None:
    """The rights that a new file has here: safetensors gives its own to nobody but the owner."""
    if stat.S_IMODE(path.stat().st_mode) == 0o600:
        usual = path.with_name(".usual")
        usual.touch()
        path.chmod(stat.S_IMODE(usual.stat().st_mode))


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The folder to write into; it takes the place of the folder `path` when the block ends, and goes when the block is
    left by an exception. Of a process killed between the two renames the next call finds the old one and puts it back.

    InputError where the folders cannot be renamed."""
    path = Path(path)
    part, old = (path.with_name(f".{path.name}.{kind}") for kind in ("part", "old"))
    try:
        if old.exists() and not path.exists():
            old.rename(path)
        for stale in (part, old):
            shutil.rmtree(stale, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if path.exists():
            path.rename(old)
        part.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); {OTHER_OUT}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | Path, text: str, remedy: str = OTHER_OUT) -> Path:
    """`text` as UTF-8; returns the path. Raises as `whole`."""
    with whole(path, remedy) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, values: object, remedy: str = OTHER_OUT, allow_nan: bool = True) -> Path:
    """`values` as JSON; returns the path. Raises as `whole`, and ValueError for nan and infinity, which JSON lacks,
    without `allow_nan`."""
    return write_text(path, json.dumps(values, indent=1, allow_nan=allow_nan) + "\n", remedy)


def said(error: BaseException) -> str:
    """The first line of what another library says of an error, 120 characters of it; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def fetch(source: str, filename: str) -> Path:
    """A file of a Hugging Face hub repository, from its local cache or downloaded. InputError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, filename))
    except Exception as error:  # network, cache and naming errors share no type
        raise InputError(
            f"weights {source}: neither a file, a folder nor a hub repository that can be reached ({said(error)}); "
            "give a local path"
        ) from None


# -- what standard error tells meanwhile -----------------------------------------------------------------------------


def say(line: str) -> None:
    """A line on stderr that leaves a progress bar whole."""
    tqdm.write(line, file=sys.stderr)


EVERY = 60.0
"""Seconds between two lines where the output is no terminal."""


class LineProgress(tqdm):  # type: ignore[type-arg]
    """tqdm that writes whole lines, at most one every EVERY seconds and one at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._told = time.monotonic()
        self._last: float = 0
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]
        """Write the state as a line if the last one is long ago."""
        if time.monotonic() - self._told < EVERY:
            return False
        self._line()
        return True

    def close(self) -> None:
        """The last line."""
        if self.disable:
            return
        self.disable = True
        type(self)._decr_instances(self)  # type: ignore[attr-defined]
        if self.n != self._last:
            self._line()

    def _line(self) -> None:
        self._told, self._last = time.monotonic(), self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress_bar(
    items: Iterable[T], desc: str, unit: str = "it", total: int | None = None, disable: bool = False
) -> tqdm[T]:
    """tqdm over `items` that suits where standard error goes: redrawn in a terminal, a line a minute in a log file."""
    terminal = (isatty := getattr(sys.stderr, "isatty", None)) is not None and isatty()
    return (tqdm if terminal else LineProgress)(items, desc=desc, unit=unit, total=total, disable=disable)


def commit() -> str:
    """The commit of the source tree this runs from, '-dirty' behind it if files differ; 'unknown' outside of one."""
    try:
        # installed into some other project's folder, that project's commit would say nothing
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--match=")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return answer.stdout.strip()
