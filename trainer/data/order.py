"""Which item is trained on when: a pure function of (seed, epoch, number of items), the same for any number of ranks.

An epoch is one global permutation, cut into global batches of B items, each of those into `accumulation` micro-batches,
and rank r of R takes the r-th contiguous slice of each: what is trained on together never depends on R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.data import hashing

_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream: `samples` items of `epoch` were consumed by all ranks together."""

    epoch: int = 0
    samples: int = 0


def epoch_order(seed: int, epoch: int, num_items: int) -> NDArray[np.int64]:
    """A random permutation of the items, int64 [num_items]; about half a second for ten million.

    Sorts random words whose low bits are the item numbers. Not numpy's own `permutation`, which may change from
    version to version: a checkpoint must find the same order after an upgrade.
    """
    bits = max(1, (num_items - 1).bit_length())
    low = np.uint64((1 << bits) - 1)
    words = np.arange(num_items, dtype=np.uint64)
    for block, start in enumerate(range(0, num_items, _BLOCK)):
        part = words[start : start + _BLOCK]
        part |= hashing.words(seed, epoch, block, count=len(part)) & ~low
    words.sort()
    words &= low
    return words.view(np.int64)


def batches(num_items: int, batch_size: int) -> int:
    """Steps of an epoch: the last partial batch is dropped. Raises `UsageError` if there is not one batch."""
    if num_items < batch_size:
        raise UsageError(
            f"a batch of {batch_size} items cannot be drawn from {num_items} usable items; "
            f"give --batch-size {num_items} or less, or a larger set (or a milder --filter)"
        )
    return num_items // batch_size


def micro_batch_size(batch_size: int, world_size: int, accumulation: int) -> int:
    """Items of one micro-batch of one rank. Raises `UsageError` if the global batch cannot be cut into equal ones."""
    parts = world_size * accumulation
    if batch_size > 0 and batch_size % parts == 0:
        return batch_size // parts
    below = batch_size // parts * parts
    nearest = " or ".join(str(size) for size in (below, below + parts) if size > 0)
    raise UsageError(
        f"a global batch of {batch_size} cannot be cut equally for {world_size} processes x {accumulation} "
        f"accumulation steps = {parts}; the nearest --batch-size is {nearest}"
    )


def micro_batch(
    order: NDArray[np.int64],
    step: int,
    batch_size: int,
    rank: int,
    world_size: int,
    micro: int,
    accumulation: int,
) -> NDArray[np.int64]:
    """Items, int64 [B / world_size / accumulation], of micro-batch `micro` of `rank` at `step` of the epoch.

    All ranks together see the same micro-batch whatever their number: what repels each other there stays the same.
    """
    size = micro_batch_size(batch_size, world_size, accumulation)
    start = step * batch_size + (micro * world_size + rank) * size
    return order[start : start + size]


def start_of(cursor: Cursor, num_items: int, batch_size: int) -> tuple[int, int]:
    """The (epoch, step) at which a cursor goes on. Raises `UsageError` if it lies between two batches."""
    steps = batches(num_items, batch_size)
    if cursor.samples % batch_size:
        raise UsageError(
            f"the checkpoint lies {cursor.samples} samples into epoch {cursor.epoch}, which is no multiple of "
            f"--batch-size {batch_size}; resume with the batch size of the run, or start anew with --resume never"
        )
    step = cursor.samples // batch_size
    return (cursor.epoch, step) if step < steps else (cursor.epoch + 1, 0)
