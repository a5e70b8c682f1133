"""What a benchmark says: settings in, figures out, and the clockwork between.

As in `pipeline.bench`; the trainer imports nothing of the pipeline.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Say = Callable[[str], None]  # progress, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of `trainer bench`; `None` means each section's own default."""

    images: Path | None = None  # a WebDataset tar of photographs
    rounds: int | None = None
    quick: bool = False

    def round_count(self, default: int = 5) -> int:
        """How often a comparison is repeated."""
        return self.rounds or (2 if self.quick else default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a figure should reach: its ratio to the baseline, or its own value."""

    bound: float
    of: Literal["ratio", "ours"] = "ratio"
    at_least: bool = True

    def is_met(self, figure: Figure) -> bool:
        """Whether the figure does."""
        value = figure.ratio if self.of == "ratio" else figure.ours
        return value is not None and (value >= self.bound if self.at_least else value <= self.bound)

    def text(self, unit: str) -> str:
        """For people."""
        return f"{'>=' if self.at_least else '<='} {number(self.bound)}{'x' if self.of == 'ratio' else f' {unit}'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number, beside the baseline's where there is one; `ratio` says how many times better ours is."""

    name: str
    ours: float
    unit: str
    baseline: float | None = None
    baseline_name: str | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None  # of the ratio over the rounds
    goal: Goal | None = None
    note: str | None = None

    def facts(self) -> dict[str, Any]:
        """For `--json`."""
        facts: dict[str, Any] = {"name": self.name, "ours": _rounded(self.ours), "unit": self.unit}
        if self.baseline is not None:
            facts |= {"baseline": _rounded(self.baseline), "baseline_name": self.baseline_name}
        if self.ratio is not None:
            facts["ratio"] = _rounded(self.ratio)
        if self.spread is not None:
            facts["ratio_range"] = [_rounded(value) for value in self.spread]
        if self.goal is not None:
            facts |= {"target": self.goal.text(self.unit), "met": self.goal.is_met(self)}
        if self.note is not None:
            facts["note"] = self.note
        return facts

    def text(self) -> str:
        """One line for people."""
        line = f"{self.name}: {number(self.ours)} {self.unit}"
        if self.baseline is not None:
            line += f" | {self.baseline_name}: {number(self.baseline)} {self.unit}"
        if self.ratio is not None:
            spread = "" if self.spread is None else f" ({self.spread[0]:.2f}-{self.spread[1]:.2f})"
            line += f" | {self.ratio:.2f}x{spread}"
        if self.goal is not None:
            line += f" | target {self.goal.text(self.unit)}: {'met' if self.goal.is_met(self) else 'MISSED'}"
        return line + (f" | {self.note}" if self.note else "")


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that one task took for each of its items, over the rounds."""

    seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Items a second, the median."""
        return 1 / statistics.median(self.seconds)

    def speedup(self, baseline: Times) -> tuple[float, tuple[float, float]]:
        """How many times faster than `baseline`: the median of the rounds' ratios, and their range."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, baseline.seconds, strict=True)]
        return statistics.median(ratios), (min(ratios), max(ratios))


def in_turns(
    rounds: int,
    tasks: Mapping[str, Callable[[], int]],
    say: Say = lambda text: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Times of the tasks, which return how many items they did: in turn, so that what disturbs one disturbs all.

    The order turns from round to round: whoever follows an expensive neighbour does so only now and then.
    """
    names = list(tasks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for count in range(rounds):
        shift = count % len(names)
        for name in names[shift:] + names[:shift]:
            started = clock()
            items = tasks[name]()
            seconds[name].append((clock() - started) / items)
        rates = ", ".join(f"{name} {1 / times[-1]:,.0f}/s" for name, times in seconds.items())
        say(f"round {count + 1} of {rounds}: {rates}")
    return {name: Times(tuple(times)) for name, times in seconds.items()}
