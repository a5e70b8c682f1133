"""`trainer compare`: every arm with every seed, an equal budget for each, one table.

What is done is told by the runs' folders alone, so that a stopped comparison goes on, and several processes may work on
one: a run that another one holds is passed over, and whoever comes last writes the whole table.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from trainer.compare import budget as budgets
from trainer.compare import results, table
from trainer.compare.arms import Arm, differing, open_arms
from trainer.compare.budget import Budget
from trainer.compare.evaluation import Exam, open_exam
from trainer.compare.runs import ArmRun
from trainer.compare.settings import CompareConfig, Request, resolve
from trainer.data.order import micro_batch_size
from trainer.engine.launch import adopt_srun, common_folder, shared
from trainer.engine.progress import ProgressLine
from trainer.engine.run_folder import RESULTS, RunFolder
from trainer.engine.signals import StopRequest, stop_requested
from trainer.nn.collectives import gather_objects, together
from trainer.text_table import aligned

PIXELS, TABLE = "pixels.json", "table.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended: `finished`, `collapsed` (a run did), `unfinished` (others are at the rest) or `stopped`."""

    state: str
    folder: str
    results: dict[str, Any]
    is_main: bool

    def text(self) -> str:
        """For people."""
        if self.state == "stopped":
            return f"stopped; go on with the same command and --out {self.folder}"
        more = "; another process is at the rest and will write the whole table" * (self.state == "unfinished")
        return f"{table.text(self.results)}\n\n{self.state}: {self.folder}{more}"


def compare(request: Request) -> Outcome:
    """Run, or go on with, what was asked. Raises `DiffmixError`s."""
    adopt_srun(os.environ)
    processes = PartialState(cpu=not torch.cuda.is_available())
    config, arms, exam = together(lambda: _opened(request, processes.num_processes))
    folder = common_folder(request.out, "compare")
    with stop_requested() as stop:
        return _Comparison(config, arms, exam, folder, processes, stop).carry_out()


def _opened(request: Request, num_processes: int) -> tuple[CompareConfig, tuple[Arm, ...], Exam]:
    """Settings, arms and what encoders are asked; refuses what cannot be before anything is written."""
    config, arms = open_arms(resolve(request), request)
    for arm in arms:
        run = arm.settled.config.run
        micro_batch_size(run.batch_size, num_processes, run.accumulation)
    return config, arms, open_exam(config)


