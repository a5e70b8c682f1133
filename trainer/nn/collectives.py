"""Sums and concatenations over all ranks that gradients pass through; the identity without a process group.

Every function's backward pass is its adjoint: a rank's gradient holds what its values did to the losses of *all* ranks.
DDP then averages over ranks, so that the gradient of a run is that of the mean of the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from manifests.errors import DiffmixError

T = TypeVar("T")


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among the ranks; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(values: Tensor) -> Tensor:
    """The values of all ranks, [B, ...] on each, as [R * B, ...] in the order of ranks; gradients pass through."""
    return values if world_size() == 1 else _Gather.apply(values)


def gather_objects(value: T) -> list[T]:
    """Every rank's value, anything that can be pickled, in the order of ranks."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def together(act: Callable[[], T]) -> T:
    """What `act` returns on this rank, once it has on all; a rank's `DiffmixError` is raised on all.

    Without it the others would wait, at the next collective, for one that has ended.
    """
    result: list[T] = []
    error: DiffmixError | None = None
    try:
        result.append(act())
    except DiffmixError as caught:
        error = caught
    _raise_first(error)
    return result[0]


def _raise_first(error: DiffmixError | None) -> None:
    """Raise, on all ranks, what the first of those with an error has; the message names it unless all have one."""
    errors = gather_objects(error)
    failed = [number for number, one in enumerate(errors) if one is not None]
    if not failed:
        return
    first = error if failed[0] == rank() else errors[failed[0]]
    assert first is not None
    if len(failed) < len(errors):
        first.args = (f"rank {failed[0]}: {first}",)
    first.of_all = world_size() > 1
    raise first


def all_reduce_sum(values: Tensor, *, replicated: bool = False) -> Tensor:
    """The sum of the ranks' values, same shape on each; gradients pass through.

    `replicated` promises that each rank computes the same loss from the sum and from nothing else of its own. All
    ranks' gradients are then equal and need not be exchanged.
    """
    return values if world_size() == 1 else _AllReduceSum.apply(values, replicated)


@torch.no_grad()
def all_reduce_max(values: Tensor) -> Tensor:
    """The largest of the ranks' values, element by element, same shape on each; no gradient passes."""
    if world_size() == 1:
        return values
    largest = values.clone().contiguous()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        gathered = values.new_empty((world_size() * len(values), *values.shape[1:]))
        # The old name warns of torch's newer one at every call from a thread of autograd.
        gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather_single(gathered, values.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((len(gradient) // world_size(), *gradient.shape[1:]))
        reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # as above
        reduce_scatter_single(own, gradient.contiguous())
        return own


class _AllReduceSum(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, replicated: bool) -> Tensor:
        ctx.replicated = replicated
        return _summed(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient * world_size() if ctx.replicated else _summed(gradient)), None


def _summed(values: Tensor) -> Tensor:
    total = values.clone().contiguous()
    dist.all_reduce(total)
    return total
