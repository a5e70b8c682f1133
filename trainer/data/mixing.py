"""Mixing policies: which image of which row feeds which view. A policy is one class here, or in a file, and one line.

Everything random is a function of (seed, epoch, item), so that it does not matter who computes it, or when.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.choices import class_of, unknown
from trainer.data import hashing
from trainer.data.image_set import ImageSet
from trainer.data.rows import REAL, Rows

POLICIES: dict[str, str] = {
    "real": "trainer.data.mixing:RealOnly",
    "synthetic": "trainer.data.mixing:SyntheticOnly",
    "diffmix": "trainer.data.mixing:DiffMix",
    "union": "trainer.data.mixing:Union",
    "inflate": "trainer.data.mixing:Inflate",
}

_PURPOSE = -1  # where views have their number: the draws of mixing are apart from those of any view


@dataclass(frozen=True, slots=True, kw_only=True)
class MixConfig:
    """Settings of all policies; each reads its own.

    `synthetic_view` says where the synthetic crops stand among the global ones, and among the local ones. With one
    view, `probability` decides between real and synthetic. Without `same_variation` each synthetic view draws its own.
    """

    policy: str = "diffmix"
    synthetic_view: Literal["second", "first", "random"] = "second"
    probability: float = 1.0  # of an image to have synthetic views at all, each epoch anew
    variation: int | Literal["random"] = "random"  # random: each epoch anew
    augment_synthetic: bool = True  # False: the synthetic views of `diffmix` are resized and cut, nothing else
    synthetic_crops: int = 1
    synthetic_local_crops: int = 2  # at most: all local crops where a method has fewer
    same_variation: bool = True
    replicas: int = 1  # inflate: copies of the real images
    generated: str | None = None  # inflate: the pair set whose variations are added, None: the set itself

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown("policy", self.policy, POLICIES)
        if self.synthetic_view not in ("second", "first", "random"):
            raise unknown("mix.synthetic_view", self.synthetic_view, ("second", "first", "random"))
        if not 0 <= self.probability <= 1:
            raise UsageError(f"mix.probability is {self.probability}; it must lie between 0 and 1")
        if self.variation != "random" and (not isinstance(self.variation, int) or self.variation < 0):
            raise UsageError(f"mix.variation is {self.variation!r}; give 'random' or a number from 0")
        for name, least in (("synthetic_crops", 0), ("synthetic_local_crops", 0), ("replicas", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"mix.{name} is {getattr(self, name)}; it must be at least {least}")


class Assignment(NamedTuple):
    """Which images feed the V global and W local views of B items."""

    rows: NDArray[np.int64]  # [B], in the set below
    set: NDArray[np.int8]  # [B]: 0 is the pair set, 1 `mix.generated`
    images: NDArray[np.int16]  # [V + W, B]: -1 the real image, k >= 0 variation k
    plain: NDArray[np.bool_]  # [V + W, B]: resized and cut only

    def of(self, chosen: NDArray[np.int64]) -> Assignment:
        """The same for some of the items."""
        return Assignment(self.rows[chosen], self.set[chosen], self.images[:, chosen], self.plain[:, chosen])


class Policy(ABC):
    """Numbers the items of one epoch from 0 and says what each of them shows."""

    needs: tuple[Literal["real", "synthetic"], ...] = ()

    def __init__(self, config: MixConfig, rows: ImageSet) -> None:
        self.config = config
        self.sets: tuple[ImageSet, ...] = (rows,)  # `Assignment.set` counts these
        self._check_needs()
        if config.variation != "random" and config.variation >= self.sets[-1].num_variations > 0:
            raise UsageError(
                f"mix.variation is {config.variation}, but {self.sets[-1].url} has {rows.num_variations} variations an "
                f"image: 0 to {rows.num_variations - 1}"
            )

    @property
    @abstractmethod
    def num_items(self) -> int:
        """Items of an epoch."""

    @abstractmethod
    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        """What feeds the views of `items`, int64 [B]."""

    def locate(self, items: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Row and set of each item, [B]."""
        return items, np.zeros(len(items), np.int8)

    @property
    def fingerprint(self) -> str:
        """Of all rows that are drawn from, those of `mix.generated` too; see `ImageSet.fingerprint`."""
        return "+".join(rows.fingerprint for rows in self.sets)

    def check_views(self, num_crops: int, num_local_crops: int) -> None:  # noqa: B027  # most take any number
        """Refuse settings that a method with so many views cannot use, with a `UsageError`."""

    def variations(
        self, items: NDArray[np.int64], epoch: int, seed: int, views: int, first: int = 0
    ) -> NDArray[np.int16]:
        """Variation for each view, int16 [views, B], from the draws after `first` others."""
        shape = (views, len(items))
        if self.config.variation != "random":
            return np.full(shape, self.config.variation, np.int16)
        draws = hashing.uniforms(seed, epoch, items, _PURPOSE, count=first + views)[:, first:].T
        drawn = (draws * self.sets[-1].num_variations).astype(np.int16)
        return np.broadcast_to(drawn[0], shape) if self.config.same_variation else drawn

    def _check_needs(self) -> None:
        rows = self.sets[0]
        lacks = [side for side in self.needs if not getattr(rows, f"has_{side}")]
        if lacks:
            working = "real" if rows.has_real else "synthetic"
            advice = ", inflate with mix.generated=SET" if rows.has_real else ""
            raise UsageError(
                f"--mix {self.config.policy} needs {' and '.join(self.needs)} images and {rows.url} has no {lacks[0]} "
                f"ones; with this set --mix can be {working}{advice}"
            )


