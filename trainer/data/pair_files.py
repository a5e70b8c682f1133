"""The images of a pair set, read by offset from its shards."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manifests import layout
from manifests.errors import CorruptSetError
from manifests.storage import LocalStorage
from trainer.data import images
from trainer.data.open_files import OpenFiles
from trainer.data.rows import REAL, Rows


class PairFiles:
    """Reads the images of `rows`; image -1 is the real one, k >= 0 variation k. Threads may share it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._storage = rows.catalog.storage
        self._files = OpenFiles()
        self._paths: dict[int, Path] = {}  # of local shards

    def pixels(self, index: int, image: int) -> NDArray[np.uint8]:
        """Pixels uint8 [H, W, 3]; raises `CorruptSetError` naming the image if its bytes are no picture."""
        try:
            return images.decode(self.bytes(index, image))
        except ValueError as error:
            raise self.damaged(index, image, str(error)) from error

    def bytes(self, index: int, image: int) -> builtins.bytes:
        """The encoded bytes of an image of row `index`; raises `DiffmixError` if they cannot be read."""
        shard, offset, size = self.rows.places.of(index, image)
        data = self._read(shard, offset, size)
        if len(data) < size:
            raise self.damaged(index, image, f"its shard ends {size - len(data)} bytes before it does")
        return data

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        """Read at once where these images lie, see `Places.expect`."""
        self.rows.places.expect(indices, images)

    def damaged(self, index: int, image: int, reason: str) -> CorruptSetError:
        """The error that names the image and says what to do."""
        name = "the real image" if image == REAL else f"variation {image}"
        url, shard = self.rows.url, self.rows.places.of(index, image).shard
        return CorruptSetError(
            f"{name} of {self.rows.keys([index])[0]} in {url}/{layout.tar_name(shard)} cannot be "
            f"read: {reason}. `pipeline verify {url}` names all that is hurt, `pipeline repair {url}` makes it again"
        )

    def close(self) -> None:
        """Close the shards; no thread may read any more."""
        self._files.close()

    def _read(self, shard: int, offset: int, size: int) -> builtins.bytes:
        if not isinstance(self._storage, LocalStorage):
            return self._storage.read_range(layout.tar_name(shard), offset, size)
        path = self._paths.get(shard)
        if path is None:
            path = self._paths[shard] = self._storage.path / layout.tar_name(shard)
        return self._files.read(path, offset, size)
