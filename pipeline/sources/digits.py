"""The built-in handwritten digits: the train split, which is all that the embedded generator ever saw."""

from __future__ import annotations

import functools
import io

import pyarrow as pa
from PIL import Image

from manifests.errors import UsageError
from pipeline.embedded import digits
from pipeline.sources.base import IndexBuilder, UnreadableImageError, sorted_index


class DigitsSource:
    """32x32 RGB images of ten classes; `location` of a row is its name and `offset` its number in the split."""

    kind = "digits"
    location = "digits"
    ignored = 0

    def __init__(self, location: str = "digits") -> None:
        if location != "digits":
            raise UsageError(f"the built-in digits lie nowhere, so {location!r} cannot be found: say just digits.")

    def index(self) -> pa.Table:
        """See `Source.index`."""
        _, labels, names = _train_split()
        rows = IndexBuilder()
        for number, (label, name) in enumerate(zip(labels.tolist(), names, strict=True)):
            rows.add(name, name, label=label, class_name=str(label), offset=number)
        return sorted_index(rows.table())

    def read(self, location: str, offset: int | None, size: int | None) -> bytes:
        """See `Source.read`; a PNG."""
        images, _, names = _train_split()
        if offset is None or not 0 <= offset < len(names) or names[offset] != location:
            raise UnreadableImageError("not one of the built-in digits")
        buffer = io.BytesIO()
        Image.fromarray(images[offset]).save(buffer, "PNG")
        return buffer.getvalue()


@functools.cache
def _train_split() -> digits.Digits:
    return digits.load("train")
