"""What every mixing policy is: numbered items of an epoch, and the images that each of them shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.data.image_set import ImageSet
from trainer.data.mixing.config import MixConfig


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
    """Numbers the items of one epoch from 0 and says what each of them shows.

    `reads` are the settings of `MixConfig` that decide it, and `reads_weighted` those that do only where there is a
    `weight`; a subclass names its own beside those of its base.
    """

    reads: ClassVar[tuple[str, ...]] = ("weight",)
    reads_weighted: ClassVar[tuple[str, ...]] = ("weight_power",)
    needs: tuple[Literal["real", "synthetic"], ...] = ()

    def __init__(self, config: MixConfig, rows: ImageSet) -> None:
        self.config = config
        self.sets: tuple[ImageSet, ...] = (rows,)  # `Assignment.set` counts these
        self._check_needs()
        if config.variation != "random" and config.variation >= rows.num_variations > 0:
            raise UsageError(
                f"mix.variation is {config.variation}, but {rows.url} has {rows.num_variations} variations an image: "
                f"0 to {rows.num_variations - 1}"
            )

    @property
    @abstractmethod
    def num_items(self) -> int:
        """Items of an epoch."""

    @abstractmethod
    def locate(self, items: NDArray[np.int64], epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """Row and set of each item, [B]."""

    @abstractmethod
    def assign(
        self, items: NDArray[np.int64], epoch: int, seed: int, num_crops: int, num_local_crops: int
    ) -> Assignment:
        """What feeds the views of `items`, int64 [B]."""

    @property
    def fingerprint(self) -> str:
        """Of all rows that are drawn from, those of `mix.generated` too; see `ImageSet.fingerprint`."""
        return "+".join(rows.fingerprint for rows in self.sets)

    def check_views(self, num_crops: int, num_local_crops: int) -> None:  # noqa: B027  # most take any number
        """Refuse settings that a method with so many views cannot use, with a `UsageError`."""

    def check_epochs(self, epochs: float) -> None:  # noqa: B027  # most take any number
        """Refuse settings that a run of so many epochs cannot use, with a `UsageError`."""

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
