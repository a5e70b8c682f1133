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
import pyarrow.parquet as pq

from manifests.errors import UsageError
from pipeline.sources.base import INDEX_SCHEMA, MAX_LABEL, UnreadableImageError, make_key, sorted_index
from pipeline.sources.files import is_url, local_path, read_file

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes"),
    *("image_path", "image_file", "file_name", "filename", "filepath", "file", "path"),
)
LABEL_COLUMNS = ("label", "labels", "cls", "class", "target", "fine_label")
SAVED_MARKS = ("dataset_dict.json", "state.json", "dataset_info.json")  # one of them is in what `save_to_disk` wrote
KEY_COLUMNS = ("key", "id", "__key__")

_SPLIT_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")
_BATCH_ROWS = 1024

logger = logging.getLogger(__name__)


class TableSource:
    """The rows of a table; `location` may name the image column: `TABLE::COLUMN`."""

    kind = "tables"

    def __init__(self, location: str) -> None:
        path, _, column = location.partition("::")
        if is_url(path):
            raise UsageError(f"tables are read from local disks only, not from {path}. Copy it first.")
        self._path = local_path(path)
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets` in log files; on a terminal they stay."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _load(path: Path) -> Dataset:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    is_saved = any((path / name).is_file() for name in SAVED_MARKS)
    files = [] if is_saved else _parquet_files(path)
    try:
        if is_saved:
            loaded = load_from_disk(str(path))
        else:
            filled = [name for name in files if pq.read_metadata(name).num_rows]  # `datasets` fails on empty ones
            # It takes file names for patterns, too.
            patterns = [glob.escape(name) for name in filled]
            loaded = load_dataset("parquet", data_files=patterns, split="train") if filled else Dataset.from_dict({})
    except Exception as error:  # whatever a damaged file makes `datasets`, Arrow or the disk raise
        cause = error.__cause__ or error
        raise UsageError(f"cannot read {path} as a table: {cause}. Check that its files are whole.") from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    return loaded[_choose_split(path, list(loaded))]


def _parquet_files(path: Path) -> list[str]:
    """The files of one split, sorted: of a file, a pattern, or a folder with or without a `data` subfolder."""
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        found = sorted(glob.glob(str(path)))  # noqa: PTH207  an absolute pattern
        if not found:
            raise UsageError(f"no table at {path}: found nothing. Give a .parquet file, a pattern or a folder.")
        return found
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        found_names = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise UsageError(
            f"no table in {path}: found {found_names}. Tables are .parquet files, or a folder that "
            "`Dataset.save_to_disk` wrote."
        )
    splits: dict[str, list[str]] = {}
    for file in files:
        match = _SPLIT_FILE.fullmatch(file.name)
        splits.setdefault(match[1] if match else "", []).append(str(file))
    return splits[_choose_split(path, list(splits))]


def _choose_split(path: Path, splits: list[str]) -> str:
    """The only split, or the one called `train`: a test split must not get into it unasked."""
    if len(splits) == 1:
        return splits[0]
    if "train" not in splits:
        listed = ", ".join(name or "files without a split" for name in splits)
        raise UsageError(f"{path} has the splits {listed} and none called train: give one split's files or folder.")
    logger.warning("%s: taking the split train of %s", path, ", ".join(name or "(none)" for name in splits))
    return "train"


def _find_image_column(table: Dataset, asked: str, where: str) -> str:
    from datasets import Image

    schema = table.features.arrow_schema
    images = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    held = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    possible = held + [name for name in schema.names if _is_text(schema.field(name).type)]
    if asked in possible:
        return asked
    if not asked:
        named = [name for name in IMAGE_COLUMNS if name in (images or possible)]
        found = (images if len(images) == 1 else []) or named or (held if len(held) == 1 else [])
        if found:
            return found[0]
    problem = f"{asked!r} is no column of images" if asked else "it is not clear which column holds the images"
    raise UsageError(
        f"{where}: {problem}. The columns are {', '.join(schema.names)}; bytes or paths are in "
        f"{', '.join(possible) or 'none of them'}. Name one as {where}::COLUMN."
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _described(images: Dataset) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Path (string) and length in bytes (int64) of each row's image, null where unknown."""
    paths: list[pa.Array] = []
    sizes: list[pa.Array] = []
    for start in range(0, images.num_rows, _BATCH_ROWS):
        column = images[start : start + _BATCH_ROWS].column(0).combine_chunks()
        unknown = pa.nulls(len(column))
        data: pa.Array = column
        path: pa.Array = unknown
        if pa.types.is_struct(column.type):
            data, path = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        elif _is_text(column.type):
            data, path = unknown, column
        if pa.types.is_null(data.type):
            data = data.cast(pa.binary())
        path = path.cast(pa.string())
        paths.append(pc.if_else(pc.equal(path, ""), None, path))
        sizes.append(pc.binary_length(data).cast(pa.int64()))
    return pa.chunked_array(paths, pa.string()), pa.chunked_array(sizes, pa.int64())


def _bytes_and_path(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, dict):
        return value["bytes"], value["path"] or None
    if isinstance(value, bytes):
        return value, None
    return None, value or None


def _key_names(table: Dataset, paths: pa.ChunkedArray) -> list[str] | None:
    """Unique names of the rows: of a key column, else the images' paths; None if neither is unique."""
    schema = table.features.arrow_schema
    for name in KEY_COLUMNS:
        if name in schema.names and (_is_text(schema.field(name).type) or pa.types.is_integer(schema.field(name).type)):
            column = table.select_columns(name)[:].column(0)
            if _is_unique(column):
                return [str(value) for value in column.to_pylist()]
    return paths.to_pylist() if _is_unique(paths) else None


def _is_unique(column: pa.ChunkedArray) -> bool:
    return column.null_count == 0 and len(pc.unique(column)) == len(column)


def _labels(table: Dataset) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Label (int32) and class name (string) of each row, null where there is none; a negative label is none."""
    from datasets import ClassLabel

    features = table.features
    classified = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    name = next((name for name in (*LABEL_COLUMNS, *classified[:1]) if name in features), None)
    column = table.select_columns(name)[:].column(0) if name else pa.chunked_array([pa.nulls(table.num_rows)])
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if _is_text(column.type):
        names = pa.array(sorted(pc.unique(column.drop_null()).to_pylist()), pa.string())
        column = column.cast(pa.string())
        return pc.index_in(column, names).cast(pa.int32()), column
    if not pa.types.is_integer(column.type):
        return _nothing(table, pa.int32()), _nothing(table, pa.string())
    valid = pc.and_(pc.greater_equal(column, 0), pc.less_equal(column, MAX_LABEL))
    label = pc.if_else(valid, column, None).cast(pa.int32())
    feature = features[name]
    if not isinstance(feature, ClassLabel) or not feature.names:
        return label, _nothing(table, pa.string())
    return label, pc.take(pa.array(feature.names, pa.string()), label)


def _nothing(table: Dataset, kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.nulls(table.num_rows, kind)])
