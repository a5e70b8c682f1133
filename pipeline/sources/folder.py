"""A folder of image files, nested and linked as it likes.

Classes: if no image lies directly in the folder and at least two of its subfolders hold images, those subfolders are
the classes, numbered in sorted order; otherwise images have no labels. Folders named like splits (`train`, `val`) are
no classes.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import UsageError
from pipeline.sources.base import (
    INDEX_SCHEMA,
    IndexBuilder,
    UnreadableImageError,
    from_text,
    make_key,
    sorted_index,
    to_text,
)
from pipeline.sources.files import IMAGE_SUFFIXES, is_url, local_path, read_file

_SUFFIXES = frozenset(IMAGE_SUFFIXES)
SPLIT_NAMES = frozenset(["train", "training", "val", "valid", "validation", "dev", "test", "testing"])

logger = logging.getLogger(__name__)


class FolderSource:
    """Every file with an image suffix below `location`; links are followed, hidden files and folders are not."""

    kind = "folder"

    def __init__(self, location: str) -> None:
        if is_url(location):
            raise UsageError(
                f"image folders are read from local disks only, not from {location}. "
                "Copy it, or pack it into WebDataset tars, which can be read from a URL."
            )
        self.location = str(local_path(location))
        self.ignored = 0

    def index(self) -> pa.Table:
        """See `Source.index`; raises `UsageError` for a missing folder and for one without images."""
        root = Path(self.location)
        if not root.is_dir():
            found = "a file" if root.exists() else "nothing"
            raise UsageError(f"{root} is no folder: found {found} there. Give a folder that holds images.")
        walk = _Walk(self.location)
        rows = IndexBuilder()
        for name, size in walk.images():
            rows.add(make_key(name), to_text(name), size=size)
        self.ignored = walk.ignored
        table = rows.table()
        if not table.num_rows:
            raise UsageError(_nothing_found(self.location, walk))
        return sorted_index(_with_classes(table, self.location))

    def read(self, location: str, offset: int | None, size: int | None) -> bytes:
        """See `Source.read`; the file is read whole, whatever `offset` and `size`."""
        name = PurePosixPath(from_text(location))
        if name.is_absolute() or ".." in name.parts:
            raise UnreadableImageError("outside the folder of the source")
        return read_file(Path(self.location, name))


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image, by its suffix, upper or lower case; hidden files are not."""
    return not name.startswith(".") and _suffix(name) in _SUFFIXES


class _Walk:
    """One pass over a folder tree, counting what it passes over."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.ignored = 0
        self.folders = 0
        self.suffixes: Counter[str] = Counter()

    def images(self) -> Iterator[tuple[str, int | None]]:
        """Relative name and size in bytes of every image; size is None where the file cannot be reached."""
        pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        while pending:
            name, ancestors = pending.pop()
            try:
                entries, identity = self._list(name)
            except OSError as error:
                if not name:
                    raise UsageError(f"cannot list {self.root}: {error.strerror}. Make it readable.") from error
                logger.warning("cannot list %s/%s: %s", self.root, to_text(name), error.strerror)
                yield f"{name}/", None  # becomes a failed row: a folder must not be lost in silence
                continue
            if identity in ancestors:
                self._pass_over(name)  # a link to a folder that it lies in
                continue
            self.folders += 1
            for entry in entries:
                path = f"{name}/{entry.name}" if name else entry.name
                if entry.name.startswith("."):
                    self._pass_over(entry.name)
                elif _is_folder(entry):
                    pending.append((path, ancestors | {identity}))
                elif _suffix(entry.name) in _SUFFIXES:
                    yield path, _size(entry)
                else:
                    self._pass_over(entry.name)

    def _list(self, name: str) -> tuple[list[os.DirEntry[str]], tuple[int, int]]:
        folder = Path(self.root, name)
        found = folder.stat()
        with os.scandir(folder) as entries:
            return list(entries), (found.st_dev, found.st_ino)

    def _pass_over(self, name: str) -> None:
        self.ignored += 1
        self.suffixes[_suffix(name) or "none"] += 1


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except OSError:
        return None


def _with_classes(table: pa.Table, location: str) -> pa.Table:
    # `(?s)`: a file name may hold a line break.
    folders = pc.replace_substring_regex(table["location"], r"(?s)/.*", "")
    in_root = pc.sum(pc.equal(folders, table["location"])).as_py()
    classes = sorted(pc.unique(folders).to_pylist(), key=from_text)
    if in_root:
        if in_root < table.num_rows:
            stray = table["location"].filter(pc.equal(folders, table["location"]))[0].as_py()
            logger.warning(
                "%s: no labels, since %d images (such as %s) lie beside the class folders; move them for labels",
                location, in_root, stray,
            )  # fmt: skip
        return table
    if len(classes) < 2:
        return table
    if SPLIT_NAMES.issuperset(name.lower() for name in classes):
        logger.warning("%s: no labels, since its subfolders %s are splits", location, ", ".join(classes))
        return table
    labels = pc.index_in(folders, pa.array(classes)).cast(pa.int32())
    table = table.set_column(INDEX_SCHEMA.get_field_index("label"), INDEX_SCHEMA.field("label"), labels)
    return table.set_column(INDEX_SCHEMA.get_field_index("class_name"), INDEX_SCHEMA.field("class_name"), folders)


def _nothing_found(location: str, walk: _Walk) -> str:
    found = ", ".join(f"{count} .{suffix}" for suffix, count in walk.suffixes.most_common(5)) or "nothing"
    return (
        f"no image below {location}: found {found} in {walk.folders} folders. "
        f"Images are files that end in {', '.join(IMAGE_SUFFIXES)}."
    )
