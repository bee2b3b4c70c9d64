"""Evaluation of checkpoints, or of anybody's predicted label maps, on a split of a data set."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fusionsam.config.datasets import CATALOG, DatasetRow
from fusionsam.data.dataset import LabelledPairs, open_labelled_split
from fusionsam.data.label_faults import require_lossless
from fusionsam.data.notices import CHECK_TELLS, NoticeBook
from fusionsam.data.rigs import fit, open_aligner
from fusionsam.data.sequences import recording_sequences
from fusionsam.data.splits import Entry, tell_layout
from fusionsam.evaluation import report_files, worst_pairs
from fusionsam.evaluation.comparison import compare
from fusionsam.evaluation.leak_guard import LeakCheck, check_leaks, fitted_notes, fitted_on, training_lists
from fusionsam.evaluation.options import EvaluateConfig
from fusionsam.evaluation.published import SINCE, TEST_IMAGES
from fusionsam.evaluation.report import Report, aligned_by
from fusionsam.evaluation.report_parts import ORACLE
from fusionsam.evaluation.tally import Tally, scores, summarise
from fusionsam.inference.device import slower
from fusionsam.inference.label_maps import FolderPredictor, NetworkPredictor
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.views import require_scales
from fusionsam.io import commit, digest, progress_bar, require_writable
from fusionsam.metrics.segmentation import ImageMatrices
from fusionsam.types import FROM_TRUTH, InputError, JsonObject
from fusionsam.weights import checkpoint
from fusionsam.weights.checkpoint import Card


def evaluate(config: EvaluateConfig) -> Report:
    """Score weights or a folder of predictions on a split, and write the report into `config.out` if given.

    With several weights each has its report in a folder checkpoint_1, checkpoint_2, ... and the returned summary holds
    mean and deviation. Raises InputError for impossible options, unusable data or weights, splits that share pictures
    with the training split, and reports that must not be compared.

    >>> report = evaluate(EvaluateConfig("mfnet", "data/mfnet", "val", weights=["tiny"]))  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    _check(config)
    data = open_labelled(config)
    _require_modality(config.modality, data.entries)
    split = report_files.split_digest([entry.id for entry in data.entries])
    labels = report_files.labels_digest(data)
    out = None if config.out is None else Path(config.out)
    outs = [out] * len(config.weights)
    if out is not None and len(config.weights) > 1:
        outs = [out / f"checkpoint_{number}" for number in range(1, len(config.weights) + 1)]
    for place in dict.fromkeys([out, *outs]):
        if place is not None:
            report_files.require_split(place, config.dataset, split, labels)
    other = None
    if config.against is not None:
        other = report_files.read_comparable(config.against, config.dataset, split, data.row.classes)
    if config.predictions is not None:
        return _evaluate_folder(config, data, labels, other)
    cards = []
    for source in config.weights:  # all are judged before hours are spent on the first
        model_config, card = checkpoint.read_card(source)
        check_classes(model_config.classes, source, data.row)
        if config.prompts == "named" and not model_config.steering.width:
            raise InputError(
                f"prompts named: weights {source} have no steering, so no point can name a class; train it with "
                "configs/steering.yaml, or take --prompts oracle"
            )
        cards.append(card)
    _check_seeds(config, cards)
    guard = leak_guard(config, data.entries, cards)
    found: list[Report] = []
    for source, place in zip(config.weights, outs, strict=True):
        # one at a time: five of the largest would not fit
        model = FusionSAM.from_pretrained(
            source, config.device, calibrated=not config.as_trained, precision=config.precision
        )
        if line := slower(model.precision, model.device):
            tqdm.write(line, file=sys.stderr)
        options = (config.prompts, config.modality, config.flip, tuple(config.scales), config.seed)
        predictor = NetworkPredictor(model, *options)
        found.append(_run(config, data, labels, predictor, guard, place, other, source, model.card))
    if len(found) == 1:
        return found[0]
    report = summarise(found)
    report.title = _title(config, f"mean of {len(found)} checkpoints", report, None)
    if out is not None:
        report_files.write(out, report, None)
    return report


