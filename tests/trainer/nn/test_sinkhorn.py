"""Sinkhorn-Knopp by hand, against the authors' loops in decimals, and its invariants."""

from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.nn.sinkhorn import sinkhorn


def naive_sinkhorn(scores, epsilon, iterations):
    """`distributed_sinkhorn` of facebookresearch/swav on [N, K], in decimals, which neither over- nor underflow."""
    q = [[(Decimal(score) / Decimal(epsilon)).exp() for score in row] for row in scores.tolist()]
    images, prototypes = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        sums = [sum(column) for column in zip(*q, strict=True)]
        q = [[value / of_all / prototypes for value, of_all in zip(row, sums, strict=True)] for row in q]
        q = [[value / sum(row) / images for value in row] for row in q]
    return torch.tensor([[float(value * images) for value in row] for row in q], dtype=torch.float64)


def _scores(images=7, prototypes=5, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(images, prototypes, generator=draw) * 2 - 1) * scale


def test_by_hand():
    # Image 0 leans 3:1 towards prototype 0, image 1 not at all. Shares of the prototypes: 3/4 + 1/4 and 1/4 + 1/4 of
    # weights 3, 1, 1, 1: divided by 4 and 2 the images have 3/4, 1/2 and 1/4, 1/2, of which each is scaled to 1.
    scores = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    expected = torch.tensor([[3 / 5, 2 / 5], [1 / 3, 2 / 3]])
    torch.testing.assert_close(sinkhorn(scores, 1.0, 1), expected)


def test_images_and_prototypes_in_balance_stay_as_they_are():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(sinkhorn(scores, 1.0, 3), scores.softmax(-1))


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize(("images", "prototypes"), [(7, 5), (4, 12), (1, 3)])
def test_it_is_the_authors(images, prototypes, iterations):
    scores = _scores(images, prototypes)
    expected = naive_sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(sinkhorn(scores, 0.05, iterations).double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("epsilon", "images"), [(0.05, 7), (1 / 30, 4000), (0.5, 7)])
def test_bounded_scores_are_assigned_alike(epsilon, images):
    scores = _scores(images, 12)
    scores[0], scores[:, 1] = -1.0, 1.0  # as far apart as cosines can be
    torch.testing.assert_close(sinkhorn(scores, epsilon, 3, bound=1.0), sinkhorn(scores, epsilon, 3))
    assert torch.equal(sinkhorn(scores, 1e-3, 3, bound=1.0), sinkhorn(scores, 1e-3, 3))  # too wide for float32


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_of_a_thousand_neither_overflow_nor_underflow(seed):
    scores = _scores(scale=50.0, seed=seed)  # over .05: up to 1000, beyond what exp() has in any format
    scores[0], scores[:, 1] = -50.0, 50.0  # an image far from all, a prototype near to all
    found = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(found.double(), naive_sinkhorn(scores, 0.05, 3), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(found.sum(-1), torch.ones(7))


def test_several_at_once_and_without_gradient():
    scores = torch.stack([_scores(seed=1), _scores(seed=2)]).requires_grad_()
    found = sinkhorn(scores, 0.05, 3)
    assert not found.requires_grad
    for one, expected in zip(found, scores.detach(), strict=True):
        assert torch.equal(one, sinkhorn(expected, 0.05, 3))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(1, 9), prototypes=st.integers(1, 9), scale=st.floats(0, 1000))
def test_every_image_is_shared_out_whole(seed, images, prototypes, scale):
    found = sinkhorn(_scores(images, prototypes, seed, scale), 1.0, 3)
    torch.testing.assert_close(found.sum(-1), torch.ones(images))
    assert found.min() >= 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(1, 9), prototypes=st.integers(1, 9))
def test_prototypes_get_the_same_share_in_the_end(seed, images, prototypes):
    shares = sinkhorn(_scores(images, prototypes, seed), 0.5, 200).sum(0)
    torch.testing.assert_close(shares, torch.full((prototypes,), images / prototypes), atol=1e-2, rtol=1e-2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_only_differences_count_and_no_order(seed):
    draw = torch.Generator().manual_seed(seed)
    scores = _scores(seed=seed)
    order = torch.randperm(7, generator=draw)
    expected = sinkhorn(scores, 0.1, 3)
    of_prototypes = torch.randn(5, generator=draw)  # liked by all images alike: the first round takes it away
    torch.testing.assert_close(sinkhorn(scores + of_prototypes, 0.1, 3), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(sinkhorn(scores[order], 0.1, 3), expected[order], atol=1e-5, rtol=1e-4)


def test_autocast_does_not_reach_it_and_half_precision_is_widened():
    scores = _scores()
    with torch.autocast("cpu", torch.bfloat16):
        inside = sinkhorn(scores, 0.05, 3)
    assert torch.equal(inside, sinkhorn(scores, 0.05, 3))
    assert sinkhorn(scores.half(), 0.05, 3).dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    scores = _scores()
    scores[2, 3] = bad
    assert not torch.isfinite(sinkhorn(scores, 0.05, 3)).all()
