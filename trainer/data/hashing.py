"""Random numbers that are a pure function of what they are for: (seed, epoch, item, view), never of who draws them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection of 64-bit words that looks random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def words(*names: int | NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Words uint64 [..., count] for the names, integers or integer arrays that broadcast to [...]."""
    with np.errstate(over="ignore"):
        state = np.zeros((), dtype=np.uint64)
        for name in names:
            word = np.asarray(name, dtype=np.int64).astype(np.uint64)
            state = mix((state ^ mix(word + _GOLDEN)) * _GOLDEN + _GOLDEN)
        counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return mix(np.expand_dims(state, -1) + counter)


def uniforms(*names: int | NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Uniform numbers float64 [..., count] in [0, 1) for the names, see `words`."""
    return (words(*names, count=count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
