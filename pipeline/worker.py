"""One device at work: threads read ahead, the device makes variations, threads encode, one thread writes.

    tasks -> ReadAhead (read, decode, condition) -> batch -> device (embed, vary, compare) -> ShardSink (tar, commit)

The device waits only for the first rows. Row i of a shard always has the same places in the same batches, whichever
rows around it fail or are kept, so that a regenerated row is the same row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from manifests.errors import CorruptSetError
from manifests.shard import EncodedVariation
from manifests.storage import open_storage
from pipeline.batching import is_out_of_memory
from pipeline.events import Event, Made, Note
from pipeline.generators.base import Generator
from pipeline.job import Job, ShardTask
from pipeline.plan import variation_seed
from pipeline.read_ahead import ReadAhead, RowStream
from pipeline.row_reader import Row, RowReader, inputs_of
from pipeline.sink import ShardSink
from pipeline.sources.images import encode

NON_FINITE = "non-finite image, in float32 too"
UNSAFE = "safety"

_LIBRARIES = ("diffmix", "torch", "diffusers", "transformers", "numpy", "pillow", "simplejpeg")


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of a batch: which variation of which row."""

    row: Row
    index: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """What the device made of one batch, on the CPU; each list has one entry a slot."""

    images: NDArray[np.uint8]  # [B, H, W, 3]
    finite: list[bool]
    redone: int
    similarity: list[float] | None
    flagged: list[bool] | None