def _evaluate_folder(
    config: EvaluateConfig, data: LabelledPairs, labels: str, other: tuple[Report, ImageMatrices] | None
) -> Report:
    """Score label maps that somebody predicted."""
    assert config.predictions is not None
    folder = FolderPredictor(config.predictions, data, config.prediction_format, config.allow_partial)
    if folder.prompts == "oracle" and config.against is not None:
        raise InputError(
            f"{config.predictions}: were prompted by the ground truth (oracle); they are compared with no report, "
            "leave out --against"
        )
    cards = []
    if config.predicted_by is not None:
        cards.append(checkpoint.read_checkpoint(config.predicted_by)[2])
    _check_seeds(config, cards)
    guard = leak_guard(config, data.entries, cards)
    out = None if config.out is None else Path(config.out)
    return _run(config, data, labels, folder, guard, out, other, None, cards[0] if cards else {})


def open_labelled(config: EvaluateConfig) -> LabelledPairs:
    """The split to score on; InputError if the data set has no classes or a pair has no label."""
    data = open_labelled_split(config.dataset, config.root, config.split, config.class_file)
    tell_layout(config.dataset, config.root)
    require_lossless(data.entries)
    data.row = data.row.with_labels_map(config.mapped_ids)
    data.align = open_aligner(config.align, partial(fit, data.entries), refine=not config.no_refine)
    return data


def _require_modality(modality: str, entries: Sequence[Entry]) -> None:
    """InputError for a pair without the only image that is wanted, before hours are spent on those before it."""
    for entry in entries:
        alone = {"visible": entry.visible, "infrared": entry.infrared}
        if modality in alone and not (alone[modality] or entry.rgbt or entry.radiometric):
            raise InputError(
                f"{entry.id}: has no {modality} image, but --modality {modality} asks for it; leave it off the list"
            )


def _check(config: EvaluateConfig) -> None:
    if bool(config.weights) == (config.predictions is not None):
        raise InputError("evaluate: give either --weights or --predictions, one of them")
    needing = config.prompts or config.flip or config.as_trained or config.modality != "both" or config.align
    if config.predictions is not None and (needing or config.precision != "fp32"):
        raise InputError(
            "predictions: --prompts, --modality, --align, --as-trained, --flip and --precision need --weights; leave "
            "them out"
        )
    if not all(map(math.isfinite, config.scales)) or config.seed < 0:
        raise InputError(
            f"scales {list(config.scales)}, seed {config.seed}: expected finite factors and a seed of at least 0"
        )
    require_scales(config.scales)
    if config.predicted_by is not None and config.predictions is None:
        raise InputError("predicted-by: says which weights made --predictions; leave it out without them")
    if config.predictions is not None and list(config.scales) != [1.0]:
        raise InputError("predictions: --scales needs --weights; leave it out")
    if config.prompts in FROM_TRUTH and (config.flip or list(config.scales) != [1.0]):
        raise InputError(
            f"prompts {config.prompts}: are drawn for one scale without flip; leave out --scales and --flip"
        )
    if config.prompts in FROM_TRUTH and config.against is not None:
        raise InputError(
            f"prompts {config.prompts}: the ground truth was used, so no comparison is made; leave out --against"
        )
    if config.against is not None and len(config.weights) > 1:
        raise InputError("against: compares single reports; give one of the --weights")
    if config.seeds and len(config.weights) < 2:
        raise InputError(f"seeds: {len(config.weights)} weights; expected at least 2 checkpoints for a deviation")
    if config.worst < 0:
        raise InputError(f"worst: {config.worst} pairs; expected at least 1 (0 = none are drawn)")
    if config.bootstrap < 0 or (config.against is not None and config.bootstrap < 1):
        raise InputError(
            f"bootstrap: {config.bootstrap} draws; expected at least 1 (0 = no interval, without --against)"
        )
    if config.out is not None:
        require_writable(config.out)


def check_classes(classes: Sequence[str], source: str | Path, row: DatasetRow) -> None:
    """InputError unless the weights know the data set's classes, in its order."""
    if len(classes) != row.num_classes:
        raise InputError(
            f"weights {source}: {len(classes)} classes, data set {row.name} has {row.num_classes}; "
            "give weights trained for these classes, or the class file they were trained with"
        )
    for index, (ours, theirs) in enumerate(zip(classes, row.classes, strict=True)):
        if ours != theirs:
            raise InputError(
                f"weights {source}: class {index} is {ours!r}, in data set {row.name} it is {theirs!r}; "
                "give weights trained for these classes, or the class file they were trained with"
            )


