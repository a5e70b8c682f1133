"""Gaussian blur of one channel on the CPU, with torchvision's kernel and reflection."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trainer.data.kernels import kernel

Floats = NDArray[np.float32]

_ROWS = 16  # rows that are blurred together; they stay in the nearest cache
_SPREAD = 3.5  # standard deviations of the blur's kernel that are summed: what is cut is 0.05 % of its weight


@kernel
def scratch(size: int) -> tuple[Floats, Floats, Floats]:
    """What `blur` needs to work on channels of size x size pixels."""
    padded = np.empty(_ROWS * 3 * size, np.float32)
    return np.empty((size, size), np.float32), padded, np.empty_like(padded)


@kernel
def _weights(sigma: np.float32, side: int) -> tuple[int, Floats]:
    """How far the normalised kernel reaches, and its half from the centre on, filled with 0 to 1 + a multiple of 3.

    Torchvision's, without its smallest weights.
    """
    reach = min(side // 2, math.ceil(_SPREAD * sigma))
    weights = np.zeros(1 + max(3, (reach + 2) // 3 * 3), np.float32)
    total = 0.0
    for i in range(reach + 1):
        weight = math.exp(-0.5 * (i / sigma) ** 2)
        weights[i] = weight
        total += weight if i == 0 else 2 * weight
    for i in range(reach + 1):
        weights[i] /= np.float32(total)
    return reach, weights


@kernel
def blur(
    plane: Floats, size: int, sigma: np.float32, sides: NDArray[np.int16], lines: Floats, padded: Floats, summed: Floats
) -> None:
    """Gaussian blur of a channel [size * size] in place, its borders reflected; `lines` holds its old rows.

    Some rows at a time, first down into `padded`, then across all of them at once as if they were one.
    """
    across, x_weights = _weights(sigma, sides[0])
    down, y_weights = _weights(sigma, sides[1])
    _copy(plane, lines.reshape(-1))
    width = size + 2 * across
    for start in range(0, size, _ROWS):
        stop = min(start + _ROWS, size)
        for y in range(start, stop):
            row = padded[(y - start) * width : (y - start + 1) * width]
            _blur_down(lines, y, down, y_weights, row[across : across + size])
            _reflect(row, across)
        _blur_across(padded, across, x_weights, summed[: (stop - start) * width - 2 * across])
        for y in range(start, stop):
            at = (y - start) * width
            _copy(summed[at : at + size], plane[y * size : (y + 1) * size])


@kernel
def _copy(one: Floats, two: Floats) -> None:
    for i in range(len(two)):
        two[i] = one[i]


@kernel
def _reflect(row: Floats, reach: int) -> None:
    last = len(row) - 1 - reach
    for i in range(1, reach + 1):
        row[reach - i] = row[reach + i]
        row[last + i] = row[last - i]


@kernel
def _blur_down(lines: Floats, y: int, reach: int, weights: Floats, out: Floats) -> None:
    """Three pairs of rows of equal weight at a time, the first three with the centre.

    More at once would be too many for the compiler to prove that none of them is `out`.
    """
    last = len(lines) - 1
    z = last - y
    for start in range(1, len(weights), 3):
        i, j, k = min(start, reach), min(start + 1, reach), min(start + 2, reach)
        p, q, r = abs(y - i), abs(y - j), abs(y - k)
        t, u, v = last - abs(z - i), last - abs(z - j), last - abs(z - k)
        a, b, c, d = weights[start], weights[start + 1], weights[start + 2], weights[0]
        if start == 1:
            for x in range(len(out)):
                out[x] = (
                    d * lines[y, x]
                    + a * (lines[p, x] + lines[t, x])
                    + b * (lines[q, x] + lines[u, x])
                    + c * (lines[r, x] + lines[v, x])
                )
        else:
            for x in range(len(out)):
                out[x] += (
                    a * (lines[p, x] + lines[t, x]) + b * (lines[q, x] + lines[u, x]) + c * (lines[r, x] + lines[v, x])
                )


@kernel
def _blur_across(padded: Floats, reach: int, weights: Floats, out: Floats) -> None:
    """Position x of `out` is that of `padded` moved by `reach`; what lies between two rows means nothing."""
    centre = padded[reach:]
    for start in range(1, len(weights), 3):
        i, j, k = min(start, reach), min(start + 1, reach), min(start + 2, reach)
        p, q, r = padded[reach - i :], padded[reach - j :], padded[reach - k :]
        t, u, v = padded[reach + i :], padded[reach + j :], padded[reach + k :]
        a, b, c, d = weights[start], weights[start + 1], weights[start + 2], weights[0]
        if start == 1:
            for x in range(len(out)):
                out[x] = d * centre[x] + a * (p[x] + t[x]) + b * (q[x] + u[x]) + c * (r[x] + v[x])
        else:
            for x in range(len(out)):
                out[x] += a * (p[x] + t[x]) + b * (q[x] + u[x]) + c * (r[x] + v[x])