def describe(request: Request) -> dict[str, Any]:
    """What would be trained, for `--dry-run`. Trains nothing."""
    config, arms, exam = _opened(request, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = budgets.known(RunFolder(request.out) if request.out else None, config, arms, device)
    facts = [_described(arm, budget) for arm in arms]
    found = differing(arms)
    lines = [config.to_yaml().rstrip(), *_notes(arms), "", "settings that differ:"]
    lines += [f"  {name}: {_grouped(arms, values)}" for name, values in found.items()]
    lines += ["", *aligned([list(facts[0]), *([str(value) for value in one.values()] for one in facts)])]
    lines.append(f"{len(arms)} arms x {config.seeds} seeds = {len(arms) * config.seeds} runs")
    lines.append(f"bank: {len(exam.bank)} labelled real images; queries: {len(exam.queries)}, {exam.note}")
    return {
        "config": config.to_dict(),
        "arms": {one["arm"]: arm.settled.config.to_dict() for one, arm in zip(facts, arms, strict=True)},
        "runs": facts,
        "differing": found,
        "text": "\n".join(lines),
    }


def _described(arm: Arm, budget: Budget) -> dict[str, Any]:
    batch = arm.settled.config.run.batch_size
    steps = budget["arms"].get(arm.name, {}).get("steps")
    return {
        "arm": arm.name,
        "recipe": arm.settled.config.recipe,
        "samples": arm.settled.policy.num_items,
        "batch": batch,
        "steps": "by a timing" if steps is None else steps,
        "images": "by a timing" if steps is None else steps * batch,
    }


def _grouped(arms: Sequence[Arm], values: Sequence[Any]) -> str:
    """`0.2 (a, b), 0.1 (c)`: each value with the arms that have it."""
    names: dict[str, list[str]] = {}
    for arm, value in zip(arms, values, strict=True):
        names.setdefault("none" if value is None else str(value), []).append(arm.name)
    return ", ".join(f"{value} ({' '.join(owners)})" for value, owners in names.items())


def _notes(arms: Sequence[Arm]) -> list[str]:
    return [f"{arm.name}: {note}" for arm in arms for note in arm.settled.notes]


class _Comparison:
    """All runs of a comparison, as this process sees them."""

    def __init__(
        self,
        config: CompareConfig,
        arms: Sequence[Arm],
        exam: Exam,
        folder: RunFolder,
        processes: PartialState,
        stop: StopRequest,
    ) -> None:
        self.config, self.arms, self.exam, self.folder = config, arms, exam, folder
        self.device, self.is_main, self.stop = processes.device, processes.is_main_process, stop
        self.line = ProgressLine(speaks=self.is_main)

    def carry_out(self) -> Outcome:
        """Train what is not trained, measure what is not measured, and report."""
        for note in (*_notes(self.arms), self.config.to_yaml().rstrip()):
            self.line.say(note)
        try:
            self.budget = budgets.decide(
                self.folder, self.config, self.arms, self.device, self.line, self.stop, is_main=self.is_main
            )
        except budgets.Stopped:
            return self._outcome("stopped", {})
        if others := [name for name in self.budget["arms"] if name not in {arm.name for arm in self.arms}]:
            self.line.say(f"not asked for now, so left out of the table; their runs stay: {', '.join(others)}")
        runs = self._runs()
        together(lambda: _check(runs))
        self.pixels = self._of_pixels()
        if not self._all(runs):
            return self._outcome("stopped", {})
        found = self._report(runs)
        return self._outcome(found["state"], found)

    def _runs(self) -> list[ArmRun]:
        """Seed by seed over all arms, so that a table exists early."""
        return [
            ArmRun(
                arm=arm,
                seed=seed,
                steps=self.budget["arms"][arm.name]["steps"],
                folder=RunFolder(self.folder.path / f"{arm.name}-{seed}"),
                exam=self.exam,
            )
            for seed in self.config.all_seeds
            for arm in self.arms
        ]

    def _all(self, runs: Sequence[ArmRun]) -> bool:
        """False if a signal came. Ends when all is done, or when others hold all that is left."""
        left, done = list(runs), 0
        while left:
            passed_over = []
            for run in left:
                if self._is_stopping():
                    return False
                was_done = shared(run.is_done())
                ended = "done" if was_done else run.carry_out(self.device, is_main=self.is_main)
                if ended == "stopped":
                    return False
                if ended == "in use":
                    passed_over.append(run)
                    continue
                done += 1
                self.line.say(f"{done} of {len(runs)}: {_told(run.row())}")
                if not was_done:
                    self._report(runs)
            if len(passed_over) == len(left):
                break
            left = passed_over
        return True

    def _report(self, runs: Sequence[ArmRun]) -> dict[str, Any]:
        """Write what is known; looks again afterwards, since another process may have written an older table."""
        rows = shared([run.row() for run in runs])
        while True:
            found = self._written(rows)
            now = shared([run.row() for run in runs])
            if now == rows:
                return found
            rows = now

    def _written(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        found = results.collect(self.config, self.arms, self.budget, self.exam, self.pixels, rows)
        together(lambda: self._write(found) if self.is_main else None)
        return found

    def _write(self, found: dict[str, Any]) -> None:
        self.folder.write_json(RESULTS, found)
        self.folder.write_text(TABLE, table.markdown(found))

    def _of_pixels(self) -> dict[str, float]:
        """Measured once, at the size of the first arm's full views."""
        size = self.arms[0].settled.config.views.size
        inputs = {**self.exam.inputs, "size": size}
        kept = shared(self.folder.read_json(PIXELS)) or {}
        if kept.get("inputs") != inputs:
            kept = {"inputs": inputs, **self.exam.of_pixels(size, self.device)}
            together(lambda: self.folder.write_json(PIXELS, kept) if self.is_main else None)
        return {name: kept[name] for name in ("knn", "linear") if name in kept}

    def _is_stopping(self) -> bool:
        return any(gather_objects(bool(self.stop)))

    def _outcome(self, state: str, found: dict[str, Any]) -> Outcome:
        return Outcome(state=state, folder=str(self.folder.path), results=found, is_main=self.is_main)


def _check(runs: Sequence[ArmRun]) -> None:
    for run in runs:
        run.check()


def _told(row: dict[str, Any]) -> str:
    if row["state"] != "finished":
        return f"{row['folder']} {row['state']}: {row.get('reason')}"
    linear = f", linear {row['linear']:.1%}" if "linear" in row else ""
    return f"{row['folder']} kNN {row['knn_before']:.1%} -> {row['knn']:.1%}{linear}"
