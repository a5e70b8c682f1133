"""MoCo v3's loss by hand and against loops; heads, the frozen patch projection, what stays as it was."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, noise_views, small_method, tiny_vit
from trainer.engine.optim import OptimConfig, make_optimiser
from trainer.methods.moco_v3 import MoCoV3, MoCoV3Config, info_nce


def naive_info_nce(queries, keys, temperature):
    """Algorithm 1 of the paper, query by query: both directions added, each scaled by twice the temperature."""
    images = queries.shape[1]

    def contrastive(q, k):
        q, k = (torch.stack([row / row.square().sum().sqrt() for row in rows]) for rows in (q, k))
        losses = []
        for i in range(images):
            similarities = [torch.exp(q[i] @ k[j] / temperature) for j in range(images)]
            losses.append(-torch.log(similarities[i] / sum(similarities)))
        return 2 * temperature * sum(losses) / images

    return contrastive(queries[0], keys[1]) + contrastive(queries[1], keys[0])


def _random(seed=0, images=5, dims=4):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, images, dims, generator=draw).unbind()


def test_by_hand():
    axes = torch.stack([3 * torch.eye(2), 5 * torch.eye(2)])
    result = info_nce(axes, axes, 0.5)
    assert result.loss.item() == pytest.approx(2 * 2 * 0.5 * math.log(1 + math.exp(-2)), abs=1e-6)
    assert result.positive_similarity.item() == pytest.approx(1)
    assert result.negative_similarity.item() == pytest.approx(0)


def test_queries_meet_the_keys_of_the_other_view_only():
    first, second = torch.eye(2), -torch.eye(2)
    queries, keys = torch.stack([first, second]), torch.stack([second, first])
    result = info_nce(queries, keys, 1.0)
    assert result.positive_similarity.item() == pytest.approx(1)
    assert info_nce(queries, keys.flip(0), 1.0).positive_similarity.item() == pytest.approx(-1)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_loss_and_gradient_are_the_papers(temperature):
    queries, keys = _random()
    ours, theirs = queries.clone().requires_grad_(), queries.double().requires_grad_()
    loss, expected = info_nce(ours, keys, temperature).loss, naive_info_nce(theirs, keys.double(), temperature)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4)


def test_similarities_are_the_means_of_the_cosines():
    queries, keys = _random()
    cosines = torch.stack([torch.cosine_similarity(queries[v][:, None], keys[1 - v][None], -1) for v in (0, 1)])
    result = info_nce(queries, keys, 0.3)
    own = torch.eye(5, dtype=torch.bool).expand(2, 5, 5)
    torch.testing.assert_close(result.positive_similarity, cosines[own].mean())
    torch.testing.assert_close(result.negative_similarity, cosines[~own].mean())


def test_no_gradient_goes_to_the_keys():
    queries, keys = (value.requires_grad_() for value in _random())
    result = info_nce(queries, keys, 0.2)
    result.loss.backward()
    assert keys.grad is None
    assert not result.positive_similarity.requires_grad


@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 6), seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_neither_scale_nor_order_of_images_nor_of_views_matters(images, seed, scale):
    queries, keys = _random(seed, images)
    loss = info_nce(queries, keys, 0.3).loss
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    changed = [(queries * scale, keys / scale), (queries[:, order], keys[:, order]), (queries.flip(0), keys.flip(0))]
    for pair in changed:
        torch.testing.assert_close(info_nce(*pair, 0.3).loss, loss, atol=1e-5, rtol=1e-5)


def test_large_similarities_do_not_overflow():
    queries = torch.ones(2, 3, 4, requires_grad=True)
    loss = info_nce(queries, torch.ones(2, 3, 4), 1e-4).loss
    loss.backward()
    assert loss.item() == pytest.approx(4e-4 * math.log(3), abs=1e-6)
    assert torch.isfinite(queries.grad).all()


def test_autocast_does_not_reach_the_loss():
    queries, keys = _random(images=16, dims=32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(queries, keys, 0.2).loss
    assert torch.equal(inside, info_nce(queries, keys, 0.2).loss)


def test_method_is_encoders_projectors_predictor_and_loss():
    method = small_method("moco-v3", temperature=0.3)
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter += 0.05
    views = noise_views(method)
    queries = torch.stack([method.predictor(method.student_head(method.student(view))) for view in views.crops])
    keys = torch.stack([method.teacher_head(method.teacher(view)) for view in views.crops])
    expected = naive_info_nce(queries.double(), keys.double(), 0.3)
    torch.testing.assert_close(method(views, MIDWAY).loss.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings_", "projector", "last_norms"),
    [({}, 3, (True, True)), ({"projector_layers": 2, "predictor_last_norm": False}, 2, (True, False))],
)
def test_heads_are_those_of_vits_and_of_resnets(settings_, projector, last_norms):
    method = MoCoV3(tiny_vit, MoCoV3Config(hidden_dim=16, out_dim=8, **settings_))
    for head, layers, normed in zip((method.student_head, method.predictor), (projector, 2), last_norms, strict=True):
        assert sum(isinstance(layer, nn.Linear) for layer in head) == layers
        assert isinstance(head[-1], nn.BatchNorm1d) == normed
        assert not normed or not head[-1].affine
    assert [type(layer) for layer in method.teacher_head] == [type(layer) for layer in method.student_head]


def test_patch_projection_stays_random():
    method = small_method("moco-v3", momentum=0.5, final_momentum=0.5)
    student, teacher = method.student.patch_embed.proj, method.teacher.patch_embed.proj
    frozen = {key for key, value in method.student.named_parameters() if not value.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5  # patches of 8 pixels, 32 wide: that of the authors' code
    assert 0.95 * bound < student.weight.abs().max() <= bound and not student.bias.any()
    start = student.weight.clone()
    optimiser = make_optimiser(method, OptimConfig(lr=0.1, weight_decay=0.5))
    for group in optimiser.param_groups:
        group["lr"] = 0.1
    method(noise_views(method), MIDWAY).loss.backward()
    optimiser.step()
    method.after_step(MIDWAY)
    assert torch.equal(student.weight, start) and torch.equal(teacher.weight, start)
    assert small_method("moco-v3", freeze_patch_embed=False).student.patch_embed.proj.weight.requires_grad


def test_encoders_without_patches_train_whole():
    def make_encoder(**arguments):
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        encoder.num_features = 5
        return encoder

    method = MoCoV3(make_encoder, MoCoV3Config(hidden_dim=8, out_dim=4))
    assert all(parameter.requires_grad for parameter in method.student.parameters())


@pytest.mark.parametrize(
    "settings_",
    [
        {"temperature": 0},
        {"hidden_dim": 0},
        {"out_dim": -1},
        {"projector_layers": 0},
        {"momentum": 2},
        {"head_norm": 7},
    ],
)
def test_impossible_settings_are_refused(settings_):
    name = next(iter(settings_))
    with pytest.raises(UsageError, match=rf"method\.{name} is {settings_[name]}; it must be"):
        MoCoV3Config(**settings_)
