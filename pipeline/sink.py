"""The end of the line: one thread that writes finished rows in order into the shard's tar and commits it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from manifests.schema import OK
from manifests.shard import EncodedVariation, Sample, ShardWriter
from manifests.storage import Storage
from pipeline.events import Committed, Event, Failed
from pipeline.job import ShardTask


@dataclass(frozen=True, slots=True)
class _Begin:
    task: ShardTask


@dataclass(frozen=True, slots=True)
class _Add:
    sample: Sample
    variations: Sequence[Future[EncodedVariation]]


@dataclass(frozen=True, slots=True)
class _Commit:
    facts: dict[str, Any]


class _Abort: ...


class _Stop: ...


_Message = _Begin | _Add | _Commit | _Abort | _Stop


class ShardSink:
    """Takes rows in order and never reorders them; a bounded queue keeps a slow disk from filling the memory.

    Used as a context manager: leaving it normally waits for the last commit, leaving it by an exception drops the
    shard in progress. Errors of the writer (a full disk) are raised from the next call.
    """

    def __init__(self, storage: Storage, *, generator: str | None, labelled: bool, capacity: int) -> None:
        self._storage, self._generator, self._labelled = storage, generator, labelled
        self._messages: queue.Queue[_Message] = queue.Queue(capacity)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._dropping = threading.Event()
        self._writer: ShardWriter | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def begin(self, task: ShardTask) -> None:
        """Start a shard."""
        self._put(_Begin(task))

    def add(self, sample: Sample, variations: Sequence[Future[EncodedVariation]] = ()) -> None:
        """Write a row once its images are encoded."""
        self._put(_Add(sample, variations))

    def commit(self, **facts: Any) -> None:
        """End the shard; `facts` are `manifests.schema.ShardFacts` fields."""
        self._put(_Commit(facts))

    def abort(self) -> None:
        """Forget the shard in progress."""
        self._put(_Abort())

    def events(self) -> list[Event]:
        """What happened since the last call."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    def __enter__(self) -> ShardSink:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._dropping.set()
        try:
            self._end()
        except BaseException:  # a signal while the last shard was waited for
            self._dropping.set()
            self._end()
            raise
        if error is None and self._error is not None:
            raise self._error

    def _end(self) -> None:
        self._messages.put(_Stop())
        self._thread.join()

    def _put(self, message: _Message) -> None:
        if self._error is not None:
            raise self._error
        self._messages.put(message)

    def _work(self) -> None:
        # After an error the queue is still emptied, so that nobody waits for a place in it.
        while not isinstance(message := self._messages.get(), _Stop):
            if self._error is not None or self._dropping.is_set():
                continue
            try:
                self._handle(message)
            except BaseException as error:
                self._error = error
                self._drop()
        self._drop()

    def _handle(self, message: _Message) -> None:
        match message:
            case _Begin(task):
                self._task = task
                self._writer = ShardWriter(
                    self._storage, task.number, generator=self._generator, labelled=self._labelled
                )
            case _Add(sample, variations):
                self._add(sample, variations)
            case _Commit(facts):
                self._commit(facts)
            case _Abort():
                self._drop()

    def _add(self, sample: Sample, variations: Sequence[Future[EncodedVariation]]) -> None:
        assert self._writer is not None, "rows come between begin and commit"
        if variations:
            sample = replace(sample, synthetic=[future.result() for future in variations])
        row = self._writer.add(sample)
        if row.status != OK:
            self._events.put(Failed(shard=row.shard, key=row.key, source=row.source or row.key, reason=row.error or ""))

    def _commit(self, facts: dict[str, Any]) -> None:
        assert self._writer is not None, "a shard begins before it is committed"
        ok = sum(row.status == OK for row in self._writer.rows)
        committed = self._writer.commit(replace=self._task.replace, **facts)
        if committed:
            shard = self._task.number
            self._events.put(Committed(shard=shard, rows_ok=ok, rows_failed=len(self._writer.rows) - ok))
        self._writer = None

    def _drop(self) -> None:
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
