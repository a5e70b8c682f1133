"""The policies by name, and the settings of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from manifests.errors import UsageError
from trainer.choices import unknown
from trainer.data.mixing.weights import WEIGHTS

POLICIES: dict[str, str] = {
    "real": "trainer.data.mixing.by_row:RealOnly",
    "synthetic": "trainer.data.mixing.by_row:SyntheticOnly",
    "diffmix": "trainer.data.mixing.by_row:DiffMix",
    "sequential": "trainer.data.mixing.sequential:Sequential",
    "union": "trainer.data.mixing.by_image:Union",
    "inflate": "trainer.data.mixing.by_image:Inflate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MixConfig:
    """Settings of all policies; each reads its own.

    `synthetic_view` says where the synthetic crops stand among the global ones, and among the local ones. With one
    view, `probability` decides between real and synthetic. Without `same_variation` each synthetic view draws its own.
    `weight` is a column of the manifest, see `trainer.data.mixing.weights`; None shows everything equally often.
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
    first: Literal["synthetic", "real"] = "synthetic"  # sequential: the side that is shown first
    first_epochs: int | None = None  # sequential: epochs that show it, which must be given
    weight: str | None = None  # similarity, or another column of numbers
    weight_power: float = 1.0  # to which the column's values are raised

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown("policy", self.policy, POLICIES)
        for name, allowed in (("synthetic_view", ("second", "first", "random")), ("first", ("synthetic", "real"))):
            if getattr(self, name) not in allowed:
                raise unknown(f"mix.{name}", getattr(self, name), allowed)
        if self.weight is not None and self.weight not in WEIGHTS:
            raise unknown("mix.weight", self.weight, WEIGHTS)
        self._check_numbers()

    def _check_numbers(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UsageError(f"mix.probability is {self.probability}; it must lie between 0 and 1")
        if self.variation != "random" and (not isinstance(self.variation, int) or self.variation < 0):
            raise UsageError(f"mix.variation is {self.variation!r}; give 'random' or a number from 0")
        if not 0 <= self.weight_power < math.inf:
            raise UsageError(f"mix.weight_power is {self.weight_power}; it must be a number of 0 or more")
        least = {"synthetic_crops": 0, "synthetic_local_crops": 0, "replicas": 1, "first_epochs": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UsageError(f"mix.{name} is {value}; it must be at least {lowest}")
