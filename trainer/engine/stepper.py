"""One optimiser step: gradients of its micro-batches, then the update."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from manifests.errors import DiffmixError
from trainer.data.batch import Batch
from trainer.data.hashing import words
from trainer.engine.checkpoint import Checkpoint
from trainer.engine.optim import Schedule, clip_gradients
from trainer.methods.base import Method, Progress


@dataclass(slots=True, kw_only=True)
class Stepper:
    """A method and its optimiser on this process's device.

    Every step seeds torch from (seed, step, rank), so that dropped paths need no state to be repeated; what should not
    depend on the number of ranks, such as masks, is drawn from `Progress.seed`.
    """

    accelerator: Accelerator
    method: Method
    optimiser: Optimizer
    schedule: Schedule
    seed: int
    _model: nn.Module = field(init=False)
    _prepared: Optimizer = field(init=False)  # steps through the fp16 scaler, where there is one

    def __post_init__(self) -> None:
        self._model, self._prepared = self.accelerator.prepare(self.method, self.optimiser)

    def gradients(self, batches: Sequence[Batch], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Accumulate the gradients of a step; returns loss and logs, detached, each the mean over micro-batches."""
        self.schedule.apply(self.optimiser, step)
        torch.manual_seed(int(words(self.seed, step, self.accelerator.process_index, count=1)[0] >> 1))
        losses, logs = [], []
        for number, batch in enumerate(batches, start=1):
            with contextlib.nullcontext() if number == len(batches) else self.accelerator.no_sync(self._model):
                output = self._model(batch.views, self._progress(step, number))
                self.accelerator.backward(output.loss / len(batches))
            losses.append(output.loss.detach())
            logs.append(output.logs)
        return torch.stack(losses).mean(), {name: torch.stack([one[name] for one in logs]).mean() for name in logs[0]}

    def update(self, step: int) -> dict[str, Tensor]:
        """Apply the accumulated gradients; returns what the method logs of it."""
        progress = self._progress(step)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self._prepared)
        self.method.before_update(progress)
        norm = clip_gradients(self.method.parameters(), self.schedule.config)
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)
        logs = {} if norm is None else {"gradient_norm": norm}
        return logs | self.method.after_step(progress)

    def collapse(self, logs: dict[str, float], step: int) -> str | None:
        """Why these logs look like a collapse to the method."""
        return self.method.collapse(logs, self._progress(step))

    def restore(self, saved: Checkpoint) -> None:
        """Take weights, statistics and the optimiser's state; `DiffmixError` if they are of another network."""
        try:
            self.method.load_state_dict(saved.method)
            self.optimiser.load_state_dict(saved.optimiser)
        except (RuntimeError, ValueError, KeyError) as error:
            raise DiffmixError(
                f"the checkpoint of step {saved.step} is of another method, encoder or optimiser: {error}; go on with "
                "the settings of its run, or take only its encoder with --init"
            ) from error
        if saved.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.scaler)

    def _progress(self, step: int, micro: int = 0) -> Progress:
        schedule = self.schedule
        return Progress(
            step=step,
            total_steps=schedule.total_steps,
            steps_per_epoch=schedule.steps_per_epoch,
            seed=int(words(self.seed, step, -1 - micro, count=1)[0] >> 1),
            batch_size=schedule.batch_size,
        )
