"""Peak memory of whole `pipeline generate` runs over many tiny images: it must not grow beyond the plan's keys."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.child import call
from pipeline.bench.figures import Figure, Say, Settings
from pipeline.bench.pictures import picture
from pipeline.sources.images import encode
from pipeline.sources.open import open_source

_IMAGES, _QUICK_IMAGES = 50_000, 2_000
_SHARD_ROWS = 500
_TAR_IMAGES = 1000  # as WebDataset tars of photographs hold
_DISTINCT = 64


def measure(settings: Settings, say: Say) -> list[Figure]:
    """The same run over all images and over a tenth of them, shards of the same size."""
    from pipeline.generators.random_weights import tiny_variations

    images = settings.memory_images or (_QUICK_IMAGES if settings.quick else _IMAGES)
    with tempfile.TemporaryDirectory(prefix="diffmix-bench-") as name:
        folder = Path(name)
        tiny_variations("32px").save_pretrained(folder / "model")
        runs = [_run(folder, count, say) for count in (max(1, images // 10), images)]
    few, many = runs
    growth = (many["peak_bytes"] - few["peak_bytes"]) / (many["images"] - few["images"])
    index = many["index_bytes"] / many["images"]
    return [
        Figure(
            name=f"peak memory of `pipeline generate` over {many['images']:,} images in {many['shards']} shards",
            ours=many["peak_bytes"] / 1e6,
            unit="MB",
            baseline=few["peak_bytes"] / 1e6,
            baseline_name=f"the same over {few['images']:,} images in {few['shards']} shards",
            note=f"made {many['images'] / many['seconds']:,.0f} images/s, one step each",
        ),
        Figure(
            name="growth of the peak per image more",
            ours=growth,
            unit="bytes",
            baseline=index,
            baseline_name="the plan's own row (key, place, label) of an image",
            note="peaks vary by some MB from run to run",
        ),
    ]


def _run(folder: Path, images: int, say: Say) -> dict[str, Any]:
    say(f"memory: generating from {images:,} tiny images")
    source, out = folder / f"tars-of-{images}", folder / f"pairs-of-{images}"
    write_tars(source, images)
    shards = -(-images // _SHARD_ROWS)
    facts = call("generate", str(source), str(folder / "model"), str(out), str(shards))
    index = open_source(str(source)).index()
    return {"images": images, "shards": shards, "index_bytes": index.nbytes, **facts}


def write_tars(folder: Path, images: int) -> None:
    """WebDataset tars of JPEGs of 8 to 16 pixels."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    pictures = [encode(picture(random, 8 + number % 9, 8 + number // 8), 90) for number in range(_DISTINCT)]
    for first in range(0, images, _TAR_IMAGES):
        with tarfile.open(folder / f"{first:09d}.tar", "w") as tar:
            for number in range(first, min(first + _TAR_IMAGES, images)):
                data = pictures[number % _DISTINCT]
                member = tarfile.TarInfo(f"{number:09d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def generate(source: str, model: str, out: str, shards: str) -> dict[str, Any]:
    """One whole run of the command; called in a process of its own."""
    import contextlib

    from pipeline.cli import run

    arguments = ["--source", source, "--model", model, "--out", out, "--shards", shards, "--steps", "1", "--json"]
    summary = io.StringIO()
    with contextlib.redirect_stdout(summary):
        code = run(["generate", *arguments])
    if code:
        raise SystemExit(code)
    return {"seconds": json.loads(summary.getvalue())["seconds"]}
