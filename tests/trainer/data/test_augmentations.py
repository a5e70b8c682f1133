"""The named sets: their numbers against the papers' tables, and that all of them can be drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from trainer.data import colours, crops, hashing
from trainer.data.augment import augment
from trainer.data.augmentations import AUGMENTATIONS, LOCAL_SCALE, PLAIN, Augmentation, AugmentationSet

STRENGTHS = {
    # name: scale, jitter, (brightness, contrast, saturation, hue), grayscale, blur and solarise of each view
    "weak": ((0.2, 1.0), 0.4, (0.4, 0.4, 0.4, 0.1), 0.2, [(0.5, 0)]),
    "weak-asymmetric": ((0.2, 1.0), 0.4, (0.4, 0.4, 0.2, 0.1), 0.2, [(0, 0), (0, 0.2)]),
    "symmetric": ((0.08, 1.0), 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, [(0.5, 0)]),
    "simclr": ((0.08, 1.0), 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, [(0.5, 0)]),
    "simclr-cifar": ((0.08, 1.0), 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, [(0, 0)]),
    "barlow-twins": ((0.08, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, [(1, 0), (0.1, 0.2)]),
    "barlow-twins-cifar": ((0.08, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, [(0, 0), (0, 0.2)]),
    "swav": ((0.14, 1.0), 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, [(0.5, 0)]),
    "dino": ((0.4, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, [(1, 0), (0.1, 0.2)]),
    "mae": ((0.2, 1.0), 0.0, (0.0, 0.0, 0.0, 0.0), 0.0, [(0, 0)]),
    "diffmix": ((0.08, 1.0), 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, [(1, 0), (0, 0.2)]),
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_published_numbers(name: str):
    scale, jitter, strengths, gray, views = STRENGTHS[name]
    found = AUGMENTATIONS[name].views
    assert [(view.blur, view.solarize) for view in found] == views
    for view in found:
        assert (view.scale, view.jitter, view.grayscale, view.flip) == (scale, jitter, gray, 0.5)
        assert (view.brightness, view.contrast, view.saturation, view.hue) == strengths


def test_local_crops_of_dino():
    local = AUGMENTATIONS["dino"].local
    assert local is not None
    assert local.scale == LOCAL_SCALE == (0.05, 0.4)
    assert (local.blur, local.solarize) == (0.5, 0)


def test_local_crops_of_swav_are_its_full_ones_but_smaller():
    chosen = AUGMENTATIONS["swav"]
    assert chosen.local == replace(chosen.views[0], scale=(0.05, 0.14))


@pytest.mark.parametrize(
    ("name", "size"),
    [("symmetric", 32), ("weak", 32), ("dino", 32), ("dino", 16), ("dino", 96), ("swav", 96)],
)
def test_blurs_of_codes_that_use_pil_are_as_wide_as_theirs(name: str, size: int):
    chosen = AUGMENTATIONS[name]
    view = replace(chosen.local or chosen.views[0], blur=1.0, blur_sigma=(2.0, 2.0))
    drawn = replace(view, jitter=0.0, grayscale=0.0)
    dot = np.zeros((1, size, size, 3), np.uint8)
    dot[0, size // 2, size // 2] = 255
    blurred = augment(
        torch.from_numpy(dot), colours.draw(np.zeros((1, colours.DRAWS)), drawn, size), (0,) * 3, (1,) * 3
    )
    ours = blurred[0, 0].numpy()
    theirs = np.asarray(Image.fromarray(dot[0]).filter(ImageFilter.GaussianBlur(2.0)))[..., 0] / 255
    assert spread(ours) == pytest.approx(2.0, rel=0.01)
    assert np.abs(ours - theirs).max() < 0.005


def spread(dot: np.ndarray) -> float:
    """Standard deviation along x of what a dot became."""
    weights = dot.sum(0) / dot.sum()
    offsets = np.arange(len(weights)) - len(weights) // 2
    return float(np.sqrt((weights * offsets**2).sum()))


def test_only_diffmix_cuts_squares():
    square = {name for name, one in AUGMENTATIONS.items() for view in one.views if view.square}
    assert square == {"diffmix"}
    assert AUGMENTATIONS["diffmix"].views[0].blur_kernel == (5, 9)


def test_none_is_plain_and_the_default():
    assert AUGMENTATIONS["none"].views == (PLAIN,)
    assert Augmentation() == PLAIN


def every_view() -> list[tuple[str, Augmentation]]:
    def views(one: AugmentationSet) -> list[Augmentation]:
        return [*one.views, *([one.local] if one.local else [])]

    return [(name, view) for name, one in AUGMENTATIONS.items() for view in views(one)]


@pytest.mark.parametrize(("name", "view"), every_view())
def test_every_view_can_be_drawn_and_says_its_source(name: str, view: Augmentation):
    u = hashing.uniforms(1, np.arange(50), count=max(crops.DRAWS, colours.DRAWS))
    boxes, flips = crops.draw(u[:, : crops.DRAWS], 50, 70, view)
    drawn = colours.draw(u[:, : colours.DRAWS], view, 32)
    assert boxes.shape == (50, 4)
    assert flips.shape == drawn.shape == (50,)
    assert AUGMENTATIONS[name].source
