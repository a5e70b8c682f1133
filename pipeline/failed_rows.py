"""The failed rows of a set: how many for which reason, and which files they are."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from manifests.catalog import read_part
from manifests.errors import CorruptSetError, StorageError
from manifests.schema import FAILED
from manifests.storage import Storage

_SHOWN = 10


@dataclass(slots=True)
class FailedRows:
    """Counts of all failed rows by reason, and the first of them by name."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, str]] = field(default_factory=list)  # source (or key) and reason

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, rows: pa.Table) -> None:
        """Take the failed ones of a part's rows."""
        failed = rows.filter(pc.equal(rows["status"], FAILED))
        errors = [error or "unknown" for error in failed["error"].to_pylist()]
        self.counts.update(errors)
        names = pc.coalesce(failed["source"], failed["key"]).to_pylist()
        self.first += list(zip(names, errors, strict=True))[: _SHOWN - len(self.first)]

    def by_reason(self) -> dict[str, int]:
        """Most frequent first."""
        return dict(self.counts.most_common())

    def examples(self) -> list[dict[str, str]]:
        """The first few, for `--json`."""
        return [{"source": name, "error": reason} for name, reason in self.first]

    def lines(self) -> list[str]:
        """For people: counts by reason, then the first few by name."""
        return failed_lines(self.by_reason(), self.examples())


def failed_lines(by_reason: dict[str, int], examples: list[dict[str, str]]) -> list[str]:
    """The lines of `FailedRows.lines`, from its plain values."""
    lines = [f"failed: {count:,} x {reason}" for reason, count in by_reason.items()]
    lines += [f"  {entry['source']}: {entry['error']}" for entry in examples]
    if len(examples) < sum(by_reason.values()):
        lines.append("  … all of them: rows with status 'failed' in manifest.parquet, columns source and error")
    return lines


def failed_rows(storage: Storage, shards: Iterable[int]) -> FailedRows:
    """The failed rows of committed shards; damaged parts count as nothing, `verify` names them."""
    found = FailedRows()
    for shard in sorted(shards):
        with contextlib.suppress(CorruptSetError, StorageError):
            found.add(read_part(storage, shard))
    return found
