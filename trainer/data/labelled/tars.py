"""WebDataset tars: samples KEY.jpg + KEY.cls, the images read by offset after one pass over the tars' headers.

A sample is what WebDataset takes for one: members that share folder and base name up to its first dot. A member's
name never becomes a path.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from manifests.errors import CorruptSetError, UsageError
from manifests.storage import explained
from trainer.data.labelled.base import IMAGE_SUFFIXES, Found, numbered, suffix, text
from trainer.data.labelled.encoded import EncodedImages
from trainer.data.open_files import OpenFiles

_RANK = {name: rank for rank, name in enumerate(IMAGE_SUFFIXES)}
_MOST_LABEL_BYTES = 1 << 20  # of a `.cls` or `.json`: a larger one is no label
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def find(tars: list[Path], url: str, max_pixels: int) -> Found:
    """The samples with an image; labels are `.cls`, a number or a name, or `label` of a `.json`.

    Names of numbered classes come from a `classes.txt` beside the tars, one a line, if there is one. Raises
    `UsageError` for tars without images, `CorruptSetError` for damaged ones.
    """
    samples = [sample for number, tar in enumerate(tars) for sample in _samples(tar, number)]
    good = [sample for sample in samples if sample.image is not None and not sample.fault]
    if not good:
        raise UsageError(
            f"no images in the {len(tars)} tar(s) of {url}; a sample of a WebDataset tar is KEY.jpg (or another image) "
            "with its class in KEY.cls"
        )
    places = np.array([(sample.tar, sample.offset, sample.size) for sample in good], np.int64)
    sizes = [sample.size for sample in good]
    images = EncodedImages.of(url, TarStore(tuple(tars), places), _keys(good, tars), sizes, max_pixels)
    numbers, names = numbered([sample.label for sample in good])
    names = names or _names_beside(tars[0], int(numbers.max()))
    lost = [sample for sample in samples if sample.fault or (sample.image is None and sample.label)]
    skipped = tuple(f"{tars[sample.tar].name}/{text(sample.name)}: {sample.fault or 'no image'}" for sample in lost)
    return Found(images=images, numbers=numbers, names=names, skipped=skipped, notes=_others(good))


@dataclass(frozen=True, slots=True)
class TarStore:
    """Images inside local tars; `places` is int64 [N, 3]: number of the tar, offset and size in bytes."""

    tars: tuple[Path, ...]
    places: NDArray[np.int64]

    def open(self) -> _TarBytes:
        """See `Store.open`."""
        return _TarBytes(self)

    def where(self, number: int) -> str:
        """The tar and the bytes in it."""
        tar, offset, size = self.places[number].tolist()
        return f"the image at bytes {offset} to {offset + size} of {self.tars[tar]}"


class _TarBytes:
    def __init__(self, store: TarStore) -> None:
        self._store = store
        self._files = OpenFiles()

    def read(self, number: int, offset: int = 0, size: int | None = None) -> bytes:
        tar, start, length = self._store.places[number].tolist()
        wanted = max(0, length - offset if size is None else min(size, length - offset))
        data = self._files.read(self._store.tars[tar], start + offset, wanted)
        if len(data) < wanted:
            raise ValueError("its tar is shorter than it was when the task was opened")
        return data

    def close(self) -> None:
        self._files.close()


@dataclass(slots=True)
class _Sample:
    """One sample of a tar; `image` is the end of the chosen image's name, None while there is none."""

    name: str
    tar: int
    image: str | None = None
    offset: int = 0
    size: int = 0
    label: str | None = None
    fault: str = ""
    others: int = 0  # images that were not chosen
    ends: set[str] = field(default_factory=set)


def _samples(path: Path, number: int) -> Iterator[_Sample]:
    """In order of their first member; several of one name, as when a tar was appended to, stay several."""
    groups: dict[str, list[_Sample]] = {}
    with explained("read", str(path)), path.open("rb") as file:
        for member in _members(file, path):
            folder, _, base = member.name.rpartition("/")
            name, _, end = base.partition(".")
            if not name or not end:  # also hidden files
                continue
            key = f"{folder}/{name}".removeprefix("./").lstrip("/")
            group = groups.setdefault(key, [_Sample(key, number)])
            if end in group[-1].ends:
                group.append(_Sample(key, number))
            _add(group[-1], end, member, file)
    for group in groups.values():
        yield from group


