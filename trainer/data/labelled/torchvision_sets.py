"""Datasets of torchvision that are on disk: `torchvision:NAME` or `torchvision:NAME@ROOT`. Nothing is fetched."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests.errors import CorruptSetError, UsageError
from trainer.choices import nearest
from trainer.data.image_set import Subset
from trainer.data.labelled import check, pictures
from trainer.data.labelled.base import NO_LABEL, Found
from trainer.data.rows import REAL

PREFIX = "torchvision:"
DEFAULT_ROOT = "data"

_NO_IMAGES_ON_DISK = ("FakeData", "ImageFolder", "DatasetFolder", "VisionDataset", "wrap_dataset_for_transforms_v2")
_TRAIN = ("train", "trainval", "train-standard", "background")
_TEST = ("test", "val", "valid", "evaluation")


def find(location: str, max_pixels: int) -> Found:
    """The training split, with the test split (where there is none, the validation split) as its test part.

    A set without splits has no test part. Raises `UsageError` for names that are no classification set, and for sets
    that are not on disk.
    """
    name, _, root = location.removeprefix(PREFIX).partition("@")
    maker = _maker(name)
    folder = Path(root or DEFAULT_ROOT).expanduser()
    train, test = _splits(maker, name, folder)
    found = None if test is None else _found(test, name, "test", max_pixels)
    return _found(train, name, "train", max_pixels, found)


def _maker(name: str) -> Callable[..., Any]:
    from torchvision import datasets

    if name in _NO_IMAGES_ON_DISK:
        raise UsageError(
            f"torchvision:{name} holds no images of its own; give a dataset such as torchvision:CIFAR10, or the path "
            "of a folder with class folders"
        )
    if name not in datasets.__all__:
        meant = nearest(name, datasets.__all__, alike=0.4)
        raise UsageError(
            f"torchvision has no dataset {name!r}{f'; did you mean torchvision:{meant}?' if meant else ''} Its names "
            "are those of torchvision.datasets"
        )
    maker: Callable[..., Any] = getattr(datasets, name)
    return maker


def _splits(maker: Callable[..., Any], name: str, root: Path) -> tuple[Any, Any]:
    """The training part and, where the dataset has one, the test part."""
    takes = inspect.signature(maker).parameters
    needed = [
        each
        for each, parameter in takes.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and each != "root"
    ]
    if needed or "root" not in takes:
        raise UsageError(
            f"torchvision:{name} needs more than a folder ({', '.join(needed)}); unpack it into class folders"
        )
    fixed = {"download": False} if "download" in takes else {}
    if "train" in takes:
        return _opened(maker, name, root, [{"train": True}], fixed), _opened(
            maker, name, root, [{"train": False}], fixed
        )
    if "split" not in takes:
        return _opened(maker, name, root, [{}], fixed), None
    train = _opened(maker, name, root, [{"split": split} for split in _TRAIN], fixed)
    return train, _opened(maker, name, root, [{"split": split} for split in _TEST], fixed)


def _opened(
    maker: Callable[..., Any], name: str, root: Path, variants: Sequence[dict[str, Any]], fixed: dict[str, Any]
) -> Any:
    """The dataset with the first arguments that it knows."""
    said = ""
    for arguments in variants:
        try:
            return maker(root=str(root), **arguments, **fixed)
        except ValueError as error:  # the dataset has no split of this name
            said = said or str(error)
        except Exception as error:  # what the dataset's own reader meets: nothing there, damage, a missing package
            said = " ".join(str(error).split()) or type(error).__name__
            break
    raise UsageError(
        f"torchvision:{name} is not on disk: looked in {root.absolute()} ({said}). Nothing is downloaded here; fetch "
        f"it with torchvision.datasets.{name}({str(root)!r}, download=True), or name its place: torchvision:{name}@ROOT"
    )


def _found(dataset: Any, name: str, part: str, max_pixels: int, test: Found | None = None) -> Found:
    images = TorchvisionImages(dataset, name, part, max_pixels)
    numbers = _targets(dataset, images, name)
    reasons = images.measure()
    good = np.array([index for index in range(len(images)) if index not in reasons], np.int64)
    skipped = tuple(f"{images.keys([index])[0]}: {reason}" for index, reason in sorted(reasons.items()))
    chosen = Subset(images, good)
    return Found(images=chosen, numbers=numbers[good], names=_names(dataset), skipped=skipped, test=test)


class TorchvisionImages:
    """The images of a dataset, an `ImageSet`; those in files of their own are decoded by torchvision."""

    has_real, has_synthetic, num_variations = True, False, 0
    label: NDArray[np.int32] | None = None

    def __init__(self, dataset: Any, name: str, part: str, max_pixels: int) -> None:
        self.dataset = dataset
        self.url = f"{PREFIX}{name} ({part})"
        self._part = part
        self._max_pixels = max_pixels
        self._is_array = hasattr(getattr(dataset, "data", None), "shape")  # in memory, all of one size
        self._sides = np.zeros((len(dataset), 2), np.int32)

    def __len__(self) -> int:
        return len(self._sides)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that all readable images share; None if they differ or were not measured."""
        known = self._sides[self._sides[:, 0] > 0]
        if not len(known) or (known != known[0]).any():
            return None
        return int(known[0, 0]), int(known[0, 1])

    @property
    def encoded_bytes(self) -> int:
        """Size of the pixels, as far as it is known."""
        return 3 * int(self._sides.prod(axis=1, dtype=np.int64).sum())

    @property
    def fingerprint(self) -> str:
        """Hash of the dataset's name and length, and of its pixels where they are in memory."""
        digest = hashlib.sha256(f"{self.url} {len(self)}".encode())
        if self._is_array:
            digest.update(np.ascontiguousarray(self.dataset.data).tobytes())
        return digest.hexdigest()

    def keys(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Part and number of images, in the order asked."""
        return [f"{self._part}-{int(index):07d}" for index in indices]

    def open_files(self) -> TorchvisionImages:
        """Itself: the dataset opens its files for the time of one read."""
        return self

    def pixels(self, index: int, image: int) -> NDArray[np.uint8]:
        """See `ImageFiles.pixels`."""
        try:
            return pictures.upright(self.dataset[index][0], self._max_pixels)
        except Exception as error:  # a dataset raises what its files make Pillow raise
            raise self.damaged(index, image, " ".join(str(error).split()) or type(error).__name__) from error

    def expect(self, indices: NDArray[np.int64], images: NDArray[np.int16]) -> None:
        """Nothing to prepare."""

    def damaged(self, index: int, image: int, reason: str) -> CorruptSetError:
        """See `ImageFiles.damaged`."""
        return CorruptSetError(f"image {index} of {self.url} cannot be read: {reason}; fetch the dataset again")

    def close(self) -> None:
        """Nothing is open."""

    def measure(self) -> dict[int, str]:
        """Learn the images' sides, as far as that is cheap; returns what is wrong with some of them, see `check`."""
        first = next(
            (found for index in range(min(len(self), 10)) if (found := self._measured(index)) is not None), None
        )
        if first is None:
            return {}
        if self._is_array:
            self._sides[:] = first
        elif check.is_cheap(len(self), first[0] * first[1] * len(self)):
            self._sides, reasons = check.each(len(self), lambda index: self.pixels(index, REAL).shape[:2])
            return reasons
        return {}

    def _measured(self, index: int) -> tuple[int, int] | None:
        try:
            height, width, _ = self.pixels(index, REAL).shape
        except CorruptSetError:
            return None
        return height, width


def _targets(dataset: Any, images: TorchvisionImages, name: str) -> NDArray[np.int64]:
    """Class numbers, int64 [N]: as the dataset keeps them where that agrees with what it returns, else one by one."""
    some = _returned(dataset, np.unique(np.linspace(0, len(dataset) - 1, 7, dtype=np.int64)).tolist())
    if not some or not all(_is_number(target) for target in some.values()):
        kinds = ", ".join(sorted({type(target).__name__ for target in some.values()})) or "nothing readable"
        raise UsageError(
            f"torchvision:{name} gives no class number with its images ({kinds}); take one for classification"
        )
    for attribute in ("targets", "labels", "_labels", "y"):
        kept = np.asarray(getattr(dataset, attribute, ()))
        is_list = kept.shape == (len(dataset),) and kept.dtype.kind in "iu"
        if is_list and all(kept[index] == target for index, target in some.items()):
            return kept.astype(np.int64)
    all_targets = _returned(dataset, range(len(dataset)))
    return np.array([all_targets.get(index, NO_LABEL) for index in range(len(dataset))], np.int64)


def _returned(dataset: Any, indices: Iterable[int]) -> dict[int, Any]:
    """Second of what the dataset returns for each index, without those that cannot be read."""
    found = {}
    for index in indices:
        with contextlib.suppress(Exception):  # as in `TorchvisionImages.pixels`; `measure` names them
            found[index] = dataset[index][1]
    return found


def _is_number(target: Any) -> bool:
    return isinstance(target, int | np.integer) and not isinstance(target, bool)


def _names(dataset: Any) -> dict[int, str]:
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or ()
    return {number: name if isinstance(name, str) else ", ".join(map(str, name)) for number, name in enumerate(classes)}
