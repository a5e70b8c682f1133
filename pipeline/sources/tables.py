"""Tables with a column of images: Parquet files and folders written by Hugging Face `datasets`.

`datasets` maps its Arrow cache into memory, so that one row is read without its neighbours; images are never decoded
here. A column holds encoded bytes, paths relative to the table's folder, or both as `datasets` stores images.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import UsageError
from pipeline.sources.base import INDEX_SCHEMA, MAX_LABEL, UnreadableImageError, make_key, sorted_index
from pipeline.sources.files import is_url, read_file

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values", "file", "path")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")
KEY_COLUMNS = ("key", "id", "__key__")

_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")
_BATCH_ROWS = 4096

logger = logging.getLogger(__name__)


class TableSource:
    """The rows of a table; `location` may name the image column: `TABLE::COLUMN`."""

    kind = "tables"

    def __init__(self, location: str) -> None:
        path, _, column = location.partition("::")
        if is_url(path):
            raise UsageError(f"tables are read from local disks only, not from {path}. Copy it first.")
        self._path = Path(path).expanduser().absolute()
        self._column = column
        self.location = f"{self._path}::{column}" if column else str(self._path)
        self.ignored = 0

    def index(self) -> pa.Table:
        """See `Source.index`; raises `UsageError` for tables that cannot be read or have no column of images."""
        rows = self._table.num_rows
        if not rows:
            raise UsageError(f"the table {self._path} has no rows.")
        paths, sizes = _described(self._table.select_columns(self._image_column))
        numbers = [f"row-{number:07d}" for number in range(rows)]
        label, class_name = _labels(self._table)
        columns = {
            "key": pa.array([make_key(name) for name in _key_names(self._table, paths) or numbers]),
            "location": pc.coalesce(paths, pa.array(numbers)),
            "label": label,
            "class_name": class_name,
            "offset": pa.array(range(rows), pa.int64()),
            "size": sizes,
        }
        return sorted_index(pa.table([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA))

    def read(self, location: str, offset: int | None, size: int | None) -> bytes:
        """See `Source.read`."""
        if offset is None or not 0 <= offset < self._images.num_rows:
            raise UnreadableImageError("no such row in the table")
        data, path = _bytes_and_path(self._images[offset].column(0)[0].as_py())
        if data is not None:
            return data
        if path is None:
            raise UnreadableImageError("no image in this row")
        if is_url(path):
            raise UnreadableImageError("a URL, which is not fetched")
        folder = self._path if self._path.is_dir() else self._path.parent
        return read_file(folder / path)

    @functools.cached_property
    def _table(self) -> Dataset:
        """All columns, as Arrow: nothing is decoded."""
        with _quiet():
            return _load(self._path).with_format("arrow")

    @functools.cached_property
    def _image_column(self) -> str:
        return _find_image_column(self._table, self._column, str(self._path))

    @functools.cached_property
    def _images(self) -> Dataset:
        return self._table.select_columns(self._image_column)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open table: another process maps it again."""
        return {name: self.__dict__[name] for name in ("_path", "_column", "location", "ignored")}
