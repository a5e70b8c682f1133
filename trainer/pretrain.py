"""`trainer pretrain`: settings to a trained encoder in a run folder."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from trainer.choices import class_of
from trainer.config import PretrainConfig
from trainer.data.loader import Loader
from trainer.data.order import Cursor, batches, micro_batch_size
from trainer.engine.launch import adopt_srun, together
from trainer.engine.loop import CollapsedError, Loop, Pace
from trainer.engine.optim import Schedule, make_optimiser
from trainer.engine.progress import ProgressLine
from trainer.engine.run_folder import CONFIG, ENVIRONMENT, RESULTS, Metrics, RunFolder, environment
from trainer.engine.signals import StopRequest, stop_requested
from trainer.engine.stepper import Stepper
from trainer.evaluate.held_out import HeldOut, split
from trainer.export import save_encoder
from trainer.methods import METHODS
from trainer.methods.base import Method, Progress
from trainer.nn import precision
from trainer.nn.batchnorm import synchronised
from trainer.nn.encoders import check_size, make_encoder
from trainer.nn.init import initialise
from trainer.resume import Start, check_agreed, start_of
from trainer.settle import Request, Settled, settle


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended: `finished`, `stopped` (go on with the same command) or `already finished`."""

    state: str
    folder: Path
    results: dict[str, Any]
    is_main: bool = True  # of several processes the one that reports

    def text(self) -> str:
        """For people."""
        if self.state == "stopped":
            return f"stopped at step {self.results['step']}; go on with the same command and --out {self.folder}"
        lines = [f"{self.state}: {self.folder}"]
        final = self.results.get("final", {})
        rows = [(name, final[name], final.get(f"pixels_{name}")) for name in final if f"pixels_{name}" in final]
        lines += [f"  {name:<20} {value:.1%}   raw pixels {pixels:.1%}" for name, value, pixels in rows]
        return "\n".join([*lines, f"encoder for timm: local-dir:{self.folder / 'encoder'}"])


def pretrain(request: Request) -> Outcome:
    """Run, or go on with, what was asked. Raises `DiffmixError`s; `CollapsedError` after writing results.json."""
    adopt_srun(os.environ)
    settled = settle(request)
    chosen = _precision(settled.config)
    processes = PartialState(cpu=not torch.cuda.is_available())
    run, main = settled.config.run, processes.is_main_process
    micro_batch_size(run.batch_size, processes.num_processes, run.accumulation)  # refuses before anything is made
    folder = RunFolder(_shared(request.out or _default_out(settled.config)))
    accelerator = _accelerator(settled.config, chosen, folder)
    line = ProgressLine(speaks=main)
    with contextlib.ExitStack() as stack:
        start = together(lambda: _start(folder, settled, request.resume, stack if main else None))
        check_agreed(start, folder)
        for note in (*settled.notes, chosen.reason, start.note):
            line.say(note) if note else None
        if start.finished is not None:
            return Outcome(state="already finished", folder=folder.path, results=start.finished, is_main=main)
        stop = stack.enter_context(stop_requested())
        return _Run(settled, accelerator, chosen, folder, line, start).carry_out(stop)


def _start(folder: RunFolder, settled: Settled, resume: str, stack: contextlib.ExitStack | None) -> Start:
    """Where the run goes on, as this process sees the folder; with a `stack` that locks it."""
    if stack is not None:
        stack.enter_context(folder.locked())
    config = settled.config
    return start_of(folder, config, resume, fingerprint=settled.fingerprint, anyway=config.data.allow_changed)


def describe(request: Request) -> dict[str, Any]:
    """What a run would be: settings and counts, for `--dry-run`. Makes and trains nothing."""
    settled = settle(request)
    config = settled.config
    items = settled.policy.num_items
    per_epoch = batches(items, config.run.batch_size)
    steps = total_steps(config, per_epoch)
    counts = f"{items} samples, {per_epoch} steps an epoch, {steps} steps of {config.run.batch_size} images"
    return {
        "config": config.to_dict(),
        "samples": items,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "text": "\n".join([*settled.notes, config.to_yaml() + counts]),
    }


