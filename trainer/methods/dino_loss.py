"""DINO's cross-entropy between all pairs of views (arXiv:2104.14294, equation 3) without going through the pairs.

The cross-entropy is linear in the teacher's probabilities, so that each student view needs one log-softmax and one
product with the sum of the probabilities of the other views' teachers. Its gradient is known in closed form: a softmax
less that sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trainer.nn.precision import full_precision


@torch.no_grad()
def teacher_probabilities(logits: Tensor, center: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Centred and sharpened probabilities float32 [V, B, K] of logits [V, B, K], and their mean entropy in nats."""
    with full_precision(logits):
        log_probabilities = F.log_softmax((logits.float() - center) / temperature, dim=-1)
        probabilities = log_probabilities.exp()
        return probabilities, -(probabilities * log_probabilities).sum(-1).mean()


def dino_loss(student_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The mean cross-entropy over images and over pairs of a teacher's view and another view of the student.

    `student_logits` is float [V + W, B, K], the teacher's V views first; `targets` is float32 [V, B, K] and sums to 1
    over K, V being two at least. Computed in float32; no gradient reaches `targets`.
    """
    with full_precision(student_logits):
        return _CrossEntropy.apply(student_logits.float(), targets, temperature)


class _CrossEntropy(Function):
    """One view at a time: whole arrays of [V + W, B, K] would leave the cache between operations."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        loss = logits.new_zeros(())
        for values, (wanted, _) in zip(logits, _wanted(targets, len(logits)), strict=True):
            loss -= (F.log_softmax(values / temperature, dim=-1) * wanted).sum()
        return loss / _terms(logits, targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        factor = gradient / (_terms(logits, targets) * ctx.temperature)
        gradients = torch.empty_like(logits)
        for out, values, (wanted, teachers) in zip(gradients, logits, _wanted(targets, len(logits)), strict=True):
            torch.softmax(values / ctx.temperature, dim=-1, out=out)
            out.mul_(teachers).sub_(wanted).mul_(factor)
        return gradients, None, None


def _wanted(targets: Tensor, views: int) -> Iterator[tuple[Tensor, int]]:
    """For each student view the sum [B, K] of the probabilities of all teacher views but itself, and their number."""
    for view in range(len(targets)):
        others = [target for number, target in enumerate(targets) if number != view]
        yield _sum(others), len(others)
    everyone = _sum(list(targets))
    for _ in range(len(targets), views):
        yield everyone, len(targets)


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0) if len(values) > 1 else values[0]


def _terms(logits: Tensor, targets: Tensor) -> int:
    """Pairs of different views, times images."""
    views, images = logits.shape[:2]
    return len(targets) * (views - 1) * images
