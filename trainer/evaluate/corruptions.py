"""Corrupted images to measure robustness on: noise, blur, low contrast, shift and rotation.

After ImageNet-C (Hendrycks and Dietterich, arXiv:1903.12261), whose gaussian noise and contrast these are; blur is
gaussian, and shift-rotate is added. Default severities are for 32 px digits: strong enough that a good encoder loses
some accuracy and a poor one most. What is drawn for an image depends on the seed, the corruption and the image's number
alone, never on the batch it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from manifests.errors import UsageError

_REFERENCE_SIDE = 32
_SHIFT = 1 / 160  # of the side, for each degree of rotation: 1/8 (4 px of 32) at 20 degrees
_TRUNCATE = 4.0  # standard deviations of the blur's kernel that are kept, as scipy keeps


@dataclass(frozen=True, slots=True)
class Corruption:
    """`apply` takes images float32 [N, 3, S, S] in 0..1, a generator an image, and the severity in units of `unit`."""

    apply: Callable[[Tensor, list[np.random.Generator], float], Tensor]
    severity: float
    unit: str


def corrupt(
    images: Tensor,
    name: str,
    numbers: Sequence[int] | NDArray[np.int64],
    *,
    seed: int = 0,
    severity: float | None = None,
) -> Tensor:
    """Images uint8 [N, S, S, 3] corrupted, same shape, type and device; `numbers` [N] are theirs in their set.

    Without `severity` the default of `CORRUPTIONS` is taken. Raises `UsageError` for an unknown name.
    """
    if name not in CORRUPTIONS:
        raise UsageError(f"there is no corruption {name!r}; there are {', '.join(CORRUPTIONS)}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images are uint8 [N, S, S, 3]; these are {images.dtype} {tuple(images.shape)}")
    chosen = CORRUPTIONS[name]
    if len(numbers) != len(images):
        raise ValueError(f"{len(images)} images came with {len(numbers)} numbers")
    place = list(CORRUPTIONS).index(name)
    draws = [np.random.default_rng((seed, place, int(number))) for number in numbers]
    pixels = images.permute(0, 3, 1, 2).float() / 255
    spoilt = chosen.apply(pixels, draws, chosen.severity if severity is None else severity)
    return (spoilt.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _noise(images: Tensor, draws: list[np.random.Generator], sigma: float) -> Tensor:
    """Independent normal noise on each pixel and channel."""
    noise = np.stack([draw.standard_normal(images.shape[1:], dtype=np.float32) for draw in draws])
    return images + sigma * torch.from_numpy(noise).to(images.device)


def _blur(images: Tensor, draws: list[np.random.Generator], sigma: float) -> Tensor:
    """Gaussian blur, the border replicated; sigma is in pixels of a 32 px image and grows with the side."""
    sigma *= images.shape[-1] / _REFERENCE_SIDE
    radius = int(_TRUNCATE * sigma + 0.5)
    if radius == 0:
        return images
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=images.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)  # [3, 1, 1, 2r + 1]
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _contrast(images: Tensor, draws: list[np.random.Generator], factor: float) -> Tensor:
    """Distances from each image's mean colour times a factor below 1."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + factor * (images - mean)


def _shift_rotate(images: Tensor, draws: list[np.random.Generator], degrees: float) -> Tensor:
    """Rotation about the centre by up to +-degrees and shifts by up to +-degrees/160 of the side, bilinear.

    What comes in from outside is black, as torchvision's affine transforms fill it: replicating the border would
    stretch strokes that touch it.
    """
    drawn = np.stack([draw.uniform(-1, 1, 3) for draw in draws]) * degrees
    angle = np.radians(drawn[:, 0])
    shift = 2 * _SHIFT * drawn[:, 1:]  # of grid coordinates, -1..1 over the side
    rows = [[np.cos(angle), -np.sin(angle), shift[:, 0]], [np.sin(angle), np.cos(angle), shift[:, 1]]]
    matrices = torch.from_numpy(np.stack([np.stack(row, -1) for row in rows], 1)).to(images)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(_noise, 0.35, "standard deviation, of values in 0..1"),
    "blur": Corruption(_blur, 2.5, "sigma in pixels of a 32 px image"),
    "contrast": Corruption(_contrast, 0.3, "factor"),
    "shift-rotate": Corruption(_shift_rotate, 20.0, "degrees; shifts are 1/160 of the side for each"),
}
