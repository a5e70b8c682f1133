"""Policies whose items are images: all views of an item show the same one, real or generated, without pairing."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.data.image_set import ImageSet
from trainer.data.mixing.config import MixConfig
from trainer.data.mixing.policy import Assignment, Policy
from trainer.data.mixing.sampling import Sampler
from trainer.data.mixing.weights import weights_of
from trainer.data.rows import REAL, Rows


class Images(NamedTuple):
    """One image for each of B items."""

    rows: NDArray[np.int64]  # [B]
    set: NDArray[np.int8]  # [B]
    numbers: NDArray[np.int64]  # [B]: of the image in its row


class ByImage(Policy):
    """Weights are of the generated images among themselves: the share of real ones is that of the policy.

    That of a row, where a column is of rows, is the weight of each of its variations.
    """

    def __init__(self, config: MixConfig, rows: ImageSet) -> None:
        super().__init__(config, rows)
        self.sets = self.open_sets(rows)
        self._sampler = None if config.weight is None else self._weighted(config.weight)

    def open_sets(self, rows: ImageSet) -> tuple[ImageSet, ...]:
        """The pair set, and where they come from another one, that of the generated images."""
        return (rows,)

    @abstractmethod
    def find(self, items: NDArray[np.int64], epoch: int, seed: int) -> Images:
        """The image that each item, [B], shows."""

    def locate(self, items: NDArray[np.int64], epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        rows, where, _ = self.find(items, epoch, seed)
        return rows, where

    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        rows, where, numbers = self.find(items, epoch, seed)
        images = np.broadcast_to(numbers.astype(np.int16), (num_crops + num_local_crops, len(items)))
        return Assignment(rows, where, images, np.zeros(images.shape, np.bool_))

    @property
    def num_generated(self) -> int:
        """Generated images of an epoch, all of them."""
        return len(self.sets[-1]) * self.sets[-1].num_variations

    def generated(
        self, number: NDArray[np.int64], epoch: int, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and variation of generated images by number, [B]: those of row 0, then those of row 1 and so on."""
        if self._sampler is not None:
            number = self._sampler.places(number, epoch, seed)
        return np.divmod(number, self.sets[-1].num_variations)

    def _weighted(self, column: str) -> Sampler:
        weights = weights_of(column, self.config.weight_power, self.sets[-1])
        if weights.ndim == 1:
            weights = weights.repeat(self.sets[-1].num_variations)
        return Sampler(weights.ravel())


class Union(ByImage):
    """Every real image and every variation is an item of its own: item = row x (1 + K) + image + 1."""

    needs = ("real", "synthetic")

    @property
    def num_items(self) -> int:
        return len(self.sets[0]) + self.num_generated

    def find(self, items: NDArray[np.int64], epoch: int, seed: int) -> Images:
        rows, image = np.divmod(items, 1 + self.sets[0].num_variations)
        number = np.maximum(0, items - rows - 1)  # of the generated images: those of no real one before it
        of_generated, variation = self.generated(number, epoch, seed)
        is_real = image == 0
        rows = np.where(is_real, rows, of_generated)
        return Images(rows, np.zeros(len(items), np.int8), np.where(is_real, REAL, variation))


class Inflate(ByImage):
    """AdaInf (arXiv 2403.12448): the real images `replicas` times, then every generated image once."""

    reads = (*ByImage.reads, "replicas", "generated")

    def __init__(self, config: MixConfig, rows: ImageSet) -> None:
        self.needs = ("real",) if config.generated else ("real", "synthetic")
        super().__init__(config, rows)

    def open_sets(self, rows: ImageSet) -> tuple[ImageSet, ...]:
        if not self.config.generated:
            return (rows,)
        generated = Rows.open(self.config.generated)
        if not generated.has_synthetic:
            raise UsageError(
                f"mix.generated={self.config.generated} has no synthetic images; give a pair set with some, as "
                "`pipeline generate` or `pipeline pack` makes them"
            )
        return (rows, generated)

    @property
    def num_items(self) -> int:
        return self._num_real + self.num_generated

    @property
    def _num_real(self) -> int:
        return self.config.replicas * len(self.sets[0])

    def find(self, items: NDArray[np.int64], epoch: int, seed: int) -> Images:
        is_real = items < self._num_real
        of_generated, variation = self.generated(np.maximum(0, items - self._num_real), epoch, seed)
        where = np.where(is_real, 0, len(self.sets) - 1).astype(np.int8)
        rows = np.where(is_real, items % len(self.sets[0]), of_generated)
        return Images(rows, where, np.where(is_real, REAL, variation))
