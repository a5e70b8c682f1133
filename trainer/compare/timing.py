"""What one training step of an arm takes, its real loader included."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer import parts
from trainer.compare.arms import Arm
from trainer.data.order import micro_batch_size
from trainer.engine.feed import Feed
from trainer.engine.launch import make_accelerator
from trainer.engine.stepper import Stepper
from trainer.nn.collectives import gather_objects, together
from trainer.pretrain import precision_of

_WARMUP_STEPS = 5  # the loader works three micro-batches ahead: those are made by then
_CHUNK = 5  # steps that are timed together
_LEAST_CHUNKS, _MOST_CHUNKS, _SECONDS = 3, 12, 6.0  # more than the least where steps are short


def clock(device: torch.device) -> str:
    """What is counted: other programs on the machine take no processor time of ours, and leave a GPU alone."""
    return "wall time" if device.type == "cuda" else "processor time"


def seconds_per_step(arm: Arm, seed: int) -> float:
    """Of the median chunk of some steps, after others that warm up, of all ranks together; every rank must call.

    The median since other programs, which take no processor time, still take caches: arms should be told apart by what
    they compute. Nothing is written. Raises, on all ranks, `UsageError` if the method cannot train on such
    micro-batches, and a rank's `DiffmixError` of an image that cannot be read.
    """
    config = arm.config(_WARMUP_STEPS + _MOST_CHUNKS * _CHUNK, seed)
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
        _timed(stepper, feed, range(_WARMUP_STEPS))
        chunks: list[float] = []
        while len(chunks) < _LEAST_CHUNKS or (sum(chunks) < _SECONDS and len(chunks) < _MOST_CHUNKS):
            first = _WARMUP_STEPS + len(chunks) * _CHUNK
            chunks.append(_timed(stepper, feed, range(first, first + _CHUNK)))
    accelerator.free_memory()
    return statistics.median(chunks) / _CHUNK


def _timed(stepper: Stepper, feed: Feed, steps: range) -> float:
    """Seconds of these steps, the same on all ranks: processor time of all of them, or wall time of the slowest."""
    began = _now(stepper.accelerator)
    for step in steps:
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
