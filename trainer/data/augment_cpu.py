"""`augment` for training on the CPU: one image after the other in kernels that keep to the nearest caches.

The same operations with the same parameters as `augment`; see there for what they mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.blur_cpu import blur, scratch
from trainer.data.colours import CONTRAST, HUE, SATURATION, Colours
from trainer.data.kernels import kernel

Floats = NDArray[np.float32]

_BLOCK = 1024  # pixels whose three channels stay in the first-level cache while the operations pass over them

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)
_THREE = np.float32(3)
_FOUR = np.float32(4)
_SIX = np.float32(6)
_LEVEL = np.float32(1 / 255)
_RED = np.float32(0.2989)
_GREEN = np.float32(0.587)
_BLUE = np.float32(0.114)
_TINY = np.float32(1e-3)  # of a level, so that a level that equals the threshold is not lost to rounding


def augment_cpu(
    images: NDArray[np.uint8],
    colours: Colours,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    out: NDArray[np.float32],
) -> None:
    """`augment` of images [N, S, S, 3] by colours [N] into out float32 [N, 3, S, S], both contiguous.

    Holds no lock: threads may work on parts of a batch. Raises ValueError for shapes that do not fit.
    """
    count, size = images.shape[0], images.shape[1]
    if images.shape != (count, size, size, 3) or colours.shape != (count,) or out.shape != (count, 3, size, size):
        raise ValueError(f"images {images.shape}, colours {colours.shape} and out {out.shape} do not fit together")
    if out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} with strides {out.strides}; it must be contiguous float32")
    factors = np.stack([colours.brightness, colours.contrast, colours.saturation, colours.hue], -1, dtype=np.float32)
    _augment(
        np.ascontiguousarray(images).reshape(count, 3 * size * size),
        # Copies, since numba compiles anew for arrays that are read-only or have gaps.
        np.array(colours.jitter, order="C"),
        np.array(colours.order, order="C"),
        factors,
        np.array(colours.gray, order="C"),
        np.array(colours.sigma, order="C"),
        np.array(colours.kernel, order="C"),
        np.array(colours.threshold, order="C"),
        (1 / np.asarray(std)).astype(np.float32),
        (-np.asarray(mean) / np.asarray(std)).astype(np.float32),
        out.reshape(count, 3, size * size),
        size,
    )


@kernel
def _augment(
    images: NDArray[np.uint8],
    jitter: NDArray[np.bool_],
    order: NDArray[np.int8],
    factors: Floats,
    gray: NDArray[np.bool_],
    sigma: Floats,
    sides: NDArray[np.int16],
    threshold: NDArray[np.int16],
    gain: Floats,
    shift: Floats,
    out: Floats,
    size: int,
) -> None:
    """`out` [N, 3, P] is also the place where each image's channels are worked on."""
    lines, padded, summed = scratch(size)
    for n in range(len(images)):
        blurred = sigma[n] > 0
        limit = (np.float32(threshold[n]) - _TINY) * _LEVEL
        _colour(images[n], jitter[n], order[n], factors[n], gray[n], blurred, limit, gain, shift, out[n])
        if blurred:
            for channel in range(3):
                blur(out[n, channel], size, sigma[n], sides[n], lines, padded, summed)
            _finish(out[n, 0], out[n, 1], out[n, 2], limit, gain, shift)


@kernel
def _colour(
    image: NDArray[np.uint8],
    jitter: bool,
    order: NDArray[np.int8],
    factors: Floats,
    gray: bool,
    blurred: bool,
    limit: np.float32,
    gain: Floats,
    shift: Floats,
    out: Floats,
) -> None:
    """In two passes, since contrast needs the mean grey of the whole image as the operations before it leave it."""
    pixels = out.shape[1]
    contrast = 0
    while order[contrast] != CONTRAST:
        contrast += 1
    total = 0.0
    for second in range(2):
        average = np.float32(total / pixels)
        for start in range(0, pixels, _BLOCK):
            stop = min(start + _BLOCK, pixels)
            red, green, blue = out[0, start:stop], out[1, start:stop], out[2, start:stop]
            if not second:
                _load(image[3 * start : 3 * stop], red, green, blue)
            if jitter:
                for place in range(contrast if second else 0, 4 if second else contrast):
                    _operate(red, green, blue, order[place], factors, average)
            if not second and jitter:
                total += _gray_sum(red, green, blue)
            if second and gray:
                _grayscale(red, green, blue)
            if second and not blurred:
                _finish(red, green, blue, limit, gain, shift)


