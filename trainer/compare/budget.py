"""Equal budgets: how many steps each arm has, decided once for all processes and seeds, and kept in budget.json."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from manifests.errors import DiffmixError, UsageError
from trainer.compare.arms import Arm
from trainer.compare.settings import BudgetConfig, CompareConfig
from trainer.compare.timing import StepCost, clock, cost_of_steps
from trainer.config import PretrainConfig
from trainer.engine.launch import shared
from trainer.engine.progress import ProgressLine
from trainer.engine.run_folder import BUDGET, CONFIG, InUseError, RunFolder, read_values
from trainer.engine.signals import StopRequest
from trainer.nn.collectives import gather_objects, together
from trainer.settings import completed, differences

LEAST_STEPS = 10
_LOOK_EVERY = 0.5  # seconds, while another process times the arms

Budget = dict[str, Any]  # as in budget.json


class Stopped(Exception):  # noqa: N818  # no error: a signal came
    """A signal came while the budget was being decided."""


def decide(
    folder: RunFolder,
    config: CompareConfig,
    arms: Sequence[Arm],
    device: torch.device,
    line: ProgressLine,
    stop: StopRequest,
    *,
    is_main: bool,
) -> Budget:
    """The budget of the comparison in `folder`; arms that it does not know yet are timed, where that is needed.

    Every rank must call. Raises `UsageError` if the folder is of another command, or its budget, or what that was
    decided for, is another one, and `Stopped` at a signal.
    """
    with ExitStack() as stack:
        together(lambda: _lock(folder, stack, line, stop) if is_main else None)
        _heed(stop)
        together(lambda: _check_kind(folder) if is_main else None)
        budget = shared(folder.read_json(BUDGET)) or _new(config.budget, device)
        together(lambda: check(budget, config.budget, arms, device))
        together(lambda: folder.write_text(CONFIG, config.to_yaml()) if is_main else None)
        for arm in arms:
            if arm.name not in budget["arms"]:
                budget["arms"][arm.name] = _of_arm(arm, config, line)
            _heed(stop)
        together(lambda: folder.write_json(BUDGET, budget) if is_main else None)
    return budget


def _check_kind(folder: RunFolder) -> None:
    """Refuse to write over the files of a run: settings and results of a comparison have the same names."""
    if folder.exists() and "budget" not in read_values(folder.path / CONFIG):
        raise UsageError(f"{folder.path} holds something else than a comparison; choose another --out")


def known(folder: RunFolder | None, config: CompareConfig, arms: Sequence[Arm], device: torch.device) -> Budget:
    """What is decided already in a folder, if there is one, or needs no timing: for a look."""
    budget = (folder.read_json(BUDGET) if folder else None) or _new(config.budget, device)
    check(budget, config.budget, arms, device)
    if config.budget.max_steps is not None:
        budget["arms"] |= {arm.name: {"steps": config.budget.max_steps} for arm in arms}
    return budget


def check(budget: Budget, asked: BudgetConfig, arms: Sequence[Arm], device: torch.device) -> None:
    """Refuse to go on with another budget, other settings of an arm or another pair set, naming the difference."""
    now = _new(asked, device)
    for name in ("max_steps", "minutes", *(("clock",) if asked.minutes else ())):
        if budget.get(name) != now[name]:
            raise UsageError(
                f"this comparison was begun with {_told(budget)} a run, and {_told(now)} is asked for now: use the "
                "same, or another --out"
            )
    for arm in arms:
        before = budget["arms"].get(arm.name)
        found = [] if before is None else _changed(before["settings"], arm)
        if found:
            name, old, new = found[0]
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UsageError(
                f"arm {arm.name} was begun with {name} {old!r} and has {new!r} now{more}: use the same, call the arm "
                "something else, or take another --out"
            )
        if before is not None and before["data"] != arm.settled.policy.fingerprint:
            raise UsageError(
                f"arm {arm.name} was begun on another pair set (or selection of it) than {arm.settled.rows.url} now "
                "is: restore it, or take another --out"
            )


def _changed(before: dict[str, Any], arm: Arm) -> list[tuple[str, Any, Any]]:
    now = _settings(arm)
    return differences(completed(before, now, arm.settled.config), now, PretrainConfig.FREE)


def _told(budget: Budget) -> str:
    if budget.get("max_steps") is not None:
        return f"{budget['max_steps']} steps"
    return f"{budget.get('minutes'):g} minutes of {budget.get('clock')}"


def _new(asked: BudgetConfig, device: torch.device) -> Budget:
    return {"max_steps": asked.max_steps, "minutes": asked.minutes, "clock": clock(device), "arms": {}}


def _of_arm(arm: Arm, config: CompareConfig, line: ProgressLine) -> dict[str, Any]:
    """Timed in any case: of equal steps the table says what they cost."""
    try:
        cost = cost_of_steps(arm, config.seed)
        steps, note = _steps(config.budget, cost)
        together(lambda: arm.check_steps(steps))
    except DiffmixError as error:
        error.args = (f"arm {arm.name}: {error}",)
        raise
    gc.collect()  # the network that was timed would stay on the device
    seconds = cost.seconds(steps) / steps
    line.say(f"{arm.name}: {1000 * seconds:.1f} ms a step{_phases(cost, steps)}, {steps} steps{note}")
    return {
        "steps": steps,
        "seconds_per_step": seconds,
        "settings": _settings(arm),
        "data": arm.settled.policy.fingerprint,
    }


def _phases(cost: StepCost, steps: int) -> str:
    later_from = cost.later_from(steps)
    if not 0 < later_from < steps:
        return ""
    return f" ({1000 * cost.first:.1f}, from step {later_from + 1} on {1000 * cost.later:.1f})"


def _steps(budget: BudgetConfig, cost: StepCost) -> tuple[int, str]:
    if budget.max_steps is not None:
        return budget.max_steps, ""
    assert budget.minutes is not None
    steps = cost.steps_within(60 * budget.minutes)
    return (steps, "") if steps >= LEAST_STEPS else (LEAST_STEPS, ", the least, which take longer than the budget")


def _settings(arm: Arm) -> dict[str, Any]:
    """All that a run of the arm learns from, but its seed and length."""
    values = arm.settled.config.to_dict()
    for name in ("seed", "max_steps", "epochs"):
        del values["run"][name]
    return values


def _heed(stop: StopRequest) -> None:
    if any(gather_objects(bool(stop))):
        raise Stopped


def _lock(folder: RunFolder, stack: ExitStack, line: ProgressLine, stop: StopRequest) -> None:
    """Hold the comparison's folder; waits for another process that decides."""
    waiting = False
    while not stop:
        try:
            stack.enter_context(folder.locked())
            return
        except InUseError as error:
            if not waiting:
                line.say(f"waiting: {error}")
            waiting = True
            time.sleep(_LOOK_EVERY)
