"""What a generation will make and cost, before it is started."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from manifests.plan import Plan
from pipeline.generate import Settings, passed_over, prepare

# Bytes of a JPEG per pixel at quality 90, 4:2:0, as photographs have them; digits and CIFAR take more per pixel.
_BYTES_PER_PIXEL = 0.32
_OVERHEAD = 2048  # tar headers, facts and padding of one sample


def estimate(settings: Settings, *, rate: float | None, workers: tuple[int, ...]) -> dict[str, Any]:
    """The plan's numbers; with `rate`, images/s of one worker, also hours and the waste at the end per worker count."""
    prepared = prepare(settings, torch.device("cpu"))
    plan = prepared.plan
    images = plan.rows * plan.variations
    facts: dict[str, Any] = {
        "rows": plan.rows,
        "labelled": plan.labelled,
        "images_to_make": images,
        "files_ignored": prepared.source.ignored if prepared.source else 0,
        "shards": plan.shards,
        "rows_per_shard": plan.largest_shard,
        "source": dict(plan.source),
        "generator": dict(plan.generator or {}),
        "disk_gigabytes": round(_disk_bytes(plan, prepared.index, prepared.generator.size) / 1e9, 3),
    }
    if rate:
        facts["gpu_hours"] = round(images / rate / 3600, 3)
    facts["workers"] = [_with_workers(plan, count, rate) for count in workers]
    return facts


def _disk_bytes(plan: Plan, index: pa.Table, size: int) -> float:
    sizes = index["size"].drop_null()
    mean_real = sum(chunk.to_numpy().sum() for chunk in sizes.chunks) / max(1, len(sizes)) if len(sizes) else 0
    synthetic = plan.variations * size * size * _BYTES_PER_PIXEL
    return plan.rows * (_OVERHEAD + mean_real + synthetic)


def _with_workers(plan: Plan, count: int, rate: float | None) -> dict[str, Any]:
    """Workers take whole shards: with few shards each, the last round leaves most of them idle."""
    rounds = -(-plan.shards // count)
    waste = 1 - plan.shards / (rounds * count)
    facts: dict[str, Any] = {"workers": count, "rounds": rounds, "tail_waste": round(waste, 4)}
    if rate:
        facts["hours"] = round(rounds * plan.largest_shard * plan.variations / rate / 3600, 3)
    return facts


def estimate_text(facts: dict[str, Any]) -> str:
    """`estimate` for people."""
    labelled = "labelled" if facts["labelled"] else "unlabelled"
    lines = [
        f"{facts['rows']:,} {labelled} images from {facts['source']['kind']}:{facts['source']['location']}",
        f"{facts['images_to_make']:,} images to make, {facts['shards']} shards of {facts['rows_per_shard']:,} rows",
        f"about {facts['disk_gigabytes']:,} GB on disk",
    ]
    if facts["files_ignored"]:
        lines.append(passed_over(facts["source"]["kind"], facts["files_ignored"]))
    if "gpu_hours" in facts:
        lines.append(f"{facts['gpu_hours']:,} hours of one worker")
    elif facts["workers"]:
        lines.append("give --rate, images/s of one worker from `pipeline bench`, for hours")
    for entry in facts["workers"]:
        hours = f", {entry['hours']:,} h" if "hours" in entry else ""
        lines.append(
            f"  {entry['workers']} workers: {entry['rounds']} rounds, {entry['tail_waste']:.1%} idle at the end{hours}"
        )
    return "\n".join(lines)
