"""From one row of a task to what the device needs: the stored real image and the conditioning input."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from manifests import layout
from manifests.errors import CorruptSetError
from manifests.schema import PairRow, RealImage
from manifests.shard import EncodedImage, EncodedVariation, Sample
from manifests.storage import Storage
from pipeline.generators.base import Generator
from pipeline.job import Job, ShardTask
from pipeline.sources.base import UnreadableImageError
from pipeline.sources.images import decode, stored_copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row after reading: `inputs` for the device, or a complete sample that needs none (failed or kept)."""

    sample: Sample
    inputs: torch.Tensor | None = None


class RowReader:
    """Reads rows from the job's source, or from the shard itself where they are kept. Called from several threads."""

    def __init__(self, job: Job, generator: Generator, storage: Storage) -> None:
        self._source, self._plan = job.source, job.plan
        self._generator, self._storage = generator, storage

    def __call__(self, task: ShardTask, position: int) -> Row:
        """The row at `position`; an image that cannot be read or decoded gives a failed sample, never an exception."""
        facts = task.rows.slice(position, 1).to_pylist()[0]
        location = facts["location"]
        sample = Sample(key=facts["key"], label=facts["label"], class_name=facts["class_name"], source=location or None)
        if (row := task.kept.get(sample.key)) is not None:
            return Row(sample=kept_sample(self._storage, sample, row))
        if self._source is None:
            return Row(sample=sample, inputs=torch.empty(0))
        try:
            data = self._source.read(location, facts["offset"], facts["size"])
            pixels = decode(data, max_pixels=self._plan.max_pixels)
            stored = stored_copy(data, pixels, store=store_mode(self._plan.store_real), quality=self._plan.quality)
        except UnreadableImageError as error:
            return Row(sample=replace(sample, error=str(error)))
        real = EncodedImage(data=stored.data, width=stored.width, height=stored.height)
        return Row(sample=replace(sample, real=real), inputs=self._generator.prepare(pixels))


def kept_sample(storage: Storage, sample: Sample, row: PairRow) -> Sample:
    """`sample` with the images that its row has in the committed shard, byte for byte."""
    synthetic = [
        EncodedVariation(
            data=_bytes(storage, row.shard, image),
            width=image.width,
            height=image.height,
            seed=image.seed,
            similarity=image.similarity,
            flagged=image.flagged,
        )
        for image in row.synthetic
    ]
    if row.real is None:
        return replace(sample, synthetic=synthetic)
    data = _bytes(storage, row.shard, row.real)
    real = EncodedImage(data=data, width=row.real.width, height=row.real.height)
    return replace(sample, real=real, synthetic=synthetic)


def _bytes(storage: Storage, shard: int, image: RealImage) -> bytes:
    name = layout.tar_name(shard)
    data = storage.read_range(name, image.offset, image.size)
    if hashlib.sha256(data).digest() != image.sha256:
        # Another repair may have replaced the tar since the row was found intact.
        raise CorruptSetError(f"{name} changed while its rows were read; run the same command again")
    return data


def store_mode(store_real: str | None) -> Literal["original"] | int:
    """The plan's `store_real` as `stored_copy` takes it."""
    return int(store_real) if store_real is not None and store_real.isdigit() else "original"


def inputs_of(rows: Sequence[Row], size: int) -> torch.Tensor:
    """The inputs of a batch, [size, ...]: blanks stand for rows without one and for the places behind the last."""
    given = [row.inputs for row in rows]
    blank = torch.zeros_like(next(tensor for tensor in given if tensor is not None))
    filled = [blank if tensor is None else tensor for tensor in given]
    return torch.stack(filled + [blank] * (size - len(filled)))
