"""What the loader hands to the engine, and the engine to a method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """The views of a batch, augmented and normalised, on the training device.

    `crops` is float [V, B, 3, S, S], view v of image i at `crops[v, i]`; `local_crops` is float [W, B, 3, s, s], or
    None where the method asks for none. `flatten(0, 1)` of either is one batch without a copy. `labels` is int64 [B],
    None unless the loader was asked for them.
    """

    crops: Tensor
    local_crops: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of one rank. `items` names what was trained on: see `order.Stream`."""

    views: Views
    items: NDArray[np.int64]  # [B]
    epoch: int
    step: int  # within the epoch
