"""Fine-tune the mask decoder of the weights `sam` by simulated clicks on visible, infrared and fused pictures.

    python experiments/sam_clicks/tune.py cache --root ../shared/data/mfnet417 --cache out/sam_cache --bfloat16
    python experiments/sam_clicks/tune.py train --root ../shared/data/mfnet417 --cache out/sam_cache --out out/sam
    python experiments/sam_clicks/tune.py mix --root ../shared/data/mfnet417 --cache out/sam_cache --out out/sam

`cache` encodes pictures of training pairs once, 2 MB each; it can be stopped and begun again. `train` writes
`end.safetensors`: encoders stay as they are, most of the mask decoder learns. The clicks are those of `fusionsam
clicks`, and each answer is scored at the picture's own size. `mix` measures weights between start and end on training
pairs that were set aside (the last of the draw), objects of classes left out among them, and writes the best share as
`model.safetensors`; the fingerprints of all these pairs lie beside it, by which `clicks` refuses them; it takes the
--seed, --min-pixels, --aside and --leave-out of train. The weights `sam` began as MobileSAM's (`--start`);
`checkpoints/sam/training.json` tells how. What came out is measured by `fusionsam clicks --sam
out/sam/model.safetensors`, and `compare.py` sets that against the weights before.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from compare import require_classes
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionsam.data.dataset import LabelledPairs, open_labelled_split
from fusionsam.data.fingerprints import Fingerprints, fingerprint
from fusionsam.data.infrared_styles import draw_style
from fusionsam.data.splits import Entry
from fusionsam.data.transforms import to_unit
from fusionsam.evaluation.clicks import files_digest, user
from fusionsam.inference.interactive import InteractivePair, InteractiveSAM, Picture, locate
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.segment_anything import Encoded, PlainSam
from fusionsam.io import Made, OutputFolder, commit, digest, progress_bar, require_writable, whole, write_json
from fusionsam.metrics.interaction import (
    Bools,
    Click,
    box_of,
    clicks_needed,
    iou,
    iou_after,
    next_click,
    objects,
    simulate,
)
from fusionsam.training.losses import dice_loss, focal_loss
from fusionsam.types import IGNORE, InputError
from fusionsam.weights.checkpoint import WEIGHTS
from fusionsam.weights.checkpoint import locate as locate_weights
from fusionsam.weights.pretrained import with_prompted_parts

FOCAL = 20.0  # times the Dice term, as Kirillov et al. 2023 (arXiv 2304.02643, appendix A)
TARGET = 0.80
ON = ("visible", "infrared", "fused")
CACHE = "cache.json"
"""In the folder of encoded pictures: what they were made with."""


class Case(NamedTuple):
    """One object on one picture."""

    file: Path
    on: Picture
    class_id: int
    mask: Bools
    valid: Bools


def drawn(data: LabelledPairs, min_pixels: int, seed: int) -> list[int]:
    """Pairs with an object, in the order of a draw by the seed."""
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    return [index for index in order if objects(data.label(index).numpy(), min_pixels)]


def cache(given: argparse.Namespace) -> None:
    """The fused picture of each pair, and by turns its visible or its infrared one; every second pair shows its
    infrared picture in a drawn style."""
    data = open_labelled_split("mfnet", given.root, "train")
    model, sam = FusionSAM.from_pretrained(given.weights, "cpu"), InteractiveSAM.from_pretrained(given.start)
    require_writable(given.cache)
    made = OutputFolder(given.cache, "tune.py cache", "choose another --cache")
    told = {
        "weights_sha256": digest(locate_weights(given.weights) / WEIGHTS),
        "start_sha256": digest(Path(locate(given.start))),
        "seed": given.seed,
        "min_pixels": given.min_pixels,
        "bfloat16": given.bfloat16,
        "files_sha256": files_digest(data),
    }
    stored = made.read(CACHE)
    made.state(CACHE, None if stored is None else Made(stored), Made(told), [CACHE])
    write_json(made / CACHE, told)
    todo = drawn(data, given.min_pixels, given.seed)[: given.pairs]
    for place, index in enumerate(progress_bar(todo, desc="encode", unit="pair")):
        file = given.cache / f"{data.entries[index].id}.safetensors"
        if file.exists():
            continue
        sample = data[index]
        assert sample.visible is not None
        assert sample.infrared is not None
        infrared = sample.infrared
        if place % 2:
            infrared = draw_style(to_unit(infrared), torch.Generator().manual_seed(given.seed * 100_003 + index))
        second = "visible" if place // 2 % 2 else "infrared"
        pictures = {
            "fused": model.predict(sample.visible, infrared).fused,
            second: sample.visible if second == "visible" else infrared,
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
            found = {on: sam.encode(picture).embeddings[0].half().contiguous() for on, picture in pictures.items()}
        with whole(file, "choose another --cache") as part:
            save_file(found, part)


def seen(entries: Sequence[Entry], start: Path) -> Fingerprints:
    """Fingerprints of the pairs, and of what the SAM at `start` had learned from."""
    found = fingerprint("cache", entries)
    found.extend(Fingerprints.together([start.parent]) or Fingerprints())
    return found


def cases(given: argparse.Namespace) -> tuple[list[Case], list[Case], Sequence[str]]:
    """Objects to learn from and those set aside, on the pictures that the cache holds; the classes."""
    data = open_labelled_split("mfnet", given.root, "train")
    require_classes(given.leave_out, data.row.classes)
    told = OutputFolder(given.cache, "tune.py cache", "run tune.py cache first").read(CACHE)
    if told is None or told["start_sha256"] != digest(Path(locate(given.start))):
        raise InputError(f"{given.cache}: was not made by tune.py cache with --start {given.start}; make it first")
    files = [
        (index, given.cache / f"{data.entries[index].id}.safetensors")
        for index in drawn(data, given.min_pixels, given.seed)
    ]
    there = [(index, file) for index, file in files if file.exists()]
    found: list[list[Case]] = []
    for index, file in there:
        label = data.label(index).numpy()
        pictures = sorted(load_file(file))
        ones = objects(label, given.min_pixels)
        found.append([Case(file, on, one.class_id, one.mask, label != IGNORE) for on in pictures for one in ones])  # type: ignore[arg-type]
    aside = max(1, round(len(found) * given.aside))
    if len(found) <= aside:
        raise InputError(f"{given.cache}: holds {len(found)} pairs of the training split; cache more than {aside}")
    return (
        [case for pair in found[:-aside] for case in pair],
        [case for pair in found[-aside:] for case in pair],
        data.row.classes,
    )


def embedded(sam: PlainSam, case: Case) -> Encoded:
    height, width = case.mask.shape
    return Encoded([load_file(case.file)[case.on].float()], sam.placer.frame(height, width), (height, width))


def terms(
    sam: PlainSam, encoded: Encoded, logits: Tensor, scores: Tensor, wanted: Sequence[Bools], valid: Bools
) -> tuple[list[Tensor], list[Tensor], list[Bools]]:
    """For each mask of an answer (N,h,w) the loss of its shape and of its score, and the mask itself."""
    shapes, misjudged, masks = [], [], []
    for one, score, truth in zip(sam.full(logits.float()[:, None], encoded), scores, wanted, strict=True):
        target = torch.from_numpy(np.where(valid, truth, IGNORE).astype(np.int64))[None]
        pair = torch.stack([torch.zeros_like(one), one], 1)
        shapes.append(FOCAL * focal_loss(pair, target, None) + 2 * dice_loss(pair, target))
        masks.append(one[0].detach().numpy() > 0)
        misjudged.append((score.float() - iou(masks[-1], truth, valid)) ** 2)
    return shapes, misjudged, masks


def learn(sam: PlainSam, case: Case, rng: np.random.Generator, given: argparse.Namespace, share: float) -> list[float]:
    """Clicks at one object; gradients of every answer, times `share`, are added up. IoU after each."""
    encoded = embedded(sam, case)
    clicks: list[Click] = []
    ious: list[float] = []
    box = None
    if rng.random() < given.boxes:
        rows, columns = np.nonzero(box_of(case.mask))
        box = torch.tensor([columns.min(), rows.min(), columns.max(), rows.max()]).float()
        box = (box + torch.from_numpy(rng.normal(0, 2, 4)).float()).clamp(min=0)
    mask, previous = np.zeros_like(case.mask), None
    while len(ious) < given.clicks and (len(ious) < 2 or ious[-1] < given.enough):
        if box is None or ious:
            click = next_click(mask, case.mask, case.valid, clicks)
            if click is None:
                break
            clicks.append(click)
        points = torch.tensor([[c.x, c.y] for c in clicks]).float() if clicks else None
        labels = torch.tensor([int(c.on) for c in clicks]) if clicks else None
        with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
            logits, scores = sam.decode(encoded, points, labels, box, previous, previous is None)
        shapes, misjudged, masks = terms(sam, encoded, logits, scores, [case.mask] * len(logits), case.valid)
        # of three masks the best one learns its shape, all of them learn their score
        ((torch.stack(shapes).min() + torch.stack(misjudged).mean()) * share).backward()
        best = int(scores.argmax())
        mask, previous = masks[best], logits[best].detach().float()
        ious.append(iou(mask, case.mask, case.valid))
    return ious


def stay(
    sam: PlainSam, start: PlainSam, case: Case, rng: np.random.Generator, given: argparse.Namespace, share: float
) -> None:
    """A click anywhere: the masks and scores of the start stay the answer, whatever lies there."""
    encoded = embedded(sam, case)
    height, width = encoded.size
    points, labels = torch.tensor([[rng.integers(width), rng.integers(height)]]).float(), torch.ones(1)
    with torch.no_grad():
        old, wanted_scores = start.decode(encoded, points, labels)
        wanted = [one[0].numpy() > 0 for one in start.full(old[:, None], encoded)]
    with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
        logits, scores = sam.decode(encoded, points, labels)
    shapes, _, _ = terms(sam, encoded, logits, scores, wanted, np.ones_like(wanted[0]))
    changed = (scores.float() - wanted_scores) ** 2
    ((torch.stack(shapes).mean() + changed.mean()) * share).backward()


def opened(start: str) -> PlainSam:
    """The weights to begin with."""
    sam = PlainSam.open(locate(start))
    wide = sam.model.get_image_wide_positional_embeddings().detach()  # always the same
    sam.model.get_image_wide_positional_embeddings = lambda: wide
    return sam


def learning(sam: PlainSam) -> list[torch.nn.Parameter]:
    """What learns: the mask decoder from the second layer of its transformer on. Tokens, prompt encoder and the first
    layer stay: gradients need not pass them, which spares two fifths of a step, and clicks keep their meaning."""
    sam.model.requires_grad_(False)
    stay = ("iou_token", "mask_tokens", "transformer.layers.0.")
    named = sam.model.mask_decoder.named_parameters()
    return [p.requires_grad_(True) for n, p in named if not n.startswith(stay)]


def with_learned(sam: PlainSam, start: str) -> dict[str, Tensor]:
    """The tensors of the start's file, with what was learned."""
    parts = (sam.model.prompt_encoder.state_dict(), sam.model.mask_decoder.state_dict())
    return with_prompted_parts(locate(start), *parts)


