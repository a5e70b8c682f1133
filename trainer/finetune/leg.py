"""One line of the comparison: a tuner at a learning rate with a seed, trained on the tasks one after the other.

Every task has a folder with checkpoints while it is trained, and afterwards with what was trained, its head and what
was measured, so that a leg that was stopped goes on exactly, and a finished one is not trained again.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from manifests.errors import DiffmixError
from manifests.storage import explained
from trainer.data.image_set import ImageSet
from trainer.engine.launch import shared
from trainer.engine.loop import CollapsedError
from trainer.engine.run_folder import CHECKPOINTS, RESULTS, RunFolder
from trainer.engine.signals import StopRequest
from trainer.export import ExportError, save_encoder
from trainer.finetune import sequence
from trainer.finetune.classifier import Classifier, new_head
from trainer.finetune.regularise import regulariser
from trainer.finetune.shop import Shop
from trainer.finetune.stage import Stage
from trainer.nn import precision
from trainer.nn.collectives import together
from trainer.nn.encoders import EncoderConfig
from trainer.tuners import files
from trainer.tuners.base import Tuner, make_tuner
from trainer.tuners.spec import TunerSpec

ADAPTER, HEAD = "adapter", "head.safetensors"
_CHECKED = 16  # test images on which what was saved must give the same logits
_SAME = 1e-5  # of the largest logit


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What is trained, and how."""

    spec: TunerSpec
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and of its lines in the log."""
        return f"{self.spec.text.replace(':', '-')}-lr{self.learning_rate:g}-seed{self.seed}"


class LegRun:
    """A leg's encoder on its way through the tasks."""

    def __init__(self, shop: Shop, leg: Leg) -> None:
        self.shop, self.leg = shop, leg
        self.folder = RunFolder(shop.folder.path / leg.name)
        self.heads: list[nn.Linear] = []
        self.matrix: sequence.Matrix = []
        self.curve: list[dict[str, float | int]] = []
        self.seconds = 0.0

    def carry_out(self, stop: StopRequest) -> dict[str, Any] | None:
        """What was measured, as in results.json; None if a signal stopped the leg before its end."""
        finished = shared(self.folder.results())
        if finished is not None:
            return finished
        torch.manual_seed(self.leg.seed)  # LoRA draws its first matrices
        self.tuner = self._new_tuner()
        try:
            for number in range(len(self.shop.settled.tasks)):
                if not self._task(number, stop):
                    return None
        except (CollapsedError, FloatingPointError) as error:
            return self._write({**self._about(), "state": "diverged", "reason": str(error)})
        return self._write({**self._about(), "state": "finished", **self._final()})

    def _task(self, number: int, stop: StopRequest) -> bool:
        """Train task `number`, or take what an earlier call trained; False if a signal stopped it."""
        task = self.shop.settled.tasks[number]
        folder = RunFolder(self.folder.path / f"{number + 1:02d}-{task.name}")
        if len(self.shop.settled.tasks) > 1:
            self.shop.line.about = f"{self.leg.name} {task.name}"
        head = new_head(int(self.shop.num_features), len(task.class_names), self.leg.seed)
        self.heads.append(head.to(self.shop.device))
        if number and self._has_own_adapters:
            torch.manual_seed(self.leg.seed)  # also where an earlier call trained what comes before
            self.tuner.add(self._adapter(number))
        facts = shared(folder.results())
        if facts is None:
            trained = self._stage(number, folder).train(stop)
            if trained is None:
                return False
            facts = self._finish(number, folder, trained)
        else:
            together(lambda: self._load(self.tuner, self.heads[-1], folder.path, self._adapter(number)))
        self.matrix.append(facts["accuracies"])
        self.curve += [point | {"task": number} for point in facts["curve"]]
        self.seconds += facts["seconds"]
        self._facts = facts
        return True

    def _stage(self, number: int, folder: RunFolder) -> Stage:
        images, head = self.shop.settled.config.images, self.heads[number]
        return Stage(
            shop=self.shop,
            spec_name=self.leg.spec.name,
            learning_rate=self.leg.learning_rate,
            seed=self.leg.seed,
            task=self.shop.settled.tasks[number],
            method=Classifier(self.tuner, head, regulariser(images, head.out_features)),
            folder=folder,
            is_fresh=number == 0 or self._has_own_adapters,
        )

    def _finish(self, number: int, folder: RunFolder, trained: dict[str, Any]) -> dict[str, Any]:
        """Save what was trained, check that it loads, measure every task so far; the results make the task done."""
        shop, name = self.shop, self._adapter(number)
        together(lambda: self._save(folder.path) if shop.is_main else None)
        together(lambda: self._check_reload(folder.path, name, shop.settled.tasks[number].test))
        validation, test = zip(*(self._accuracies(task) for task in range(number + 1)), strict=True)
        facts = {**trained, "validation_accuracies": list(validation), "accuracies": list(test)}
        facts |= {"source_adapters_off": self._adapters_off()}
        together(lambda: _conclude(folder, facts) if shop.is_main else None)
        return facts

    def _accuracies(self, number: int) -> tuple[float, float]:
        """On the validation and test parts of a task, after which its adapter stays active."""
        task = self.shop.settled.tasks[number]
        if self._has_own_adapters:
            self.tuner.activate(self._adapter(number))
        validation, test = (
            self.shop.accuracy(self.tuner.model, self.heads[number], part) for part in (task.validation, task.test)
        )
        return validation, test

    def _adapters_off(self) -> float | None:
        """Accuracy on the source with adapters switched off."""
        if not self.tuner.has_adapters or self.shop.retention is None:
            return None
        with self.tuner.disabled():
            return self.shop.source(self.tuner.model)["source_accuracy"]

    def _save(self, folder: Path) -> None:
        self.tuner.save(folder / ADAPTER)
        files.replace_weights(folder / HEAD, self.heads[-1].state_dict())

    def _load(self, tuner: Tuner, head: nn.Linear, folder: Path, name: str) -> None:
        tuner.load(folder / ADAPTER, name)
        try:
            with explained("read", str(folder / HEAD)):
                head.load_state_dict(load_file(folder / HEAD))
        except (SafetensorError, RuntimeError) as error:
            raise DiffmixError(
                f"{folder / HEAD} is damaged ({error}): remove {self.folder.path} and run the same command again"
            ) from error

    @torch.inference_mode()
    def _check_reload(self, folder: Path, name: str, test: ImageSet) -> None:
        """What was saved must give the same logits in a fresh encoder."""
        fresh, head = self._new_tuner(), copy.deepcopy(self.heads[-1])
        nn.init.zeros_(head.weight)
        precision.prepare(fresh.model, self.shop.precision)
        self._load(fresh, head, folder, name)
        images = self.shop.images(test, _CHECKED)
        wanted = self.heads[-1](_evaluated(self.tuner.model, images))
        got = head(_evaluated(fresh.model, images))
        self.tuner.train()
        if not torch.allclose(wanted, got, rtol=0, atol=_SAME * max(1.0, wanted.abs().max().item())):
            raise DiffmixError(
                f"{folder / ADAPTER} does not give the logits that were trained: they differ by up to "
                f"{(wanted - got).abs().max().item():.3g}; nothing was lost, but the adapter cannot be used"
            )

    def _new_tuner(self) -> Tuner:
        encoder = copy.deepcopy(self.shop.encoder)
        return make_tuner(encoder, self.leg.spec, self.shop.settled.config.tuner)

    @property
    def _has_own_adapters(self) -> bool:
        """Whether each task has an adapter of its own."""
        return self.tuner.has_adapters and self.shop.settled.config.adapters == "per-task"

    def _adapter(self, number: int) -> str:
        return f"task-{number + 1}" if number and self._has_own_adapters else "default"

    def _about(self) -> dict[str, Any]:
        head = sum(value.numel() for value in self.heads[0].parameters())
        return {
            "tuner": self.leg.spec.text,
            "seed": self.leg.seed,
            "learning_rate": self.leg.learning_rate,
            "trainable_parameters": self.tuner.num_trainable + head,
            "folder": self.leg.name,
        }

    def _final(self) -> dict[str, Any]:
        before, last = self.shop.before, self.curve[-1]
        gained = sequence.average_accuracy(self.matrix)
        kept = last.get("source_accuracy")
        names = [task.name for task in self.shop.settled.tasks]
        return {
            "new_accuracy": gained,
            "validation_accuracy": fmean(self._facts["validation_accuracies"]),
            "source_accuracy_before": before.get("source_accuracy"),
            "source_accuracy_after": kept,
            "source_accuracy_adapters_off": self._facts["source_adapters_off"],
            "source_linear_accuracy_before": before.get("source_linear_accuracy"),
            "source_linear_accuracy_after": last.get("source_linear_accuracy"),
            "mean_accuracy": None if kept is None else (gained + kept) / 2,
            "seconds": self.seconds,
            "curve": self.curve,
            **sequence.summary(self.matrix, names),
        }

    def _write(self, facts: dict[str, Any]) -> dict[str, Any]:
        together(lambda: self._keep(facts) if self.shop.is_main else None)
        return shared(facts)

    def _keep(self, facts: dict[str, Any]) -> None:
        if facts["state"] == "finished":
            self._export()
        _conclude(self.folder, facts)

    def _export(self) -> None:
        """The adapted encoder as a plain timm model, where there is one; `linear` leaves the encoder as it was."""
        merged = self.tuner.merged() if self.leg.spec.name != "linear" else None
        if merged is None:
            return
        network, changed = merged
        origin, views = self.shop.settled.origin, self.shop.settled.views
        args = {**origin.network.args, **changed}
        args.pop("drop_path_rate", None)  # of this training, not of the network
        config = EncoderConfig(name=origin.network.name, args=args)
        try:
            save_encoder(
                network, self.folder.encoder, config=config, image_size=views.size, mean=views.mean, std=views.std
            )
        except ExportError as error:  # the adapter is saved and checked: it can be used without
            self.shop.line.say(f"there is no {self.folder.encoder}: {error}")


def _conclude(folder: RunFolder, facts: dict[str, Any]) -> None:
    """The results make a task, or a leg, done; restart points of what is done are of no use."""
    folder.write_json(RESULTS, facts)
    for left in folder.path.glob(f"**/{CHECKPOINTS}"):
        shutil.rmtree(left, ignore_errors=True)


def _evaluated(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return network.eval()(images)
