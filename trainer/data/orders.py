"""The orders of epochs, computed in the background before they are needed: half a second each for ten million items."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import epoch_order


class Orders:
    """Keeps the order in use and the one that was prepared."""

    def __init__(self, seed: int, num_items: int) -> None:
        self._seed, self._num_items = seed, num_items
        self._kept: dict[int, _Order] = {}

    def prepare(self, epoch: int) -> None:
        """Begin to compute an epoch's order, unless that was done."""
        if epoch not in self._kept:
            order = self._kept[epoch] = _Order(self._seed, epoch, self._num_items)
            order.start()

    def of(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch, int64 [num_items]; those of earlier ones are forgotten."""
        self.prepare(epoch)
        for earlier in [kept for kept in self._kept if kept < epoch]:
            del self._kept[earlier]
        return self._kept[epoch].wait()

    def close(self) -> None:
        """Wait for what was begun; harmless to repeat."""
        for order in self._kept.values():
            order.join()


class _Order(threading.Thread):
    """A daemon: an interrupt that strikes while it is waited for keeps no process from ending."""

    def __init__(self, seed: int, epoch: int, num_items: int) -> None:
        super().__init__(name=f"order-{epoch}", daemon=True)
        self._asked = (seed, epoch, num_items)
        self._order: NDArray[np.int64] | None = None

    def run(self) -> None:
        self._order = epoch_order(*self._asked)

    def wait(self) -> NDArray[np.int64]:
        """The order, once it is there."""
        self.join()
        return epoch_order(*self._asked) if self._order is None else self._order  # None: it ran out of memory
