"""A tuner's folder: one safetensors file, then one JSON file, each complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifests.errors import DiffmixError
from manifests.storage import explained


@contextmanager
def writing(folder: Path, weights: str, description: str) -> Iterator[Path]:
    """A temporary folder whose two files replace those in `folder` when all went well.

    The old description goes first and the new one comes last, so that a crash leaves a folder without one.
    """
    with explained("write", str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tuner-", dir=folder))
    try:
        yield temporary
        with explained("write", str(folder)):
            (folder / description).unlink(missing_ok=True)
            for name in (weights, description):
                _settle(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(source: Path, target: Path) -> None:
    source.chmod(0o644)  # safetensors writes for the owner alone
    with source.open("rb") as opened:
        os.fsync(opened.fileno())
    source.replace(target)


def write_weights(file: Path, state: Mapping[str, Tensor]) -> None:
    """Tensors as safetensors."""
    with explained("write", str(file)):
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}, file, {"format": "pt"}
        )


def replace_weights(file: Path, state: Mapping[str, Tensor]) -> None:
    """Tensors as safetensors, complete or not at all, in place of an older file."""
    temporary = file.with_name(f".{file.name}")
    write_weights(temporary, state)
    with explained("write", str(file)):
        _settle(temporary, file)


def read(folder: Path, weights: str, description: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and the description; raises `DiffmixError` if one is missing or damaged."""
    for name in (description, weights):
        if not (folder / name).is_file():
            raise DiffmixError(f"{folder} holds no {name}: it is no saved tuner, or its writing was cut off")
    try:
        with explained("read", str(folder)):
            return load_file(folder / weights), json.loads((folder / description).read_text("utf-8"))
    except (SafetensorError, ValueError) as error:
        raise DiffmixError(f"{folder} is damaged ({error}); take another save or train again") from error
