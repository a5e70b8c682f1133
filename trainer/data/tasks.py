"""Tasks of `trainer finetune`: labelled images of one location, split into train, validation and test parts.

The parts are a hash of the images' keys: the same for every tuner, seed and run.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manifests.errors import UsageError
from trainer.choices import unknown
from trainer.data.image_set import ImageSet, Subset
from trainer.data.labelled import digits, locate, paths
from trainer.data.labelled.base import Found

BUILT_IN = digits.INVERTED
MAX_PIXELS = 100_000_000

_EXAMPLE = "for example --task flowers or --task train.tar,test=test.tar"
_OPTION = re.compile(r",(\w+)=")
_SHARES = (0.70, 0.85)  # of the hash's range: where train and validation end without a test part of its own
_MOST_NAMES = 10  # classes that a message lists


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What was typed: a location and, perhaps, that of the test part."""

    text: str
    location: str
    test: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Labelled images. Labels are 0 to C - 1 in all parts, and index `class_names`.

    `skipped` names every image that was left out, with the reason; `notes` say what else should be known, such as
    classes without a training image. `fingerprint` is of the images' names, sizes and labels and of the split.
    """

    name: str
    location: str
    class_names: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str


def parse(text: str) -> TaskSpec:
    """`PATH[,test=PATH]` as given to --task and --source; raises `UsageError`."""
    parts = _OPTION.split(text)
    location, options = parts[0].strip(), parts[1::2]
    for option in options:
        if option != "test":
            raise unknown("option of a task", option, ["test"])
    if len(options) > 1:
        raise UsageError(f"{text!r} has test= more than once; a task is PATH or PATH,test=PATH")
    test = parts[2].strip() if options else None
    if not location or test == "":
        raise UsageError(f"{text!r} names no {'test part' if location else 'location'}; {_EXAMPLE}")
    return TaskSpec(text=text, location=location, test=test)


def open_task(spec: TaskSpec, *, max_pixels: int = MAX_PIXELS) -> Task:
    """The task's images, found and split; raises `UsageError` for what cannot be one.

    Without a test part, of the location itself or by `test=`, images go 70/15/15 into train, validation and test; with
    one 85/15 into train and validation. Images of the test part are matched to the classes by name where both have
    names, else by number.
    """
    found = locate.find(spec.location, max_pixels)
    given = _test_part(spec, found, max_pixels)
    classes = _Classes.of(found, spec.location)
    labels = classes.labels(found.numbers)
    parts = _split(found.images, with_test=given is None)
    train, validation, *rest = (Subset(found.images, part, labels[part]) for part in parts)
    test = rest[0] if given is None else _whole(given, classes.match(given, spec))
    _check_sizes(spec, len(found.images), {"train": train, "validation": validation, "test": test})
    return Task(
        name=_name(spec.location),
        location=spec.location,
        class_names=classes.class_names,
        train=train,
        validation=validation,
        test=test,
        skipped=found.skipped if given is None else (*found.skipped, *given.skipped),
        notes=(*found.notes, *(() if given is None else given.notes), *_lacking(train, classes.class_names)),
        fingerprint=_fingerprint(classes.class_names, train, validation, test),
    )


def _whole(found: Found, labels: NDArray[np.int32]) -> Subset:
    return Subset(found.images, np.arange(len(found.images)), labels)


def _test_part(spec: TaskSpec, found: Found, max_pixels: int) -> Found | None:
    """The images of `test=`, else the location's own test part, if it has one."""
    if spec.test is None:
        return found.test
    if paths.local(spec.test) == paths.local(spec.location):
        if found.test is not None:
            return found.test
        raise UsageError(f"{spec.text!r}: the test part is what is trained on; leave test= out, 15 % will be held out")
    given = locate.find(spec.test, max_pixels)
    return given if given.test is None else given.test


