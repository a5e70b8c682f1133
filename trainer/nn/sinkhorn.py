"""Sinkhorn-Knopp: soft assignments of images to prototypes in which every prototype is used alike (arXiv:2006.09882).

In logarithms where a score could overflow or underflow otherwise: the authors' `exp(scores / .05)` does in half
precision. Where none can, in place, some five times as fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.nn import collectives
from trainer.nn.precision import full_precision

_WIDEST = 60.0  # of exponents: exp(-60) and its share of a million images are normal numbers of float32


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, bound: float = math.inf) -> Tensor:
    """Assignments float32 [..., N, K] of N images on this rank, any number of them on each, to K prototypes.

    Each round gives all prototypes the same share of all ranks' images, then each image, [..., n, :], the sum 1. No
    gradient passes. Constant factors (the paper's 1/K and 1/B) cancel at the next image sum and are left out. `bound`
    is what no score exceeds in size: 1 for cosines.
    """
    with full_precision(scores):
        logits = scores.float() / epsilon
        if 2 * bound / epsilon <= _WIDEST:
            return _in_place(logits.sub_(bound / epsilon).exp_(), iterations)
        for _ in range(iterations):
            logits = (logits - _log_sum_over_images(logits)).log_softmax(-1)
        return logits.exp()


def _in_place(shares: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        shares /= collectives.all_reduce_sum(shares.sum(-2, keepdim=True))
        shares /= shares.sum(-1, keepdim=True)
    return shares


def _log_sum_over_images(logits: Tensor) -> Tensor:
    """Logarithm [..., 1, K] of the sum of exp(logits) over the images of all ranks."""
    largest = collectives.all_reduce_max(logits.amax(-2, keepdim=True))
    return largest + collectives.all_reduce_sum((logits - largest).exp().sum(-2, keepdim=True)).log()
