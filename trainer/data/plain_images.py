"""Images as they are, for evaluation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.image_set import ImageSet
from trainer.data.reader import Reader
from trainer.data.rows import REAL
from trainer.data.threads import Crew, Task, default_workers
from trainer.data.view_maker import cut_plain


class PlainImages:
    """Images as they are, short side resized and the centre cut, for evaluation.

    Each iteration goes once over rows `indices`, int64 [N], in that order, and yields bytes uint8 [B, size, size, 3]
    with their labels int64 [B], None for sets without; `image` is -1 for the real ones or the number of a variation.
    """

    def __init__(
        self,
        rows: ImageSet,
        indices: NDArray[np.int64],
        *,
        size: int,
        batch_size: int = 256,
        image: int = REAL,
        workers: int | None = None,
        prefetch: int = 2,
    ) -> None:
        self.rows = rows
        self.indices = np.asarray(indices, np.int64)
        self._size, self._batch_size, self._image = size, batch_size, image
        self._workers = default_workers(alone=True) if workers is None else workers
        self._prefetch = prefetch

    def __len__(self) -> int:
        """Batches, the last one as small as it is."""
        return math.ceil(len(self.indices) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        crew, reader = Crew(self._workers), Reader(self.rows, cache_bytes=0)
        waiting: deque[tuple[NDArray[np.int64], NDArray[np.uint8], Task]] = deque()
        try:
            for start in range(0, len(self.indices), self._batch_size):
                chosen = self.indices[start : start + self._batch_size]
                pixels = np.empty((len(chosen), self._size, self._size, 3), np.uint8)
                cuts = partial(cut_plain, reader, self._image)
                parts = [partial(cuts, part, out) for part, out in _in_parts(chosen, pixels, self._workers)]
                waiting.append((chosen, pixels, crew.do(parts)))
                if len(waiting) > self._prefetch:
                    yield self._finished(*waiting.popleft())
            while waiting:
                yield self._finished(*waiting.popleft())
        finally:
            crew.close()
            reader.close()

    def _finished(
        self, chosen: NDArray[np.int64], pixels: NDArray[np.uint8], task: Task
    ) -> tuple[Tensor, Tensor | None]:
        task.wait()
        labels = self.rows.label
        of = None if labels is None else torch.from_numpy(labels[chosen].astype(np.int64))
        return torch.from_numpy(pixels), of


def _in_parts(
    chosen: NDArray[np.int64], pixels: NDArray[np.uint8], parts: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    size = -(-len(chosen) // parts)
    for start in range(0, len(chosen), size):
        yield chosen[start : start + size], pixels[start : start + size]
