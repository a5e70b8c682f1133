"""Values and gradients of the collectives on two ranks, against what one process computes of all values."""

import pytest
import torch
import torch.distributed as dist

from tests.trainer.ranks import RANKS, on_ranks
from trainer.nn import collectives


def _values(rank):
    return torch.arange(6, dtype=torch.float64).view(3, 2).sin() + 3 * rank


def _weights(rank):
    """Each rank weighs the six or twelve results differently, so that a gradient tells whose it is."""
    return torch.linspace(1, 2, 12, dtype=torch.float64).view(6, 2) * (rank + 1) ** 2


def _gather():
    rank = dist.get_rank()
    values = _values(rank).requires_grad_()
    gathered = collectives.gather(values)
    (gathered.square() * _weights(rank)).sum().backward()
    return {"result": gathered.detach(), "gradient": values.grad}


def _sum(replicated):
    rank = dist.get_rank()
    values = _values(rank).requires_grad_()
    total = collectives.all_reduce_sum(values, replicated=replicated)
    (total.square() * _weights(0 if replicated else rank)[:3]).sum().backward()
    return {"result": total.detach(), "gradient": values.grad, "untouched": bool((values == _values(rank)).all())}


def _everything():
    strided = torch.arange(6.0).view(2, 3).T * (dist.get_rank() + 1)
    return {
        "gather": _gather(),
        "sum": _sum(False),
        "replicated": _sum(True),
        "strided": collectives.gather(strided),
        "max": collectives.all_reduce_max(_values(0) * (-1) ** dist.get_rank()),
        "size": (collectives.world_size(), collectives.rank()),
    }


@pytest.fixture(scope="module")
def results():
    return on_ranks(_everything)


def test_ranks_know_their_numbers(results):
    assert [result["size"] for result in results] == [(2, 0), (2, 1)]


def test_gather_concatenates_in_rank_order(results):
    for result in results:
        assert torch.equal(result["gather"]["result"], torch.cat([_values(0), _values(1)]))


def test_gradient_of_gather_holds_the_losses_of_all_ranks(results):
    everything = torch.cat([_values(0), _values(1)]).requires_grad_()
    sum((everything.square() * _weights(rank)).sum() for rank in range(RANKS)).backward()
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["gather"]["gradient"], everything.grad[3 * rank : 3 * rank + 3])


def test_gather_takes_strided_values(results):
    strided = torch.arange(6.0).view(2, 3).T
    assert torch.equal(results[0]["strided"], torch.cat([strided, 2 * strided]))


def test_sum_and_its_gradient(results):
    total = (_values(0) + _values(1)).requires_grad_()
    sum((total.square() * _weights(rank)[:3]).sum() for rank in range(RANKS)).backward()
    for result in results:
        torch.testing.assert_close(result["sum"]["result"], total.detach())
        torch.testing.assert_close(result["sum"]["gradient"], total.grad)
        assert result["sum"]["untouched"]


def test_replicated_sum_gives_the_same_gradient_without_asking(results):
    total = (_values(0) + _values(1)).requires_grad_()
    (RANKS * (total.square() * _weights(0)[:3]).sum()).backward()
    for result in results:
        torch.testing.assert_close(result["replicated"]["gradient"], total.grad)


def test_largest_of_all_ranks(results):
    for result in results:
        assert torch.equal(result["max"], _values(0).abs())


def test_alone_they_are_the_identity():
    values = _values(0)
    assert collectives.all_reduce_max(values) is values
    assert collectives.gather(values) is values
    assert collectives.all_reduce_sum(values) is values
    assert (collectives.world_size(), collectives.rank()) == (1, 0)
