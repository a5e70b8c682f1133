"""The orders of epochs, computed in the background before they are needed: half a second each for ten million items."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from trainer.data.order import epoch_order


class Orders:
    """Keeps the order in use and the one that was prepared."""

    def __init__(self, seed: int, num_items: int) -> None:
        self._seed, self._num_items = seed, num_items
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._kept: dict[int, Future[NDArray[np.int64]]] = {}

    def prepare(self, epoch: int) -> None:
        """Begin to compute an epoch's order, unless that was done."""
        if epoch not in self._kept:
            self._kept[epoch] = self._thread.submit(epoch_order, self._seed, epoch, self._num_items)

    def of(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch, int64 [num_items]; those of earlier ones are forgotten."""
        self.prepare(epoch)
        self._kept = {kept: order for kept, order in self._kept.items() if kept >= epoch}
        return self._kept[epoch].result()

    def close(self) -> None:
        """End the thread; harmless to repeat."""
        self._thread.shutdown(cancel_futures=True)
