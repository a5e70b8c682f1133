"""The collapse detector at its two ends."""

import numpy as np
import torch

from trainer.nn.statistics import feature_std


def test_equal_features_have_no_spread():
    assert feature_std(torch.ones(8, 5)) < 1e-6


def test_scaled_copies_count_as_collapsed():
    assert feature_std(torch.arange(1.0, 9).view(8, 1) * torch.ones(8, 5)) < 1e-6


def test_all_axes_in_both_directions_spread_by_one():
    axes = torch.eye(4)
    torch.testing.assert_close(feature_std(torch.cat([axes, -axes])), torch.tensor(1.0))


def test_half_precision_features_are_measured_in_float32():
    features = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    rough = feature_std(features.bfloat16())
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, feature_std(features), atol=1e-2, rtol=0)


def test_spread_by_numpy():
    features = np.random.default_rng(1).normal(size=(30, 5))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = unit.std(axis=0).mean() * 5**0.5
    torch.testing.assert_close(feature_std(torch.tensor(features)), torch.tensor(expected, dtype=torch.float32))
