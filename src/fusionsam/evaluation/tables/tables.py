"""The tables of `fusionsam report`: the paper's four, the published rows beside ours, and those it does not have.

Reports whose prompts the ground truth drew stand in tables of their own, without any other row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from fusionsam.config.schema import Config, from_dict, to_dict
from fusionsam.evaluation.published import SINCE, published
from fusionsam.evaluation.report import Report
from fusionsam.evaluation.report_parts import shared_mean
from fusionsam.evaluation.tables.formats import Row, Table, drop_empty
from fusionsam.evaluation.tables.sources import VARIANTS, Scored
from fusionsam.metrics.fusion import LOWER_IS_BETTER, METRICS
from fusionsam.types import InputError, JsonObject

NONE = "-"
PUBLISHED_GROUP = "published: as printed in the paper, official test split"
SINCE_GROUP = "published: others, official test split"
NAMES = {"mfnet": "MFNet", "fmb": "FMB", "msrs": "MSRS", "pst900": "PST900"}
_PART_OF_BUDGET = {"data": ("root", "workers"), "train": ("out", "seed", "validate_every", "checkpoint_minutes")}


def _cell(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _notes(row: JsonObject, dataset: str | None = None) -> tuple[str, ...]:
    keys = [key for key in row.get("notes", ()) if not (key == "eight" and dataset == "mfnet")]
    return tuple(published()["notes"][key] for key in keys)


def _spread(report: Report) -> str:
    """The 95 % interval over images, or the deviation over checkpoints."""
    if report.miou_deviation is not None:
        return f"± {report.miou_deviation:.2f} over {len(report.checkpoints or ())} checkpoints"
    low, high = report.interval or (None, None)
    return NONE if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _labels(found: Sequence[Scored]) -> list[str]:
    """A label for each report; where two rows would read alike, with the report's folder."""
    alike = [(one.label, one.group, one.report.modality, one.report.prompts) for one in found]
    count = Counter(alike)
    return [
        f"{one.label} ({one.path.parent})" if count[key] > 1 else one.label
        for one, key in zip(found, alike, strict=True)
    ]


def _by_group(found: Sequence[Scored]) -> list[Scored]:
    """Official test splits first, then split by split, each in its order."""
    groups = list(dict.fromkeys(one.group for one in sorted(found, key=lambda one: not one.official)))
    return sorted(found, key=lambda one: groups.index(one.group))


def per_class(name: str, title: str, dataset: str, found: Sequence[Scored], beside_published: bool = True) -> Table:
    """IoU of every class and mIoU, one row a report; the paper's rows and later ones above them where there are any.

    Where reports have different classes in their mean, a column has the mean over the classes that all have. Columns
    that would be empty throughout (day, night, interval) are left out, and so are protocols that say nothing the
    headline does not."""
    paper = published().get(dataset) if beside_published else None
    classes = list(dict.fromkeys([*(paper["classes"] if paper else ()), *(c for s in found for c in s.report.classes)]))
    named = list(dict.fromkeys(p for s in found for p in s.report.protocols))
    others = [p for p in named if any(_protocol(s, p) not in (NONE, _cell(s.report.miou)) for s in found)]
    shared = shared_mean([(s.report.counted, s.report.per_class_iou) for s in found])
    over = [] if shared is None else shared[0]
    tail = (
        "95 % interval", f"mIoU of {len(over)} classes", *(f"mIoU {p}" for p in others), "day (present)",
        "night (present)",
    )  # fmt: skip
    columns = ("method", "source", "modality", "prompts", *classes, "mIoU", "protocol", *tail)
    rows = _published_rows(dataset, classes, over, len(tail)) if paper else []
    found = _by_group(found)
    for one, label in zip(found, _labels(found), strict=True):
        r, times = one.report, one.report.by_time or {}
        head = (label, "this evaluation", r.modality or NONE, r.prompts or NONE)
        scores = [_cell(r.per_class_iou.get(c)) for c in classes]
        last = [_mean_over(r.per_class_iou, over), *(_protocol(one, p) for p in others)]
        last += [_cell(times[t].miou) if t in times else NONE for t in ("day", "night")]
        rows.append(Row(one.group, (*head, *scores, _cell(r.miou), r.protocol, _spread(r), *last)))
    notes = [paper["note"]] if paper else []
    notes += [f"mIoU of {len(over)} classes: those that every report has, {', '.join(over)}."] if over else []
    return drop_empty(Table(name, title, columns, rows, notes), tail)


