"""Small pair sets of real pictures: what the tests of the stream read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from manifests.catalog import merge
from manifests.plan import claim
from manifests.shard import EncodedImage, EncodedVariation, Sample, ShardWriter
from manifests.storage import open_storage
from tests.manifests.builders import FACTS, make_plan
from trainer.data.rows import Rows


def picture(*name: int, height: int = 12, width: int = 12) -> np.ndarray:
    """Pixels uint8 [height, width, 3] that depend on `name` alone, all of it telling them apart."""
    return np.random.default_rng(abs(hash(name))).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> dict[str, Any]:
    """PNG, so that tests know the pixels that come back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"data": buffer.getvalue(), "width": pixels.shape[1], "height": pixels.shape[0]}


def variation(number: int, index: int, sides: dict[str, int], similarity: float | None) -> EncodedVariation:
    pixels = picture(number, index, **sides)
    return EncodedVariation(**encoded(pixels), seed=number, similarity=similarity, flagged=number % 4 == 0)


def write_pairs(
    folder: object,
    rows: int = 10,
    *,
    variations: int = 1,
    shards: int = 2,
    real: bool = True,
    labelled: bool = True,
    label: Callable[[int], int] = lambda number: number % 3,
    failed: Iterable[int] = (),
    uneven: bool = False,
    recorded: bool = True,
    similarity: Callable[[int, int], float] = lambda number, index: (number + index) / 100,
    merged: bool = True,
    real_data: bytes | None = None,
) -> str:
    """A set of rows k0, k1, ... in order; row n has label n % 3. Returns its folder."""
    plan = make_plan(
        rows=rows,
        shards=shards,
        variations=variations,
        labelled=labelled,
        store_real="original" if real else None,
    )
    storage = open_storage(str(folder))
    storage.create_folder()
    claim(storage, plan)
    number = 0
    for shard in range(shards):
        writer = ShardWriter(storage, shard, generator="g", labelled=labelled)
        for _ in range(plan.shard_rows(shard)):
            facts: dict[str, Any] = {"key": f"k{number}"}
            if labelled:
                facts |= {"label": label(number), "class_name": ("cat", "dog", "a bird")[number % 3]}
            if number in failed:
                writer.add(Sample(**facts, error="unreadable"))
            else:
                sides = {"height": 12 + number % 5, "width": 12 + number % 3} if uneven else {}
                kept = encoded(picture(number, -1, **sides))
                if real_data is not None:
                    kept["data"] = real_data
                synthetic = [
                    variation(number, index, sides, similarity(number, index) if recorded else None)
                    for index in range(variations)
                ]
                writer.add(Sample(**facts, real=EncodedImage(**kept) if real else None, synthetic=synthetic))
            number += 1
        assert writer.commit(**FACTS)
    if merged:
        merge(storage, plan)
    return str(folder)


def open_pairs(folder: object, rows: int = 10, **how: Any) -> Rows:
    return Rows.open(write_pairs(folder, rows, **how))
