"""Features of many images, computed on all ranks together: each takes a share, all get the whole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.image_set import ImageSet
from trainer.data.plain_images import PlainImages
from trainer.evaluate.corruptions import corrupt
from trainer.nn.collectives import gather_objects, rank, together, world_size

Features = Callable[[Tensor], Tensor]  # uint8 [B, S, S, 3] to float32 [B, D]


def gather_features(
    features: Features,
    images: ImageSet,
    indices: NDArray[np.int64] | None = None,
    *,
    size: int,
    device: torch.device,
    corruption: str | None = None,
) -> Tensor:
    """Features of the images `indices` (None: all), in their order, float32 [N, D] on the device; every rank must call.

    Images have their short side resized to `size` and the centre cut, then the corruption. Raises FloatingPointError,
    on all ranks, if the features are not finite, and a rank's `DiffmixError` of an image that cannot be read.
    """
    indices = np.arange(len(images)) if indices is None else indices
    block = -(-len(indices) // world_size())
    mine = indices[rank() * block : (rank() + 1) * block]
    parts = gather_objects(together(lambda: _features(features, images, mine, size, corruption)))
    whole = torch.cat([part for part in parts if part is not None]).to(device)
    if not whole.isfinite().all():
        raise FloatingPointError("the encoder's features are not finite")
    return whole


def _features(
    features: Features, images: ImageSet, indices: NDArray[np.int64], size: int, corruption: str | None
) -> Tensor | None:
    """Those of this rank; None of no images."""
    found, done = [], 0
    for pixels, _ in PlainImages(images, indices, size=size):
        numbers = indices[done : done + len(pixels)]
        found.append(features(pixels if corruption is None else corrupt(pixels, corruption, numbers)))
        done += len(pixels)
    return torch.cat(found) if found else None
