"""The command `fusionsam label`: label a folder of pairs in a browser."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from fusionsam.config.datasets import find
from fusionsam.data.labelling import coco
from fusionsam.data.labelling.folder import LabelFolder
from fusionsam.data.splits import pair_entries
from fusionsam.errors import InputError
from fusionsam.inference.interactive import SHIPPED
from fusionsam.inference.interactive import locate as locate_sam
from fusionsam.inference.temperatures import write_csv
from fusionsam.io import given_path
from fusionsam.weights.checkpoint import locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fusionsam label`."""
    add = parser.add_argument
    add("--visible", type=given_path, help="folder of visible pictures")
    add("--infrared", type=given_path, help="folder of infrared pictures, paired by name")
    add("--out", type=given_path, required=True, help="folder for labels; one that is there is gone on with")
    add("--classes", type=given_path, required=True, metavar="FILE", help="YAML with classes and palette")
    add("--order", choices=("name", "uncertainty"), default="name", help="which pairs come first (%(default)s)")
    add("--weights", default="tiny", help="our checkpoint: fused picture and first proposal (%(default)s)")
    add("--sam", default=SHIPPED, help="sam, or a SAM, SAM2 or MobileSAM of your own (%(default)s)")
    add("--who", default="", help="name in the log (the user of this machine)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=7861, help="port; 0 takes a free one (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    add("--export-coco", type=given_path, metavar="FILE", help="write the objects as a COCO file, and end")
    add("--import-coco", type=given_path, metavar="FILE", help="take the objects of a COCO file, and end")
    add("--export-temperatures", type=given_path, metavar="FILE", help="write every object's temperatures, and end")


def main(args: argparse.Namespace) -> int:
    """`fusionsam label`."""
    row = find("pairs", args.classes)
    if len(row.classes) < 2:
        raise InputError(
            f"{args.classes}: found {len(row.classes)} class; expected the background and at least one more"
        )
    entries = pair_entries(args.visible, args.infrared)
    if not entries:
        raise InputError(f"{args.visible or args.infrared}: holds no picture; give a folder of pairs")
    folder = LabelFolder(args.out, entries, row.classes, row.palette, args.who)
    if args.import_coco:
        count, pairs = coco.read(args.import_coco, folder)
        print(f"{count} objects of {pairs} pairs taken from {args.import_coco}")
    if args.export_coco:
        count = coco.write(args.export_coco, folder)
        print(f"{count} objects in {args.export_coco}")
    if args.export_temperatures:
        _temperatures(args.export_temperatures, folder)
    if args.import_coco or args.export_coco or args.export_temperatures:
        return 0
    return _serve(args, folder)


def read_celsius() -> Any:
    """The reader of radiometric files, None where this version has none."""
    if importlib.util.find_spec("fusionsam.data.radiometric") is None:
        return None
    module = importlib.import_module("fusionsam.data.radiometric")
    return getattr(module, "celsius_or_none", None)


def _temperatures(path: Path, folder: LabelFolder) -> None:
    from fusionsam.server.labelling.workspace import readings

    reader = read_celsius()
    if reader is None:
        raise InputError("--export-temperatures: this version reads no radiometric files")
    found = readings(folder, reader)
    write_csv(path, found)
    print(f"{len(found)} objects in {path}")


def _serve(args: argparse.Namespace, folder: LabelFolder) -> int:
    try:
        import uvicorn

        from fusionsam.server.labelling.app import create_app
    except ImportError as missing:
        raise InputError(f'label: {missing.name} is not installed; pip install "fusionsam[serve]"') from None
    from fusionsam.inference.interactive import InteractiveSAM
    from fusionsam.inference.predictor import FusionSAM, choose_device
    from fusionsam.server.labelling.workspace import Workspace
    from fusionsam.server.run import bind

    locate(args.weights), locate_sam(args.sam)  # a wrong name is said before the port is taken
    bound = bind(args.host, args.port)
    device = choose_device(args.device)
    model = FusionSAM.from_pretrained(args.weights, device)
    sam = InteractiveSAM.from_pretrained(args.sam, device)
    workspace = Workspace(folder, model, sam, args.order, read_celsius())
    host, port = bound.getsockname()[:2]
    bound.listen(128)
    shown = f"[{host}]" if ":" in host else host
    print(f"fusionsam label: {len(folder.entries)} pairs, http://{shown}:{port}", flush=True)
    config = uvicorn.Config(create_app(workspace), log_level="warning", ws="none", server_header=False)
    uvicorn.Server(config).run(sockets=[bound])
    done = sum(progress.done for progress in folder.progress.values())
    print(f"fusionsam label: stopped; {done} of {len(folder.entries)} pairs done", flush=True)
    return 0
