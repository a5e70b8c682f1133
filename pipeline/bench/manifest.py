"""A merged manifest of many rows: bytes a row, and the time and memory a trainer needs to draw an order from it.

The rows are those of an ImageNet-like set of one variation per image, with the entropy of real ones: hashed keys in
random order, random checksums and seeds, JPEG sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests import catalog, layout
from manifests.plan import Plan, claim
from manifests.schema import OK, ROW_SCHEMA
from manifests.storage import Storage, open_storage
from pipeline.bench.child import call
from pipeline.bench.figures import Figure, Goal, Say, Settings

_ROWS, _QUICK_ROWS = 10_000_000, 200_000
_SHARD_ROWS = 10_000
_CLASSES = 1000

SMALL = Goal(bound=120, of="ours", at_least=False)
FAST = Goal(bound=3, of="ours", at_least=False)
LEAN = Goal(bound=2, of="ours", at_least=False)


def measure(settings: Settings, say: Say) -> list[Figure]:
    """Write one, then open it in a fresh process."""
    rows = settings.manifest_rows or (_QUICK_ROWS if settings.quick else _ROWS)
    say(f"manifest: writing {rows:,} rows")
    with tempfile.TemporaryDirectory(prefix="diffmix-bench-") as folder:
        storage = open_storage(folder)
        write(storage, rows)
        size = storage.size(layout.MANIFEST)
        opened = [call("draw", folder) for _ in range(settings.round_count(3))]
    seconds = sorted(facts["seconds"] for facts in opened)[len(opened) // 2]
    peak = max(facts["peak_bytes"] for facts in opened)
    assert all(facts["rows"] == rows for facts in opened), "every row is usable"
    what = f"opening a manifest of {rows:,} rows and drawing a seeded permutation"
    return [
        Figure(name=f"merged manifest of {rows:,} rows", ours=size / rows, unit="bytes/row", goal=SMALL),
        Figure(name=what, ours=seconds, unit="s", goal=FAST, note="in a fresh process, imports left out"),
        Figure(name=f"{what}, peak memory", ours=peak / 1e9, unit="GB", goal=LEAN, note="of the whole process"),
    ]


def draw(folder: str) -> dict[str, Any]:
    """What a trainer does first; called in a process of its own."""
    import time

    started = time.perf_counter()
    order = catalog.Catalog.open(folder).permutation(seed=1)
    return {"seconds": time.perf_counter() - started, "rows": len(order)}


def write(storage: Storage, rows: int) -> None:
    """A plan and a merged manifest of made-up rows."""
    shards = -(-rows // _SHARD_ROWS)
    plan = Plan(
        source={"kind": "folder", "location": "bench", "fingerprint": ""},
        generator=None,
        seed=0,
        variations=1,
        shards=shards,
        rows=rows,
        limit=None,
        labelled=True,
        store_real="original",
        quality=90,
        max_pixels=1,
    )
    claim(storage, plan)
    pending = storage.begin(layout.MANIFEST)
    try:
        with catalog.manifest_writer(pending.file) as writer:
            for table in tables(rows):
                writer.write_table(table)
        pending.commit()
    finally:
        pending.discard()


def tables(rows: int) -> Iterator[pa.Table]:
    """Row groups of made-up rows, in shard order."""
    random = np.random.default_rng(0)
    for start in range(0, rows, catalog.ROW_GROUP):
        yield _table(start, min(catalog.ROW_GROUP, rows - start), random)


def _table(start: int, count: int, random: np.random.Generator) -> pa.Table:
    numbers = np.arange(start, start + count)
    label = random.integers(0, _CLASSES, count)
    class_names = pa.array([f"n{1_440_764 + 7919 * number:08d}" for number in range(_CLASSES)])
    class_name = class_names.take(pa.array(label))
    stem = _joined(class_name, pa.array(random.integers(0, 2_000_000, count)).cast(pa.string()), "_")
    real, synthetic = _sizes(random, count), _sizes(random, count)
    ends = np.cumsum(1024 + 1024 + real + synthetic)  # headers, padding and the small members of a sample
    first = np.searchsorted(numbers // _SHARD_ROWS, numbers // _SHARD_ROWS)
    offset = ends - ends[first]
    columns: dict[str, pa.Array] = {
        "key": _joined(_joined(class_name, stem, "-"), _hexadecimal(random, count, 12), "-"),
        "shard": pa.array(numbers // _SHARD_ROWS, pa.int32()),
        "status": pa.array(np.full(count, OK)),
        "error": pa.nulls(count, pa.string()),
        "label": pa.array(label, pa.int32()),
        "class_name": class_name,
        "source": _joined(_joined(class_name, stem, "/"), pa.array(["JPEG"] * count), "."),
        "real": _image(ROW_SCHEMA.field("real").type, offset, real, random, width=500, height=375),
        "synthetic": _one_each(offset + real, synthetic, random),
        "generator": pa.array(["0123456789ab"] * count),
    }
    return pa.table([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)


def _one_each(offset: Any, size: Any, random: np.random.Generator) -> pa.Array:
    kind = ROW_SCHEMA.field("synthetic").type
    count = len(offset)
    images = _image(
        kind.value_type,
        offset,
        size,
        random,
        width=512,
        height=512,
        seed=pa.array(random.integers(0, 2**63 - 1, count)),
        similarity=pa.array(random.normal(0.8, 0.08, count).astype(np.float32)),
        flagged=pa.nulls(count, pa.bool_()),
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), images).cast(kind)


def _image(
    kind: pa.StructType, offset: Any, size: Any, random: np.random.Generator, *, width: int, height: int, **more: Any
) -> pa.Array:
    count = len(offset)
    digests = pa.Array.from_buffers(pa.binary(32), count, [None, pa.py_buffer(random.bytes(32 * count))])
    columns = {
        "offset": pa.array(offset, pa.int64()),
        "size": pa.array(size, pa.int32()),
        "width": pa.array(np.full(count, width), pa.int32()),
        "height": pa.array(np.full(count, height), pa.int32()),
        "sha256": digests,
        **more,
    }
    return pa.StructArray.from_arrays([columns[field.name] for field in kind], fields=list(kind))


def _sizes(random: np.random.Generator, count: int) -> Any:
    return random.normal(100_000, 20_000, count).clip(5_000).astype(np.int64)


def _hexadecimal(random: np.random.Generator, count: int, digits: int) -> pa.Array:
    text = random.bytes(count * digits // 2).hex().encode()
    ends = np.arange(0, len(text) + 1, digits, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(text))


def _joined(left: pa.Array, right: pa.Array, separator: str) -> pa.Array:
    return pc.binary_join_element_wise(left, right, separator)
