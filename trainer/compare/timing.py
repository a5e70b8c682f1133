"""What one training step of an arm takes, its real loader included."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer import parts
from trainer.compare.arms import Arm
from trainer.config import PretrainConfig
from trainer.data.order import micro_batch_size
from trainer.engine.feed import Feed
from trainer.engine.launch import make_accelerator
from trainer.engine.stepper import Stepper
from trainer.methods.base import Method, Progress
from trainer.nn.collectives import gather_objects, together
from trainer.pretrain import precision_of

_WARMUP_STEPS = 5  # the loader works three micro-batches ahead: those are made by then
_CHUNK = 5  # steps that are timed together
_LEAST_CHUNKS, _MOST_CHUNKS, _SECONDS = 3, 12, 6.0  # more than the least where steps are short
_STEPS = _WARMUP_STEPS + _MOST_CHUNKS * _CHUNK


def clock(device: torch.device) -> str:
    """What is counted: other programs on the machine take no processor time of ours, and leave a GPU alone."""
    return "wall time" if device.type == "cuda" else "processor time"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step, `first` and, from step `later_from(total_steps)` of a run on, `later`."""

    first: float
    later: float
    later_from: Callable[[int], int]

    def seconds(self, steps: int) -> float:
        """Of a run of so many steps."""
        before = min(self.later_from(steps), steps)
        return before * self.first + (steps - before) * self.later

    def steps_within(self, seconds: float) -> int:
        """The most steps that take no longer; a longer run takes longer."""
        most = int(seconds / min(self.first, self.later))
        return bisect.bisect_right(range(1, most + 1), seconds, key=self.seconds)


def cost_of_steps(arm: Arm, seed: int) -> StepCost:
    """Of the median chunk of some steps, after others that warm up, of all ranks together; every rank must call.

    The median since other programs, which take no processor time, still take caches: arms should be told apart by what
    they compute. Steps that a method makes costlier, later in a run, are timed too. Nothing is written. Raises, on all
    ranks, `UsageError` if the method cannot train on such micro-batches, and a rank's `DiffmixError` of an image that
    cannot be read.
    """
    config = arm.config(_STEPS, seed)
    method = parts.make_method(config)
    chosen = together(lambda: precision_of(config, method))
    accelerator = make_accelerator(chosen, (), Path())
    method = parts.fit_to_device(method, config.run, chosen, accelerator)
    size = micro_batch_size(config.run.batch_size, accelerator.num_processes, config.run.accumulation)
    together(lambda: method.check_batch(size))
    with together(lambda: parts.make_loader(config, arm.settled.policy, method, accelerator, (0, 0))) as loader:
        schedule = parts.make_schedule(config, loader.steps_per_epoch)
        stepper = parts.make_stepper(config, method, schedule, accelerator)
        feed = Feed(loader, config.run.accumulation)
        later_from = _later_from(type(method), config, loader.steps_per_epoch)
        first = later = _median(stepper, feed, 1)
        if later_from(_STEPS):
            method.make_costlier()
            later = _median(stepper, feed, _STEPS - 1)
    accelerator.free_memory()
    return StepCost(first=first, later=later, later_from=later_from)


def _later_from(method: type[Method], config: PretrainConfig, steps_per_epoch: int) -> Callable[[int], int]:
    settings, batch = config.method.settings, config.run.batch_size
    return lambda total: method.costlier_from(
        settings, Progress(step=0, total_steps=total, steps_per_epoch=steps_per_epoch, batch_size=batch)
    )


def _median(stepper: Stepper, feed: Feed, step: int) -> float:
    """Seconds of one step, the same on all ranks, taken again and again as if it were number `step`."""
    _timed(stepper, feed, step, _WARMUP_STEPS)
    chunks: list[float] = []
    while len(chunks) < _LEAST_CHUNKS or (sum(chunks) < _SECONDS and len(chunks) < _MOST_CHUNKS):
        chunks.append(_timed(stepper, feed, step, _CHUNK))
    return statistics.median(chunks) / _CHUNK


def _timed(stepper: Stepper, feed: Feed, step: int, times: int) -> float:
    """Seconds of some steps, the same on all ranks: processor time of all of them, or wall time of the slowest."""
    began = _now(stepper.accelerator)
    for _ in range(times):
        stepper.gradients(feed.next(), step)
        stepper.update(step)
    of_ranks = gather_objects(_now(stepper.accelerator) - began)
    together(feed.check)
    return max(of_ranks) if stepper.accelerator.device.type == "cuda" else sum(of_ranks)


def _now(accelerator: Accelerator) -> float:
    if accelerator.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
