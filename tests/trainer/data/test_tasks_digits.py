"""The built-in digits: the pipeline's own pixels and split, and another domain made of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import trainer.data
from pipeline.embedded import digits as embedded
from tests.trainer.data.task_builders import contents, opened
from trainer.data.labelled import digits


@pytest.fixture(scope="module")
def plain():
    return opened("digits")


@pytest.fixture(scope="module")
def inverted():
    return opened("digits-inverted")


def test_the_split_is_the_pipelines():
    ours = Path(trainer.data.__file__).with_name("digits_test.json")
    theirs = Path(embedded.__file__).with_name("digits_test.json")
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_the_digits_are_the_pipelines(plain):
    found = contents(plain)
    assert plain.class_names == tuple("0123456789")
    for split in ("train", "test"):
        images, labels, names = embedded.load(split)
        for pixels, label, name in zip(images, labels, names, strict=True):
            assert found[name] == (str(label), pixels.tobytes())
    assert len(found) == 1797


@pytest.mark.parametrize("task", ["plain", "inverted"])
def test_the_test_part_is_what_no_generator_saw(task, request):
    task = request.getfixturevalue(task)
    assert set(task.test.keys(np.arange(len(task.test)))) == set(embedded.load("test")[2])
    assert len(task.train) + len(task.validation) == 1437
    for part in (task.train, task.validation, task.test):
        assert len(Counter(part.label.tolist())) == 10
    assert task.train.image_size == (32, 32)


def test_the_labels_are_permuted(plain, inverted):
    assert sorted(digits.PERMUTATION) == list(range(10))
    assert all(number != digit for digit, number in enumerate(digits.PERMUTATION))
    old, new = contents(plain), contents(inverted)
    assert all(old[key][0] == new[key][0] for key in old)  # the name says which digit it is
    for digit, number in enumerate(digits.PERMUTATION):
        assert inverted.class_names[number] == str(digit)


def test_the_pixels_are_inverted_turned_and_tinted(plain, inverted):
    old, new = contents(plain), contents(inverted)
    tints = []
    for key in sorted(old)[:200]:
        before = np.frombuffer(old[key][1], np.uint8).reshape(32, 32, 3)[..., 0]
        after = np.frombuffer(new[key][1], np.uint8).reshape(32, 32, 3).astype(float)
        tint = after[0, 0]  # the corner is background
        tints.append(tint / 255)
        grey = after / tint * 255
        assert np.abs(grey - grey.mean(axis=2, keepdims=True)).max() <= 3
        turned_back = Image.fromarray(grey.mean(axis=2).clip(0, 255).astype(np.uint8)).rotate(-90)
        expected = 255.0 - before
        best = max(
            np.corrcoef(np.asarray(turned_back.rotate(angle, fillcolor=255), float).ravel(), expected.ravel())[0, 1]
            for angle in (-14, -10, -5, 0, 5, 10, 14)
        )
        assert best > 0.85
    assert min(map(min, tints)) >= 0.345 and max(map(max, tints)) <= 1
    assert np.std(tints) > 0.15


def test_the_digits_are_the_same_in_every_process(inverted):
    """What one machine measured, another must be able to repeat."""
    pixels = np.frombuffer(contents(inverted)["digit-0000"][1], np.uint8).reshape(32, 32, 3)
    assert pixels[0, 0].tolist() == [251, 172, 166]
