"""An image set whose pixels are in memory already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manifests.errors import CorruptSetError


class ArrayImages:
    """One real image a sample, an `ImageSet`: `images` is uint8 [N, H, W, 3], `names` are the N keys."""

    has_real, has_synthetic, num_variations = True, False, 0
    label: NDArray[np.int32] | None = None

    def __init__(self, url: str, images: NDArray[np.uint8], names: Sequence[str]) -> None:
        self.url = url
        self.images = images
        self._names = names

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def encoded_bytes(self) -> int:
        """Size of all pixels."""
        return self.images.nbytes

    @property
    def fingerprint(self) -> str:
        """Hash of names and pixels."""
        digest = hashlib.sha256("\0".join(self._names).encode())
        digest.update(self.images.tobytes())
        return digest.hexdigest()

    def keys(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Names of images by number, in the order asked."""
        return [self._names[int(index)] for index in indices]

    def open_files(self) -> ArrayImages:
        """Itself: there is nothing to open."""
        return self

    def pixels(self, index: int, image: int) -> NDArray[np.uint8]:
        """See `ImageFiles.pixels`."""
        return self.images[index]

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        """Nothing to prepare."""

    def damaged(self, index: int, image: int, reason: str) -> CorruptSetError:
        """See `ImageFiles.damaged`."""
        return CorruptSetError(f"{self._names[index]} of {self.url}: {reason}")

    def close(self) -> None:
        """Nothing is open."""