def write(sam: PlainSam, start: str, path: Path) -> None:
    """A file like that of the start, with what was learned."""
    with whole(path) as part:
        save_file(with_learned(sam, start), part, metadata={"format": "pt"})


def train(given: argparse.Namespace) -> None:
    torch.manual_seed(given.seed)
    rng = np.random.default_rng(given.seed)
    started = time.perf_counter()
    chosen, aside, classes = cases(given)
    ids = {case.file.stem for case in (*chosen, *aside)}
    chosen = [case for case in chosen if classes[case.class_id] not in given.leave_out]
    if not chosen:
        raise InputError(f"--leave-out {' '.join(given.leave_out)}: leaves no object; leave out fewer classes")
    if (given.out / "steps.jsonl").exists():
        raise InputError(f"{given.out}: holds a training already; choose another --out, or remove it")
    sam, start = opened(given.start), opened(given.start)
    with_learned(sam, given.start)  # a start in a form that cannot be written is told now
    weights = learning(sam)
    optimizer = torch.optim.AdamW(weights, given.lr, weight_decay=given.decay)
    require_writable(given.out)
    print(f"{len(chosen)} objects on pictures, {sum(p.numel() for p in weights):,} numbers learn")
    order: list[int] = []
    with (given.out / "steps.jsonl").open("w") as lines:
        for step in progress_bar(range(given.steps), desc="tune", unit="step"):
            now = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / given.steps))
            for group in optimizer.param_groups:
                group["lr"] = given.lr * now
            reached = []
            for _ in range(given.objects):
                order = order or rng.permutation(len(chosen)).tolist()
                case = chosen[order.pop()]
                if rng.random() < given.keep:
                    stay(sam, start, case, rng, given, 1 / given.objects)
                    continue
                ious = learn(sam, case, rng, given, 0.5 / given.objects)
                reached.append({"on": case.on, "class": classes[case.class_id], "ious": [round(v, 4) for v in ious]})
            norm = float(torch.nn.utils.clip_grad_norm_(weights, given.clip))
            optimizer.step()
            optimizer.zero_grad()
            lines.write(json.dumps({"step": step, "norm": norm, "objects": reached}) + "\n")
            lines.flush()
            if step % 25 == 24 or step + 1 == given.steps:
                write(sam, given.start, given.out / "end.safetensors")
    facts = {
        "settings": {name: value for name, value in vars(given).items() if name not in ("root", "cache", "out")},
        "objects": len(chosen),
        "pairs": len({case.file for case in chosen}),
        "sam_sha256": digest(Path(locate(given.start))),
        "hours": (time.perf_counter() - started) / 3600,
        "commit": commit(),
    }
    data = open_labelled_split("mfnet", given.root, "train")
    seen([entry for entry in data.entries if entry.id in ids], Path(locate(given.start))).write(given.out)
    write_json(given.out / "training.json", facts)


