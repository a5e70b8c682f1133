"""Policies whose items are the rows of the set: real images, variations, or pairs of both."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.data import hashing
from trainer.data.image_set import ImageSet
from trainer.data.mixing.config import MixConfig
from trainer.data.mixing.policy import Assignment, Policy
from trainer.data.mixing.sampling import PURPOSE, Sampler, choose
from trainer.data.mixing.weights import weights_of
from trainer.data.rows import REAL

VARIATIONS = ("variation", "same_variation")  # settings that `ByRow.variations` reads


class Shown(NamedTuple):
    """B items and the rows that they show."""

    items: NDArray[np.int64]  # [B]
    rows: NDArray[np.int64]  # [B]
    epoch: int
    seed: int


class ByRow(Policy):
    """As many items as rows, each of which comes once an epoch, or where weighted, as often as its weight says.

    The weight of a row is the mean of its variations', or that of `mix.variation`; of its variations each is drawn in
    proportion to its own.
    """

    reads_weighted = (*Policy.reads_weighted, "variation")

    def __init__(self, config: MixConfig, rows: ImageSet) -> None:
        super().__init__(config, rows)
        self._weights: NDArray[np.float64] | None = None  # [N, K], of a column of the variations
        self._sampler: Sampler | None = None
        if config.weight is not None:
            variation = None if config.variation == "random" else config.variation
            weights = weights_of(config.weight, config.weight_power, rows, variation)
            self._weights = weights if weights.ndim == 2 else None
            self._sampler = Sampler(weights if weights.ndim == 1 else weights.mean(1))

    @property
    def num_items(self) -> int:
        return len(self.sets[0])

    def locate(self, items: NDArray[np.int64], epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        rows = items if self._sampler is None else self._sampler.places(items, epoch, seed)
        return rows, np.zeros(len(items), np.int8)

    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        rows, where = self.locate(items, epoch, seed)
        images = self.images(Shown(items, rows, epoch, seed), num_crops, num_local_crops)
        return Assignment(rows, where, images, self.plain(images))

    @abstractmethod
    def images(self, shown: Shown, num_crops: int, num_local_crops: int) -> NDArray[np.int16]:
        """The image of its row that each view of an item is cut from: int16 [V + W, B]."""

    def plain(self, images: NDArray[np.int16]) -> NDArray[np.bool_]:
        """Which views are resized and cut only, [V + W, B]."""
        return np.zeros(images.shape, np.bool_)

    def variations(self, shown: Shown, views: int, first: int = 0) -> NDArray[np.int16]:
        """Variation for each view, int16 [views, B], from the draws after `first` others."""
        shape = (views, len(shown.items))
        if self.config.variation != "random":
            return np.full(shape, self.config.variation, np.int16)
        draws = hashing.uniforms(shown.seed, shown.epoch, shown.items, PURPOSE, count=first + views)[:, first:].T
        if self._weights is None:
            drawn = (draws * self.sets[0].num_variations).astype(np.int16)
        else:
            drawn = choose(self._weights[shown.rows], draws)
        return np.broadcast_to(drawn[0], shape) if self.config.same_variation else drawn


class RealOnly(ByRow):
    """All views of the real image."""

    needs = ("real",)

    def images(self, shown: Shown, num_crops: int, num_local_crops: int) -> NDArray[np.int16]:
        return np.full((num_crops + num_local_crops, len(shown.items)), REAL, np.int16)


class SyntheticOnly(ByRow):
    """All views of a variation."""

    reads = (*ByRow.reads, *VARIATIONS)
    needs = ("synthetic",)

    def images(self, shown: Shown, num_crops: int, num_local_crops: int) -> NDArray[np.int16]:
        return self.variations(shown, num_crops + num_local_crops)


class DiffMix(ByRow):
    """Some views real, some synthetic: MixDiff (arXiv 2406.12368), one of two, or 1 + 1 global and 6 + 2 local."""

    reads = (
        *ByRow.reads,
        *VARIATIONS,
        *("synthetic_view", "probability", "augment_synthetic", "synthetic_crops", "synthetic_local_crops"),
    )
    needs = ("real", "synthetic")

    def check_views(self, num_crops: int, num_local_crops: int) -> None:
        if self.config.synthetic_crops > num_crops:
            raise UsageError(
                f"mix.synthetic_crops is {self.config.synthetic_crops}, but the method takes {num_crops} crops of an "
                f"image; give a number from 0 to {num_crops}"
            )

    def plain(self, images: NDArray[np.int16]) -> NDArray[np.bool_]:
        return (images != REAL) & (not self.config.augment_synthetic)

    def images(self, shown: Shown, num_crops: int, num_local_crops: int) -> NDArray[np.int16]:
        views = num_crops + num_local_crops
        draws = hashing.uniforms(shown.seed, shown.epoch, shown.items, PURPOSE, count=1 + views).T
        ranks = draws[1:]
        synthetic = np.concatenate(
            [
                self._choose(ranks[:num_crops], self.config.synthetic_crops),
                self._choose(ranks[num_crops:], self.config.synthetic_local_crops),
            ]
        )
        synthetic &= draws[0] < self.config.probability
        variations = self.variations(shown, views, first=1 + views)
        return np.where(synthetic, variations, np.int16(REAL))

    def _choose(self, draws: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
        """Mask, bool [views, B], of `count` views of each item; draws [views, B] choose them if at random."""
        views = len(draws)
        if self.config.synthetic_view == "random":
            return draws.argsort(axis=0).argsort(axis=0) < count
        number = np.arange(views)[:, None]
        chosen = number < count if self.config.synthetic_view == "first" else number >= views - count
        return np.broadcast_to(chosen, draws.shape).copy()
