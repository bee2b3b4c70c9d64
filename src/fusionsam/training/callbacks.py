"""What watches a training: the best weights, checkpoints to resume from, one codebook on all devices."""

from __future__ import annotations

import json
import math
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fusionsam.data.fingerprints import Fingerprints
from fusionsam.io import LineProgress, digest, said, say, whole, whole_folder, write_json, write_text
from fusionsam.training.task import Task
from fusionsam.types import Batch, InputError, JsonObject
from fusionsam.weights.checkpoint import CALIBRATED, CARD, WEIGHTS, read_card, save_checkpoint

LAST = "last.ckpt"
HISTORY = "history.jsonl"


class WholeFiles(TorchCheckpointIO):
    """Resumable checkpoints that are never half written: a kill leaves the one before."""

    def save_checkpoint(self, checkpoint: JsonObject, path: str | Path, storage_options: object = None) -> None:
        """Write beside `path`, then rename. InputError where that fails."""
        # RuntimeError is torch's for a full disk
        with whole(path, "make room there, then go on with --resume", also=(RuntimeError,)) as part:
            super().save_checkpoint(checkpoint, part, storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> JsonObject:
        """InputError for a file that is no checkpoint."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{path}: cannot be resumed from ({said(error)}); start again with another train.out"
            ) from None


def _keep_calibration(before: Path, now: Path) -> None:
    """What `calibrate` stored in the checkpoint `before` goes into `now` where the weights are the same, as of a
    finished run that is resumed; of other weights it is dropped, and that is said."""
    try:
        fitted = {key: value for key, value in read_card(before)[1].items() if key in CALIBRATED}
    except InputError:  # there is none
        return
    if fitted and digest(before / WEIGHTS) == digest(now / WEIGHTS):
        write_json(now / CARD, {**json.loads((now / CARD).read_text(encoding="utf-8")), **fitted})
    elif fitted:
        say(f"{before}: has other weights now, so what calibrate fitted to the former ones is gone; calibrate again")


def short(value: torch.Tensor | float) -> float:
    """A figure of the history: three decimals, or three digits of what is below a tenth."""
    number = float(value)
    return round(number, 3) if abs(number) >= 0.1 else float(f"{number:.3g}")


class BestWeights(Callback):
    """Keeps the weights of the best validation as a checkpoint folder, ready for predict and evaluate; the hours this
    run has had over all its sessions; and last.ckpt, at every validation and every `minutes` between (Lightning's
    ModelCheckpoint does not look at the clock where a task steps its optimisers itself, as stage 1 does)."""

    def __init__(
        self, folder: Path, card: JsonObject, seen: Fingerprints, pairs: str, minutes: float, inside: str = ""
    ) -> None:
        self.inside = inside  # the part of the card that is of this run, "" = all of it
        self.folder, self.card, self.seen, self.pairs, self.minutes = folder, card, seen, pairs, minutes
        self.saved = time.monotonic()
        self.best = -math.inf
        self.validated = -1  # step of the latest validation
        self.seconds = 0.0
        self.started = time.monotonic()
        self.devices = 1

    def elapsed(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return self.seconds + time.monotonic() - self.started

    def state_dict(self) -> JsonObject:
        """What a resumed run needs to go on comparing."""
        return {
            "best": self.best,
            "validated": self.validated,
            "seconds": self.elapsed(),
            "pairs": self.pairs,
            "devices": self.devices,
        }

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """How many devices there are, which `auto` does not tell. InputError for a damaged history: now, not at the
        first validation."""
        self.devices = trainer.world_size
        self._history()

    def load_state_dict(self, state_dict: JsonObject) -> None:
        """Continue from an interrupted run. InputError if the training pairs are no longer those it began with."""
        if state_dict.get("pairs", self.pairs) != self.pairs:
            raise InputError(
                "data.root, data.extra_pairs, data.extra_labels: the pairs (images, labels, their order, or the "
                f"validation list) are not those that {self.folder} began with, so the run cannot go on to the same "
                "numbers; restore them, or give another train.out"
            )
        begun = state_dict.get("devices", self.devices)
        if begun != self.devices:  # the pairs of a step hang on them
            raise InputError(
                f"train.devices: {self.devices} in all, but {self.folder} began with {begun}, so the run cannot go on "
                "to the same numbers; give as many, or another train.out"
            )
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]
        self.validated = state_dict.get("validated", -1)
        self.started = time.monotonic()

    def save(self, trainer: L.Trainer, task: Task[Any], folder: Path) -> None:
        """Write the evaluated network with its validation figures."""
        scores = {k: short(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        told = {"step": trainer.global_step, "hours": round(self.elapsed() / 3600, 3), "val": scores}
        card = {**self.card, self.inside: {**self.card[self.inside], **told}} if self.inside else {**self.card, **told}
        with whole_folder(folder) as part:  # never the weights of one step with the figures of another
            save_checkpoint(part, task.evaluated(), card)
            _keep_calibration(folder, part)
            self.seen.write(part)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the network if it is the best so far, a line of history, and a checkpoint to resume from."""
        if trainer.sanity_checking:
            return
        self.validated = trainer.global_step
        if trainer.is_global_zero:
            assert isinstance(pl_module, Task)
            self._write_line(trainer)
            score = float(trainer.callback_metrics[pl_module.monitor])
            if score > self.best:
                self.best = score
                self.save(trainer, pl_module, self.folder / "best")
        self._save_last(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """A checkpoint to resume from if it is time, by the first device's clock. Not at a step that is validated next:
        a run resumed from there would miss that validation, and after it one is written anyhow."""
        if trainer.global_step % int(trainer.val_check_interval) == 0:  # in steps, see train()
            return
        if trainer.strategy.broadcast(time.monotonic() - self.saved >= 60 * self.minutes):
            self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)  # every device takes part
        self.saved = time.monotonic()

    def _write_line(self, trainer: L.Trainer) -> None:
        """Append to history.jsonl; lines from this step on are of a session that was killed after its checkpoint."""
        line = {"step": trainer.global_step, "hours": self.elapsed() / 3600}
        line |= {k: short(v) for k, v in trainer.callback_metrics.items() if not k.startswith("lr")}
        lines = [kept for step, kept in self._history() if step < trainer.global_step]
        remedy = "make room there, then go on with --resume"
        write_text(self.folder / HISTORY, "\n".join([*lines, json.dumps(line)]) + "\n", remedy)

    def _history(self) -> list[tuple[int, str]]:
        """Steps and lines of history.jsonl without empty ones. InputError for a line without a step."""
        file, found = self.folder / HISTORY, []
        for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else [], 1):
            if not line.strip():
                continue
            try:
                found.append((int(json.loads(line)["step"]), line.decode()))
            except (ValueError, TypeError, KeyError, OverflowError):
                raise InputError(
                    f"{file}: line {number} is damaged; expected JSON with a step; mend or delete the line, then go on "
                    "with --resume"
                ) from None
        return found


