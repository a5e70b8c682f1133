"""The training loop: steps, metrics, probes and checkpoints until the last step, a signal, a collapse or a failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from manifests.errors import DiffmixError
from trainer.data.batch import Batch
from trainer.data.loader import Loader
from trainer.engine import checkpoint
from trainer.engine.checkpoint import Checkpoint, cursor_at
from trainer.engine.feed import Feed
from trainer.engine.meter import Meter
from trainer.engine.progress import ProgressLine, line_of
from trainer.engine.recording import track
from trainer.engine.run_folder import OFFENDERS, Metrics, RunFolder
from trainer.engine.signals import StopRequest
from trainer.engine.stepper import Stepper
from trainer.engine.watch import Verdict, Watch
from trainer.nn.collectives import gather_objects, together, world_size

_PATIENCE = 5  # loggings in a row that look collapsed
_DIVERGED = "lower optim.lr or set optim.clip, and look at those images"

Values = dict[str, float | int]
Probe = Callable[[], Values]  # an evaluation of the encoder of now; FloatingPointError if its features are not finite


class CollapsedError(DiffmixError):
    """Training diverged (NaN) or collapsed (all images look alike to the encoder)."""

    exit_code = 4
    of_all = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often what happens, in steps; 0 is never but at the end."""

    log: int
    checkpoint: int
    keep: int  # newest checkpoints
    probe: int | frozenset[int]  # a set: after these very steps


