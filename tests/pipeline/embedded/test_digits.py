from __future__ import annotations

import numpy as np
import pytest

from pipeline.embedded import digits


def test_shapes_and_names():
    images, labels, names = digits.load("test")
    assert images.shape == (360, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (360,)
    assert len(set(names)) == 360
    assert all(len(name) == len("digit-0042") for name in names)
    assert (images[..., 0] == images[..., 2]).all()
    assert images.min() == 0
    assert images.max() == 255


def test_splits_cover_every_digit_once():
    train, test = digits.split_indices("train"), digits.split_indices("test")
    assert sorted([*train, *test]) == list(range(1797))


def test_test_split_is_stratified():
    labels = digits.load("test")[1]
    assert np.bincount(labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


def test_stored_split_is_the_documented_one():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    drawn = train_test_split(np.arange(1797), test_size=360, stratify=load_digits().target, random_state=0)[1]
    assert digits.split_indices("test").tolist() == sorted(drawn)


def test_name_is_the_index_in_scikit_learn():
    from sklearn.datasets import load_digits

    _, labels, names = digits.load("train")
    target = load_digits().target
    assert all(target[int(name.removeprefix("digit-"))] == label for name, label in zip(names, labels, strict=True))


def test_unknown_split():
    with pytest.raises(ValueError, match="'val'"):
        digits.load("val")