class SameOnAllDevices(Callback):
    """The first device's codebooks for all. Each learns from its own pairs and outside of autograd, so that Lightning's
    averaging of gradients leaves them apart; in stage 1, whose optimisers the task steps itself, it sends no buffers,
    either. What is spread over the first batch (k-means, fsq) are parameters, so these follow once."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Send the first device's tensors to the others."""
        if trainer.world_size == 1:
            return
        learnt = [*pl_module.parameters()] if batch_idx == 0 else []
        with torch.no_grad():
            for tensor in (*pl_module.buffers(), *learnt):
                torch.distributed.broadcast(tensor, 0)


class _Lines(LineProgress, Tqdm):
    """Lightning's numbers on lines of a log."""


class StepLines(TQDMProgressBar):
    """One line a minute for the steps, nothing for a validation."""

    def init_train_tqdm(self) -> Tqdm:
        """The bar of the steps."""
        return _Lines(desc=self.train_description, dynamic_ncols=False, file=sys.stderr)

    def init_validation_tqdm(self) -> Tqdm:
        """No bar."""
        return _Lines(desc=self.validation_description, disable=True)

    init_sanity_tqdm = init_validation_tqdm


def step_bar(steps: int) -> TQDMProgressBar:
    """The progress of a training: redrawn in a terminal, a line a minute elsewhere."""
    rate = 1 if steps < 200 else 10
    return TQDMProgressBar(rate) if sys.stderr.isatty() else StepLines(rate)
