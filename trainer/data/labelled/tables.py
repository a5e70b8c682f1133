"""Tables with a column of images and one of labels: Parquet files and what Hugging Face `datasets` saved to disk.

`datasets` maps its Arrow files into memory, so that one row is read without its neighbours (Parquet files are converted
once, into its cache). Images are never decoded by it.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests.errors import CorruptSetError, UsageError
from trainer.data.labelled.base import MAX_LABEL, NO_LABEL, Found, numbered, text
from trainer.data.labelled.encoded import EncodedImages
from trainer.data.labelled.paths import refuse_splits

if TYPE_CHECKING:
    from datasets import Dataset

SAVED_MARKS = ("dataset_dict.json", "state.json")  # one of them is in what `save_to_disk` wrote
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes")
_LABELS = ("label", "labels", "fine_label", "cls", "class", "target", "class_name")
_KEYS = ("key", "id", "__key__")
_BATCH = 1024


def find(place: Path, files: list[Path], url: str, max_pixels: int) -> Found:
    """The rows with an image, of Parquet `files` or, without any, of the dataset saved in folder `place`.

    Raises `UsageError` where no column holds images or labels, `CorruptSetError` for files that cannot be read.
    """
    table = _load(place, files).with_format("arrow")
    store = TableStore(table.select_columns(_image_column(table, url)), url)
    numbers, names = _labels(table, url)
    sizes = store.sizes()
    keys = _key_column(table) or store.paths() or [f"row-{row:07d}" for row in range(len(sizes))]
    images = EncodedImages.of(url, store, [text(key) for key in keys], sizes.clip(0).tolist(), max_pixels)
    there = np.flatnonzero(sizes >= 0)
    skipped = tuple(f"{images.names[row]}: no image bytes in this row" for row in np.flatnonzero(sizes < 0).tolist())
    return Found(images=images.only(there), numbers=numbers[there], names=names, skipped=skipped)


class TableStore:
    """Images in the only column of a table: bytes, or structs with `bytes` and perhaps `path`."""

    def __init__(self, table: Dataset, url: str) -> None:
        self._table = table
        self._url = url

    def open(self) -> TableStore:
        """Itself: the table is mapped into memory."""
        return self

    def where(self, number: int) -> str:
        """The row."""
        return f"the image in row {number} of {self._url}"

    def read(self, number: int, offset: int = 0, size: int | None = None) -> bytes:
        """See `ByteReader.read`."""
        cell = self._table[number].column(0)[0]
        data = memoryview((cell["bytes"] if pa.types.is_struct(cell.type) else cell).as_buffer())
        return bytes(data[offset:] if size is None else data[offset : offset + size])

    def close(self) -> None:
        """Nothing is open."""

    def sizes(self) -> NDArray[np.int64]:
        """Length of each image in bytes, int64 [N]; -1 where there is none."""
        lengths = [pc.binary_length(_field(column, "bytes")) for column in self._columns()]
        found = [length.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False) for length in lengths]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def paths(self) -> list[str] | None:
        """The images' own paths, if all have one and no two the same."""
        found: list[str | None] = []
        for column in self._columns():
            if not pa.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
                return None
            found += _field(column, "path").to_pylist()
        return _unique(found)

    def _columns(self) -> Iterator[pa.Array]:
        for start in range(0, len(self._table), _BATCH):
            yield pa.concat_arrays(self._table[start : start + _BATCH].column(0).chunks)


def _field(column: pa.Array, name: str) -> pa.Array:
    return pc.struct_field(column, name) if pa.types.is_struct(column.type) else column


def _load(place: Path, files: list[Path]) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        with _quiet():
            if not files:
                loaded = load_from_disk(str(place))
            else:
                filled = [str(file) for file in files if pq.read_metadata(file).num_rows]  # it fails on empty ones
                patterns = [glob.escape(file) for file in filled]
                loaded = load_dataset("parquet", data_files=patterns, split="train") if filled else None
    except Exception as error:  # whatever a damaged file makes `datasets`, Arrow or the disk raise
        cause = " ".join(str(error.__cause__ or error).split())
        raise CorruptSetError(f"cannot read {place} as a table: {cause}; check that its files are whole") from error
    if isinstance(loaded, DatasetDict):
        refuse_splits(place, [place / name for name in loaded])
        if len(loaded) > 1:
            raise UsageError(
                f"{place} holds {', '.join(loaded)}; give the folder of one, such as {place / next(iter(loaded))}"
            )
        loaded = next(iter(loaded.values()), None)
    if loaded is None or not len(loaded):
        raise UsageError(f"the table {place} has no rows; give one with a column of images and one of labels")
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _image_column(table: Dataset, url: str) -> str:
    schema = table.features.arrow_schema
    held = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    named = [name for name in _IMAGES if name in held]
    if named or len(held) == 1:
        return (named or held)[0]
    raise UsageError(
        f"{url}: {'several columns hold bytes' if held else 'no column holds images'}; the columns are "
        f"{', '.join(schema.names)}. Images are a column `image` of encoded bytes, or of structs with bytes and path"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _labels(table: Dataset, url: str) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Class number of each row, and names of classes: those of a `ClassLabel`, or the labels themselves."""
    from datasets import ClassLabel

    features = table.features
    classified = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    name = next((name for name in (*_LABELS, *(classified if len(classified) == 1 else ())) if name in features), None)
    if name is None:
        raise UsageError(f"{url} has no column of labels; it has {', '.join(features)}, and one must be called `label`")
    column = table.select_columns(name)[:].column(0)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return numbered(column.to_pylist())
    return _class_numbers(column, name, url), dict(enumerate(getattr(features[name], "names", None) or ()))


def _class_numbers(column: pa.ChunkedArray, name: str, url: str) -> NDArray[np.int64]:
    try:
        numbers = column.cast(pa.int64()) if not pa.types.is_boolean(column.type) else column.cast(pa.int8())
    except pa.ArrowInvalid as error:
        raise UsageError(f"{url}: column {name} is {column.type}, and labels are whole numbers or texts") from error
    found = numbers.fill_null(NO_LABEL).to_numpy().astype(np.int64)
    return np.where((found < 0) | (found > MAX_LABEL), NO_LABEL, found)


def _key_column(table: Dataset) -> list[str] | None:
    """The values of a column of keys, if there is one without repetitions."""
    for name in _KEYS:
        if name in table.features:
            values: list[Any] = table.select_columns(name)[:].column(0).to_pylist()
            if found := _unique([None if value is None else str(value) for value in values]):
                return found
    return None


def _unique(values: list[str | None]) -> list[str] | None:
    given = [value for value in values if value]
    return given if len(set(given)) == len(values) else None
