"""`mix.weight`: how often images are shown, by a column of the manifest such as the similarity to the real image.

The value of a column, raised to `mix.weight_power`, is the weight: of a row, or of a variation for `similarity` and
`synthetic.*`. Policies say what they weigh.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.data import columns
from trainer.data.filters import COLUMNS
from trainer.data.image_set import ImageSet
from trainer.data.rows import Rows

_NAMES = ("label", "shard")  # numbers that only name something
WEIGHTS = tuple(name for name, column in COLUMNS.items() if column.kind == "number" and name not in _NAMES)


def weights_of(name: str, power: float, rows: ImageSet, variation: int | None = None) -> NDArray[np.float64]:
    """Weights of the rows, float64 [N], or [N, K] where the column is of the variations and none of them is chosen.

    The largest weight is 1. Raises `UsageError` where values are missing, negative or all 0.
    """
    values, present = _values(name, rows)
    if variation is not None and values.ndim == 2:
        values, present = values[:, variation], present[:, variation]
    _check(name, rows, values, present)
    weights: NDArray[np.float64] = (values / values.max()) ** power
    return weights


def _values(name: str, rows: ImageSet) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The column, and where it has a value."""
    column, field = COLUMNS[name], name.rpartition(".")[2]
    if not isinstance(rows, Rows):
        _refuse(name, rows, "which is no pair set: it has no columns. Leave mix.weight out")
    if column.of != "row" and not getattr(rows, f"has_{column.of}"):
        _refuse(name, rows, f"which has no {column.of} images. Choose another column, or leave mix.weight out")
    values: NDArray[Any]
    if column.of == "row":
        values, present = columns.numbers(rows.catalog, name, rows.positions)
        return values.astype(np.float64), present
    read = columns.of_real if column.of == "real" else columns.of_synthetic
    values = read(rows.catalog, (field,), rows.positions)[0].astype(np.float64)
    return values, ~np.isnan(values)


def _check(name: str, rows: ImageSet, values: NDArray[np.float64], present: NDArray[np.bool_]) -> None:
    filtering = f"leave those rows out (--filter '{name} >= 0', for the set of --data)"
    if not present.all():
        _refuse(name, rows, f"where {_rows(~present)} of {len(rows)} rows have no value. Leave mix.weight out")
    if not np.isfinite(values).all():
        _refuse(name, rows, f"where {_rows(~np.isfinite(values))} of {len(rows)} rows have no finite value")
    if values.min() < 0:
        below = f"where {_rows(values < 0)} of {len(rows)} rows have a value below 0, down to {values.min():g}"
        _refuse(name, rows, f"{below}; a weight is 0 or more: {filtering}, or leave mix.weight out")
    if not values.any():
        _refuse(name, rows, "where all values are 0, so that nothing could be shown. Leave mix.weight out")


def _rows(wrong: NDArray[np.bool_]) -> int:
    return int(wrong.reshape(len(wrong), -1).any(1).sum())


def _refuse(name: str, rows: ImageSet, why: str) -> NoReturn:
    raise UsageError(f"mix.weight={name} reads {rows.url}, {why}")
