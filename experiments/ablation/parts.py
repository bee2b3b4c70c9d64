"""Changes to how the paper's parts work together, each as `fusionsam train` or `evaluate` with one thing changed.

    python experiments/ablation/parts.py apart train --config ... --train.out runs/apart
    python experiments/ablation/parts.py apart evaluate --weights runs/apart/final ...

none: nothing; the row that the others are held against.
apart: f_f's gradient reaches z_f at a tenth, so that segmentation decides what z_f is; FMP's positions begin at a
    random cell in training, since it learns on crops.
two_pass: SAM decodes twice. The classes that the first pass found come back as a dense prompt, the sum over the classes
    k of p_k e_k with embeddings e_k that begin at zero, beside SAM's own of the mask. The class logits of both passes
    have a loss; in a fifth of the steps there is one pass alone.
by_class: the mask head has a channel a class, taught by cross-entropy and Dice. SAM's mask prompt is the log-sum-exp
    of the foreground's channels less the background's.
drop_paths: in training the ways round FMP are closed now and then: infrared's backbone in a fifth of the steps, the
    encoder sees the visible picture in the place of the fused one in a fifth, the head's direct path is shut in a
    tenth.
mirrored: for configs/distill.yaml. The class maps that the teacher gives are the mean over the pair and its mirror
    image, turned back: what `evaluate --flip` gains is to be learned, so that one view is enough.

What is changed is here and not in the package: none of it ships unless it wins. Weights of `two_pass` and `by_class`
have other tensors, so they are evaluated by this script.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusionsam.models.fusion as fmp
from fusionsam.cli import options
from fusionsam.cli.main import main
from fusionsam.config.schema import ModelConfig
from fusionsam.io import write_text
from fusionsam.models.network import FusionSAMNetwork, Sources
from fusionsam.models.prompts import CELL
from fusionsam.training import distill_task
from fusionsam.training.losses import segmentation_loss
from fusionsam.training.segmentation_task import SegmentationTask
from fusionsam.types import Batch, Encoded, FirstPass, InputError, Output

FARTHEST = 80
"""Positions are moved by fewer cells than this, y and x each."""


def around(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of `owner.name`; it is given the one before as its first argument."""
    before = getattr(owner, name)

    def put(function: Callable[..., Any]) -> None:
        @wraps(before)
        def instead(*args: Any, **more: Any) -> Any:
            return function(before, *args, **more)

        setattr(owner, name, instead)

    return put


@contextmanager
def features_of(head: Any, instead: Callable[..., Any]) -> Iterator[None]:
    """Within the block `instead` gives the features that `head` sees of the encoder's levels."""
    head.features = instead  # before the method of its class
    try:
        yield
    finally:
        del head.features


def drawn(share: float) -> bool:
    """Whether something happens in this step of a training."""
    return torch.rand(()).item() < share


