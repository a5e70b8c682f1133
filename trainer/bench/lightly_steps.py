"""The steps of lightly 1.5 and 1.6 (github.com/lightly-ai/lightly), as its PyTorch examples write them.

Importing this module needs lightly.
"""

from __future__ import annotations

import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules.heads import DINOProjectionHead, ProjectionHead
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from trainer.bench.steps import Step, make_optimiser
from trainer.data.batch import Views
from trainer.methods.dino import DINO
from trainer.methods.simclr import SimCLR
from trainer.nn.heads import DINOHead


def lightly_step(method: DINO | SimCLR, views: Views) -> Step:
    """A step of lightly's that starts from the method's weights."""
    return _simclr(method, views) if isinstance(method, SimCLR) else _dino(method, views)


def _simclr(method: SimCLR, views: Views) -> Step:
    backbone, config = method.backbone, method.config
    width, hidden, norm = backbone.num_features, config.hidden_dim, nn.BatchNorm1d(config.hidden_dim)
    blocks = [(width, hidden, norm, nn.ReLU()), (hidden, config.out_dim, None, None)]
    head = ProjectionHead(blocks)
    with torch.no_grad():
        head.layers[0].weight.copy_(method.head[0].weight)
        head.layers[-1].weight.copy_(method.head[-1].weight)
        head.layers[-1].bias.zero_()
    optimiser = make_optimiser(backbone, head)
    criterion = NTXentLoss(config.temperature)

    def step() -> Tensor:
        first, second = (head(backbone(view).flatten(start_dim=1)) for view in views.crops)
        loss: Tensor = criterion(first, second)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def _dino(method: DINO, views: Views) -> Step:
    student, teacher = method.student, method.teacher
    student_head, teacher_head = _head(method.student_head), _head(method.teacher_head)
    teacher_head.requires_grad_(False)
    optimiser = make_optimiser(student, student_head)
    criterion = DINOLoss(output_dim=method.config.out_dim, warmup_teacher_temp_epochs=5)
    crops = [*views.crops, *([] if views.local_crops is None else views.local_crops)]

    def step() -> Tensor:
        update_momentum(student, teacher, m=0.998)
        update_momentum(student_head, teacher_head, m=0.998)
        wanted = [teacher_head(teacher(view).flatten(start_dim=1)) for view in views.crops]
        given = [student_head(student(view).flatten(start_dim=1)) for view in crops]
        loss: Tensor = criterion(wanted, given, epoch=5)
        loss.backward()
        student_head.cancel_last_layer_gradients(current_epoch=5)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def _head(ours: DINOHead) -> DINOProjectionHead:
    first, last = ours.mlp[0], ours.last_layer
    sizes = {"hidden_dim": first.out_features, "bottleneck_dim": last.directions.shape[1]}
    head = DINOProjectionHead(first.in_features, output_dim=len(last.directions), **sizes)
    with torch.no_grad():
        for target, source in zip(head.layers.parameters(), ours.mlp.parameters(), strict=True):
            target.copy_(source)
        head.last_layer.weight_v.copy_(last.directions)
    return head
