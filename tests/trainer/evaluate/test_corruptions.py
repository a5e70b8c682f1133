"""Corruptions against scipy, PIL and values worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from manifests.errors import UsageError
from trainer.evaluate import corruptions
from trainer.evaluate.corruptions import CORRUPTIONS, corrupt


def pictures(count=3, side=32, seed=0):
    """Smooth random pictures: interpolation of different kinds agrees on them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return torch.tensor(np.stack([np.asarray(Image.fromarray(one).resize((side, side), 3)) for one in coarse]))


def shift_and_turn(monkeypatch, image, *drawn):
    """Shift-rotate of one image with the three draws given: angle, x, y in units of the most."""

    class Draw:
        def uniform(self, low, high, count):
            return np.array(drawn)

    monkeypatch.setattr(corruptions.np.random, "default_rng", lambda key: Draw())
    return corrupt(image[None], "shift-rotate", [0])[0]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_gets_the_same_in_any_batch(name):
    images = pictures(5)
    whole = corrupt(images, name, range(5), seed=3)
    assert torch.equal(corrupt(images[[4, 1]], name, np.array([4, 1]), seed=3), whole[[4, 1]])
    assert whole.dtype == torch.uint8 and whole.shape == images.shape and not torch.equal(whole, images)


@pytest.mark.parametrize("name", ["noise", "shift-rotate"])
def test_seeds_and_numbers_draw_apart(name):
    images = pictures(1).repeat(2, 1, 1, 1)
    same_image = corrupt(images, name, [0, 1])
    assert not torch.equal(same_image[0], same_image[1])
    assert not torch.equal(corrupt(images, name, [0, 1], seed=1), same_image)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(list(CORRUPTIONS)), st.integers(0, 2**31), st.integers(0, 2**40), st.sampled_from([1, 7, 32]))
def test_any_size_seed_and_number(name, seed, number, side):
    images = torch.full((1, side, side, 3), 200, dtype=torch.uint8)
    first, again = (corrupt(images, name, [number], seed=seed) for _ in range(2))
    assert first.shape == images.shape and torch.equal(first, again)


def test_noise_has_its_mean_and_spread():
    grey = torch.full((4, 64, 64, 3), 128, dtype=torch.uint8)
    change = corrupt(grey, "noise", range(4), severity=0.1).double() / 255 - 128 / 255
    assert change.mean().abs() < 0.002
    assert change.std().item() == pytest.approx(0.1, rel=0.02)
    flat = change.flatten(0, 2)
    assert np.abs(np.corrcoef(flat.numpy().T) - np.eye(3)).max() < 0.03  # channels are independent


@pytest.mark.parametrize(("side", "sigma"), [(32, 2.5), (64, 5.0), (16, 1.25)])
def test_blur_is_scipys_and_grows_with_the_image(side, sigma):
    images = torch.tensor(np.random.default_rng(1).integers(0, 256, (2, side, side, 3), dtype=np.uint8))
    wanted = [gaussian_filter(image.double().numpy(), (sigma, sigma, 0), mode="nearest") for image in images]
    difference = corrupt(images, "blur", range(2)).double().numpy() - np.stack(wanted)
    assert np.abs(difference).max() <= 0.51  # rounded to whole values


def test_no_blur_at_severity_zero():
    images = pictures()
    assert torch.equal(corrupt(images, "blur", range(3), severity=0.0), images)


def test_contrast_by_hand():
    image = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    image[0, 0, 0] = torch.tensor([200, 40, 0])  # means 50, 10, 0
    spoilt = corrupt(image, "contrast", [0])
    assert spoilt[0, 0, 0].tolist() == [95, 19, 0]  # 50 + 0.3 * 150, 10 + 0.3 * 30
    assert spoilt[0, 1, 1].tolist() == [35, 7, 0]


def test_shift_by_whole_pixels_brings_in_black(monkeypatch):
    image = pictures(1)[0].clamp_min(1)
    moved = shift_and_turn(monkeypatch, image, 0, 1, -0.5)  # 4 pixels left, 2 down
    assert (moved[2:, :-4].int() - image[:-2, 4:].int()).abs().max() <= 1
    assert moved[:2].max() == 0 and moved[:, -4:].max() == 0


@pytest.mark.parametrize("turn", [1.0, -0.6])
def test_rotation_is_pils(monkeypatch, turn):
    image = pictures(1, seed=5)[0]
    turned = shift_and_turn(monkeypatch, image, turn, 0, 0)
    wanted = np.asarray(Image.fromarray(image.numpy()).rotate(20 * turn, Image.Resampling.BILINEAR))
    inside = slice(8, 24)  # PIL and torch differ in how they fade at the border
    assert np.abs(turned.numpy()[inside, inside].astype(int) - wanted[inside, inside]).max() <= 2
    assert np.abs(image.numpy()[inside, inside].astype(int) - wanted[inside, inside]).max() > 20


def test_refuses_unknown_names_and_other_images():
    images = pictures()
    with pytest.raises(UsageError, match=r"no corruption 'fog'; there are noise, blur, contrast, shift-rotate"):
        corrupt(images, "fog", range(3))
    with pytest.raises(ValueError, match="uint8"):
        corrupt(images.float(), "blur", range(3))
    with pytest.raises(ValueError, match="3 images came with 2 numbers"):
        corrupt(images, "blur", range(2))
