"""BYOL's loss by hand and against loops; which network sees, learns and predicts what."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, noise_views, small_method
from trainer.methods.byol import BYOLConfig, byol_loss


def naive_byol_loss(predictions, targets):
    """Equation 2 of the paper for both orders of the views: squared distances of what is normalised."""

    def normalised(row):
        return row / sum(value * value for value in row) ** 0.5

    images = predictions.shape[1]
    distances = [
        sum((normalised(predictions[view, i]) - normalised(targets[1 - view, i])) ** 2)
        for view in (0, 1)
        for i in range(images)
    ]
    return sum(distances) / images


def _random(seed=0, images=5, dims=4):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, images, dims, generator=draw).unbind()


def test_by_hand():
    # The first view's prediction is the second's target, at another length: no distance. Of the second view's
    # predictions one is at a right angle to its target, the other opposite: 2 and 4.
    predictions = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [-1.0, 0.0]]])
    targets = torch.tensor([[[1.0, 0.0], [5.0, 0.0]], [[1.0, 0.0], [0.0, 7.0]]])
    loss, similarity = byol_loss(predictions, targets)
    assert loss.item() == pytest.approx((2 + 4) / 2)
    assert similarity.item() == pytest.approx((1 + 1 + 0 - 1) / 4)


def test_loss_and_gradient_are_the_papers():
    predictions, targets = _random()
    ours, theirs = predictions.clone().requires_grad_(), predictions.double().requires_grad_()
    loss, expected = byol_loss(ours, targets)[0], naive_byol_loss(theirs, targets.double())
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4)


def test_no_gradient_goes_to_the_targets():
    predictions, targets = (value.requires_grad_() for value in _random())
    loss, similarity = byol_loss(predictions, targets)
    loss.backward()
    assert targets.grad is None
    assert not similarity.requires_grad


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_neither_scale_nor_order_of_images_nor_of_views_matters(seed, scale):
    predictions, targets = _random(seed)
    loss, similarity = byol_loss(predictions, targets)
    assert loss.item() == pytest.approx(4 - 4 * similarity.item(), abs=1e-5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    changed = [(predictions * scale, targets / scale), (predictions[:, order], targets[:, order])]
    changed.append((predictions.flip(0), targets.flip(0)))
    for pair in changed:
        torch.testing.assert_close(byol_loss(*pair)[0], loss, atol=1e-5, rtol=1e-5)


def test_autocast_does_not_reach_the_loss():
    predictions, targets = _random(images=16, dims=32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = byol_loss(predictions, targets)[0]
    assert torch.equal(inside, byol_loss(predictions, targets)[0])


def _normed(layer, values):
    """Linear layer, BatchNorm as it starts, ReLU."""
    hidden = values @ layer.weight.T
    return ((hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()).relu()


def _mlp(head, values):
    first, _, _, last = head
    return _normed(first, values) @ last.weight.T


@pytest.mark.parametrize("joint_batch", [False, True])
def test_method_is_encoders_projectors_predictor_and_loss(joint_batch):
    method = small_method("byol", joint_batch=joint_batch)
    views = noise_views(method)
    batches = [views.crops.flatten(0, 1)] if joint_batch else list(views.crops)
    with torch.no_grad():
        for parameter in method.teacher_head.parameters():
            parameter += 0.1
        # The shift of BatchNorm, which the formula lacks, stays as it starts.
        method.teacher_head[1].weight.fill_(1.0)
        method.teacher_head[1].bias.zero_()
    predictions = torch.cat([_mlp(method.predictor, _mlp(method.student_head, method.student(b))) for b in batches])
    targets = torch.cat([_mlp(method.teacher_head, method.teacher(b)) for b in batches])
    expected = naive_byol_loss(predictions.double().unflatten(0, (2, -1)), targets.double().unflatten(0, (2, -1)))
    output = method(views, MIDWAY)
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-4, rtol=1e-4)
    assert output.logs["positive_similarity"].item() == pytest.approx(1 - expected.item() / 4, abs=1e-4)


@pytest.mark.parametrize(("projection_std", "told"), [(0.001, True), (0.9, False)])
def test_collapse_is_also_that_of_the_projections(projection_std, told):
    logs = {"positive_similarity": 1.0, "projection_std": projection_std, "feature_std": 0.5}
    assert (small_method("byol").collapse(logs, MIDWAY) is not None) == told
    assert small_method("byol").collapse({**logs, "projection_std": 0.9, "feature_std": 0.0}, MIDWAY)


def test_projections_that_are_all_the_same_have_no_spread():
    method = small_method("byol", head_norm="none")
    with torch.no_grad():
        method.teacher_head[-1].weight.zero_()
        method.teacher_head[-1].weight[:, 0] = 1.0
        method.teacher_head[0].weight.zero_()
        method.teacher_head[0].bias.fill_(1.0)
    logs = {name: value.item() for name, value in method(noise_views(method), MIDWAY).logs.items()}
    assert logs["projection_std"] == pytest.approx(0, abs=1e-6)
    assert "projects all images to the same point" in method.collapse(logs, MIDWAY)
    assert math.isfinite(logs["positive_similarity"])


@pytest.mark.parametrize(
    "settings_", [{"hidden_dim": 0}, {"out_dim": -1}, {"momentum": 1.5}, {"final_momentum": -0.1}, {"head_norm": 7}]
)
def test_impossible_settings_are_refused(settings_):
    name = next(iter(settings_))
    with pytest.raises(UsageError, match=rf"method\.{name} is {settings_[name]}; it must be"):
        BYOLConfig(**settings_)
