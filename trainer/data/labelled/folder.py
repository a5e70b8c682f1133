"""A folder with a folder of images for each class, nested and linked as it likes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from manifests.errors import UsageError
from trainer.data.labelled.base import IMAGE_SUFFIXES, Found, suffix, text
from trainer.data.labelled.encoded import EncodedImages
from trainer.data.labelled.paths import refuse_splits

_SUFFIXES = frozenset(IMAGE_SUFFIXES)


def find(folder: Path, max_pixels: int) -> Found:
    """The images below each subfolder, whose sorted names are the classes; hidden files and others are passed over.

    Raises `UsageError` where there are no class folders, or several splits.
    """
    tree = _Tree(folder)
    entries = sorted(tree.entries(folder), key=lambda entry: entry.name)
    classes = [Path(entry.path) for entry in entries if tree.is_folder(entry)]
    for entry in entries:
        if not tree.is_folder(entry) and suffix(entry.name) in _SUFFIXES:
            tree.skipped.append(f"{text(entry.name)}: no label, it lies beside the class folders")
    refuse_splits(folder, classes)
    names: list[str] = []
    numbers: list[int] = []
    for place in classes:
        before = len(tree.files)
        tree.walk(place)
        if len(tree.files) == before:
            tree.skipped.append(f"{text(place.name)}/: no images in this folder")
            continue
        numbers += [len(names)] * (len(tree.files) - before)
        names.append(text(place.name))
    if not tree.files:
        raise UsageError(_nothing(folder, tree, classes))
    keys = [text(path.relative_to(folder).as_posix()) for path in tree.files]
    images = EncodedImages.of(str(folder), FolderStore(tuple(tree.files)), keys, tree.sizes, max_pixels)
    found = np.array(numbers, np.int64)
    return Found(images=images, numbers=found, names=dict(enumerate(names)), skipped=tuple(tree.skipped))


def has_classes(folder: Path) -> bool:
    """Whether some folder in it that is not hidden holds an image."""
    for entry in _Tree(folder).entries(folder):
        if entry.is_dir():
            for _, _, names in os.walk(entry.path):
                if any(suffix(name) in _SUFFIXES for name in names):
                    return True
    return False


@dataclass(slots=True)
class _Tree:
    """One pass over a folder's classes."""

    root: Path
    files: list[Path] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder and not hidden."""
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if folder == self.root:
                raise UsageError(f"cannot list {folder}: {error.strerror}; make it readable") from error
            self._skip(folder, error.strerror or "it cannot be listed")
            return []

    def is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link that leads to itself
            return False

    def walk(self, folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Add the images below a folder, in sorted order."""
        try:
            found = folder.stat()
        except OSError as error:
            return self._skip(folder, error.strerror or "it cannot be listed")
        if (found.st_dev, found.st_ino) in above:
            return None  # a link to a folder that it lies in
        for entry in sorted(self.entries(folder), key=lambda entry: entry.name):
            if self.is_folder(entry):
                self.walk(Path(entry.path), above | {(found.st_dev, found.st_ino)})
            elif suffix(entry.name) in _SUFFIXES:
                self._add(entry)
        return None

    def _add(self, entry: os.DirEntry[str]) -> None:
        try:
            found = entry.stat()
        except OSError as error:
            return self._skip(Path(entry.path), error.strerror or "it cannot be reached")
        if not stat.S_ISREG(found.st_mode):
            return self._skip(Path(entry.path), "not a regular file")
        self.files.append(Path(entry.path))
        self.sizes.append(found.st_size)
        return None

    def _skip(self, path: Path, reason: str) -> None:
        self.skipped.append(f"{text(path.relative_to(self.root).as_posix())}: {reason}")


@dataclass(frozen=True, slots=True)
class FolderStore:
    """Images that are files of their own."""

    files: tuple[Path, ...]

    def open(self) -> FolderStore:
        """Itself: a file is opened for the time of one read."""
        return self

    def where(self, number: int) -> str:
        """The file's path."""
        return text(str(self.files[number]))

    def read(self, number: int, offset: int = 0, size: int | None = None) -> bytes:
        """See `ByteReader.read`."""
        with self.files[number].open("rb", buffering=0) as file:
            if offset:
                file.seek(offset)
            return file.readall() if size is None else file.read(size)

    def close(self) -> None:
        """Nothing is open."""


def _nothing(folder: Path, tree: _Tree, classes: list[Path]) -> str:
    inside = [entry.name for entry in tree.entries(folder)]
    images = sum(suffix(name) in _SUFFIXES for name in inside)
    if images:
        return (
            f"{folder} has {images} images and no class folders, so that they have no labels; put the images of each "
            f"class into a folder of its own, such as {folder}/cat/1.jpg and {folder}/dog/2.jpg"
        )
    held = ", ".join(text(name) for name in _some(inside)) or "nothing"
    where = f"its {len(classes)} folders hold no images" if classes else f"it holds {held}"
    return (
        f"no labelled images in {folder}: {where}. A task is a folder with a folder of images for each class, "
        "WebDataset tars, Parquet files, a saved Hugging Face dataset or a pair set, for example --task flowers"
    )


def _some(names: list[str]) -> Iterator[str]:
    yield from sorted(names)[:5]
    if len(names) > 5:
        yield "..."
