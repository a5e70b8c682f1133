"""`trainer finetune`: every tuner at its learning rates with every seed, then one table, one picture, results.json."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from manifests.errors import UsageError
from manifests.storage import explained
from trainer.data.order import micro_batch_size
from trainer.engine.launch import adopt_srun, common_folder, shared
from trainer.engine.progress import ProgressLine
from trainer.engine.run_folder import CONFIG, ENVIRONMENT, RESULTS, RunFolder, environment
from trainer.engine.signals import StopRequest, stop_requested
from trainer.evaluate.retention import Retention
from trainer.finetune import picture, results
from trainer.finetune.inputs import INPUTS, check_inputs, inputs_of
from trainer.finetune.leg import Leg, LegRun
from trainer.finetune.settle import Request, Settled, settle
from trainer.finetune.shop import Shop
from trainer.nn import precision
from trainer.nn.collectives import together
from trainer.resume import check_same
from trainer.tuners.spec import TunerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended: `finished`, `diverged` (a leg did), `stopped` or `already finished`."""

    state: str
    folder: str
    results: dict[str, Any]
    is_main: bool

    def text(self) -> str:
        """For people."""
        if self.state == "stopped":
            return f"stopped; go on with the same command and --out {self.folder}"
        return f"{self.state}: {self.folder}\n{results.text(self.results)}"


def finetune(request: Request) -> Outcome:
    """Run, or go on with, what was asked. Raises `DiffmixError`s."""
    adopt_srun(os.environ)
    processes = PartialState(cpu=not torch.cuda.is_available())
    settled = together(lambda: _settled(request, processes.num_processes))
    folder, main = common_folder(request.out, "finetune"), processes.is_main_process
    line = ProgressLine(speaks=main)
    with contextlib.ExitStack() as stack:
        found = shared(together(lambda: _begin(folder, settled, line, stack if main else None)))
        together(lambda: _check_reach(folder))
        if found is not None:
            state = "already finished" if found["state"] == "finished" else found["state"]
            return Outcome(state=state, folder=str(folder.path), results=found, is_main=main)
        stop = stack.enter_context(stop_requested())
        return _Comparison(settled, folder, line, processes).carry_out(stop)


def _settled(request: Request, num_processes: int) -> Settled:
    """What is asked; refuses what cannot be before anything is written."""
    settled = settle(request)
    run = settled.config.run
    micro_batch_size(run.batch_size, num_processes, run.accumulation)
    return settled


def describe(request: Request) -> dict[str, Any]:
    """What would be trained, for `--dry-run`. Trains nothing."""
    settled = _settled(request, 1)
    legs = [leg.name for spec in settled.specs for leg in _legs(settled, spec, _rates(settled, spec))]
    lines = [*settled.notes, settled.config.to_yaml().rstrip(), *_described(settled), f"{len(legs)} runs:", *legs]
    return {"config": settled.config.to_dict(), "runs": legs, "text": "\n".join(lines)}


def _begin(
    folder: RunFolder, settled: Settled, line: ProgressLine, stack: contextlib.ExitStack | None
) -> dict[str, Any] | None:
    """Lock and describe the folder; the results of a comparison that is complete already."""
    if stack is not None:
        stack.enter_context(folder.locked())
    inputs = inputs_of(settled)
    if folder.exists():
        check_same(folder.path, settled.config, "another --out for other settings")
        check_inputs(folder, inputs)
        found = folder.results()
        if found is not None:
            line.say(f"{folder.path} is finished: nothing to do")
            return found
        line.say(f"going on in {folder.path}")
    if stack is not None:
        folder.write_json(ENVIRONMENT, environment(sys.argv))
        if not folder.exists():
            folder.write_json(INPUTS, inputs)
            folder.write_text(CONFIG, settled.config.to_yaml())
    for note in (*settled.notes, settled.config.to_yaml().rstrip(), *_described(settled)):
        line.say(note)
    return None


def _check_reach(folder: RunFolder) -> None:
    """What one process saves the others load."""
    if not folder.exists():
        raise UsageError(f"{folder.path} is not the same folder on all machines: choose an --out that they share")


