"""Batches of views, endlessly, from any place in the stream: threads decode and cut ahead of the training step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data import order
from trainer.data.augment import augment
from trainer.data.augment_cpu import augment_cpu
from trainer.data.batch import Batch, Views
from trainer.data.colours import Colours
from trainer.data.mixing import Policy, labels_of
from trainer.data.order import Cursor, EpochOrder
from trainer.data.rand_augment import RandAugment
from trainer.data.reader import CACHE_BYTES, Reader
from trainer.data.threads import Crew, Task, default_workers
from trainer.data.view_maker import ViewMaker
from trainer.data.view_plan import ViewConfig, ViewPlan

_PART_PIXELS = 16 * 2 * 224 * 224  # of the views that a thread makes at a time: little memory, little overhead


@dataclass(slots=True)
class _Pending:
    """A micro-batch in the making. `tensors` are [V, B, ...] and, with local crops, [W, B, ...]."""

    items: NDArray[np.int64]
    epoch: int
    step: int
    tensors: list[Tensor]
    colours: dict[int, list[Colours]]  # by the part's first item: of each view, for the device
    task: Task | None = None


class Loader(Iterator[Batch]):
    """Micro-batches of one rank, in order: those of a step, the next step, the next epoch, without end.

    What is drawn depends on `policy`, `views` and `seed` alone; any number of ranks, threads or accumulation
    steps sees the same global batches, bit for bit on one device.

    Args:
        policy: which image of which row feeds which view, see `mixing.make`.
        views: augmentation and sizes.
        num_crops: global views of an image, V.
        num_local_crops: local views of an image, W.
        batch_size: items of a step, over all ranks.
        seed: of order, mixing and augmentation.
        device: where views are wanted; on a GPU colours are augmented there, else by the threads.
        rank: of this process, below `world_size`.
        world_size: number of processes.
        accumulation: micro-batches of a step.
        cursor: where to begin.
        workers: threads; None chooses, see `threads.default_workers`.
        dtype: of the views.
        prefetch: micro-batches made ahead.
        cache_bytes: sets of equally large images that fit are kept decoded, see `Reader`.
        with_labels: whether views come with the labels of their images.
        rand_augment: what is done to the views once they are cut, before their colours are augmented.

    Raises:
        UsageError: the policy cannot feed so many views or has no labels, or the batch fits neither set nor processes.
        DiffmixError: from `next`, an image cannot be read.
    """

    def __init__(
        self,
        policy: Policy,
        views: ViewConfig,
        *,
        num_crops: int,
        num_local_crops: int,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        cursor: Cursor = Cursor(),  # noqa: B008  # frozen
        workers: int | None = None,
        dtype: torch.dtype = torch.float32,
        prefetch: int = 2,
        cache_bytes: int = CACHE_BYTES,
        with_labels: bool = False,
        rand_augment: RandAugment | None = None,
    ) -> None:
        self.policy = policy
        self.policy.check_views(num_crops, num_local_crops)
        self.num_items = self.policy.num_items
        self.steps_per_epoch = order.batches(self.num_items, batch_size)
        self.micro_batch_size = order.micro_batch_size(batch_size, world_size, accumulation)
        self.wait_seconds = 0.0  # that `next` has waited for the threads so far
        self._epoch, self._step = order.start_of(cursor, self.num_items, batch_size)
        self._micro = 0
        self._order = EpochOrder(seed, self._epoch, self.num_items)
        self._labels = labels_of(self.policy) if with_labels else None
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world_size, self._accumulation = rank, world_size, accumulation
        self._config, self._dtype, self._prefetch = views, dtype, prefetch
        self._device = torch.device(device)
        self._on_cpu = self._device.type == "cpu"
        self._plan = ViewPlan.of(views, num_crops, num_local_crops)
        self._readers = [Reader(one, cache_bytes) for one in self.policy.sets]
        self._maker = ViewMaker(self.policy, self._readers, self._plan, seed, rand_augment)
        workers = default_workers(alone=not self._on_cpu) if workers is None else workers
        self._part = self._part_size(workers)
        self._pending: deque[_Pending] = deque()
        self._crew = Crew(workers)

    @property
    def fingerprint(self) -> str:
        """Of all rows that are drawn from, see `ImageSet.fingerprint`."""
        return self.policy.fingerprint

    def keys(self, items: NDArray[np.int64], epoch: int) -> list[str]:
        """The key of the row that each item shows in an epoch."""
        rows, where = self.policy.locate(np.asarray(items, np.int64), epoch, self._seed)
        keys = np.empty(len(rows), dtype=object)
        for number, of_set in enumerate(self.policy.sets):
            chosen = np.flatnonzero(where == number)
            if len(chosen):
                keys[chosen] = of_set.keys(rows[chosen])
        return list(keys)

    def __next__(self) -> Batch:
        while len(self._pending) <= self._prefetch:
            self._pending.append(self._begin())
        pending = self._pending.popleft()
        assert pending.task is not None
        started = time.perf_counter()
        try:
            pending.task.wait()
        finally:
            self.wait_seconds += time.perf_counter() - started
        tensors = dict(zip(("crops", "local_crops"), self._finished(pending), strict=False))
        views = Views(**tensors, labels=self._labels_of(pending.items, pending.epoch))
        return Batch(views=views, items=pending.items, epoch=pending.epoch, step=pending.step)

    def close(self) -> None:
        """End the threads and close the files; harmless to repeat."""
        self._crew.close()
        self._pending.clear()
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _labels_of(self, items: NDArray[np.int64], epoch: int) -> Tensor | None:
        if self._labels is None:
            return None
        rows, where = self.policy.locate(items, epoch, self._seed)
        labels = np.empty(len(items), np.int64)
        for number, of_set in enumerate(self._labels):
            labels[where == number] = of_set[rows[where == number]]
        return torch.from_numpy(labels).to(self._device, non_blocking=True)

    def _part_size(self, workers: int) -> int:
        """Items that a thread makes at a time: all of a micro-batch's threads have some, none has too many at once."""
        plan = self._plan
        pixels = len(plan.crops) * plan.size**2 + len(plan.local_crops) * plan.local_size**2
        return max(1, min(-(-self.micro_batch_size // workers), _PART_PIXELS // pixels))

    def _begin(self) -> _Pending:
        """Give the next micro-batch to the threads."""
        items = self._next_items()
        pending = _Pending(items, self._epoch, self._step, self._new_tensors(), {})
        parts: list[Callable[[], None]] = [
            partial(_make_part, self._maker, self._config, pending, start, min(start + self._part, len(items)))
            for start in range(0, len(items), self._part)
        ]
        pending.task = self._crew.do(parts)
        self._advance()
        return pending

    def _next_items(self) -> NDArray[np.int64]:
        return order.micro_batch(
            self._order,
            self._step,
            self._batch_size,
            self._rank,
            self._world_size,
            self._micro,
            self._accumulation,
        )

    def _advance(self) -> None:
        self._micro += 1
        if self._micro == self._accumulation:
            self._micro, self._step = 0, self._step + 1
        if self._step == self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
            self._order = EpochOrder(self._seed, self._epoch, self.num_items)

    def _new_tensors(self) -> list[Tensor]:
        """Views on the CPU as floats, for a GPU as bytes in memory that it can fetch by itself."""
        tensors = []
        for views, size in ((self._plan.crops, self._plan.size), (self._plan.local_crops, self._plan.local_size)):
            lead = (len(views), self.micro_batch_size)
            if not views:
                continue
            if self._on_cpu:
                tensors.append(torch.empty(*lead, 3, size, size))
            else:
                pinned = self._device.type == "cuda"
                tensors.append(torch.empty(*lead, size, size, 3, dtype=torch.uint8, pin_memory=pinned))
        return tensors

    def _finished(self, pending: _Pending) -> list[Tensor]:
        if self._on_cpu:
            return [tensor.to(self._dtype) for tensor in pending.tensors]
        finished, first = [], 0
        parts = [pending.colours[start] for start in sorted(pending.colours)]
        for tensor in pending.tensors:
            views = range(first, first + len(tensor))
            colours = Colours.concatenate([part[view] for view in views for part in parts])
            pixels = tensor.to(self._device, non_blocking=True).flatten(0, 1)
            made = augment(pixels, colours, self._config.mean, self._config.std, self._dtype)
            finished.append(made.unflatten(0, (len(tensor), -1)))
            first += len(tensor)
        return finished


def _make_part(maker: ViewMaker, config: ViewConfig, pending: _Pending, start: int, stop: int) -> None:
    """Items `start` to `stop` of a micro-batch, by whichever thread."""
    outs = [view[start:stop] for tensor in pending.tensors for view in tensor.numpy()]
    items = pending.items[start:stop]
    if pending.tensors[0].dtype == torch.uint8:
        pending.colours[start] = maker.cut(items, pending.epoch, outs)
        return
    pixels = [np.empty((len(out), out.shape[2], out.shape[3], 3), np.uint8) for out in outs]
    colours = maker.cut(items, pending.epoch, pixels)
    for of_view, colours_of_view, out in zip(pixels, colours, outs, strict=True):
        augment_cpu(of_view, colours_of_view, config.mean, config.std, out)
