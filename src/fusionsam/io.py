"""Where results go. Files appear whole or not at all: each is written under a temporary name beside its own, then
renamed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fusionsam.errors import InputError

OTHER_OUT = "choose another --out"


def given_path(text: str) -> Path:
    """A path of the command line; an empty one, as of an unset shell variable, would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path was given")
    return Path(text)


def require_writable(out: str | Path) -> None:
    """Make the folder `out`; InputError where nothing can be written into it."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); {OTHER_OUT}") from error


@contextmanager
def whole(path: str | Path, remedy: str = OTHER_OUT, also: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """The temporary name to write to; it becomes `path` when the block ends, and goes when the block is left by an
    exception, an interrupt included: what stood at `path` stays. Folders are made.

    InputError, which ends in `remedy`, for an OSError or one of `also`: what else a writer raises for a full disk.
    """
    path = Path(path)
    # processes that share a folder must not write into each other's file
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, (OSError, *also)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise InputError(f"{path}: cannot be written ({reason}); {remedy}") from error


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


def write_json(path: str | Path, values: Any, remedy: str = OTHER_OUT, allow_nan: bool = True) -> Path:
    """`values` as JSON; returns the path. Raises as `whole`, and ValueError for nan and infinity, which JSON lacks,
    without `allow_nan`."""
    return write_text(path, json.dumps(values, indent=1, allow_nan=allow_nan) + "\n", remedy)


def fetch(source: str, filename: str) -> Path:
    """A file of a Hugging Face hub repository, from its local cache or downloaded. InputError if it cannot be had."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, filename))
    except Exception as error:  # network, cache and naming errors share no type
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(
            f"weights {source}: neither a file, a folder nor a hub repository that can be reached ({reason}); "
            "give a local path"
        ) from None
