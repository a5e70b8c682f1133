"""Heads against their formulas, written out."""

import math

import pytest
import torch
from torch import nn

from trainer.nn.heads import DINOHead, Prototypes, projection_head

DRAW = torch.Generator().manual_seed(0)


def test_projection_head_is_linear_norm_relu_linear():
    head = projection_head((6, 5, 4, 3))
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)] == [
        (6, 5),
        (5, 4),
        (4, 3),
    ]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))


def test_projection_head_without_norm_knows_no_batch():
    head = projection_head((6, 5, 3), "none")
    values = torch.randn(4, 6, generator=DRAW)
    torch.testing.assert_close(head(values)[:1], head(values[:1]))
    assert head[0].bias is not None and head[-1].bias is None


def test_projection_head_with_a_last_norm_gives_standardised_dimensions():
    head = projection_head((6, 5, 3), last_norm=True)
    assert [type(layer) for layer in head][-2:] == [nn.Linear, nn.BatchNorm1d]
    assert list(head[-1].parameters()) == []
    values = head(torch.randn(8, 6, generator=DRAW))
    torch.testing.assert_close(values.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert [type(layer) for layer in projection_head((6, 5, 3), "none", last_norm=True)][-1] == nn.Linear


def test_projection_head_with_a_bias_at_the_end():
    head = projection_head((6, 5, 3), last_bias=True)
    assert head[0].bias is None and head[-1].bias.shape == (3,)


def test_projection_head_of_one_width_is_one_layer():
    assert [type(layer) for layer in projection_head((6, 3))] == [nn.Linear]


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_dino_head_is_the_papers_formula(norm_last_layer):
    head = DINOHead(6, 7, hidden_dim=5, bottleneck_dim=4, norm_last_layer=norm_last_layer).double()
    with torch.no_grad():
        head.last_layer.norms.mul_(torch.linspace(1, 2, 7)[:, None])
    values = torch.randn(3, 6, generator=DRAW, dtype=torch.float64)

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    first, second, third = (layer for layer in head.mlp if isinstance(layer, nn.Linear))
    inner = gelu(gelu(values @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    bottleneck = inner @ third.weight.T + third.bias
    bottleneck = bottleneck / bottleneck.square().sum(1, keepdim=True).sqrt()
    rows = head.last_layer.directions
    weight = head.last_layer.norms * rows / rows.square().sum(1, keepdim=True).sqrt()
    # The head computes its last layer in float32.
    head.last_layer.float()
    torch.testing.assert_close(head(values).double(), bottleneck @ weight.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fixed_norm", [True, False])
def test_prototypes_have_norm_one_and_keep_it_where_fixed(fixed_norm):
    layer = Prototypes(4, 7, fixed_norm=fixed_norm)
    rows = layer(torch.eye(4)).T
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(7))
    layer(torch.randn(5, 4, generator=DRAW)).square().sum().backward()
    assert (layer.norms.grad is None) == fixed_norm
    # A change along a direction does not matter, so the gradient is across it.
    across = (layer.directions.grad * layer.directions).sum(1)
    torch.testing.assert_close(across, torch.zeros(7), atol=1e-5, rtol=0)


def test_dino_head_starts_as_the_reference_does():
    head = DINOHead(64, 9, hidden_dim=256, bottleneck_dim=16)
    for layer in (layer for layer in head.mlp if isinstance(layer, nn.Linear)):
        assert not layer.bias.any()
        assert abs(layer.weight.std().item() - 0.02) < 2e-3


def test_dino_head_takes_batch_norm():
    kinds = [type(layer) for layer in DINOHead(6, 7, hidden_dim=5, bottleneck_dim=4, norm="batch").mlp]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]


def test_dino_logits_are_float32_under_autocast():
    head = DINOHead(6, 7, hidden_dim=5, bottleneck_dim=4)
    values = torch.randn(3, 6, generator=DRAW)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(values)
        bottleneck = head.mlp(values)
    assert bottleneck.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    exact = nn.functional.normalize(bottleneck.float(), dim=-1) @ nn.functional.normalize(head.last_layer.directions).T
    torch.testing.assert_close(logits, exact, atol=1e-6, rtol=0)
