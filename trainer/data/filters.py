"""`--filter`: which rows are trained on, by expressions over manifest columns such as `similarity > 0.6`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.catalog import Catalog
from manifests.errors import UsageError
from trainer.choices import unknown
from trainer.data import columns

FRACTION = "fraction"
_MOST_NAMES = 20  # classes that an error lists

_HELP = (
    "a filter is COLUMN OP VALUE with one of == != < <= > >=, or COLUMN in A,B,C, or fraction 0.1; "
    "for example 'similarity > 0.6', 'class_name in cat,dog', 'flagged == false'"
)
_EXPRESSION = re.compile(r"\s*([\w.]+)\s*(==|!=|<=|>=|<|>|\s(?:not\s+)?in\s)\s*(.*?)\s*", re.DOTALL)
_FRACTION = re.compile(r"\s*fraction\s+(\S+)\s*")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_COMPARE_TEXT = {
    "==": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}


@dataclass(frozen=True, slots=True)
class Column:
    """What a filter may name. `of` is where it lies; many variations give the least value, or any for truth values."""

    kind: Literal["number", "text", "truth"]
    of: Literal["row", "real", "synthetic"] = "row"


COLUMNS: dict[str, Column] = {
    "key": Column("text"),
    "label": Column("number"),
    "class_name": Column("text"),
    "source": Column("text"),
    "generator": Column("text"),
    "shard": Column("number"),
    "similarity": Column("number", "synthetic"),
    "flagged": Column("truth", "synthetic"),
    "real.width": Column("number", "real"),
    "real.height": Column("number", "real"),
    "real.size": Column("number", "real"),
    "synthetic.width": Column("number", "synthetic"),
    "synthetic.height": Column("number", "synthetic"),
    "synthetic.size": Column("number", "synthetic"),
}


def positions(catalog: Catalog, expressions: Sequence[str]) -> NDArray[np.int64]:
    """Positions, ascending, of the `ok` rows for which all expressions hold.

    A row without the value asked for never matches; similarities and flags that the generator did not record raise
    `UsageError`, as do unknown columns, unreadable expressions and those that leave no row.
    """
    found = catalog.usable
    if not len(found):
        raise UsageError(f"{catalog.storage.url} has no usable row; `pipeline status` says why they failed")
    for expression in expressions:
        kept = found[_mask(catalog, expression, found)]
        if not len(kept):
            raise UsageError(
                f"--filter {expression!r} leaves none of {len(found)} rows ({len(catalog.usable)} of "
                f"{catalog.storage.url} are usable); choose a milder one{_class_names(catalog, expression)}"
            )
        found = kept
    return found


def _class_names(catalog: Catalog, expression: str) -> str:
    """For a filter on classes that fits none: some that there are."""
    if not expression.lstrip().startswith("class_name"):
        return ""
    names = pc.unique(catalog.columns("class_name")["class_name"].drop_null()).to_pylist()
    return f". Classes: {', '.join(sorted(names)[:_MOST_NAMES])}{' …' if len(names) > _MOST_NAMES else ''}"


def _mask(catalog: Catalog, expression: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    fraction = _FRACTION.fullmatch(expression)
    if fraction:
        return _in_fraction(catalog, _number(fraction[1], expression), rows)
    match = _EXPRESSION.fullmatch(expression)
    if not match:
        equals = "equality is ==; " if re.fullmatch(r"[^=!<>]+=[^=]+", expression) else ""
        raise UsageError(f"cannot read --filter {expression!r}: {equals}{_HELP}")
    name, operation, text = match[1], " ".join(match[2].split()), match[3]
    if name not in COLUMNS:
        raise unknown("column in --filter:", name, [*COLUMNS, FRACTION])
    values = [_unquoted(value) for value in text.split(",")] if operation.endswith("in") else [_unquoted(text)]
    if "" in values:
        raise UsageError(f"--filter {expression!r} compares with nothing: {_HELP}")
    if COLUMNS[name].kind == "text":
        return _of_text(catalog, name, operation, values, rows)
    wanted = [_value(COLUMNS[name].kind, value, expression) for value in values]
    column, valid = _column(catalog, name, rows)
    return valid & _compared(column, operation, wanted)


def _compared(column: NDArray[Any], operation: str, wanted: list[Any]) -> NDArray[np.bool_]:
    match operation:
        case "in":
            return np.isin(column, np.asarray(wanted))
        case "not in":
            return ~np.isin(column, np.asarray(wanted))
        case _:
            compared: NDArray[np.bool_] = _COMPARE[operation](column, wanted[0])
            return compared


def _of_text(
    catalog: Catalog, name: str, operation: str, wanted: list[str], rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    column = columns.texts(catalog, name, rows)
    if operation.endswith("in"):
        inside = pc.is_in(column, value_set=_strings(wanted))
        mask = inside if operation == "in" else pc.and_(pc.invert(inside), column.is_valid())
    else:
        mask = pc.call_function(_COMPARE_TEXT[operation], [column, wanted[0]])
    array: NDArray[np.bool_] = mask.fill_null(False).to_numpy().astype(np.bool_)
    return array


def _strings(values: list[str]) -> Any:
    import pyarrow as pa

    return pa.array(values, pa.string())


def _column(catalog: Catalog, name: str, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values [N] of a column of numbers or truth values, and where there are any, bool [N]."""
    column = COLUMNS[name]
    field = name.rpartition(".")[2]
    present = np.ones(len(rows), np.bool_)
    if column.of == "row":
        return columns.numbers(catalog, name, rows)
    if column.of == "real":
        if catalog.plan.store_real is None:
            raise UsageError(f"--filter names {name}, but {catalog.storage.url} has no real images")
        return columns.of_real(catalog, (field,), rows)[0], present
    if catalog.plan.variations == 0:
        raise UsageError(f"--filter names {name}, but {catalog.storage.url} has no synthetic images")
    values = columns.of_synthetic(catalog, (field,), rows)[0]
    _check_recorded(catalog, name, values)
    reduced: Any = values.astype(np.bool_).any(1) if column.kind == "truth" else values.min(1)
    return reduced, present


def _check_recorded(catalog: Catalog, name: str, values: NDArray[Any]) -> None:
    missing = np.isnan(values.astype(np.float64))  # nulls, which come as None among truth values, and NaN itself
    if missing.any():
        raise UsageError(
            f"--filter names {name}, which {int(missing.any(1).sum())} of {len(values)} rows of {catalog.storage.url} "
            f"do not have: their generator recorded none. Leave this filter out, or generate with one that does"
        )


def _in_fraction(catalog: Catalog, fraction: float, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows by a hash of their key alone: a smaller fraction is part of a larger one, in any set with the same keys."""
    if not 0 < fraction <= 1:
        raise UsageError(f"--filter 'fraction {fraction:g}' must lie above 0 and at most at 1")
    words = columns.hashes(columns.texts(catalog, "key", rows))
    return (words >> np.uint64(11)) * 2.0**-53 < fraction


def _unquoted(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _value(kind: str, text: str, expression: str) -> float | bool:
    if kind == "number":
        return _number(text, expression)
    if text.lower() not in ("true", "false"):
        raise UsageError(f"--filter {expression!r} compares with {text!r}; it must be true or false")
    return text.lower() == "true"


def _number(text: str, expression: str) -> float:
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError as error:
        raise UsageError(f"--filter {expression!r} compares with {text!r}; it must be a number") from error
