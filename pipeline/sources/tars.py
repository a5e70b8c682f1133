"""WebDataset tars: one, several by glob or braces, or a folder of them; local or at a URL.

A sample is what WebDataset takes for one: members that share folder and base name up to its first dot. The tars are
gone through once for the places of their images, which are read by offset from then on; a member's name never becomes
a path.
"""

from __future__ import annotations

import glob
import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import StorageError, UsageError
from pipeline.sources.base import (
    INDEX_SCHEMA,
    MAX_LABEL,
    IndexBuilder,
    UnreadableImageError,
    from_text,
    make_key,
    sorted_index,
    to_text,
)
from pipeline.sources.files import IMAGE_SUFFIXES, is_url, local_path, read_range

MAX_TARS = 1_000_000

_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(slots=True)
class _Sample:
    name: str  # folder and base name up to the first dot
    member: str = ""  # what follows that dot in the name of the chosen image; empty while there is none
    offset: int | None = None  # None where the image has no bytes of its own
    size: int | None = None
    label: int | None = None


class TarSource:
    """One image per sample, the others counted as ignored; labelled by `.cls` where that is a whole number."""

    kind = "tars"

    def __init__(self, location: str) -> None:
        self.location = location if is_url(location) else str(local_path(location))
        self.ignored = 0

    def index(self) -> pa.Table:
        """See `Source.index`; raises `UsageError` for tars that are missing, compressed, damaged or without images."""
        self.ignored = 0
        tars = expand(self.location)
        root = _root(self.location)
        rows = IndexBuilder()
        for tar in tars:
            location = to_text(tar.removeprefix(root))
            for sample in self._samples(tar):
                # Its name for now: whether that makes a unique key is known when all tars are through.
                name = to_text(sample.name)
                rows.add(name, location, label=sample.label, offset=sample.offset, size=sample.size)
        table = rows.table()
        if not table.num_rows:
            raise UsageError(
                f"no image in the {len(tars)} tar(s) of {self.location}: found {self.ignored} other members. "
                f"Images are members that end in {', '.join(IMAGE_SUFFIXES)}."
            )
        return sorted_index(_with_keys(table))

    def read(self, location: str, offset: int | None, size: int | None) -> bytes:
        """See `Source.read`."""
        if offset is None or size is None:
            raise UnreadableImageError("a link or sparse file inside a tar")
        if ".." in PurePosixPath(location).parts:
            raise UnreadableImageError("outside the folder of the source")
        tar = from_text(location)
        return read_range(tar if is_url(tar) else _root(self.location) + tar, offset, size)

    def _samples(self, tar: str) -> Iterator[_Sample]:
        """Samples with an image, in order of their first member; several of one name are numbered from the second."""
        samples: dict[str, list[_Sample]] = {}
        for member, label in _members(tar):
            folder, name, suffix = _split(member.name)
            if not name or not suffix:
                self.ignored += 1
                continue
            group = samples.setdefault(folder + name, [_Sample(folder + name)])
            if suffix == "cls":
                group[-1].label = label
            elif _rank(suffix) is None:
                self.ignored += 1
            else:
                self._add_image(group, suffix, member)
        for group in samples.values():
            yield from (sample for sample in group if sample.member)

    def _add_image(self, group: list[_Sample], suffix: str, member: tarfile.TarInfo) -> None:
        sample = group[-1]
        if sample.member == suffix:  # the same name again: another image, as when a tar was appended to
            sample = _Sample(f"{sample.name.partition('.')[0]}.{len(group) + 1}")
            group.append(sample)
        if sample.member:
            self.ignored += 1
        if not sample.member or (_rank(suffix) or 0) < (_rank(sample.member) or 0):
            stored = member.isreg() and not member.issparse()
            sample.member = suffix
            sample.offset = member.offset_data if stored else None
            sample.size = member.size if stored else None


def expand(location: str) -> list[str]:
    """The tars that a path or URL with globs and braces stands for, sorted; raises `UsageError` if there are none."""
    if is_url(location):
        tars = _expand_remote(location)
    elif Path(location).is_dir():
        tars = [str(path) for path in Path(location).glob("*.tar") if not path.name.startswith(".")]
    elif Path(location).exists():
        tars = [location]
    else:
        tars = list(itertools.chain.from_iterable(_expand_local(name) for name in _expand_braces(location)))
    if not tars:
        raise UsageError(
            f"no tar at {location}: found nothing. Give a .tar, a glob (`train-*.tar`), a range "
            "(`train-{000..146}.tar`) or a folder with .tar files; compressed tars must be decompressed first."
        )
    return sorted(set(tars))


def _expand_local(name: str) -> list[str]:
    if glob.has_magic(name):
        return glob.glob(name)  # noqa: PTH207  an absolute pattern
    if not Path(name).exists():
        raise UsageError(f"{name} does not exist. Check the range of numbers in the braces.")
    return [name]


