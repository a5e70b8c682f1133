"""Moving averages against the formula."""

import pytest
import torch
from torch import nn

from trainer.nn import ema


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.9995, 1.0])
def test_update_is_the_plain_formula(momentum):
    draw = torch.Generator().manual_seed(0)
    targets = [torch.randn(shape, generator=draw) for shape in ((4, 3), (7,), ())]
    sources = [torch.randn(target.shape, generator=draw) for target in targets]
    expected = [
        momentum * target.double() + (1 - momentum) * source.double()
        for target, source in zip(targets, sources, strict=True)
    ]
    before = [source.clone() for source in sources]
    ema.update(targets, iter(sources), momentum)
    for target, value in zip(targets, expected, strict=True):
        torch.testing.assert_close(target.double(), value, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(source, old) for source, old in zip(sources, before, strict=True))


def test_update_needs_no_gradient_and_leaves_none():
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    ema.update(target.parameters(), source.parameters(), 0.5)
    assert all(parameter.grad_fn is None and parameter.requires_grad for parameter in target.parameters())


def test_update_shows_what_is_not_finite():
    target = torch.zeros(2)
    ema.update([target], [torch.tensor([float("nan"), float("inf")])], 0.9)
    assert not torch.isfinite(target).any()


def test_copy_takes_running_statistics_too():
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 4 + 2)
    nn.init.constant_(source.weight, 7.0)
    ema.copy(target, source)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    assert int(target.num_batches_tracked) == 1
    nn.init.constant_(source.weight, 1.0)
    assert (target.weight == 7).all()
