"""Where the images of a pair set lie: read a row group at a time, when one of its images is first asked for.

A batch at random places of ten million rows needs a third of the row groups, and ten batches later all are there.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manifests.catalog import Catalog
from trainer.data import columns

REAL = -1  # the image number of the real image; variations are 0 to K - 1
_FIELDS = ("offset", "size")


class Place(NamedTuple):
    """Where an image lies, `offset` and `size` in bytes of the tar of shard number `shard`."""

    shard: int
    offset: int
    size: int


class Places:
    """The places of the images of some rows, 12 bytes an image and 4 a row once all are read. Threads may share it.

    Args:
        catalog: the pair set.
        positions: row numbers of the manifest, ascending, int64 [N].
    """

    def __init__(self, catalog: Catalog, positions: columns.Positions) -> None:
        self._catalog, self._positions = catalog, positions
        self._firsts: list[int] = np.searchsorted(positions, catalog.group_starts).tolist()  # rows before each group
        self._lock = threading.Lock()
        self._real = _Side(catalog, len(positions), (), columns.REAL, self._of_real)
        many = (catalog.plan.variations,)
        self._synthetic = _Side(catalog, len(positions), many, columns.ELEMENT, self._of_synthetic)

    def of(self, index: int, image: int) -> Place:
        """The place of image number `image` of row `index`.

        Raises `CorruptSetError` if a row lacks variations or the manifest is damaged, `StorageError` if it cannot be
        read.
        """
        side = self._real if image == REAL else self._synthetic
        if not side.is_read[bisect_right(self._firsts, index) - 1]:
            self._read(side, np.array([index]))
        at = index if image == REAL else (index, image)
        return Place(int(side.shard[index]), int(side.offset[at]), int(side.size[at]))

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        """Read at once what images, [..., B], of rows `indices`, [B], need: faster than by and by."""
        rows = np.broadcast_to(indices, images.shape)
        for side, asked in ((self._real, images == REAL), (self._synthetic, images != REAL)):
            if asked.any():
                self._read(side, rows[asked])

    def _read(self, side: _Side, indices: NDArray[np.int64]) -> None:
        groups = np.unique(np.searchsorted(self._firsts, indices, side="right") - 1)
        if side.is_read[groups].all():
            return
        with self._lock:
            missing = groups[~side.is_read[groups]].tolist()
            tables = self._catalog.group_tables(missing, "shard", *(f"{side.name}.{field}" for field in _FIELDS))
            for group, table in zip(missing, tables, strict=True):
                self._fill(side, group, table)

    def _fill(self, side: _Side, group: int, table: pa.Table) -> None:
        rows = slice(self._firsts[group], self._firsts[group + 1])
        start = int(self._catalog.group_starts[group])
        inside = self._positions[rows] - start
        side.shard[rows] = columns.taken(table["shard"], inside)
        side.offset[rows], side.size[rows] = side.read(table, inside, start)
        side.is_read[group] = True  # last: others look here without the lock

    def _of_real(self, table: pa.Table, inside: columns.Positions, start: int) -> list[NDArray[Any]]:
        return columns.real_fields(table, _FIELDS, inside)

    def _of_synthetic(self, table: pa.Table, inside: columns.Positions, start: int) -> list[NDArray[Any]]:
        return columns.synthetic_fields(self._catalog, table, _FIELDS, inside, start)


class _Side:
    """The places of real images, or of variations; memory that no row group filled takes no room."""

    def __init__(
        self,
        catalog: Catalog,
        rows: int,
        images: tuple[int, ...],
        name: str,
        read: Callable[[pa.Table, columns.Positions, int], list[NDArray[Any]]],
    ) -> None:
        self.name, self.read = name, read
        self.is_read = np.zeros(len(catalog.group_starts) - 1, np.bool_)
        self.shard = np.empty(rows, np.int32)
        self.offset = np.empty((rows, *images), np.int64)
        self.size = np.empty((rows, *images), np.int32)
