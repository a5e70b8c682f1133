"""What is no readable image is found when a task is opened, as far as that is cheap, and named.

Every image's header is read, and its end where that tells of a file that was cut off: about 0.1 ms an image, 10 s for
100,000. A set of at most `DECODE_WORK` is decoded whole, once: some 5,000 photographs of 500 x 375 or 100,000 images
of 32 px. What is damaged in the middle of a larger set's file stops the training that meets it, with the file's name.
The rule knows only the set itself, so that every run over it leaves out the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from manifests.errors import DiffmixError
from trainer.data.labelled import pictures
from trainer.data.labelled.encoded import EncodedFiles, EncodedImages, reason_of
from trainer.data.threads import default_workers

DECODE_WORK = 1 << 30  # pixels, and `_OVERHEAD` for each image: about ten seconds of one core
_OVERHEAD = 8192
_HEAD, _TAIL = 1 << 15, 1 << 12  # bytes
_MOST_BYTES = 1 << 31
_BLOCK = 64  # images that a thread takes at a time

Examine = Callable[[int], tuple[int, int]]  # index to sides; raises what is wrong with the image


def checked(images: EncodedImages) -> tuple[EncodedImages, NDArray[np.int64], tuple[str, ...]]:
    """The readable images with their sides, which ones of all they are, and the others with the reason for each."""
    files = images.open_files()
    try:
        sides, reasons = each(len(images), lambda index: _sides(images, files, index))
        if is_cheap(len(images), int(sides.prod(axis=1, dtype=np.int64).sum())):
            good = np.array([index for index in range(len(images)) if index not in reasons], np.int64)
            sides[good], found = each(len(good), lambda at: _decoded_sides(images, files, int(good[at])))
            reasons |= {int(good[at]): reason for at, reason in found.items()}
    finally:
        files.close()
    kept = np.array([index for index in range(len(images)) if index not in reasons], np.int64)
    skipped = tuple(f"{images.names[index]}: {reasons[index]}" for index in sorted(reasons))
    return replace(images, sides=sides).only(kept), kept, skipped


def is_cheap(count: int, pixels: int) -> bool:
    """Whether all of `count` images, with so many pixels together, are decoded when their set is opened."""
    return pixels + _OVERHEAD * count <= DECODE_WORK


def each(count: int, examine: Examine) -> tuple[NDArray[np.int32], dict[int, str]]:
    """Sides, int32 [count, 2], of all images, by several threads; and what is wrong with some of them."""
    sides, reasons = np.zeros((count, 2), np.int32), dict[int, str]()

    def block(start: int) -> None:
        for index in range(start, min(start + _BLOCK, count)):
            try:
                sides[index] = examine(index)
            except (ValueError, OSError, MemoryError, DiffmixError) as error:
                reasons[index] = reason_of(error)

    with ThreadPoolExecutor(default_workers(alone=True)) as threads:
        for _ in threads.map(block, range(0, count, _BLOCK)):
            pass
    return sides, reasons


def _sides(images: EncodedImages, files: EncodedFiles, index: int) -> tuple[int, int]:
    """By the header; the whole image is decoded where its end is not as it should be."""
    size = int(images.sizes[index])
    if size > _MOST_BYTES:
        raise ValueError("it is larger than 2 GiB")
    head = files.bytes(index, 0, _HEAD)
    try:
        sides = pictures.sides(head, images.max_pixels)
    except ValueError:
        if size <= _HEAD:
            raise
        sides = pictures.sides(files.bytes(index), images.max_pixels)  # a header that is longer, or at the end
    tail = head if size <= _HEAD else files.bytes(index, size - _TAIL)
    return sides if pictures.looks_whole(head, tail, size) else _decoded_sides(images, files, index)


def _decoded_sides(images: EncodedImages, files: EncodedFiles, index: int) -> tuple[int, int]:
    height, width, _ = pictures.decode(files.bytes(index), images.max_pixels).shape
    return height, width
