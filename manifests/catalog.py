"""All rows of a pair set: merge the parts into manifest.parquet, and open it fast."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests import checksum, layout
from manifests.errors import CorruptSetError, StorageError
from manifests.plan import Plan, read_plan
from manifests.schema import OK, ROW_SCHEMA, PairRow, RealImage, check_version, table_to_rows, version_of
from manifests.storage import Storage, explained, open_storage

_PARTS_KEY = "diffmix.parts"
_ROW_GROUP = 65_536

# Few values repeated are worth a dictionary; offsets and sizes are worth deltas; hashes and seeds are noise.
_DICTIONARY = ["status", "error", "class_name", "generator", "shard", "label", "real.width", "real.height"]
_DICTIONARY += [f"synthetic.list.element.{name}" for name in ("width", "height", "flagged")]
_ENCODING = {
    "key": "DELTA_BYTE_ARRAY",
    "source": "DELTA_BYTE_ARRAY",
    "real.offset": "DELTA_BINARY_PACKED",
    "real.size": "DELTA_BINARY_PACKED",
    "synthetic.list.element.offset": "DELTA_BINARY_PACKED",
    "synthetic.list.element.size": "DELTA_BINARY_PACKED",
}


def committed_shards(storage: Storage, plan: Plan) -> set[int]:
    """Numbers of the plan's shards whose part is there."""
    found = (layout.shard_of(name, "parquet") for name in storage.names())
    return {shard for shard in found if shard is not None and shard < plan.shards}


def read_part(storage: Storage, shard: int) -> pa.Table:
    """A part's rows, facts in the schema's metadata; raises `CorruptSetError` for any byte that is not as written."""
    name = layout.part_name(shard)
    where = f"{storage.url}/{name}"
    with storage.open(name) as file, explained("read", where):
        if not checksum.is_sound(file):
            raise CorruptSetError(f"{where} is damaged: its bytes do not match its own checksum")
        file.seek(0)
        table = pq.read_table(file)
    check_version(version_of(table.schema), where)
    return table


def merge(storage: Storage, plan: Plan) -> int:
    """Write manifest.parquet from all parts, in shard order; returns the number of rows. Harmless to repeat.

    Raises `CorruptSetError` if a part is damaged, lacks rows or holds a key that another row has.
    """
    pending = storage.begin(layout.MANIFEST)
    keys: list[NDArray[np.uint64]] = []
    try:
        writer = pq.ParquetWriter(
            pending.file,
            ROW_SCHEMA,
            compression="zstd",
            compression_level=6,
            use_dictionary=_DICTIONARY,
            column_encoding=_ENCODING,
            write_statistics=["shard", "status", "label"],
        )
        with explained("write", f"{storage.url}/{layout.MANIFEST}"), writer:
            for table in _row_groups(storage, plan):
                keys.append(_hashes(table["key"]))
                writer.write_table(table, row_group_size=_ROW_GROUP)
            writer.add_key_value_metadata({_PARTS_KEY: parts_digest(storage, plan), **checksum.PLACEHOLDER})
        _check_unique(keys)
        checksum.seal(pending.file)
        pending.commit()
    finally:
        pending.discard()
    return sum(map(len, keys))


def _row_groups(storage: Storage, plan: Plan) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for shard in range(plan.shards):
        table = read_part(storage, shard)
        if table.num_rows != plan.shard_rows(shard):
            raise CorruptSetError(f"{layout.part_name(shard)} has {table.num_rows} rows, not {plan.shard_rows(shard)}")
        waiting.append(table.cast(ROW_SCHEMA))
        if sum(map(len, waiting)) >= _ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _hashes(keys: pa.ChunkedArray) -> NDArray[np.uint64]:
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _check_unique(keys: list[NDArray[np.uint64]]) -> None:
    values = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    if len(np.unique(values)) != len(values):
        raise CorruptSetError("two rows of the set have the same key; `pipeline verify` names the shards")


def parts_digest(storage: Storage, plan: Plan) -> str:
    """A hash over the checksums of all parts: tells whether a manifest.parquet is of these parts."""
    digest = hashlib.sha256()
    for shard in range(plan.shards):
        with storage.open(layout.part_name(shard)) as file:
            digest.update((checksum.sealed_value(file) or "").encode())
    return digest.hexdigest()


