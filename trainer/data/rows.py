"""The usable rows of a pair set: where each image lies, its label, and what identifies the selection."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests.catalog import Catalog
from trainer.data import columns
from trainer.data import filters as row_filters
from trainer.data.image_set import ImageFiles
from trainer.data.places import REAL, Places

__all__ = ["REAL", "Rows"]


class Rows:
    """The chosen rows, numbered 0 to N - 1 in manifest order; a column is read when first asked for, then kept.

    Four or eight bytes a row and number: ten million rows open in a tenth of a second. Threads may share it.
    """

    def __init__(self, catalog: Catalog, filters: Sequence[str] = ()) -> None:
        self.catalog = catalog
        self.url = catalog.storage.url
        self.filters = tuple(filters)
        self.positions = row_filters.positions(catalog, self.filters)  # int64 [N], row numbers of the manifest
        self.has_real = catalog.plan.store_real is not None
        self.num_variations = catalog.plan.variations  # K, of every row
        self._lock = threading.RLock()
        self._kept: dict[str, Any] = {}

    @classmethod
    def open(cls, url: str, filters: Sequence[str] = ()) -> Rows:
        """The `ok` rows of the pair set at a path or URL for which all filters hold, see `filters.positions`."""
        return cls(Catalog.open(url), filters)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def has_synthetic(self) -> bool:
        """Whether every row has variations."""
        return self.num_variations > 0

    @property
    def places(self) -> Places:
        """Where the images lie."""
        return self._once("places", lambda: Places(self.catalog, self.positions))

    @property
    def label(self) -> NDArray[np.int32] | None:
        """Class number of each row, int32 [N]; None unless every row has one."""
        return self._once("label", self._label)

    @property
    def encoded_bytes(self) -> int:
        """About the size of all images of the rows as they are stored, by those of the first row group in use."""
        return self._once("encoded_bytes", self._encoded_bytes)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that all images of all rows share; None if they differ."""
        return self._once("image_size", self._image_size)

    @property
    def fingerprint(self) -> str:
        """Hash of the plan, the manifest and the chosen rows: a stream of samples goes on only over the same ones."""
        return self._once("fingerprint", self._fingerprint)

    def keys(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Keys of rows by number, in the order asked; reads the column of all keys each time."""
        wanted = self.positions[np.asarray(indices, dtype=np.int64)]
        keys: list[str] = self.catalog.columns("key")["key"].take(wanted).to_pylist()
        return keys

    def open_files(self) -> ImageFiles:
        """The shards, opened for reading images."""
        from trainer.data.pair_files import PairFiles

        return PairFiles(self)

    def _once(self, name: str, read: Callable[[], Any]) -> Any:
        with self._lock:
            if name not in self._kept:
                self._kept[name] = read()
            return self._kept[name]

    def _of_real(self, *fields: str) -> list[NDArray[Any]]:
        return columns.of_real(self.catalog, fields, self.positions)

    def _of_synthetic(self, *fields: str) -> list[NDArray[Any]]:
        return columns.of_synthetic(self.catalog, fields, self.positions)

    def _label(self) -> NDArray[np.int32] | None:
        labels, valid = columns.numbers(self.catalog, "label", self.positions)
        return labels if valid.all() else None

    def _encoded_bytes(self) -> int:
        starts = self.catalog.group_starts
        group = int(np.searchsorted(starts, self.positions[0], side="right")) - 1
        inside = self.positions[: np.searchsorted(self.positions, starts[group + 1])] - starts[group]
        names = [f"{columns.REAL}.size"] if self.has_real else []
        names += [f"{columns.ELEMENT}.size"] if self.has_synthetic else []
        table = next(self.catalog.group_tables([group], *names))
        sizes = columns.real_fields(table, ("size",), inside) if self.has_real else []
        if self.has_synthetic:
            sizes += columns.synthetic_fields(self.catalog, table, ("size",), inside, int(starts[group]))
        return sum(int(size.sum(dtype=np.int64)) for size in sizes) * len(self) // len(inside)

    def _image_size(self) -> tuple[int, int] | None:
        sides = [self._of_real("height", "width")] if self.has_real else []
        sides += [self._of_synthetic("height", "width")] if self.has_synthetic else []
        height, width = (int(side.flat[0]) for side in sides[0])
        same = all(np.all(rows == height) and np.all(across == width) for rows, across in sides)
        return (height, width) if same else None

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.catalog.plan.to_bytes())
        digest.update(self.catalog.parts_digest.encode())
        digest.update(hashlib.blake2b(self.positions.data).digest())
        return digest.hexdigest()
