"""The loader's baseline: webdataset reads the tar, PIL decodes, torchvision's v1 transforms augment PIL images.

Blur is PIL's, as in the code of DINO, MoCo, solo-learn and lightly: on the CPU several times faster than torchvision's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

from trainer.data.augmentations import Augmentation
from trainer.data.view_plan import ViewConfig

Transform = Callable[[Image.Image], Tensor]
Views = Callable[[Sequence[Image.Image]], list[Tensor]]  # from the images of a sample


def transform(augmentation: Augmentation, size: int, config: ViewConfig) -> Transform:
    """One view, float32 [3, size, size], by the operations of `augmentation` with their probabilities."""
    assert augmentation.scale is not None, "the baseline cuts at random"
    crop = transforms.RandomResizedCrop(size, augmentation.scale, augmentation.ratio)
    steps: list[Callable[[Any], Any]] = [crop, transforms.RandomHorizontalFlip(augmentation.flip)]
    if augmentation.jitter:
        strengths = (augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
        steps.append(transforms.RandomApply([transforms.ColorJitter(*strengths)], augmentation.jitter))
    if augmentation.grayscale:
        steps.append(transforms.RandomGrayscale(augmentation.grayscale))
    if augmentation.blur:
        steps.append(transforms.RandomApply([_Blur(augmentation.blur_sigma)], augmentation.blur))
    if augmentation.solarize:
        steps.append(transforms.RandomSolarize(augmentation.solarize_threshold, augmentation.solarize))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])


class _Blur:
    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))  # noqa: S311  not for secrets


def from_tar(path: str, members: Sequence[str], views: Views, batch_size: int) -> Iterable[list[Tensor]]:
    """Batches of one pass over a shard: a tensor [B, 3, S, S] for each view of the `members` of its samples."""
    import webdataset

    def sample(images: Sequence[Image.Image]) -> list[Tensor]:
        return views(images)

    data = webdataset.WebDataset([path], shardshuffle=False).decode("pil").to_tuple(*members).map(sample)
    batches: Iterable[list[Tensor]] = data.batched(batch_size, collation_fn=default_collate, partial=False)
    return batches


def from_memory(images: Sequence[Image.Image], views: Views, batch_size: int) -> Iterable[list[Tensor]]:
    """The same over decoded images in memory, through torch's DataLoader in this process."""
    loader: Iterable[list[Tensor]] = DataLoader(
        _InMemory(images, views), batch_size=batch_size, shuffle=True, drop_last=True
    )
    return loader


class _InMemory(Dataset[list[Tensor]]):
    def __init__(self, images: Sequence[Image.Image], views: Views) -> None:
        self.images = images
        self.views = views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.views([self.images[index]])


def endless(batches: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Pass after pass."""
    while True:
        yield from batches


def seed(number: int) -> None:
    """Of both generators that the transforms draw from."""
    random.seed(number)
    torch.manual_seed(number)
