"""Where a run goes on: a new folder, its newest checkpoint, one that was named, or not at all since it is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml

from manifests.errors import DiffmixError, UsageError
from trainer.config import PretrainConfig
from trainer.engine import checkpoint
from trainer.engine.checkpoint import Checkpoint
from trainer.engine.run_folder import CHECKPOINTS, CONFIG, RunFolder
from trainer.nn.collectives import gather_objects
from trainer.recipes import read_yaml
from trainer.settings import completed, differences

_SHOWN = 5  # settings that differ, in a message


class Settings(Protocol):
    """What config.yaml holds of any command."""

    FREE: ClassVar[tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a run begins. `finished` holds the results of a run that is complete already."""

    saved: Checkpoint | None = None
    finished: dict[str, Any] | None = None
    note: str = ""


def start_of(folder: RunFolder, config: PretrainConfig, resume: str, *, fingerprint: str, anyway: bool) -> Start:
    """Raises `UsageError` naming what differs if the folder or the checkpoint is of another run.

    `anyway` goes on although the manifest changed: the order of samples is then another one.
    """
    if resume not in ("auto", "never"):
        return _from_path(Path(resume).expanduser(), folder, config, fingerprint, anyway)
    if not folder.exists():
        return Start()
    if resume == "never":
        raise UsageError(f"{folder.path} holds a run already; --resume never needs another --out")
    return _own(folder, config, fingerprint, anyway)


def _own(folder: RunFolder, config: PretrainConfig, fingerprint: str, anyway: bool) -> Start:
    """Go on with the run that the folder holds."""
    check_same(folder.path, config)
    results = folder.results()
    if results is not None and results.get("state") == "finished":
        return Start(finished=results, note=f"{folder.path} is finished: nothing to do")
    if results is not None:
        raise UsageError(
            f"{folder.path} holds a run that {results.get('state')} ({results.get('reason')}); the same settings would "
            "again: change some, with another --out"
        )
    saved, note = _newest(folder.path)
    if saved is None:
        return Start(note=f"{folder.path} has no checkpoint yet: starting anew")
    check_data(saved, fingerprint, anyway=anyway)
    return Start(saved=saved, note=f"{note}going on in {folder.path} from step {saved.step}")


def _newest(run: Path) -> tuple[Checkpoint | None, str]:
    """The newest whole checkpoint of a run and what to say of damaged ones; refuses to lose a run to them."""
    saved, skipped = checkpoint.newest(run / CHECKPOINTS)
    note = "".join(f"{path} is damaged and is passed over\n" for path in skipped)
    if saved is None and skipped:
        raise DiffmixError(f"{note}no whole checkpoint is left: remove {run / CHECKPOINTS} to start anew")
    return saved, note


def _from_path(path: Path, folder: RunFolder, config: PretrainConfig, fingerprint: str, anyway: bool) -> Start:
    """From a run folder or a file of one; a run that was begun from there, in `folder`, goes on where it is."""
    if folder.exists() and (path.is_dir() or run_of(path) != folder.path):
        own = _own(folder, config, fingerprint, anyway)
        if own.finished is not None or own.saved is not None or run_of(path) == folder.path:
            return own
    saved, note = _named(path)
    run = run_of(path)
    if run is not None:
        check_same(run, config)
    check_data(saved, fingerprint, anyway=anyway)
    return Start(saved=saved, note=f"{note}going on from {path}, step {saved.step}")


def _named(path: Path) -> tuple[Checkpoint, str]:
    if path.is_dir():
        saved, note = _newest(path)
        if saved is None:
            raise UsageError(f"--resume {path}: no checkpoint there; give a run folder or a checkpoint file")
        return saved, note
    if not path.exists():
        raise UsageError(f"--resume {path}: there is no such file; give auto, never, a run folder or a checkpoint file")
    return checkpoint.load(path), ""


def run_of(path: Path) -> Path | None:
    """The run folder that a checkpoint, or the folder itself, belongs to."""
    path = path.absolute()
    for candidate in (path, path.parent.parent):
        if (candidate / CONFIG).exists():
            return candidate
    return None


def check_same(run: Path, config: Settings, advice: str = "") -> None:
    """Refuse settings that differ from those of the run; `advice` says what to do with other ones."""
    try:
        old = read_yaml((run / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DiffmixError(f"cannot read {run / CONFIG}: {error}") from error
    new = config.to_dict()
    found = differences(completed(old if isinstance(old, dict) else {}, new, config), new, config.FREE)
    if found:
        listed = "; ".join(f"{name}: {before!r} there, {now!r} now" for name, before, now in found[:_SHOWN])
        listed += f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UsageError(
            f"{run} holds a run of other settings ({listed}). Use the same to go on, "
            f"{advice or f'another --out for a new run, and there --init {run} to begin with its weights'}."
        )


def check_data(saved: Checkpoint, fingerprint: str, *, anyway: bool) -> None:
    """Refuse to go on when the chosen rows are not those of the checkpoint, unless told."""
    if saved.data != fingerprint and not anyway:
        raise UsageError(
            "the pair set (or what --filter chooses of it) is not the one that the run was started on: the order "
            "of samples would change. Restore it, start a new run, or go on anyway with --set data.allow_changed=true"
        )


def check_agreed(start: Start, folder: RunFolder) -> None:
    """All processes must see the same; and until all have looked, nothing is written that one of them could see."""
    seen = gather_objects("finished" if start.finished else start.saved.step if start.saved else 0)
    if len(set(seen)) > 1:
        raise DiffmixError(
            f"the processes see different checkpoints in {folder.path}, of steps {', '.join(map(str, seen))}: "
            "choose an --out, or a --resume, that all machines share"
        )
