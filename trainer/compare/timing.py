"""What one training step of an arm takes, its real loader included."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import Accelerator

from trainer import parts
from trainer.compare.arms import Arm
from trainer.data.loader import Loader
from trainer.engine.launch import make_accelerator
from trainer.engine.stepper import Stepper
from trainer.nn.collectives import gather_objects
from trainer.pretrain import precision_of

_WARMUP_STEPS = 5  # the loader works three micro-batches ahead: those are made by then
_FIRST_STEPS, _MOST_STEPS, _SECONDS = 10, 40, 4.0  # more steps than the first where they are short


def clock(device: torch.device) -> str:
    """What is counted: other programs on the machine take no processor time of ours, and leave a GPU alone."""
    return "wall time" if device.type == "cuda" else "processor time"


def seconds_per_step(arm: Arm, seed: int) -> float:
    """Mean of some steps after some that warm up, of all ranks together; every rank must call. Nothing is written."""
    config = arm.config(_WARMUP_STEPS + _FIRST_STEPS + _MOST_STEPS, seed)
    method = parts.make_method(config)
    chosen = precision_of(config, method)
    accelerator = make_accelerator(chosen, (), Path())
    method = parts.fit_to_device(method, config.run, chosen, accelerator)
    with parts.make_loader(config, arm.settled.policy, method, accelerator, (0, 0)) as loader:
        schedule = parts.make_schedule(config, loader.steps_per_epoch)
        stepper = parts.make_stepper(config, method, schedule, accelerator)
        _timed(stepper, loader, config.run.accumulation, range(_WARMUP_STEPS))
        count, seconds = _WARMUP_STEPS, 0.0
        for more in (_FIRST_STEPS, None):
            steps = more if more is not None else int(min(_MOST_STEPS, _SECONDS / seconds * _FIRST_STEPS))
            seconds += _timed(stepper, loader, config.run.accumulation, range(count, count + steps))
            count += steps
    accelerator.free_memory()
    return seconds / (count - _WARMUP_STEPS)


def _timed(stepper: Stepper, loader: Loader, accumulation: int, steps: range) -> float:
    """Seconds of these steps, the same on all ranks: processor time of all of them, or wall time of the slowest."""
    began = _now(stepper.accelerator)
    for step in steps:
        stepper.gradients([next(loader) for _ in range(accumulation)], step)
        stepper.update(step)
    of_ranks = gather_objects(_now(stepper.accelerator) - began)
    return max(of_ranks) if stepper.accelerator.device.type == "cuda" else sum(of_ranks)


def _now(accelerator: Accelerator) -> float:
    if accelerator.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
