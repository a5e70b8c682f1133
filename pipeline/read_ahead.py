"""Rows of shards, in order, read ahead by threads across the border from one shard to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from pipeline.job import ShardTask

T = TypeVar("T")


class RowStream(Generic[T]):
    """The rows of one shard, in order; iterate it once."""

    def __init__(self, task: ShardTask, pool: ThreadPoolExecutor, read: Callable[[ShardTask, int], T]) -> None:
        self.task = task
        self._pool, self._read = pool, read
        self._positions = iter(range(task.rows.num_rows))
        self._reading: deque[Future[T]] = deque()

    def prefetch(self, window: int) -> int:
        """Have up to `window` rows read or being read; returns how many are."""
        while len(self._reading) < window:
            position = next(self._positions, None)
            if position is None:
                break
            self._reading.append(self._pool.submit(self._read, self.task, position))
        return len(self._reading)

    def __iter__(self) -> Iterator[T]:
        while self.prefetch(1):
            yield self._reading.popleft().result()


class ReadAhead(Generic[T]):
    """The streams of all tasks, one after the other; `fill` reads on into the next task when this one runs out."""

    def __init__(
        self, tasks: Iterable[ShardTask], pool: ThreadPoolExecutor, read: Callable[[ShardTask, int], T], window: int
    ) -> None:
        self._tasks, self._pool, self._read = iter(tasks), pool, read
        self.window = window
        self._current: RowStream[T] | None = None
        self._next: RowStream[T] | None = None

    def __iter__(self) -> Iterator[RowStream[T]]:
        while True:
            self._current = self._next or self._open(next(self._tasks, None))
            self._next = None
            if self._current is None:
                return
            yield self._current

    def again(self, stream: RowStream[T]) -> RowStream[T]:
        """The same shard from its start."""
        self._current = RowStream(stream.task, self._pool, self._read)
        return self._current

    def fill(self) -> None:
        """Keep a window of rows being read."""
        reading = self._current.prefetch(self.window) if self._current else 0
        if reading < self.window:
            if self._next is None:
                self._next = self._open(next(self._tasks, None))
            if self._next is not None:
                self._next.prefetch(self.window - reading)

    def _open(self, task: ShardTask | None) -> RowStream[T] | None:
        return None if task is None else RowStream(task, self._pool, self._read)
