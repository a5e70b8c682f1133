"""`pipeline pack`: pair a folder of real images with folders of generated ones that exist already; no model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa

from manifests.plan import Plan
from manifests.shard import EncodedImage, EncodedVariation, Sample
from manifests.storage import Storage
from pipeline.engines.base import Report, Work
from pipeline.job import Job, ShardTask, make_plan
from pipeline.read_ahead import ReadAhead
from pipeline.row_reader import kept_sample, store_mode
from pipeline.sink import ShardSink
from pipeline.sources.base import Source, UnreadableImageError, fingerprint
from pipeline.sources.folder import FolderSource
from pipeline.sources.images import decode, stored_copy

NO_SEED = -1  # the noise of a packed image is unknown
_WINDOW = 64


@dataclass(frozen=True, slots=True)
class Packing:
    """The folders of a packed set and which generated file belongs to which real one."""

    real: FolderSource
    index: pa.Table
    synthetic: Sequence[FolderSource]
    partners: Sequence[Mapping[str, str]]  # a map for each synthetic folder: path without suffix -> location
    fingerprint: str

    @classmethod
    def open(cls, real: str, synthetic: Sequence[str]) -> Packing:
        """Index all folders; files belong together when their relative paths are equal but for the suffix."""
        real_source = FolderSource(real)
        index = real_source.index()
        folders = [FolderSource(folder) for folder in synthetic]
        indexes = [folder.index() for folder in folders]
        digest = hashlib.sha256("".join(map(fingerprint, [index, *indexes])).encode()).hexdigest()
        partners = [{_stem(path): path for path in table["location"].to_pylist()} for table in indexes]
        return cls(real_source, index, folders, partners, digest)

    def unpaired(self) -> int:
        """Generated images without a real one."""
        stems = set(map(_stem, self.index["location"].to_pylist()))
        return sum(len(partner.keys() - stems) for partner in self.partners)

    def plan(
        self, *, seed: int, shards: int, limit: int | None, store_real: str, quality: int, max_pixels: int
    ) -> Plan:
        """The plan of the packed set: no generator, as many variations as folders."""
        source = {
            "kind": "pack",
            "location": self.real.location,
            "synthetic": [folder.location for folder in self.synthetic],
            "fingerprint": self.fingerprint,
        }
        return make_plan(
            index=self.index,
            source=source,
            generator=None,
            seed=seed,
            variations=len(self.synthetic),
            shards=shards,
            limit=limit,
            store_real=store_real,
            quality=quality,
            max_pixels=max_pixels,
        )


@dataclass(frozen=True, slots=True)
class PackEngine:
    """Makes the shards of a packed set in this process; the sibling of the engines that run a model."""

    packing: Packing

    def run(self, job: Job, work: Work, report: Report) -> None:
        """Make the shards of `work` in this process."""
        tasks = (work.task(shard) for shard in work.open_shards())
        plan = job.plan
        with ThreadPoolExecutor(job.readers, "reader") as readers, _sink(work.storage, plan) as sink:
            ahead = ReadAhead(tasks, readers, _PairReader(self.packing, plan, work.storage), _WINDOW)
            for stream in ahead:
                sink.begin(stream.task)
                for sample in stream:
                    ahead.fill()
                    sink.add(sample)
                sink.commit()
                for event in sink.events():
                    report(event)
        for event in sink.events():
            report(event)


def _sink(storage: Storage, plan: Plan) -> ShardSink:
    return ShardSink(storage, generator=None, labelled=plan.labelled, capacity=_WINDOW)


class _PairReader:
    def __init__(self, packing: Packing, plan: Plan, storage: Storage) -> None:
        self._packing, self._plan, self._storage = packing, plan, storage

    def __call__(self, task: ShardTask, position: int) -> Sample:
        facts = task.rows.slice(position, 1).to_pylist()[0]
        location = facts["location"]
        sample = Sample(key=facts["key"], label=facts["label"], class_name=facts["class_name"], source=location)
        if (row := task.kept.get(sample.key)) is not None:
            return kept_sample(self._storage, sample, row)
        try:
            real = self._image(self._packing.real, location, store_mode(self._plan.store_real))
            synthetic = [self._variation(number, location) for number in range(len(self._packing.synthetic))]
        except UnreadableImageError as error:
            return replace(sample, error=str(error))
        return replace(sample, real=real, synthetic=synthetic)

    def _variation(self, number: int, location: str) -> EncodedVariation:
        partner = self._packing.partners[number].get(_stem(location))
        if partner is None:
            raise UnreadableImageError(f"no generated image (folder {number})")
        try:
            image = self._image(self._packing.synthetic[number], partner, "original")
        except UnreadableImageError as error:
            raise UnreadableImageError(f"generated image (folder {number}): {error}") from error
        return EncodedVariation(data=image.data, width=image.width, height=image.height, seed=NO_SEED)

    def _image(self, source: Source, location: str, store: Literal["original"] | int) -> EncodedImage:
        data = source.read(location, None, None)
        pixels = decode(data, max_pixels=self._plan.max_pixels)
        stored = stored_copy(data, pixels, store=store, quality=self._plan.quality)
        return EncodedImage(data=stored.data, width=stored.width, height=stored.height)


def _stem(location: str) -> str:
    return str(PurePosixPath(location).with_suffix(""))
