"""Photographs to read where none are given, and pair sets of them: no network, no files of anyone's."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from manifests import catalog
from manifests.errors import UsageError
from manifests.plan import Plan, claim
from manifests.shard import EncodedImage, EncodedVariation, Sample, ShardWriter
from manifests.storage import open_storage

_LONG, _SHORT = 500, 375  # pixels of most of ImageNet's photographs
_QUALITY = 90
_NOISE = (2.0, 8.0)  # levels: what scaling takes from a photograph, so that a file has its usual 70 kB
_SUFFIXES = (".jpg", ".jpeg")


def photographs(count: int, seed: int = 0) -> list[EncodedImage]:
    """JPEGs like ImageNet's: 500 x 375 pixels, some upright, 4:2:0 of quality 90, about 70 kB.

    Parts of scikit-learn's two sample photographs, scaled, with mild noise.
    """
    random = np.random.default_rng(seed)
    return [_jpeg(_photograph(scene, random)) for scene in _scenes(count)]


def thumbnails(count: int, seed: int = 0, side: int = 32) -> list[EncodedImage]:
    """JPEGs like CIFAR's: 32 x 32 pixels, about 1 kB, of the same photographs."""
    random = np.random.default_rng(seed)
    return [_jpeg(np.asarray(_part(scene, (side, side), random, least=0.2))) for scene in _scenes(count)]


def read_tar(path: Path, count: int) -> list[EncodedImage]:
    """The first `count` JPEGs of a tar; raises `UsageError` if there are not even two."""
    try:
        with tarfile.open(path) as tar:
            found = [image for _, image in zip(range(count), _members(tar), strict=False)]
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"--images {path}: {error}; give a WebDataset tar of JPEG photographs") from error
    if len(found) < 2:
        raise UsageError(f"--images {path} holds {len(found)} JPEG files; give a tar of at least two (*.jpg, *.jpeg)")
    return found


def _members(tar: tarfile.TarFile) -> Iterator[EncodedImage]:
    for member in tar:
        file = tar.extractfile(member) if member.name.lower().endswith(_SUFFIXES) else None
        if file is not None:
            data = file.read()
            with Image.open(io.BytesIO(data)) as image:
                yield EncodedImage(data=data, width=image.width, height=image.height)


def write_pairs(folder: Path, images: Sequence[EncodedImage], rows: int, variations: int) -> str:
    """One merged shard of `rows` rows with that many variations each, `images` over and over; returns the folder."""
    plan = Plan(
        source={"kind": "folder", "location": "bench", "fingerprint": ""},
        generator=None,
        seed=0,
        variations=variations,
        shards=1,
        rows=rows,
        limit=None,
        labelled=False,
        store_real="original",
        quality=_QUALITY,
        max_pixels=1,
    )
    storage = open_storage(str(folder))
    storage.create_folder()
    claim(storage, plan)
    writer = ShardWriter(storage, 0, generator=None, labelled=False)
    for row in range(rows):
        real, *others = (images[(row * (1 + variations) + number) % len(images)] for number in range(1 + variations))
        synthetic = [
            EncodedVariation(data=image.data, width=image.width, height=image.height, seed=number)
            for number, image in enumerate(others)
        ]
        writer.add(Sample(key=f"{row:06d}", real=real, synthetic=synthetic))
    writer.commit()
    catalog.merge(storage, plan)
    return str(folder)


def _scenes(count: int) -> Iterator[Image.Image]:
    from sklearn.datasets import load_sample_images

    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    for number in range(count):
        yield scenes[number % len(scenes)]


def _photograph(scene: Image.Image, random: np.random.Generator) -> NDArray[np.uint8]:
    upright = random.random() < 0.25
    size = (_SHORT, _LONG) if upright else (_LONG, _SHORT)
    pixels = np.asarray(_part(scene, size, random, least=0.7), np.float32)
    grain = random.normal(0, random.uniform(*_NOISE), (*pixels.shape[:2], 1))
    return (pixels + grain).round().clip(0, 255).astype(np.uint8)


def _part(scene: Image.Image, size: tuple[int, int], random: np.random.Generator, least: float) -> Image.Image:
    """A random box of the shape of `size` (width, height), at least that part of the largest, scaled to it."""
    scale = min(scene.width / size[0], scene.height / size[1]) * random.uniform(least, 1)
    width, height = scale * size[0], scale * size[1]
    left, top = random.uniform(0, scene.width - width), random.uniform(0, scene.height - height)
    return scene.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def _jpeg(pixels: NDArray[np.uint8]) -> EncodedImage:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), _QUALITY, "RGB", "420")
    return EncodedImage(data=data, width=pixels.shape[1], height=pixels.shape[0])
