"""Settings of `trainer compare`: defaults < recipe < flags. Those of its arms are settings of `trainer pretrain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from manifests.errors import UsageError
from trainer import recipes
from trainer.choices import unknown
from trainer.settings import as_yaml, check_keys, merge, plain, require, section

_LEAST_MINUTES = 0.001
_BUDGET = "--max-steps N (equal steps of equal batches) or --minutes M (equal compute)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of `trainer compare`: `flags` are its settings, `arm_flags` those of every arm, nested."""

    recipe: str | None = None
    methods: Sequence[str] = ()
    mixes: Sequence[str] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    arm_flags: Mapping[str, Any] = field(default_factory=dict)
    assignments: Sequence[str] = ()
    out: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """How long every run is trained: so many optimiser steps, or as many as so many minutes allow."""

    max_steps: int | None = None
    minutes: float | None = None  # of processor time on a CPU, of wall time on a GPU

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.minutes is None):
            given = "none was given" if self.max_steps is None else "both were given"
            raise UsageError(f"a comparison needs one budget for all runs and {given}: {_BUDGET}")
        require(self.max_steps is None or self.max_steps > 0, "budget.max_steps", self.max_steps, "1 or more")
        good = self.minutes is None or _LEAST_MINUTES <= self.minutes < float("inf")
        require(good, "budget.minutes", self.minutes, f"{_LEAST_MINUTES} or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """How every encoder is measured: weighted kNN as in DINO, and a linear probe."""

    k: int = 20
    temperature: float = 0.07
    bank: int = 50_000  # at most so many images
    queries: int = 10_000  # at most so many images

    def __post_init__(self) -> None:
        require(self.k > 0, "evaluation.k", self.k, "1 or more")
        require(self.temperature > 0, "evaluation.temperature", self.temperature, "above 0")
        for name in ("bank", "queries"):
            require(getattr(self, name) > 1, f"evaluation.{name}", getattr(self, name), "2 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """All of one comparison. `arms` maps names to settings of `trainer pretrain`, `common` holds those of all arms.

    An arm, or `common`, may name its `recipe`; without one it is chosen by the method and the set's images.
    """

    recipe: str = ""
    data: str = "data/pairs"  # trained on, and its labelled real images are the bank
    test: str | None = None  # labelled images as of a task; None: a tenth of the pair set by hash
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    seeds: int = 1
    seed: int = 0  # the first
    baseline: str | None = None  # the arm to which differences are shown
    evaluation: MeasureConfig = field(default_factory=MeasureConfig)
    common: Mapping[str, Any] = field(default_factory=dict)
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.seeds > 0, "seeds", self.seeds, "1 or more")
        require(0 <= self.seed < 2**31 - self.seeds, "seed", self.seed, "from 0 to 2147483647")

    @property
    def all_seeds(self) -> range:
        """The seeds of every arm."""
        return range(self.seed, self.seed + self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in config.yaml."""
        return plain(asdict(self))

    def to_yaml(self) -> str:
        """What is saved and printed."""
        return as_yaml(self.to_dict())


def resolve(request: Request) -> CompareConfig:
    """The checked settings of the comparison itself, arms as typed; raises `UsageError` naming what is wrong."""
    name = request.recipe or ""
    values = recipes.load(name, "compare") if name else {}
    if "budget" in request.flags:  # one kind of budget replaces the other
        values.pop("budget", None)
    sections = merge({key: value for key, value in values.items() if key not in ("about", "reference")}, request.flags)
    where = f"recipe {name} with your settings" if name else "your settings"
    check_keys(CompareConfig, sections, where, "")
    built = {key: section(CompareConfig, key, value, where) for key, value in sections.items()}
    config = CompareConfig(**built | {"recipe": name})
    if config.arms and (request.methods or request.mixes):
        raise UsageError(f"recipe {name} has arms of its own: leave out --method and --mix, or the recipe")
    return config


def check_baseline(config: CompareConfig, arms: Sequence[str]) -> None:
    """Refuse a baseline that is no arm."""
    if config.baseline is not None and config.baseline not in arms:
        raise unknown("arm, the baseline,", config.baseline, arms)
