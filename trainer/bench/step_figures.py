"""The section `steps`: training steps of ours against lightly's and against the same written out by hand."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.bench.figures import Figure, Say, Settings
from trainer.bench.loader import one_thread
from trainer.bench.steps import TASKS, StepTask, StepTimes
from trainer.bench.steps import measure as measure_steps


def measure(settings: Settings, say: Say, tasks: Sequence[StepTask] = TASKS) -> list[Figure]:
    """One figure for each task and baseline; the reason where a baseline cannot run."""
    figures = []
    with one_thread():
        for task in tasks:
            say(f"steps: {task.name}")
            times = measure_steps(task, settings.round_count(5), say)
            for baseline, reason in times.skipped.items():
                say(f"skipped: {baseline}: {reason}")
            figures += [_figure(times, baseline) for baseline in times.speedup]
    return figures


def _figure(times: StepTimes, baseline: str) -> Figure:
    return Figure(
        name=f"{times.task.name}, a step",
        ours=times.milliseconds["ours"],
        unit="ms",
        baseline=times.milliseconds[baseline],
        baseline_name=baseline,
        ratio=times.speedup[baseline],
        spread=times.speedup_range[baseline],
    )
