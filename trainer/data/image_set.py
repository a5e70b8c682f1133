"""What readers, the loader and evaluation need of a set of images: pair sets have it (`Rows`), so have tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from manifests.errors import CorruptSetError


class ImageFiles(Protocol):
    """The images of a set, opened for reading. Threads may share it."""

    def pixels(self, index: int, image: int) -> NDArray[np.uint8]:
        """Uint8 [H, W, 3] of an image of sample `index`: -1 is the real one, k >= 0 variation k.

        Raises `CorruptSetError` naming the image if its bytes are no picture, `DiffmixError` if there are none.
        """

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        """Prepare for images, [..., B], of samples `indices`, [B], where that is faster at once than by and by."""

    def damaged(self, index: int, image: int, reason: str) -> CorruptSetError:
        """The error to raise for an image that is not what its set says."""

    def close(self) -> None:
        """Close what is open; no thread may read any more."""


class ImageSet(Protocol):
    """N samples, numbered from 0, of one real image or of `num_variations` synthetic ones, or of both."""

    @property
    def url(self) -> str:
        """Where the set lies, for messages."""

    @property
    def has_real(self) -> bool:
        """Whether every sample has a real image."""

    @property
    def has_synthetic(self) -> bool:
        """Whether every sample has variations."""

    @property
    def num_variations(self) -> int:
        """Variations of every sample."""

    def __len__(self) -> int:
        """Samples."""

    @property
    def label(self) -> NDArray[np.int32] | None:
        """Class number of each sample, int32 [N]; None unless every one has a label."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that all images are known to share; None if they differ, or that is unknown."""

    @property
    def encoded_bytes(self) -> int:
        """About the size of all images as they are stored."""

    @property
    def fingerprint(self) -> str:
        """Hash of what the set is: a stream of samples goes on only over the same ones."""

    def keys(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Keys of samples by number, in the order asked."""

    def open_files(self) -> ImageFiles:
        """The images, for reading; whoever opens closes."""


class Subset:
    """Some samples of a set, renumbered from 0 in the order given; `label` replaces the set's own labels.

    Args:
        whole: the set.
        indices: which of its samples, int64 [N].
        label: int32 [N]; None keeps those of the set.
    """

    def __init__(self, whole: ImageSet, indices: NDArray[np.int64], label: NDArray[np.int32] | None = None) -> None:
        self.whole = whole
        self.indices = np.asarray(indices, np.int64)
        self.url = whole.url
        self.has_real, self.has_synthetic = whole.has_real, whole.has_synthetic
        self.num_variations = whole.num_variations
        self._label = label

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def label(self) -> NDArray[np.int32] | None:
        """Class number of each sample, int32 [N]; None where neither subset nor set has them."""
        if self._label is not None:
            return self._label
        labels = self.whole.label
        return None if labels is None else labels[self.indices]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """That of the whole set, None too where only other samples differ."""
        return self.whole.image_size

    @property
    def encoded_bytes(self) -> int:
        """The subset's share of the whole set, by count."""
        return self.whole.encoded_bytes * len(self) // max(1, len(self.whole))

    @property
    def fingerprint(self) -> str:
        """Hash of the whole set's and of what was chosen."""
        digest = hashlib.sha256(self.whole.fingerprint.encode())
        digest.update(self.indices.tobytes())
        digest.update(b"" if self._label is None else self._label.tobytes())
        return digest.hexdigest()

    def keys(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Keys of samples by number, in the order asked."""
        return self.whole.keys(self.indices[np.asarray(indices, np.int64)])

    def open_files(self) -> ImageFiles:
        """See `ImageSet.open_files`."""
        return _SubsetFiles(self.whole.open_files(), self.indices)


class _SubsetFiles:
    def __init__(self, whole: ImageFiles, indices: NDArray[np.int64]) -> None:
        self._whole, self._indices = whole, indices

    def pixels(self, index: int, image: int) -> NDArray[np.uint8]:
        return self._whole.pixels(int(self._indices[index]), image)

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        self._whole.expect(self._indices[indices], images)

    def damaged(self, index: int, image: int, reason: str) -> CorruptSetError:
        return self._whole.damaged(int(self._indices[index]), image, reason)

    def close(self) -> None:
        self._whole.close()
