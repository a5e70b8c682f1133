"""How long a run of ten million rows waits for its first batch when it goes on somewhere in an epoch.

The manifest's rows are made up, with the entropy of real ones, but each of them points to real images: its shards are
links to one small tar. Each measurement is a process of its own: `python -m trainer.bench.resume FOLDER SAMPLES`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from manifests import catalog, layout
from manifests.errors import DiffmixError
from manifests.plan import claim, read_plan
from manifests.schema import ROW_SCHEMA
from manifests.storage import open_storage
from trainer.bench import photos
from trainer.bench.figures import Figure, Goal, Say, Settings
from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig, make
from trainer.data.order import Cursor
from trainer.data.rows import Rows
from trainer.data.view_plan import ViewConfig

_ROWS, _QUICK_ROWS = 10_000_000, 200_000
_REAL_ROWS = 32
_SHARD_ROWS = 10_000
_BATCH = 64

SOON = Goal(bound=2, of="ours", at_least=False)


def measure(settings: Settings, say: Say, rows: int | None = None) -> list[Figure]:
    """From naming the set to the first batch of pairs, at random places of an epoch."""
    rows = rows or (_QUICK_ROWS if settings.quick else _ROWS)
    say(f"resume: writing a manifest of {rows:,} rows")
    with tempfile.TemporaryDirectory(prefix="diffmix-bench-") as name:
        small, large = Path(name) / "small", Path(name) / "large"
        photos.write_pairs(small, photos.photographs(2 * _REAL_ROWS), _REAL_ROWS, 1)
        write(small, large, rows)
        places = np.random.default_rng(0).integers(0, max(1, rows // _batch_size(rows)), settings.round_count(5))
        found = []
        for place in places.tolist():
            found.append(_in_process(small, large, place * _batch_size(rows)))
            say(f"at sample {place * _batch_size(rows):,}: {found[-1]['seconds']:.2f} s")
    seconds = [facts["seconds"] for facts in found]
    what = f"first batch at a random place of {rows:,} rows"
    later, worked = (
        statistics.median(facts[name] for facts in found) for name in ("later_seconds", "processor_seconds")
    )
    note = (
        f"{min(seconds):.2f}-{max(seconds):.2f} s, {worked:.2f} s of them a processor's; {_batch_size(rows)} pairs, a "
        f"later batch takes {later:.2f} s; imports and compilation left out, files in the cache"
    )
    grown = max(facts["grown_bytes"] for facts in found)
    return [
        Figure(name=what, ours=statistics.median(seconds), unit="s", goal=SOON, note=note),
        Figure(name=f"{what}, memory that the peak rises by", ours=grown / 1e9, unit="GB"),
    ]


def _batch_size(rows: int) -> int:
    return min(_BATCH, rows)


def _in_process(small: Path, large: Path, samples: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "trainer.bench.resume", str(small), str(large), str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)  # noqa: S603  our own module
    if done.returncode:
        raise DiffmixError(f"the benchmark's child process failed with exit code {done.returncode}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def first_batch(folder: str, samples: int) -> dict[str, float]:
    """What a run does before its first step: seconds until then, those of processors, and of one more batch."""
    started, worked = time.perf_counter(), time.process_time()
    rows = Rows.open(folder)
    with Loader(
        make(MixConfig(), rows),
        ViewConfig(),
        num_crops=2,
        num_local_crops=0,
        batch_size=_batch_size(len(rows)),
        seed=0,
        device="cpu",
        cursor=Cursor(0, samples),
        prefetch=0,
    ) as loader:
        next(loader)
        first, processor = time.perf_counter(), time.process_time() - worked
        next(loader)
    return {
        "seconds": first - started,
        "later_seconds": time.perf_counter() - first,
        "processor_seconds": processor,
    }


def main(small: str, large: str, samples: str) -> None:
    """Print one line of JSON: seconds and bytes. The small set has compiled and imported what there is."""
    first_batch(small, 0)
    before = _status("VmRSS") or _peak()
    facts = {**first_batch(large, int(samples)), "grown_bytes": max(0, _peak() - before)}
    sys.stdout.write("\n" + json.dumps(facts) + "\n")


def _peak() -> int:
    """The most memory that this process ever had in RAM, in bytes."""
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int | None:
    """A line of Linux's /proc/self/status, in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def write(small: Path, large: Path, rows: int) -> None:
    """A set of `rows` rows at `large`, whose shards are the one of the set at `small`."""
    shards = -(-rows // _SHARD_ROWS)
    storage = open_storage(str(large))
    storage.create_folder()
    claim(storage, replace(read_plan(open_storage(str(small))), rows=rows, shards=shards))
    real = catalog.Catalog.open(str(small)).columns(*ROW_SCHEMA.names).combine_chunks()
    pending = storage.begin(layout.MANIFEST)
    try:
        with catalog.manifest_writer(pending.file) as writer:
            for table in tables(real, rows):
                writer.write_table(table)
        pending.commit()
    finally:
        pending.discard()
    for shard in range(shards):
        os.link(small / layout.tar_name(0), large / layout.tar_name(shard))


def tables(real: pa.Table, rows: int) -> Iterator[pa.Table]:
    """Row groups in shard order: images drawn from those of `real`, new keys and checksums."""
    random = np.random.default_rng(0)
    for start in range(0, rows, catalog.ROW_GROUP):
        yield _table(real, start, min(catalog.ROW_GROUP, rows - start), random)


def _table(real: pa.Table, start: int, count: int, random: np.random.Generator) -> pa.Table:
    chosen = real.take(pa.array(random.integers(0, len(real), count)))
    numbers = np.arange(start, start + count)
    columns = {name: chosen[name] for name in ROW_SCHEMA.names}
    columns["key"] = _keys(random, count)
    columns["shard"] = pa.array(numbers // _SHARD_ROWS, pa.int32())
    columns["real"] = _with_checksums(chosen["real"].combine_chunks(), random)
    synthetic = chosen["synthetic"].combine_chunks()
    columns["synthetic"] = pa.ListArray.from_arrays(
        synthetic.offsets, _with_checksums(synthetic.flatten(), random), type=ROW_SCHEMA.field("synthetic").type
    )
    return pa.table([columns[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)


def _with_checksums(images: pa.StructArray, random: np.random.Generator) -> pa.StructArray:
    digests = pa.Array.from_buffers(pa.binary(32), len(images), [None, pa.py_buffer(random.bytes(32 * len(images)))])
    fields = list(images.type)
    arrays = [digests if field.name == "sha256" else images.field(field.name) for field in fields]
    return pa.StructArray.from_arrays(arrays, fields=fields)


def _keys(random: np.random.Generator, count: int) -> pa.Array:
    """24 hexadecimal digits each, in random order."""
    text = random.bytes(count * 12).hex().encode()
    ends = np.arange(0, len(text) + 1, 24, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
