"""Effective rank against numpy's SVD and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluate.rank import effective_rank


def reference(features):
    values = np.linalg.svd(features, compute_uv=False)
    share = values / np.abs(values).sum() + 1e-7
    return np.exp(-(share * np.log(share)).sum())


@pytest.mark.parametrize("shape", [(200, 16), (16, 200), (50, 50)])
def test_equals_the_papers_formula(shape):
    features = np.random.default_rng(0).normal(size=shape) * np.logspace(0, -3, shape[1])
    assert effective_rank(torch.tensor(features)) == pytest.approx(reference(features), rel=1e-6)


def test_one_direction_is_rank_one():
    features = torch.outer(torch.linspace(1, 2, 100), torch.randn(8, generator=torch.Generator().manual_seed(0)))
    assert effective_rank(features) == pytest.approx(1, abs=1e-3)


def test_orthogonal_features_have_full_rank():
    assert effective_rank(torch.eye(12).repeat(5, 1)) == pytest.approx(12, rel=1e-4)


def test_half_of_the_dimensions():
    features = torch.zeros(6, 6)
    features[:3, :3] = torch.eye(3)
    assert effective_rank(features) == pytest.approx(3, rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 10), st.floats(1e-3, 1e3))
def test_between_one_and_all_whatever_the_scale(seed, count, dims, scale):
    features = torch.tensor(np.random.default_rng(seed).normal(size=(count, dims)))
    rank = effective_rank(features)
    assert 1 - 1e-3 <= rank <= min(count, dims) * (1 + 1e-3)
    assert effective_rank(features * scale) == pytest.approx(rank, rel=1e-6)


def test_nothing_and_not_a_number():
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf]])))
