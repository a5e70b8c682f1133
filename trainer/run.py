"""One run: training, the final evaluation and the export, told in its folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from trainer import parts
from trainer.engine.loop import CollapsedError, Loop
from trainer.engine.progress import ProgressLine
from trainer.engine.recording import recording
from trainer.engine.run_folder import CONFIG, ENVIRONMENT, RESULTS, Metrics, RunFolder, environment
from trainer.engine.signals import StopRequest
from trainer.export import save_encoder
from trainer.methods.base import Method, Progress
from trainer.nn.collectives import together
from trainer.nn.init import initialise
from trainer.nn.precision import Precision
from trainer.resume import Start
from trainer.settle import Settled

_MOST_CPU_WEIGHTS = 2_000_000  # of an encoder that a CPU trains in minutes


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
        lines = [f"{self.state}: {self.folder}", *_final_lines(self.results)]
        return "\n".join([*lines, f"encoder for timm: local-dir:{self.folder / 'encoder'}"])


def _final_lines(results: Mapping[str, Any]) -> list[str]:
    """The final evaluation beside what the untrained encoder and the pixels themselves reach."""
    final = results.get("final") or {}
    names = [name for name in final if f"pixels_{name}" in final]
    if not names:
        return []
    queries, before = final["queries"], results.get("knn_before")
    lines = [
        f"  accuracy on {queries} query images (one of them is {1 / queries:.1%})",
        _row("", "encoder", "raw pixels"),
    ]
    if before is not None:
        lines.append(_row("knn before training", f"{before:.1%}", ""))
    lines += [_row(name, f"{final[name]:.1%}", f"{final[f'pixels_{name}']:.1%}") for name in names]
    of_student = [name for name in ("student_knn", "student_linear") if name in final]
    lines += [_row(name.replace("_", "'s "), f"{final[name]:.1%}", "") for name in of_student]
    if final["knn"] <= final["pixels_knn"]:
        lines.append(f"  no better than raw pixels after {results['steps']} steps: train longer, or look at the log")
    return lines


def _row(name: str, encoder: str, pixels: str) -> str:
    return f"  {name:<20} {encoder:>10} {pixels:>12}".rstrip()


class Run:
    """The parts of one run, made in the order in which they need each other."""

    def __init__(
        self,
        settled: Settled,
        method: Method,
        accelerator: Accelerator,
        chosen: Precision,
        folder: RunFolder,
        line: ProgressLine,
        start: Start,
    ) -> None:
        config, rows = settled.config, settled.rows
        self.config, self.accelerator, self.folder, self.line, self.start = config, accelerator, folder, line, start
        if config.init is not None and start.saved is None:
            line.say(initialise(method.trained_encoder, config.init))
            method.initialised()
        self.method = parts.fit_to_device(method, config.run, chosen, accelerator)
        cursor = start.saved.cursor if start.saved else (0, 0)
        self.loader = parts.make_loader(config, settled.policy, self.method, accelerator, cursor)
        self.schedule = parts.make_schedule(config, self.loader.steps_per_epoch)
        self.held_out = parts.make_held_out(config, rows, accelerator.device)
        self._say_what_was_adapted()

    def carry_out(self, stop: StopRequest) -> Outcome:
        """Train, evaluate, export; the run folder tells all of it."""
        together(self._describe)
        began = time.time()
        after = self.start.saved.step if self.start.saved else -1
        with recording(self.folder, self.accelerator, after_step=after, say=self.line.say) as metrics:
            loop = self._make_loop(metrics)
            try:
                with self.loader:
                    done = loop.run(stop)
                final = self._final() if done else {}
            except CollapsedError as error:
                results = self._results("collapsed", loop) | {"reason": str(error)}
                together(lambda: self._write(results))  # torchrun ends all once one has ended: not before this is told
                raise
            finally:
                self.line.close()
        if not done:
            return self._outcome("stopped", {"step": loop.step})
        results = self._results("finished", loop) | final | {"wall_seconds": time.time() - began}
        together(self._export)
        together(lambda: self._write(results))
        self.accelerator.free_memory()
        return self._outcome("finished", results)

    def _outcome(self, state: str, results: dict[str, Any]) -> Outcome:
        main = self.accelerator.is_main_process
        return Outcome(state=state, folder=self.folder.path, results=results, is_main=main)

    def _say_what_was_adapted(self) -> None:
        schedule, say = self.schedule, self.line.say
        total, per_epoch = schedule.total_steps, schedule.steps_per_epoch
        weights = sum(parameter.numel() for parameter in self.method.encoder.parameters())
        on_cpu = self.accelerator.device.type == "cpu" and weights > _MOST_CPU_WEIGHTS
        hint = "; expect hours, a smaller --encoder or a *-digits recipe takes minutes" if on_cpu else ""
        say(f"encoder {self.config.encoder.name}, {weights / 1e6:.2f} M weights, on {self.accelerator.device}{hint}")
        say(f"{total} steps of {schedule.batch_size} images, {per_epoch} an epoch")
        asked, steps = schedule.asked_warmup_steps, schedule.warmup_steps
        if steps < asked:
            share = f"{schedule.config.warmup_share:.3g} of the run (optim.warmup_share)"
            say(f"warm-up of {asked} steps shortened to {share}, {steps} steps")
        start = Progress(step=0, total_steps=total, steps_per_epoch=per_epoch, batch_size=schedule.batch_size)
        for note in self.method.notes(start):
            say(note)
        if self.held_out is None:
            say("the set has too few labelled real images for kNN: the log shows losses only")

    def _make_loop(self, metrics: Metrics | None) -> Loop:
        config = self.config
        loop = Loop(
            stepper=parts.make_stepper(config, self.method, self.schedule, self.accelerator),
            loader=self.loader,
            folder=self.folder,
            line=self.line,
            pace=parts.make_pace(config, self.schedule.steps_per_epoch),
            batch_size=config.run.batch_size,
            accumulation=config.run.accumulation,
            fingerprint=self.loader.fingerprint,
            probe=self._probe,
            metrics=metrics,
        )
        if self.start.saved is not None:
            loop.restore(self.start.saved)
        return loop

    def _probe(self) -> dict[str, float | int]:
        return {} if self.held_out is None else self.held_out.online(self.method.encoder)

    def _final(self) -> dict[str, Any]:
        if self.held_out is None or not self.config.evaluation.final:
            return {}
        encoder, student = self.method.encoder, self.method.trained_encoder
        try:
            final = self.held_out.final(encoder)
            if student is not encoder:
                final |= self.held_out.clean(student, "student_")
            return {"final": final}
        except FloatingPointError as error:
            raise CollapsedError(
                f"{error} in the final evaluation; next: lower optim.lr, with another --out"
            ) from error

    def _describe(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.create()
            if not self.folder.exists():
                self.folder.write_text(CONFIG, self.config.to_yaml())
            self.folder.write_json(ENVIRONMENT, environment(sys.argv))
            self.line.say(f"{self.config.to_yaml().rstrip()}\nrun folder {self.folder.path}")

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
            "note": "the query images were trained on too, without labels" if self.held_out else "no labels: no kNN",
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

    def _write(self, results: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.folder.write_json(RESULTS, results)
