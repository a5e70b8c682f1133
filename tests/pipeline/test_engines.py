"""Which rank this is, and which shards it makes."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import DiffmixError, UsageError
from manifests.storage import open_storage
from pipeline.engines import ENGINES
from pipeline.engines.base import Work
from pipeline.engines.local import _Crew
from pipeline.engines.ranks import Rank, RanksEngine


def array(number, count, first=0, step=1):
    return {
        "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_STEP": str(step),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a plain batch script is one process
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(3, 8, 1)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}, Rank(2, 4, 1)),
        (array(0, 64), Rank(0, 64)),
        (array(7, 4, first=1, step=2), Rank(3, 4)),
        ({**array(1, 3), "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}, Rank(13, 24, 5)),
    ],
)
def test_rank_from_the_environment(environment, expected):
    assert Rank.from_environment(environment) == expected


def test_a_broken_environment_is_named():
    with pytest.raises(UsageError, match="WORLD_SIZE"):
        Rank.from_environment({"RANK": "0", "WORLD_SIZE": "many"})
    with pytest.raises(UsageError, match="LOCAL_RANK is ''"):
        Rank.from_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""})


def test_the_ranks_engine_needs_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="torchrun"):
        RanksEngine()


@given(shards=st.integers(1, 60), count=st.integers(1, 9), number=st.integers(0, 8))
def test_own_shards_come_first_and_every_open_one_comes(tmp_path_factory, shards, count, number):
    storage = open_storage(str(tmp_path_factory.mktemp("set")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(number % count))
        patch.setenv("WORLD_SIZE", str(count))
        engine = RanksEngine()
    work = Work(storage=storage, shards=range(shards), task=lambda shard: shard)
    order = list(engine._tasks(work))
    own = [shard for shard in range(shards) if shard % count == number % count]
    assert order[: len(own)] == own
    assert sorted(order) == list(range(shards))


def test_committed_shards_are_passed_over_and_those_being_written_come_last(tmp_path):
    storage = open_storage(str(tmp_path))
    (tmp_path / "pairs-000001.parquet").touch()
    pending = storage.begin("pairs-000002.tar")
    work = Work(storage=storage, shards=range(5), task=lambda shard: shard)
    assert list(work.open_shards()) == [0, 3, 4, 2]
    pending.discard()


def test_engines_are_names_of_classes():
    import importlib

    for path in ENGINES.values():
        module, _, name = path.partition(":")
        assert hasattr(getattr(importlib.import_module(module), name), "run")


class DiesAtOnce:
    """A job that ends the worker that is given it, as a kernel out of memory does."""

    def __reduce__(self):
        return os._exit, (9,)


def test_workers_that_die_as_they_start_are_not_hired_for_ever(tmp_path):
    notes = []
    work = Work(storage=open_storage(str(tmp_path)), shards=[0, 1], task=lambda shard: shard)
    crew = _Crew(DiesAtOnce(), work, notes.append, [torch.device("cpu")] * 2)
    with pytest.raises(DiffmixError, match="exit code 9"):
        crew.run()
    assert len(notes) < 6


def test_a_crew_lists_the_folder_once_however_many_shards_there_are(tmp_path, monkeypatch):
    storage = open_storage(str(tmp_path))
    listings = []
    monkeypatch.setattr(storage, "names", lambda: listings.append(1) or [".pairs-000001.tar@host.1.ab.tmp"])
    crew = _Crew(None, Work(storage=storage, shards=range(100), task=None), print, [])
    crew.run()
    assert list(crew._open)[:2] == [0, 2]
    assert crew._open[-1] == 1
    assert len(listings) <= 2
