"""Supervised fine-tuning as a training step: an adapted encoder, a linear head, regularised cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batch import Views
from trainer.finetune.regularise import Regulariser
from trainer.methods.base import Method, Progress, StepOutput
from trainer.nn.precision import full_precision
from trainer.tuners.base import Tuner


class Classifier(Method):
    """Only what the tuner trains, and the head, changes; the step sees one view of each image."""

    num_crops = 1

    def __init__(self, tuner: Tuner, head: nn.Linear, regularise: Regulariser | None = None) -> None:
        nn.Module.__init__(self)
        self.tuner = tuner
        self.network = tuner.model
        self.head = head
        self.regularise = regularise
        tuner.train()

    @property
    def encoder(self) -> nn.Module:
        return self.network

    def forward(self, views: Views, progress: Progress) -> StepOutput:
        assert views.labels is not None
        images, targets = views.crops[0], views.labels
        if self.regularise is not None:
            images, targets = self.regularise(images, targets)
        logits = self.logits(images)
        with full_precision(logits):
            loss = F.cross_entropy(logits.float(), targets)
        classes = targets if targets.ndim == 1 else targets.argmax(dim=1)  # of a mixture: the larger part
        accuracy = (logits.detach().argmax(dim=1) == classes).float().mean()
        return StepOutput(loss, {"train_accuracy": accuracy})

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, S, S]."""
        return self.head(self.network(images))


def new_head(num_features: int, num_classes: int, seed: int) -> nn.Linear:
    """A linear head as timm initialises classifiers: truncated normal with standard deviation 0.02, no bias."""
    head = nn.Linear(num_features, num_classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return head
