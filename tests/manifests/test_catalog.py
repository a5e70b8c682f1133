from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import catalog as catalog_module
from manifests import layout
from manifests.catalog import (
    Catalog,
    committed_shards,
    is_manifest_current,
    manifest_writer,
    merge,
    read_part,
    row_groups,
)
from manifests.errors import CorruptSetError, SchemaVersionError, UsageError
from manifests.plan import Plan, claim
from manifests.schema import OK, ROW_SCHEMA, ShardFacts, rows_to_table, table_to_rows
from manifests.shard import part_bytes
from manifests.storage import LocalStorage, open_storage
from tests.manifests.builders import FACTS, flip, make_plan, open_writer, write_set, write_shard


def test_merge_gives_all_rows_in_shard_order(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    rows = [row for shard in range(plan.shards) for row in table_to_rows(read_part(storage, shard))]
    manifest = pq.read_table(storage.path / layout.MANIFEST)
    assert table_to_rows(manifest) == rows and manifest.schema.remove_metadata().equals(ROW_SCHEMA.remove_metadata())
    assert [row.key for row in rows] == ["key_0-0", "key_0-1", "key_0-2", "key_1-0", "key_1-1"]
    assert is_manifest_current(storage, plan)
    before = storage.read(layout.MANIFEST)
    assert merge(storage, plan) == 5
    assert storage.read(layout.MANIFEST) == before and not any(name.startswith(".") for name in storage.names())


def test_duckdb_reads_the_manifest(finished: tuple[LocalStorage, Plan]):
    storage, _ = finished
    query = f"""
        select label, count(*), min(synthetic[1].similarity), octet_length(any_value(real.sha256))
        from '{storage.path}/manifest.parquet' where status = 'ok' group by label
    """
    assert duckdb.sql(query).fetchall() == [(1, 4, 0.5, 32)]


@given(sizes=st.lists(st.integers(0, 25), max_size=12))
def test_row_groups_are_even(sizes: list[int]):
    ends = np.cumsum([0, *sizes]).tolist()
    tables = [pa.table({"n": pa.array(range(start, end), pa.int64())}) for start, end in pairwise(ends)]
    before, catalog_module.ROW_GROUP = catalog_module.ROW_GROUP, 10
    try:
        groups = list(row_groups(tables))
    finally:
        catalog_module.ROW_GROUP = before
    assert [len(group) for group in groups[:-1]] == [10] * (len(groups) - 1)
    assert all(0 < len(group) <= 10 for group in groups)
    assert [value for group in groups for value in group["n"].to_pylist()] == list(range(ends[-1]))


def test_merge_refuses_duplicates(storage: LocalStorage, plan: Plan):
    claim(storage, plan)
    write_shard(storage, plan, 0)
    writer = open_writer(storage, plan, 1)
    writer.rows[0] = writer.rows[0].__class__(key="key_0-1", shard=1, status="failed")
    writer.commit(**FACTS)
    with pytest.raises(CorruptSetError, match="same key; `pipeline verify` names"):
        merge(storage, plan)
    assert layout.MANIFEST not in storage.names() and not any(name.startswith(".") for name in storage.names())


def test_merge_refuses_wrong_counts_damage_and_gaps(storage: LocalStorage, plan: Plan):
    claim(storage, plan)
    write_shard(storage, plan, 0)
    with pytest.raises(Exception, match=r"pairs-000001.parquet: it does not exist"):
        merge(storage, plan)
    write_shard(storage, make_plan(rows=6), 1)
    with pytest.raises(CorruptSetError, match=r"pairs-000001.parquet has 3 rows; the plan gives this shard 2. Run"):
        merge(storage, plan)
    write_shard(storage, plan, 1, replace=True)
    data = storage.read(layout.part_name(0))
    storage.write(layout.part_name(0), flip(data, len(data) // 2))
    with pytest.raises(CorruptSetError, match="damaged"):
        merge(storage, plan)
    assert layout.MANIFEST not in storage.names() and not any(name.startswith(".") for name in storage.names())


def test_a_part_replaced_during_the_merge_makes_the_manifest_stale(
    finished: tuple[LocalStorage, Plan], monkeypatch: pytest.MonkeyPatch
):
    storage, plan = finished
    hashes = catalog_module.key_hashes

    def meanwhile(keys: pa.ChunkedArray) -> Any:
        write_shard(storage, plan, 0, salt="new", replace=True)
        return hashes(keys)

    monkeypatch.setattr(catalog_module, "key_hashes", meanwhile)
    merge(storage, plan)
    assert not is_manifest_current(storage, plan)


def test_a_merge_that_another_finished_and_swept_is_no_error(
    finished: tuple[LocalStorage, Plan], monkeypatch: pytest.MonkeyPatch
):
    storage, plan = finished
    begin = storage.begin

    def swept(name: str):
        pending = begin(name)
        open_storage(storage.url).sweep("all")
        return pending

    monkeypatch.setattr(storage, "begin", swept)
    assert merge(storage, plan) == 5
    storage.remove(layout.MANIFEST)
    with pytest.raises(Exception, match=r"manifest.parquet: it does not exist"):
        merge(storage, plan)


def test_stale_damaged_and_foreign_manifests_are_not_current(finished: tuple[LocalStorage, Plan]):
    storage, plan = finished
    good = storage.read(layout.MANIFEST)
    for data in (b"", good[:-1], flip(good, 10), b"PAR1"):
        storage.write(layout.MANIFEST, data)
        assert not is_manifest_current(storage, plan)
    storage.write(layout.MANIFEST, good)
    assert is_manifest_current(storage, plan)
    write_shard(storage, plan, 1, salt="new", replace=True)
    storage.write(layout.MANIFEST, good)
    assert not is_manifest_current(storage, plan)


def test_columns(finished: tuple[LocalStorage, Plan]):
    catalog = Catalog.open(finished[0].url)
    table = catalog.columns("key", "real.offset", "real.size", "synthetic.list.element.seed")
    assert table.column_names == ["key", "real", "synthetic"] and len(table) == len(catalog) == 5
    assert table.schema.field("real").type.names == ["offset", "size"]
    assert set(table["synthetic"][0].as_py()[0]) == {"seed"} and table["real"][3].as_py() is None
    with pytest.raises(UsageError, match=r"no column 'simlarity'; it has key, .*synthetic.list.element.similarity"):
        catalog.columns("key", "simlarity")


def test_rows_by_position_and_key(finished: tuple[LocalStorage, Plan], monkeypatch: pytest.MonkeyPatch):
    storage, plan = finished
    monkeypatch.setattr(catalog_module, "ROW_GROUP", 2)
    merge(storage, plan)
    catalog = Catalog.open(storage.url)
    assert [row.key for row in catalog.rows([4, 0, 3, 0])] == ["key_1-1", "key_0-0", "key_1-0", "key_0-0"]
    assert catalog.rows([]) == [] and catalog.rows(np.array([2]))[0] == catalog.row("key_0-2")
    with pytest.raises(CorruptSetError, match="no row with key 'nobody'"):
        catalog.row("nobody")


def test_usable_and_permutation(tmp_path: Path):
    failed = [f"key_{shard}-{position}" for shard in range(4) for position in (0, 7)]
    storage, _ = write_set(str(tmp_path / "set"), make_plan(shards=4, rows=200, variations=1), failed=failed)
    catalog = Catalog.open(storage.url)
    statuses = [row.status for row in catalog.rows(range(200))]
    assert catalog.usable.tolist() == [position for position, status in enumerate(statuses) if status == OK]
    assert len(catalog.usable) == 192 and catalog.usable.dtype == np.int64
    orders = [catalog.permutation(seed) for seed in (0, 0, 1)]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    assert all(sorted(order.tolist()) == catalog.usable.tolist() for order in orders)
    assert orders[0].tolist() != catalog.usable.tolist()


def test_unfinished_sets_are_read_from_their_parts_with_a_warning(storage: LocalStorage, plan: Plan):
    claim(storage, plan)
    with pytest.raises(CorruptSetError, match="no committed shard yet; run `pipeline generate`"):
        Catalog.open(storage.url)
    write_shard(storage, plan, 1)
    with pytest.warns(UserWarning, match=r"no manifest.parquet yet: reading 1 of its 2 shards.*`pipeline generate`"):
        catalog = Catalog.open(storage.url)
    assert len(catalog) == 2 and catalog.row("key_1-1").shard == 1 and catalog.rows([1])[0].key == "key_1-1"
    assert catalog.usable.tolist() == [0, 1] and committed_shards(storage, plan) == {1}
    write_shard(storage, plan, 0)
    with pytest.warns(UserWarning, match="2 of its 2"):
        assert len(Catalog.open(storage.url).columns("key")) == 5


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", bytes(3000)])
def test_a_manifest_that_is_no_parquet_is_an_error_for_people(finished: tuple[LocalStorage, Plan], data: bytes):
    storage, _ = finished
    storage.write(layout.MANIFEST, data)
    with pytest.raises(CorruptSetError, match=r"manifest.parquet is damaged .*; `pipeline verify`"):
        Catalog.open(storage.url).columns("key")


def _of_version(data: bytes, version: int) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    metadata = {**table.schema.metadata, b"diffmix.schema_version": str(version).encode()}
    out = io.BytesIO()
    with (
        manifest_writer(out) if version == 1 else pq.ParquetWriter(out, table.schema.with_metadata(metadata)) as writer
    ):
        writer.write_table(table.replace_schema_metadata(metadata))
        writer.add_key_value_metadata(catalog_module.checksum.PLACEHOLDER)
    catalog_module.checksum.seal(out)
    return out.getvalue()


@pytest.mark.parametrize(("version", "advice"), [(2, "install a newer diffmix"), (0, "generate it again")])
def test_other_versions_of_parts_and_manifests_are_refused(
    finished: tuple[LocalStorage, Plan], version: int, advice: str
):
    storage, plan = finished
    storage.write(layout.MANIFEST, _of_version(storage.read(layout.MANIFEST), version))
    catalog = Catalog.open(storage.url)
    for call in (
        lambda: len(catalog),
        lambda: catalog.columns("key"),
        lambda: catalog.usable,
        lambda: catalog.row("x"),
    ):
        with pytest.raises(SchemaVersionError, match=f"manifest.parquet has schema version {version}.*{advice}"):
            call()
    assert not is_manifest_current(storage, plan)
    storage.write(layout.part_name(0), _of_version(storage.read(layout.part_name(0)), version))
    with pytest.raises(SchemaVersionError, match=f"pairs-000000.parquet has schema version {version}.*{advice}"):
        read_part(storage, 0)
    with pytest.raises(SchemaVersionError, match=advice):
        merge(storage, plan)


def test_every_flipped_byte_of_a_part_is_found(finished: tuple[LocalStorage, Plan], monkeypatch: pytest.MonkeyPatch):
    storage, _ = finished
    data = storage.read(layout.part_name(1))
    for position in range(len(data)):
        monkeypatch.setattr(storage, "read", lambda name, position=position: flip(data, position, position % 8))
        with pytest.raises(CorruptSetError, match=r"pairs-000001.parquet is damaged"):
            read_part(storage, 1)


def test_a_row_costs_few_bytes():
    writer = open_writer(open_storage("memory://bytes"), make_plan(rows=2000, shards=1, variations=1), 0)
    writer.discard()
    table = rows_to_table(writer.rows)
    out = io.BytesIO()
    with manifest_writer(out) as parquet:
        parquet.write_table(table)
    assert len(out.getvalue()) / len(table) < 120
    assert part_bytes(writer.rows, ShardFacts(shard=0, tar_size=1, tar_sha256=""))[:4] == b"PAR1"
