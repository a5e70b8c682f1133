"""An image set of encoded files, wherever their bytes lie: in files of their own, inside tars, in the cells of a table.

Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from manifests.errors import CorruptSetError, DiffmixError
from trainer.data.labelled import pictures


class ByteReader(Protocol):
    """The bytes of a store's images, by the store's own numbers. Threads may share it."""

    def read(self, number: int, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes from `offset` on, at most `size` of them; raises OSError or `DiffmixError` if there are none."""

    def close(self) -> None:
        """Close what is open."""


class Store(Protocol):
    """Where the bytes of images lie."""

    def open(self) -> ByteReader:
        """The bytes, for reading; whoever opens closes."""

    def where(self, number: int) -> str:
        """The place of an image, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImages:
    """One real image a sample, an `ImageSet`. `label` is not known here: a task's `Subset` has it.

    `names` [N] are the keys, `numbers` int64 [N] those of the store, `sizes` int64 [N] in bytes, and `sides` int32
    [N, 2] the height and width in pixels, 0 before they are known.
    """

    url: str
    store: Store
    names: Sequence[str]
    numbers: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sides: NDArray[np.int32]
    max_pixels: int

    @classmethod
    def of(cls, url: str, store: Store, names: Sequence[str], sizes: Sequence[int], max_pixels: int) -> EncodedImages:
        """All images of a store, in its order."""
        count = len(names)
        return cls(
            url=url,
            store=store,
            names=names,
            numbers=np.arange(count),
            sizes=np.array(sizes, np.int64).reshape(count),
            sides=np.zeros((count, 2), np.int32),
            max_pixels=max_pixels,
        )

    def only(self, chosen: NDArray[np.int64]) -> EncodedImages:
        """The images `chosen`, renumbered from 0."""
        return replace(
            self,
            names=[self.names[number] for number in chosen.tolist()],
            numbers=self.numbers[chosen],
            sizes=self.sizes[chosen],
            sides=self.sides[chosen],
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_real(self) -> bool:
        """Always."""
        return True

    @property
    def has_synthetic(self) -> bool:
        """Never."""
        return False

    @property
    def num_variations(self) -> int:
        """None, 0."""
        return 0

    @property
    def label(self) -> NDArray[np.int32] | None:
        """None."""
        return None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that all images share, by their headers; None if they differ or are not known."""
        if not len(self) or not self.sides.all() or (self.sides != self.sides[0]).any():
            return None
        return int(self.sides[0, 0]), int(self.sides[0, 1])

    @property
    def encoded_bytes(self) -> int:
        """Size of all images as they are stored."""
        return int(self.sizes.sum())

    @property
    def fingerprint(self) -> str:
        """Hash of names and sizes in bytes: not of the contents, and not of where they lie."""
        digest = hashlib.sha256(self.sizes.tobytes())
        for name in self.names:
            digest.update(name.encode() + b"\0")
        return digest.hexdigest()

    def keys(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Names of images by number, in the order asked."""
        return [self.names[int(index)] for index in indices]

    def open_files(self) -> EncodedFiles:
        """See `ImageSet.open_files`."""
        return EncodedFiles(self)


class EncodedFiles:
    """The opened images of a set, `ImageFiles`."""

    def __init__(self, images: EncodedImages) -> None:
        self._images = images
        self._bytes = images.store.open()

    def pixels(self, index: int, image: int) -> NDArray[np.uint8]:
        """Upright RGB, uint8 [H, W, 3]; raises `CorruptSetError` naming what cannot be read."""
        try:
            return pictures.decode(self.bytes(index), self._images.max_pixels)
        except (ValueError, OSError, DiffmixError) as error:
            raise self.damaged(index, image, reason_of(error)) from error

    def bytes(self, index: int, offset: int = 0, size: int | None = None) -> bytes:
        """Encoded bytes of an image, see `ByteReader.read`."""
        return self._bytes.read(int(self._images.numbers[index]), offset, size)

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        """Nothing to prepare."""

    def damaged(self, index: int, image: int, reason: str) -> CorruptSetError:
        """The error that names the image and says what to do."""
        where = self._images.store.where(int(self._images.numbers[index]))
        return CorruptSetError(
            f"{where} cannot be read: {reason}. It was whole by its header when the task was opened; mend it or take "
            "it out of the set, and run the same command again"
        )

    def close(self) -> None:
        """Close what is open; no thread may read any more."""
        self._bytes.close()


def reason_of(error: Exception) -> str:
    """What to say of an image that could not be read."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)
