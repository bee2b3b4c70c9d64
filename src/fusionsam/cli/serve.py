"""The command `fusionsam serve`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from fusionsam.config.options import PrecisionOption, WeightsOption
from fusionsam.server.config import ServeConfig


@dataclass(frozen=True, kw_only=True)
class Options(WeightsOption, PrecisionOption, ServeConfig):
    """Answer pairs over HTTP, on this machine alone unless told otherwise."""

    host: str = "127.0.0.1"
    """address to listen on; the default is this machine alone"""
    port: int = 8000
    """port; 0 takes a free one"""
    token_file: Path | None = None
    """file with a bearer token to ask for; or set FUSIONSAM_TOKEN"""
    align: Path | None = field(default=None, metadata={"metavar": "RIG"})
    """rig.json of `fusionsam align`: every pair is of these two cameras"""
    access_log: bool = False
    """a line for every request on stderr"""

    @property
    def limits(self) -> ServeConfig:
        """The limits alone."""
        return ServeConfig(**{limit.name: getattr(self, limit.name) for limit in fields(ServeConfig)})


def main(options: Options) -> int:
    """Serve until told to stop."""
    from fusionsam.server.run import serve

    serve(
        options.weights,
        options.device,
        options.precision,
        options.host,
        options.port,
        options.token_file,
        options.limits,
        options.access_log,
        options.align,
    )
    return 0
