"""Small pair sets of made-up bytes: what the tests of the contract write and damage."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

from manifests.catalog import merge
from manifests.plan import Plan, claim
from manifests.shard import EncodedImage, EncodedVariation, Sample, ShardWriter
from manifests.storage import Storage, open_storage

FACTS = {"batch_size": 4, "seconds": 1.5, "device": "cpu", "versions": {"torch": "2"}}


def make_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "source": {"kind": "folder", "location": "/photos", "fingerprint": "f" * 16},
        "generator": {"class": "sd", "model": "/models/a", "revision": "r1", "steps": 10, "size": [64, 64]},
        "seed": 0,
        "variations": 2,
        "shards": 2,
        "rows": 5,
        "limit": None,
        "labelled": True,
        "store_real": "original",
        "quality": 90,
        "max_pixels": 10**8,
    }
    return Plan(**values | changes)


def noise(*name: object, size: int | None = None) -> bytes:
    """Bytes that depend on `name` alone; by default between 1 and 700 of them."""
    generator = random.Random(repr(name))
    return generator.randbytes(generator.randint(1, 700) if size is None else size)


def make_sample(key: str, plan: Plan, salt: object = 0) -> Sample:
    real = None
    if plan.store_real is not None:
        real = EncodedImage(data=noise(key, "real", salt), width=32, height=24)
    synthetic = [
        EncodedVariation(
            data=noise(key, index, salt),
            width=16,
            height=16,
            seed=int.from_bytes(hashlib.sha256(f"{key}{index}".encode()).digest()[:8], "big") >> 1,
            similarity=0.5 + index / 8,
            flagged=False,
        )
        for index in range(plan.variations)
    ]
    label = len(key) % 3 if plan.labelled else None
    return Sample(
        key=key,
        label=label,
        class_name=None if label is None else f"class {label} é",
        source=f"folder/{key}.JPEG",
        real=real,
        synthetic=synthetic,
    )


def shard_samples(plan: Plan, shard: int, salt: object = 0, failed: Iterable[str] = ()) -> Iterator[Sample]:
    for position in range(plan.shard_rows(shard)):
        sample = make_sample(f"key_{shard}-{position}", plan, salt)
        if sample.key in failed:
            sample = Sample(key=sample.key, label=sample.label, source=sample.source, error="unreadable")
        yield sample


def open_writer(storage: Storage, plan: Plan, shard: int, salt: object = 0, failed: Iterable[str] = ()) -> ShardWriter:
    writer = ShardWriter(storage, shard, generator=plan.generator_id, labelled=plan.labelled)
    for sample in shard_samples(plan, shard, salt, failed):
        writer.add(sample)
    return writer


def write_shard(storage: Storage, plan: Plan, shard: int, salt: object = 0, *, replace: bool = False) -> bool:
    return open_writer(storage, plan, shard, salt).commit(replace=replace, **FACTS)


def write_set(url: str, plan: Plan | None = None, *, failed: Iterable[str] = ()) -> tuple[Storage, Plan]:
    """A finished set: plan, shards and manifest."""
    plan = plan or make_plan()
    storage = open_storage(url)
    storage.create_folder()
    claim(storage, plan)
    for shard in range(plan.shards):
        assert open_writer(storage, plan, shard, failed=failed).commit(**FACTS)
    merge(storage, plan)
    return storage, plan


def flip(data: bytes, position: int, bit: int = 0) -> bytes:
    """The same bytes with one bit turned over."""
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)
