"""Networks that follow another one: copies, and moving averages of its parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def update(targets: Iterable[Tensor], sources: Iterable[Tensor], momentum: float) -> None:
    """Sets each target to momentum * target + (1 - momentum) * source; a pair has one shape, dtype and device."""
    torch._foreach_lerp_(list(targets), list(sources), 1 - momentum)


def copy(target: nn.Module, source: nn.Module) -> None:
    """All parameters and buffers (BatchNorm's running statistics too) of `source`, written into `target`."""
    target.load_state_dict(source.state_dict())
