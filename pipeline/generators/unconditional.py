"""Unconditional pixel-space diffusion, `DDPMPipeline` and `DDIMPipeline`: images from noise alone, for inflation sets.

The loop is that of the two pipelines' `__call__` (DDPM: Ho et al. 2020, algorithm 2; DDIM: Song et al. 2021, equation
12, eta 0), from the same noise to the same pixels, with noise that is a function of each image's seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel

from manifests.errors import UsageError
from pipeline.generators.base import (
    Generator,
    GeneratorConfig,
    Image,
    Variations,
    compute_dtype,
    noise,
    to_variations,
)
from pipeline.generators.checkpoint import Checkpoint, fetch
from pipeline.generators.schedulers import CHECKPOINT, Stepper, build_scheduler, scheduler_options

STEPS = {"DDPMPipeline": 1000, "DDIMPipeline": 50}  # the defaults of the pipelines' calls


class Unconditional(Generator):
    """`DDPMPipeline` or `DDIMPipeline` as a generator without a condition."""

    conditional = False

    def __init__(
        self, unet: Any, scheduler: Any, checkpoint: Checkpoint, config: GeneratorConfig, device: torch.device
    ) -> None:
        self.device = device
        self.dtype = compute_dtype(config, device)
        self.unet = unet.eval().requires_grad_(requires_grad=False).to(device=device, dtype=self.dtype)
        self.size = self._checked_size(config.size)
        self.steps = int(checkpoint.setting(config.steps, "steps", STEPS[checkpoint.pipeline]))
        if checkpoint.pipeline == "DDIMPipeline":
            scheduler = DDIMScheduler.from_config(scheduler.config)  # as `DDIMPipeline.__init__` does
        scheduler_name = checkpoint.setting(config.scheduler, "scheduler", CHECKPOINT)
        self.scheduler = build_scheduler(scheduler, scheduler_name)
        Stepper.check(self.scheduler, self.steps)
        self.spec = {
            "generator": "unconditional",
            "pipeline": checkpoint.pipeline,
            **checkpoint.identity,
            "steps": self.steps,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_options": scheduler_options(scheduler_name),
            "size": self.size,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def load(cls, config: GeneratorConfig, device: torch.device) -> Unconditional:
        """Load the network; raises `UsageError` for other pipelines and for settings that need a condition."""
        if config.guidance_scale is not None:
            raise UsageError("an unconditional model has no guidance scale; leave --guidance-scale out")
        if config.safety != "off":
            raise UsageError(
                f"--safety {config.safety} works with StableDiffusionImageVariationPipeline checkpoints only"
            )
        checkpoint = fetch(config)
        if checkpoint.pipeline not in STEPS:
            raise UsageError(f"{config.model} is a {checkpoint.pipeline}; this generator runs {' and '.join(STEPS)}")
        unet = checkpoint.component("unet", UNet2DModel, torch_dtype=compute_dtype(config, device))
        return cls(unet, checkpoint.component("scheduler"), checkpoint, config, device)

    def _checked_size(self, size: int | None) -> int:
        native = self.unet.config.sample_size
        if not isinstance(native, int):
            raise UsageError(f"the model draws images of {native} pixels; only square ones are supported")
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        if size is not None and (size <= 0 or size % multiple):
            raise UsageError(f"size {size} is not a positive multiple of {multiple}; the model's own size is {native}")
        return size or native

    def prepare(self, image: Image) -> torch.Tensor:
        """Nothing, float32 [0]: there is no condition."""
        return torch.empty(0)

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """An empty condition [B, 0] for B inputs."""
        return torch.empty(len(inputs), 0, device=self.device)

    @torch.inference_mode()
    def vary(self, condition: torch.Tensor, seeds: Sequence[int]) -> Variations:
        """One image per seed; the condition [B, 0] says nothing."""
        stepper = Stepper(self.scheduler, self.steps, seeds)
        sample = noise(seeds, (self.unet.config.in_channels, self.size, self.size)).to(self.device)
        for step, timestep in enumerate(stepper.timesteps):
            prediction = self.unet(sample.to(self.dtype), timestep.to(self.device), return_dict=False)[0]
            sample = stepper.advance(prediction.float(), step, sample)
        return to_variations(_rgb(sample) / 2 + 0.5)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The network in float32 while it lasts."""
        dtype = self.dtype
        self.dtype = torch.float32
        self.unet.to(torch.float32)
        try:
            yield
        finally:
            self.dtype = dtype
            self.unet.to(dtype)


def _rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey images [B, 1, H, W] as RGB."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