def is_manifest_current(storage: Storage, plan: Plan) -> bool:
    """Whether manifest.parquet is there, undamaged and merged from the parts that are there now."""
    if not storage.exists(layout.MANIFEST):
        return False
    try:
        with storage.open(layout.MANIFEST) as file:
            if not checksum.is_sound(file):
                return False
            file.seek(0)
            metadata = pq.read_metadata(file).metadata or {}
        return metadata.get(_PARTS_KEY.encode()) == parts_digest(storage, plan).encode()
    except (pa.ArrowException, StorageError):
        return False


class Catalog:
    """The rows of a pair set, columns read when asked for.

    Opening reads the plan and one file's footer: milliseconds at ten million rows. A column of numbers then costs
    about 8 bytes a row. Positions are row numbers of the manifest, in shard order.
    """

    def __init__(self, storage: Storage, plan: Plan, files: list[str]) -> None:
        self.storage = storage
        self.plan = plan
        self._files = files

    @classmethod
    def open(cls, url: str) -> Catalog:
        """The pair set at a local path or fsspec URL; warns and reads the parts while it is not merged yet."""
        storage = open_storage(url)
        plan = read_plan(storage)
        if storage.exists(layout.MANIFEST):
            return cls(storage, plan, [layout.MANIFEST])
        parts = [layout.part_name(shard) for shard in sorted(committed_shards(storage, plan))]
        if not parts:
            raise CorruptSetError(f"{url} has no committed shard yet; run `pipeline generate` with the same settings")
        warnings.warn(f"{url} is not complete: reading {len(parts)} of {plan.shards} shards", stacklevel=2)
        return cls(storage, plan, parts)

    def columns(self, *names: str) -> pa.Table:
        """Columns by name, structs by dotted path (`real.offset`), as one table in shard order."""
        tables = []
        for name in self._files:
            where = f"{self.storage.url}/{name}"
            with self.storage.open(name) as file, explained("read", where):
                parquet = pq.ParquetFile(file)
                check_version(version_of(parquet.schema_arrow), where)
                tables.append(parquet.read(columns=list(names)).replace_schema_metadata(None))
        return pa.concat_tables(tables)

    def __len__(self) -> int:
        return int(self.columns("status").num_rows)

    @cached_property
    def usable(self) -> NDArray[np.int64]:
        """Positions of the `ok` rows."""
        mask = pc.equal(self.columns("status")["status"], OK)
        return np.flatnonzero(mask.to_numpy()).astype(np.int64)

    def permutation(self, seed: int) -> NDArray[np.int64]:
        """Positions of the `ok` rows in a random order that depends on `seed` alone."""
        return np.random.default_rng(seed).permutation(self.usable)

    def rows(self, positions: Sequence[int]) -> list[PairRow]:
        """Whole rows by position, in the order asked; reads only the row groups they lie in."""
        found: dict[int, PairRow] = {}
        wanted = np.unique(np.asarray(positions, dtype=np.int64))
        start = 0
        for name in self._files:
            with self.storage.open(name) as file, explained("read", f"{self.storage.url}/{name}"):
                parquet = pq.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    inside = wanted[(wanted >= start) & (wanted < stop)]
                    if len(inside):
                        table = parquet.read_row_group(group).take(inside - start)
                        found |= zip(inside.tolist(), table_to_rows(table), strict=True)
                    start = stop
        return [found[int(position)] for position in positions]

    def image(self, row: PairRow, image: RealImage) -> bytes:
        """The encoded bytes of one image of a row."""
        return self.storage.read_range(layout.tar_name(row.shard), image.offset, image.size)

    def row(self, key: str) -> PairRow:
        """The row of one key; raises `CorruptSetError` naming it if the set has none."""
        for name in self._files:
            with self.storage.open(name) as file:
                table = pq.read_table(file, filters=[("key", "=", key)])
            if table.num_rows:
                return table_to_rows(table)[0]
        raise CorruptSetError(f"{self.storage.url} has no row with key {key!r}")


def count_rows(storage: Storage, shards: set[int]) -> dict[str | None, int]:
    """Rows by their `error` (None: ok) over the given committed shards; damaged parts count as nothing."""
    counts: dict[str | None, int] = {}
    for shard in sorted(shards):
        try:
            errors = read_part(storage, shard)["error"]
        except (CorruptSetError, StorageError):
            continue
        for entry in errors.value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts
