from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import CorruptSetError, SchemaVersionError
from manifests.schema import (
    FAILED,
    ROW_SCHEMA,
    PairRow,
    RealImage,
    ShardFacts,
    SyntheticImage,
    check_version,
    facts_of,
    rows_to_table,
    table_to_rows,
    version_of,
)

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
IMAGE = {
    "offset": st.integers(0, 2**62),
    "size": st.integers(0, 2**31 - 1),
    "width": st.integers(1, 2**31 - 1),
    "height": st.integers(1, 2**31 - 1),
    "sha256": st.binary(min_size=32, max_size=32),
}
ROWS = st.builds(
    PairRow,
    key=TEXT,
    shard=st.integers(0, 10**6),
    status=st.sampled_from(["ok", FAILED]),
    error=st.none() | TEXT,
    label=st.none() | st.integers(-(2**31), 2**31 - 1),
    class_name=st.none() | TEXT,
    source=st.none() | TEXT,
    real=st.none() | st.builds(RealImage, **IMAGE),
    synthetic=st.lists(
        st.builds(
            SyntheticImage,
            **IMAGE,
            seed=st.integers(0, 2**63 - 1),
            similarity=st.none() | st.floats(-1, 1, width=32),
            flagged=st.none() | st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
    generator=st.none() | TEXT,
)


@given(st.lists(ROWS, max_size=4))
def test_rows_come_back(rows: list[PairRow]):
    facts = ShardFacts(shard=1, tar_size=2, tar_sha256="ab", versions={"torch": "2"})
    table = rows_to_table(rows, facts)
    assert table.schema.equals(ROW_SCHEMA) and version_of(table.schema) == 1
    assert table_to_rows(table) == rows
    assert facts_of(table.schema, "x") == facts


@pytest.mark.parametrize(("version", "advice"), [(2, "newer diffmix"), (0, "generate it again"), (None, "no schema")])
def test_other_versions_are_refused_with_what_to_do(version: int | None, advice: str):
    check_version(1, "x")
    with pytest.raises(SchemaVersionError, match=advice) as caught:
        check_version(version, "x/plan.json")
    assert "x/plan.json" in str(caught.value) and "reads version 1" in str(caught.value)


@pytest.mark.parametrize("value", [b"", b"1.5", b"-1", "²".encode(), b"\xff"])
def test_odd_versions_are_none(value: bytes):
    assert version_of(pa.schema([], metadata={b"diffmix.schema_version": value})) is None


@pytest.mark.parametrize("value", [None, b"", b"[1]", b"{}", b'{"shard": 1, "new": 2}'])
def test_odd_facts_are_refused(value: bytes | None):
    metadata = {} if value is None else {b"diffmix.shard": value}
    with pytest.raises(CorruptSetError, match=r"pairs-000000.parquet lacks .* `pipeline repair`"):
        facts_of(pa.schema([], metadata=metadata), "pairs-000000.parquet")