def _published_rows(dataset: str, classes: Sequence[str], over: Sequence[str], tail: int) -> list[Row]:
    """The paper's rows of `per_class` and those of later methods; `over` are the classes of the shared mean."""
    paper, rows = published()[dataset], []
    for row in paper["rows"]:
        ratios = dict(zip(paper["classes"], row["iou"], strict=True))
        cells = [_cell(ratios.get(c), 1) for c in classes] + [_cell(row["miou"], 1), paper["protocol"]]
        last = [NONE, _mean_over(ratios, over, 1), *[NONE] * (tail - 2)]
        head = (row["method"], "published", "both", NONE)
        rows.append(Row(PUBLISHED_GROUP, (*head, *cells, *last), _notes(row, dataset)))
    for later in SINCE[dataset]:
        cells = [NONE] * len(classes) + [_cell(later.miou, 1), later.protocol]
        rows.append(Row(SINCE_GROUP, (later.method, "published", "both", NONE, *cells, *[NONE] * tail)))
    return rows


def _mean_over(ratios: Mapping[str, float | None], over: Sequence[str], digits: int = 2) -> str:
    """Mean over the classes `over`; a dash where there are none, or one of them is not told."""
    values = [value for name in over if (value := ratios.get(name)) is not None]
    return _cell(sum(values) / len(values), digits) if over and len(values) == len(over) else NONE


def _protocol(one: Scored, name: str) -> str:
    score = one.report.protocols.get(name)
    return NONE if score is None else _cell(score.miou)


def _two_sets(found: Sequence[Scored]) -> list[str]:
    return list(dict.fromkeys(["mfnet", "fmb", *(one.report.dataset for one in found)]))


def _mious(by_set: Mapping[str, float | None], sets: Sequence[str], digits: int) -> list[str]:
    return [_cell(by_set.get(name), digits) for name in sets]


def _plain(one: Scored) -> bool:
    """One of our networks, seeing both images once at full size."""
    r = one.report
    marks = (r.inference, r.baseline, r.peer, r.modality != "both")
    return bool(r.weights) and not any(marks)


def _budget(config: JsonObject) -> tuple[str, str, str]:
    """What all runs of one ablation share: a key, where their LSTG came from (of which (A) has none), and in words."""
    with suppress(InputError):  # settings that are newer than a run count as they were then
        config = to_dict(from_dict(Config, dict(config), "report"))
    kept: JsonObject = json.loads(json.dumps(config))
    for section, names in _PART_OF_BUDGET.items():
        for name in names:
            kept.get(section, {}).pop(name, None)
    model, train = kept.get("model") or {}, config.get("train") or {}
    (model.get("tokenizer") or {}).pop("tokens", None)
    (model.get("fusion") or {}).pop("kind", None)
    lstg = [model.pop("tokenizer_weights", None), kept.get("train", {}).pop("freeze_tokenizer", False)]
    steps = f"{train['max_steps']} steps" if train.get("max_steps") else f"{train.get('epochs')} epochs"
    return json.dumps(kept, sort_keys=True), json.dumps(lstg), f"{steps} of {train.get('batch_size')} pairs"


def ablation(found: Sequence[Scored]) -> Table:
    """Table 2: (A), (B), (C) and LSTG-continuous. Rows share a group only if their runs differ in nothing but the part
    taken away; a group without any ablated run is left out."""
    groups: dict[tuple[str, ...], list[Scored]] = {}
    pixels: list[tuple[tuple[str, ...], Scored]] = []
    for one in found:
        if _plain(one) and one.variant and one.config is not None:
            r = one.report
            shared, lstg, words = _budget(one.config)
            key: tuple[str, ...] = (r.dataset, r.split_ids_sha256, one.group, str(r.prompts), words, shared)
            if one.variant == "A":
                pixels.append((key, one))
            else:
                groups.setdefault((*key, lstg), []).append(one)
    for key, one in pixels:
        for home in [group for group in groups if group[:-1] == key] or [(*key, "")]:
            groups.setdefault(home, []).append(one)
    groups = {key: members for key, members in groups.items() if any(one.variant != "C" for one in members)}
    sets = _two_sets([one for members in groups.values() for one in members])
    columns = ("variant", "source", *(NAMES.get(name, name) for name in sets), "95 % interval", "prompts", "weights")
    rows = []
    for row in published()["ablation"]:
        cells = (VARIANTS[row["variant"]], "published", *_mious(row["miou"], sets, 1), NONE, NONE, NONE)
        rows.append(Row(PUBLISHED_GROUP, cells, _notes(row)))
    order = list(VARIANTS)
    for number, ((dataset, _, group, prompts, words, *_), members) in enumerate(groups.items(), 1):
        heading = f"{group}; {NAMES.get(dataset, dataset)}, one budget: {words}"
        heading += f" (settings {number})" if len(groups) > 1 else ""
        for one in sorted(members, key=lambda one: order.index(one.variant or "other")):
            scores = _mious({dataset: one.report.miou}, sets, 2)
            cells = (
                VARIANTS[one.variant or "other"],
                "this evaluation",
                *scores,
                _spread(one.report),
                prompts,
                one.label,
            )
            rows.append(Row(heading, cells))
    return Table("table2_ablation", "Table 2: ablation, mIoU in percent", columns, rows)


