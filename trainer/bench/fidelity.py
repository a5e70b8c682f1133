"""How near the fast paths come to what they replace: torchvision's colours on floats, PIL's decoding and resizing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from manifests.shard import EncodedImage
from trainer.bench import photos
from trainer.bench.figures import Figure, Goal, Say, Settings
from trainer.data import colours, crops, hashing, images
from trainer.data.augment import augment
from trainer.data.augment_cpu import augment_cpu
from trainer.data.augmentations import AUGMENTATIONS, Augmentation
from trainer.data.colours import BRIGHTNESS, CONTRAST, HUE, OFF, SATURATION, Colours

_SIZE = 224
_VIEWS, _BOXES = 128, 400
_AS_IT_IS = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std: results stay on [0, 1]

NEAR = Goal(bound=0.5, of="ours", at_least=False)
EXACT = Goal(bound=45, of="ours")

# The strongest augmentation with every operation that there is, each with the others and without them.
COLOURS = replace(AUGMENTATIONS["simclr"].views[0], solarize=0.2)


def measure(settings: Settings, say: Say) -> list[Figure]:
    """Grey levels and decibels."""
    say("fidelity: colours against torchvision, crops against PIL")
    views, boxes = (16, 40) if settings.quick else (_VIEWS, _BOXES)
    found = photos.photographs(8) if settings.images is None else photos.read_tar(settings.images, 64)
    return [*colour_figures(found, views), *crop_figures(found, boxes)]


def colour_figures(found: Sequence[EncodedImage], count: int, size: int = _SIZE) -> list[Figure]:
    """Mean absolute differences over `count` views with the same parameters in the same order."""
    pixels, drawn = _views(found, count, size), _drawn(count, COLOURS, size)
    wanted = torchvision_colours(pixels, drawn)
    ours = np.empty((count, 3, size, size), np.float32)
    augment_cpu(pixels, drawn, *_AS_IT_IS, ours)
    batched = augment(torch.from_numpy(pixels), drawn, *_AS_IT_IS)
    what = f"{count} views of {size} px, blur on {int((drawn.sigma > 0).sum())} of them"
    return [
        _level_figure("colours on the CPU", torch.from_numpy(ours), wanted, what),
        _level_figure("colours batched on the device", batched, wanted, what),
    ]


def _level_figure(name: str, ours: Tensor, wanted: Tensor, what: str) -> Figure:
    levels = 255 * (ours - wanted).abs().mean((1, 2, 3))
    note = f"{what}; the worst view {float(levels.max()):.2g}"
    return Figure(
        name=f"{name}, mean difference to torchvision's float chain",
        ours=float(levels.mean()),
        unit="grey levels",
        goal=NEAR,
        note=note,
    )


def crop_figures(found: Sequence[EncodedImage], count: int, size: int = _SIZE) -> list[Figure]:
    """Peak signal-to-noise ratios of `count` random crops, decoding included."""
    ratios = crop_psnr(found, count, size)
    what = f"{count} random boxes of {len(found)} JPEGs, {size} px, decoding included"
    return [
        Figure(name="crop against PIL bilinear, the worst", ours=min(ratios), unit="dB", goal=EXACT, note=what),
        Figure(name="crop against PIL bilinear, the median", ours=float(np.median(ratios)), unit="dB", goal=EXACT),
    ]


def crop_psnr(found: Sequence[EncodedImage], count: int, size: int) -> list[float]:
    """Decibels of each crop; equal ones count as a difference of a level in one value."""
    ratios = []
    for number in range(count):
        data = found[number % len(found)].data
        pixels = images.decode(data)
        box, flip = _box(pixels, number)
        ours = np.empty((size, size, 3), np.uint8)
        crops.cut(pixels, box, flip, ours)
        error = np.square(ours.astype(np.float64) - pil_crop(data, box, flip, size)).mean()
        ratios.append(float(10 * np.log10(255**2 / max(error, 1 / ours.size))))
    return ratios


def pil_crop(data: bytes, box: NDArray[np.int32], flip: bool, size: int) -> NDArray[np.uint8]:
    """The same view as PIL makes it from the file."""
    top, left, rows, columns = map(int, box)
    with Image.open(io.BytesIO(data)) as image:
        cut = image.convert("RGB").crop((left, top, left + columns, top + rows))
    resized = cut.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized)


def _box(pixels: NDArray[np.uint8], number: int) -> tuple[NDArray[np.int32], bool]:
    draws = hashing.uniforms(0, 0, np.array([number]), 0, count=crops.DRAWS)
    boxes, flips = crops.draw(draws, pixels.shape[0], pixels.shape[1], COLOURS)
    return boxes[0], bool(flips[0])


def _views(found: Sequence[EncodedImage], count: int, size: int) -> NDArray[np.uint8]:
    pixels = np.empty((count, size, size, 3), np.uint8)
    for number in range(count):
        image = images.decode(found[number % len(found)].data)
        crops.cut(image, *_box(image, number), pixels[number])
    return pixels


def _drawn(count: int, augmentation: Augmentation, size: int) -> Colours:
    return colours.draw(hashing.uniforms(1, 0, np.arange(count), 0, count=colours.DRAWS), augmentation, size)


def torchvision_colours(pixels: NDArray[np.uint8], drawn: Colours) -> Tensor:
    """Torchvision's functions one view after the other: float32 [N, 3, S, S] on [0, 1] from uint8 [N, S, S, 3]."""
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return torch.stack([_torchvision_view(image, drawn[number]) for number, image in enumerate(floats)])


def _torchvision_view(image: Tensor, drawn: Colours) -> Tensor:
    if drawn.jitter:
        for operation in drawn.order.tolist():
            image = _operate(image, operation, drawn)
    if drawn.gray:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if drawn.sigma > 0:
        image = tv.gaussian_blur(image, drawn.kernel.tolist(), [float(drawn.sigma)] * 2)
    if drawn.threshold < OFF:
        image = tv.solarize(image, float(drawn.threshold) / 255)
    return image


def _operate(image: Tensor, operation: int, drawn: Colours) -> Tensor:
    adjust = {
        BRIGHTNESS: lambda: tv.adjust_brightness(image, float(drawn.brightness)),
        CONTRAST: lambda: tv.adjust_contrast(image, float(drawn.contrast)),
        SATURATION: lambda: tv.adjust_saturation(image, float(drawn.saturation)),
        HUE: lambda: tv.adjust_hue(image, float(drawn.hue)),
    }
    return adjust[operation]()