class Cached(InteractivePair):
    """A pair whose embedding is at hand."""

    def __init__(self, sam: InteractiveSAM, encoded: Encoded) -> None:
        self.sam, self._at_hand = sam, encoded

    def encoded(self, on: Picture) -> Encoded:
        """It, whatever picture it is of."""
        return self._at_hand


def require_same(given: argparse.Namespace) -> None:
    """InputError unless `given` sets the pairs and classes aside that the training did not see."""
    told = OutputFolder(given.out, "tune.py train", "run tune.py train first").read("training.json")
    if told is None or not (given.out / "end.safetensors").is_file():
        raise InputError(f"{given.out}: has no training.json and end.safetensors; run tune.py train to its end first")
    trained = told.get("settings") or {}
    for name in ("seed", "min_pixels", "aside", "leave_out"):
        if trained.get(name) != getattr(given, name):
            flag = f"--{name.replace('_', '-')} {getattr(given, name)}"
            raise InputError(f"{flag}: {given.out} was trained with {trained.get(name)}; give mix the same")


def mix(given: argparse.Namespace) -> None:
    """Weights between start and end, by the clicks they need on the pairs set aside."""
    require_same(given)
    _, aside, classes = cases(given)
    aside = [case for case in aside if case.on in given.on]
    if not aside:
        raise InputError(f"--on {' '.join(given.on)}: the pairs set aside have no such picture; expected {ON}")
    end = PlainSam.open(given.out / "end.safetensors").model
    rows = []
    for share in given.shares:
        sam = opened(given.start)
        for part in ("prompt_encoder", "mask_decoder"):
            theirs = getattr(end, part).state_dict()
            ours = getattr(sam.model, part)
            ours.load_state_dict({name: torch.lerp(t, theirs[name], share) for name, t in ours.state_dict().items()})
        asked = InteractiveSAM(sam)
        figures: dict[str, list[tuple[float, float, float]]] = {}
        for case in progress_bar(aside, desc=f"share {share:g}", unit="object"):
            ask = user(Cached(asked, embedded(sam, case)), case.on, case.mask, case.valid, "score")
            ious = simulate(ask, case.mask, case.valid, given.most, TARGET, 3)
            seen = "left out" if classes[case.class_id] in given.leave_out else "trained"
            row = (float(clicks_needed(ious, TARGET, given.most)[0]), iou_after(ious, 1), iou_after(ious, 3))
            for name in (seen, case.on, "all"):
                figures.setdefault(name, []).append(row)
        found = {name: [len(values), *np.mean(values, 0).round(4).tolist()] for name, values in sorted(figures.items())}
        rows.append({"share": share, "objects, NoC@80, IoU after 1 and 3": found})
        print(json.dumps(rows[-1]))
        write(sam, given.start, given.out / f"share_{share:g}.safetensors")
    write_json(given.out / "mix.json", rows)
    best = min(rows, key=lambda row: row["objects, NoC@80, IoU after 1 and 3"]["all"][1])["share"]
    (given.out / f"share_{best:g}.safetensors").replace(given.out / "model.safetensors")
    print(f"share {best:g}: {given.out / 'model.safetensors'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cache", "train", "mix"])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder of encoded pictures")
    parser.add_argument("--out", type=Path, help="of train and mix")
    parser.add_argument("--weights", default="tiny", help="fuse the pictures")
    parser.add_argument("--start", default="sam", help="weights to begin with, a SAM or MobileSAM file")
    parser.add_argument("--pairs", type=int, help="to encode; all unless given")
    parser.add_argument("--min-pixels", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors that have it")
    parser.add_argument("--aside", type=float, default=0.1, help="share of the encoded pairs that mix alone sees")
    parser.add_argument("--leave-out", nargs="*", default=[], help="classes whose objects are not clicked at")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--objects", type=int, default=4, help="a step")
    parser.add_argument("--clicks", type=int, default=4, help="at an object, at most")
    parser.add_argument("--enough", type=float, default=0.88, help="IoU after which no more clicks follow")
    parser.add_argument("--boxes", type=float, default=0.1, help="share of objects where a box comes first")
    parser.add_argument("--keep", type=float, default=0.15, help="probability of a click anywhere")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--on", nargs="+", choices=ON, default=ON, help="pictures that mix clicks on")
    parser.add_argument("--most", type=int, default=10, help="clicks of mix on an object")
    given = parser.parse_args()
    if given.out is None and given.what != "cache":
        raise InputError(f"{given.what}: needs --out, a folder")
    {"cache": cache, "train": train, "mix": mix}[given.what](given)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
