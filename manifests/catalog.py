"""All rows of a pair set: merge the parts into manifest.parquet, and open it fast."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from manifests import checksum, layout
from manifests.errors import CorruptSetError, SchemaVersionError, StorageError, UsageError
from manifests.plan import Plan, read_plan
from manifests.schema import OK, ROW_SCHEMA, PairRow, RealImage, check_version, table_to_rows, version_of
from manifests.storage import PendingFile, Storage, explained, open_storage

_PARTS_KEY = "diffmix.parts"
ROW_GROUP = 65_536

# Few values repeated are worth a dictionary; offsets and sizes are worth deltas; hashes and seeds are noise. Keys lie
# in hash order, so that neighbours share no beginning that would be worth more than general compression.
_DICTIONARY = ["status", "error", "class_name", "generator", "shard", "label", "real.width", "real.height"]
_DICTIONARY += [f"synthetic.list.element.{name}" for name in ("width", "height", "flagged")]
_ENCODING = {
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
    return _sealed_part(storage, shard)[0]


def _sealed_part(storage: Storage, shard: int) -> tuple[pa.Table, str]:
    """A part's rows and its own checksum."""
    name = layout.part_name(shard)
    where = f"{storage.url}/{name}"
    file = io.BytesIO(storage.read(name))
    if not checksum.is_sound(file):
        raise CorruptSetError(f"{where} is damaged: its bytes do not match its own checksum")
    with _opened(file, where) as parquet:
        return parquet.read(), checksum.sealed_value(file) or ""


