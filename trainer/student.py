"""The student of a finished run whose `encoder/` is the teacher (DINO, BYOL, MoCo v3), out of its last checkpoint."""

from __future__ import annotations

from pathlib import Path

import yaml
from torch import nn

from manifests.errors import DiffmixError, UsageError
from trainer.config import PretrainConfig, resolve
from trainer.engine import checkpoint
from trainer.engine.checkpoint import Checkpoint
from trainer.engine.run_folder import CONFIG, RunFolder
from trainer.methods.base import Method
from trainer.parts import make_method
from trainer.recipes import read_yaml


def load_student(run: str | Path) -> tuple[nn.Module, PretrainConfig]:
    """The encoder that gradients trained, as after the run's last step and on the CPU, and the run's settings.

    Raises `UsageError` if the run's method has one network only, or the checkpoint of its last step is gone or damaged.
    """
    config, method = make_student_and_teacher(run)
    saved = _last(RunFolder(run))
    try:
        method.load_state_dict(saved.method)
    except RuntimeError as error:
        raise DiffmixError(
            f"the checkpoint of step {saved.step} in {run} is of other networks than its {CONFIG} says: {error}"
        ) from error
    return method.trained_encoder, config


def make_student_and_teacher(run: str | Path) -> tuple[PretrainConfig, Method]:
    """A run's settings and its method, untrained; raises `UsageError` if the method has one network only."""
    config = _config(Path(run) / CONFIG)
    method = make_method(config)
    if method.trained_encoder is method.encoder:
        raise UsageError(
            f"{run} is of {config.method.name}, which has one network, neither student nor teacher: leave out --network"
        )
    return config, method


def _config(file: Path) -> PretrainConfig:
    try:
        values = read_yaml(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(
            f"cannot read {file} ({error}), which says what a run of `trainer pretrain` trained; leave out --network "
            f"to export what is in {file.parent / 'encoder'}"
        ) from error
    return resolve(values if isinstance(values, dict) else {}, str(file))


def _last(folder: RunFolder) -> Checkpoint:
    """The checkpoint of the run's last step."""
    results = folder.results() or {}
    if results.get("state") != "finished":
        raise UsageError(f"{folder.path} is not finished: run the same command again to go on")
    saved, damaged = checkpoint.newest(folder.checkpoints)
    if saved is None or saved.step != results.get("steps"):
        raise UsageError(_lacking(folder.checkpoints, results.get("steps"), saved, damaged))
    return saved


def _lacking(folder: Path, last: int | None, saved: Checkpoint | None, damaged: list[Path]) -> str:
    newest = f"the newest whole one is of step {saved.step}" if saved else "it holds no whole one"
    hurt = f" ({', '.join(path.name for path in damaged)} damaged)" if damaged else ""
    return (
        f"only checkpoints hold the student, and {folder} lacks that of the last step, {last}: {newest}{hurt}. Put it "
        "back; or remove results.json and run the same command again, which trains "
        + (f"from step {saved.step} on" if saved else "anew")
    )
