"""A checkpoint as a repository of the Hugging Face hub: model.safetensors, config.json, training.json, a model card."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError

from fusionsam.config.schema import ModelConfig
from fusionsam.io import digest, require_writable, write_json, write_text
from fusionsam.types import FROM_TRUTH, InputError, JsonObject
from fusionsam.weights.checkpoint import (
    CALIBRATED,
    CONFIG,
    HUB_CONFIG,
    WEIGHTS,
    Card,
    calibrated_digest,
    locate,
    read_card,
)
from fusionsam.weights.hub import LICENSE, refused, split_name
from fusionsam.weights.ship import ship

TASK = "image-segmentation"
REMEDY = "choose another folder"


def write_repository(
    source: str | Path, folder: str | Path, name: str, reports: Sequence[str | Path] = (), license: str = LICENSE
) -> Path:
    """What `push` uploads, into `folder`: the checkpoint as it ships (float16, no paths of this machine), config.json
    and the model card README.md.

    Args:
        source: Checkpoint folder or shipped name.
        folder: Made where it is not there; it must be empty.
        name: owner/name, which the card shows in its example.
        reports: report.json files of `fusionsam evaluate`, whose figures go into the card.
        license: As the hub abbreviates it.

    Raises:
        InputError: `folder` holds files, the checkpoint cannot be read, a report is of other weights, was prompted by
            the ground truth, or scores pictures that were trained on or that no training list was compared with.
    """
    folder = Path(folder)
    require_writable(folder)
    if found := sorted(path.name for path in folder.iterdir()):
        raise InputError(f"{folder}: holds {found[0]} already; give an empty folder")
    rows = [row for report in reports for row in _figures(Path(report), source)]
    rows = rows or _validation(read_card(source)[1])  # what ships tells nothing of the data set
    ship(source, folder)
    config, card = read_card(folder)
    write_json(folder / HUB_CONFIG, asdict(config), REMEDY)
    (folder / CONFIG).unlink()
    written = locate(source) / "README.md"
    body = written.read_text(encoding="utf-8") if written.is_file() else _body(name, config, card, rows)
    write_text(folder / "README.md", _card(name, config, rows, body, license), REMEDY)
    return folder


def push(
    source: str | Path,
    repository: str,
    *,
    reports: Sequence[str | Path] = (),
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a FusionSAM checkpoint",
    license: str = LICENSE,
) -> str:
    """Upload a checkpoint into `repository` (owner/name), which is made where it is not there; its address.

    `private` is for a new repository; `token` is one of `hf auth login` unless given. The rest is as in
    `write_repository`. InputError as there, for a bad name, and for what the hub refuses.
    """
    name, revision = split_name(repository)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="fusionsam-") as part:
        folder = write_repository(source, Path(part) / "repository", name, reports, license)
        try:
            api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=revision)
        except (HFValidationError, HTTPError, OSError) as error:
            raise refused(f"repository {repository}", error) from None
    return f"{api.endpoint}/{name}"


def _figures(report: Path, source: str | Path) -> list[EvalResult]:
    """mIoU, and that of day and night, of a report.json; InputError unless it is of the weights `source` and honest."""
    own, calibrated = digest(locate(source) / WEIGHTS), calibrated_digest(read_card(source)[1])
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        data, split, protocol, of = (found[key] for key in ("dataset", "split", "protocol", "weights_sha256"))
        means = {"mIoU": found["miou"]}
        means |= {f"mIoU, {time}": scores["miou"] for time, scores in (found.get("by_time") or {}).items()}
        how, guard = _how(found), found.get("leak_guard") or {}
        faults = {
            "its prompts were drawn from the ground truth": found.get("prompts") in FROM_TRUTH,
            f"it scores {guard.get('leaks')} pictures that were trained on": guard.get("leaks"),
            "no training list was compared with its pictures": guard.get("off"),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"report {report}: is no report.json of fusionsam evaluate ({type(error).__name__}: {str(error)[:80]})"
        ) from None
    if of != own:
        raise InputError(f"report {report}: is of other weights than {source}; evaluate these, and give that report")
    if not found.get("as_trained") and found.get("calibrated", calibrated) != calibrated:
        raise InputError(
            f"report {report}: is of other offsets and temperature than calibrate stored in {source}; evaluate again, "
            "and give that report"
        )
    for fault, is_so in faults.items():
        if is_so:
            raise InputError(f"report {report}: {fault}, which is no figure of a model card; give another report")
    return [
        _figure(data, split, protocol, ", ".join([label, *how]), mean)
        for label, mean in means.items()
        if mean is not None
    ]


def _how(report: JsonObject) -> list[str]:
    """What was different from one view of both images as the data set has them, in words."""
    modality, scales = report.get("modality") or "both", report.get("scales") or [1.0]
    told = [f"{modality} only"] if modality != "both" else []
    told += ["flip"] if report.get("flip") else []
    told += ["scales " + " ".join(f"{scale:g}" for scale in scales)] if scales != [1.0] else []
    told += [report["precision"]] if report.get("precision", "fp32") != "fp32" else []
    align = report.get("align") or {}
    told += ["aligned" if align.get("refine", True) else "aligned without refinement"] if align else []
    told += ["prompts none"] if report.get("prompts") == "none" else []
    told += ["as trained"] if report.get("as_trained") else []
    told += ["label ids mapped"] if report.get("labels_map") else []
    told += ["classes of a class file"] if report.get("other_classes") else []
    fitted = (report.get("fitted") or {}).get("class_offsets")
    return told + (["class offsets fitted on these pairs"] if fitted else [])


def _validation(card: Card) -> list[EvalResult]:
    """The figure that training left in the card."""
    val = card.get("val") or {}
    if "miou" in val:
        data, _, split = str(val.get("split", "")).rpartition("/")
        return [_figure(data, split, val.get("protocol"), "mIoU", val["miou"])]
    if "val/miou" not in val:  # a stage without labels
        return []
    used = (card.get("config") or {}).get("data") or {}
    label = "mIoU, as trained" if any(card.get(key) for key in CALIBRATED) else "mIoU"
    return [_figure(used.get("dataset", ""), used.get("val_split", "val"), None, label, val["val/miou"])]


def _figure(data: str, split: str, protocol: str | None, label: str, mean: float) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=data or "unknown",
        dataset_name=data or "unknown",
        dataset_split=split,
        metric_type="mean_iou",
        metric_name=f"{label}, percent" + (f" ({protocol})" if protocol else ""),
        metric_value=round(float(mean), 2),
    )


def _card(name: str, config: ModelConfig, rows: list[EvalResult], body: str, license: str) -> str:
    data = ModelCardData(
        library_name="fusionsam",
        license=license,
        pipeline_tag=TASK,
        tags=["fusionsam", "semantic-segmentation", "image-fusion", "thermal", "infrared", config.preset],
        model_name=name.partition("/")[2],
        eval_results=rows or None,
    )
    text = re.sub(r"\A---\n.*?\n---\n", "", body, flags=re.DOTALL)  # the body's own metadata, of another repository
    return f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}"


def _body(name: str, config: ModelConfig, card: Card, rows: list[EvalResult]) -> str:
    """A card's text for a checkpoint that has none of its own: use, figures, origin."""
    lines = [f"# {name.partition('/')[2]}", ""]
    lines += ["A FusionSAM checkpoint: a visible and a thermal image become one picture and a class for every pixel."]
    lines += ["", "```python", "from fusionsam import FusionSAM", ""]
    lines += [f'model = FusionSAM.from_pretrained("{name}")', 'out = model.predict("visible.png", "infrared.png")']
    lines += ["```", "", f"Classes: {', '.join(config.classes)}.", ""]
    if rows:
        lines += ["| data | split | measure | value |", "|---|---|---|---|"]
        lines += [f"| {r.dataset_name} | {r.dataset_split} | {r.metric_name} | {r.metric_value} |" for r in rows]
        lines.append("")
    for key in ("command", "commit", "seed", "step", "hours"):
        if key in card:
            lines.append(f"- {key}: `{card[key]}`")
    return "\n".join([*lines, ""])
