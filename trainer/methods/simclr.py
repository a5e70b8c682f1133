"""SimCLR (Chen et al. 2020, arXiv:2002.05709): the two views of an image attract, all other views of the batch repel.

As in DiffMix's code and unlike google-research/simclr, no BatchNorm follows the head's last layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Method, Progress, StepOutput, project_views, require
from trainer.nn import collectives
from trainer.nn.heads import HEAD_NORMS, HeadNorm, projection_head
from trainer.nn.precision import full_precision
from trainer.nn.statistics import feature_std


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCLRConfig:
    """SimCLR's settings; the defaults are those of the paper's ImageNet runs."""

    temperature: float = 0.1
    hidden_dim: int = 2048
    out_dim: int = 128
    head_norm: HeadNorm = "batch"  # after the head's hidden layer
    joint_batch: bool = True  # both views in one forward pass: BatchNorm sees them together; False: one after the other

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.hidden_dim > 0, "hidden_dim", self.hidden_dim, "1 or more")
        require(self.out_dim > 1, "out_dim", self.out_dim, "2 or more, since directions are compared")
        require(self.head_norm in HEAD_NORMS, "head_norm", self.head_norm, " or ".join(HEAD_NORMS))


class NTXent(NamedTuple):
    """The loss, and the mean cosines between the views of an image and between views of different images."""

    loss: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor


def nt_xent(projections: Tensor, temperature: float) -> NTXent:
    """Normalised temperature-scaled cross-entropy (paper, equation 1) of this rank's views against those of all ranks.

    `projections` is float [2, B, D], the same B on every rank; computed in float32. The mean of the ranks' losses, and
    so the gradient averaged over ranks, is that of the global batch.
    """
    with full_precision(projections):
        count = projections.shape[1]
        own = F.normalize(projections.float().flatten(0, 1), dim=-1)
        logits = (own / temperature) @ collectives.gather(own).T  # [2B, 2BR]
        rows = torch.arange(2 * count, device=own.device)
        first = collectives.rank() * 2 * count
        itself, partner = first + rows, first + (rows + count) % (2 * count)
        positive, negative = _similarities(logits.detach() * temperature, itself, partner)
        loss = F.cross_entropy(logits.scatter(1, itself[:, None], -torch.inf), partner)
        return NTXent(loss, positive, negative)


def _similarities(cosines: Tensor, itself: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    positive = cosines.gather(1, partner[:, None])
    negatives = max(cosines.numel() - 2 * len(cosines), 1)
    negative = (cosines.sum() - positive.sum() - cosines.gather(1, itself[:, None]).sum()) / negatives
    return positive.mean(), negative


class SimCLR(Method):
    """One encoder and a head of two layers."""

    Config: ClassVar[type] = SimCLRConfig
    least_images = 2
    backbone: nn.Module

    def __init__(self, make_encoder: MakeEncoder, config: SimCLRConfig) -> None:
        super().__init__(make_encoder, config)
        self.config = config
        self.backbone = make_encoder()
        features: Any = self.backbone.num_features
        self.head = projection_head((features, config.hidden_dim, config.out_dim), config.head_norm)

    @property
    def encoder(self) -> nn.Module:
        return self.backbone

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        jointly = self.config.joint_batch
        features, projections = project_views(self.backbone, self.head, views.crops, jointly=jointly)
        result = nt_xent(projections, self.config.temperature)
        logs = {
            "positive_similarity": result.positive_similarity,
            "negative_similarity": result.negative_similarity,
            "feature_std": feature_std(features),
        }
        return StepOutput(result.loss, logs)