def _check_seeds(config: EvaluateConfig, cards: Sequence[Card]) -> None:
    seeds = [card.get("seed") for card in cards]
    if config.seeds and (None in seeds or len(set(seeds)) < len(seeds)):
        raise InputError(f"seeds: the checkpoints record the seeds {seeds}; expected a different one each")


def leak_guard(
    config: EvaluateConfig, evaluated: Sequence[Entry], cards: Sequence[Card], folders: Sequence[Path] = ()
) -> LeakCheck:
    """`check_leaks` of the evaluated pairs with what the weights of `config`, of `cards` and in `folders` were trained
    on; its notes tell, too, where the pairs are read in another way than in that training."""
    off = config.train_split == "none"
    sources = [*config.weights, *([config.predicted_by] if config.predicted_by is not None else [])]
    folders = [*map(checkpoint.locate, sources), *folders]
    data = (config.dataset, config.root, config.train_split, config.class_file)
    guard = check_leaks(
        evaluated,
        config.split,
        [] if off else training_lists(cards, *data, folders),
        folders,
        off=off,
        wanted=config.train_split,
        known_weights=bool(cards),
        allowed=config.allow_train_test_leak_and_know_that_scores_are_worthless,
    )
    guard.notes += read_otherwise(config, cards)
    return guard


def read_otherwise(config: EvaluateConfig, cards: Sequence[Card]) -> list[str]:
    """What is read in another way than the weights of `cards` were trained with, in words: ids of labels, the rig."""
    told = []
    for card in cards:
        trained = (card.get("config") or {}).get("data") or {}
        mapped = {int(id): int(to) for id, to in (trained.get("labels_map") or {}).items()}
        if mapped and mapped != config.mapped_ids:
            was, now = (" ".join(f"{id}:{to}" for id, to in ids.items()) for ids in (mapped, config.mapped_ids))
            told.append(
                f"the weights were trained with --labels-map {was}, these labels were read "
                f"{f'with {now}' if now else 'without'}: give the same unless their ids mean something else"
            )
        if trained.get("align") and not config.align:
            told.append("the weights were trained on pairs that a rig aligned, these were read without --align")
    return list(dict.fromkeys(told))


def _run(
    config: EvaluateConfig,
    data: LabelledPairs,
    labels: str,
    predictor: NetworkPredictor | FolderPredictor,
    guard: LeakCheck,
    out: Path | None,
    other: tuple[Report, ImageMatrices] | None,
    weights: str | Path | None,
    card: Card,
) -> Report:
    started = time.perf_counter()
    absent = set(predictor.folder.missing) if isinstance(predictor, FolderPredictor) else set()
    todo = [index for index, entry in enumerate(data.entries) if entry.id not in absent]
    notices = NoticeBook()
    tally, prompts, counting = _count(config, data, predictor, todo, notices)
    sequences = recording_sequences(data.entries)
    figures = scores(tally, config.dataset, config.bootstrap, config.seed, sequences)
    fitted = fitted_on(card, guard.content)
    if weights is None:  # there is no confidence in label maps
        fitted["calibration"] = 0
    report = Report(
        **vars(figures),
        **_context(config, data, guard),
        labels_sha256=labels,
        **predictor.describe(),
        title="",
        prompts="named" if config.prompts == "named" else prompts,
        weights=None if weights is None else str(weights),
        weights_sha256=None if weights is None else digest(checkpoint.locate(weights) / checkpoint.WEIGHTS),
        calibrated=None if weights is None else checkpoint.calibrated_digest(card),
        fitted=fitted,
        seconds_counting=counting,
    )
    report.notes += fitted_notes(fitted, len(data.entries)) + notices.lines()
    whole = len(todo) == len(data.entries)
    official = config.split == "test" and whole and TEST_IMAGES.get(config.dataset) == len(todo)
    if official and not (report.oracle or guard.leaks or guard.off or report.relabelled):
        report.published = SINCE[config.dataset]
    name = str(weights if weights is not None else config.predictions)
    report.title = _title(config, name, report, None if whole else (len(todo), len(data.entries)))
    if other is not None:
        theirs, matrices = other
        report.against = compare(
            tally.images, matrices, report.classes, report.protocol, config.bootstrap, config.seed, theirs.title,
            sequences,
        )  # fmt: skip
        report.against.report = str(config.against)
    report.seconds = time.perf_counter() - started
    if out is not None:
        report_files.write(out, report, tally.images)
        if config.worst:
            worst_pairs.draw(predictor, data, tally.images, report.protocol, out / "worst", config.worst)
        else:
            worst_pairs.clear(out / "worst")
    return report