def _expand_remote(location: str) -> list[str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
        if not _has_pattern(location) and not location.endswith(".tar") and filesystem.isdir(path):
            location = f"{location.rstrip('/')}/*.tar"
        tars: list[str] = []
        for name in _expand_braces(location):
            found = filesystem.glob(name) if glob.has_magic(name) else None
            tars += [name] if found is None else [filesystem.unstrip_protocol(path) for path in found]
    except (OSError, ImportError, ValueError) as error:
        raise StorageError(f"cannot list {location}: {error}. Check the address and your access to it.") from error
    return tars


def _expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` and `{a,b}.tar` as a shell expands them; numbers keep the width of the first."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = _RANGE.fullmatch(match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last - first >= MAX_TARS:
            raise UsageError(f"{pattern} stands for {last - first + 1} tars; at most {MAX_TARS} are allowed.")
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    endings = _expand_braces(pattern[match.end() :])
    if len(choices) * len(endings) > MAX_TARS:
        raise UsageError(f"{pattern} stands for more than {MAX_TARS} tars.")
    return [pattern[: match.start()] + choice + ending for choice in choices for ending in endings]


def _has_pattern(location: str) -> bool:
    return bool(glob.has_magic(location) or _BRACES.search(location))


def _root(location: str) -> str:
    """The folder, with its slash, that the tars' places are relative to."""
    if not is_url(location):
        path = Path(location)
        if path.is_dir():
            return f"{location.rstrip('/')}/"
        if path.exists():
            return f"{str(path.parent).rstrip('/')}/"
    elif not _has_pattern(location) and not location.endswith(".tar"):
        return f"{location.rstrip('/')}/"
    fixed = re.split(r"[*?\[{]", location, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def _members(tar: str) -> Iterator[tuple[tarfile.TarInfo, int | None]]:
    """Every member that is no folder, with the label that a `.cls` member holds."""
    position = 0
    try:
        with fsspec.open(tar, "rb") if is_url(tar) else Path(tar).open("rb") as file:
            _refuse_compressed(file, tar)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every header it has read
                    if member.size < 0 or member.offset < position:
                        raise tarfile.ReadError("impossible size")
                    position = archive.offset
                    if not member.isdir():
                        yield member, _label(file, member)
                position = archive.offset
                _check_end(file, position)
    except FileNotFoundError:
        raise UsageError(f"{tar} does not exist.") from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{tar} is no whole tar: {error} (after byte {position}). "
            "Fetch it again, or unpack what is sound and pack it anew."
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {tar}: {error}. Check the disk, the address and your access to it.") from error


def _refuse_compressed(file: IO[bytes], tar: str) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(
                f"{tar} is compressed with {name}, so its images cannot be read one by one. Decompress it first."
            )


def _check_end(file: IO[bytes], position: int) -> None:
    """Raise unless zeros end the tar: `tarfile` takes a damaged header for the end, and so would lose what follows."""
    file.seek(position)
    tail = file.read(64 * _BLOCK)
    if len(tail) < _BLOCK:
        raise tarfile.ReadError("cut short, the end mark is missing")
    if any(tail[:_BLOCK]):
        raise tarfile.ReadError("damaged header")
    if any(tail):
        raise tarfile.ReadError("data after the end mark, as in tars glued together with `cat`")


def _label(file: IO[bytes], member: tarfile.TarInfo) -> int | None:
    """The whole number in a `.cls` member; None for other members and other content, -1 (no label) included."""
    if not member.name.lower().endswith(".cls") or not member.isreg():
        return None
    file.seek(member.offset_data)
    text = file.read(min(member.size, 32)).strip()
    if not re.fullmatch(rb"[0-9]{1,10}", text) or int(text) > MAX_LABEL:
        return None
    return int(text)


def _split(member: str) -> tuple[str, str, str]:
    """Folder with its slash, base name up to the first dot, and what follows it in lower case."""
    folder, slash, file = member.removeprefix("./").rpartition("/")
    name, _, suffix = file.partition(".")
    return folder + slash, name, suffix.lower()


def _rank(suffix: str) -> int | None:
    """Place among a sample's images, plain suffixes (`jpg`) before longer ones (`left.jpg`); None if no image."""
    last = suffix.rpartition(".")[2]
    if last not in IMAGE_SUFFIXES:
        return None
    return IMAGE_SUFFIXES.index(last) + (0 if last == suffix else len(IMAGE_SUFFIXES))


def _with_keys(table: pa.Table) -> pa.Table:
    """Keys from the samples' names; a name that several tars have is preceded by its tar's."""
    counts = pc.value_counts(table["key"])
    shared = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    keys: list[pa.Array] = []
    for batch in table.to_batches():
        columns = (batch["key"].to_pylist(), batch["location"].to_pylist(), pc.is_in(batch["key"], shared).to_pylist())
        names = (
            f"{tar.removesuffix('.tar')}/{name}" if is_shared else name
            for name, tar, is_shared in zip(*columns, strict=True)
        )
        keys.append(pa.array([make_key(from_text(name)) for name in names], pa.string()))
    return table.set_column(0, INDEX_SCHEMA.field("key"), pa.chunked_array(keys, pa.string()))
