"""Which item is trained on when: a pure function of (seed, epoch, number of items), the same for any number of ranks.

An epoch is one global permutation, cut into global batches of B items, each of those into `accumulation` micro-batches,
and rank r of R takes the r-th contiguous slice of each: what is trained on together never depends on R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.data import hashing

_ROUNDS = 24  # with 12, some orders of six items come more often than others


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream: `samples` items of `epoch` were consumed by all ranks together."""

    epoch: int = 0
    samples: int = 0


class EpochOrder:
    """A pseudo-random permutation of the items of an epoch; any part of it costs no more than its own length.

    Items are the fields of a nearly square table, and a Feistel network turns in each round every row of it by a random
    number of fields, or every column. The few fields beyond the last item are no places: whoever comes upon one goes
    on until it meets an item (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Not numpy's own
    `permutation`, which must be computed whole, and may change from version to version: a checkpoint must find the
    same order after an upgrade.
    """

    def __init__(self, seed: int, epoch: int, num_items: int) -> None:
        self.num_items = num_items
        self._height = math.isqrt(num_items - 1) + 1
        self._width = 2 * -(-num_items // (2 * self._height))  # even: turns of odd rows make even permutations only
        words = hashing.words(seed, epoch, np.arange(_ROUNDS), count=max(self._height, self._width))
        self._by_row = (words[0::2, :] % np.uint64(self._width)).astype(np.int64)
        self._by_column = (words[1::2] % np.uint64(self._height)).astype(np.int64)

    def __len__(self) -> int:
        return self.num_items

    def items(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The items, int64 [n], at places between 0 and `num_items` - 1."""
        items = self._permuted(places)
        while len(beyond := np.flatnonzero(items >= self.num_items)):
            items[beyond] = self._permuted(items[beyond])
        return items

    def _permuted(self, fields: NDArray[np.int64]) -> NDArray[np.int64]:
        row, column = np.divmod(fields, self._width)
        for of_row, of_column in zip(self._by_row, self._by_column, strict=True):
            column = (column + of_row[row]) % self._width
            row = (row + of_column[column]) % self._height
        return row * self._width + column


def batches(num_items: int, batch_size: int) -> int:
    """Steps of an epoch: the last partial batch is dropped. Raises `UsageError` if there is not one batch."""
    if num_items < batch_size:
        raise UsageError(
            f"a batch of {batch_size} items cannot be drawn from {num_items} usable items; "
            f"give --batch-size {num_items} or less, or a larger set (or a milder --filter)"
        )
    return num_items // batch_size


def largest_batch(num_items: int, accumulation: int) -> int:
    """Items of the largest batch that so few items fill: a multiple of 8 and of the micro-batches, where one fits."""
    unit = next((unit for unit in (math.lcm(8, accumulation), accumulation) if unit <= num_items), num_items)
    return num_items // unit * unit


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
    order: EpochOrder,
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
    return order.items(np.arange(start, start + size))


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
