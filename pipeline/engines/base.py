"""What every engine does: hand shard numbers to workers. The committed parts are the only ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from manifests import layout
from manifests.storage import Storage
from pipeline.batching import automatic_batch
from pipeline.events import Event
from pipeline.generators.base import Generator
from pipeline.job import Job, ShardTask
from pipeline.worker import Worker

Report = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The shards to make and how to get the task of one; `replace`: also those that are committed (repairs)."""

    storage: Storage
    shards: Sequence[int]
    task: Callable[[int], ShardTask]
    replace: bool = False

    def is_open(self, shard: int) -> bool:
        """Whether the shard still has to be made, looking at the folder now."""
        return self.replace or not self.storage.exists(layout.part_name(shard))

    def open_shards(self) -> Iterator[int]:
        """Open shards in order; those that another live process is writing come last: they may be done by then."""
        postponed = []
        for shard in self.shards:
            if not self.is_open(shard):
                continue
            if layout.tar_name(shard) in self.storage.being_written():
                postponed.append(shard)
            else:
                yield shard
        yield from filter(self.is_open, postponed)


class Engine(Protocol):
    """Runs the same worker somewhere until no shard is open.

    `device` is where the calling process should load the generator: the engine's own device if it works in this
    process, else the CPU, where loading only checks the model and resolves its settings.
    """

    device: torch.device

    def run(self, job: Job, work: Work, report: Report, generator: Generator) -> None:
        """Make the shards. `report` is called in the calling process and may raise to stop everything."""
        ...


def make_worker(job: Job, generator: Generator, report: Report) -> Worker:
    """The one kind of worker there is, with the job's batch size or an automatic one."""
    images = job.plan.largest_shard * job.plan.variations
    batch_size = job.batch_size or automatic_batch(generator.device, generator.size, images)
    return Worker(job, generator, batch_size, report)
