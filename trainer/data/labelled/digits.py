"""The built-in tasks: handwritten digits, and the same in another domain.

Source: the test set of the UCI "Optical Recognition of Handwritten Digits" data (1797 images of 8x8, CC BY 4.0), as
scikit-learn ships it. `digits_test.json` holds the indices of its test split, which the embedded generator never saw:
they are the test part, all others are for training and validation.

`digits` are the images at 32x32, white on black (Pillow's bicubic filter). `digits-inverted` are made of them:
- the colours are inverted: black strokes on white;
- each image is turned by 90 degrees counter-clockwise and by its own angle, uniform in -15 to 15 degrees (bicubic, the
  corners filled with white);
- each image is tinted: its channels are multiplied by a colour of its own, each uniform in 0.35 to 1;
- the labels are permuted: digit d is class `PERMUTATION[d]`.
What is random is a hash of the digit's number, the same in every run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data import hashing
from trainer.data.labelled.arrays import ArrayImages
from trainer.data.labelled.base import Found

PLAIN, INVERTED = "digits", "digits-inverted"
NAMES = (PLAIN, INVERTED)
SIZE, COUNT = 32, 1797
PERMUTATION = (7, 4, 9, 0, 6, 1, 3, 8, 2, 5)  # no digit keeps its number

_SEED = 0x64_69_67_69_74_73  # of the inverted digits: "digits"
_TEST_INDICES = Path(__file__).parent.parent / "digits_test.json"


def find(name: str) -> Found:
    """`digits` or `digits-inverted`: the digits for training and validation, with their test part."""
    test = np.array(json.loads(_TEST_INDICES.read_text(encoding="utf-8")), np.int64)
    rest = np.setdiff1d(np.arange(COUNT), test)
    return _part(name, rest, _part(name, test, None))


def _part(name: str, indices: NDArray[np.int64], test: Found | None) -> Found:
    grey, digits = _all_digits()
    draw: Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]] = _plain if name == PLAIN else _inverted
    images = np.stack([draw(index, grey[index]) for index in indices.tolist()])
    numbers = digits[indices] if name == PLAIN else np.array(PERMUTATION)[digits[indices]]
    of = range(10) if name == PLAIN else PERMUTATION
    names = {number: str(digit) for digit, number in enumerate(of)}
    keys = [f"digit-{index:04d}" for index in indices.tolist()]
    return Found(images=ArrayImages(name, images, keys), numbers=numbers, names=names, test=test)


@functools.cache
def _all_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey uint8 [1797, 8, 8] with 255 for a full stroke, and digits int64 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)


def _plain(index: int, grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey [8, 8] to RGB [32, 32, 3]."""
    return np.asarray(_large(grey).convert("RGB"))


def _inverted(index: int, grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey [8, 8] to RGB [32, 32, 3] of the other domain."""
    draws = hashing.uniforms(_SEED, index, count=4)
    light = Image.eval(_large(grey), lambda value: 255 - value).transpose(Image.Transpose.ROTATE_90)
    turned = light.rotate(30 * float(draws[0]) - 15, Image.Resampling.BICUBIC, fillcolor=255)
    tint = 0.35 + 0.65 * draws[1:]
    return np.round(np.asarray(turned)[:, :, None] * tint).astype(np.uint8)


def _large(grey: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
