"""Resizing boxes of images on the CPU: PIL's bilinear and bicubic filters, not rounded and clipped in between."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.kernels import kernel

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_HALF = np.float32(0.5)
_LEVELS = np.float32(255)
_NONE = np.float32(0)


@kernel
def _weight(distance: float, bicubic: bool) -> float:
    """The triangle, or the cubic of Keys (1981) with a = -1/2, at a distance in output pixels of 0 or more."""
    if not bicubic:
        return max(1.0 - distance, 0.0)
    if distance < 1.0:
        return (1.5 * distance - 2.5) * distance * distance + 1.0
    return ((2.5 - 0.5 * distance) * distance - 4.0) * distance + 2.0 if distance < 2.0 else 0.0


@kernel
def _taps(size: int, length: int, bicubic: bool) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """PIL's filter from `length` to `size` pixels: the first pixel and the weights of each output pixel.

    All have as many weights [size, taps]; those past the last pixel are 0. Unsigned, so that no index made from it
    can be negative: the compiler then needs no check.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    reach = 2 * stretch if bicubic else stretch
    first = np.empty(size, np.uint32)
    weights = np.zeros((size, int(np.ceil(2 * reach))), np.float32)
    for pixel in range(size):
        centre = (pixel + 0.5) * scale
        start = max(int(centre - reach + 0.5), 0)
        stop = min(int(centre + reach + 0.5), length)
        total = 0.0
        for tap in range(stop - start):
            total += _weight(abs((start + tap - centre + 0.5) / stretch), bicubic)
        for tap in range(stop - start):
            weights[pixel, tap] = _weight(abs((start + tap - centre + 0.5) / stretch), bicubic) / total
        first[pixel] = start
    return first, weights


@kernel
def _set_rows(total: Floats, one: Bytes, two: Bytes, first: np.float32, second: np.float32) -> None:
    for i in range(len(one)):
        total[i] = first * np.float32(one[i]) + second * np.float32(two[i])


@kernel
def _add_row(total: Floats, row: Bytes, weight: np.float32) -> None:
    for i in range(len(row)):
        total[i] += weight * np.float32(row[i])


@kernel
def _two_taps(row: Floats, first: NDArray[np.uint32], weights: Floats, out: Bytes) -> None:
    for pixel in range(len(first)):
        at = 3 * np.int64(first[pixel])
        a, b = weights[pixel, 0], weights[pixel, 1]
        for channel in range(3):
            value = _HALF + a * row[at + channel] + b * row[at + channel + 3]
            out[3 * pixel + channel] = np.uint8(np.int32(min(value, _LEVELS)))


@kernel
def _three_taps(row: Floats, first: NDArray[np.uint32], weights: Floats, out: Bytes) -> None:
    for pixel in range(len(first)):
        at = 3 * np.int64(first[pixel])
        a, b, c = weights[pixel, 0], weights[pixel, 1], weights[pixel, 2]
        for channel in range(3):
            value = _HALF + a * row[at + channel] + b * row[at + channel + 3] + c * row[at + channel + 6]
            out[3 * pixel + channel] = np.uint8(np.int32(min(value, _LEVELS)))


@kernel
def _more_taps(row: Floats, first: NDArray[np.uint32], weights: Floats, out: Bytes) -> None:
    for pixel in range(len(first)):
        at = 3 * np.int64(first[pixel])
        a, b, c, d = weights[pixel, 0], weights[pixel, 1], weights[pixel, 2], weights[pixel, 3]
        red = _HALF + a * row[at] + b * row[at + 3] + c * row[at + 6] + d * row[at + 9]
        green = _HALF + a * row[at + 1] + b * row[at + 4] + c * row[at + 7] + d * row[at + 10]
        blue = _HALF + a * row[at + 2] + b * row[at + 5] + c * row[at + 8] + d * row[at + 11]
        for tap in range(4, weights.shape[1]):
            weight = weights[pixel, tap]
            red += weight * row[at + 3 * tap]
            green += weight * row[at + 3 * tap + 1]
            blue += weight * row[at + 3 * tap + 2]
        out[3 * pixel] = np.uint8(np.int32(max(min(red, _LEVELS), _NONE)))  # cubics leave the range on both sides
        out[3 * pixel + 1] = np.uint8(np.int32(max(min(green, _LEVELS), _NONE)))
        out[3 * pixel + 2] = np.uint8(np.int32(max(min(blue, _LEVELS), _NONE)))


@kernel
def resize(image: Bytes, top: int, left: int, rows: int, columns: int, flip: bool, bicubic: bool, out: Bytes) -> None:
    """Rows first: their sums run over contiguous bytes, and one line of sums stays in the nearest cache."""
    size = out.shape[0]
    lines = image.reshape(image.shape[0], -1)
    cuts = out.reshape(size, -1)
    begin, end = 3 * left, 3 * (left + columns)
    y_first, y_weights = _taps(size, rows, bicubic)
    x_first, x_weights = _taps(size, columns, bicubic)
    if flip:
        x_first, x_weights = x_first[::-1].copy(), x_weights[::-1].copy()
    total = np.zeros(3 * (columns + x_weights.shape[1]), np.float32)
    for y in range(size):
        at = top + np.int64(y_first[y])
        below = at + 1 if at + 1 < top + rows else at  # its weight is 0 where there is no second row
        _set_rows(total, lines[at, begin:end], lines[below, begin:end], y_weights[y, 0], y_weights[y, 1])
        for tap in range(2, y_weights.shape[1]):
            if y_weights[y, tap] != 0:
                _add_row(total, lines[at + tap, begin:end], y_weights[y, tap])
        if x_weights.shape[1] == 2:
            _two_taps(total, x_first, x_weights, cuts[y])
        elif x_weights.shape[1] == 3:
            _three_taps(total, x_first, x_weights, cuts[y])
        else:
            _more_taps(total, x_first, x_weights, cuts[y])


@kernel
def resize_many(
    images: Bytes,
    index: NDArray[np.int64],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    bicubic: bool,
    out: Bytes,
) -> None:
    """`resize` of M boxes [M, 4] into out [M, S, S, 3]."""
    for m in range(len(index)):
        top, left, rows, columns = boxes[m]
        resize(images[index[m]], top, left, rows, columns, flips[m], bicubic, out[m])
