"""Threads that work ahead: they never keep the process alive, and they end with `close` or with their owner."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue

_PATIENCE = 10.0  # seconds; a thread that hangs in a read from a dead disk is left behind


def default_workers(*, alone: bool) -> int:
    """Threads of this process: its share of the cores it may use, or 2 where torch trains on the same cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return share if alone else min(2, share)


class Task:
    """Parts that several threads do."""

    def __init__(self, parts: Sequence[Callable[[], None]]) -> None:
        self._parts = parts
        self._left = len(parts)
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None
        if not parts:
            self._done.set()

    def wait(self) -> None:
        """Until all parts are done; raises what one of them raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def run(self, part: int) -> None:
        """Do one part; after an error the others are skipped."""
        try:
            if self._error is None:
                self._parts[part]()
        except BaseException as error:  # whatever it is, it belongs to the one who waits
            self._error = error
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._parts = ()  # lets go of the arrays that they hold
                self._done.set()

    def cancel(self) -> None:
        """Skip what has not begun."""
        self._error = self._error or RuntimeError("the loader was closed")


Jobs = SimpleQueue[tuple[Task, int] | None]


class Crew:
    """`workers` threads that do tasks in the order given."""

    def __init__(self, workers: int) -> None:
        self._jobs: Jobs = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"diffmix-loader-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        self._stop = weakref.finalize(self, _stop, self._jobs, self._threads)  # also at the interpreter's exit

    def do(self, parts: Sequence[Callable[[], None]]) -> Task:
        """Start the parts; the task tells when they are done. Raises RuntimeError once closed."""
        if not self._stop.alive:
            raise RuntimeError("the loader was closed")
        task = Task(parts)
        for part in range(len(parts)):
            self._jobs.put((task, part))
        return task

    def close(self) -> None:
        """End the threads: what they are doing is finished, what waits is dropped. Harmless to repeat."""
        self._stop()


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        task, part = job
        task.run(part)
        del job, task


def _stop(jobs: Jobs, threads: Sequence[threading.Thread]) -> None:
    while not jobs.empty():
        job = jobs.get()
        if job is not None:
            job[0].cancel()
            job[0].run(job[1])
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_PATIENCE)