@dataclass(frozen=True, slots=True, kw_only=True)
class _Classes:
    """The classes of a task: `numbers` are those of its location, ascending; `names` those that have one."""

    numbers: NDArray[np.int64]
    names: Mapping[int, str]

    @classmethod
    def of(cls, found: Found, location: str) -> _Classes:
        numbers = np.unique(found.numbers)
        classes = cls(numbers=numbers, names=found.names)
        if len(numbers) < 2:
            raise UsageError(
                f"all {len(found.images)} images of {location} are of one class, {classes.class_names[0]!r}, and a "
                "task needs two at least; where the classes are folders within that one, give its path"
            )
        return classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.names.get(number, str(number)) for number in self.numbers.tolist())

    def labels(self, numbers: NDArray[np.int64]) -> NDArray[np.int32]:
        return np.searchsorted(self.numbers, numbers).astype(np.int32)

    def match(self, test: Found, spec: TaskSpec) -> NDArray[np.int32]:
        """Labels of the images of a test part; raises `UsageError` for classes that training lacks."""
        present = np.unique(test.numbers).tolist()
        mine, theirs = _known(self.names, self.numbers.tolist()), _known(test.names, present)
        if mine is None or theirs is None:
            mine, theirs = _by_number(mine, self.numbers.tolist()), _by_number(theirs, present)
        lacking = [name for name in theirs if name not in mine]
        if lacking:
            raise UsageError(
                f"{spec.test or spec.location}: training has no class {_listed(lacking)} of the test part; it has "
                f"{_listed(list(mine))}. Both parts need the same classes, by name or, without names, by number"
            )
        number = {theirs[name]: mine[name] for name in theirs}
        return self.labels(np.array([number[found] for found in test.numbers.tolist()], np.int64))


def _known(names: Mapping[int, str], numbers: list[int]) -> dict[str, int] | None:
    """Number by name; None unless all have names, and different ones."""
    found = {unicodedata.normalize("NFC", names[number]): number for number in numbers if number in names}
    return found if len(found) == len(numbers) else None


def _by_number(names: Mapping[str, int] | None, numbers: list[int]) -> dict[str, int]:
    """Number by itself as text; by the names where these are numbers, as those of folders may be."""
    if names is not None and all(name.isascii() and name.isdecimal() for name in names):
        found = {str(int(name)): number for name, number in names.items()}
        if len(found) == len(numbers):
            return found
    return {str(number): number for number in numbers}


def _split(images: ImageSet, *, with_test: bool) -> list[NDArray[np.int64]]:
    """Indices of the parts: train, validation and, if wanted, test."""
    places = np.array([_place(key) for key in images.keys(np.arange(len(images)))])
    part = np.searchsorted(_SHARES if with_test else _SHARES[1:], places, side="right")
    return [np.flatnonzero(part == number) for number in range(3 if with_test else 2)]


def _place(key: str) -> float:
    """Where a key lies between 0 and 1, by its hash."""
    word = hashlib.blake2b(key.encode(), digest_size=8, person=b"task-split").digest()
    return int.from_bytes(word, "big") / 2**64


def _check_sizes(spec: TaskSpec, count: int, parts: Mapping[str, ImageSet]) -> None:
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        raise UsageError(
            f"{spec.text}: {count} labelled images are too few, the {empty[0]} part is empty ({sizes}); give some "
            f"dozens of images at least{'' if spec.test else ', or the test part by test=PATH'}"
        )


def _lacking(train: ImageSet, class_names: tuple[str, ...]) -> tuple[str, ...]:
    labels = train.label
    assert labels is not None
    trained = np.bincount(labels, minlength=len(class_names)) > 0
    lacking = [name for name, has in zip(class_names, trained.tolist(), strict=True) if not has]
    if not lacking:
        return ()
    return (f"{len(lacking)} of {len(class_names)} classes have no training image: {_listed(lacking)}",)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (
        f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES)
    )


def _name(location: str) -> str:
    """The file's or folder's stem, without patterns; its folder's where that only says which split it is."""
    if location in digits.NAMES or location.startswith("torchvision:"):
        return location.removeprefix("torchvision:").partition("@")[0].lower()
    path = Path(os.path.abspath(os.path.expanduser(location.partition("://")[2] or location)))  # noqa: PTH100, PTH111
    for part in (path, *path.parents):
        stem = part.name if part.is_dir() else part.name.partition(".")[0]
        stem = re.sub(r"\{[^{}]*\}|[*?\[\]]", "", stem)
        name = re.sub(r"[^\w.-]+", "-", stem).strip("-._")
        if name and not paths.split_of(name) and name not in ("images", "data"):
            return name
    return "task"


def _fingerprint(class_names: tuple[str, ...], *parts: ImageSet) -> str:
    digest = hashlib.sha256("\0".join(class_names).encode())
    for part in parts:
        digest.update(part.fingerprint.encode())
    return digest.hexdigest()
