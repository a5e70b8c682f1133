"""BYOL (Grill et al. 2020, arXiv:2006.07733): a student predicts the teacher's projection of the image's other view.

No image repels another: what keeps all from becoming alike is the predictor and the teacher's lag. The teacher is what
is evaluated and exported, as for all methods here that have one; the authors keep the student, called online network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Progress, StepOutput, require
from trainer.methods.student_teacher import PredictingStudent
from trainer.nn.heads import HEAD_NORMS, HeadNorm, projection_head
from trainer.nn.precision import full_precision
from trainer.nn.statistics import feature_std


@dataclass(frozen=True, slots=True, kw_only=True)
class BYOLConfig:
    """BYOL's settings; the defaults are those of the paper's 1000 epochs of ImageNet."""

    hidden_dim: int = 4096  # of projector and predictor
    out_dim: int = 256  # of projector and predictor
    head_norm: HeadNorm = "batch"  # after the hidden layers of both
    momentum: float = 0.996  # of the teacher, at the start
    final_momentum: float = 1.0  # at the end of a cosine over the run
    joint_batch: bool = False  # True: both views in one forward pass, so that BatchNorm sees them together

    def __post_init__(self) -> None:
        require(self.hidden_dim > 0, "hidden_dim", self.hidden_dim, "1 or more")
        require(self.out_dim > 1, "out_dim", self.out_dim, "2 or more, since directions are compared")
        for name in ("momentum", "final_momentum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(self.head_norm in HEAD_NORMS, "head_norm", self.head_norm, " or ".join(HEAD_NORMS))


_CONSTANT = 0.003  # spread of the teacher's projections, 1 where they spread evenly


def byol_loss(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over images of the squared distances between the normalised prediction and target, summed over views.

    Both are float [2, B, D]: the prediction from a view is compared with the target of the other one, to which no
    gradient goes. Computed in float32. Also returns the mean cosine, detached: the loss is 4 less 4 times that.
    """
    with full_precision(predictions):
        predicted = F.normalize(predictions.float(), dim=-1)
        wanted = F.normalize(targets.detach().float(), dim=-1).flip(0)
        cosine = (predicted * wanted).sum(-1).mean()
        return 4 - 4 * cosine, cosine.detach()


class BYOL(PredictingStudent):
    """Student and teacher, each an encoder and a projector, and the student's predictor."""

    Config: ClassVar[type] = BYOLConfig

    def __init__(self, make_encoder: MakeEncoder, config: BYOLConfig) -> None:
        super().__init__(make_encoder, config)
        self.config = config
        inner, norm = (config.hidden_dim, config.out_dim), config.head_norm
        self.make_networks(make_encoder, lambda features: projection_head((features, *inner), norm))
        self.predictor = projection_head((config.out_dim, *inner), norm)

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        features, targets = self.targets(views.crops)
        loss, similarity = byol_loss(self.predictions(views.crops), targets)
        logs = {
            "positive_similarity": similarity,
            "projection_std": feature_std(targets.flatten(0, 1)),
            "feature_std": feature_std(features),
        }
        return StepOutput(loss, logs)

    def collapse(self, logs: dict[str, float], progress: Progress) -> str | None:
        """Also once the teacher's projections are all alike: nothing is left to predict."""
        if logs.get("projection_std", 1.0) < _CONSTANT:
            return "the teacher projects all images to the same point (collapse)"
        return super().collapse(logs, progress)
