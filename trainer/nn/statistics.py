"""What tells a network that works from one that has collapsed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Spread of the L2-normalised features [N, D]: 0 where all are the same, about 1 where they fill all directions.

    The mean of the dimensions' standard deviations times sqrt(D) (SimSiam, Chen and He 2021, section 4.1).
    """
    normalised = F.normalize(features.detach().float(), dim=-1)
    return normalised.std(dim=0, correction=0).mean() * features.shape[-1] ** 0.5
