"""One worker per rank of torchrun, `accelerate launch`, srun or a Slurm array; ranks never talk to each other."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from manifests.errors import UsageError
from pipeline.engines.base import Report, Work, make_worker
from pipeline.generators.base import Generator
from pipeline.job import Job, ShardTask


@dataclass(frozen=True, slots=True)
class Rank:
    """One process among all that were started for the run."""

    number: int
    count: int
    local: int = 0  # which of the node's devices

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rank | None:
        """RANK/WORLD_SIZE, srun's step or a Slurm array (or an array of torchruns); None if there is none of them.

        SLURM_NTASKS is never used: it is also set in a plain batch script, which is one process.
        """
        inner = _torchrun(environment) or _srun(environment)
        outer = _array(environment)
        if outer is None:
            return inner
        if inner is None:
            return outer
        return cls(outer.number * inner.count + inner.number, outer.count * inner.count, inner.local)


def _torchrun(environment: Mapping[str, str]) -> Rank | None:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    local = _integer(environment, "LOCAL_RANK", "0")
    return Rank(_integer(environment, "RANK"), _integer(environment, "WORLD_SIZE"), local)


def _srun(environment: Mapping[str, str]) -> Rank | None:
    if _integer(environment, "SLURM_STEP_NUM_TASKS", "1") < 2 or "SLURM_PROCID" not in environment:
        return None
    local = _integer(environment, "SLURM_LOCALID", "0")
    return Rank(_integer(environment, "SLURM_PROCID"), _integer(environment, "SLURM_STEP_NUM_TASKS"), local)


def _array(environment: Mapping[str, str]) -> Rank | None:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    first = _integer(environment, "SLURM_ARRAY_TASK_MIN")
    step = _integer(environment, "SLURM_ARRAY_TASK_STEP", "1")
    number = (_integer(environment, "SLURM_ARRAY_TASK_ID") - first) // step
    return Rank(number, _integer(environment, "SLURM_ARRAY_TASK_COUNT"))


def _integer(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r} in the environment, not a number") from None


class RanksEngine:
    """Rank r of n makes the open shards with `number mod n == r`, then helps with any that are still open."""

    def __init__(self) -> None:
        rank = Rank.from_environment(os.environ)
        if rank is None:
            raise UsageError(
                "--engine ranks needs RANK and WORLD_SIZE (torchrun, accelerate launch), srun with several tasks, "
                "or a Slurm array; use --engine local to run on this machine's devices"
            )
        self.rank = rank
        self.device = _device(rank)

    def run(self, job: Job, work: Work, report: Report, generator: Generator) -> None:
        make_worker(job, generator, report).run(self._tasks(work))

    def _tasks(self, work: Work) -> Iterator[ShardTask]:
        rank = self.rank
        own = [shard for shard in work.shards if shard % rank.count == rank.number]
        for shard in filter(work.is_open, own):
            yield work.task(shard)
        others = [shard for shard in work.shards if shard % rank.count != rank.number]
        # Each rank helps in an order of its own, so that two helpers rarely take the same shard.
        random.SystemRandom().shuffle(others)
        for shard in Work(storage=work.storage, shards=others, task=work.task, replace=work.replace).open_shards():
            yield work.task(shard)


def _device(rank: Rank) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank.local % torch.cuda.device_count())
