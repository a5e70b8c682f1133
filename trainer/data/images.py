"""From the bytes of an image file to RGB pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

_JPEG_SPACES = {"YCbCr", "Gray", "RGB"}  # what libjpeg turns into RGB by itself


def decode(data: bytes, max_pixels: int = 100_000_000) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3], RGB and contiguous; grey images get three equal channels, alpha is dropped.

    JPEG is decoded exactly as PIL does (libjpeg's accurate DCT and smooth upsampling: the fast ones cost 39 dB and
    gain nothing). An EXIF orientation is not applied: pair sets hold upright images. Raises ValueError with the
    reason for anything that is no whole image of at most `max_pixels`.
    """
    if data[:3] == b"\xff\xd8\xff":
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    return _decode_any(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """None for what only PIL can read or explain: CMYK, damage."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, max_pixels)
        if space not in _JPEG_SPACES:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except TooManyPixelsError:
        raise
    except (ValueError, RuntimeError, OSError):
        return None
    return pixels


def _decode_any(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns at its own limit of pixels; ours is checked here
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size, max_pixels)
                return np.array(image.convert("RGB"))
    except TooManyPixelsError:
        raise
    except Exception as error:  # PIL's readers raise whatever their format's parser meets in damaged bytes
        raise ValueError(f"not a readable image ({len(data)} bytes): {error}") from error


class TooManyPixelsError(ValueError):
    """The header announces more pixels than allowed: a bomb, or a scan that was never meant for training."""


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels are more than the {max_pixels} that are allowed")
