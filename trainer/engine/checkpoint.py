"""Restart points: `checkpoints/step-000001000.pt`, written atomically, the newest few kept.

Randomness needs no state: every step seeds its generators from (seed, step, rank), and the data's order and
augmentation are functions of (seed, epoch, item). What remains is weights, statistics, optimiser and the cursor.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manifests.errors import DiffmixError
from manifests.storage import LocalStorage, explained

_NAME = re.compile(r"step-([0-9]{9,})\.pt")
VERSION = 2  # 1 had another order of samples


class DamagedError(DiffmixError):
    """The file is torn, or no checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that a run needs to go on exactly.

    `cursor` is (epoch, samples consumed in it), which knows no ranks: any number of them can go on.
    """

    step: int  # optimiser steps done
    cursor: tuple[int, int]
    method: dict[str, Any]  # state_dict
    optimiser: dict[str, Any]
    scaler: dict[str, Any] | None  # of fp16
    data: str  # the rows' fingerprint
    seconds: float  # of training so far
    first: dict[str, float | int]  # what was measured before training
    latest: dict[str, float | int]  # the newest of every value that was logged
    suspicions: int  # loggings in a row, up to now, that looked collapsed
    version: int = VERSION


def cursor_at(step: int, steps_per_epoch: int, batch_size: int) -> tuple[int, int]:
    """Epoch and samples consumed in it after so many steps."""
    epoch, inside = divmod(step, steps_per_epoch)
    return epoch, inside * batch_size


def name_of(step: int) -> str:
    """File name of a step's checkpoint."""
    return f"step-{step:09d}.pt"


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint and keep the newest `keep` up to it; a crash leaves the older ones whole.

    Later steps' files go too: the run went on from an earlier one, since they are damaged or another was asked for.
    """
    storage = LocalStorage(str(folder))
    storage.create_folder()
    storage.sweep()
    pending = storage.begin(name_of(checkpoint.step))
    try:
        with explained("write", pending.where, (OSError, MemoryError, RuntimeError)):
            torch.save(_values(checkpoint), pending.file)
        pending.commit()
    finally:
        pending.discard()
    written = folder / name_of(checkpoint.step)
    paths = steps_in(folder)
    end = paths.index(written) + 1
    for path in (*paths[: max(0, end - max(1, keep))], *paths[end:]):
        with contextlib.suppress(OSError):
            path.unlink()
    return written


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields by name; state dicts as they are, since copying them would double the memory."""
    return {name: getattr(checkpoint, name) for name in checkpoint.__slots__}


def steps_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load(path: Path) -> Checkpoint:
    """A checkpoint on the CPU, without executing anything it holds.

    Raises `DamagedError` if it is torn or something else, another `DiffmixError` if it cannot be read or is of another
    version of diffmix.
    """
    try:
        with explained("read", str(path)):
            values = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        version = values.get("version")
        if version == VERSION:
            return Checkpoint(**values | {"cursor": tuple(values["cursor"])})
    except DiffmixError:
        raise
    except Exception as error:  # torch raises many kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{path} is damaged or no checkpoint of diffmix ({reason}); give an older one") from error
    raise DiffmixError(f"{path} has checkpoint version {version}; this diffmix reads {VERSION}")


def newest(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest whole checkpoint, None if there is none, and newer ones that are damaged."""
    skipped: list[Path] = []
    for path in reversed(steps_in(folder)):
        try:
            return load(path), skipped
        except DamagedError:
            skipped.append(path)
    return None, skipped
