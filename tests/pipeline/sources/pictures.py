"""Small pictures and their encodings, made in the test."""

import io

import numpy as np
from PIL import Image

LIMIT = 10_000_000


def corners(height=32, width=48):
    """Upright picture whose four quarters tell how it is turned: red, green / blue, yellow."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 0)
    return pixels


def noise(height=40, width=60, seed=0):
    """Smooth random colours, so that JPEG changes them little."""
    few = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind, **options):
    """Bytes of a PIL image or uint8 pixels in the format `kind`."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed=0, **options):
    return encoded(noise(seed=seed), "JPEG", **options)


def distance(one, other):
    """Mean absolute difference of two pictures of one size."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other.astype(int)).mean())
