"""Settings of `trainer finetune`: defaults < recipe < `--set key=value` and flags, checked, resolved and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from manifests.errors import UsageError
from trainer.config import CheckpointConfig, RunConfig
from trainer.data.crops import INTERPOLATIONS, Interpolation
from trainer.data.rand_augment import RandAugment
from trainer.engine.optim import OptimConfig
from trainer.settings import as_yaml, check_keys, plain, require, section
from trainer.tuners.base import TunerConfig

DEFAULT_TUNERS = ("full", "linear", "lora:8", "block-expansion")
SET_BY_RATES = ("lr", "reference_batch", "warmup_epochs", "warmup_steps")  # of optim: each tuner has its own
NO_SOURCE = "none"  # --source none: forgetting is not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReading:
    """How the images of tasks and source are read; nothing of it changes what is learnt."""

    workers: int | None = None  # reading threads per rank; None: by the cores
    cache: int = 2 << 30  # bytes of RAM for decoded images, used where a whole set fits
    max_pixels: int = 100_000_000  # of an image; larger ones are skipped

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers > 0, "data.workers", self.workers, "1 or more, or null")
        require(self.cache >= 0, "data.cache", self.cache, "0 or more bytes")
        require(self.max_pixels > 0, "data.max_pixels", self.max_pixels, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderChange:
    """The network that is fine-tuned, and asked about the source, where it is not quite that of --init."""

    name: str | None = None  # timm's, of an --init that is a bare file of weights
    # Keywords of timm, those of --init where they are not named: global_pool, drop_path_rate (paths are dropped only in
    # training, and only where something is trained). They cannot change what has trained weights, but for final norms.
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What the encoder is shown: one view of an image. None is what the encoder was trained with, or is not done."""

    augment: str = "finetune"
    size: int | None = None  # pixels
    interpolation: Interpolation = "bilinear"  # of crops
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    rand_augment: str | None = None  # timm's notation, such as rand-m9-mstd0.5-inc1 (arXiv 1909.13719)
    random_erasing: float | None = None  # share of the images that get a rectangle of noise (arXiv 1708.04896)
    mixup: float | None = None  # alpha, the larger the nearer to even shares (arXiv 1710.09412); with cutmix either
    cutmix: float | None = None  # alpha (arXiv 1905.04899)
    label_smoothing: float | None = None  # share of the target that all classes have evenly

    def __post_init__(self) -> None:
        how = self.interpolation
        require(how in INTERPOLATIONS, "images.interpolation", how, " or ".join(INTERPOLATIONS))
        good = self.std is None or all(value > 0 for value in self.std)
        require(good, "images.std", list(self.std or ()), "three numbers above 0")
        if self.rand_augment is not None:
            RandAugment.parse(self.rand_augment)
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, f"images.{name}", value, "a number of 0 or more, or null")
        for name, limit in (("random_erasing", 1.0), ("label_smoothing", 0.99)):
            value = getattr(self, name)
            require(value is None or 0 <= value <= limit, f"images.{name}", value, f"from 0 to {limit:g}, or null")