@kernel
def _operate(red: Floats, green: Floats, blue: Floats, operation: int, factors: Floats, average: np.float32) -> None:
    factor = factors[operation]
    if operation == HUE:
        if factor != _ZERO:
            _turn(red, green, blue, factor * _SIX)
    elif operation == SATURATION:
        if factor != _ONE:
            _saturate(red, green, blue, factor)
    elif factor != _ONE:
        _blend(red, green, blue, factor, average if operation == CONTRAST else _ZERO)


@kernel
def _load(pixels: NDArray[np.uint8], red: Floats, green: Floats, blue: Floats) -> None:
    for i in range(len(red)):
        red[i] = np.float32(pixels[3 * i]) * _LEVEL
        green[i] = np.float32(pixels[3 * i + 1]) * _LEVEL
        blue[i] = np.float32(pixels[3 * i + 2]) * _LEVEL


@kernel
def _gray_sum(red: Floats, green: Floats, blue: Floats) -> float:
    total = _ZERO
    for i in range(len(red)):
        total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
    return float(total)


@kernel
def _blend(red: Floats, green: Floats, blue: Floats, factor: np.float32, other: np.float32) -> None:
    """Brightness: with black; contrast: with the mean grey."""
    addend = (_ONE - factor) * other
    for i in range(len(red)):
        red[i] = min(max(factor * red[i] + addend, _ZERO), _ONE)
        green[i] = min(max(factor * green[i] + addend, _ZERO), _ONE)
        blue[i] = min(max(factor * blue[i] + addend, _ZERO), _ONE)


@kernel
def _saturate(red: Floats, green: Floats, blue: Floats, factor: np.float32) -> None:
    rest = _ONE - factor
    for i in range(len(red)):
        gray = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
        red[i] = min(max(factor * red[i] + gray, _ZERO), _ONE)
        green[i] = min(max(factor * green[i] + gray, _ZERO), _ONE)
        blue[i] = min(max(factor * blue[i] + gray, _ZERO), _ONE)


@kernel
def _grayscale(red: Floats, green: Floats, blue: Floats) -> None:
    for i in range(len(red)):
        gray = _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
        red[i] = gray
        green[i] = gray
        blue[i] = gray


@kernel
def _turn(red: Floats, green: Floats, blue: Floats, sixths: np.float32) -> None:
    """HSV's hue moved by `sixths` of the circle; value and chroma stay, so the way back needs neither division."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high = max(r, g, b)
        low = min(r, g, b)
        chroma = high - low
        scale = _ONE / (chroma if chroma > _ZERO else _ONE)
        of_red = (g - b) * scale
        of_green = _TWO + (b - r) * scale
        of_blue = _FOUR + (r - g) * scale
        hue = of_red if high == r else (of_green if high == g else of_blue)
        hue += sixths
        hue = hue + _SIX if hue < _ZERO else hue
        hue = hue - _SIX if hue >= _SIX else hue
        red[i] = low + chroma * min(max(abs(hue - _THREE) - _ONE, _ZERO), _ONE)
        green[i] = low + chroma * min(max(_TWO - abs(hue - _TWO), _ZERO), _ONE)
        blue[i] = low + chroma * min(max(_TWO - abs(hue - _FOUR), _ZERO), _ONE)


@kernel
def _finish(red: Floats, green: Floats, blue: Floats, limit: np.float32, gain: Floats, shift: Floats) -> None:
    """Solarise and normalise."""
    channels = (red, green, blue)
    for c in range(3):
        channel = channels[c]
        if limit > _ONE:
            for i in range(len(channel)):
                channel[i] = channel[i] * gain[c] + shift[c]
        else:
            for i in range(len(channel)):
                value = channel[i]
                channel[i] = (_ONE - value if value >= limit else value) * gain[c] + shift[c]
