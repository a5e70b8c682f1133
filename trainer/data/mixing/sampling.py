"""Draws in proportion to weights, as pure functions of (seed, epoch, item).

Items of an epoch are drawn by systematic sampling (Madow, "On the theory of systematic sampling, II", 1949): the items
are equal steps along the cumulative weights, and chance only says where the first one begins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data import hashing

PURPOSE = -1  # where views have their number: the draws of mixing are apart from those of any view

_NO_ITEM = -1
_BITS = 24  # of the fraction of an item, in whole numbers: they add up without rounding


class Sampler:
    """Assigns N items to N places: a place whose weight is w times the mean comes floor(w) or ceil(w) times an epoch.

    Places of equal weight come once each, place i at item i. Chance is one number an epoch: with one for each item, a
    place could come one time more or less than that.

    Args:
        weights: finite, of 0 or more and not all 0, float64 [N].
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        cumulative = np.cumsum(weights / weights.max())  # weights that are equal add up exactly
        self._ends = np.rint(cumulative * (len(weights) * 2.0**_BITS / cumulative[-1])).astype(np.int64)

    def places(self, items: NDArray[np.int64], epoch: int, seed: int) -> NDArray[np.int64]:
        """The place of each item from 0 to N - 1, [B]."""
        word = hashing.words(seed, epoch, _NO_ITEM, PURPOSE, count=1)[0]
        offset = np.int64(word >> np.uint64(64 - _BITS))
        return np.searchsorted(self._ends, (items << _BITS) + offset, side="right").astype(np.int64)


def choose(weights: NDArray[np.float64], draws: NDArray[np.float64]) -> NDArray[np.int16]:
    """One of K for each uniform draw, [views, B], in proportion to its item's weights, [B, K]; int16 [views, B]."""
    cumulative = weights.cumsum(1)
    chosen: NDArray[np.int16] = ((draws * cumulative[:, -1])[..., None] >= cumulative).sum(-1, dtype=np.int16)
    return chosen
