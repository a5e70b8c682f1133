"""Random views of grey images: mild ones that the generator may draw, strong ones that its encoder must see through.

All draws come from torch's global generator, which the training script seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """The largest change in either direction."""

    degrees: float
    zoom: float
    shear: float
    shift: float  # in half widths of the image


MILD = Affine(degrees=8, zoom=0.08, shear=0.10, shift=0.06)
STRONG = Affine(degrees=12, zoom=0.12, shear=0.15, shift=0.12)


def as_grey(images: NDArray[np.uint8]) -> Tensor:
    """RGB uint8 [N, H, W, 3] of grey scenes to float32 [N, 1, H, W] in 0-1."""
    return torch.from_numpy(images[..., 0].astype(np.float32) / 255).unsqueeze(1)


def affine(images: Tensor, limits: Affine) -> Tensor:
    """A random affine map of each image of float [N, 1, H, W] in 0-1; black flows in at the borders."""
    count = len(images)
    angle = torch.deg2rad(_uniform(count, limits.degrees))
    zoom, shear, shift = 1 + _uniform(count, limits.zoom), _uniform(count, limits.shear), limits.shift
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    top = torch.stack([cos, cos * shear - sin, _uniform(count, shift)], dim=1)
    bottom = torch.stack([sin, sin * shear + cos, _uniform(count, shift)], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def mild(images: Tensor) -> Tensor:
    """Views float [N, 1, H, W] that still look like the same writer's hand."""
    return affine(images, MILD)


def strong(images: Tensor) -> Tensor:
    """Views float [N, 1, H, W] for contrastive learning: larger maps, another stroke weight, noise."""
    per_image = (len(images), 1, 1, 1)
    views = affine(images, STRONG).clamp_min(0)
    views = views ** torch.exp(_uniform(len(images), 0.4)).view(per_image)
    return (views + 0.1 * torch.rand(per_image) * torch.randn_like(views)).clamp(0, 1)


def clip_input(grey: Tensor) -> Tensor:
    """Grey float [N, 1, H, W] in 0-1 to the encoder's normalised RGB [N, 3, H, W]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (grey - mean) / std


def vae_input(grey: Tensor) -> Tensor:
    """Grey float [N, 1, H, W] in 0-1 to the autoencoder's RGB [N, 3, H, W] in -1 to 1."""
    return (2 * grey - 1).repeat(1, 3, 1, 1)


def _uniform(count: int, limit: float) -> Tensor:
    """Float [count], uniform between -limit and limit."""
    return (2 * torch.rand(count) - 1) * limit