def total_steps(config: PretrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the run: `max_steps` where given, else all epochs."""
    return config.run.max_steps or max(1, round(config.run.epochs * steps_per_epoch))


class _Run:
    """The parts of one run, made in the order in which they need each other."""

    def __init__(
        self,
        settled: Settled,
        accelerator: Accelerator,
        chosen: precision.Precision,
        folder: RunFolder,
        line: ProgressLine,
        start: Start,
    ) -> None:
        self.config, self.rows = settled.config, settled.rows
        self.accelerator, self.folder, self.line, self.start = accelerator, folder, line, start
        self.method = self._make_method(chosen)
        self.loader = self._make_loader()
        self.schedule = self._make_schedule()
        self.held_out = self._make_held_out()

    def carry_out(self, stop: StopRequest) -> Outcome:
        """Train, evaluate, export; the run folder tells all of it."""
        self._open_folder()
        began = time.time()
        with self._metrics() as metrics:
            loop = self._make_loop(metrics)
            try:
                with self.loader:
                    done = loop.run(stop)
                final = self._final() if done else {}
            except CollapsedError as error:
                self._write(RESULTS, self._results("collapsed", loop) | {"reason": str(error)})
                self.accelerator.wait_for_everyone()  # torchrun ends all once one has ended: not before this is told
                raise
            finally:
                self.line.close()
        if not done:
            return self._outcome("stopped", {"step": loop.step})
        results = self._results("finished", loop) | final | {"wall_seconds": time.time() - began}
        self._export()
        self._write(RESULTS, results)
        self.accelerator.end_training()
        return self._outcome("finished", results)

    def _outcome(self, state: str, results: dict[str, Any]) -> Outcome:
        main = self.accelerator.is_main_process
        return Outcome(state=state, folder=self.folder.path, results=results, is_main=main)

    def _make_method(self, chosen: precision.Precision) -> Method:
        config = self.config
        torch.manual_seed(config.run.seed)

        def encoder(**overrides: Any) -> nn.Module:
            return make_encoder(config.encoder, config.views.size, **overrides)

        method: Method = class_of(METHODS, config.method.name)(encoder, config.method.settings)
        if method.num_local_crops:
            check_size(method.trained_encoder, config.encoder.name, config.views.local_size)
        if config.init is not None and self.start.saved is None:
            self.line.say(initialise(method.trained_encoder, config.init))
            method.initialised()
        precision.prepare(method, chosen)
        if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            method = synchronised(method)
        if config.run.compile:
            method.trained_encoder.compile()
        return method

    def _make_loader(self) -> Loader:
        config = self.config
        return Loader(
            self.rows,
            config.mix,
            config.views,
            num_crops=self.method.num_crops,
            num_local_crops=self.method.num_local_crops,
            batch_size=config.run.batch_size,
            seed=config.run.seed,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            accumulation=config.run.accumulation,
            cursor=Cursor(*self.start.saved.cursor) if self.start.saved else Cursor(0, 0),
            workers=config.data.workers,
            cache_bytes=config.data.cache,
        )

    def _make_schedule(self) -> Schedule:
        run, per_epoch = self.config.run, self.loader.steps_per_epoch
        total = total_steps(self.config, per_epoch)
        schedule = Schedule(
            config=self.config.optim, batch_size=run.batch_size, total_steps=total, steps_per_epoch=per_epoch
        )
        self.line.say(f"{total} steps of {run.batch_size} images, {per_epoch} an epoch")
        asked, steps = schedule.asked_warmup_steps, schedule.warmup_steps
        if steps < asked:
            self.line.say(f"warm-up of {asked} steps shortened to a tenth of the run, {steps} steps")
        for note in self.method.notes(Progress(step=0, total_steps=total, steps_per_epoch=per_epoch)):
            self.line.say(note)
        return schedule

    def _make_held_out(self) -> HeldOut | None:
        settings = self.config.evaluation
        parts = split(self.rows, bank=settings.bank, queries=settings.queries)
        if parts is None:
            self.line.say("the set has too few labelled real images for kNN: the log shows losses only")
            return None
        return HeldOut(
            rows=self.rows,
            split=parts,
            views=self.config.views,
            device=self.accelerator.device,
            k=settings.k,
            temperature=settings.temperature,
        )

    def _make_loop(self, metrics: Metrics | None) -> Loop:
        config, run = self.config, self.config.run
        stepper = Stepper(
            accelerator=self.accelerator,
            method=self.method,
            optimiser=make_optimiser(self.method, config.optim),
            schedule=self.schedule,
            seed=run.seed,
        )
        loop = Loop(
            stepper=stepper,
            loader=self.loader,
            folder=self.folder,
            line=self.line,
            pace=Pace(
                log=run.log_every,
                checkpoint=config.checkpoint.every,
                keep=config.checkpoint.keep,
                probe=self._probe_steps(),
            ),
            batch_size=run.batch_size,
            accumulation=run.accumulation,
            fingerprint=self.loader.fingerprint,
            probe=self._probe,
            metrics=metrics,
        )
        if self.start.saved is not None:
            loop.restore(self.start.saved)
        return loop

    def _probe_steps(self) -> int:
        epochs = self.config.evaluation.every
        return max(1, round(epochs * self.schedule.steps_per_epoch)) if epochs else 0

    def _probe(self) -> dict[str, float | int]:
        return {} if self.held_out is None else self.held_out.online(self.method.encoder)

    def _final(self) -> dict[str, Any]:
        if self.held_out is None or not self.config.evaluation.final:
            return {}
        try:
            return {"final": self.held_out.final(self.method.encoder)}
        except FloatingPointError as error:
            raise CollapsedError(
                f"{error} in the final evaluation; next: lower optim.lr, with another --out"
            ) from error

    def _open_folder(self) -> None:
        together(self._describe)
        step = self.start.saved.step if self.start.saved else 0
        self.accelerator.init_trackers("diffmix", init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def _describe(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.create()
            if not self.folder.exists():
                self.folder.write_text(CONFIG, self.config.to_yaml())
            self.folder.write_json(ENVIRONMENT, environment(sys.argv))
            self.line.say(f"{self.config.to_yaml().rstrip()}\nrun folder {self.folder.path}")

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[Metrics | None]:
        if not self.accelerator.is_main_process:
            yield None
            return
        with self.folder.metrics(after_step=self.start.saved.step if self.start.saved else -1) as metrics:
            yield metrics

    def _results(self, state: str, loop: Loop) -> dict[str, Any]:
        latest, config = loop.latest, self.config
        return {
            "state": state,
            "method": config.method.name,
            "mix": config.mix.policy,
            "encoder": config.encoder.name,
            "steps": loop.step,
            "epochs": loop.step / self.schedule.steps_per_epoch,
            "seconds": loop.meter.seconds,
            "loss": latest.get("loss"),
            "knn": latest.get("knn"),
            "knn_before": loop.first.get("knn"),
            "feature_rank": latest.get("feature_rank"),
            "images_per_second": loop.step * config.run.batch_size / max(loop.meter.seconds, 1e-9),
            "note": "training saw the asking images without their labels" if self.held_out else "no labels: no kNN",
        }

    def _export(self) -> None:
        if self.accelerator.is_main_process:
            views = self.config.views
            save_encoder(
                self.method.encoder,
                self.folder.encoder,
                config=self.config.encoder,
                image_size=views.size,
                mean=views.mean,
                std=views.std,
            )

    def _write(self, name: str, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.folder.write_json(name, values)


def _precision(config: PretrainConfig) -> precision.Precision:
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    kind: precision.EncoderKind = (
        "vit" if hasattr(make_encoder(config.encoder, config.views.size), "patch_embed") else "convnet"
    )
    return precision.choose(device, kind, config.run.precision)


def _accelerator(config: PretrainConfig, chosen: precision.Precision, folder: RunFolder) -> Accelerator:
    mixed = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[chosen.dtype]
    return Accelerator(
        mixed_precision=mixed,
        cpu=not torch.cuda.is_available(),
        log_with=["tensorboard", *config.run.trackers],
        project_dir=folder.path,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _default_out(config: PretrainConfig) -> str:
    return f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.method.name}"


def _shared(text: str) -> str:
    """The main process's text, on all."""
    found = [text]
    broadcast_object_list(found)
    return found[0]
