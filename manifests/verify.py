"""Compare a pair set with what it should hold, byte for byte. Reads only; `pipeline repair` mends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa

from manifests import layout
from manifests.catalog import is_manifest_current, read_part
from manifests.errors import CorruptSetError, SchemaVersionError, StorageError
from manifests.plan import Plan
from manifests.schema import FAILED, PairRow, RealImage, ShardFacts, facts_of, table_to_rows
from manifests.storage import Storage, explained

_CHUNK = 1 << 22


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
    seen: set[bytes] = set()  # hashes of the keys seen
    for shard in range(plan.shards):
        rows = _verify_shard(storage, plan, shard, names, report)
        report.problems += _duplicates(shard, rows, seen)
    report.problems += _strays(plan, names)
    report.problems += _stale_manifest(storage, plan, names, report)
    return report


def _verify_shard(storage: Storage, plan: Plan, shard: int, names: set[str], report: Report) -> list[PairRow]:
    part, tar = layout.part_name(shard), layout.tar_name(shard)
    if part not in names:
        reason = "not committed: its part is missing" if tar in names else "missing: not generated yet, or lost"
        report.problems.append(Problem(file=part, reason=reason, shard=shard))
        return []
    try:
        table = read_part(storage, shard)
        facts = facts_of(table.schema, part)
        rows = table_to_rows(table)
    except SchemaVersionError:
        raise
    except (CorruptSetError, StorageError, pa.ArrowException, ValueError, TypeError) as error:
        report.problems.append(Problem(file=part, reason=f"unreadable part: {error}", shard=shard))
        return []
    wrong = _wrong_rows(plan, shard, rows, facts)
    if wrong:
        report.problems.append(Problem(file=part, reason=wrong, shard=shard))
        return []
    _count(report, shard, rows)
    problem = (
        _verify_tar(storage, shard, facts, rows) if tar in names else Problem(file=tar, reason="missing", shard=shard)
    )
    if problem:
        report.problems.append(problem)
    return rows


def _duplicates(shard: int, rows: list[PairRow], seen: set[bytes]) -> list[Problem]:
    twice = []
    for row in rows:
        digest = hashlib.blake2b(row.key.encode(), digest_size=8).digest()
        if digest in seen:
            twice.append(row.key)
        seen.add(digest)
    if not twice:
        return []
    reason = f"{len(twice)} keys are in the set twice; generate it again into a new folder"
    return [Problem(file=layout.part_name(shard), reason=reason, keys=tuple(twice))]


def _wrong_rows(plan: Plan, shard: int, rows: list[PairRow], facts: ShardFacts) -> str | None:
    if facts.shard != shard or any(row.shard != shard for row in rows):
        return f"holds the rows of shard {facts.shard}"
    if len(rows) != plan.shard_rows(shard):
        return f"has {len(rows)} rows; the plan gives this shard {plan.shard_rows(shard)}"
    if any(row.generator != plan.generator_id for row in rows):
        return "was made by another generator than plan.json names"
    return None


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
            if size == facts.tar_size and _sha256(file) == facts.tar_sha256:
                return None
            hurt = tuple(row.key for row in rows if not is_intact(file, row))
    except StorageError as error:
        return Problem(file=name, reason=str(error), shard=shard)
    length = "" if size == facts.tar_size else f" ({size:,} bytes, not {facts.tar_size:,})"
    where = f"{len(hurt)} rows hurt" if hurt else "only headers, facts or padding are hurt, no image"
    return Problem(file=name, reason=f"differs from its SHA-256{length}: {where}", shard=shard, keys=hurt)


def is_intact(file: IO[bytes], row: PairRow) -> bool:
    """Whether every image of the row lies in the open tar as its SHA-256 says; True for failed rows, which have none."""
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


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _strays(plan: Plan, names: set[str]) -> Iterator[Problem]:
    for name in sorted(names):
        for suffix in ("tar", "parquet"):
            shard = layout.shard_of(name, suffix)
            if shard is not None and shard >= plan.shards:
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
