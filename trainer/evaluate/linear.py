"""Linear probe: multinomial logistic regression on fixed features, by L-BFGS, its strength chosen on held-out data.

The test part is looked at once, by the final classifier. Deterministic: the same features give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS, _GRADIENT = 200, 1e-5  # of L-BFGS at most, and the largest slope that ends it

# Weight decay of the mean loss; C of scikit-learn is 1 / (l2 * N). From strong to weak, each start from the last.
L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProbe:
    """A fitted classifier of features as they are. `l2` is what the validation part chose; accuracies lie in 0..1."""

    classes: Tensor  # [C], labels in the order of the columns of `weight`
    weight: Tensor  # float64 [D + 1, C], bias last
    validation_accuracy: float
    l2: float
    train_accuracy: float

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of features [M, D] whose label [M] is predicted; labels unknown in training count as wrong.

        Raises `ValueError` for sizes that do not match and for features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] + 1 != len(self.weight):
            raise ValueError(f"features {tuple(features.shape)} differ from the probe's [M, {len(self.weight) - 1}]")
        if len(features) != len(labels) or not len(features):
            raise ValueError(f"{len(features)} test features came with {len(labels)} labels; equal, at least one")
        _check_finite(features)
        predicted = self.classes[predict(self.weight, features.to(self.weight))]
        return (predicted == labels.to(predicted.device)).double().mean().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """Accuracies are shares in 0..1; `l2` is what the validation part chose."""

    accuracy: float
    validation_accuracy: float
    l2: float
    train_accuracy: float


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    l2_grid: Sequence[float] = L2_GRID,
    validation: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LinearResult:
    """Accuracy on `test` [M, D] of the probe that `fit_probe` fits to `train` [N, D]; labels are any integers."""
    probe = fit_probe(train, train_labels, l2_grid=l2_grid, validation=validation, seed=seed, dtype=dtype)
    return LinearResult(
        accuracy=probe.accuracy(test, test_labels),
        validation_accuracy=probe.validation_accuracy,
        l2=probe.l2,
        train_accuracy=probe.train_accuracy,
    )


def fit_probe(
    train: Tensor,
    train_labels: Tensor,
    *,
    l2_grid: Sequence[float] = L2_GRID,
    validation: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LinearProbe:
    """A linear classifier of features `train` [N, D] with labels [N], any integers.

    Features are standardised by the training part's statistics. Each l2 of the grid is fitted, in `dtype`, on
    1 - `validation` of the training part, drawn by `seed` with equal shares of each class, and scored on the rest;
    the best (of equals the strongest) is fitted again on all of it. Raises `ValueError` for sizes that do not match
    and for a training part of fewer than two classes.
    """
    classes, targets = _check(train, train_labels)
    mean, std = _statistics(train.double())
    standardised = (train.double() - mean) / std
    axes = _principal_axes(standardised)
    turned = (standardised @ axes).to(dtype)
    fitting, held_out = _split(targets, validation, seed)
    scores = _scores(turned[fitting], targets[fitting], turned[held_out], targets[held_out], len(classes), l2_grid)
    best = max(scores, key=lambda l2: (scores[l2], l2))
    weight = fit(turned, targets, len(classes), best)
    return LinearProbe(
        classes=classes,
        weight=_on_raw_features(weight.double(), axes, mean, std),
        validation_accuracy=scores[best],
        l2=best,
        train_accuracy=(predict(weight, turned) == targets).double().mean().item(),
    )


def fit(features: Tensor, targets: Tensor, classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """Weights [D + 1, classes], bias last, that minimise the mean cross-entropy + l2 / 2 * |weights without bias|^2.

    `features` [N, D] may be anything, but few iterations are needed only if their dimensions are uncorrelated: the
    search then runs in coordinates in which the loss is about equally curved in all directions.
    """
    curvature = features.square().mean(dim=0) / classes + l2
    scale = torch.cat([curvature.rsqrt(), curvature.new_full((1,), classes**0.5)])[:, None]
    with torch.enable_grad():
        point = features.new_zeros(len(scale), classes) if start is None else start / scale
        point.requires_grad_()
        optimiser = torch.optim.LBFGS(
            [point],
            max_iter=_ITERATIONS,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=_GRADIENT,
            tolerance_change=torch.finfo(features.dtype).eps,
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            weight = point * scale
            loss = F.cross_entropy(_logits(weight, features), targets) + l2 / 2 * weight[:-1].square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    return point.detach() * scale


def predict(weight: Tensor, features: Tensor) -> Tensor:
    """Classes int64 [N] of features [N, D] by the weights of `fit`."""
    return _logits(weight, features).argmax(dim=1)


def _logits(weight: Tensor, features: Tensor) -> Tensor:
    return features @ weight[:-1] + weight[-1]


def _scores(
    features: Tensor,
    targets: Tensor,
    held_out: Tensor,
    held_out_targets: Tensor,
    classes: int,
    l2_grid: Sequence[float],
) -> dict[float, float]:
    """Held-out accuracy of each l2, from strong to weak until it has fallen twice."""
    weight: Tensor | None = None
    scores: dict[float, float] = {}
    falls = 0
    for l2 in sorted(l2_grid, reverse=True):
        weight = fit(features, targets, classes, l2, weight)
        scores[l2] = (predict(weight, held_out) == held_out_targets).double().mean().item()
        falls = falls + 1 if scores[l2] < max(scores.values()) else 0
        if falls == 2:
            break
    return scores


def _principal_axes(features: Tensor) -> Tensor:
    """Orthonormal columns [D, R] that span the features [N, D], uncorrelated in them; R is their rank.

    Classifiers with an l2 penalty are the same in any rotation, and nothing is lost with directions of no variance.
    """
    wide = features.shape[1] > features.shape[0]
    gram = features @ features.T if wide else features.T @ features
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    axes = features.T @ vectors[:, kept] / values[kept].sqrt() if wide else vectors[:, kept]
    return axes if axes.shape[1] else torch.eye(features.shape[1], 1).to(features)  # no feature varies


def _statistics(train: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    return mean, torch.where(std > 0, std, 1)  # a constant says nothing, and must not become NaN


def _on_raw_features(weight: Tensor, axes: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The weights [D + 1, C] that give features what `weight` gives them once standardised and turned to `axes`."""
    slopes = axes @ weight[:-1] / std[:, None]
    return torch.cat([slopes, weight[-1:] - mean[None] @ slopes])


def _split(targets: Tensor, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to fit on and positions held out, with equal shares of each class; both hold at least one."""
    count = len(targets)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(targets.device)
    order = order[targets[order].argsort(stable=True)]  # the classes one after the other, random within
    steps = (torch.arange(count + 1, device=targets.device) * validation).floor()
    held = steps.diff() > 0
    held[-1] |= not bool(held.any())
    return order[~held], order[held]


def _check(train: Tensor, train_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes in training and each training label's position among them."""
    if train.ndim != 2 or len(train) != len(train_labels):
        raise ValueError(f"train {tuple(train.shape)} and its labels {tuple(train_labels.shape)} differ")
    _check_finite(train)
    classes, targets = train_labels.to(train.device).unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"a linear probe needs at least two classes; the training part has {len(classes)}")
    return classes, targets


def _check_finite(features: Tensor) -> None:
    if not features.isfinite().all():
        raise ValueError("features are not finite: the encoder has diverged")
