"""Optimisers, parameter groups and the values that schedules give them, as pure functions of the step.

There is no scheduler state: `Schedule.apply` sets each group's learning rate and weight decay before every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifests.errors import UsageError
from trainer.engine.layer_decay import by_layer
from trainer.schedules import cosine, shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedules. Learning rates are for `reference_batch` images and scale with the batch."""

    name: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = 5e-4
    final_lr: float = 0.0  # at the end of the cosine, not scaled by the batch; bias_lr ends in proportion
    bias_lr: float | None = None  # of biases and normalisation; None: lr
    reference_batch: int | None = 256  # None: rates are as they stand
    warmup_epochs: float = 10  # linear from warmup_lr
    warmup_lr: float = 0.0  # not scaled by the batch, at most lr; bias_lr begins in proportion
    warmup_steps: int | None = None  # wins over warmup_epochs
    warmup_share: float = 0.1  # of the run, which warm-up takes at most
    weight_decay: float = 0.0
    exempt_biases: bool = True  # biases and normalisation have no weight decay and, with lars, no trust ratio
    final_weight_decay: float | None = None  # cosine from weight_decay; None: constant
    layer_decay: float | None = None  # the rate shrinks by it from each layer of the encoder to the one before
    momentum: float = 0.9  # of sgd and lars
    betas: tuple[float, float] = (0.9, 0.999)  # of adamw
    trust: float = 0.001  # LARS's eta
    trust_clip: bool = False  # LARS never steps further than SGD would
    clip: float | None = None  # largest gradient norm
    clip_by: Literal["global", "parameter"] = "global"  # the norm of all gradients, or of each parameter's (DINO)

    def __post_init__(self) -> None:
        for name in ("lr", "final_lr", "weight_decay", "warmup_epochs", "warmup_lr"):
            value = getattr(self, name)
            self._require(math.isfinite(value) and value >= 0, name, "a number of 0 or more")
        for name in ("bias_lr", "final_weight_decay", "warmup_steps"):
            value = getattr(self, name)
            self._require(
                value is None or (math.isfinite(value) and value >= 0), name, "a number of 0 or more, or null"
            )
        self._require(0 <= self.warmup_share <= 1, "warmup_share", "a number from 0 to 1")
        for name in ("clip", "reference_batch"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "a number above 0, or null")
        decay = self.layer_decay
        self._require(decay is None or 0 < decay <= 1, "layer_decay", "a number above 0 up to 1, or null")
        self._require(self.exempt_biases or self.bias_lr is None, "bias_lr", "null where exempt_biases is false")
        self._require(0 <= self.momentum < 1, "momentum", "a number from 0 to below 1")
        self._require(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers from 0 to below 1")
        self._require(self.trust > 0, "trust", "a number above 0")

    def _require(self, holds: bool, name: str, allowed: str) -> None:
        if not holds:
            raise UsageError(f"optim.{name} is {getattr(self, name)}; give {allowed}")


def make_optimiser(module: nn.Module, config: OptimConfig, encoder: nn.Module | None = None) -> Optimizer:
    """The optimiser over the trainable parameters in two groups: weights, then biases and normalisation.

    The second group (one-dimensional parameters and those called bias) has no weight decay and, with LARS, no trust
    ratio, as in the published code of SimCLR, Barlow Twins and DINO; where `exempt_biases` is false it has both, as in
    SwAV's (apex LARC without clipping over SGD). With `layer_decay` there are two for each layer of `encoder`, a part
    of the module (None: all of it), see `layer_decay.by_layer`.
    """
    weights, others = _split(module)
    groups: list[dict[str, Any]] = [
        {"params": weights, "decays": True},
        {"params": others, "decays": not config.exempt_biases},
    ]
    groups = [group | {"weight_decay": 0.0} for group in groups if group["params"]]
    if config.layer_decay is not None:
        groups = by_layer(groups, module if encoder is None else encoder, config.layer_decay)
    if config.name == "adamw":
        fused = all(parameter.is_floating_point() for parameter in weights)
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=fused)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    from timm.optim.lars import Lars

    for group in groups:
        group["always_adapt"] = group["decays"]  # timm would give no trust ratio to weights without weight decay
    return Lars(groups, lr=0.0, momentum=config.momentum, trust_coeff=config.trust, trust_clip=config.trust_clip)


def _split(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    weights: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim <= 1 or name.split(".")[-1] == "bias" else weights).append(parameter)
    return weights, others


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate and weight decay of every step of a run of `total_steps`."""

    config: OptimConfig
    batch_size: int
    total_steps: int
    steps_per_epoch: int

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up, at most `warmup_share` of the run."""
        return shortened(self.asked_warmup_steps, self.total_steps, self.config.warmup_share)

    @property
    def asked_warmup_steps(self) -> int:
        """Steps of warm-up as configured."""
        if self.config.warmup_steps is not None:
            return self.config.warmup_steps
        return round(self.config.warmup_epochs * self.steps_per_epoch)

    def lr(self, step: int, *, bias: bool = False) -> float:
        """Learning rate of a step (0 to total_steps - 1)."""
        base = self.config.bias_lr if bias and self.config.bias_lr is not None else self.config.lr
        peak = base * (self.batch_size / self.config.reference_batch if self.config.reference_batch else 1)
        share = base / self.config.lr if self.config.lr else 1
        first, final = (min(rate * share, peak) for rate in (self.config.warmup_lr, self.config.final_lr))
        return cosine(step, self.total_steps, peak, final, warmup=self.warmup_steps, warmup_start=first)

    def weight_decay(self, step: int) -> float:
        """Weight decay of a step."""
        if self.config.final_weight_decay is None:
            return self.config.weight_decay
        return cosine(step, self.total_steps, self.config.weight_decay, self.config.final_weight_decay)

    def apply(self, optimiser: Optimizer, step: int) -> None:
        """Set the groups' values for a step."""
        for group in optimiser.param_groups:
            group["lr"] = self.lr(step, bias=not group["decays"]) * group.get("scale", 1.0)
            group["weight_decay"] = self.weight_decay(step) if group["decays"] else 0.0


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], config: OptimConfig) -> Tensor | None:
    """Clip in place; returns the norm of all gradients before, or None where nothing is clipped."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if config.clip is None or not gradients:
        return None
    norms = torch._foreach_norm(gradients)
    total = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    if config.clip_by == "parameter":
        scales = [(config.clip / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, scales)
    else:
        torch._foreach_mul_(gradients, (config.clip / (total + 1e-6)).clamp(max=1.0))
    return total
