"""MoCo v3 (Chen et al. 2021, arXiv:2104.02057): a query finds the key of its image's other view among those of a batch.

Queries are the student's predictions, keys the projections of its moving average, of all ranks and without a queue. The
patch projection of a ViT stays random, which keeps it from bursts of gradients; its positions are the encoder's own,
learned ones, where the authors' are fixed sines and cosines. The momentum encoder is what is evaluated and exported, as
for all methods here that have one; the authors keep the query encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Progress, StepOutput, require
from trainer.methods.student_teacher import PredictingStudent
from trainer.nn import collectives
from trainer.nn.heads import HEAD_NORMS, HeadNorm, projection_head
from trainer.nn.precision import full_precision
from trainer.nn.statistics import feature_std


@dataclass(frozen=True, slots=True, kw_only=True)
class MoCoV3Config:
    """MoCo v3's settings; the defaults are the authors' for ViTs."""

    temperature: float = 0.2  # 1.0 for ResNets
    hidden_dim: int = 4096  # of projector and predictor
    out_dim: int = 256  # of projector and predictor
    projector_layers: int = 3  # 2 for ResNets
    head_norm: HeadNorm = "batch"  # after every layer of projector and predictor, the last one without scale and shift
    predictor_last_norm: bool = True  # False for ResNets: none after the predictor's last layer
    freeze_patch_embed: bool = True  # the patch projection keeps its initial weights; other encoders have none
    momentum: float = 0.99  # of the keys' encoder, at the start
    final_momentum: float = 1.0  # at the end of a cosine over the run
    joint_batch: bool = False  # True: both views in one forward pass, so that BatchNorm sees them together

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        for name in ("hidden_dim", "projector_layers"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        require(self.out_dim > 1, "out_dim", self.out_dim, "2 or more, since directions are compared")
        for name in ("momentum", "final_momentum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(self.head_norm in HEAD_NORMS, "head_norm", self.head_norm, " or ".join(HEAD_NORMS))


class InfoNCE(NamedTuple):
    """The loss, and the mean cosines of queries with the key of their image and with those of other images."""

    loss: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> InfoNCE:
    """Cross-entropy of this rank's queries over all ranks' keys of the other view (paper, algorithm 1), in float32.

    Both are float [2, B, D], the same B on every rank; no gradient goes to the keys. Each direction is scaled by twice
    the temperature and both are added. The mean of the ranks' losses is that of the global batch.
    """
    with full_precision(queries):
        count = queries.shape[1]
        ours = F.normalize(queries.float(), dim=-1)
        theirs = collectives.gather(F.normalize(keys.detach().float(), dim=-1).transpose(0, 1))  # [BR, 2, D]
        cosines = ours @ theirs.permute(1, 2, 0).flip(0)  # [2, B, BR]
        partner = collectives.rank() * count + torch.arange(count, device=ours.device)
        # The mean over both directions is half their sum.
        loss = 4 * temperature * F.cross_entropy(cosines.flatten(0, 1) / temperature, partner.repeat(2))
        return InfoNCE(loss, *_similarities(cosines.detach(), partner))


def _similarities(cosines: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    positive = cosines.gather(2, partner[None, :, None].expand(2, -1, 1))
    negatives = max(cosines.numel() - positive.numel(), 1)
    return positive.mean(), (cosines.sum() - positive.sum()) / negatives


class MoCoV3(PredictingStudent):
    """Student and teacher, each an encoder and a projector, and the student's predictor."""

    Config: ClassVar[type] = MoCoV3Config

    def __init__(self, make_encoder: MakeEncoder, config: MoCoV3Config) -> None:
        super().__init__(make_encoder, config)
        self.config = config
        self.make_networks(make_encoder, self._make_projector)
        inner = (config.hidden_dim, config.out_dim)
        last_norm = config.predictor_last_norm
        self.predictor = projection_head((config.out_dim, *inner), config.head_norm, last_norm=last_norm)
        if config.freeze_patch_embed:
            _freeze_patch_projection(self.student)
            self.initialised()

    def _make_projector(self, features: int) -> nn.Module:
        config = self.config
        hidden = [config.hidden_dim] * (config.projector_layers - 1)
        return projection_head((features, *hidden, config.out_dim), config.head_norm, last_norm=True)

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        features, keys = self.targets(views.crops)
        result = info_nce(self.predictions(views.crops), keys, self.config.temperature)
        logs = {
            "positive_similarity": result.positive_similarity,
            "negative_similarity": result.negative_similarity,
            "feature_std": feature_std(features),
        }
        return StepOutput(result.loss, logs)


def _freeze_patch_projection(encoder: Any) -> None:
    """Random as in the authors' code, whatever initialisation the encoder has: it stays so."""
    projection = getattr(getattr(encoder, "patch_embed", None), "proj", None)
    if projection is None:
        return
    nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))  # of all pixels of a patch
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)