@dataclass(kw_only=True)
class Loop:
    """A run's moving parts. `metrics` is None on ranks that write nothing."""

    stepper: Stepper
    loader: Loader
    folder: RunFolder
    line: ProgressLine
    pace: Pace
    batch_size: int  # of one step over all ranks
    accumulation: int
    fingerprint: str
    probe: Probe
    metrics: Metrics | None
    meter: Meter = field(default_factory=Meter)
    step: int = 0  # optimiser steps done
    first: Values = field(default_factory=dict)  # what the probe saw before training
    latest: Values = field(default_factory=dict)  # the newest of every value that was logged
    _suspicions: int = 0

    def __post_init__(self) -> None:
        self.total_steps = self.stepper.schedule.total_steps
        self._watch = Watch(self.stepper.accelerator.device)
        self._feed = Feed(self.loader, self.accumulation)

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint; the loader must stand at its cursor."""
        self.stepper.restore(saved)
        self.step, self.meter = saved.step, Meter(saved.seconds)
        self.first, self.latest, self._suspicions = dict(saved.first), dict(saved.latest), saved.suspicions

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step; False if a signal stopped it before, with a checkpoint of where it was.

        Raises `CollapsedError` on NaN or collapse, and on all ranks alike the `DiffmixError` of one that cannot read an
        image or write; checkpoints written before stay.
        """
        if self.step == 0:
            self._evaluate(np.empty(0, np.int64))
        self.meter.start()
        while self.step < self.total_steps:
            stopping = self._one(self._feed.next(), stop)
            if stopping or self._is_due(self.pace.checkpoint):
                together(self._save)
            if stopping and self.step < self.total_steps:
                return False
        self.meter.pause()
        return True

    def _one(self, batches: list[Batch], stop: StopRequest) -> bool:
        """One step; True if a rank was asked to stop."""
        items = _items(batches)
        loss, logs = self.stepper.gradients(batches, self.step)
        verdicts = self._watch.look(self.step, items, loss, stop=bool(stop), failed=self._feed.has_failed)
        stopping = self._heed(verdicts)
        logs |= self.stepper.update(self.step)
        self.step += 1
        self.meter.count()
        logging = self.step == 1 or self._is_due(self.pace.log)
        looking = self._is_due(self.pace.checkpoint) or self._is_due(self.pace.probe)
        if logging or looking or stopping:
            stopping |= self._heed(self._watch.drain())
        if logging:
            self._log(loss, logs, items)
        if looking or stopping:
            self._check_weights(items)
        if self._is_due(self.pace.probe):
            self._evaluate(items)
        return stopping

    def _is_due(self, every: int | frozenset[int]) -> bool:
        if isinstance(every, frozenset):
            return self.step == self.total_steps or self.step in every
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def _heed(self, verdicts: Sequence[Verdict]) -> bool:
        """Whether a rank was asked to stop; raises if one has failed or its loss was not finite."""
        for verdict in verdicts:
            if verdict.failed:
                together(self._feed.check)
            if verdict.diverged:
                reason = f"the loss of step {verdict.step + 1} is not finite"
                self._give_up(reason, verdict.step + 1, verdict.items, _DIVERGED)
        return any(verdict.stop for verdict in verdicts)

    def _check_weights(self, items: NDArray[np.int64]) -> None:
        """Weights that are not finite are neither saved nor evaluated; the loss would tell only one step later."""
        values = [value for value in self.stepper.method.state_dict().values() if value.is_floating_point()]
        worst = torch.stack([norm.float() for norm in torch._foreach_norm(values, float("inf"))])
        broken = (~worst.isfinite()).any().float()
        if world_size() > 1:
            dist.all_reduce(broken, op=dist.ReduceOp.MAX)
        if broken:
            self._give_up(f"the weights are not finite after step {self.step}", self.step, items, _DIVERGED)

    def _log(self, loss: Tensor, logs: dict[str, Tensor], items: NDArray[np.int64]) -> None:
        names = ["loss", *logs]
        means = self._mean(torch.stack([loss.float(), *(value.detach().float() for value in logs.values())]))
        rate, waited = self.meter.read(self.batch_size, self.loader.wait_seconds)
        values: Values = {"step": self.step, "epoch": self._epoch, **dict(zip(names, means, strict=True))}
        values |= {"lr": self.stepper.schedule.lr(self.step - 1), "images_per_second": rate, "data_wait": waited}
        self._record(values)
        left = (self.total_steps - self.step) * self.batch_size / max(rate, 1e-9)
        self.line.show(line_of(values, self.total_steps, left), force=self.step in (1, self.total_steps))
        self._suspect(self.stepper.collapse(dict(zip(names, means, strict=True)), self.step), items)

    def _mean(self, values: Tensor) -> list[float]:
        if world_size() > 1:
            dist.all_reduce(values)
            values = values / world_size()
        return values.tolist()

    def _suspect(self, reason: str | None, items: NDArray[np.int64]) -> None:
        self._suspicions = self._suspicions + 1 if reason else 0
        if reason and self._suspicions >= _PATIENCE:
            self._give_up(reason, self.step, items, "see `about` of the recipe for settings that are known to work")

    def _give_up(self, reason: str, step: int, items: NDArray[np.int64], advice: str) -> NoReturn:
        epoch = max(0, step - 1) // self.stepper.schedule.steps_per_epoch
        own = together(lambda: self.loader.keys(items, epoch))
        keys = [key for of_rank in gather_objects(own) for key in of_rank]
        together(lambda: self._tell_offenders({"reason": reason, "step": step, "keys": keys}))
        raise CollapsedError(f"{reason}; the batch's keys are in {self.folder.path / OFFENDERS}. Next: {advice}")

    def _tell_offenders(self, facts: dict[str, object]) -> None:
        if self.metrics is not None:
            self.folder.write_json(OFFENDERS, facts)

    def _evaluate(self, items: NDArray[np.int64]) -> None:
        self.meter.pause()
        try:
            values = self.probe()
        except FloatingPointError as error:  # equal on all ranks, as the features are
            self._give_up(f"{error} after step {self.step}", self.step, items, _DIVERGED)
        self.first = self.first or values
        if values:
            self._record({"step": self.step, "epoch": self._epoch, **values})
            self.line.say(line_of({"step": self.step, "epoch": self._epoch, **values}, self.total_steps))
        self.meter.start()

    def _record(self, values: Values) -> None:
        values = {**values, "total_steps": self.total_steps}
        self.latest |= values
        if self.metrics is None:
            return
        with self._feed.postponed():
            self.metrics.write(values)
            track(self.stepper.accelerator, values, self.step)

    def _save(self) -> None:
        self._feed.check()
        if self.metrics is None:
            return
        self.meter.pause()
        accelerator = self.stepper.accelerator
        saved = Checkpoint(
            step=self.step,
            cursor=cursor_at(self.step, self.stepper.schedule.steps_per_epoch, self.batch_size),
            method=self.stepper.method.state_dict(),
            optimiser=self.stepper.optimiser.state_dict(),
            scaler=None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            data=self.fingerprint,
            seconds=self.meter.seconds,
            first=self.first,
            latest=self.latest,
            suspicions=self._suspicions,
        )
        checkpoint.save(self.folder.checkpoints, saved, self.pace.keep)
        self.meter.start()

    @property
    def _epoch(self) -> int:
        return self.step // self.stepper.schedule.steps_per_epoch


def _items(batches: Sequence[Batch]) -> NDArray[np.int64]:
    return np.concatenate([batch.items for batch in batches])
