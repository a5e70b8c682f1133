"""Real handwritten digits at 32x32, with a test split that the embedded checkpoint never saw.

Source: the test set of the UCI "Optical Recognition of Handwritten Digits" data (1797 images of 8x8, CC BY 4.0), as
scikit-learn ships it. The test split was drawn once with
`train_test_split(range(1797), test_size=360, stratify=labels, random_state=0)` and its indices are stored beside this
file, so that it cannot change with scikit-learn's version.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 32  # pixels
COUNT = 1797
Split = Literal["train", "test"]
Digits = tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]


def load(split: Split) -> Digits:
    """Images uint8 [N, 32, 32, 3] RGB, labels int64 [N] in 0-9, and names such as `digit-0042`.

    N is 1437 for train and 360 for test, in ascending order of scikit-learn's index, which is the number in the name.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    grey, labels = _all_digits()
    indices = split_indices(split)
    images = np.stack([_enlarge(grey[index]) for index in indices])
    return images, labels[indices], [f"digit-{index:04d}" for index in indices]


def split_indices(split: Split) -> NDArray[np.int64]:
    """Ascending indices, int64, of one split into scikit-learn's 1797 digits."""
    path = Path(__file__).with_name("digits_test.json")
    test = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.int64)
    return test if split == "test" else np.setdiff1d(np.arange(COUNT), test)


@functools.cache
def _all_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey uint8 [1797, 8, 8] with 255 for a full stroke, and labels int64 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int64)


def _enlarge(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey [8, 8] to RGB [32, 32, 3] by Pillow's bicubic filter."""
    large = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(large.convert("RGB"))
