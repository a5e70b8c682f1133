"""How many dimensions features use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EPSILON = 1e-7


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """RankMe of features [N, D] (Garrido et al., arXiv:2210.02885, equation 1): 1 is collapse, min(N, D) the most.

    exp(-sum p log p) with p = s / sum(s) + 1e-7 over the singular values s of the features, not centred. 0 if all
    are zero, NaN if one is not finite. Singular values come from the smaller Gram matrix in float64: of those below
    1e-8 of the largest only that they are small is known, which is all that the entropy asks.
    """
    if not features.isfinite().all():
        return math.nan
    matrix = features.double() if features.device.type != "mps" else features.cpu().double()
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values.sum() == 0:
        return 0.0
    share = values / values.sum() + _EPSILON
    return math.exp(-(share * share.log()).sum().item())