def against_sam(found: Sequence[Scored]) -> Table:
    """Table 4: unmodified SAM and SAM2 beside ours."""
    chosen = [one for one in found if one.report.baseline is not None or (_plain(one) and one.variant in ("C", None))]
    sets = _two_sets(chosen)
    chosen = sorted(_by_group(chosen), key=lambda one: sets.index(one.report.dataset))
    columns = ("method", "source", "SAM sees", "prompts", *(NAMES.get(n, n) for n in sets), "95 % interval", "protocol")
    rows = []
    for row in published()["sam"]:
        cells = (row["method"], "published", row["image"], NONE, *_mious(row["miou"], sets, 1), NONE, "not stated")
        rows.append(Row(PUBLISHED_GROUP, cells, _notes(row)))
    for one, label in zip(chosen, _labels(chosen), strict=True):
        r = one.report
        image = r.baseline.image if r.baseline is not None else "fused"
        scores = _mious({r.dataset: r.miou}, sets, 2)
        cells = (label, "this evaluation", image, r.prompts or NONE, *scores, _spread(r), r.protocol)
        rows.append(Row(f"{NAMES.get(r.dataset, r.dataset)}, {one.group}", cells))
    return Table("table4_sam", "Table 4: SAM, SAM2 and ours, mIoU in percent", columns, rows)


def fusion_quality(found: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Table:
    """The eleven fusion metrics, a group for each set of pictures; 'inf' where a mean is infinite."""
    columns = ("method", "images", *(f"{m} (lower is better)" if m in LOWER_IS_BETTER else m for m in METRICS))
    rows = []
    for name, methods in found.items():
        for method, scores in methods.items():
            values = ("inf" if (value := scores[m]) is None else f"{value:.4f}" for m in METRICS)
            rows.append(Row(name, (method, f"{scores.get('images') or 0:.0f}", *values)))
    # fusion-metrics writes a fusion_metrics.csv itself, perhaps into the same folder
    return Table("fusion_quality", "Fusion quality, means over images", columns, rows)


def build(found: Sequence[Scored], fusion: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[Table]:
    """Tables 1 to 4, one for each further data set, fusion metrics, and the upper bounds by themselves."""
    honest = [one for one in found if not one.oracle]
    networks = [one for one in honest if one.report.baseline is None]

    def of(dataset: str, among: Sequence[Scored]) -> list[Scored]:
        return [one for one in among if one.report.dataset == dataset]

    where = "IoU and mIoU in percent"
    tables = [
        per_class("table1_mfnet", f"Table 1: MFNet, {where}", "mfnet", of("mfnet", networks)),
        ablation(honest),
        per_class("table3_fmb", f"Table 3: FMB, {where}", "fmb", of("fmb", networks)),
        against_sam(honest),
    ]
    for dataset in sorted({one.report.dataset for one in networks} - {"mfnet", "fmb"}):
        title = f"{NAMES.get(dataset, dataset)}, {where}"
        tables.append(per_class(f"table_{dataset}", title, dataset, of(dataset, networks)))
    if fusion:
        tables.append(fusion_quality(fusion))
    oracle = [one for one in found if one.oracle]
    for dataset in sorted({one.report.dataset for one in oracle}):
        title = f"UPPER BOUND, {NAMES.get(dataset, dataset)}: prompts drawn from the ground truth, {where}"
        table = per_class(f"upper_bound_{dataset}", title, dataset, of(dataset, oracle), beside_published=False)
        table.notes.append("The ground truth was used. No row may be held against one of another table.")
        tables.append(table)
    return tables
