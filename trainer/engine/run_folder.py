"""A run folder: config.yaml, environment.json, metrics.jsonl, results.json, checkpoints/ and encoder/, for one job."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from manifests.errors import DiffmixError, StorageError, UsageError
from manifests.storage import LocalStorage, explained
from trainer.recipes import read_yaml

CONFIG, ENVIRONMENT, METRICS, RESULTS = "config.yaml", "environment.json", "metrics.jsonl", "results.json"
BUDGET = "budget.json"  # of a comparison, whose runs are folders inside
CHECKPOINTS, ENCODER, LOCK, OFFENDERS = "checkpoints", "encoder", ".lock", "offenders.json"

_LIBRARIES = ("diffmix", "torch", "torchvision", "timm", "accelerate", "peft", "numpy", "pyarrow", "numba")


def read_values(file: Path) -> dict[str, Any]:
    """A JSON or YAML object; empty if the file is missing, torn or something else."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        text = file.read_text("utf-8")
        content = json.loads(text) if file.suffix == ".json" else read_yaml(text)
        return content if isinstance(content, dict) else {}
    return {}


class InUseError(DiffmixError):
    """Another process holds the folder."""


class RunFolder:
    """Files of one run; every one but metrics.jsonl appears complete or not at all."""

    def __init__(self, path: str | Path) -> None:
        if "://" in str(path):  # which as a path would be a folder of that name here
            raise UsageError(f"--out {path}: runs are written to a folder; give a local or mounted path, and copy it")
        self.path = Path(path).expanduser().absolute()
        self._storage = LocalStorage(str(self.path))

    @property
    def checkpoints(self) -> Path:
        """Folder of the restart points."""
        return self.path / CHECKPOINTS

    @property
    def encoder(self) -> Path:
        """Folder of the exported encoder, in timm's layout."""
        return self.path / ENCODER

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / CONFIG).exists()

    def create(self) -> None:
        """Make the folder."""
        self._storage.create_folder()

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a small file."""
        self._storage.write(name, text.encode())

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write or replace a JSON object."""
        self.write_text(name, json.dumps(_without_nan(values), indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object, None if there is none or it cannot be read."""
        return read_values(self.path / name) or None

    def results(self) -> dict[str, Any] | None:
        """results.json of a run that has ended."""
        return self.read_json(RESULTS)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One job at a time; raises `InUseError` naming the one that holds it."""
        file = self._locked_file()
        try:
            yield
        finally:
            if not self.exists():  # nothing was begun
                self._remove_if_empty()
            file.close()

    def _locked_file(self) -> IO[str]:
        """Until it is closed others are refused. A file that its last holder removed meanwhile would lock nothing."""
        path = self.path / LOCK
        while True:
            self.create()
            with explained("lock", str(self.path)):
                file = path.open("a+")
            try:
                _lock(file, self.path)
                if _is_at(path, file):
                    return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink()
            self.path.rmdir()

    @contextlib.contextmanager
    def metrics(self, after_step: int) -> Iterator[Metrics]:
        """metrics.jsonl for appending; lines of steps beyond `after_step`, which will be done again, are dropped."""
        path = self.path / METRICS
        with explained("read", str(path)):
            lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= after_step]
        self.write_text(METRICS, "".join(f"{line}\n" for line in kept))
        with explained("write", str(path)):
            file = path.open("a", encoding="utf-8")
        try:
            yield Metrics(file)
        finally:
            with contextlib.suppress(OSError):  # of a line that could not be written, which was said
                file.close()


class Metrics:
    """Lines of metrics.jsonl, flushed one by one."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one JSON object."""
        with explained("write", self._file.name):
            self._file.write(json.dumps(_without_nan(values)) + "\n")
            self._file.flush()


def _without_nan(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lock(file: IO[str], path: Path) -> None:
    try:
        with explained("lock", str(path), (OSError,)):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except StorageError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise InUseError(f"{path} is in use by {holder}; wait for it, or choose another --out") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()


def _is_at(path: Path, file: IO[str]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a crash


def environment(command: list[str]) -> dict[str, Any]:
    """What the run ran on, for environment.json."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "host": platform.node(),
        "python": sys.version.split()[0],
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None
