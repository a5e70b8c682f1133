"""One run of a comparison: an arm with a seed, trained in a run folder of its own and measured once."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

import trainer.nn.encoders  # noqa: F401  # registers the encoders that timm does not have
from manifests.errors import DiffmixError, UsageError
from trainer.compare.arms import Arm
from trainer.compare.evaluation import Exam
from trainer.config import PretrainConfig
from trainer.engine.launch import shared
from trainer.engine.loop import CollapsedError
from trainer.engine.run_folder import InUseError, RunFolder
from trainer.export import load_timm
from trainer.nn.collectives import together
from trainer.nn.init import initialise
from trainer.parts import make_method
from trainer.pretrain import train
from trainer.resume import check_same

EVALUATION = "evaluation.json"
_TOLD = ("method", "mix", "encoder", "steps", "epochs", "seconds", "loss", "images_per_second", "reason")
_MEASURED = ("knn", "linear", "knn_before", "feature_rank")

Ended = Literal["done", "in use", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """An arm with a seed; its folder says how far it is, for all processes that work on the comparison."""

    arm: Arm
    seed: int
    steps: int
    folder: RunFolder
    exam: Exam

    @property
    def name(self) -> str:
        """Of its folder and of its lines in the log."""
        return self.folder.path.name

    @property
    def config(self) -> PretrainConfig:
        """The settings of the run."""
        return self.arm.config(self.steps, self.seed)

    def check(self) -> None:
        """Refuse a folder that holds a run of other settings."""
        if self.folder.exists():
            check_same(self.folder.path, self.config, "another --out, or another name for the arm")

    def carry_out(self, device: torch.device, *, is_main: bool) -> Ended:
        """Train and measure what is not yet; `in use` if another process is at it. Every rank must call."""
        try:
            if not shared(self._is_trained()) and not self._train():
                return "stopped"
            if not shared(self.is_done()):
                self._measure(device, is_main=is_main)
        except InUseError:
            return "in use"
        return "done"

    def is_done(self) -> bool:
        """Whether all that can be known of the run is in its folder."""
        return self.row()["state"] in ("finished", "collapsed")

    def row(self) -> dict[str, Any]:
        """What the folder says, as in results.json; `state` is `finished` once the run is measured too."""
        results, measured = self.folder.results() or {}, self.folder.read_json(EVALUATION) or {}
        if measured.get("inputs") != self.exam.inputs:
            measured = {}
        state = results.get("state", "unfinished")
        if state == "finished":
            state = measured.get("state", "unfinished")
        batch = self.arm.settled.config.run.batch_size
        told = {name: results[name] for name in _TOLD if results.get(name) is not None}
        images = {"images": results["steps"] * batch} if "steps" in results else {}
        return {
            "arm": self.arm.name,
            "seed": self.seed,
            "folder": self.name,
            "state": state,
            "recipe": self.arm.settled.config.recipe,
            **told,
            **images,
            **{name: measured[name] for name in (*_MEASURED, "reason") if name in measured},
        }

    def _is_trained(self) -> bool:
        results = self.folder.results()
        return results is not None and results.get("state") in ("finished", "collapsed")

    def _train(self) -> bool:
        """False if a signal stopped it. A collapse is told in results.json of the run."""
        try:
            return train(self.arm.request(self.steps, self.seed, str(self.folder.path))).state != "stopped"
        except CollapsedError:
            return True
        except UsageError:
            if not shared(self._is_trained()):
                raise
            return True  # it collapsed in another process since we looked
        finally:
            gc.collect()  # networks of the run before would stay on the device

    def _measure(self, device: torch.device, *, is_main: bool) -> None:
        with ExitStack() as stack:
            together(lambda: stack.enter_context(self.folder.locked()) if is_main else None)
            if shared(self.is_done()):
                return
            found = self._measured(device)
            together(lambda: self.folder.write_json(EVALUATION, found) if is_main else None)

    def _measured(self, device: torch.device) -> dict[str, Any]:
        views = self.config.views
        encoder = together(self._trained)
        try:
            found = self.exam.of_encoder(encoder.to(device), views, device)
        except FloatingPointError as error:
            return {"inputs": self.exam.inputs, "state": "collapsed", "reason": str(error)}
        before = self.exam.knn_of_encoder(together(self._untrained).to(device), views, device)
        return {"inputs": self.exam.inputs, "state": "finished", **found, "knn_before": before}

    def _trained(self) -> nn.Module:
        try:
            return load_timm(self.folder.encoder)
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError, SafetensorError) as error:
            raise DiffmixError(
                f"{self.folder.encoder} cannot be loaded ({error}): put it where all machines see it, or remove "
                f"{self.folder.path} to train it again"
            ) from error

    def _untrained(self) -> nn.Module:
        """The encoder as the run began with it."""
        method = make_method(self.config)
        if self.config.init is not None:
            initialise(method.trained_encoder, self.config.init)
            method.initialised()
        return method.encoder