def apart() -> None:
    """Separate objectives in FMP."""

    @around(FusionSAMNetwork, "draw")
    def draw(before: Callable[..., tuple[Tensor, Tensor]], network: FusionSAMNetwork, seen: Sources) -> Any:
        picture, fused = before(network, seen)
        if network.training:  # drawn again for f_f alone
            fused = before(network, seen._replace(z_f=seen.z_f.lerp(seen.z_f.detach(), 0.9)))[1]
        return picture, fused

    @around(fmp, "sincos_positions")
    def positions(before: Callable[..., Tensor], height: int, width: int, dim: int, like: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return before(height, width, dim, like)
        y, x = torch.randint(FARTHEST, (2,)).tolist()
        return before(height + y, width + x, dim, like)[:, :, y:, x:]


def two_pass() -> None:
    """What the classes of a first pass tell SAM in a second."""

    @around(FusionSAMNetwork, "__init__")
    def init(before: Callable[..., None], network: FusionSAMNetwork, config: ModelConfig) -> None:
        before(network, config)
        # a table of FMP's: it learns at the rate of new parts, and does not decay
        network.fusion.by_class = table = nn.Embedding(len(config.classes), config.decoder.hidden)
        nn.init.zeros_(table.weight)

    @around(FusionSAMNetwork, "first_pass")
    def passes(before: Callable[..., FirstPass], network: Any, encoded: Encoded, *args: Any, **more: Any) -> FirstPass:
        network.passed = before(network, encoded, *args, **more)
        if network.training and drawn(0.2):
            return network.passed
        shares = network.passed.logits.detach().softmax(1)

        def told(_: nn.Module, given: tuple[Any, ...], found: tuple[Tensor | None, Tensor]) -> Any:
            classes = F.adaptive_avg_pool2d(shares, given[3])
            return found[0], found[1] + torch.einsum("bkhw,ke->behw", classes, network.fusion.by_class.weight)

        # the levels are the same in both passes, and cost the most
        with (
            network.prompt_encoder.register_forward_hook(told),
            features_of(network.head, lambda *_: network.passed.features),
        ):
            return before(network, encoded, *args, **more)

    @around(SegmentationTask, "losses")
    def losses(before: Callable[..., dict[str, Tensor]], task: Any, output: Output, batch: Batch) -> dict[str, Tensor]:
        terms = before(task, output, batch)
        if batch.label is not None:
            logits = F.interpolate(task.network.passed.logits, scale_factor=CELL, mode="bilinear")
            logits = logits[:, :, : batch.label.shape[1], : batch.label.shape[2]]
            terms["first"] = segmentation_loss(logits, batch.label, task.settings.loss, task.weights)
        return terms


class ByClass(nn.Module):
    """A mask head with a channel a class: (B,d,h,w) -> the mask prompt (B,1,h,w)."""

    def __init__(self, head: nn.Sequential, classes: int, foreground: list[int]) -> None:
        super().__init__()
        last = head[-1]
        assert isinstance(last, nn.Conv2d)
        self.layers = nn.Sequential(*head[:-1], nn.Conv2d(last.in_channels, classes, 1))
        self.foreground = foreground
        self.background = [number for number in range(classes) if number not in foreground]
        self.found: Tensor | None = None

    def forward(self, z_f: Tensor) -> Tensor:
        """As the mask head; the classes' logits (B,K,h,w) stay in `found`."""
        self.found = found = self.layers(z_f)
        one, rest = (found[:, ids].logsumexp(1, keepdim=True) for ids in (self.foreground, self.background))
        return one - rest


def by_class() -> None:
    """A mask head that knows classes."""

    @around(FusionSAMNetwork, "__init__")
    def init(before: Callable[..., None], network: FusionSAMNetwork, config: ModelConfig) -> None:
        before(network, config)
        with torch.random.fork_rng(devices=[]):  # what is drawn after it is drawn as without it
            network.fusion.mask_head = ByClass(network.fusion.mask_head, len(config.classes), config.foreground)  # type: ignore[assignment]

    @around(SegmentationTask, "losses")
    def losses(before: Callable[..., dict[str, Tensor]], task: Any, output: Output, batch: Batch) -> dict[str, Tensor]:
        terms = before(task, output, batch)
        if batch.label is not None:
            cells = batch.label[:, CELL // 2 :: CELL, CELL // 2 :: CELL]
            found = task.network.fusion.mask_head.found[:, :, : cells.shape[1], : cells.shape[2]]
            loss = task.settings.loss
            terms["prompt"] = loss.prompt_weight * segmentation_loss(found, cells, loss, task.weights)
        return terms


def drop_paths() -> None:
    """No way round FMP that is always open."""

    @around(FusionSAMNetwork, "look")
    def look(before: Callable[..., Encoded], network: Any, seen: Sources, picture: Tensor, fused: Tensor) -> Encoded:
        if not network.training:
            return before(network, seen, picture, fused)
        heat = None if drawn(0.2) else seen.pair.heat
        picture = seen.pair.shown if drawn(0.2) else picture
        return before(network, seen._replace(pair=seen.pair._replace(heat=heat)), picture, fused)

    @around(FusionSAMNetwork, "first_pass")
    def first_pass(before: Callable[..., FirstPass], network: Any, *args: Any, **more: Any) -> FirstPass:
        if not (network.training and drawn(0.1)):
            return before(network, *args, **more)
        features = network.head.features
        with features_of(network.head, lambda *given: torch.zeros_like(features(*given))):
            return before(network, *args, **more)


def mirrored() -> None:
    """A teacher of two views."""

    @around(distill_task.DistillTask, "__init__")
    def init(before: Callable[..., None], task: Any, network: Any, teacher: Any, *args: Any) -> None:
        before(task, network, teacher, *args)
        teacher.two_views = True

    @around(distill_task, "log_classes")
    def log_classes(before: Callable[..., Tensor], network: Any, seen: Sources, drawn: tuple[Tensor, Tensor]) -> Tensor:
        found = before(network, seen, drawn)
        if not getattr(network, "two_views", False):
            return found
        pair = seen.pair  # both cameras are there: stage distill refuses other pairs
        shown, heat = pair.shown.flip(-1), pair.heat.flip(-1)
        latents = network.tokenizer(shown, heat, None, None if pair.covered is None else pair.covered.flip(-1))
        turned = pair._replace(shown=shown, heat=heat, visible=pair.visible.flip(-1), infrared=pair.infrared.flip(-1))
        mirror = Sources(turned, latents, *network.fusion(latents.visible, latents.infrared))
        other = before(network, mirror, network.draw(mirror)).flip(-1)
        return torch.logaddexp(found, other) - math.log(2)


CHANGES: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "apart": apart,
    "two_pass": two_pass,
    "by_class": by_class,
    "drop_paths": drop_paths,
    "mirrored": mirrored,
}


CHANGE = "change.txt"
"""In train.out: a run that is resumed goes on as it began."""


def as_commanded(change: str, argv: list[str]) -> None:
    """The records hold the whole command, with the change. InputError for a stage that the change does not touch, and
    for a run that began with another change."""
    command = import_module(f"fusionsam.cli.{argv[0]}")
    whole = shlex.join(["python", "experiments/ablation/parts.py", change, *argv])

    @around(command if hasattr(command, "parse") else options, "parse")
    def parse(before: Callable[..., Any], *given: Any) -> Any:
        args = before(*given[:-1], whole)
        if argv[0] == "train":
            stage, wanted = args.settings.train.stage, "distill" if change == "mirrored" else "segmentation"
            if stage != wanted:
                raise InputError(f"{change}: changes stage {wanted}, but train.stage is {stage}")
            file = Path(args.settings.train.out) / CHANGE
            begun = file.read_text().strip() if args.resume and file.exists() else change
            if begun != change:
                raise InputError(f"{change}: the run in {file.parent} began with {begun}; go on with that")
            write_text(file, change)
        return args


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in CHANGES or sys.argv[2] not in ("train", "evaluate"):
        print(f"{__doc__}\nexpected one of {', '.join(CHANGES)}, then train or evaluate", file=sys.stderr)
        raise SystemExit(2)
    CHANGES[sys.argv[1]]()
    as_commanded(sys.argv[1], sys.argv[2:])
    raise SystemExit(main(sys.argv[2:]))
