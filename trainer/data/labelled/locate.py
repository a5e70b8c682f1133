"""From what was typed to the labelled images there: what a location is, is told by what lies at it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from manifests.errors import UsageError
from manifests.storage import explained
from trainer.data.image_set import Subset
from trainer.data.labelled import check, digits, folder, pairs, paths, tables, tars, torchvision_sets
from trainer.data.labelled.base import NO_LABEL, Found, text
from trainer.data.labelled.encoded import EncodedImages

KINDS = (
    "a folder with a folder of images for each class, WebDataset tars (a file, a glob, train-{000..007}.tar, "
    "a folder), Parquet files, a saved Hugging Face dataset, a pair set, torchvision:NAME, digits or digits-inverted"
)


def find(location: str, max_pixels: int) -> Found:
    """The readable and labelled images at a location, the others named in `skipped`.

    Raises `UsageError` where there are none, `DiffmixError` for what cannot be read.
    """
    with explained("read", location):
        found = _labelled(_open(location, max_pixels), location)
    if isinstance(found.images, EncodedImages):
        images, kept, skipped = check.checked(found.images)
        found = replace(found, images=images, numbers=found.numbers[kept], skipped=(*found.skipped, *skipped))
    if not len(found.images):
        raise UsageError(f"none of the {len(found.skipped)} images of {location} can be read: {found.skipped[0]}, ...")
    return found


def _open(location: str, max_pixels: int) -> Found:
    if location in digits.NAMES:
        return digits.find(location)
    if location.startswith(torchvision_sets.PREFIX):
        return torchvision_sets.find(location, max_pixels)
    if "://" in location and not location.startswith("file://"):
        return pairs.find(location)
    path = Path(os.path.expanduser(location.removeprefix("file://")))  # noqa: PTH111  `~` of nobody stays
    if path.is_dir():
        return _open_folder(path, max_pixels)
    files = paths.expand(str(path))
    if not files:
        raise UsageError(f"there is nothing at {location}; a task is {KINDS}")
    return _open_files(files, path, max_pixels)


def _open_folder(path: Path, max_pixels: int) -> Found:
    if (path / "plan.json").is_file():
        return pairs.find(str(path))
    if any((path / mark).is_file() for mark in tables.SAVED_MARKS):
        return tables.find(path, [], str(path), max_pixels)
    for pattern in ("*.tar", "*.parquet", "data/*.parquet"):
        files = sorted(file for file in path.glob(pattern) if not file.name.startswith("."))
        if files and folder.has_classes(path):
            return _with_files_beside(folder.find(path, max_pixels), files)
        if files:
            paths.refuse_splits(files[0].parent, files)
            return _open_files(files, path, max_pixels)
    return folder.find(path, max_pixels)


def _with_files_beside(found: Found, files: list[Path]) -> Found:
    names = ", ".join(text(file.name) for file in files[:3]) + (", ..." if len(files) > 3 else "")
    note = f"class folders are taken and {names} beside them passed over; --task {files[0]} takes that"
    return replace(found, notes=(*found.notes, note))


def _open_files(files: list[Path], path: Path, max_pixels: int) -> Found:
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".parquet"}:
        return tables.find(path if path.is_dir() else files[0], files, str(path), max_pixels)
    if kinds == {".tar"}:
        return tars.find(files, str(path), max_pixels)
    raise UsageError(f"{path} is {', '.join(sorted(kind or 'a file' for kind in kinds))}; a task is {KINDS}")


def _labelled(found: Found, location: str) -> Found:
    """Without the images that have no label, which are named; all the same for the test part."""
    test = None if found.test is None else _labelled(found.test, location)
    has_label = found.numbers != NO_LABEL
    if not has_label.any():
        raise UsageError(
            f"the {len(found.images)} images of {location} have no labels, and a task needs a class for each; in tars "
            "that is KEY.cls beside KEY.jpg, in tables a column `label`, in a folder a folder for each class"
        )
    if has_label.all():
        return replace(found, test=test)
    chosen = np.flatnonzero(has_label)
    lost = found.images.keys(np.flatnonzero(~has_label))
    images = found.images.only(chosen) if isinstance(found.images, EncodedImages) else Subset(found.images, chosen)
    skipped = (*found.skipped, *(f"{key}: no label" for key in lost))
    return replace(found, images=images, numbers=found.numbers[chosen], skipped=skipped, test=test)
