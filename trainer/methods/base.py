"""What a self-supervised method is to the engine: one module whose `forward` is the training step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from manifests.errors import UsageError
from trainer.data.batch import Views

_COLLAPSED_SPREAD = 0.003  # of an even one

# Makes the encoder that the run asked for, float [N, 3, S, S] to features [N, D] (its `num_features`); keywords such as
# `drop_path_rate` go to timm and win over the run's. Two calls give two networks with different initial weights.
MakeEncoder = Callable[..., nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the run is. `step` counts the optimiser steps done before this one.

    `seed` is of what a method draws for the micro-batch of all ranks, and the same on each of them: who draws for the
    whole of it and takes its part trains the same thing on any number of ranks.
    """

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int = 0
    batch_size: int = 0  # images of one optimiser step over all ranks; 0: not known


class StepOutput(NamedTuple):
    """`loss` is a float32 scalar whose gradient, averaged over ranks, is that of the global batch's loss.

    `logs` are detached scalars, equal to or averaged over what this rank saw.
    """

    loss: Tensor
    logs: dict[str, Tensor]


class Method(nn.Module, ABC):
    """A method owns its encoder(s), heads and statistics; all that must survive a restart is a parameter or a buffer.

    The step is `forward`, since DDP synchronises gradients only there. It changes no statistic: `forward` leaves
    detached sums, and `after_step`, called once per optimiser step, applies them, so that gradient accumulation
    advances nothing twice.
    """

    Config: ClassVar[type]  # frozen dataclass of the method's own settings, the paper's as defaults

    num_crops: int = 2  # full-size views of each image
    num_local_crops: int = 0
    least_images: ClassVar[int] = 1  # of a micro-batch on each rank; 2: the loss or its BatchNorm compares images

    @abstractmethod
    def __init__(self, make_encoder: MakeEncoder, config: Any) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, views: Views, progress: Progress) -> StepOutput:
        """The loss of one micro-batch."""

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """The network that is evaluated and exported: the teacher, where there is one."""

    @property
    def trained_encoder(self) -> nn.Module:
        """The network that gradients train, which `--init` fills first; `initialised` is called afterwards."""
        return self.encoder

    def initialised(self) -> None:
        """The trained encoder has its initial weights: copies of it (teachers) take them now."""

    @classmethod
    def costlier_from(cls, config: Any, progress: Progress) -> int:
        """The step of a run of this length from which its steps do more than before; 0 if all do the same."""
        return 0

    def make_costlier(self) -> None:
        """Bring about, with made-up values, what steps from `costlier_from` on work with: for timings."""

    def notes(self, progress: Progress) -> list[str]:
        """What the user should know of the method's own schedules in a run of this length."""
        return []

    def check_batch(self, images: int) -> None:
        """Raises `UsageError` unless the method can train on micro-batches of so many images on each rank."""
        if images < self.least_images:
            raise UsageError(
                f"{images} image, the micro-batch of a process, leaves this method nothing to compare: --batch-size "
                f"must be at least {self.least_images} x processes x accumulation steps"
            )

    def before_update(self, progress: Progress) -> None:
        """After the last backward pass, before clipping and the optimiser: the place to cancel gradients."""

    def collapse(self, logs: dict[str, float], progress: Progress) -> str | None:
        """Why these logs, averaged over ranks, look like a collapse; None if they do not. Asked at every logging.

        `feature_std` is `nn.statistics.feature_std`: about 1 where features spread evenly.
        """
        if logs.get("feature_std", 1.0) < _COLLAPSED_SPREAD:
            return "the encoder gives all images the same features (collapse)"
        return None

    def after_step(self, progress: Progress) -> dict[str, Tensor]:
        """After the optimiser: EMA, centres, queues. Returns detached scalars to log, equal on all ranks."""
        return {}


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises `UsageError` unless a setting of a method's `Config` is as it must be, and no infinite number."""
    endless = isinstance(value, float) and math.isinf(value)
    if endless or not holds:
        raise UsageError(f"method.{name} is {value!r}; it must be {allowed}{' and finite' if endless else ''}")


def encode_views(network: nn.Module, crops: Tensor, *, jointly: bool) -> Tensor:
    """Outputs [V * B, D] of a network for crops [V, B, 3, S, S], view after view.

    `jointly` makes one batch of all views, so that BatchNorm's statistics are over all of them, else over each view.
    """
    if jointly:
        return network(crops.flatten(0, 1))
    return torch.cat([network(view) for view in crops])


def encode_all(encoder: nn.Module, views: Views) -> Tensor:
    """Features [(V + W) * B, D] of all crops, full-size ones first: one pass through the encoder for each size."""
    features: Tensor = encoder(views.crops.flatten(0, 1))
    if views.local_crops is None:
        return features
    return torch.cat([features, encoder(views.local_crops.flatten(0, 1))])


def project_views(encoder: nn.Module, head: nn.Module, crops: Tensor, *, jointly: bool) -> tuple[Tensor, Tensor]:
    """Features [V * B, D] of the encoder and, of them, projections [V, B, P] of the head; see `encode_views`."""
    features = encode_views(encoder, crops, jointly=jointly)
    by_view = features.unflatten(0, crops.shape[:2])
    return features, encode_views(head, by_view, jointly=jointly).unflatten(0, crops.shape[:2])
