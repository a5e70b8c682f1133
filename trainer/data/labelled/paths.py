"""Local paths with globs and braces, and the splits that a folder may hold."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from manifests.errors import UsageError

_MOST_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SPLIT = re.compile(r"(train(?:ing)?|val(?:id(?:ation)?)?|dev|test(?:ing)?)(?:[-_.]?\d.*|[-_.].*)?", re.IGNORECASE)


def local(location: str) -> Path:
    """The absolute path, links followed; never raises: `~` of a user who does not exist stays."""
    return Path(os.path.realpath(os.path.expanduser(location.removeprefix("file://"))))  # noqa: PTH111


def expand(location: str) -> list[Path]:
    """The files that a path with globs and braces stands for, sorted; none where a plain path leads nowhere.

    Raises `UsageError` for a file of a range that is not there.
    """
    found: set[Path] = set()
    for name in itertools.islice(_braces(location), _MOST_FILES):
        files = glob.glob(name) if glob.has_magic(name) and not Path(name).exists() else [name]  # noqa: PTH207
        found.update(Path(file) for file in files if not Path(file).name.startswith("."))
    missing = sorted(str(file) for file in found if not file.exists())
    if missing == [location]:
        return []
    if missing:
        raise UsageError(f"{missing[0]} does not exist; check the numbers in the braces of {location}")
    return sorted(found)


def _braces(location: str) -> Iterator[str]:
    match = _BRACES.search(location)
    if match is None:
        yield location
        return
    numbers = _RANGE.fullmatch(match[1])
    if numbers:
        first, last = numbers.groups()
        values: Iterable[str] = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        values = match[1].split(",")
    for value in values:
        yield from _braces(location[: match.start()] + value + location[match.end() :])


def split_of(name: str) -> str | None:
    """Which split a file or folder is by its name, such as `train` for train-00000-of-00002.parquet."""
    match = _SPLIT.fullmatch(name)
    return match[1].lower() if match else None


def refuse_splits(folder: Path, entries: Iterable[Path]) -> None:
    """Raise `UsageError` if the entries of a folder are several splits: a test split is never trained on unasked."""
    entries = list(entries)
    of = {entry: split_of(entry.name) for entry in entries}
    splits = sorted({split or "" for split in of.values()})
    if len(splits) < 2 or not all(splits):
        return

    def of_split(prefix: str) -> str | None:
        mine = [entry for entry, split in of.items() if split is not None and split.startswith(prefix)]
        if len(mine) == 1:
            return str(mine[0])
        return f"{mine[0].parent}/{of[mine[0]]}*{mine[0].suffix}" if mine else None

    test = of_split("test") or of_split("val") or of_split("dev")
    advice = f"{of_split('train') or entries[0]}{f',test={test}' if test and of_split('train') else ''}"
    raise UsageError(f"{folder} holds the splits {', '.join(splits)}; say which is which, as --task {advice}")
