"""Members a second into a tar in memory, against webdataset's `TarWriter`; not hashed, since that does not hash."""

from __future__ import annotations

import importlib.util
import io
from typing import Any, cast

from manifests.shard import _TarFile
from manifests.storage import PendingFile, Storage
from pipeline.bench.figures import Figure, Goal, Say, Settings, in_turns

_SIZES = {"68 kB": 68_000, "1 kB": 1_000}  # a photograph's JPEG and a CIFAR image's
_BYTES, _MEMBERS = 64 << 20, 10_000  # per round at most

FASTER = Goal(bound=1.4)


def measure(settings: Settings, say: Say) -> list[Figure]:
    """One figure per member size."""
    if importlib.util.find_spec("webdataset") is None:
        say("skipped: tar, since webdataset is not installed (pip install 'diffmix[bench]')")
        return []
    return [_measure(label, size, settings, say) for label, size in _SIZES.items()]


def _measure(label: str, size: int, settings: Settings, say: Say) -> Figure:
    members = min(_MEMBERS, _BYTES // size) // (10 if settings.quick else 1)
    names, data = [f"{number:09d}" for number in range(members)], bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    tasks = {"ours": lambda: write_ours(names, data), "webdataset": lambda: write_webdataset(names, data)}
    for task in tasks.values():
        task()
    times = in_turns(settings.round_count(9), cast(Any, tasks), say)
    ratio, spread = times["ours"].speedup(times["webdataset"])
    return Figure(
        name=f"tar of {label} members, in memory, not hashed",
        ours=members / times["ours"].median,
        unit="members/s",
        baseline=members / times["webdataset"].median,
        baseline_name="webdataset TarWriter",
        ratio=ratio,
        spread=spread,
        goal=FASTER,
    )


def write_ours(names: list[str], data: bytes) -> bytes:
    """A tar as the shard writer makes it."""
    pending = _MemoryFile()
    tar = _TarFile(cast(Storage, _MemoryStorage(pending)), "bench.tar")
    tar._digest = cast(Any, _NoHash())
    for name in names:
        tar.add(f"{name}.jpg", data)
    tar.finish()
    return pending.file.getvalue()


def write_webdataset(names: list[str], data: bytes) -> bytes:
    """The same members through webdataset."""
    from webdataset import TarWriter

    buffer = io.BytesIO()
    with TarWriter(buffer) as writer:
        for name in names:
            writer.write({"__key__": name, "jpg": data})
    return buffer.getvalue()


class _NoHash:
    def update(self, data: bytes) -> None: ...


class _MemoryFile(PendingFile):
    """A pending file that is never committed."""

    def __init__(self) -> None:
        self.file: io.BytesIO = io.BytesIO()
        self.where = "memory"

    def sync(self) -> None: ...

    def commit(self) -> None: ...

    def discard(self) -> None: ...

    def is_current(self) -> bool:
        return True


class _MemoryStorage:
    def __init__(self, pending: PendingFile) -> None:
        self._pending = pending

    def begin(self, name: str) -> PendingFile:
        return self._pending
