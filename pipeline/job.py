"""From the user's settings to a plan, and from a plan to the rows of one shard: what every engine hands to workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from manifests import layout
from manifests.errors import UsageError
from manifests.plan import Plan
from manifests.schema import PairRow
from manifests.storage import Storage
from pipeline.plan import hash_order, shard_slice

if TYPE_CHECKING:
    from pipeline.generators.base import GeneratorConfig
    from pipeline.sources.base import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to make: its number and its rows of the source's index, in the order of the shard.

    `kept` maps keys to rows of the committed shard whose images are taken over unchanged, for repairs.
    """

    number: int
    rows: pa.Table
    kept: Mapping[str, PairRow] = field(default_factory=dict)
    replace: bool = False  # the shard may be committed already and is to be written again


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a worker needs beside its tasks and its device; small and picklable."""

    out: str
    plan: Plan
    source: Source | None  # None: images from noise alone
    generator: GeneratorConfig
    generator_name: str
    batch_size: int | None = None  # None: automatic
    readers: int = 4
    encoders: int = 4


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of a plan by shard number; holds the index, so only the process that hands out work needs one."""

    plan: Plan
    index: pa.Table
    order: NDArray[np.int64]

    @classmethod
    def of(cls, plan: Plan, index: pa.Table) -> Tasks:
        """Cut the source's index as the plan says."""
        return cls(plan, index, hash_order(index.column("key").to_pylist(), plan.seed, plan.rows))

    def task(self, shard: int, kept: Mapping[str, PairRow] | None = None, *, replace: bool = False) -> ShardTask:
        """The task of one shard."""
        rows = self.index.take(self.order[shard_slice(self.plan, shard)])
        return ShardTask(number=shard, rows=rows.combine_chunks(), kept=kept or {}, replace=replace)


def make_plan(
    *,
    index: pa.Table,
    source: Mapping[str, Any],
    generator: Mapping[str, Any] | None,
    seed: int,
    variations: int,
    shards: int,
    limit: int | None,
    store_real: str | None,
    quality: int,
    max_pixels: int,
) -> Plan:
    """The plan for an index; more shards than images are clamped."""
    rows = min(index.num_rows, limit) if limit is not None else index.num_rows
    if rows < 1:
        raise UsageError(f"{source['location']}: no images to make pairs of")
    labels = index.column("label")
    return Plan(
        source=source,
        generator=generator,
        seed=seed,
        variations=variations,
        shards=min(shards, rows),
        rows=rows,
        limit=limit,
        labelled=labels.null_count == 0,
        store_real=store_real,
        quality=quality,
        max_pixels=max_pixels,
    )


def check_folder(storage: Storage, *, overwrite: bool) -> None:
    """Refuse a folder that holds other things than a pair set; with `overwrite` delete the pair set that it holds."""
    names = set(storage.names())
    if layout.PLAN in names:
        if overwrite:
            clear_folder(storage)
        return
    foreign = sorted(name for name in names if layout.parse_temporary(name) is None)
    if foreign:
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise UsageError(
            f"{storage.url} is not empty and holds no {layout.PLAN} (found {shown}); "
            "choose an empty or new folder for --out"
        )


def clear_folder(storage: Storage) -> None:
    """Delete a pair set's files and nothing else; plan.json last, so that a crash never leaves parts without a plan.

    The manifest goes first: it would name images that are gone. Raises `UsageError` while a process of this machine
    writes the set: it would go on, and mix its shards with those to come.
    """
    names = storage.names()
    writers = {found.pid for found in map(layout.parse_temporary, names) if found and found.is_of_live_sibling()}
    if writers:
        raise UsageError(
            f"another run is writing {storage.url} (process {', '.join(map(str, sorted(writers)))}); "
            "stop it before --overwrite"
        )
    parts = [name for name in names if layout.shard_of(name, "parquet") is not None]
    tars = [name for name in names if layout.shard_of(name, "tar") is not None]
    temporaries = [name for name in names if layout.parse_temporary(name) is not None]
    for name in [layout.MANIFEST, *parts, *tars, *temporaries, layout.CARD, layout.PLAN]:
        if name in names:
            storage.remove(name)