class Worker:
    """Makes shards on one device.

    Args:
        job: what to make.
        generator: loaded on its device.
        batch_size: variations per batch, constant over a shard; halved for good when the device's memory is full.
        report: called from the thread of `run`; may raise to stop the work.
    """

    def __init__(self, job: Job, generator: Generator, batch_size: int, report: Callable[[Event], None]) -> None:
        self.job = job
        self.generator = generator
        self.batch_size = min(batch_size, job.plan.largest_shard * job.plan.variations)
        self._report = report
        self._storage = open_storage(job.out)
        self._device = _device_name(generator.device)

    def run(self, tasks: Iterable[ShardTask]) -> None:
        """Make every task's shard; the next one is read, and the last one written, while this one is made."""
        with ExitStack() as stack:
            readers = stack.enter_context(_pool(self.job.readers, "reader"))
            self._encoders = stack.enter_context(_pool(self.job.encoders, "encoder"))
            self._sink = stack.enter_context(self._new_sink())
            read = RowReader(self.job, self.generator, self._storage)
            self._ahead = ReadAhead(tasks, readers, read, self._window())
            for stream in self._ahead:
                self._shard(stream)
                self._forward_events()
        self._forward_events()

    def remake(self, task: ShardTask, position: int) -> list[EncodedVariation]:
        """The variations of one row, made in the places that they have in the shard's batches; nothing is written.

        Raises `CorruptSetError` with the reason if the real image can no longer be read.
        """
        row = RowReader(self.job, self.generator, self._storage)(task, position)
        if row.inputs is None:
            raise CorruptSetError(f"{row.sample.key}: the real image cannot be read: {row.sample.error}")
        made = []
        for index in range(self.job.plan.variations):
            slot = Slot(row, index, variation_seed(self.job.plan.seed, row.sample.key, index))
            place = (position * self.job.plan.variations + index) % self.batch_size
            blank = Slot(Row(sample=row.sample), 0, 0)
            batch = [blank] * place + [slot]
            device_batch = self._on_device(batch, self.batch_size)
            assert device_batch is not None, "the slot has inputs"
            made.append(self._encode(slot, device_batch, place))
        return made

    def _window(self) -> int:
        rows = -(-self.batch_size // self.job.plan.variations)
        return 2 * rows + self.job.readers

    def _new_sink(self) -> ShardSink:
        plan = self.job.plan
        return ShardSink(
            self._storage, generator=plan.generator_id, labelled=plan.labelled, capacity=4 * self._window()
        )

    def _shard(self, stream: RowStream[Row]) -> None:
        while True:
            try:
                return self._attempt(stream)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.batch_size == 1:
                    raise
            self._sink.abort()
            self._halve_batch()
            stream = self._ahead.again(stream)

    def _halve_batch(self) -> None:
        self.batch_size //= 2
        if self.generator.device.type == "cuda":
            torch.cuda.empty_cache()
        self._report(Note(text=f"out of memory on {self._device}: batch size is now {self.batch_size}"))

    def _attempt(self, stream: RowStream[Row]) -> None:
        started = time.monotonic()
        redone = 0
        task, batch_size = stream.task, self.batch_size
        self._sink.begin(task)
        waiting: list[Future[EncodedVariation]] = []
        errors: list[str] = []
        slots = self._slots(stream)
        left_device = time.perf_counter()
        self._ahead.fill()
        while batch := list(islice(slots, batch_size)):
            self._ahead.fill()
            entered_device = time.perf_counter()
            made = self._on_device(batch, batch_size)
            wait, left_device = entered_device - left_device, time.perf_counter()
            for place, slot in enumerate(batch):
                self._collect(slot, place, made, waiting, errors)
            if made is not None:
                redone += made.redone
                busy = left_device - entered_device
                num_made = sum(slot.row.inputs is not None for slot in batch)
                self._report(Made(variations=num_made, device_seconds=busy, wait_seconds=wait))
            self._forward_events()
        self._sink.commit(
            batch_size=batch_size,
            seconds=round(time.monotonic() - started, 3),
            device=self._device,
            nonfinite_redone=redone,
            versions=library_versions(),
        )

    def _slots(self, stream: RowStream[Row]) -> Iterator[Slot]:
        plan = self.job.plan
        for row in stream:
            for index in range(plan.variations):
                yield Slot(row, index, variation_seed(plan.seed, row.sample.key, index))

    def _on_device(self, batch: Sequence[Slot], size: int) -> DeviceBatch | None:
        """The batch padded to `size`; None if no row of it needs the device."""
        needed = [slot.row.inputs is not None for slot in batch]
        if not any(needed):
            return None
        inputs = inputs_of([slot.row for slot in batch], size)
        seeds = [slot.seed for slot in batch] + [0] * (size - len(batch))
        generator = self.generator
        condition = generator.embed(inputs)
        made = generator.vary(condition, seeds)
        images, finite = made.images, made.finite
        bad = [place for place, fine in enumerate(finite[: len(batch)].tolist()) if needed[place] and not fine]
        if bad:
            with generator.full_precision():
                again = generator.vary(generator.embed(inputs), seeds)
            images, finite = images.clone(), finite.clone()
            images[bad], finite[bad] = again.images[bad], again.finite[bad]
        similarity = generator.similarity(condition, images)
        flagged = generator.flagged(images)
        return DeviceBatch(
            images=images.cpu().numpy(),
            finite=finite.tolist(),
            redone=len(bad),
            # An encoder that overflows says nothing of likeness; facts must stay numbers.
            similarity=None if similarity is None else similarity.float().nan_to_num(0.0).tolist(),
            flagged=None if flagged is None else flagged.tolist(),
        )

    def _collect(
        self,
        slot: Slot,
        place: int,
        made: DeviceBatch | None,
        waiting: list[Future[EncodedVariation]],
        errors: list[str],
    ) -> None:
        """Add one slot's image to its row; the row goes to the sink with its last variation."""
        if slot.row.inputs is not None:
            assert made is not None, "a slot with inputs was on the device"
            if (error := self._error(made, place)) is not None:
                errors.append(error)
            waiting.append(self._encoders.submit(self._encode, slot, made, place))
        if slot.index < self.job.plan.variations - 1:
            return
        if errors:
            self._sink.add(replace(slot.row.sample, real=None, error=errors[0]))
        else:
            self._sink.add(slot.row.sample, tuple(waiting))
        waiting.clear()
        errors.clear()

    def _error(self, made: DeviceBatch, place: int) -> str | None:
        if not made.finite[place]:
            return NON_FINITE
        dropping = self.job.generator.safety == "drop"
        return UNSAFE if dropping and made.flagged is not None and made.flagged[place] else None

    def _encode(self, slot: Slot, made: DeviceBatch, place: int) -> EncodedVariation:
        image = made.images[place]
        return EncodedVariation(
            data=encode(image, self.job.plan.quality),
            width=image.shape[1],
            height=image.shape[0],
            seed=slot.seed,
            similarity=None if made.similarity is None else made.similarity[place],
            flagged=None if made.flagged is None else made.flagged[place],
        )

    def _forward_events(self) -> None:
        for event in self._sink.events():
            self._report(event)


@contextmanager
def _pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a shard's bytes, for its part's metadata."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
