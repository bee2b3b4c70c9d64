"""The command `fusionsam demo`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fusionsam.config.options import DeviceOption, WeightsOption


@dataclass(frozen=True, kw_only=True)
class Options(WeightsOption, DeviceOption):
    """Try the model in a browser, on a page served from this machine."""

    port: int = 7860
    """port of the page; 0 takes a free one"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 shows it to the network"""
    align: Path | None = field(default=None, metadata={"metavar": "RIG"})
    """rig.json of `fusionsam align`: uploaded pairs of its sizes are of these two cameras"""


def main(options: Options) -> int:
    """Serve the page until interrupted."""
    from fusionsam.page.run import run

    run(options.weights, options.device, options.host, options.port, options.align)
    return 0
