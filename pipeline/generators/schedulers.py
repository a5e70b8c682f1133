"""Noise schedulers by name, built from the checkpoint's own scheduler config, and how a denoising loop steps them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch

from manifests.errors import UsageError
from pipeline.generators.base import step_generators

CHECKPOINT = "checkpoint"  # the scheduler that the checkpoint ships with

# name on the command line -> diffusers class and what it is given on top of the checkpoint's scheduler config
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def build_scheduler(shipped: Any, name: str) -> Any:
    """The scheduler called `name`, for the noise levels of the scheduler that is `shipped` with the checkpoint.

    `name` is `checkpoint`, a name of `SCHEDULERS` or one of their class names, or the shipped scheduler's class name.
    Raises `UsageError` for any other, with the nearest.
    """
    if name in (CHECKPOINT, type(shipped).__name__):
        return type(shipped).from_config(shipped.config)
    class_name, options = SCHEDULERS.get(name, (name, {}))
    known = [CHECKPOINT, *SCHEDULERS, *sorted({class_name for class_name, _ in SCHEDULERS.values()})]
    if class_name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise UsageError(f"unknown scheduler {name!r}{hint} Known: {', '.join([CHECKPOINT, *SCHEDULERS])}")
    return getattr(diffusers, class_name).from_config(shipped.config, **options)


def scheduler_options(name: str) -> dict[str, Any]:
    """What the scheduler called `name` is given on top of the checkpoint's config: two names may share a class."""
    return dict(SCHEDULERS[name][1]) if name in SCHEDULERS else {}


class Stepper:
    """One denoising trajectory's steps: `scheduler` set to `steps`, noise of row i a function of seed i alone.

    Time steps and coefficients stay on the CPU, so that no step makes the device wait, and everything that a scheduler
    keeps between steps is set back: one scheduler serves batch after batch.
    """

    def __init__(self, scheduler: Any, steps: int, seeds: Sequence[int]) -> None:
        scheduler.set_timesteps(steps, device="cpu")
        self.scheduler = scheduler
        self.timesteps: torch.Tensor = scheduler.timesteps  # [T] on the CPU; T may exceed `steps`
        accepted = inspect.signature(scheduler.step).parameters
        self.options: dict[str, Any] = {"generator": step_generators(seeds)} if "generator" in accepted else {}

    @classmethod
    def check(cls, scheduler: Any, steps: int) -> None:
        """Raises `UsageError` if `scheduler` cannot take `steps` steps."""
        try:
            most = scheduler.config.num_train_timesteps
            if not 1 <= steps <= most:
                raise ValueError(f"it was trained with {most}, and one at least is needed")
            cls(scheduler, steps, [])
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UsageError(f"{type(scheduler).__name__} cannot take {steps} steps: {error}") from error

    def scaled_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Standard normal `noise` at the standard deviation the first step expects."""
        return noise * self.scheduler.init_noise_sigma

    def model_input(self, sample: torch.Tensor, step: int) -> torch.Tensor:
        """What the network is shown at `timesteps[step]` for the state `sample`."""
        scaled: torch.Tensor = self.scheduler.scale_model_input(sample, self.timesteps[step])
        return scaled

    def advance(self, prediction: torch.Tensor, step: int, sample: torch.Tensor) -> torch.Tensor:
        """`sample` one step further, given the network's `prediction` for it."""
        timestep = self.timesteps[step]
        following: torch.Tensor = self.scheduler.step(prediction, timestep, sample, **self.options, return_dict=False)[
            0
        ]
        return following
