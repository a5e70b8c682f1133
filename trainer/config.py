"""A run's settings: defaults < recipe < `--set key=value` and flags, checked, resolved and saved.

Each section is a frozen dataclass beside its owner; unknown keys are refused with the nearest spelling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from manifests.errors import UsageError
from trainer.choices import class_of
from trainer.data.mixing import MixConfig
from trainer.data.view_plan import ViewConfig
from trainer.engine.optim import OptimConfig
from trainer.methods import METHODS
from trainer.nn.encoders import EncoderConfig
from trainer.settings import BESIDE, as_yaml, build, check_keys, plain, require, section


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which samples, and how they are read. Only `filter` changes what is learnt from a set."""

    url: str = "data/pairs"
    filter: tuple[str, ...] = ()  # expressions over manifest columns, all of which must hold
    workers: int | None = None  # reading threads per rank; None: by the cores
    cache: int = 2 << 30  # bytes of RAM for decoded images, used where the whole set fits
    allow_changed: bool = False  # resume although the set is not the one that the run was started on

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers > 0, "data.workers", self.workers, "1 or more, or null")
        require(self.cache >= 0, "data.cache", self.cache, "0 or more bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How long, how much at once, and on what."""

    epochs: float = 100
    max_steps: int | None = None  # wins over epochs, whether it is less or more
    batch_size: int = 256  # images of one optimiser step over all ranks
    accumulation: int = 1  # micro-batches of one optimiser step
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    seed: int = 0
    log_every: int = 10  # steps
    trackers: tuple[str, ...] = ()  # of Accelerate, beside TensorBoard: wandb, mlflow, …

    def __post_init__(self) -> None:
        require(0 < self.epochs < math.inf, "run.epochs", self.epochs, "a number above 0")
        require(self.max_steps is None or self.max_steps > 0, "run.max_steps", self.max_steps, "1 or more, or null")
        require(self.batch_size > 1, "run.batch_size", self.batch_size, "2 or more")
        for name in ("accumulation", "log_every"):
            require(getattr(self, name) > 0, f"run.{name}", getattr(self, name), "1 or more")
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "from 0 to 2147483647")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """kNN while training: 10 % of the labelled keys are queries, the rest the bank."""

    every: float = 1  # epochs; 0: at the start and the end only
    k: int = 20
    temperature: float = 0.07
    bank: int = 50_000  # at most so many images
    queries: int = 10_000  # at most so many images
    final: bool = True  # at the end, also a linear probe and the corruptions

    def __post_init__(self) -> None:
        require(0 <= self.every < math.inf, "evaluation.every", self.every, "a number of 0 or more")
        require(self.k > 0, "evaluation.k", self.k, "1 or more")
        require(self.temperature > 0, "evaluation.temperature", self.temperature, "above 0")
        for name in ("bank", "queries"):
            require(getattr(self, name) > 1, f"evaluation.{name}", getattr(self, name), "2 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Restart points."""

    every: int = 500  # steps
    keep: int = 2  # the newest ones

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 (only at the end and at a stop) or more")
        require(self.keep > 0, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSection:
    """Which method; its own settings stand beside the name and are checked by the method's `Config`."""

    name: str
    settings: Any = field(metadata=BESIDE)  # the method's Config


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """All of one pre-training run."""

    # What may differ between a run and its continuation: it changes nothing that is learnt.
    FREE: ClassVar[tuple[str, ...]] = (
        "data.url",
        "data.workers",
        "data.cache",
        "data.allow_changed",
        "recipe",
        "run.trackers",
        "run.compile",
        "run.log_every",
        "checkpoint",
        "evaluation",
    )

    recipe: str = ""
    method: MethodSection
    data: DataConfig = field(default_factory=DataConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    encoder: EncoderConfig
    init: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in config.yaml; the inverse of `resolve`."""
        values = asdict(self)
        values["method"] = {"name": self.method.name, **values["method"]["settings"]}
        return plain(values)

    def to_yaml(self) -> str:
        """What is saved and printed."""
        return as_yaml(self.to_dict())


def resolve(values: Mapping[str, Any], where: str = "settings") -> PretrainConfig:
    """The checked settings; raises `UsageError` naming the key, what arrived and what is allowed."""
    sections = dict(values)
    for ignored in ("about", "reference"):  # what a recipe says of itself
        sections.pop(ignored, None)
    check_keys(PretrainConfig, sections, where, "")
    method = _method_section(sections.pop("method", None), where)
    if "encoder" not in sections:
        raise UsageError(f"{where}: no encoder; choose a recipe, or a timm model by --encoder")
    built = {name: section(PretrainConfig, name, value, where) for name, value in sections.items()}
    return PretrainConfig(method=method, **built)


def _method_section(values: Any, where: str) -> MethodSection:
    if not isinstance(values, Mapping) or values.get("name") not in METHODS:
        got = values.get("name") if isinstance(values, Mapping) else values
        raise UsageError(f"{where}: method.name is {got!r}; choose one of {', '.join(METHODS)}")
    settings = {name: value for name, value in values.items() if name != "name"}
    config = class_of(METHODS, values["name"]).Config
    check_keys(config, settings, where, "method.")
    return MethodSection(name=values["name"], settings=build(config, settings, where, "method."))
