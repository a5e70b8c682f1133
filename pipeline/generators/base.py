"""What every generator does: embed real images, then draw variations from per-image seeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # height x width x 3, RGB, upright


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorConfig:
    """What the user asked for; `None` means the generator's own default. The resolved values are `Generator.spec`."""

    model: str  # hub id or local folder in diffusers format
    revision: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None  # a diffusers scheduler class name or one of `schedulers.SCHEDULERS`
    size: int | None = None  # output height and width in pixels
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on CPU, bfloat16 on a GPU
    conditioning: Literal["squash", "crop"] = "squash"
    safety: Literal["off", "flag", "drop"] = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variations:
    """One batch as it leaves the device."""

    images: torch.Tensor  # uint8 [B, H, W, 3], RGB, on the generator's device
    finite: torch.Tensor  # bool [B], on the device: False where the model produced NaN or infinity


class Generator(ABC):
    """One model on one device. `prepare` is called from reader threads, everything else from one thread."""

    spec: dict[str, Any]  # JSON-able; every setting that changes a pixel, defaults resolved: becomes plan.json's entry
    conditional: bool = True  # False: draws images from noise alone (inflation sets)
    device: torch.device
    size: int  # output height and width in pixels

    @classmethod
    @abstractmethod
    def load(cls, config: GeneratorConfig, device: torch.device) -> Generator:
        """Load the weights; raises `UsageError` for a model or setting that cannot work, naming what would."""

    @abstractmethod
    def prepare(self, image: Image) -> torch.Tensor:
        """One real image as the model's conditioning input, on the CPU, of a shape that is the same for every image."""

    @abstractmethod
    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Stacked `prepare` outputs [B, ...] on any device to the condition [B, ...] on the generator's device."""

    @abstractmethod
    def vary(self, condition: torch.Tensor, seeds: Sequence[int]) -> Variations:
        """One image for each of B conditions and B seeds (63-bit); row i depends on condition i and seed i alone."""

    def similarity(self, condition: torch.Tensor, images: torch.Tensor) -> torch.Tensor | None:
        """Cosine [B], float32, between the model's own embeddings of real and synthetic; None where it has none."""
        return None

    def flagged(self, images: torch.Tensor) -> torch.Tensor | None:
        """What the checkpoint's safety checker says, bool [B]; None when `safety` is off. Never changes a pixel."""
        return None

    @abstractmethod
    def full_precision(self) -> AbstractContextManager[None]:
        """Inside it, `embed` and `vary` compute in float32: for batches that came out non-finite."""


def noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal float32 [len(seeds), *shape] on the CPU, each row a function of its 63-bit seed alone.

    Philox takes all 63 bits as its key; torch's CPU generator keeps 32, so that a set of a million images would hold
    the same noise more than a hundred times.
    """
    rows = [np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def step_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image for models that draw noise while they run, a function of all 63 bits of its seed.

    `manual_seed` alone keeps 32 bits. The 624 words of the Mersenne twister's state lie as 64-bit integers behind the
    24 bytes of header in `get_state`; they are filled from Philox, under a key that `noise` never uses.
    """
    generators = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        words = np.random.Philox(key=(1 << 64) | seed).random_raw(624) & np.uint64(0xFFFFFFFF)
        state = generator.get_state()
        state[24 : 24 + 8 * 624].view(torch.int64).copy_(torch.from_numpy(words.astype(np.int64)))
        generator.set_state(state)
        generators.append(generator)
    return generators


def to_variations(images: torch.Tensor) -> Variations:
    """Images [B, 3, H, W], floating point, 0 to 1, as `Variations`; rounds as diffusers' `numpy_to_pil` does."""
    images = images.float()
    finite = images.isfinite().flatten(1).all(1)
    pixels = images.clamp(0, 1).mul(255).round_().to(torch.uint8)
    return Variations(images=pixels.permute(0, 2, 3, 1).contiguous(), finite=finite)


def compute_dtype(config: GeneratorConfig, device: torch.device) -> torch.dtype:
    """The dtype that `config.dtype` means on `device`: `auto` is float32 on a CPU and bfloat16 elsewhere."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype
