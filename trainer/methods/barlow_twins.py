"""Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230): views correlate dimension by dimension, dimensions do not.

BatchNorm's statistics and the correlation are over the global batch, so that a run does not depend on its ranks. The
authors' code encodes the views one after the other (`joint_batch=False`), DiffMix's in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Method, Progress, StepOutput, project_views, require
from trainer.nn import collectives
from trainer.nn.heads import HEAD_NORMS, HeadNorm, projection_head
from trainer.nn.precision import full_precision
from trainer.nn.statistics import feature_std

_EPSILON = 1e-5  # BatchNorm's


@dataclass(frozen=True, slots=True, kw_only=True)
class BarlowTwinsConfig:
    """Barlow Twins' settings; the defaults are those of the paper's ImageNet runs, but for `joint_batch`."""

    projector: tuple[int, ...] = (8192, 8192, 8192)  # widths of the projector's layers
    off_diagonal: float = 0.0051  # the paper's lambda: weight of what should not correlate
    scale: float = 1.0  # of the loss: .1 at CIFAR scale, .024 in the authors' first runs
    head_norm: HeadNorm = "batch"  # after the projector's hidden layers
    joint_batch: bool = True  # both views in one forward pass: BatchNorm sees them together; False: one after the other

    def __post_init__(self) -> None:
        widths = self.projector
        require(bool(widths) and min(widths) > 0, "projector", widths, "at least one width of 1 or more")
        require(self.off_diagonal >= 0, "off_diagonal", self.off_diagonal, "0 or more")
        require(self.scale > 0, "scale", self.scale, "above 0")
        require(self.head_norm in HEAD_NORMS, "head_norm", self.head_norm, " or ".join(HEAD_NORMS))


class BarlowTerms(NamedTuple):
    """The two sums of the paper's equation 1: of (1 - C_ii)^2, and of C_ij^2 without its weight."""

    on_diagonal: Tensor
    off_diagonal: Tensor


def barlow_terms(projections: Tensor) -> BarlowTerms:
    """Both sums, of the global batch and so the same on every rank, for projections float [2, B, D]; in float32."""
    with full_precision(projections):
        correlation = cross_correlation(projections.float())
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        return BarlowTerms((1 - diagonal).square().sum(), off_diagonal)


def cross_correlation(projections: Tensor) -> Tensor:
    """C [D, D] over the global batch: C[i, j] of dimension i of the first view and j of the second.

    `projections` is float32 [2, B, D], the same B on every rank.
    """
    total = projections.shape[1] * collectives.world_size()
    with torch.no_grad():  # at the mean, neither variances nor products change with it: its gradient is 0
        mean = collectives.all_reduce_sum(projections.sum(1, keepdim=True)) / total
    centred = projections - mean
    variance = collectives.all_reduce_sum(centred.square().sum(1, keepdim=True)) / total
    first, second = centred * (variance + _EPSILON).rsqrt()
    return collectives.all_reduce_sum(first.T @ second / total, replicated=True)


class BarlowTwins(Method):
    """One encoder and a wide projector."""

    Config: ClassVar[type] = BarlowTwinsConfig
    least_images = 2
    backbone: nn.Module

    def __init__(self, make_encoder: MakeEncoder, config: BarlowTwinsConfig) -> None:
        super().__init__(make_encoder, config)
        self.config = config
        self.backbone = make_encoder()
        features: Any = self.backbone.num_features
        self.head = projection_head((features, *config.projector), config.head_norm)

    @property
    def encoder(self) -> nn.Module:
        return self.backbone

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        jointly = self.config.joint_batch
        features, projections = project_views(self.backbone, self.head, views.crops, jointly=jointly)
        terms = barlow_terms(projections)
        loss = self.config.scale * (terms.on_diagonal + self.config.off_diagonal * terms.off_diagonal)
        logs = {name: term.detach() for name, term in terms._asdict().items()}
        return StepOutput(loss, logs | {"feature_std": feature_std(features)})
