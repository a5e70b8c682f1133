"""What is done to the colours of each view: parameters drawn from uniforms, as arrays over any number of views."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.augmentations import Augmentation

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers of ColorJitter's operations
OFF = 256  # a solarise threshold that no level reaches

_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int8)
DRAWS = 10  # jitter, order, four factors, grayscale, blur, sigma, solarise


@dataclass(frozen=True, slots=True, kw_only=True)
class Colours:
    """Parameters of views [...]; all arrays share the leading dimensions. See `augment` for what they do.

    Without `jitter`, `order` and the factors have no effect.
    """

    jitter: NDArray[np.bool_]  # [...]
    order: NDArray[np.int8]  # [..., 4]: BRIGHTNESS, CONTRAST, SATURATION, HUE in the order of application
    brightness: NDArray[np.float32]  # [...], factors: 1 changes nothing
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]  # [...] turns of the colour circle, in [-0.5, 0.5]
    gray: NDArray[np.bool_]  # [...]
    sigma: NDArray[np.float32]  # [...] pixels; 0: no blur
    kernel: NDArray[np.int16]  # [..., 2] width and height of the blur's kernel, odd pixels
    threshold: NDArray[np.int16]  # [...] levels from which on solarise inverts; OFF: nothing

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading dimensions [...]."""
        return self.jitter.shape

    def __len__(self) -> int:
        return len(self.jitter)

    def __getitem__(self, key: Any) -> Colours:
        """Numpy's indexing of the leading dimensions."""
        return Colours(**{field.name: getattr(self, field.name)[key] for field in fields(self)})

    @staticmethod
    def concatenate(colours: Sequence[Colours]) -> Colours:
        """Along the first dimension."""
        return _join(np.concatenate, colours)

    @staticmethod
    def where(mask: NDArray[np.bool_], a: Colours, b: Colours) -> Colours:
        """`a` where mask [...], else `b`."""
        return _join(lambda arrays: _where(mask, *arrays), (a, b))


def _join(join: Callable[[list[NDArray[Any]]], NDArray[Any]], colours: Sequence[Colours]) -> Colours:
    return Colours(**{field.name: join([getattr(one, field.name) for one in colours]) for field in fields(Colours)})


def _where(mask: NDArray[np.bool_], a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    return np.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)


def draw(u: NDArray[np.float64], augmentation: Augmentation, size: int) -> Colours:
    """Parameters [...] from uniforms [..., DRAWS] in [0, 1), for views of `size` x `size` pixels.

    The distributions are those of torchvision's ColorJitter, RandomGrayscale, GaussianBlur and RandomSolarize, each
    under its own coin.
    """
    shape = u.shape[:-1]
    low, high = augmentation.blur_sigma
    blur = u[..., 7] < augmentation.blur
    return Colours(
        jitter=u[..., 0] < augmentation.jitter,
        order=_ORDERS[(u[..., 1] * len(_ORDERS)).astype(np.int64)],
        brightness=_factor(u[..., 2], augmentation.brightness),
        contrast=_factor(u[..., 3], augmentation.contrast),
        saturation=_factor(u[..., 4], augmentation.saturation),
        hue=((2 * u[..., 5] - 1) * augmentation.hue).astype(np.float32),
        gray=u[..., 6] < augmentation.grayscale,
        sigma=np.where(blur, low + u[..., 8] * (high - low), 0).astype(np.float32),
        kernel=np.broadcast_to(_kernel(augmentation, size), (*shape, 2)),
        threshold=np.where(u[..., 9] < augmentation.solarize, augmentation.solarize_threshold, OFF).astype(np.int16),
    )


def _factor(u: NDArray[np.float64], strength: float) -> NDArray[np.float32]:
    low, high = max(0.0, 1 - strength), 1 + strength
    return (low + u * (high - low)).astype(np.float32)


def _kernel(augmentation: Augmentation, size: int) -> NDArray[np.int16]:
    """Width and height, odd and small enough to be reflected inside the view."""
    sides = augmentation.blur_kernel or (size // 10, size // 10)
    return np.array([min(side // 2, size - 1) * 2 + 1 for side in sides], dtype=np.int16)
