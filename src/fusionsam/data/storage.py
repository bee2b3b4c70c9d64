"""Files and folders at any address: a path of this machine, or s3://, gs://, http:// and whatever else fsspec knows.

Remote files are fetched whole before they are read, and written whole: a reader sees the old one or the new one.
"""

from __future__ import annotations

import fnmatch
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fusionsam.io import OTHER_OUT, whole
from fusionsam.types import InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

EXTRAS = {"s3": "fusionsam[s3]", "s3a": "fusionsam[s3]", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Protocol -> what pip installs for it."""
TEXT = 200
"""Characters kept of what a library says."""


def is_remote(address: str | Path) -> bool:
    """Whether it is an address of another machine: SCHEME://..., file:// aside."""
    text = str(address)
    return "://" in text and not text.startswith("file://")


def local_path(address: str | Path) -> Path:
    """The path that an address of this machine stands for."""
    # of nobody's home, ~name is a name, and Path.expanduser raises
    return Path(os.path.expanduser(str(address).removeprefix("file://")))


def join(folder: str, name: str) -> str:
    """The address of `name` below `folder`; a `name` that is an address of its own, or absolute, stays as it is."""
    if is_remote(name) or name.startswith("file://") or os.path.isabs(os.path.expanduser(name)):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(local_path(folder) / name)


def parent(address: str) -> str:
    """The folder that an address lies in."""
    return address.rpartition("/")[0] if is_remote(address) else str(local_path(address).parent)


def file_name(address: str) -> str:
    """The last part of an address, without what follows ? of a web address."""
    if address.startswith(("http://", "https://")):
        address = address.split("?")[0].split("#")[0]
    return address.rstrip("/").rpartition("/")[2]


def read_bytes(address: str) -> bytes:
    """A file, whole. InputError where it cannot be read."""
    if not is_remote(address):
        try:
            return local_path(address).read_bytes()
        except FileNotFoundError:
            raise InputError(f"{address}: no such file; check the path") from None
        except OSError as error:
            raise InputError(f"{address}: cannot be read ({error.strerror}); check the path") from None
    with _told(address, "cannot be read", "check the address and the credentials"):
        return bytes(_file_system(address).cat_file(address))


@contextmanager
def fetched(address: str) -> Iterator[Path]:
    """A local file with the content of `address`: the file itself, or a copy under its name that goes afterwards.
    InputError where it cannot be read."""
    if not is_remote(address):
        yield local_path(address)
        return
    with tempfile.TemporaryDirectory(prefix="fusionsam-") as folder:
        copy = Path(folder) / (file_name(address) or "file")
        copy.write_bytes(read_bytes(address))
        yield copy


def find(pattern: str) -> list[str]:
    """Addresses of the files that a pattern with * (and ** for any folders) fits, sorted. InputError where its place
    cannot be listed."""
    if not is_remote(pattern):
        path = local_path(pattern)
        fixed = fixed_part(str(path))
        if not Path(fixed).is_dir():
            raise InputError(f"{fixed}: no such folder; check the pattern {pattern}")
        below = str(path.relative_to(fixed))
        return sorted(str(file) for file in Path(fixed).glob(below) if file.is_file())
    with _told(pattern, "cannot be listed", "check the address and the credentials"):
        files = _file_system(pattern)
        return sorted(str(files.unstrip_protocol(name)) for name in files.glob(pattern))


def fixed_part(pattern: str) -> str:
    """The folder above the first * of a pattern."""
    return pattern.split("*", 1)[0].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")


class Folder:
    """A folder that results are written into, here or elsewhere.

    >>> Folder("out/night").write("a.txt", b"text")  # doctest: +SKIP
    """

    def __init__(self, address: str | Path) -> None:
        self.address = str(address).rstrip("/") if is_remote(address) else str(local_path(address))
        self.remote = is_remote(address)

    def __truediv__(self, name: str) -> str:
        return join(self.address, name)

    def read(self, name: str) -> bytes | None:
        """A file of the folder; None where there is none. InputError where it cannot be told."""
        if not self.remote:
            return read_bytes(self / name) if Path(self / name).is_file() else None
        with _told(self / name, "cannot be read", "check the address and the credentials"):
            try:
                return bytes(_file_system(self.address).cat_file(self / name))
            except FileNotFoundError:
                return None

    def names(self, below: str = "", pattern: str = "*") -> list[str]:
        """Names of the files directly in the folder, or in its subfolder `below`, that fit `pattern`, sorted."""
        place = self / below if below else self.address
        if not self.remote:
            found = os.listdir(place) if Path(place).is_dir() else []
        else:
            with _told(place, "cannot be listed", "check the address and the credentials"):
                files = _file_system(place)
                files.invalidate_cache()
                try:
                    found = [file_name(str(name)) for name in files.ls(place, detail=False)]
                except FileNotFoundError:  # a folder of an object store is there once it has a file
                    found = []
        return sorted(name for name in found if fnmatch.fnmatchcase(name, pattern))

    def write(self, name: str, data: bytes) -> None:
        """A file, whole or not at all. InputError where it cannot be written."""
        if not self.remote:
            with whole(self / name) as part:
                part.write_bytes(data)
            return
        with _told(self / name, "cannot be written", OTHER_OUT):
            _file_system(self.address).pipe_file(self / name, data)

    def remove(self, name: str) -> None:
        """Take a file away that is there."""
        if not self.remote:
            Path(self / name).unlink(missing_ok=True)
            return
        with _told(self / name, "cannot be removed", OTHER_OUT):
            _file_system(self.address).rm_file(self / name)


def _file_system(address: str) -> AbstractFileSystem:
    import fsspec

    scheme = address.split("://", 1)[0]
    try:
        # fsspec would remember what a folder held before this run wrote into it
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        needed = EXTRAS.get(scheme, str(error)[:TEXT])
        raise InputError(f"{address}: {scheme}:// needs another package; pip install '{needed}'") from None
    except ValueError as error:
        known = "s3://, gs://, http:// or a path"
        raise InputError(f"{address}: no address that fsspec knows ({str(error)[:TEXT]}); give {known}") from None


@contextmanager
def _told(address: str, what: str, remedy: str) -> Iterator[None]:
    """InputError for whatever a library of a file system raises: they share no type."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{address}: no such file, folder or bucket; {remedy}") from None
    except NotImplementedError:
        raise InputError(f"{address}: {what}, addresses of this kind are read alone; {remedy}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:TEXT] or type(error).__name__
        raise InputError(f"{address}: {what} ({reason}); {remedy}") from None
