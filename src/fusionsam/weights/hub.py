"""Checkpoints on the Hugging Face hub: download by name, upload in the hub's own format.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to every program that uses the hub.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from fusionsam.types import InputError

LICENSE = "apache-2.0"
"""Of what is uploaded, unless another is given."""
_PART = r"[A-Za-z0-9_][\w.-]*"
_NAME = re.compile(rf"(?P<scheme>hf://)?(?P<owner>{_PART})/(?P<name>{_PART})(?:@(?P<revision>[\w./-]+))?")


def is_repository(source: str) -> bool:
    """Whether `source` names a repository: owner/name, owner/name@revision, either behind hf://. A path whose first
    folder exists here is a path, unless hf:// says otherwise.

    >>> is_repository("owner/name@main"), is_repository("runs/mine/final")
    (True, False)
    """
    found = _NAME.fullmatch(source)
    return found is not None and (found["scheme"] is not None or not Path(found["owner"]).is_dir())


def split_name(source: str) -> tuple[str, str | None]:
    """(owner/name, revision or None). InputError for what `is_repository` would not take."""
    found = _NAME.fullmatch(source)
    if found is None:
        raise InputError(f"repository {source!r}: expected owner/name, or owner/name@revision")
    return f"{found['owner']}/{found['name']}", found["revision"]


def at_revision(source: str | Path, revision: str) -> str:
    """owner/name@revision. InputError where `source` is no repository, or names a revision itself."""
    if Path(source).exists() or not is_repository(str(source)) or "@" in str(source):
        raise InputError(
            f"revision {revision}: is for owner/name of the Hugging Face hub, found {source}; leave it out"
        )
    return f"{source}@{revision}"


@cache
def download(source: str, files: tuple[str, ...]) -> Path:
    """The local folder with those `files` of a repository that it has; unchanged ones are not fetched twice.

    Raises:
        InputError: the hub cannot be reached, or does not know the repository or its revision.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = split_name(source)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except RevisionNotFoundError:
        raise InputError(f"weights {source}: {repository} has no revision {revision}; leave it out for main") from None
    except GatedRepoError:
        raise InputError(
            f"weights {source}: access must be granted on {constants.ENDPOINT}/{repository}; then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"weights {source}: no such folder here, and no such repository on {constants.ENDPOINT} (a private one "
            "needs `hf auth login`); check the name"
        ) from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"weights {source}: no such folder here, and {constants.ENDPOINT} cannot be reached; check path and network"
        ) from None
    except (HFValidationError, HTTPError, OSError) as error:
        raise refused(f"weights {source}", error) from None


def refused(what: str, error: Exception) -> InputError:
    """An error of the hub as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return InputError(f"{what}: the hub answered: {lines[0][:200]}; check name, access (`hf auth login`) and network")
