"""One row per sample: the types, the Arrow schema and its version."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from manifests.errors import CorruptSetError, SchemaVersionError

SCHEMA_VERSION = 1

OK = "ok"
FAILED = "failed"

_VERSION_KEY = b"diffmix.schema_version"
_SHARD_KEY = b"diffmix.shard"

_REAL = pa.struct(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),
    ]
)

_SYNTHETIC = pa.struct(
    [
        *_REAL,
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("similarity", pa.float32()),
        pa.field("flagged", pa.bool_()),
    ]
)

ROW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("label", pa.int32()),
        pa.field("class_name", pa.string()),
        pa.field("source", pa.string()),
        pa.field("real", _REAL),
        pa.field("synthetic", pa.list_(pa.field("element", _SYNTHETIC, nullable=False)), nullable=False),
        pa.field("generator", pa.string()),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RealImage:
    """Where the real image's bytes lie in the shard's tar, and what they are."""

    offset: int
    size: int
    width: int
    height: int
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticImage(RealImage):
    """The same for one variation, with the seed of its noise and what the generator says of it."""

    seed: int
    similarity: float | None = None
    flagged: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """One sample of a pair set. `synthetic` is in order of the variation index and empty in a failed row."""

    key: str
    shard: int
    status: str = OK
    error: str | None = None
    label: int | None = None
    class_name: str | None = None
    source: str | None = None
    real: RealImage | None = None
    synthetic: tuple[SyntheticImage, ...] = ()
    generator: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFacts:
    """What is true of a whole shard, kept in its part's Parquet metadata."""

    shard: int
    tar_size: int
    tar_sha256: str  # hexadecimal
    batch_size: int = 0
    seconds: float = 0.0
    device: str = ""
    nonfinite_redone: int = 0  # variations computed again in float32
    versions: Mapping[str, str] = field(default_factory=dict)


def rows_to_table(rows: Iterable[PairRow], facts: ShardFacts | None = None) -> pa.Table:
    """Rows as an Arrow table of `ROW_SCHEMA`, the shard's facts in its metadata."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=ROW_SCHEMA)
    if facts is None:
        return table
    metadata = {**(table.schema.metadata or {}), _SHARD_KEY: json.dumps(asdict(facts), sort_keys=True).encode()}
    return table.replace_schema_metadata(metadata)


def table_to_rows(table: pa.Table) -> list[PairRow]:
    """The inverse of `rows_to_table`; for a shard at a time, never for a whole manifest."""
    return [_row(values) for values in table.to_pylist()]


def _row(values: dict[str, Any]) -> PairRow:
    real = values.pop("real")
    synthetic = values.pop("synthetic")
    return PairRow(
        **values,
        real=RealImage(**real) if real else None,
        synthetic=tuple(SyntheticImage(**image) for image in synthetic),
    )


def check_version(version: int | None, what: str) -> None:
    """Refuse files of another schema version, saying what to do."""
    if version == SCHEMA_VERSION:
        return
    got = "no schema version" if version is None else f"schema version {version}"
    advice = (
        "install a newer diffmix to read it"
        if version is not None and version > SCHEMA_VERSION
        else "read it with the diffmix that wrote it, or generate it again"
    )
    raise SchemaVersionError(f"{what} has {got}; this diffmix reads version {SCHEMA_VERSION}: {advice}")


def version_of(schema: pa.Schema) -> int | None:
    """Schema version recorded in a Parquet file's Arrow metadata, None if there is none."""
    value = (schema.metadata or {}).get(_VERSION_KEY, b"")
    return int(value) if value.isdigit() else None


def facts_of(schema: pa.Schema, what: str) -> ShardFacts:
    """The shard's facts recorded in a part; raises `CorruptSetError` when they are missing."""
    value = (schema.metadata or {}).get(_SHARD_KEY)
    try:
        return ShardFacts(**json.loads(value))  # type: ignore[arg-type]  # None is caught below
    except (TypeError, ValueError) as error:
        raise CorruptSetError(f"{what} lacks the facts of its shard; `pipeline repair` writes it again") from error
