"""A SHA-256 inside the Parquet file that it covers, so that any flipped byte of it is found without a second file.

The file is written with 64 zeros as the value of a key in its footer, hashed like that, and the zeros are replaced by
the hash: same length, so the file stays valid Parquet for every reader.
"""

from __future__ import annotations

import hashlib
from typing import IO

_KEY = b"diffmix.sha256"
_ZEROS = b"0" * 64
_TAIL = 1 << 20  # footers are far smaller; the key is looked for in a file's last bytes only
_CHUNK = 1 << 22

PLACEHOLDER = {_KEY.decode(): _ZEROS.decode()}


def seal(file: IO[bytes]) -> None:
    """Replace the placeholder of a complete Parquet file, open for reading and writing, by the hash of its bytes."""
    position = _value_position(file)
    if position is None:
        raise ValueError("the file holds no checksum placeholder")
    digest = _digest(file, position)
    file.seek(position)
    file.write(digest)
    file.seek(0, 2)


def sealed_value(file: IO[bytes]) -> str | None:
    """The hash recorded in a sealed file, unchecked; None if there is none."""
    position = _value_position(file)
    if position is None:
        return None
    file.seek(position)
    return file.read(64).decode("ascii", "replace")


def is_sound(file: IO[bytes]) -> bool:
    """Whether a sealed file holds exactly the bytes that were sealed."""
    position = _value_position(file)
    if position is None:
        return False
    file.seek(position)
    return file.read(64) == _digest(file, position)


def sha256(file: IO[bytes]) -> str:
    """Hexadecimal SHA-256 of a whole file."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _value_position(file: IO[bytes]) -> int | None:
    size = file.seek(0, 2)
    start = max(0, size - _TAIL)
    file.seek(start)
    tail = file.read(size - start)
    found = tail.rfind(_KEY)
    if found < 0:
        return None
    # Thrift's compact protocol: after the key, one byte of field header and one of length (64), then the value.
    position = start + found + len(_KEY) + 2
    return position if position + 64 <= size else None


def _digest(file: IO[bytes], position: int) -> bytes:
    digest = hashlib.sha256()
    file.seek(0)
    remaining = position
    while remaining:
        chunk = file.read(min(_CHUNK, remaining))
        digest.update(chunk)
        remaining -= len(chunk)
    digest.update(_ZEROS)
    file.seek(position + 64)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest().encode()
