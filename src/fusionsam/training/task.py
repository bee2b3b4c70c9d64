"""What both stages of training share: the moving average of the weights, a random state for each step, batches that
move by their own method. Lightning runs a task; a task knows no file and no command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import PARAM_LIST, AveragedModel

from fusionsam.config.schema import Config, TrainConfig
from fusionsam.types import Batch, InputError

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def schedule_factor(step: int, total: int, config: TrainConfig) -> float:
    """Factor on the learning rate at `step` of `total`: linear warm-up, then cosine, poly (0.9) or constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    if config.schedule == "cosine":
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())
    return (1 - done) ** 0.9 if config.schedule == "poly" else 1.0


def moving_average(decay: float) -> Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None]:
    """The update of an AveragedModel: averaged <- decay * averaged + (1 - decay) * current."""

    def average(averaged: PARAM_LIST, current: PARAM_LIST, count: Tensor | int) -> None:
        # early on a young average follows quickly, or the first weights would haunt short runs
        weight = 1 - min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averaged, current, weight)

    return average


def require_finite(loss: Tensor, step: int, config: TrainConfig) -> None:
    """InputError for a loss that is no number: every weight would be none after it. Of float16 the scaler leaves such a
    step out."""
    if not config.precision.startswith("16") and not bool(loss.isfinite()):
        raise InputError(
            f"train: the loss is {float(loss.detach())} at step {step}, so the training diverged; lower train.lr or a "
            "loss's weight, and start again with another train.out"
        )


class Task(L.LightningModule, Generic[NetworkT]):
    """A network under training, with the moving average of its weights, which is what is validated and saved.

    `monitor` names the figure of a validation by which the best weights are chosen; larger is better.
    """

    monitor: ClassVar[str]

    def __init__(self, network: NetworkT, config: Config) -> None:
        super().__init__()
        self.network, self.settings = network, config
        self.average: AveragedModel | None = None
        if config.train.ema_decay > 0:
            self.average = AveragedModel(
                network, multi_avg_fn=moving_average(config.train.ema_decay), use_buffers=False
            )
            self.average.requires_grad_(False)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Every part's gradients by their own norm: on a dark or flat pair that of the fused picture's loss is up to a
        hundred times the encoder's, and one norm over all would leave the other parts no step to learn from it."""
        if gradient_clip_val:
            own = [part for name, part in self.named_children() if name not in ("network", "average")]
            for part in (*self.network.children(), *own):
                nn.utils.clip_grad_norm_(part.parameters(), gradient_clip_val)

    def evaluated(self) -> NetworkT:
        """The network that is validated and shipped: the moving average where there is one."""
        return self.network if self.average is None else self.average.module  # type: ignore[return-value]

    def total(self, terms: dict[str, Tensor], pairs: int) -> Tensor:
        """The sum of a step's named losses over `pairs`, logged with each of them; InputError where it is no number."""
        total = torch.stack(list(terms.values())).sum()
        require_finite(total, self.global_step, self.settings.train)
        self.log_dict({f"loss/{k}": v.detach() for k, v in terms.items()}, batch_size=pairs)
        # the mean over the devices; of the terms each may have others, and would wait for ever
        self.log("loss/total", total.detach(), prog_bar=True, batch_size=pairs, sync_dist=True)
        return total

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Every step has a random state of its own, so that a resumed run draws what an unbroken one would have."""
        torch.manual_seed(self.settings.train.seed * 1_000_003 + self.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The moving average follows here, not in on_train_batch_end: checkpoints are written before that hook. (A task
        that steps its optimisers itself never comes here.)"""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches move by their own method."""
        return batch.to(device)
