"""Columns of a pair set's manifest as numpy arrays, for some of its rows: no Python object per row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manifests.catalog import Catalog
from manifests.errors import CorruptSetError
from trainer.data import hashing

Positions = NDArray[np.int64]  # row numbers of the manifest, ascending

REAL, ELEMENT = "real", "synthetic.list.element"  # names of images in the manifest, before a field's
_BLOCK = 1 << 16
_FIRST_BYTES = np.array([256**count - 1 for count in range(9)], np.uint64)  # mask of a word's first bytes


def numbers(catalog: Catalog, name: str, positions: Positions) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values [N] of a column of numbers and where there are any, bool [N]; a value that is missing reads 0."""
    column = catalog.columns(name)[name]
    valid = np.ones(len(column), np.bool_)
    if column.null_count:
        valid = np.concatenate([chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        column = column.fill_null(0)
    return _take(_joined(column.chunks), positions), _take(valid, positions)


def texts(catalog: Catalog, name: str, positions: Positions) -> pa.ChunkedArray:
    """Values [N] of a column of strings."""
    column = catalog.columns(name)[name]
    return column if len(column) == len(positions) else column.take(pa.array(positions))


def hashes(strings: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A word for each string that looks random and depends on its bytes alone."""
    return _in_one([_hashes(strings.slice(start, _BLOCK)) for start in range(0, len(strings), _BLOCK)])


def _hashes(strings: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Eight bytes of every string at a time: a Python object for each would take a second a million."""
    one = pa.concat_arrays(strings.chunks).cast(pa.large_binary())
    ends = np.frombuffer(one.buffers()[1], np.int64)[one.offset : one.offset + len(one) + 1]
    start, left = ends[:-1] - ends[0], np.diff(ends)
    data = np.frombuffer(one.buffers()[2], np.uint8)[ends[0] : ends[-1]]
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))  # from every byte on
    state = hashing.mix(left.astype(np.uint64))
    for at in range(0, int(left.max(initial=0)), 8):
        more = left > at
        word = words[np.where(more, start + at, 0)] & _FIRST_BYTES[np.clip(left - at, 0, 8)]
        state = np.where(more, hashing.mix(state ^ hashing.mix(word)), state)
    return state


def taken(column: pa.ChunkedArray, positions: Positions) -> NDArray[Any]:
    """Values [N] of a column of numbers that lacks none."""
    return _take(_joined(column.chunks), positions)


def of_real(catalog: Catalog, fields: tuple[str, ...], positions: Positions) -> list[NDArray[Any]]:
    """One array [N] for each field of the real images, which all rows must have."""
    return real_fields(catalog.columns(*(f"{REAL}.{field}" for field in fields)), fields, positions)


def real_fields(table: pa.Table, fields: tuple[str, ...], positions: Positions) -> list[NDArray[Any]]:
    """`of_real` for rows of a table by their number in it."""
    return [_take(_field(table["real"].chunks, field), positions) for field in fields]


def of_synthetic(catalog: Catalog, fields: tuple[str, ...], positions: Positions) -> list[NDArray[Any]]:
    """One array [N, K] for each field of the variations, NaN where one is missing.

    Raises `CorruptSetError` unless every row has the K variations of the plan.
    """
    table = catalog.columns(*(f"{ELEMENT}.{field}" for field in fields))
    return synthetic_fields(catalog, table, fields, positions, 0)


def synthetic_fields(
    catalog: Catalog, table: pa.Table, fields: tuple[str, ...], positions: Positions, start: int
) -> list[NDArray[Any]]:
    """`of_synthetic` for rows of a table by their number in it; the first one is row `start` of the manifest."""
    chunks = table["synthetic"].chunks
    lengths = _in_one([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
    _check_lengths(catalog, _take(lengths, positions), positions + start if start else positions)
    elements = [chunk.flatten() for chunk in chunks]
    flat = [_field(elements, field) for field in fields]
    variations = catalog.plan.variations
    if len(lengths) == len(positions):
        return [values.reshape(-1, variations) for values in flat]
    first = (np.cumsum(lengths, dtype=np.int64) - lengths)[positions]
    return [values[first[:, None] + np.arange(variations)] for values in flat]


def _check_lengths(catalog: Catalog, lengths: NDArray[np.int32], positions: Positions) -> None:
    wrong = np.flatnonzero(lengths != catalog.plan.variations)
    if len(wrong):
        key = catalog.rows(positions[wrong[:1]].tolist())[0].key
        raise CorruptSetError(
            f"{catalog.storage.url}: row {key} has {lengths[wrong[0]]} variations and the plan asks for "
            f"{catalog.plan.variations}; `pipeline verify` names all such rows, `pipeline repair` makes them again"
        )


def _take(values: NDArray[Any], positions: Positions) -> NDArray[Any]:
    return values if len(values) == len(positions) else values[positions]


def _field(chunks: list[pa.Array], name: str) -> NDArray[Any]:
    # The child as it is stored: a row without the struct has some placeholder there, and is never asked for.
    return _joined([chunk.field(name) for chunk in chunks])


def _joined(chunks: list[pa.Array]) -> NDArray[Any]:
    return _in_one([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])


def _in_one(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """End to end, without a copy of a single one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
