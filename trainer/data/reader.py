"""From (row, image) to bytes and pixels: reads by offset from the shards, and keeps small sets decoded in memory."""

from __future__ import annotations

import builtins
import os
import resource
import sys
import threading

import numpy as np
from numpy.typing import NDArray

from manifests import layout
from manifests.errors import CorruptSetError
from manifests.storage import LocalStorage, explained
from trainer.data import images
from trainer.data.rows import REAL, Rows

CACHE_BYTES = 2 << 30


class Reader:
    """Reads the images of `rows`; image -1 is the real one, k >= 0 variation k. Threads may share it.

    Where all images are of one size and fit `cache_bytes` decoded, each is decoded once and kept in `cache`.
    """

    def __init__(self, rows: Rows, cache_bytes: int = CACHE_BYTES) -> None:
        self.rows = rows
        self._storage = rows.catalog.storage
        self._files: dict[int, int] = {}  # shard to open file
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_files = sys.maxsize if limit == resource.RLIM_INFINITY else limit // 2
        self._lock = threading.Lock()
        self._first = REAL if rows.has_real else 0
        self._per_row = rows.num_variations - self._first
        self.cache = self._empty_cache(cache_bytes)  # uint8 [N x images of a row, H, W, 3], see `slots`
        self._is_cached = np.zeros(0 if self.cache is None else len(self.cache), np.bool_)

    def bytes(self, index: int, image: int) -> builtins.bytes:
        """The encoded bytes of an image of row `index`; raises `DiffmixError` if they cannot be read."""
        places = self.rows.real if image == REAL else self.rows.synthetic
        at = index if image == REAL else (index, image)
        shard, offset, size = int(self.rows.shard[index]), int(places.offset[at]), int(places.size[at])
        data = self._read(shard, offset, size)
        if len(data) < size:
            raise self._damaged(index, image, f"its shard ends {size - len(data)} bytes before it does")
        return data

    def image(self, index: int, image: int) -> NDArray[np.uint8]:
        """Pixels uint8 [H, W, 3]; raises `CorruptSetError` naming the image if its bytes are no picture."""
        if self.cache is None:
            return self._decoded(index, image)
        slot = index * self._per_row + image - self._first
        if not self._is_cached[slot]:
            self._keep(slot, index, image)
        pixels: NDArray[np.uint8] = self.cache[slot]
        return pixels

    def slots(self, indices: NDArray[np.int64], numbers: NDArray[np.int16]) -> NDArray[np.int64]:
        """Where in `cache` the images `numbers` of rows `indices` lie, decoded if they were not yet; same shapes."""
        slots: NDArray[np.int64] = indices * self._per_row + (numbers - self._first)
        for slot in np.unique(slots[~self._is_cached[slots]]).tolist():
            self._keep(slot, slot // self._per_row, slot % self._per_row + self._first)
        return slots

    def close(self) -> None:
        """Close the shards; no thread may read any more."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def _empty_cache(self, cache_bytes: int) -> NDArray[np.uint8] | None:
        # Pictures take more room than their files: sets that are too large anyway need not be measured.
        if cache_bytes <= 0 or self.rows.encoded_bytes > cache_bytes or self.rows.image_size is None:
            return None
        shape = (len(self.rows) * self._per_row, *self.rows.image_size, 3)
        return np.empty(shape, np.uint8) if np.prod(shape, dtype=np.int64) <= cache_bytes else None

    def _keep(self, slot: int, index: int, image: int) -> None:
        assert self.cache is not None
        pixels = self._decoded(index, image)
        if pixels.shape != self.cache.shape[1:]:
            raise self._damaged(index, image, f"its size is {pixels.shape[:2]}, not {self.cache.shape[1:3]}")
        self.cache[slot] = pixels  # threads that meet here write the same bytes
        self._is_cached[slot] = True

    def _decoded(self, index: int, image: int) -> NDArray[np.uint8]:
        try:
            return images.decode(self.bytes(index, image))
        except ValueError as error:
            raise self._damaged(index, image, str(error)) from error

    def _damaged(self, index: int, image: int, reason: str) -> CorruptSetError:
        name = "the real image" if image == REAL else f"variation {image}"
        url = self.rows.url
        return CorruptSetError(
            f"{name} of {self.rows.keys([index])[0]} in {url}/{layout.tar_name(int(self.rows.shard[index]))} cannot be "
            f"read: {reason}. `pipeline verify {url}` names all that is hurt, `pipeline repair {url}` makes it again"
        )

    def _read(self, shard: int, offset: int, size: int) -> builtins.bytes:
        name = layout.tar_name(shard)
        if not isinstance(self._storage, LocalStorage):
            return self._storage.read_range(name, offset, size)
        file = self._file(shard)
        if file is None:
            return self._storage.read_range(name, offset, size)
        with explained("read", f"{self._storage.url}/{name}"):
            return os.pread(file, size, offset)

    def _file(self, shard: int) -> int | None:
        """The shard's open file; None once as many are open as this process may well hold."""
        file = self._files.get(shard)
        if file is not None:
            return file
        with self._lock:
            if shard not in self._files and len(self._files) < self._most_files:
                self._files[shard] = self._opened(layout.tar_name(shard))
            return self._files.get(shard)

    def _opened(self, name: str) -> int:
        assert isinstance(self._storage, LocalStorage)
        with explained("read", f"{self._storage.url}/{name}"):
            file = os.open(self._storage.path / name, os.O_RDONLY | os.O_CLOEXEC)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would double the bytes read
        return file
