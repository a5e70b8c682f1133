"""DINO (Caron et al. 2021, arXiv:2104.14294): a student matches, from any crop, what a teacher says of the full ones.

The teacher is a moving average of the student's weights. Unlike in the authors' code, centre and teacher advance once
per optimiser step, however many micro-batches it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainer.data.batch import Views
from trainer.methods.base import MakeEncoder, Progress, StepOutput, encode_all, require
from trainer.methods.dino_loss import dino_loss, teacher_probabilities
from trainer.methods.student_teacher import StudentTeacher
from trainer.nn import collectives
from trainer.nn.heads import HEAD_NORMS, DINOHead, HeadNorm
from trainer.nn.statistics import feature_std
from trainer.schedules import linear_warmup, shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class DINOConfig:
    """DINO's settings; the defaults are the authors' code's. Warm-up and freeze take at most a tenth of a run each."""

    local_crops: int = 8  # small crops of each image, for the student
    out_dim: int = 65536  # prototypes
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    head_norm: HeadNorm = "none"  # after the head's two hidden layers
    norm_last_layer: bool = True  # the prototypes keep norm 1
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04  # at the start
    final_teacher_temperature: float = 0.04  # after the warm-up
    teacher_temperature_epochs: float = 30  # of linear warm-up between the two
    momentum: float = 0.996  # of the teacher, at the start
    final_momentum: float = 1.0  # at the end of a cosine over the run
    center_momentum: float = 0.9
    freeze_epochs: float = 1  # at the start, in which the prototypes do not train
    drop_path: float = 0.1  # of the student: largest probability of dropping a residual branch

    def __post_init__(self) -> None:
        require(self.hidden_dim > 0, "hidden_dim", self.hidden_dim, "1 or more")
        for name in ("out_dim", "bottleneck_dim"):
            require(getattr(self, name) > 1, name, getattr(self, name), "2 or more, or nothing differs")
        for name in ("local_crops", "teacher_temperature_epochs", "freeze_epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("student_temperature", "teacher_temperature", "final_teacher_temperature"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("momentum", "final_momentum", "center_momentum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "at least 0 and below 1")
        require(self.head_norm in HEAD_NORMS, "head_norm", self.head_norm, " or ".join(HEAD_NORMS))


_EMPTY = 0.003  # of the largest entropy: so close to an end of its range that nothing is left to learn


class DINO(StudentTeacher):
    """Student and teacher, each an encoder and a head, and the centre of the teacher's logits."""

    Config: ClassVar[type] = DINOConfig
    student_head: DINOHead
    teacher_head: DINOHead
    center: Tensor

    def __init__(self, make_encoder: MakeEncoder, config: DINOConfig) -> None:
        super().__init__(make_encoder, config)
        self.config = config
        self.num_local_crops = config.local_crops
        self.make_networks(make_encoder, self._make_head, drop_path_rate=config.drop_path)
        self.register_buffer("center", torch.zeros(config.out_dim))
        # Of the micro-batches since the last step: [K] logits summed, and their number. No buffer, or DDP would
        # overwrite it with that of the first rank before every forward pass.
        self._seen: tuple[Tensor, int] | None = None

    def _make_head(self, features: int) -> DINOHead:
        config = self.config
        return DINOHead(
            features,
            config.out_dim,
            hidden_dim=config.hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            norm=config.head_norm,
            norm_last_layer=config.norm_last_layer,
        )

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        with torch.no_grad():
            features = self.teacher(views.crops.flatten(0, 1))
            teacher_logits = self.teacher_head(features).unflatten(0, views.crops.shape[:2])
            temperature = self.teacher_temperature(progress)
            targets, entropy = teacher_probabilities(teacher_logits, self.center, temperature)
        if self.training:
            self._remember(teacher_logits)
        loss = dino_loss(self._student_logits(views), targets, self.config.student_temperature)
        logs = {
            "teacher_entropy": entropy,
            "kl_divergence": loss.detach() - entropy,  # of the student from the teacher: cross-entropy less entropy
            "feature_std": feature_std(features),
        }
        return StepOutput(loss, logs)

    def _student_logits(self, views: Views) -> Tensor:
        """Float [V + W, B, K], full-size crops first: one pass through the encoder for each size, one of the head."""
        return self.student_head(encode_all(self.student, views)).unflatten(0, (-1, views.crops.shape[1]))

    def teacher_temperature(self, progress: Progress) -> float:
        """Of a step."""
        config = self.config
        warmup = _steps(config.teacher_temperature_epochs, progress)
        return linear_warmup(progress.step, warmup, config.teacher_temperature, config.final_teacher_temperature)

    def collapse(self, logs: dict[str, float], progress: Progress) -> str | None:
        """Also once the student says what the teacher says and that is nothing: all prototypes alike, or only one.

        A run that has just begun looks so too, hence not before a fifth of it.
        """
        entropy, most = logs.get("teacher_entropy", 1.0), math.log(self.config.out_dim)
        empty = entropy > (1 - _EMPTY) * most or entropy < _EMPTY * most
        agreed = abs(logs.get("kl_divergence", most)) < _EMPTY * most
        if empty and agreed and progress.step * 5 >= progress.total_steps:
            return f"the teacher's entropy is {entropy:.3f} of at most {most:.3f} and the student agrees (collapse)"
        return super().collapse(logs, progress)

    def _remember(self, teacher_logits: Tensor) -> None:
        total, count = teacher_logits.sum(dim=(0, 1)), teacher_logits.shape[0] * teacher_logits.shape[1]
        if self._seen is not None:
            total, count = total + self._seen[0], count + self._seen[1]
        self._seen = (total, count)

    def notes(self, progress: Progress) -> list[str]:
        config = self.config
        phases = {"freeze of the prototypes": config.freeze_epochs}
        if config.teacher_temperature != config.final_teacher_temperature:
            phases["warm-up of the teacher's temperature"] = config.teacher_temperature_epochs
        return [
            f"{name} of {epochs:g} epochs shortened to a tenth of the run, {_steps(epochs, progress)} steps"
            for name, epochs in phases.items()
            if _steps(epochs, progress) < round(epochs * progress.steps_per_epoch)
        ]

    def before_update(self, progress: Progress) -> None:
        """While the prototypes are frozen they have no gradient at all: neither momentum nor decay moves them."""
        if progress.step < _steps(self.config.freeze_epochs, progress):
            for parameter in self.student_head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_step(self, progress: Progress) -> dict[str, Tensor]:
        logs = super().after_step(progress)
        if self._seen is not None:
            total, count = self._seen
            mean = collectives.all_reduce_sum(total) / (count * collectives.world_size())
            self.center.lerp_(mean, 1 - self.config.center_momentum)
            self._seen = None
        return {"center_norm": self.center.norm()} | logs


def _steps(epochs: float, progress: Progress) -> int:
    """Of a phase at the start of the run, at most a tenth of it."""
    return shortened(round(epochs * progress.steps_per_epoch), progress.total_steps)