@dataclass(frozen=True, slots=True, kw_only=True)
class RateConfig:
    """Learning rates as they stand, for a batch of `run.batch_size`; by the tuner's name, else `default`.

    All of `learning_rates` are trained and shown. With `--sweep lr` the `grid` is tried with the first seed, and the
    rate that is best on the validation part is trained with all seeds; beside it full fine-tuning always shows a second
    rate, since much of what looks like forgetting is learning rate.
    """

    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: {"default": (0.01,)})
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: {"default": (0.005, 0.01, 0.05)})
    warmup_steps: Mapping[str, int] = field(default_factory=lambda: {"default": 0})
    warmup_epochs: float | None = None  # of all tuners, wins over warmup_steps

    def __post_init__(self) -> None:
        for name in ("learning_rates", "grid", "warmup_steps"):
            given = getattr(self, name)
            require("default" in given, f"rates.{name}", dict(given), "a mapping of tuners' names, and 'default'")
        for name in ("learning_rates", "grid"):
            for tuner, rates in getattr(self, name).items():
                good = len(rates) > 0 and all(rate > 0 for rate in rates) and len(set(rates)) == len(rates)
                require(good, f"rates.{name}.{tuner}", list(rates), "one or more different numbers above 0")
        epochs = self.warmup_epochs
        good = epochs is None or 0 <= epochs < math.inf
        require(good, "rates.warmup_epochs", epochs, "a number of 0 or more, or null")

    def of(self, tuner: str) -> tuple[float, ...]:
        """The rates that are shown without a sweep."""
        return self.learning_rates.get(tuner, self.learning_rates["default"])

    def grid_of(self, tuner: str) -> tuple[float, ...]:
        """The rates that a sweep tries."""
        return self.grid.get(tuner, self.grid["default"])

    def warmup_of(self, tuner: str) -> int:
        """Steps of linear warm-up."""
        return self.warmup_steps.get(tuner, self.warmup_steps["default"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionConfig:
    """When and how gain and forgetting are measured: weighted kNN as in DINO, at these steps and at the end."""

    at: tuple[int, ...] = (0, 10, 100)
    k: int = 20
    temperature: float = 0.07
    bank: int = 50_000  # at most so many images of the source
    queries: int = 10_000  # at most so many images of the source

    def __post_init__(self) -> None:
        require(all(step >= 0 for step in self.at), "evaluation.at", list(self.at), "steps of 0 or more")
        require(self.k > 0, "evaluation.k", self.k, "1 or more")
        require(self.temperature > 0, "evaluation.temperature", self.temperature, "above 0")
        for name in ("bank", "queries"):
            require(getattr(self, name) > 1, f"evaluation.{name}", getattr(self, name), "2 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """All of one comparison. `tasks` and `source` are as typed: PATH[,test=PATH]."""

    # What may differ between a run and its continuation: it changes nothing that is learnt.
    FREE: ClassVar[tuple[str, ...]] = ("data", "recipe", "run.trackers", "run.compile", "run.log_every", "checkpoint")

    recipe: str = ""
    init: str
    encoder: EncoderChange | None = None
    peft: tuple[str, ...] = DEFAULT_TUNERS
    tasks: tuple[str, ...]
    source: str
    seeds: int = 1
    sweep: Literal["lr"] | None = None
    adapters: Literal["shared", "per-task"] = "shared"  # of a sequence: one that goes on, or a new one for each task
    data: TaskReading = field(default_factory=TaskReading)
    images: ImageConfig = field(default_factory=ImageConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    rates: RateConfig = field(default_factory=RateConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="sgd", reference_batch=None, warmup_epochs=0))
    run: RunConfig = field(default_factory=lambda: RunConfig(max_steps=1000, batch_size=128))
    evaluation: RetentionConfig = field(default_factory=RetentionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require(len(self.peft) > 0, "peft", list(self.peft), "one or more tuners")
        require(len(self.tasks) > 0, "tasks", list(self.tasks), "one or more tasks")
        require(self.seeds > 0, "seeds", self.seeds, "1 or more")
        for name in ("peft", "tasks"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), name, list(given), "without repetitions")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as in config.yaml; the inverse of `resolve`."""
        values: dict[str, Any] = plain(asdict(self))
        for name in SET_BY_RATES:
            del values["optim"][name]
        return values

    def to_yaml(self) -> str:
        """What is saved and printed."""
        return as_yaml(self.to_dict())


def resolve(values: Mapping[str, Any], where: str = "settings") -> FinetuneConfig:
    """The checked settings; raises `UsageError` naming the key, what arrived and what is allowed."""
    sections = {name: value for name, value in values.items() if name not in ("about", "reference")}
    check_keys(FinetuneConfig, sections, where, "")
    for name in ("init", "tasks", "source"):
        if name not in sections:
            raise UsageError(f"{where}: {name} is missing")
    return FinetuneConfig(**{name: section(FinetuneConfig, name, value, where) for name, value in sections.items()})
