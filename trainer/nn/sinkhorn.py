"""Sinkhorn-Knopp: soft assignments of images to prototypes in which every prototype is used alike (arXiv:2006.09882).

In logarithms, so that no score overflows or underflows: the authors' `exp(scores / .05)` does in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.nn import collectives
from trainer.nn.precision import full_precision


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments float32 [..., N, K] of N images on this rank, any number of them on each, to K prototypes.

    Each round gives all prototypes the same share of all ranks' images, then each image, [..., n, :], the sum 1. No
    gradient passes. Constant factors (the paper's 1/K and 1/B) cancel at the next image sum and are left out.
    """
    with full_precision(scores):
        logits = scores.float() / epsilon
        for _ in range(iterations):
            logits = (logits - _log_sum_over_images(logits)).log_softmax(-1)
        return logits.exp()


def _log_sum_over_images(logits: Tensor) -> Tensor:
    """Logarithm [..., 1, K] of the sum of exp(logits) over the images of all ranks."""
    largest = collectives.all_reduce_max(logits.amax(-2, keepdim=True))
    return largest + collectives.all_reduce_sum((logits - largest).exp().sum(-2, keepdim=True)).log()
