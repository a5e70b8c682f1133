"""Barlow Twins' loss by hand, against loops, and under what may not change it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, noise_views, small_method
from trainer.methods.barlow_twins import BarlowTwinsConfig, barlow_terms, cross_correlation


def naive_terms(projections):
    """Both sums of equation 1 with BatchNorm and correlation written out."""

    def standardised(column):
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        return [(value - mean) / (variance + 1e-5) ** 0.5 for value in column]

    first, second = ([standardised(list(column)) for column in view.T] for view in projections)
    on, off = 0.0, 0.0
    for i, ours in enumerate(first):
        for j, theirs in enumerate(second):
            c = sum(a * b for a, b in zip(ours, theirs, strict=True)) / len(ours)
            on, off = (on + (1 - c) ** 2, off) if i == j else (on, off + c**2)
    return on, off


def _random(images=6, dims=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(images, dims, generator=draw)
    return torch.stack([first, 0.7 * first + torch.randn(images, dims, generator=draw)])


def test_by_hand():
    # Both dimensions of the first view go up, down, up, down; the second view's are the same, or opposite.
    swing = torch.tensor([1.0, -1, 1, -1])[:, None].expand(4, 2)
    same = barlow_terms(torch.stack([swing, swing]))
    assert same.on_diagonal.item() == pytest.approx(0, abs=1e-4)
    assert same.off_diagonal.item() == pytest.approx(2, abs=1e-4)
    opposite = barlow_terms(torch.stack([swing, -swing]))
    assert opposite.on_diagonal.item() == pytest.approx(8, abs=1e-3)
    assert opposite.off_diagonal.item() == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_terms_and_gradients_are_the_papers(offset):
    ours = (_random() + offset).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    terms, expected = barlow_terms(ours), naive_terms(theirs)
    tolerance = 1e-5 if offset == 0 else 1e-4
    for term, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(term.double(), value, atol=tolerance, rtol=tolerance)
    (terms.on_diagonal + 0.3 * terms.off_diagonal).backward()
    (expected[0] + 0.3 * expected[1]).backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=tolerance, rtol=10 * tolerance)


def test_correlation_is_that_of_numpy():
    projections = _random(50, 3)
    whole = torch.corrcoef(torch.cat([projections[0].T, projections[1].T]).double())
    torch.testing.assert_close(cross_correlation(projections).double(), whole[:3, 3:], atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.5, 20), shift=st.floats(-20, 20))
def test_neither_scale_nor_shift_nor_order_matters(seed, scale, shift):
    projections = 10 * _random(seed=seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for changed in (projections * scale + shift, projections[:, order]):
        for term, expected in zip(barlow_terms(changed), barlow_terms(projections), strict=True):
            torch.testing.assert_close(term, expected, atol=1e-3, rtol=1e-3)


def test_collapsed_projections_are_worst_but_finite():
    projections = torch.ones(2, 6, 4, requires_grad=True)
    terms = barlow_terms(projections)
    sum(terms).backward()
    assert terms.on_diagonal.item() == pytest.approx(4)
    assert torch.isfinite(projections.grad).all()


def test_autocast_does_not_reach_the_loss():
    projections = _random(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = barlow_terms(projections)
    assert all(torch.equal(term, expected) for term, expected in zip(inside, barlow_terms(projections), strict=True))


def test_method_weighs_its_terms():
    method = small_method("barlow-twins", off_diagonal=0.25, scale=0.5)
    output = method(noise_views(method), MIDWAY)
    expected = 0.5 * (output.logs["on_diagonal"] + 0.25 * output.logs["off_diagonal"])
    torch.testing.assert_close(output.loss.detach(), expected)
    projections = method.head(method.backbone(noise_views(method).crops.flatten(0, 1))).unflatten(0, (2, -1))
    on, off = naive_terms(projections.detach().double())
    torch.testing.assert_close(output.loss.double().detach(), 0.5 * (on + 0.25 * off), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "settings_", [{"projector": ()}, {"projector": (8, 0)}, {"off_diagonal": -1}, {"scale": 0}, {"head_norm": "layer"}]
)
def test_impossible_settings_are_refused(settings_):
    with pytest.raises(UsageError, match=f"method.{next(iter(settings_))}"):
        BarlowTwinsConfig(**settings_)
