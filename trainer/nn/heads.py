"""Projection heads: what stands between an encoder's features and a loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.nn.precision import full_precision

HeadNorm = Literal["batch", "none"]
HEAD_NORMS: tuple[HeadNorm, ...] = ("batch", "none")


def projection_head(
    dims: Sequence[int], norm: HeadNorm = "batch", *, last_bias: bool = False, last_norm: bool = False
) -> nn.Sequential:
    """Linear layers of the given widths, [N, dims[0]] to [N, dims[-1]], each but the last followed by norm and ReLU.

    The last layer has no bias (DiffMix's and Barlow Twins' code) unless asked for (SwAV's); the others have none before
    a BatchNorm. `last_norm` puts a norm without scale and shift after the last one (MoCo v3).
    """
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(dims[:-1]):
        layers += [nn.Linear(width_in, width_out, bias=norm == "none"), *_norm(norm, width_out), nn.ReLU(inplace=True)]
    last = _norm(norm, dims[-1], affine=False) if last_norm else []
    return nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1], bias=last_bias), *last)


def _norm(norm: HeadNorm, width: int, *, affine: bool = True) -> list[nn.Module]:
    return [nn.BatchNorm1d(width, affine=affine)] if norm == "batch" else []


class DINOHead(nn.Module):
    """Three linear layers with GELU, L2 norm, weight-normed prototypes: features [N, D] to float32 logits [N, K].

    Caron et al. 2021, appendix C, and `DINOHead` of the authors' code, but that the prototypes always multiply in
    float32: a cosine in bf16 is off by up to .004, which at a temperature of .04 is .1 in the logit.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm: HeadNorm = "none",
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(in_dim, hidden_dim), *_norm(norm, hidden_dim), nn.GELU()),
            *(nn.Linear(hidden_dim, hidden_dim), *_norm(norm, hidden_dim), nn.GELU()),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = Prototypes(bottleneck_dim, out_dim, fixed_norm=norm_last_layer)
        self.mlp.apply(_truncated_normal)

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = self.mlp(features)
        with full_precision(bottleneck):
            return self.last_layer(F.normalize(bottleneck.float(), dim=-1))


class Prototypes(nn.Module):
    """A linear layer without bias, [N, D] to [N, K], whose rows have norms of their own, apart from their directions.

    The norms start at 1 and are learned, or stay there with `fixed_norm` (DINO's `norm_last_layer`).
    """

    def __init__(self, in_dim: int, out_dim: int, *, fixed_norm: bool) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.empty(out_dim, in_dim))
        self.norms = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed_norm)
        nn.init.uniform_(self.directions, -(in_dim**-0.5), in_dim**-0.5)  # as nn.Linear does

    def forward(self, values: Tensor) -> Tensor:
        # What torch's own weight_norm calls; for 65536 rows its backward pass is three times as fast as F.normalize's.
        return F.linear(values, torch._weight_norm(self.directions, self.norms, 0))


def _truncated_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
