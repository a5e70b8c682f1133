"""Write one shard: members into the tar, rows into the part, and the commit that makes both count."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from manifests import checksum, layout
from manifests.errors import StorageError
from manifests.schema import FAILED, PairRow, RealImage, ShardFacts, SyntheticImage, rows_to_table
from manifests.storage import Storage, explained

_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """One image file's bytes, with the size of the picture in pixels."""

    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedVariation(EncodedImage):
    """One synthetic image's bytes with the seed of its noise and what the generator says of it."""

    seed: int
    similarity: float | None = None
    flagged: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One real image and its variations, encoded, on the way into a shard; `error` makes it a failed row."""

    key: str
    label: int | None = None
    class_name: str | None = None
    source: str | None = None
    real: EncodedImage | None = None
    synthetic: Sequence[EncodedVariation] = ()
    error: str | None = None


class ShardWriter:
    """Writes one shard in the order of `add`; nothing is visible before `commit`.

    Args:
        storage: the pair set's folder.
        shard: the shard's number.
        generator: id of the generator's spec in plan.json, None for real-only and packed sets.
        labelled: whether each sample gets a `.cls` member; all samples of a set must agree.
    """

    def __init__(self, storage: Storage, shard: int, *, generator: str | None, labelled: bool) -> None:
        self.storage = storage
        self.shard = shard
        self.generator = generator
        self.labelled = labelled
        self.rows: list[PairRow] = []
        self._tar = _TarFile(storage, layout.tar_name(shard))

    def add(self, sample: Sample) -> PairRow:
        """Write a sample's members and remember its row; a failed sample has no members."""
        if not layout.KEY_PATTERN.fullmatch(sample.key):
            raise ValueError(f"{sample.key!r} is no key: {layout.KEY_PATTERN.pattern}")
        row = self._failed(sample) if sample.error is not None else self._written(sample)
        self.rows.append(row)
        return row

    def _failed(self, sample: Sample) -> PairRow:
        return PairRow(
            key=sample.key,
            shard=self.shard,
            status=FAILED,
            error=sample.error,
            label=sample.label,
            class_name=sample.class_name,
            source=sample.source,
            generator=self.generator,
        )

    def _written(self, sample: Sample) -> PairRow:
        if self.labelled and sample.label is None:
            raise ValueError(f"{sample.key} has no label, and every sample of a labelled set has one")
        real = None
        if sample.real is not None:
            real = RealImage(**self._image(layout.real_member(sample.key), sample.real))
        synthetic = tuple(
            SyntheticImage(
                **self._image(layout.synthetic_member(sample.key, index), image),
                seed=image.seed,
                similarity=image.similarity,
                flagged=image.flagged,
            )
            for index, image in enumerate(sample.synthetic)
        )
        self._tar.add(layout.json_member(sample.key), _facts_of_sample(sample, self.generator))
        if self.labelled:
            self._tar.add(layout.label_member(sample.key), str(sample.label).encode())
        return PairRow(
            key=sample.key,
            shard=self.shard,
            label=sample.label,
            class_name=sample.class_name,
            source=sample.source,
            real=real,
            synthetic=synthetic,
            generator=self.generator,
        )

    def _image(self, member: str, image: EncodedImage) -> dict[str, Any]:
        offset = self._tar.add(member, image.data)
        return {
            "offset": offset,
            "size": len(image.data),
            "width": image.width,
            "height": image.height,
            "sha256": hashlib.sha256(image.data).digest(),
        }

    def commit(self, *, replace: bool = False, **facts: Any) -> bool:
        """Tar first, then the part, whose presence counts; `facts` are the `ShardFacts` beside the tar's own.

        A shard that someone else has committed meanwhile stays as it is, unless `replace`: then the merged manifest
        and the part are removed before the tar is replaced, so that a crash between leaves an uncommitted shard. Two
        processes may commit at the same moment: whoever finds other bytes in the tar under its own part takes the
        part back, so that the shard is whole or uncommitted, never mixed. Returns False if the other's tar stayed.
        """
        name = layout.part_name(self.shard)
        part = self.storage.begin(name)
        try:
            self._tar.finish()
            shard_facts = ShardFacts(shard=self.shard, tar_size=self._tar.size, tar_sha256=self._tar.sha256(), **facts)
            data = part_bytes(self.rows, shard_facts)
            part.write(data)
            part.sync()
            if replace:
                self.storage.remove(layout.MANIFEST)
                self.storage.remove(name)
            elif self.storage.exists(name):
                return True
            try:
                self._tar.pending.commit()
                part.commit()
            except StorageError:
                # Our temporaries may have been swept by whoever committed this shard and finished the set meanwhile.
                if self.storage.exists(name):
                    return True
                raise
            if self._tar.pending.is_current() or self._is_tar_equal():
                return True
            if self.storage.exists(name) and self.storage.read(name) == data:
                self.storage.remove(name)
            return False
        finally:
            part.discard()
            self.discard()

    def _is_tar_equal(self) -> bool:
        """Whether the tar in place holds our bytes: another's equal ones, or ours where files have no identity."""
        name = layout.tar_name(self.shard)
        try:
            with self.storage.open(name) as file, explained("read", f"{self.storage.url}/{name}"):
                return checksum.sha256(file) == self._tar.sha256()
        except StorageError:
            return False

    def discard(self) -> None:
        """Forget the shard; harmless after `commit`."""
        self._tar.pending.discard()


class _TarFile:
    """A plain tar written front to back, hashed as it grows. Equal members give equal bytes: no times, no owners."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.pending = storage.begin(name)
        self.size = 0
        self._digest = hashlib.sha256()

    def add(self, member: str, data: bytes) -> int:
        """Append a member; returns the offset of its first data byte."""
        info = tarfile.TarInfo(member)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    def finish(self) -> None:
        """End the archive as tar does: two empty blocks, padded to a record."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self.pending.sync()

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self.pending.write(data)
        self._digest.update(data)
        self.size += len(data)


def part_bytes(rows: Sequence[PairRow], facts: ShardFacts) -> bytes:
    """A part file: rows, the shard's facts in its metadata, and a checksum that covers every byte."""
    buffer = io.BytesIO()
    table = rows_to_table(rows, facts)
    with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(checksum.PLACEHOLDER)
    checksum.seal(buffer)
    return buffer.getvalue()


def _facts_of_sample(sample: Sample, generator: str | None) -> bytes:
    """KEY.json: the same fields and types in every sample of a set, no nulls, so that `datasets` can infer them."""
    facts: dict[str, Any] = {
        "key": sample.key,
        "label": -1 if sample.label is None else sample.label,
        "class_name": sample.class_name or "",
        "source": sample.source or "",
        "generator": generator or "",
        "seeds": [image.seed for image in sample.synthetic],
    }
    for column in ("similarity", "flagged"):
        values = [getattr(image, column) for image in sample.synthetic]
        if values and None not in values:
            facts[column] = values
    return json.dumps(facts, ensure_ascii=False).encode()
