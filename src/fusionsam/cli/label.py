"""The command `fusionsam label`: label a folder of pairs in a browser."""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fusionsam.config.options import DeviceOption, OutOption, PairOptions, WeightsOption
from fusionsam.types import InputError

if TYPE_CHECKING:
    from fusionsam.data.labelling.folder import LabelFolder


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions, OutOption, WeightsOption, DeviceOption):
    """Label a folder of pairs in a browser: objects by clicks, boxes, brush and polygon, each change on disk at once.
    A folder --out that is there is gone on with."""

    classes: Path = field(metadata={"metavar": "FILE"})
    """YAML with classes and palette; the first class is what nothing covers"""
    order: Literal["name", "uncertainty"] = "name"
    """which pairs come first; uncertainty: what the model is least sure of"""
    align: Path | None = field(default=None, metadata={"metavar": "RIG"})
    """rig.json of `fusionsam align`, for two cameras that see apart: labels are in the visible picture's pixels"""
    sam: str = "sam"
    """sam (ships with the package), or a SAM, SAM2 or MobileSAM of your own: folder, hub name or file"""
    who: str = ""
    """name in the log (left out: the user of this machine)"""
    host: str = "127.0.0.1"
    """address to listen on; whoever reaches it may draw"""
    port: int = 7861
    """port of the page; 0 takes a free one"""
    export: tuple[str, ...] = field(default=(), metadata={"metavar": "FORMAT:FILE"})
    """write the objects, and end: coco, coco-polygons, cvat, labelme (a folder) or label-studio"""
    import_: tuple[str, ...] = field(default=(), metadata={"metavar": "FORMAT:FILE"})
    """take the objects of files in these formats, and end"""
    export_coco: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """as --export coco:FILE"""
    import_coco: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """as --import coco:FILE"""
    export_temperatures: Path | None = field(default=None, metadata={"metavar": "FILE"})
    """write a CSV of every object's and class' temperatures where the infrared is radiometric, and end"""


def main(options: Options) -> int:
    """Serve the page until interrupted; or exchange files, and end."""
    from fusionsam.config.datasets import besides, find
    from fusionsam.data.labelling.folder import LabelFolder
    from fusionsam.data.splits import pair_entries

    row = find("pairs", options.classes)
    if len(row.classes) < 2:
        raise InputError(f"{options.classes}: found one class; expected the background and at least one more")
    for path in (options.visible, options.infrared):
        if path is not None and not path.is_dir():
            raise InputError(f"{path}: no such folder; expected a folder of pictures")
    entries = pair_entries(options.visible, options.infrared)
    if not entries:
        raise InputError(f"{options.visible or options.infrared}: holds no picture; give a folder of pairs")
    more = besides(options.classes)
    folder = LabelFolder(options.out, entries, row.classes, row.palette, options.who, options.align, more)
    if _exchange(options, folder):
        return 0
    with folder.alone():
        return _serve(options, folder)


def _exchange(options: Options, folder: LabelFolder) -> bool:
    """Read and write files as asked; whether anything was."""
    from fusionsam.data.labelling.exchange import Format, export, into_folder
    from fusionsam.data.labelling.formats import FORMATS, named

    read = [named(text, "--import") for text in options.import_]
    written: list[tuple[Format, Path]] = [named(text, "--export") for text in options.export]
    if options.import_coco:
        read.append((FORMATS["coco"], options.import_coco))
    if options.export_coco:
        written.append((FORMATS["coco"], options.export_coco))
    for kind, path in read:
        with folder.alone():
            taken = into_folder(path, kind, folder)
        other = f"; {len(taken.others)} pictures of it are of no pair" if taken.others else ""
        print(f"{taken.objects} objects of {taken.pairs} pairs taken from {path}{other}")
    if options.export_temperatures:
        from fusionsam.data.rigs import read_aligner
        from fusionsam.server.labelling.temperatures import TemperatureTable

        table = TemperatureTable(folder, read_aligner(options.align))
        written.append((table, options.export_temperatures))
    for count, path in export(written, folder):
        print(f"{count} objects in {path}")
    if options.export_temperatures and table.without:
        print(
            f"{table.without} of {table.labelled} labelled pairs have no temperatures: their infrared files are not "
            "radiometric"
        )
    return bool(read or written)


def _serve(options: Options, folder: LabelFolder) -> int:
    try:
        import uvicorn

        from fusionsam.server.labelling.app import create_app
    except ImportError as missing:
        raise InputError(f'label: {missing.name} is not installed; pip install "fusionsam[label]"') from None
    from fusionsam.data.rigs import read_aligner
    from fusionsam.inference.device import choose_device
    from fusionsam.inference.interactive import InteractiveSAM
    from fusionsam.inference.interactive import locate as locate_sam
    from fusionsam.inference.predictor import FusionSAM
    from fusionsam.inference.temperatures import read_celsius
    from fusionsam.server.labelling.workspace import Workspace
    from fusionsam.server.run import bind
    from fusionsam.weights.checkpoint import locate

    aligner = read_aligner(options.align)
    locate(options.weights), locate_sam(options.sam)  # a wrong name is said before the port is taken
    bound = bind(options.host, options.port)
    device = choose_device(options.device)
    model = FusionSAM.from_pretrained(options.weights, device)
    sam = InteractiveSAM.from_pretrained(options.sam, device)
    workspace = Workspace(folder, model, sam, options.order, read_celsius, aligner)
    host, port = bound.getsockname()[:2]
    bound.listen(128)
    shown = f"[{host}]" if ":" in host else host
    print(f"fusionsam label: {len(folder.entries)} pairs, http://{shown}:{port}", flush=True)
    local = ipaddress.ip_address(host).is_loopback
    if not local:
        print(f"fusionsam label: {host} is open to others; whoever reaches it may draw", file=sys.stderr)
    app = create_app(workspace, ("127.0.0.1", "localhost") if local and ":" not in host else ("*",))
    config = uvicorn.Config(app, log_level="warning", ws="none", server_header=False)
    uvicorn.Server(config).run(sockets=[bound])
    done = sum(progress.done for progress in folder.progress.values())
    print(f"fusionsam label: stopped; {done} of {len(folder.entries)} pairs done", flush=True)
    return 0
