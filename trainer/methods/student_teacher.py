"""A student and its moving average, the teacher: what BYOL, MoCo v3 and DINO are made of.

As in the code of their authors the teacher stays in train mode: its BatchNorm layers use and keep the statistics of its
own forward passes, so that both see their inputs scaled alike. It drops no paths, whatever the student does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.methods.base import MakeEncoder, Method, Progress, encode_views, project_views
from trainer.nn import ema
from trainer.schedules import cosine

MakeHead = Callable[[int], nn.Module]  # of the width of the features


class StudentTeacher(Method):
    """Two encoders with a head each. The student trains; the teacher follows and is what is evaluated and exported.

    `config` has the teacher's `momentum` at the start and, after a cosine over the run, `final_momentum`.
    """

    config: Any
    student: nn.Module
    teacher: nn.Module
    student_head: nn.Module
    teacher_head: nn.Module

    def make_networks(self, make_encoder: MakeEncoder, make_head: MakeHead, **of_student: Any) -> None:
        """Make all four; `of_student` are keywords of the student's encoder."""
        self.student = make_encoder(**of_student)
        self.teacher = make_encoder(drop_path_rate=0.0)
        features: Any = self.student.num_features
        self.student_head, self.teacher_head = make_head(features), make_head(features)
        for network in (self.teacher, self.teacher_head):
            network.requires_grad_(False)
        self.initialised()

    @property
    def encoder(self) -> nn.Module:
        return self.teacher

    @property
    def trained_encoder(self) -> nn.Module:
        return self.student

    def initialised(self) -> None:
        ema.copy(self.teacher, self.student)
        ema.copy(self.teacher_head, self.student_head)

    @torch.no_grad()
    def after_step(self, progress: Progress) -> dict[str, Tensor]:
        momentum = cosine(progress.step, progress.total_steps, self.config.momentum, self.config.final_momentum)
        ema.update(self.teacher.parameters(), self.student.parameters(), momentum)
        ema.update(self.teacher_head.parameters(), self.student_head.parameters(), momentum)
        anywhere = next(self.teacher.parameters())
        return {"teacher_momentum": torch.full((), momentum, dtype=torch.float32, device=anywhere.device)}


class PredictingStudent(StudentTeacher):
    """A student with a predictor on top, which says of each view what the teacher makes of the other one."""

    least_images = 2
    predictor: nn.Module

    def predictions(self, crops: Tensor) -> Tensor:
        """The student's [V, B, P] of crops [V, B, 3, S, S]; `config.joint_batch` says what BatchNorm sees at once."""
        jointly = self.config.joint_batch
        _, projections = project_views(self.student, self.student_head, crops, jointly=jointly)
        return encode_views(self.predictor, projections, jointly=jointly).unflatten(0, crops.shape[:2])

    @torch.no_grad()
    def targets(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features [V * B, D] and projections [V, B, P] of crops [V, B, 3, S, S], without gradients."""
        return project_views(self.teacher, self.teacher_head, crops, jointly=self.config.joint_batch)
