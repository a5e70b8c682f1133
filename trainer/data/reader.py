"""From (sample, image) to pixels: reads the images of a set, and keeps small sets decoded in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.image_set import ImageSet
from trainer.data.rows import REAL

CACHE_BYTES = 2 << 30


class Reader:
    """Reads the images of `rows`; image -1 is the real one, k >= 0 variation k. Threads may share it.

    Where all images are of one size and fit `cache_bytes` decoded, each is decoded once and kept in `cache`.
    """

    def __init__(self, rows: ImageSet, cache_bytes: int = CACHE_BYTES) -> None:
        self.rows = rows
        self._files = rows.open_files()
        self._first = REAL if rows.has_real else 0
        self._per_row = rows.num_variations - self._first
        self.cache = self._empty_cache(cache_bytes)  # uint8 [N x images of a row, H, W, 3], see `slots`
        self._is_cached = np.zeros(0 if self.cache is None else len(self.cache), np.bool_)

    def image(self, index: int, image: int) -> NDArray[np.uint8]:
        """Pixels uint8 [H, W, 3]; raises `CorruptSetError` naming the image if its bytes are no picture."""
        if self.cache is None:
            return self._files.pixels(index, image)
        slot = index * self._per_row + image - self._first
        if not self._is_cached[slot]:
            self._keep(slot, index, image)
        pixels: NDArray[np.uint8] = self.cache[slot]
        return pixels

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        """Prepare for images, [..., B], of rows `indices`, [B]: they are read faster then."""
        if self.cache is None:
            self._files.expect(indices, images)

    def slots(self, indices: NDArray[np.int64], numbers: NDArray[np.int16]) -> NDArray[np.int64]:
        """Where in `cache` the images `numbers` of rows `indices` lie, decoded if they were not yet; same shapes."""
        slots: NDArray[np.int64] = indices * self._per_row + (numbers - self._first)
        for slot in np.unique(slots[~self._is_cached[slots]]).tolist():
            self._keep(slot, slot // self._per_row, slot % self._per_row + self._first)
        return slots

    def close(self) -> None:
        """Close the files; no thread may read any more."""
        self._files.close()

    def _empty_cache(self, cache_bytes: int) -> NDArray[np.uint8] | None:
        # Pictures take more room than their files: sets that are too large anyway need not be measured.
        if cache_bytes <= 0 or self.rows.encoded_bytes > cache_bytes or self.rows.image_size is None:
            return None
        shape = (len(self.rows) * self._per_row, *self.rows.image_size, 3)
        return np.empty(shape, np.uint8) if np.prod(shape, dtype=np.int64) <= cache_bytes else None

    def _keep(self, slot: int, index: int, image: int) -> None:
        assert self.cache is not None
        pixels = self._files.pixels(index, image)
        if pixels.shape != self.cache.shape[1:]:
            raise self._files.damaged(index, image, f"its size is {pixels.shape[:2]}, not {self.cache.shape[1:3]}")
        self.cache[slot] = pixels  # threads that meet here write the same bytes
        self._is_cached[slot] = True
