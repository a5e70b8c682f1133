"""Boxes are distributed as torchvision's, and cut as PIL cuts them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from trainer.data import crops, hashing
from trainer.data.augmentations import AUGMENTATIONS, PLAIN, Augmentation

CROP = Augmentation(scale=(0.08, 1.0), flip=0.5)


def uniforms(count: int, seed: int = 0) -> np.ndarray:
    return hashing.uniforms(seed, np.arange(count), count=crops.DRAWS)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A photograph's like: soft blobs, an edge and some noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(height // 12, 1), max(width // 12, 1), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    image[:, width // 2 :] *= 0.6
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


# Boxes


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 500), (640, 200), (100, 900)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]):
    count = 2000
    boxes, _ = crops.draw(uniforms(count), height, width, Augmentation(scale=scale))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])
    area, their_area = boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3]
    for ours, other in [*zip(boxes.T, theirs.T, strict=True), (area, their_area)]:
        assert stats.ks_2samp(ours, other, method="asymp").pvalue > 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (7, 1000), (1000, 3)])
def test_fallback_box_is_torchvisions(height: int, width: int):
    scale = (0.9, 1.0)  # of so thin an image no allowed box has that area
    boxes, _ = crops.draw(uniforms(20), height, width, Augmentation(scale=scale))
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), [3 / 4, 4 / 3])
    assert (boxes == np.array(theirs)).all()


def test_square_boxes_are_the_references():
    # One attempt by hand: side = sqrt(area * ratio), for both sides.
    u = np.full((1, crops.DRAWS), 0.5)
    boxes, flips = crops.draw(u, 300, 300, AUGMENTATIONS["diffmix"].views[0])
    side = round(np.sqrt(300 * 300 * (0.08 + 0.5 * 0.92) * 1.0))
    start = int(0.5 * (300 - side + 1))
    assert boxes.tolist() == [[start, start, side, side]]
    assert not flips[0]
    boxes, _ = crops.draw(uniforms(500), 375, 500, AUGMENTATIONS["diffmix"].views[0])
    assert (boxes[:, 2] == boxes[:, 3]).all()
    assert len(np.unique(boxes[:, 2])) > 100


def test_without_scale_the_central_square():
    boxes, flips = crops.draw(uniforms(2), np.array([300, 500]), np.array([500, 301]), PLAIN)
    assert boxes.tolist() == [[0, 100, 300, 300], [99, 0, 301, 301]]
    assert not flips.any()


def test_flips_are_as_likely_as_asked():
    _, flips = crops.draw(uniforms(4000), 10, 10, CROP)
    assert stats.binomtest(int(flips.sum()), 4000, 0.5).pvalue > 0.001


@settings(deadline=None, max_examples=200)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.floats(0.01, 1),
    square=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_boxes_lie_inside_every_image(height: int, width: int, low: float, square: bool, seed: int):
    u = np.concatenate([uniforms(20, seed), np.zeros((1, crops.DRAWS)), np.full((1, crops.DRAWS), 1 - 2**-53)])
    boxes, _ = crops.draw(u, height, width, Augmentation(scale=(low, 1.0), square=square))
    top, left, rows, columns = boxes.T
    assert boxes.dtype == np.int32
    assert min(top.min(), left.min()) >= 0
    assert min(rows.min(), columns.min()) >= 1
    assert (top + rows).max() <= height
    assert (left + columns).max() <= width


def test_each_box_depends_on_its_own_numbers_alone():
    u = uniforms(12)
    heights, widths = np.arange(50, 62), np.arange(90, 78, -1)
    boxes, flips = crops.draw(u, heights, widths, CROP)
    shaped, shaped_flips = crops.draw(u.reshape(3, 4, -1), heights.reshape(3, 4), widths.reshape(3, 4), CROP)
    alone, _ = crops.draw(u[5], 55, 85, CROP)
    assert (shaped.reshape(12, 4) == boxes).all()
    assert (shaped_flips.reshape(12) == flips).all()
    assert (alone == boxes[5]).all()


# Pixels


CUTS = [
    # height, width, box, size
    (375, 500, (10, 20, 300, 320), 224),
    (375, 500, (0, 0, 375, 500), 224),
    (375, 500, (100, 200, 110, 90), 224),  # enlarged
    (375, 500, (350, 470, 25, 30), 96),  # in the corner
    (375, 500, (3, 5, 224, 224), 224),  # neither
    (375, 500, (0, 100, 370, 120), 96),  # far smaller, in one direction more
    (900, 1200, (50, 50, 800, 1100), 64),  # many pixels for one
    (32, 32, (4, 3, 20, 24), 32),
    (32, 32, (31, 31, 1, 1), 32),
    (40, 3, (0, 1, 40, 1), 16),
    (8, 8, (2, 2, 2, 3), 7),
]


@pytest.mark.parametrize(("height", "width", "box", "size"), CUTS)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("interpolation", crops.INTERPOLATIONS)
def test_cut_is_pils(
    height: int, width: int, box: tuple[int, int, int, int], size: int, flip: bool, interpolation: crops.Interpolation
):
    image = smooth(height, width)
    top, left, rows, columns = box
    out = np.empty((size, size, 3), dtype=np.uint8)
    crops.cut(image, np.array(box, dtype=np.int32), flip, out, interpolation)
    cropped = Image.fromarray(image).crop((left, top, left + columns, top + rows))
    expected = np.asarray(cropped.resize((size, size), Image.Resampling[interpolation.upper()]))
    assert psnr(out, expected[:, ::-1] if flip else expected) >= 50
    assert np.abs(out.astype(int) - (expected[:, ::-1] if flip else expected)).max() <= (
        2 if interpolation == "bilinear" else 3
    )


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    level=st.integers(0, 255),
    size=st.integers(1, 40),
    interpolation=st.sampled_from(crops.INTERPOLATIONS),
)
def test_a_single_colour_stays_itself(data: st.DataObject, level: int, size: int, interpolation: crops.Interpolation):
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns))
    image = np.full((height, width, 3), level, dtype=np.uint8)
    out = np.empty((size, size, 3), dtype=np.uint8)
    crops.cut(image, np.array([top, left, rows, columns], dtype=np.int32), False, out, interpolation)
    assert (out == level).all()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(1, 40))
def test_bicubic_of_any_pixels_is_keys_cubic(data: st.DataObject, size: int):
    """Hard edges too, where cubics leave 0..255."""
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    image = np.random.default_rng(data.draw(st.integers(0, 99))).choice([0, 255], (height, width, 3)).astype(np.uint8)
    out = np.empty((size, size, 3), dtype=np.uint8)
    box = np.array([0, 0, height, width], dtype=np.int32)
    crops.cut(image, box, False, out, "bicubic")
    assert np.abs(out - float_bicubic(image, size)).max() <= 0.51


def float_bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """By the definition: both axes as matrices of Keys' cubic, in float64."""

    def matrix(length: int) -> np.ndarray:
        scale = length / size
        stretch = max(scale, 1.0)
        centres = (np.arange(size)[:, None] + 0.5) * scale
        x = np.abs(np.arange(length) + 0.5 - centres) / stretch
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        return weights / weights.sum(1, keepdims=True)

    return np.clip(np.einsum("ih,hwc,jw->ijc", matrix(len(image)), image, matrix(image.shape[1])), 0, 255)