def _described(settled: Settled) -> list[str]:
    parts = [
        f"task {task.name}: {len(task.class_names)} classes, {len(task.train)} training, {len(task.validation)} "
        f"validation and {len(task.test)} test images of {task.location}"
        for task in settled.tasks
    ]
    parts.append(f"images are shown at {settled.views.size} px, as the encoder was trained")
    source = settled.source
    if source is not None:
        parts.append(f"source {source.location}: bank {len(source.bank)}, {len(source.queries)} queries; {source.note}")
    return parts


class _Comparison:
    """All legs, one after the other."""

    def __init__(self, settled: Settled, folder: RunFolder, line: ProgressLine, processes: PartialState) -> None:
        self.settled, self.folder, self.line = settled, folder, line
        encoder, device = settled.encoder, processes.device
        kind: precision.EncoderKind = "vit" if hasattr(encoder, "patch_embed") else "convnet"
        chosen = precision.choose(device, kind, settled.config.run.precision)
        line.say(chosen.reason)
        self.shop = Shop(
            settled=settled,
            encoder=encoder.to(device),
            folder=folder,
            line=line,
            precision=chosen,
            device=device,
            is_main=processes.is_main_process,
            retention=_retention(settled, device),
        )

    def carry_out(self, stop: StopRequest) -> Outcome:
        """Train what was asked, and report."""
        rows: list[dict[str, Any]] = []
        tried: list[dict[str, Any]] = []
        try:
            for leg, is_trial in self._legs(tried):
                row = self._one(leg, stop)
                if row is None:
                    return self._outcome("stopped", {})
                (tried if is_trial else rows).append(row)
        finally:
            self.line.about = ""
            self.line.close()
        return self._report(rows, tried)

    def _one(self, leg: Leg, stop: StopRequest) -> dict[str, Any] | None:
        self.line.about = leg.name
        row = LegRun(self.shop, leg).carry_out(stop)
        if row is not None:
            self.line.say(results.leg_line(row))
        return row

    def _legs(self, tried: list[dict[str, Any]]) -> Iterator[tuple[Leg, bool]]:
        """Every leg, and whether it is only a trial of a sweep; `tried` holds the rows of the trials so far."""
        for spec in self.settled.specs:
            rates: Sequence[float] = self.settled.config.rates.of(spec.name)
            if self.settled.config.sweep:
                grid = self.settled.config.rates.grid_of(spec.name)
                yield from ((leg, True) for leg in _legs(self.settled, spec, grid, seeds=1))
                rates = results.chosen_rates(spec, tried)
                self.line.say(
                    f"{spec.text}: shown at {', '.join(f'{rate:g}' for rate in rates)}, by validation accuracy"
                )
            yield from ((leg, False) for leg in _legs(self.settled, spec, rates))

    def _report(self, rows: list[dict[str, Any]], tried: list[dict[str, Any]]) -> Outcome:
        found = results.collect(self.settled, self.shop.before, rows, tried)
        together(lambda: self._write(found) if self.shop.is_main else None)
        return self._outcome(found["state"], found)

    def _write(self, found: dict[str, Any]) -> None:
        with explained("write", str(self.folder.path)):
            found["pictures"] = [str(path) for path in picture.draw(found, self.folder.path)]
        self.folder.write_json(RESULTS, found)

    def _outcome(self, state: str, found: dict[str, Any]) -> Outcome:
        return Outcome(state=state, folder=str(self.folder.path), results=found, is_main=self.shop.is_main)


def _retention(settled: Settled, device: torch.device) -> Retention | None:
    if settled.source is None:
        return None
    return Retention(
        bank=settled.source.bank,
        queries=settled.source.queries,
        size=settled.views.size,
        device=device,
        k=settled.config.evaluation.k,
        temperature=settled.config.evaluation.temperature,
    )


def _rates(settled: Settled, spec: TunerSpec) -> Sequence[float]:
    rates = settled.config.rates
    return rates.grid_of(spec.name) if settled.config.sweep else rates.of(spec.name)


def _legs(settled: Settled, spec: TunerSpec, rates: Sequence[float], seeds: int | None = None) -> list[Leg]:
    first = settled.config.run.seed
    numbers = range(first, first + (seeds or settled.config.seeds))
    return [Leg(spec=spec, learning_rate=rate, seed=seed) for rate in rates for seed in numbers]
