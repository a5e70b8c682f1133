"""The devices of one machine: one process per GPU, one on the CPU; shards are handed out as workers ask for them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from manifests import layout
from manifests.errors import DiffmixError
from manifests.storage import open_storage
from pipeline.engines.base import Report, Work, make_worker
from pipeline.events import Committed, Event, Note
from pipeline.generators.base import Generator
from pipeline.generators.load import load_generator
from pipeline.job import Job, ShardTask
from pipeline.signals import RESUMABLE, Stopped, stoppable

_ATTEMPTS = 3  # deaths of workers over one shard, or before their first one, until we give up
_GRACE_SECONDS = 30.0


class LocalEngine:
    """Runs the only worker in this process, or several in processes of their own.

    Args:
        workers: number of workers; None: one per GPU, one on the CPU.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._devices = devices(workers)
        self.device = self._devices[0] if len(self._devices) == 1 else torch.device("cpu")

    def run(self, job: Job, work: Work, report: Report, generator: Generator) -> None:
        if len(self._devices) == 1:
            make_worker(job, generator, report).run(work.task(shard) for shard in work.open_shards())
        else:
            _Crew(job, work, report, self._devices).run()


def devices(workers: int | None) -> list[torch.device]:
    """One device per worker: the GPUs in turn, or the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = workers or max(1, gpus)
    if gpus == 0:
        return [torch.device("cpu")] * count
    return [torch.device("cuda", number % gpus) for number in range(count)]


@dataclass(slots=True)
class _Member:
    """One worker process as its parent sees it."""

    device: torch.device
    process: BaseProcess
    connection: Connection
    shards: set[int] = field(default_factory=set)  # handed out, not known to be committed
    asking: bool = False


class _Crew:
    """Several worker processes; one that dies is replaced, and its shards are handed out again."""

    def __init__(self, job: Job, work: Work, report: Report, devices: list[torch.device]) -> None:
        self._job, self._work, self._report, self._devices = job, work, report, devices
        self._open: deque[int] = deque()
        self._deaths: Counter[int | None] = Counter()  # by shard; None: while it held none, as when it starts
        self._members: list[_Member] = []

    def run(self) -> None:
        # What another live process is writing comes last: it may be done by then.
        busy = self._work.storage.being_written()
        self._open.extend(sorted(self._work.shards, key=lambda shard: layout.tar_name(shard) in busy))
        try:
            self._members = [self._hire(device) for device in self._devices[: len(self._open)]]
            while self._members:
                self._answer_all()
                self._listen()
        finally:
            self._dismiss()

    def _hire(self, device: torch.device) -> _Member:
        # One server imports everything once and forks the workers; it never touches a GPU, so CUDA is safe in them.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "pipeline.generators.sd_variations"])
        ours, theirs = context.Pipe()
        process = context.Process(target=_member_main, args=(theirs, self._job, str(device)), daemon=True)
        process.start()
        theirs.close()
        return _Member(device, process, ours)

    def _answer_all(self) -> None:
        for member in self._members:
            if member.asking and (shard := self._next_open()) is not None:
                self._hand(member, shard)
        everything_settled = not self._open and not any(member.shards for member in self._members)
        for member in self._members:
            # A worker with nothing of its own left is kept while others work: it takes over if one of them dies.
            if member.asking and (everything_settled or (not self._open and member.shards)):
                _send(member.connection, None)
                member.asking = False

    def _hand(self, member: _Member, shard: int) -> None:
        member.asking = False
        member.shards.add(shard)
        _send(member.connection, self._work.task(shard))

    def _next_open(self) -> int | None:
        while self._open:
            shard = self._open.popleft()
            if self._work.is_open(shard):
                return shard
        return None

    def _listen(self) -> None:
        sources: dict[Any, _Member] = {member.connection: member for member in self._members}
        for ready in wait(list(sources), timeout=1.0):
            member = sources[ready]
            try:
                message = member.connection.recv()
            except (EOFError, OSError):  # the second if it died amid a message
                self._replace(member)
            else:
                self._handle(member, message)

    def _handle(self, member: _Member, message: Any) -> None:
        match message:
            case "next":
                member.asking = True
            case DiffmixError():
                raise message
            case _:
                if isinstance(message, Committed):
                    member.shards.discard(message.shard)
                self._report(message)

    def _replace(self, member: _Member) -> None:
        member.process.join()
        self._members.remove(member)
        lost = sorted(shard for shard in member.shards if self._work.is_open(shard))
        if member.process.exitcode == 0 and not lost:
            return
        if member.process.exitcode == RESUMABLE:
            raise Stopped(signal.SIGTERM)
        blamed: list[int | None] = [*lost] or [None]
        for shard in blamed:
            self._deaths[shard] += 1
            if self._deaths[shard] >= _ATTEMPTS:
                raise DiffmixError(
                    f"workers died {_ATTEMPTS} times {'as they started' if shard is None else f'over shard {shard}'} "
                    f"(last exit code {member.process.exitcode}; -9 usually means that memory ran out: try a smaller "
                    "--batch-size or fewer --workers)"
                )
        self._work.storage.sweep()
        self._open.extendleft(reversed(lost))
        if self._open:
            self._report(Note(text=f"a worker died (exit code {member.process.exitcode}); starting another"))
            self._members.append(self._hire(member.device))

    def _dismiss(self) -> None:
        for member in self._members:
            member.process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for member in self._members:
            member.process.join(max(0.1, deadline - time.monotonic()))
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
        self._work.storage.sweep()


def _send(connection: Connection, message: Any) -> None:
    # If the other side died, the end of its pipe says so where we listen.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(message)


def _member_main(connection: Connection, job: Job, device: str) -> None:
    """A worker process: asks for tasks, sends events, ends when it is told that there is nothing left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with stoppable():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _serve(connection, job, device)
    except DiffmixError as error:
        _send(connection, error)
    except Stopped:
        open_storage(job.out).sweep("own")
        os._exit(RESUMABLE)


def _serve(connection: Connection, job: Job, device: str) -> None:
    def report(event: Event) -> None:
        _send(connection, event)

    generator = load_generator(job.generator, torch.device(device), job.generator_name)
    make_worker(job, generator, report).run(_received(connection))


def _received(connection: Connection) -> Iterator[ShardTask]:
    while True:
        _send(connection, "next")
        task = connection.recv()
        if task is None:
            return
        yield task


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by multiprocessing"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
