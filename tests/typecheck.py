"""The check of tensor axes that pyproject.toml switches on for the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from beartype import BeartypeConf, BeartypeStrategy, beartype

_CONFIGURED = beartype(conf=BeartypeConf(strategy=BeartypeStrategy.O1, is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked, but while torch.export traces it: comparing symbolic sizes would fix
    them."""
    strict = _CONFIGURED(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if torch.compiler.is_exporting() else strict)(*args, **kwargs)

    return call