def test_an_image_of_one_pixel():
    image = np.array([[[1, 128, 255]]], dtype=np.uint8)
    out = np.empty((5, 5, 3), dtype=np.uint8)
    crops.cut(image, np.array([0, 0, 1, 1], dtype=np.int32), True, out)
    assert (out == image).all()


def test_nothing_outside_the_box_is_seen():
    image = np.full((20, 20, 3), 255, dtype=np.uint8)
    image[5:15, 5:15] = 100
    out = np.empty((30, 30, 3), dtype=np.uint8)
    crops.cut(image, np.array([5, 5, 10, 10], dtype=np.int32), False, out)
    assert (out == 100).all()


def test_cut_of_a_view_that_is_not_contiguous():
    image = smooth(40, 80)
    box = np.array([1, 2, 30, 35], dtype=np.int32)
    one, two = np.empty((2, 16, 16, 3), dtype=np.uint8)
    crops.cut(image[:, ::2], box, False, one)
    crops.cut(image[:, ::2].copy(), box, False, two)
    assert (one == two).all()


def test_cut_many_equals_cut():
    images = np.stack([smooth(32, 40, seed) for seed in range(5)])
    index = np.random.default_rng(0).integers(0, 5, 40)
    boxes, flips = crops.draw(uniforms(40), 32, 40, CROP)
    many = np.empty((40, 32, 32, 3), dtype=np.uint8)
    crops.cut_many(images, index, boxes, flips, 32, many)
    one = np.empty((32, 32, 3), dtype=np.uint8)
    for m in range(40):
        crops.cut(images[index[m]], boxes[m], flips[m], one)
        assert (many[m] == one).all()


@pytest.mark.parametrize("box", [(0, 0, 33, 1), (0, 0, 1, 33), (-1, 0, 4, 4), (0, 30, 4, 4), (0, 0, 0, 4)])
def test_boxes_that_leave_the_image_are_refused(box: tuple[int, int, int, int]):
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    out = np.empty((2, 8, 8, 3), dtype=np.uint8)
    boxes = np.array([(0, 0, 8, 8), box], dtype=np.int32)
    with pytest.raises(ValueError, match="leaves the image"):
        crops.cut(image, boxes[1], False, out[0])
    with pytest.raises(ValueError, match="leaves the image"):
        crops.cut_many(image[None], np.zeros(2, np.int64), boxes, np.zeros(2, np.bool_), 8, out)


def test_targets_with_gaps_are_refused():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="contiguous"):
        crops.cut(image, np.array([0, 0, 8, 8], np.int32), False, np.zeros((4, 8, 3), np.uint8)[:, ::2])


def test_cut_many_refuses_an_index_that_is_none():
    boxes = np.array([(0, 0, 8, 8)], dtype=np.int32)
    out = np.empty((1, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="index"):
        crops.cut_many(np.zeros((2, 8, 8, 3), np.uint8), np.array([2]), boxes, np.array([False]), 8, out)
