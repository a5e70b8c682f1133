"""A task of a leg: the training loop over its images, its restart points, and the curve of gain and forgetting."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from accelerate import Accelerator

from manifests.storage import explained
from trainer import parts
from trainer.data import mixing
from trainer.data.loader import Loader
from trainer.data.mixing import MixConfig
from trainer.data.order import Cursor, batches
from trainer.data.tasks import Task
from trainer.engine import checkpoint
from trainer.engine.checkpoint import Checkpoint
from trainer.engine.launch import make_accelerator, shared
from trainer.engine.loop import Loop, Pace, Values
from trainer.engine.optim import OptimConfig, Schedule, make_optimiser
from trainer.engine.recording import recording
from trainer.engine.run_folder import METRICS, Metrics, RunFolder
from trainer.engine.signals import StopRequest
from trainer.engine.stepper import Stepper
from trainer.finetune.classifier import Classifier
from trainer.finetune.config import FinetuneConfig
from trainer.finetune.shop import Shop
from trainer.nn.collectives import together

_MEASURED = ("new_accuracy", "source_accuracy", "source_linear_accuracy")


@dataclass(kw_only=True)
class Stage:
    """Trains `method` on a task's training part; `folder` holds its restart points and metrics.

    `is_fresh` says that the encoder is still the untouched one, whose source accuracy is known.
    """

    shop: Shop
    spec_name: str
    learning_rate: float
    seed: int
    task: Task
    method: Classifier
    folder: RunFolder
    is_fresh: bool

    def train(self, stop: StopRequest) -> dict[str, Any] | None:
        """The curve and what the training took; None if a signal stopped it, with a checkpoint of where it was."""
        together(self.folder.create)
        saved = together(self._saved)
        after, say = saved.step if saved else -1, self.shop.line.say
        with (
            self._loader(saved) as loader,
            recording(self.folder, self.accelerator, after_step=after, say=say) as metrics,
        ):
            loop = self._loop(loader, saved, metrics)
            if not loop.run(stop):
                return None
        self.accelerator.free_memory()
        return {
            "curve": shared(together(lambda: self._curve() if self.shop.is_main else [])),
            "seconds": loop.meter.seconds,
            "steps": loop.step,
        }

    @cached_property
    def accelerator(self) -> Accelerator:
        """Of this stage: its trackers write into the stage's folder."""
        return make_accelerator(self.shop.precision, self.config.run.trackers, self.folder.path)

    @property
    def config(self) -> FinetuneConfig:
        """Settings of the whole comparison."""
        return self.shop.settled.config

    @cached_property
    def optim(self) -> OptimConfig:
        """The recipe's, with the rate of this leg."""
        rates = self.config.rates
        warmup = rates.warmup_of(self.spec_name) if rates.warmup_epochs is None else None
        return replace(
            self.config.optim,
            lr=self.learning_rate,
            reference_batch=None,
            warmup_steps=warmup,
            warmup_epochs=rates.warmup_epochs or 0.0,
        )

    def _saved(self) -> Checkpoint | None:
        saved, skipped = checkpoint.newest(self.folder.checkpoints)
        for path in skipped:
            self.shop.line.say(f"{path} is damaged and is passed over")
        if saved is not None:
            self.shop.line.say(f"going on from step {saved.step}")
        return saved

    def _loader(self, saved: Checkpoint | None) -> Loader:
        run, data = self.config.run, self.config.data
        return Loader(
            mixing.make(MixConfig(policy="real"), self.task.train),
            self.shop.settled.views,
            num_crops=1,
            num_local_crops=0,
            batch_size=run.batch_size,
            seed=self.seed,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            accumulation=run.accumulation,
            cursor=Cursor(*saved.cursor) if saved else Cursor(),
            workers=data.workers,
            cache_bytes=data.cache,
            with_labels=True,
            rand_augment=self.shop.settled.rand_augment,
        )

    def _loop(self, loader: Loader, saved: Checkpoint | None, metrics: Metrics | None) -> Loop:
        config = self.config
        schedule = self._schedule()
        loop = Loop(
            stepper=Stepper(
                accelerator=self.accelerator,
                method=parts.fit_to_device(self.method, config.run, self.shop.precision, self.accelerator),
                optimiser=make_optimiser(self.method, self.optim, self.method.tuner.encoder),
                schedule=schedule,
                seed=self.seed,
            ),
            loader=loader,
            folder=self.folder,
            line=self.shop.line,
            pace=Pace(
                log=config.run.log_every,
                checkpoint=config.checkpoint.every,
                keep=config.checkpoint.keep,
                probe=frozenset(config.evaluation.at) | {schedule.total_steps},
            ),
            batch_size=config.run.batch_size,
            accumulation=config.run.accumulation,
            fingerprint=loader.fingerprint,
            probe=lambda: self._probe(loop.step),
            metrics=metrics,
        )
        if saved is not None:
            loop.restore(saved)
        return loop

    def _schedule(self) -> Schedule:
        run = self.config.run
        per_epoch = batches(len(self.task.train), run.batch_size)
        total = parts.total_steps(run, per_epoch)
        return Schedule(config=self.optim, batch_size=run.batch_size, total_steps=total, steps_per_epoch=per_epoch)

    def _probe(self, step: int) -> Values:
        network = self.method.network
        untouched = self.is_fresh and step == 0
        source = self.shop.before if untouched else self.shop.source(network)
        return {"new_accuracy": self.shop.accuracy(network, self.method.head, self.task.test), **source}

    def _curve(self) -> list[dict[str, float | int]]:
        """What was measured, by iteration, as the main process wrote it down."""
        points: list[dict[str, float | int]] = []
        with explained("read", str(self.folder.path / METRICS)):
            lines = (self.folder.path / METRICS).read_text("utf-8").splitlines()
        for line in lines:
            values = json.loads(line)
            if "new_accuracy" in values:
                points.append(
                    {"iteration": values["step"]} | {name: values[name] for name in _MEASURED if name in values}
                )
        return points