def _count(
    config: EvaluateConfig,
    data: LabelledPairs,
    predictor: NetworkPredictor | FolderPredictor,
    todo: Sequence[int],
    notices: NoticeBook,
) -> tuple[Tally, str | None, float]:
    """Predict and count the pairs at the places `todo`: the counts, what steered SAM, and the seconds of counting;
    what was guessed of their files goes into `notices`."""
    tally, used, counting = Tally(data.row.classes), set(), 0.0
    for index in progress_bar(todo, desc=f"evaluating {config.dataset}/{config.split}"):
        predicted = predictor(data, index)
        if predicted.sample is not None:
            notices.add(predicted.sample)
        before = time.perf_counter()
        tally.update(data.entries[index].id, predicted.ids, predicted.label, predicted.confidence)
        counting += time.perf_counter() - before
        if predicted.away is not None and predicted.own is not None:
            tally.update_away(predicted.ids, predicted.own, predicted.label, predicted.away)
        used.add(predicted.prompts)
    notices.close(CHECK_TELLS)
    return tally, next(iter(used)) if len(used) == 1 else "mixed", counting


def _context(config: EvaluateConfig, data: LabelledPairs, guard: LeakCheck) -> JsonObject:
    """What every report repeats of its options, by the fields of a Report."""
    return {
        "dataset": config.dataset,
        "split": config.split,
        "split_ids_sha256": report_files.split_digest([entry.id for entry in data.entries]),
        "split_images": len(data.entries),
        "labels_map": {str(was): now for was, now in sorted(data.row.labels_map.items())} or None,
        "other_classes": data.row.classes != (CATALOG[config.dataset].classes or data.row.classes),
        "as_trained": config.as_trained,
        "modality": config.modality,
        "flip": config.flip,
        "scales": list(config.scales),
        "precision": config.precision,
        "multi_scale": len(config.scales) > 1,
        "align": data.align and {"rig": data.align.rig.digest, "by": config.align, "refine": not config.no_refine},
        "leak_guard": guard.findings,
        "notes": list(guard.notes),
        "commit": commit(),
        "command": config.command,
    }


def _title(config: EvaluateConfig, name: str, report: Report, partial: tuple[int, int] | None) -> str:
    """What was scored and all that a reader must know before comparing the figure."""
    guard = report.leak_guard
    marks = [ORACLE] if report.oracle else []
    marks += [f"TRAIN-TEST LEAK ({guard.leaks} pictures were trained on)"] if guard.leaks else []
    marks += ["LEAK GUARD OFF (the training split was not compared)"] if guard.off else []
    marks += [f"PARTIAL ({partial[0]} of {partial[1]} images)"] if partial else []
    how = [f"prompts {report.prompts}" if report.prompts else f"predictions read as {report.prediction_format}"]
    how += report.relabelled
    how += [f"{config.modality} only"] if config.modality != "both" else []
    how += [f"scales {', '.join(f'{s:g}' for s in config.scales)}"] if list(config.scales) != [1.0] else []
    how += aligned_by(report.align)
    how += ["flip"] if config.flip else []
    how += [config.precision] if config.precision != "fp32" else []
    how += [f"{guard.look_alikes} pictures look like training pictures"] if guard.look_alikes else []
    how += ["class offsets fitted on these pairs"] if report.fitted["class_offsets"] else []
    how += ["as trained"] if config.as_trained else []
    score = "undefined" if report.miou is None else f"{report.miou:.2f}"
    what = f"{name} on {config.dataset}/{config.split}: mIoU {score} ({report.protocol})"
    return ": ".join([*marks, ", ".join([what, *how])])