class RealOnly(Policy):
    """All views of the real image."""

    needs = ("real",)

    @property
    def num_items(self) -> int:
        return len(self.sets[0])

    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        images = np.full((num_crops + num_local_crops, len(items)), REAL, np.int16)
        return Assignment(*self.locate(items), images, np.zeros(images.shape, np.bool_))


class SyntheticOnly(Policy):
    """All views of a variation."""

    needs = ("synthetic",)

    @property
    def num_items(self) -> int:
        return len(self.sets[0])

    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        images = self.variations(items, epoch, seed, num_crops + num_local_crops)
        return Assignment(*self.locate(items), images, np.zeros(images.shape, np.bool_))


class DiffMix(Policy):
    """Some views real, some synthetic: MixDiff (arXiv 2406.12368), one of two, or 1 + 1 global and 6 + 2 local."""

    needs = ("real", "synthetic")

    @property
    def num_items(self) -> int:
        return len(self.sets[0])

    def check_views(self, num_crops: int, num_local_crops: int) -> None:
        if self.config.synthetic_crops > num_crops:
            raise UsageError(
                f"mix.synthetic_crops is {self.config.synthetic_crops}, but the method takes {num_crops} crops of an "
                f"image; give a number from 0 to {num_crops}"
            )

    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        views = num_crops + num_local_crops
        draws = hashing.uniforms(seed, epoch, items, _PURPOSE, count=1 + views).T
        ranks = draws[1:]
        synthetic = np.concatenate(
            [
                self._choose(ranks[:num_crops], self.config.synthetic_crops),
                self._choose(ranks[num_crops:], self.config.synthetic_local_crops),
            ]
        )
        synthetic &= draws[0] < self.config.probability
        variations = self.variations(items, epoch, seed, views, first=1 + views)
        images = np.where(synthetic, variations, np.int16(REAL))
        plain = synthetic & (not self.config.augment_synthetic)
        return Assignment(*self.locate(items), images, plain)

    def _choose(self, draws: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
        """Mask, bool [views, B], of `count` views of each item; draws [views, B] choose them if at random."""
        views = len(draws)
        if self.config.synthetic_view == "random":
            return draws.argsort(axis=0).argsort(axis=0) < count
        number = np.arange(views)[:, None]
        chosen = number < count if self.config.synthetic_view == "first" else number >= views - count
        return np.broadcast_to(chosen, draws.shape).copy()


class Union(Policy):
    """Every real image and every variation is an item of its own: item = row x (1 + K) + image + 1."""

    needs = ("real", "synthetic")

    @property
    def num_items(self) -> int:
        return len(self.sets[0]) * (1 + self.sets[0].num_variations)

    def locate(self, items: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        return items // (1 + self.sets[0].num_variations), np.zeros(len(items), np.int8)

    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        image = items % (1 + self.sets[0].num_variations) - 1
        return _one_image(*self.locate(items), image, num_crops + num_local_crops)


class Inflate(Policy):
    """AdaInf (arXiv 2403.12448): the real images `replicas` times, then every generated image once."""

    def __init__(self, config: MixConfig, rows: ImageSet) -> None:
        self.needs = ("real",) if config.generated else ("real", "synthetic")
        super().__init__(config, rows)
        if config.generated:
            self.sets = (rows, Rows.open(config.generated))
            if not self.sets[1].has_synthetic:
                raise UsageError(
                    f"mix.generated={config.generated} has no synthetic images; give a pair set with some, as "
                    "`pipeline generate` or `pipeline pack` makes them"
                )

    @property
    def num_items(self) -> int:
        return self._num_real + len(self.sets[-1]) * self.sets[-1].num_variations

    @property
    def _num_real(self) -> int:
        return self.config.replicas * len(self.sets[0])

    def locate(self, items: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        is_real = items < self._num_real
        generated = (items - self._num_real) // self.sets[-1].num_variations
        where = np.where(is_real, 0, len(self.sets) - 1).astype(np.int8)
        return np.where(is_real, items % len(self.sets[0]), generated), where

    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        variation = (items - self._num_real) % self.sets[-1].num_variations
        image = np.where(items < self._num_real, REAL, variation)
        return _one_image(*self.locate(items), image, num_crops + num_local_crops)


def _one_image(rows: NDArray[np.int64], where: NDArray[np.int8], image: NDArray[np.int64], views: int) -> Assignment:
    images = np.broadcast_to(image.astype(np.int16), (views, len(rows)))
    return Assignment(rows, where, images, np.zeros(images.shape, np.bool_))


def make(config: MixConfig, rows: ImageSet) -> Policy:
    """The policy named in `config` over `rows`; raises `UsageError` where the set lacks what it needs."""
    policy: Policy = class_of(POLICIES, config.policy)(config, rows)
    return policy


def labels_of(policy: Policy) -> list[NDArray[np.int32]]:
    """Labels, int32 [N], of each of the policy's sets; raises `UsageError` if one lacks them."""
    labels = [rows.label for rows in policy.sets]
    for rows, label in zip(policy.sets, labels, strict=True):
        if label is None:
            raise UsageError(
                f"{rows.url} has images without a label, and this training needs one for each; of a pair set, "
                "--filter 'label >= 0' takes the images that have one"
            )
    return [label for label in labels if label is not None]
