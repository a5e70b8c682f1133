"""The runs of a folder: their state and headline numbers, read from whatever files are there and whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from manifests.errors import UsageError
from trainer.engine.run_folder import BUDGET, CONFIG, ENVIRONMENT, LOCK, METRICS, RESULTS, read_values
from trainer.tuned import headline

State = Literal["finished", "running", "stopped", "failed"]

_TAIL = 2**20  # bytes of metrics.jsonl that are read: thousands of lines, however long the run
_FAILED = ("failed", "collapsed", "diverged")
_UNFINISHED = "unfinished"  # of a comparison that has written a table, but not trained all


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run; None is what its files do not say. `knn` is a share in 0..1, `total` the steps asked for.

    Of a finished fine-tuning `tuner` is the best one, and the numbers are its own, see `tuned.headline`.
    """

    name: str
    path: str
    state: State
    method: str | None = None
    mix: str | None = None
    tuner: str | None = None
    encoder: str | None = None
    step: int | None = None
    total: int | None = None
    new_accuracy: float | None = None
    knn: float | None = None
    loss: float | None = None
    images_per_second: float | None = None


def list_runs(root: str | Path) -> list[RunSummary]:
    """The runs directly inside `root`, by name, or of a comparison; `root` itself if it is one run.

    Broken files leave gaps, not errors.

    A run is `finished` when results.json is there, `failed` when that says so, `running` while a job holds its lock,
    else `stopped`; a comparison also runs while one of its runs does. Raises `UsageError` if there is no such folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {root}; `trainer pretrain` makes runs/, or name the folder that was --out"
        )
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    alone = _is_run(folder) and not (folder / BUDGET).is_file()
    return [summarise(path) for path in ([folder] if alone else inside) if _is_run(path)]


def summarise(folder: Path) -> RunSummary:
    """What one run folder's files say."""
    config, results = read_values(folder / CONFIG), read_values(folder / RESULTS)
    metrics = _last_values(folder / METRICS)
    of_tuner = headline(results)
    known = {**metrics, **{key: value for key, value in {**results, **of_tuner}.items() if value is not None}}
    return RunSummary(
        name=folder.name or str(folder.absolute().name),
        path=str(folder),
        state=_state(folder, results),
        method=_text(results.get("method") or _at(config, "method", "name")),
        mix=_text(results.get("mix") or _at(config, "mix", "policy")),
        encoder=_text(results.get("encoder") or _at(config, "encoder", "name")),
        tuner=_text(of_tuner.get("tuner")),
        step=_whole(of_tuner.get("steps", results.get("steps", metrics.get("step")))),
        total=_total(config, results, metrics),
        new_accuracy=_number(of_tuner.get("new_accuracy")),
        knn=_number(known.get("knn")),
        loss=_number(known.get("loss")),
        images_per_second=_number(known.get("images_per_second")),
    )


def _total(config: Mapping[str, Any], results: Mapping[str, Any], metrics: Mapping[str, Any]) -> int | None:
    steps = _whole(_at(config, "run", "max_steps") or results.get("total_steps") or metrics.get("total_steps"))
    tasks = config.get("tasks")  # of a fine-tuning, each of which has so many
    return steps * len(tasks) if steps and isinstance(tasks, list) else steps


_TEXTS = ("name", "method", "mix", "tuner", "encoder", "state")  # columns that are no numbers
_OF_TUNERS = ("tuner", "new task")  # columns that only a fine-tuning fills


def runs_text(runs: Sequence[RunSummary]) -> str:
    """A table of aligned columns, one line a run; a dash is what is not known."""
    if not runs:
        return "no runs yet; `trainer pretrain` makes one"
    cells = [_cells(run) for run in runs]
    columns = [name for name in cells[0] if name not in _OF_TUNERS or any(row[name] != "-" for row in cells)]
    table = [{name: name for name in columns}, *cells]
    widths = {name: max(len(row[name]) for row in table) for name in columns}
    return "\n".join(
        "  ".join(
            row[name].ljust(widths[name]) if name in _TEXTS else row[name].rjust(widths[name]) for name in columns
        ).rstrip()
        for row in table
    )


def _cells(run: RunSummary) -> dict[str, str]:
    """By column."""
    return {
        "name": run.name,
        "method": run.method or "-",
        "mix": run.mix or "-",
        "tuner": run.tuner or "-",
        "encoder": run.encoder or "-",
        "state": run.state,
        "step": "-" if run.step is None else str(run.step) + (f"/{run.total}" if run.total else ""),
        "new task": _percent(run.new_accuracy),
        "kNN": _percent(run.knn),
        "loss": "-" if run.loss is None else f"{run.loss:.4g}",
        "images/s": "-" if run.images_per_second is None else f"{run.images_per_second:.0f}",
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, METRICS, RESULTS, ENVIRONMENT))


def _state(folder: Path, results: Mapping[str, Any]) -> State:
    inside = folder.glob(f"*/{LOCK}") if (folder / BUDGET).is_file() else ()
    if any(_is_locked(lock) for lock in (folder / LOCK, *inside)):
        return "running"
    if results.get("state") in _FAILED:
        return "failed"
    return "finished" if results and results.get("state") != _UNFINISHED else "stopped"


def _is_locked(file: Path) -> bool:
    """Whether a job holds the lock. Asking takes a shared lock for microseconds."""
    with contextlib.suppress(FileNotFoundError, PermissionError, IsADirectoryError), file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _last_values(file: Path) -> dict[str, Any]:
    """The newest value of every name in the last lines of metrics.jsonl; torn lines are passed over."""
    values: dict[str, Any] = {}
    with contextlib.suppress(OSError), file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - _TAIL))
        for line in opened.read().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(line)
                values |= content if isinstance(content, dict) else {}
    return values


def _at(config: Mapping[str, Any], section: str, name: str) -> Any:
    inner = config.get(section)
    return inner.get(name) if isinstance(inner, Mapping) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
