"""NT-Xent by hand, against double loops, and under what may not change it; views with and without each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, noise_views
from trainer.methods.base import encode_views
from trainer.methods.simclr import SimCLR, SimCLRConfig, nt_xent


def naive_nt_xent(projections, temperature):
    """Equation 1 of the paper as it stands, over all 2N ordered pairs."""
    views = [row / row.square().sum().sqrt() for row in projections.flatten(0, 1)]
    images = len(views) // 2
    losses = []
    for i in range(len(views)):
        j = i + images if i < images else i - images
        others = [torch.exp(views[i] @ views[k] / temperature) for k in range(len(views)) if k != i]
        losses.append(-torch.log(torch.exp(views[i] @ views[j] / temperature) / sum(others)))
    return sum(losses) / len(losses)


def _random(images=5, dims=4, seed=0):
    return torch.randn(2, images, dims, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    axes = 3 * torch.eye(2)
    result = nt_xent(torch.stack([axes, axes]), 1.0)
    assert result.loss.item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-6)
    assert result.positive_similarity.item() == pytest.approx(1)
    assert result.negative_similarity.item() == pytest.approx(0)


def test_similarities_by_hand():
    views = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    result = nt_xent(views, 0.5)
    # Cosines of partners: (e1, e1) and (e2, -e1); of the others: (e1, e2), (e1, -e1), (e2, e1), (e1, -e1).
    assert result.positive_similarity.item() == pytest.approx(0.5)
    assert result.negative_similarity.item() == pytest.approx((0 - 1 + 0 - 1) / 4)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_loss_and_gradient_are_the_papers(temperature):
    ours = _random().requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    loss, expected = nt_xent(ours, temperature).loss, naive_nt_xent(theirs, temperature)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4)


def test_autocast_does_not_reach_the_loss():
    projections = _random(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(projections, 0.1).loss
    assert torch.equal(inside, nt_xent(projections, 0.1).loss)


@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 6), dims=st.integers(1, 5), seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_neither_scale_nor_order_matters(images, dims, seed, scale):
    projections = _random(images, dims, seed)
    loss = nt_xent(projections, 0.3).loss
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    for changed in (projections * scale, projections[:, order], projections.flip(0)):
        torch.testing.assert_close(nt_xent(changed, 0.3).loss, loss, atol=1e-5, rtol=1e-5)


def test_large_similarities_do_not_overflow():
    projections = torch.ones(2, 3, 4).requires_grad_()
    loss = nt_xent(projections, 1e-4).loss
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5), abs=1e-4)
    assert torch.isfinite(projections.grad).all()


def test_joint_batch_decides_what_batch_norm_sees():
    norm = nn.BatchNorm1d(3, affine=False)
    draw = torch.Generator().manual_seed(0)
    views = torch.stack([torch.randn(8, 3, generator=draw), 5 + 2 * torch.randn(8, 3, generator=draw)])
    apart = encode_views(norm, views, jointly=False).unflatten(0, (2, 8))
    together = encode_views(norm, views, jointly=True).unflatten(0, (2, 8))
    torch.testing.assert_close(apart.mean(1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)
    assert (together[1].mean(0) - together[0].mean(0) > 1).all()


class _Pixels(nn.Module):
    """Images as features."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1)


@pytest.mark.parametrize("joint_batch", [True, False])
def test_method_is_encoder_head_and_loss(joint_batch):
    torch.manual_seed(0)
    method = SimCLR(_Pixels, SimCLRConfig(hidden_dim=7, out_dim=5, temperature=0.4, joint_batch=joint_batch))
    views = noise_views(method, size=2)
    loss = method(views, MIDWAY).loss
    first, _, _, last = method.head
    batches = [views.crops.flatten(0, 1)] if joint_batch else list(views.crops)
    projections = []
    for batch in batches:
        hidden = batch.flatten(1) @ first.weight.T
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        projections.append(hidden.relu() @ last.weight.T)
    expected = naive_nt_xent(torch.cat(projections).double().unflatten(0, (2, -1)), 0.4)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings_", [{"temperature": 0}, {"hidden_dim": 0}, {"out_dim": -1}, {"head_norm": 7}])
def test_impossible_settings_are_refused(settings_):
    name = next(iter(settings_))
    with pytest.raises(UsageError, match=rf"method\.{name} is {settings_[name]}"):
        SimCLRConfig(**settings_)
