"""Compare a pair set with what it should hold, byte for byte. Reads only; `pipeline repair` mends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray

from manifests import checksum, layout
from manifests.catalog import is_manifest_current, key_hashes, read_part
from manifests.errors import CorruptSetError, StorageError
from manifests.plan import Plan
from manifests.schema import FAILED, OK, PairRow, RealImage, ShardFacts, facts_of, table_to_rows
from manifests.storage import Storage, explained


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One file that is not as it should be, and the keys of the rows that are hurt, where that can be told."""

    file: str
    reason: str
    shard: int | None = None  # set: regenerating this shard mends it
    keys: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    """What `verify` found. A set is sound when there is no problem; recorded `failed` rows are no problem."""

    shards: int = 0
    rows_ok: int = 0
    rows_failed: dict[str, int] = field(default_factory=dict)  # by reason
    shards_with_failed_rows: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def bad_shards(self) -> list[int]:
        """Shards to regenerate."""
        return sorted({problem.shard for problem in self.problems if problem.shard is not None})


def verify(storage: Storage, plan: Plan) -> Report:
    """Check every file of the set against its checksums: any flipped, missing or added byte is found."""
    report = Report(shards=plan.shards)
    names = set(storage.names())
    hashes: dict[int, NDArray[np.uint64]] = {}
    for shard in range(plan.shards):
        hashes[shard] = _verify_shard(storage, plan, shard, names, report)
    report.problems += _duplicates(storage, hashes)
    report.problems += _strays(plan, names)
    report.problems += _stale_manifest(storage, plan, names, report)
    return report


def _verify_shard(storage: Storage, plan: Plan, shard: int, names: set[str], report: Report) -> NDArray[np.uint64]:
    """Check one shard; returns its keys' hashes, none if the part cannot be read."""
    nothing = np.empty(0, np.uint64)
    part, tar = layout.part_name(shard), layout.tar_name(shard)
    if part not in names:
        reason = "not committed: its part is missing" if tar in names else "missing: not generated yet, or lost"
        report.problems.append(Problem(file=part, reason=reason, shard=shard))
        return nothing
    try:
        table = read_part(storage, shard)
        facts = facts_of(table.schema, part)
        rows = table_to_rows(table)
    except (CorruptSetError, StorageError, ValueError, TypeError) as error:
        report.problems.append(Problem(file=part, reason=f"unreadable part: {error}", shard=shard))
        return nothing
    wrong = _wrong_rows(plan, shard, rows, facts)
    if wrong:
        report.problems.append(Problem(file=part, reason=wrong, shard=shard))
        return nothing
    _count(report, shard, rows)
    problem = (
        _verify_tar(storage, shard, facts, rows) if tar in names else Problem(file=tar, reason="missing", shard=shard)
    )
    if problem:
        report.problems.append(problem)
    return key_hashes(table["key"])


def _duplicates(storage: Storage, hashes: Mapping[int, NDArray[np.uint64]]) -> Iterator[Problem]:
    values, counts = np.unique(np.concatenate(list(hashes.values())), return_counts=True)
    twice = values[counts > 1]
    for shard, own in hashes.items():
        positions = np.flatnonzero(np.isin(own, twice))
        if len(positions):
            keys = read_part(storage, shard)["key"].take(positions).to_pylist()
            reason = f"{len(keys)} keys are in the set more than once; generate it again into a new folder"
            yield Problem(file=layout.part_name(shard), reason=reason, keys=tuple(keys))


def _wrong_rows(plan: Plan, shard: int, rows: list[PairRow], facts: ShardFacts) -> str | None:
    if facts.shard != shard or any(row.shard != shard for row in rows):
        return f"holds the rows of shard {facts.shard}"
    if len(rows) != plan.shard_rows(shard):
        return f"has {len(rows)} rows; the plan gives this shard {plan.shard_rows(shard)}"
    generator = plan.generator_id
    if any(row.generator != generator for row in rows):
        return "was made by another generator than plan.json names"
    incomplete = [row.key for row in rows if row.status == OK and not _is_complete(row, plan)]
    if incomplete:
        return f"calls {len(incomplete)} rows ok that lack images of the plan, {incomplete[0]} first"
    return None


def _is_complete(row: PairRow, plan: Plan) -> bool:
    return len(row.synthetic) == plan.variations and (row.real is None) == (plan.store_real is None)


def _count(report: Report, shard: int, rows: list[PairRow]) -> None:
    failed = [row.error or "unknown" for row in rows if row.status == FAILED]
    report.rows_ok += len(rows) - len(failed)
    for reason in failed:
        report.rows_failed[reason] = report.rows_failed.get(reason, 0) + 1
    if failed:
        report.shards_with_failed_rows.append(shard)


def _verify_tar(storage: Storage, shard: int, facts: ShardFacts, rows: list[PairRow]) -> Problem | None:
    name = layout.tar_name(shard)
    try:
        size = storage.size(name)
        with storage.open(name) as file, explained("read", f"{storage.url}/{name}"):
            if size == facts.tar_size and checksum.sha256(file) == facts.tar_sha256:
                return None
            hurt = tuple(row.key for row in rows if not is_intact(file, row))
    except StorageError as error:
        return Problem(file=name, reason=str(error), shard=shard)
    length = "" if size == facts.tar_size else f" ({size:,} bytes, not {facts.tar_size:,})"
    where = f"{len(hurt)} rows hurt" if hurt else "only headers, facts or padding are hurt, no image"
    return Problem(file=name, reason=f"differs from its SHA-256{length}: {where}", shard=shard, keys=hurt)


def is_intact(file: IO[bytes], row: PairRow) -> bool:
    """Whether every image of the row lies in the open tar as its SHA-256 says; failed rows have none to hurt."""
    return all(_read_image(file, image) is not None for image in _images(row))


def intact_images(file: IO[bytes], row: PairRow) -> list[bytes] | None:
    """The bytes of the row's images, real first, if every one is as its SHA-256 says."""
    images = [_read_image(file, image) for image in _images(row)]
    return [image for image in images if image is not None] if None not in images else None


def _images(row: PairRow) -> Iterator[RealImage]:
    if row.real is not None:
        yield row.real
    yield from row.synthetic


def _read_image(file: IO[bytes], image: RealImage) -> bytes | None:
    file.seek(image.offset)
    data = file.read(image.size)
    return data if hashlib.sha256(data).digest() == image.sha256 else None


def _strays(plan: Plan, names: set[str]) -> Iterator[Problem]:
    planned = {name(shard) for shard in range(plan.shards) for name in (layout.tar_name, layout.part_name)}
    for name in sorted(names - planned):
        if layout.looks_like_shard(name):
            yield Problem(file=name, reason=f"stray: the plan has shards 0 to {plan.shards - 1}; delete the file")
        temporary = layout.parse_temporary(name)
        if temporary is not None and temporary.is_dead():
            yield Problem(file=name, reason="left by a process that died; `pipeline repair` removes it")


def _stale_manifest(storage: Storage, plan: Plan, names: set[str], report: Report) -> list[Problem]:
    missing = {layout.part_name(shard) for shard in range(plan.shards)} - names
    if missing:
        return []
    if layout.MANIFEST not in names:
        return [Problem(file=layout.MANIFEST, reason="missing: `pipeline repair` merges it from the parts")]
    if not is_manifest_current(storage, plan):
        return [
            Problem(file=layout.MANIFEST, reason="damaged or older than the parts: `pipeline repair` merges it again")
        ]
    return []