@contextlib.contextmanager
def _opened(file: IO[bytes], where: str, coded: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """The Parquet file, of our schema version; what is wrong with its bytes is a `CorruptSetError`.

    Columns of strings named in `coded` come as a number a row and a list of their values.
    """
    with explained("read", where):
        try:
            parquet = pq.ParquetFile(file, read_dictionary=coded)
            check_version(version_of(parquet.schema_arrow), where)
            yield parquet
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the system's; Arrow raises OSErrors of its own without one
                raise
            reason = " ".join(str(error).split())
            raise CorruptSetError(f"{where} is damaged ({reason}); `pipeline verify` names all that is hurt") from error


def merge(storage: Storage, plan: Plan) -> int:
    """Write manifest.parquet from all parts, in shard order; returns the number of rows. Harmless to repeat.

    Raises `CorruptSetError` if a part is damaged, lacks rows or holds a key that another row has.
    """
    pending = storage.begin(layout.MANIFEST)
    hashes: list[NDArray[np.uint64]] = []
    parts = hashlib.sha256()
    try:
        with explained("write", pending.where):
            with manifest_writer(pending.file) as writer:
                for table in row_groups(_parts(storage, plan, parts)):
                    hashes.append(key_hashes(table["key"]))
                    writer.write_table(table)
                writer.add_key_value_metadata({_PARTS_KEY: parts.hexdigest(), **checksum.PLACEHOLDER})
            _check_unique(np.concatenate(hashes))
            checksum.seal(pending.file)
        _commit(pending, storage, plan)
    finally:
        pending.discard()
    return sum(map(len, hashes))


def _commit(pending: PendingFile, storage: Storage, plan: Plan) -> None:
    try:
        pending.commit()
    except StorageError:
        # Another process that merged the same parts first has removed every temporary, this one among them.
        if not is_manifest_current(storage, plan):
            raise


def manifest_writer(file: IO[bytes]) -> pq.ParquetWriter:
    """A writer of tables of `ROW_SCHEMA`, encoded as in manifest.parquet."""
    return pq.ParquetWriter(
        file,
        ROW_SCHEMA,
        compression="zstd",
        compression_level=6,
        use_dictionary=_DICTIONARY,
        column_encoding=_ENCODING,
        write_statistics=["shard", "status", "label"],
    )


def row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of `ROW_GROUP` rows, the last one excepted."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        rows = sum(map(len, waiting))
        if rows >= ROW_GROUP:
            joined = pa.concat_tables(waiting)
            whole = rows - rows % ROW_GROUP
            yield from (joined.slice(start, ROW_GROUP) for start in range(0, whole, ROW_GROUP))
            waiting = [joined.slice(whole)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _parts(storage: Storage, plan: Plan, digest: hashlib._Hash) -> Iterator[pa.Table]:
    """The rows of each shard; `digest` takes their checksums and ends as that of `parts_digest`."""
    for shard in range(plan.shards):
        table, sealed = _sealed_part(storage, shard)
        if table.num_rows != plan.shard_rows(shard):
            raise CorruptSetError(
                f"{storage.url}/{layout.part_name(shard)} has {table.num_rows} rows; the plan gives this shard "
                f"{plan.shard_rows(shard)}. Run `pipeline repair {storage.url}`"
            )
        digest.update(sealed.encode())
        yield table.cast(ROW_SCHEMA)


def key_hashes(keys: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Eight bytes for each key: enough to tell a billion apart, little enough to hold them all."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _check_unique(hashes: NDArray[np.uint64]) -> None:
    if len(np.unique(hashes)) != len(hashes):
        raise CorruptSetError("two rows of the set have the same key; `pipeline verify` names the shards")


def parts_digest(storage: Storage, plan: Plan) -> str:
    """A hash over the checksums of all parts: tells whether a manifest.parquet is of these parts."""
    return _digest_of(storage, range(plan.shards))


def _digest_of(storage: Storage, shards: Iterable[int]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        where = f"{storage.url}/{layout.part_name(shard)}"
        with storage.open(layout.part_name(shard)) as file, explained("read", where):
            digest.update((checksum.sealed_value(file) or "").encode())
    return digest.hexdigest()


def is_manifest_current(storage: Storage, plan: Plan) -> bool:
    """Whether manifest.parquet is there, undamaged, of this schema version and merged from the parts of now."""
    if not storage.exists(layout.MANIFEST):
        return False
    where = f"{storage.url}/{layout.MANIFEST}"
    try:
        with storage.open(layout.MANIFEST) as file, explained("read", where):
            if not checksum.is_sound(file):
                return False
            with _opened(file, where) as parquet:
                recorded = (parquet.metadata.metadata or {}).get(_PARTS_KEY.encode())
        return recorded == parts_digest(storage, plan).encode()
    except (CorruptSetError, SchemaVersionError, StorageError):
        return False


class Catalog:
    """The rows of a pair set, columns read when asked for.

    Opening reads the plan alone: milliseconds at ten million rows. A column of numbers then costs about 8 bytes a
    row. Positions are row numbers of the manifest, in shard order.
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
        warnings.warn(
            f"{url} has no {layout.MANIFEST} yet: reading {len(parts)} of its {plan.shards} shards one by one; "
            "`pipeline generate` with the same settings, or `pipeline repair`, finishes it",
            stacklevel=2,
        )
        return cls(storage, plan, parts)

    @property
    def parts_digest(self) -> str:
        """A hash over the checksums of the parts that the rows come from, the same before and after they are merged."""
        if self._files != [layout.MANIFEST]:
            return _digest_of(self.storage, sorted(committed_shards(self.storage, self.plan)))
        with self._parquet(layout.MANIFEST) as parquet:
            return (parquet.metadata.metadata or {}).get(_PARTS_KEY.encode(), b"").decode()

    def columns(self, *names: str) -> pa.Table:
        """Columns by name as one table in shard order; a dotted path keeps one field of a struct.

        `real.offset` gives `real` with that field alone, `synthetic.list.element.seed` gives lists of such structs.
        Raises `UsageError` for a name that is no column.
        """
        tables = []
        for file in self._files:
            with self._parquet(file) as parquet:
                tables.append(_columns(parquet, names))
        return pa.concat_tables(tables)

    def group_tables(self, groups: Sequence[int], *names: str) -> Iterator[pa.Table]:
        """`columns` of some row groups, numbered as in `group_starts` and ascending: a table for each."""
        for file, members in itertools.groupby(groups, lambda group: self._groups[group][0]):
            with self._parquet(file) as parquet:
                _check_names(parquet, names)
                for group in members:
                    yield parquet.read_row_group(self._groups[group][1], columns=list(names))

    @cached_property
    def group_starts(self) -> NDArray[np.int64]:
        """Position of the first row of each row group, and at last the number of rows: int64 [G + 1]."""
        return np.cumsum([0, *(rows for _, _, rows in self._groups)], dtype=np.int64)

    @cached_property
    def _groups(self) -> list[tuple[str, int, int]]:
        """File, number therein and rows of each row group."""
        found = []
        for file in self._files:
            with self._parquet(file) as parquet:
                numbers = range(parquet.num_row_groups)
                found += [(file, number, parquet.metadata.row_group(number).num_rows) for number in numbers]
        return found

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    @cached_property
    def usable(self) -> NDArray[np.int64]:
        """Positions of the `ok` rows."""
        is_ok, start = np.ones(len(self), np.bool_), 0
        for file in self._files:
            with self._parquet(file, coded=["status"]) as parquet:
                status = _paths(parquet).index("status")
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    if not _are_all_ok(parquet, group, status):
                        column = parquet.read_row_group(group, columns=["status"])["status"]
                        is_ok[start:stop] = pc.equal(column, OK).to_numpy()
                    start = stop
        return np.flatnonzero(is_ok).astype(np.int64, copy=False)

    def permutation(self, seed: int) -> NDArray[np.int64]:
        """Positions of the `ok` rows in a random order that depends on `seed` alone."""
        return np.random.default_rng(seed).permutation(self.usable)

    def rows(self, positions: Sequence[int]) -> list[PairRow]:
        """Whole rows by position, in the order asked; reads only the row groups they lie in."""
        found: dict[int, PairRow] = {}
        wanted = np.unique(np.asarray(positions, dtype=np.int64))
        start = 0
        for file in self._files:
            with self._parquet(file) as parquet:
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
        for file in self._files:
            with self._parquet(file) as parquet:
                for group in range(parquet.num_row_groups):
                    position = pc.index(parquet.read_row_group(group, columns=["key"])["key"], key).as_py()
                    if position >= 0:
                        return table_to_rows(parquet.read_row_group(group).slice(position, 1))[0]
        raise CorruptSetError(
            f"{self.storage.url} has no row with key {key!r}; the column `key` of its manifest lists all"
        )

    @contextlib.contextmanager
    def _parquet(self, name: str, coded: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
        with self.storage.open(name) as file, _opened(file, f"{self.storage.url}/{name}", coded) as parquet:
            yield parquet


def _are_all_ok(parquet: pq.ParquetFile, group: int, status: int) -> bool:
    """Whether the statistics of a row group's column number `status` say so: that spares the reading."""
    statistics = parquet.metadata.row_group(group).column(status).statistics
    return statistics is not None and statistics.has_min_max and statistics.min == statistics.max == OK


def _paths(parquet: pq.ParquetFile) -> list[str]:
    return [parquet.schema.column(index).path for index in range(len(parquet.schema))]


def _check_names(parquet: pq.ParquetFile, names: Sequence[str]) -> None:
    paths = _paths(parquet)
    for name in names:
        if not any(path == name or path.startswith(f"{name}.") for path in paths):
            raise UsageError(f"a pair set has no column {name!r}; it has {', '.join(paths)}")


def _columns(parquet: pq.ParquetFile, names: Sequence[str]) -> pa.Table:
    _check_names(parquet, names)
    return parquet.read(columns=list(names)).replace_schema_metadata(None)
