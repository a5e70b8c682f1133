"""Pictures to work on where none are given: noise with the spectrum of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.sources.images import encode

_QUALITY = 90


def picture(generator: torch.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """RGB, uint8 [H, W, 3]: octaves of smooth noise, each twice as fine and half as strong as the one before."""
    image = torch.full((1, 3, height, width), 0.5)
    cells, strength = 2, 0.35
    while cells <= max(width, height) and strength > 0.01:
        coarse = torch.randn(1, 3, min(cells, height), min(cells, width), generator=generator)
        image += strength * F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        cells, strength = cells * 2, strength / 2
    pixels = image[0].clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def write_pictures(folder: Path, count: int, side: int) -> None:
    """`count` JPEGs of `side` by three quarters of `side` pixels, as cameras make them; every other one upright."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    short = max(8, side * 3 // 4)
    for index in range(count):
        width, height = (side, short) if index % 2 else (short, side)
        (folder / f"picture-{index:06d}.jpg").write_bytes(encode(picture(generator, width, height), _QUALITY))


def write_digits(folder: Path, count: int) -> None:
    """The first `count` embedded digits as PNG files, over again if there are fewer."""
    from pipeline.sources.digits import DigitsSource

    folder.mkdir(parents=True, exist_ok=True)
    source = DigitsSource()
    rows = source.index().select(["location", "offset"]).to_pylist()
    for index in range(count):
        row = rows[index % len(rows)]
        (folder / f"digit-{index:06d}.png").write_bytes(source.read(row["location"], row["offset"], None))
