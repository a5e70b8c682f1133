"""What lies at a location: images, and what each of them is labelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainer.data.image_set import ImageSet

NO_LABEL = -1
MAX_LABEL = 2**31 - 1

# What is taken for an image, by the end of its name; where a sample has several, the first in this order.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "tif", "tiff", "bmp", "gif"),
    *("ppm", "pgm", "pbm", "pnm", "mpo", "apng", "dib", "jp2", "j2k"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The images of one location; `test` is its own test part where it is known to have one.

    `numbers` is int64 [N], each image's class as the location numbers it, or `NO_LABEL`; `names` those of classes that
    have one. `skipped` names what is no image of the set, each with its reason; `notes` say what else is to be known.
    """

    images: ImageSet
    numbers: NDArray[np.int64]
    names: Mapping[int, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    test: Found | None = None


def text(name: str) -> str:
    """A file's name as text that can be printed and encoded, also where its bytes are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def suffix(name: str) -> str:
    """The lower-case end of a file's name, without its dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def numbered(values: list[str | None]) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Class numbers [N] of labels that are text, and the classes' names.

    Where all of them are whole numbers they are the class numbers, and there are no names; else the distinct texts are
    the names, numbered in sorted order. An empty text and a negative number are no label.
    """
    stripped = ["" if value is None else value.strip() for value in values]
    given = [value for value in stripped if value]
    if all(_is_number(value) for value in given):
        return np.array([_class_number(value) for value in stripped], np.int64), {}
    names = sorted(set(given))
    number = {name: at for at, name in enumerate(names)} | {"": NO_LABEL}
    return np.array([number[value] for value in stripped], np.int64), dict(enumerate(names))


def _is_number(value: str) -> bool:
    return value.removeprefix("-").isdecimal() and value.isascii()


def _class_number(value: str) -> int:
    number = int(value[:12]) if value else NO_LABEL
    return number if 0 <= number <= MAX_LABEL else NO_LABEL
