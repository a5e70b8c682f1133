"""Both ways to colour a batch against torchvision's functions on float tensors, image by image."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv  # the first generation of transforms, on float tensors
from PIL import Image

from trainer.data import colours as parameters
from trainer.data import hashing
from trainer.data.augment import augment
from trainer.data.augment_cpu import augment_cpu
from trainer.data.augmentations import AUGMENTATIONS, PLAIN, Augmentation
from trainer.data.colours import OFF, Colours

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ALL = Augmentation(
    jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2, blur=0.5, solarize=0.3
)
Run = Callable[[np.ndarray, Colours], np.ndarray]


def on_device(images: np.ndarray, colours: Colours) -> np.ndarray:
    return augment(torch.from_numpy(images), colours, MEAN, STD).numpy()


def on_cpu(images: np.ndarray, colours: Colours) -> np.ndarray:
    out = np.full((len(images), 3, *images.shape[1:3]), np.nan, dtype=np.float32)
    augment_cpu(images, colours, MEAN, STD, out)
    return out


both = pytest.mark.parametrize("run", [on_device, on_cpu])


def photographs(count: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    images = []
    for _ in range(count):
        small = rng.integers(0, 256, (max(size // 8, 2), max(size // 8, 2), 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)).astype(float)
        images.append(np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8))
    images[0][: size // 2] = 255  # flat, grey and saturated parts
    images[0][size // 2 :, : size // 2] = (255, 0, 0)
    return np.stack(images)


def drawn(count: int, view: Augmentation, size: int) -> Colours:
    return parameters.draw(hashing.uniforms(7, np.arange(count), count=parameters.DRAWS), view, size)


def torchvisions(image: np.ndarray, one: Colours) -> torch.Tensor:
    """Float [3, S, S] in [0, 1], before normalisation; `one` has no leading dimension."""
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    if one.jitter:
        operations = (
            lambda x: tv.adjust_brightness(x, float(one.brightness)),
            lambda x: tv.adjust_contrast(x, float(one.contrast)),
            lambda x: tv.adjust_saturation(x, float(one.saturation)),
            lambda x: tv.adjust_hue(x, float(one.hue)),
        )
        for operation in one.order:
            x = operations[operation](x)
    if one.gray:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if one.sigma > 0:
        x = tv.gaussian_blur(x, one.kernel.tolist(), [float(one.sigma)] * 2)
    if one.threshold < OFF:
        x = tv.solarize(x, float(one.threshold) / 255)
    return x


def levels(found: np.ndarray, images: np.ndarray, colours: Colours) -> np.ndarray:
    """Absolute difference to torchvision in levels of 255, [N, 3, S, S]."""
    expected = torch.stack([torchvisions(image, colours[n]) for n, image in enumerate(images)])
    shown = found * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    return np.abs(shown - expected.numpy()) * 255


@both
@pytest.mark.parametrize("size", [33, 64])
def test_the_whole_chain(run: Run, size: int):
    images, colours = photographs(48, size), drawn(48, ALL, size)
    difference = levels(run(images, colours), images, colours).mean((1, 2, 3))
    assert difference.mean() < 0.05
    assert difference.max() < 0.5  # a pixel beside the threshold may fall to its other side


@both
def test_without_solarise_no_pixel_is_far(run: Run):
    images = photographs(48, 64)
    colours = drawn(48, replace(ALL, solarize=0.0, blur=0.0), 64)
    assert levels(run(images, colours), images, colours).max() < 0.05


SINGLE = {
    "brightness": Augmentation(jitter=1.0, brightness=0.8),
    "contrast": Augmentation(jitter=1.0, contrast=0.8),
    "saturation": Augmentation(jitter=1.0, saturation=0.8),
    "hue": Augmentation(jitter=1.0, hue=0.5),
    "grayscale": Augmentation(grayscale=1.0),
    "solarise": Augmentation(solarize=1.0),
    "solarise at 1": Augmentation(solarize=1.0, solarize_threshold=1),
    "solarise all": Augmentation(solarize=1.0, solarize_threshold=0),
    "nothing": PLAIN,
}


@both
@pytest.mark.parametrize("name", SINGLE)
def test_each_operation_alone(run: Run, name: str):
    images, colours = photographs(12, 40), drawn(12, SINGLE[name], 40)
    assert levels(run(images, colours), images, colours).max() < 0.02


@both
@pytest.mark.parametrize(
    ("size", "kernel"), [(224, None), (96, None), (32, None), (11, (5, 9)), (64, (1, 7)), (3, (5, 5))]
)
def test_blur(run: Run, size: int, kernel: tuple[int, int] | None):
    images = photographs(6, size)
    colours = drawn(6, Augmentation(blur=1.0, blur_kernel=kernel), size)
    colours.sigma[:3] = (0.1, 1.2, 2.0)
    difference = levels(run(images, colours), images, colours)
    assert difference.mean((1, 2, 3)).max() < 0.05
    assert difference.max() < 0.3


@both
def test_every_order_of_the_jitter(run: Run):
    images = photographs(24, 24)
    colours = drawn(24, replace(ALL, jitter=1.0, grayscale=0.0, blur=0.0, solarize=0.0), 24)
    colours = replace(colours, order=parameters._ORDERS)
    assert levels(run(images, colours), images, colours).max() < 0.05


@both
def test_an_image_does_not_depend_on_its_neighbours(run: Run):
    images, colours = photographs(9, 32), drawn(9, ALL, 32)
    whole = run(images, colours)
    for n in range(9):
        np.testing.assert_allclose(run(images[n : n + 1], colours[n : n + 1])[0], whole[n], atol=2e-5)


@both
def test_images_of_one_pixel(run: Run):
    images, colours = photographs(8, 8)[:, :1, :1].copy(), drawn(8, replace(ALL, solarize=0.0), 1)
    assert levels(run(images, colours), images, colours).max() < 0.05


@both
def test_inputs_are_left_alone(run: Run):
    images, colours = photographs(8, 16), drawn(8, ALL, 16)
    before = images.copy()
    run(images, colours)
    assert (images == before).all()


def test_blocks_of_a_large_batch_join(monkeypatch: pytest.MonkeyPatch):
    images, colours = photographs(7, 16), drawn(7, ALL, 16)
    whole = on_device(images, colours)
    monkeypatch.setattr("trainer.data.augment._BLOCK_PIXELS", 3 * 16 * 16)
    np.testing.assert_allclose(on_device(images, colours), whole, atol=2e-5)


def test_output_of_the_device_path():
    images, colours = torch.from_numpy(photographs(4, 16)), drawn(4, ALL, 16)
    found = augment(images, colours, MEAN, STD, torch.bfloat16)
    assert (found.dtype, found.shape, found.is_contiguous()) == (torch.bfloat16, (4, 3, 16, 16), True)
    exact = augment(images, colours, MEAN, STD)
    assert (found.float() - exact).abs().max() < 0.02


@both
def test_empty_batch(run: Run):
    assert run(np.zeros((0, 8, 8, 3), dtype=np.uint8), drawn(0, ALL, 8)).shape == (0, 3, 8, 8)


def test_threads_work_on_parts_of_a_batch():
    images, colours = photographs(32, 48), drawn(32, ALL, 48)
    whole, parts = on_cpu(images, colours), np.empty((32, 3, 48, 48), dtype=np.float32)

    def part(start: int) -> None:
        chosen = slice(start, start + 4)
        augment_cpu(images[chosen], colours[chosen], MEAN, STD, parts[chosen])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(part, range(0, 32, 4)))
    assert (parts == whole).all()


@pytest.mark.parametrize("out", [np.zeros((2, 3, 8, 16), np.float32)[..., ::2], np.zeros((2, 3, 8, 8))])
def test_targets_that_would_be_copied_are_refused(out: np.ndarray):
    with pytest.raises(ValueError, match="contiguous float32"):
        augment_cpu(photographs(2, 8), drawn(2, ALL, 8), MEAN, STD, out)


@both
def test_wrong_shapes_are_refused(run: Run):
    with pytest.raises(ValueError, match="do not fit"):
        run(photographs(3, 8), drawn(2, AUGMENTATIONS["simclr"].views[0], 8))