def _add(sample: _Sample, end: str, member: tarfile.TarInfo, file: IO[bytes]) -> None:
    sample.ends.add(end)
    kind = suffix(f".{end}")
    if kind == "cls" and "." not in end:
        sample.label = _content(member, file)
    elif kind == "json" and "." not in end and sample.label is None:
        sample.label = _label_in(_content(member, file))
    elif kind in _RANK:
        sample.others += sample.image is not None
        if sample.image is not None and _order(end) >= _order(sample.image):
            return
        stored = member.isreg() and not member.issparse()
        sample.image, sample.offset, sample.size = end, member.offset_data, member.size
        sample.fault = "" if stored else "a link or a sparse file inside a tar"


def _others(samples: list[_Sample]) -> tuple[str, ...]:
    """What is said of samples with several images: perhaps they were meant as samples of their own."""
    several = [sample for sample in samples if sample.others]
    if not several:
        return ()
    others = sum(sample.others for sample in several)
    first = f"{text(several[0].name)}, of which {text(several[0].image or '')} is taken"
    return (
        f"{len(several)} samples have several images and {others} of these are passed over, as in {first}; a key ends "
        "at a name's first dot",
    )


def _order(end: str) -> tuple[int, int]:
    """Which of a sample's images is taken: `jpg` before `png`, and both before `mask.png`."""
    return end.count("."), _RANK[suffix(f".{end}")]


def _members(file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    """Every file of a tar; raises for what `tarfile` takes for the end of one: damaged headers, tars that are cut."""
    _refuse_compressed(file, path)
    position = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header
                if member.size < 0 or tar.offset <= position:
                    raise tarfile.ReadError("impossible size")
                position = tar.offset
                if not member.isdir():
                    yield member
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise CorruptSetError(
            f"{path} is no whole tar: {error} (after byte {position}); fetch it again, or pack it anew"
        ) from error


def _refuse_compressed(file: IO[bytes], path: Path) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(
                f"{path} is compressed ({name}), its images cannot be read one by one; decompress it first"
            )


def _check_end(file: IO[bytes], position: int) -> None:
    file.seek(position)
    rest = file.read(1 << 15)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off, the end mark is missing")
    if any(rest):
        raise tarfile.ReadError("damaged header, or another tar behind this one's end")


def _content(member: tarfile.TarInfo, file: IO[bytes]) -> str | None:
    if not member.isreg() or member.size > _MOST_LABEL_BYTES:
        return None
    file.seek(member.offset_data)
    return file.read(member.size).decode("utf-8", "backslashreplace")


def _label_in(content: str | None) -> str | None:
    """The value of `label` of a JSON object, a whole number or a text."""
    try:
        found = json.loads(content or "null")
    except (ValueError, RecursionError):
        return None
    label = found.get("label") if isinstance(found, Mapping) else None
    return str(label) if isinstance(label, int | str) and not isinstance(label, bool) else None


def _keys(samples: list[_Sample], tars: list[Path]) -> list[str]:
    """Unique ones: the samples' names, with their tar's where tars share some, numbered where one tar repeats them."""
    names = [text(sample.name) for sample in samples]
    if len(set(names)) < len(names) and len(tars) > 1:
        names = [f"{text(tars[sample.tar].name)}/{name}" for sample, name in zip(samples, names, strict=True)]
    seen: Counter[str] = Counter()
    for at, name in enumerate(names):
        seen[name] += 1
        names[at] = name if seen[name] == 1 else f"{name}.{seen[name]}"
    return names


def _names_beside(tar: Path, highest: int) -> dict[int, str]:
    """The lines of `classes.txt`, if there are enough of them for all classes."""
    path = tar.parent / "classes.txt"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return {}
    while lines and not lines[-1]:
        lines.pop()
    return dict(enumerate(lines)) if len(lines) > highest and all(lines) else {}
