"""Reading bytes from files and parts of files, with short reasons when that fails."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import fsspec

from pipeline.sources.base import UnreadableImageError

# What is taken for an image, by suffix; of several in one tar sample, the first in this order.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "tif", "tiff", "bmp", "gif"),
    *("ppm", "pgm", "pbm", "pnm", "mpo", "apng", "dib", "jp2", "j2k"),
)
MAX_BYTES = 2**31 - 1  # an image of the largest default pixel count, 16 bit RGBA and uncompressed, is below 1 GB

# A pipe or a device with an image's name must not block the reader for ever.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "a folder",
    errno.ELOOP: "a link that leads to itself",
    errno.ENOTDIR: "missing file",
    errno.ENAMETOOLONG: "file name too long",
    errno.ENXIO: "not a regular file",
}


def is_url(location: str) -> bool:
    """Whether `location` names a store that is read through fsspec."""
    return "://" in location and not location.startswith("file://")


def local_path(location: str) -> Path:
    """The absolute path of a local file or folder; `~` of a user who does not exist stays, and nothing is there."""
    return Path(os.path.abspath(os.path.expanduser(location)))  # noqa: PTH100, PTH111  without `..`; never raises


def read_file(path: Path) -> bytes:
    """All bytes of a regular file; raises `UnreadableImageError`."""
    return _read(path, 0, None)


def read_range(location: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of a local file or a URL; raises `UnreadableImageError`."""
    if size > MAX_BYTES:
        raise UnreadableImageError("larger than 2 GiB")
    data = _read_remote(location, offset, size) if is_url(location) else _read(Path(location), offset, size)
    if len(data) != size:
        raise UnreadableImageError("the file that holds it is shorter than it was when indexed")
    return data


def _read_remote(url: str, offset: int, size: int) -> bytes:
    if size == 0:
        return b""  # an empty range is an error for HTTP
    filesystem, path = fsspec.core.url_to_fs(url)
    try:
        data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
    except FileNotFoundError:
        raise UnreadableImageError("missing file") from None
    except OSError as error:
        raise UnreadableImageError(f"remote read failed ({type(error).__name__})") from error
    return data


def _read(path: Path, offset: int, size: int | None) -> bytes:
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise UnreadableImageError("dangling link" if path.is_symlink() else "missing file") from None
    except (OSError, ValueError) as error:
        raise UnreadableImageError(_reason(error)) from error
    try:
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UnreadableImageError("a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file")
            if size is None and found.st_size > MAX_BYTES:
                raise UnreadableImageError("larger than 2 GiB")
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UnreadableImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number is None:
        return "invalid file name"
    return _REASONS.get(number, f"read failed ({errno.errorcode.get(number, number)})")
