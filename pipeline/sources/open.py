"""From what a user gives as `--source` to a source: by its kind if named (`folder:PATH`), else by what lies there."""

from __future__ import annotations

import glob
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import fsspec

from manifests import layout
from manifests.errors import StorageError, UsageError
from pipeline.sources import SOURCES
from pipeline.sources.base import Source
from pipeline.sources.files import is_url, local_path
from pipeline.sources.folder import is_image_name

_TABLE_FILES = ("dataset_dict.json", "state.json", "dataset_info.json")
_TAR = re.compile(r"\.(tar|tgz|tar\.[a-z0-9]+)$", re.IGNORECASE)
_ALLOWED = (
    "--source takes an image folder, WebDataset tars (a .tar, a pattern such as train-{000..146}.tar, a folder of "
    "them), a table (.parquet or a folder of `datasets`), a pair set, or the word digits; "
    f"name the kind to be exact: {', '.join(f'{kind}:PATH' for kind in SOURCES if kind != 'digits')}."
)


def open_source(location: str) -> Source:
    """The source at `location`, not yet indexed; raises `UsageError` saying what was found and what is allowed."""
    kind, colon, rest = location.partition(":")
    if colon and kind in SOURCES and not rest.startswith("//"):
        return _make(kind, rest)
    return _make(find_kind(location), location)


def find_kind(location: str) -> str:
    """The name in `SOURCES` of what lies at `location`; raises `UsageError` if that is nothing or not clear."""
    if location == "digits":
        return "digits"
    if not location:
        raise UsageError(f"the source is empty. {_ALLOWED}")
    if is_url(location):
        return _kind_of_url(location)
    path = local_path(location.partition("::")[0])
    if path.is_dir():
        return _kind_of_folder(path)
    kind = _kind_of_name(path.name)
    if kind:
        return kind
    found = "a file that is no tar and no table" if path.exists() else "nothing there"
    raise UsageError(f"{location} is no source of images: found {found}. {_ALLOWED}")


def _make(kind: str, location: str) -> Source:
    if not location:
        raise UsageError(f"{kind}: lacks a location after the colon. {_ALLOWED}")
    module, _, name = SOURCES[kind].partition(":")
    return cast(Source, getattr(importlib.import_module(module), name)(location))


def _kind_of_name(name: str) -> str | None:
    if _TAR.search(name):
        return "tars"
    return "tables" if name.lower().endswith(".parquet") else None


def _kind_of_url(url: str) -> str:
    kind = _kind_of_name(url)
    if kind:
        return kind
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        if filesystem.exists(f"{path.rstrip('/')}/{layout.PLAN}"):
            return "pairs"
        if glob.has_magic(path) or filesystem.glob(f"{path.rstrip('/')}/*.tar"):
            return "tars"
    except (OSError, ImportError, ValueError) as error:
        raise StorageError(f"cannot look at {url}: {error}. Check the address and your access to it.") from error
    raise UsageError(f"{url} is no source of images: found neither tars nor a pair set. {_ALLOWED}")


def _kind_of_folder(path: Path) -> str:
    if (path / layout.PLAN).is_file():
        return "pairs"
    if any((path / name).is_file() for name in _TABLE_FILES):
        return "tables"
    kinds = _container_kinds(path) or _container_kinds(path / "data") & {"tables"}
    if not kinds:
        return "folder"
    if _holds_images(path):
        kinds.add("folder")
    if len(kinds) > 1:
        choices = " or ".join(f"{kind}:{path}" for kind in sorted(kinds))
        raise UsageError(f"{path} holds several kinds of images ({', '.join(sorted(kinds))}): say {choices}.")
    return kinds.pop()


def _container_kinds(path: Path) -> set[str]:
    """Kinds of the tars and tables in a folder; a compressed tar is a download that was left behind."""
    suffixes = {name.rpartition(".")[2].lower() for name in _names(path) if not name.startswith(".")}
    return {kind for suffix, kind in (("tar", "tars"), ("parquet", "tables")) if suffix in suffixes}


def _holds_images(path: Path) -> bool:
    """Whether an image lies in the folder or in one of its direct subfolders."""
    return any(is_image_name(name) for folder in (path, *_subfolders(path)) for name in _names(folder))


def _subfolders(path: Path) -> Iterator[Path]:
    return (path / name for name in _names(path) if not name.startswith(".") and (path / name).is_dir())


def _names(path: Path) -> Iterator[str]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                yield entry.name
    except OSError:  # the source itself reports what it cannot list
        return
