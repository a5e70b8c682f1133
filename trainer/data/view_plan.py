"""What each view of an image is: its augmentation and its size, resolved from the run's settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from manifests.errors import UsageError
from trainer.choices import unknown
from trainer.data.augmentations import AUGMENTATIONS, LOCAL_SCALE, Augmentation
from trainer.data.crops import INTERPOLATIONS, Interpolation


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """Settings of the views; sizes are in pixels, mean and std those of RGB in [0, 1] (ImageNet's by default).

    `scale` and `local_scale` replace the areas from which the augmentation `augment` cuts its crops.
    """

    augment: str = "simclr"
    size: int = 224
    local_size: int = 96
    scale: tuple[float, float] | None = None
    local_scale: tuple[float, float] | None = None
    interpolation: Interpolation = "bilinear"  # of crops; images to evaluate are always resized bilinearly
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise unknown("augmentation", self.augment, AUGMENTATIONS)
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("views.interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("size", "local_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"views.{name} is {getattr(self, name)}; it must be at least 1 pixel")
        for name in ("scale", "local_scale"):
            scale = getattr(self, name)
            if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1):
                raise UsageError(f"views.{name} is {scale}; it must be two areas with 0 < least <= most <= 1")
        if min(self.std) <= 0:
            raise UsageError(f"views.std is {self.std}; each must be above 0")


class Run(NamedTuple):
    """Neighbouring views that are alike: `start` to `stop` of all views, global ones first."""

    start: int
    stop: int
    augmentation: Augmentation
    size: int


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """The views of every image: V global crops of `size` and W local ones of `local_size` pixels."""

    crops: tuple[Augmentation, ...]
    local_crops: tuple[Augmentation, ...]
    size: int
    local_size: int
    interpolation: Interpolation = "bilinear"

    @classmethod
    def of(cls, config: ViewConfig, num_crops: int, num_local_crops: int) -> ViewPlan:
        """Resolve the named set for a method with so many views."""
        chosen = AUGMENTATIONS[config.augment]
        views = [replace(view, scale=config.scale) if config.scale else view for view in chosen.views]
        local = chosen.local or replace(chosen.views[0], scale=LOCAL_SCALE)
        if config.local_scale:
            local = replace(local, scale=config.local_scale)
        crops = tuple(views[min(number, len(views) - 1)] for number in range(num_crops))
        return cls(crops, (local,) * num_local_crops, config.size, config.local_size, config.interpolation)

    @property
    def runs(self) -> list[Run]:
        """All views, alike neighbours together: what is drawn in one go."""
        views = [(view, self.size) for view in self.crops] + [(view, self.local_size) for view in self.local_crops]
        runs: list[Run] = []
        for number, (view, size) in enumerate(views):
            if runs and number != len(self.crops) and (runs[-1].augmentation, runs[-1].size) == (view, size):
                runs[-1] = runs[-1]._replace(stop=number + 1)
            else:
                runs.append(Run(number, number + 1, view, size))
        return runs
