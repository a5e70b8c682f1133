"""Several processes commit one shard, and die at every step: the shard is whole or uncommitted, never mixed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests import layout
from manifests.catalog import committed_shards, is_manifest_current, merge
from manifests.plan import Plan
from manifests.storage import LocalStorage, PendingFile, open_storage
from manifests.verify import verify
from tests.manifests.builders import FACTS, make_plan, open_writer, write_set, write_shard

ONE_SHARD = make_plan(shards=1, rows=2)
FORK = multiprocessing.get_context("fork")


def is_whole(storage: LocalStorage, plan: Plan = ONE_SHARD) -> bool:
    """True: committed and sound; False: uncommitted; anything else fails."""
    if not committed_shards(storage, plan):
        return False
    problems = [problem for problem in verify(storage, plan).problems if problem.shard is not None]
    assert not problems, problems
    return True


class Turns:
    """Lets threads take single steps in a given order."""

    def __init__(self, number: int) -> None:
        self.go = [threading.Semaphore(0) for _ in range(number)]
        self.stopped = [threading.Semaphore(0) for _ in range(number)]
        self.done = [False] * number

    def wait(self, who: int) -> None:
        self.stopped[who].release()
        self.go[who].acquire()

    def run(self, order: tuple[int, ...], works: list[Callable[[], None]]) -> None:
        threads = [threading.Thread(target=self._work, args=(who, work)) for who, work in enumerate(works)]
        for who, thread in enumerate(threads):
            thread.start()
            self.stopped[who].acquire()
        for who in itertools.chain(order, *([who] * 50 for who in range(len(works)))):
            if not self.done[who]:
                self.go[who].release()
                self.stopped[who].acquire()
        for thread in threads:
            thread.join()

    def _work(self, who: int, work: Callable[[], None]) -> None:
        self.wait(who)
        try:
            work()
        finally:
            self.done[who] = True
            self.stopped[who].release()


class SteppedStorage(LocalStorage):
    """A local folder whose every visible operation is a step of its own."""

    def __init__(self, path: str, step: Callable[[], None]) -> None:
        super().__init__(path)
        self._step = step

    def exists(self, name: str) -> bool:
        self._step()
        return super().exists(name)

    def read(self, name: str) -> bytes:
        self._step()
        return super().read(name)

    def remove(self, name: str) -> None:
        self._step()
        super().remove(name)

    def begin(self, name: str) -> PendingFile:
        pending = super().begin(name)
        commit, is_current = pending.commit, pending.is_current
        pending.commit = lambda: (self._step(), commit())[1]  # type: ignore[method-assign]
        pending.is_current = lambda: (self._step(), is_current())[1]  # type: ignore[method-assign]
        return pending


@pytest.mark.parametrize("replace", [(False, False), (True, False), (True, True)])
def test_no_interleaving_of_two_commits_mixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: tuple[bool, bool]
):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    draw = random.Random(0)
    orders = [tuple(draw.choices((0, 1), k=14)) for _ in range(80)]
    outcomes = set()
    for number, order in enumerate(orders):
        storage = LocalStorage(str(tmp_path / f"{number}"))
        storage.create_folder()
        if any(replace):
            write_shard(storage, ONE_SHARD, 0, salt="old")
        turns = Turns(2)
        kept = [False, False]

        def commit(who: int, url: str = storage.url, turns: Turns = turns, kept: list[bool] = kept) -> None:
            stepped = SteppedStorage(url, lambda: turns.wait(who))
            kept[who] = open_writer(stepped, ONE_SHARD, 0, salt=who).commit(replace=replace[who], **FACTS)

        turns.run(order, [lambda: commit(0), lambda: commit(1)])
        whole = is_whole(storage)
        assert not any(name.startswith(".") for name in storage.names())
        assert whole or any(replace) or not all(kept)
        outcomes.add((whole, *kept))
    assert len(outcomes) > 1, "the orders do not matter: the steps are not steps"


def _race(url: str, start: Any, salt: int, rounds: int) -> None:
    for number in range(rounds):
        writer = open_writer(open_storage(f"{url}/{number}"), ONE_SHARD, 0, salt=salt)
        start.wait()
        writer.commit(**FACTS)


@pytest.mark.parametrize("same_bytes", [False, True])
def test_real_processes_race(tmp_path: Path, same_bytes: bool):
    rounds, racers = 15, 3
    folders = [LocalStorage(str(tmp_path / str(number))) for number in range(rounds)]
    for storage in folders:
        storage.create_folder()
    start = FORK.Barrier(racers)
    salts = [0] * racers if same_bytes else range(racers)
    processes = [FORK.Process(target=_race, args=(str(tmp_path), start, salt, rounds)) for salt in salts]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    whole = [is_whole(storage) for storage in folders]
    assert any(whole) and (all(whole) or not same_bytes)
    assert not any(name.startswith(".") for storage in folders for name in storage.names())


STEPS = ("begin", "write", "sync", "tar", "tar renamed", "part", "part renamed")


def _die(url: str, step: str, replace: bool) -> None:
    storage = open_storage(url)
    writer = open_writer(storage, ONE_SHARD, 0, salt="new")
    begin, tar_commit = storage.begin, writer._tar.pending.commit

    def reach(here: str) -> None:
        if here == step:
            os.kill(os.getpid(), 9)

    def begin_part(name: str) -> PendingFile:
        reach("begin")
        pending = begin(name)
        for method, before, after in (("write", "write", ""), ("sync", "sync", ""), ("commit", "part", "part renamed")):
            call = getattr(pending, method)
            setattr(pending, method, lambda *a, c=call, b=before, e=after: (reach(b), c(*a), reach(e))[1])
        return pending

    storage.begin = begin_part  # type: ignore[method-assign]
    writer._tar.pending.commit = lambda: (reach("tar"), tar_commit(), reach("tar renamed"))  # type: ignore[method-assign]
    writer.commit(replace=replace, **FACTS)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_leaves_whole_or_uncommitted(tmp_path: Path, step: str, replace: bool):
    storage, _ = write_set(str(tmp_path / "set"), ONE_SHARD)
    old = storage.read(layout.tar_name(0))
    if not replace:
        for name in (layout.MANIFEST, layout.part_name(0), layout.tar_name(0)):
            storage.remove(name)
    child = FORK.Process(target=_die, args=(storage.url, step, replace))
    child.start()
    child.join(60)
    assert child.exitcode == -9
    index = STEPS.index(step)
    assert is_whole(storage) == (step == "part renamed" or (replace and index < STEPS.index("tar")))
    if index < STEPS.index("tar renamed"):
        assert not replace or storage.read(layout.tar_name(0)) == old
    reported = [problem.file for problem in verify(storage, ONE_SHARD).problems if "died" in problem.reason]
    storage.sweep()
    left = [name for name in storage.names() if name.startswith(".")]
    assert left == [] and bool(reported) == (step != "part renamed")
    assert write_shard(storage, ONE_SHARD, 0, replace=replace)
    merge(storage, ONE_SHARD)
    assert not verify(storage, ONE_SHARD).problems


def _finish(url: str, start: Any, plan: Plan) -> None:
    storage = open_storage(url)
    for _ in range(10):
        start.wait()
        merge(storage, plan)
        storage.write(layout.CARD, b"card")
        storage.sweep("all")


def test_many_processes_finish_one_set_at_once(tmp_path: Path):
    storage, plan = write_set(str(tmp_path / "set"))
    start = FORK.Barrier(4)
    processes = [FORK.Process(target=_finish, args=(storage.url, start, plan)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert is_manifest_current(storage, plan) and not verify(storage, plan).problems
