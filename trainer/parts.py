"""The parts of a run, each made from the settings and from what was made before it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from trainer.choices import class_of
from trainer.config import PretrainConfig, RunConfig
from trainer.data.loader import Loader
from trainer.data.mixing import Policy
from trainer.data.order import Cursor
from trainer.data.rows import Rows
from trainer.engine.loop import Pace
from trainer.engine.optim import Schedule, make_optimiser
from trainer.engine.stepper import Stepper
from trainer.evaluate.held_out import HeldOut, split
from trainer.methods import METHODS
from trainer.methods.base import Method
from trainer.nn import precision
from trainer.nn.batchnorm import synchronised
from trainer.nn.encoders import check_size, make_encoder

AnyMethod = TypeVar("AnyMethod", bound=Method)


def make_method(config: PretrainConfig) -> Method:
    """The method with its networks, their weights drawn from the run's seed."""
    torch.manual_seed(config.run.seed)

    def encoder(**overrides: Any) -> nn.Module:
        return make_encoder(config.encoder, config.views.size, **overrides)

    method: Method = class_of(METHODS, config.method.name)(encoder, config.method.settings)
    if method.num_local_crops:
        check_size(method.trained_encoder, config.encoder.name, config.views.local_size)
    return method


def fit_to_device(
    method: AnyMethod, run: RunConfig, chosen: precision.Precision, accelerator: Accelerator
) -> AnyMethod:
    """The method with the layout, attention, BatchNorm and compilation that suit the device."""
    precision.prepare(method, chosen)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        method = synchronised(method)
    if run.compile:
        method.trained_encoder.compile()
    return method


def make_loader(
    config: PretrainConfig, policy: Policy, method: Method, accelerator: Accelerator, cursor: tuple[int, int]
) -> Loader:
    """The stream of this process's batches from a cursor on."""
    return Loader(
        policy,
        config.views,
        num_crops=method.num_crops,
        num_local_crops=method.num_local_crops,
        batch_size=config.run.batch_size,
        seed=config.run.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulation=config.run.accumulation,
        cursor=Cursor(*cursor),
        workers=config.data.workers,
        cache_bytes=config.data.cache,
    )


def total_steps(run: RunConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the run: `max_steps` where given, else all epochs."""
    return run.max_steps or max(1, round(run.epochs * steps_per_epoch))


def make_schedule(config: PretrainConfig, steps_per_epoch: int) -> Schedule:
    """Learning rate and weight decay of every step."""
    return Schedule(
        config=config.optim,
        batch_size=config.run.batch_size,
        total_steps=total_steps(config.run, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
    )


def make_held_out(config: PretrainConfig, rows: Rows, device: torch.device) -> HeldOut | None:
    """Queries and bank, None where the set has too few labelled real images."""
    settings = config.evaluation
    parts = split(rows, bank=settings.bank, queries=settings.queries)
    if parts is None:
        return None
    return HeldOut(
        rows=rows, split=parts, views=config.views, device=device, k=settings.k, temperature=settings.temperature
    )


def make_stepper(config: PretrainConfig, method: Method, schedule: Schedule, accelerator: Accelerator) -> Stepper:
    """The method and its optimiser on the device."""
    return Stepper(
        accelerator=accelerator,
        method=method,
        optimiser=make_optimiser(method, config.optim, method.trained_encoder),
        schedule=schedule,
        seed=config.run.seed,
    )


def make_pace(config: PretrainConfig, steps_per_epoch: int) -> Pace:
    """How often to log, save and evaluate, in steps."""
    epochs = config.evaluation.every
    return Pace(
        log=config.run.log_every,
        checkpoint=config.checkpoint.every,
        keep=config.checkpoint.keep,
        probe=max(1, round(epochs * steps_per_epoch)) if epochs else 0,
    )
