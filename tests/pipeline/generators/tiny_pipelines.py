"""Inputs that the generator tests share."""

from __future__ import annotations

import numpy as np
import torch

CPU = torch.device("cpu")
SEEDS = [5, 2**62 + 11, 2**40 + 3]


def photographs(count: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Smooth random uint8 images of different sizes and shapes."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 5, 7)).astype(np.float32))
        fine = torch.nn.functional.interpolate(coarse, size=(50 + 13 * i, 91 - 7 * i), mode="bilinear")
        images.append(fine[0].permute(1, 2, 0).to(torch.uint8).numpy())
    return images
