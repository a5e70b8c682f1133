"""Regularisers of supervised fine-tuning: random erasing, then mixup or CutMix, with soft and smoothed targets.

All are timm's, on the training device. They draw from global generators of three libraries; here each is set from
torch's, which the engine seeds from (seed, step, rank), so that a step draws the same wherever a run goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from trainer.finetune.config import ImageConfig


def regulariser(images: ImageConfig, num_classes: int) -> Regulariser | None:
    """What `images` asks for, of a task with `num_classes`; None where that is nothing."""
    asked = images.mixup or images.cutmix or images.random_erasing or images.label_smoothing
    return Regulariser(images, num_classes) if asked else None


class Regulariser:
    """Images and labels of a batch become regularised ones."""

    def __init__(self, images: ImageConfig, num_classes: int) -> None:
        self.num_classes = num_classes
        self.smoothing = images.label_smoothing or 0.0
        self.erasing = images.random_erasing or 0.0
        self.mixup: Mixup | None = None
        if images.mixup or images.cutmix:
            self.mixup = Mixup(
                mixup_alpha=images.mixup or 0.0,
                cutmix_alpha=images.cutmix or 0.0,
                label_smoothing=self.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """New images [B, 3, S, S] and float targets [B, C] of images and labels int64 [B], which stay as they are.

        Each image is mixed with its opposite in the batch (the first with the last); all of a batch share one lambda.
        In an odd batch, the last image is left out of it.
        """
        images = images.clone()
        with _drawn_from_torch():
            if self.erasing:
                RandomErasing(self.erasing, mode="pixel", device=images.device)(images)
            if self.mixup is None:
                return images, self._targets(labels)
            even = len(images) - len(images) % 2
            _, targets = self.mixup(images[:even], labels[:even])  # in place
        return images, torch.cat([targets, self._targets(labels[even:])])

    def _targets(self, labels: Tensor) -> Tensor:
        return mixup_target(labels, self.num_classes, smoothing=self.smoothing)


@contextmanager
def _drawn_from_torch() -> Iterator[None]:
    """Python's and numpy's generators follow torch's inside, and are as they were afterwards."""
    seed = int(torch.randint(2**32, ()))
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
