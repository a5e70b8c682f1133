"""What a tuner is: one encoder, adapted in place, of which some parameters are trained, saved and loaded again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from manifests.errors import UsageError
from trainer.choices import class_of
from trainer.settings import require
from trainer.tuners import OTHERS, TUNERS
from trainer.tuners.modes import train_what_is_trainable
from trainer.tuners.spec import TunerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerConfig:
    """Settings of LoRA; `lora_alpha` None is the rank, so that the adapter's output is not scaled, as in the paper."""

    lora_targets: Literal["qv", "all"] = "qv"
    lora_alpha: float | None = None
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.lora_alpha is None or self.lora_alpha > 0, "tuner.lora_alpha", self.lora_alpha, "above 0, or null")
        require(0 <= self.lora_dropout < 1, "tuner.lora_dropout", self.lora_dropout, "from 0 to below 1")


class Tuner(ABC):
    """One encoder, adapted in place.

    `model` is what is called and trained, images float [N, 3, S, S] to features [N, D]; whoever trains it registers it
    as a submodule. Parameters that the tuner does not train have `requires_grad` False.
    """

    has_adapters: ClassVar[bool] = False  # several by name, which can be switched off

    encoder: nn.Module  # what was adapted
    model: nn.Module
    spec: TunerSpec  # with its size resolved

    @abstractmethod
    def __init__(self, encoder: nn.Module, spec: TunerSpec, config: TunerConfig) -> None:
        """Raises `UsageError` where the encoder cannot be adapted in this way."""

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that the optimiser gets, with their names in `model`."""
        return [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]

    @property
    def num_trainable(self) -> int:
        """Trained numbers, without a head."""
        return sum(value.numel() for _, value in self.trainable())

    def train(self) -> None:
        """Training mode, but what holds no trainable parameter stays in evaluation mode.

        BatchNorm keeps its statistics there and no path is dropped. Use `model.eval()` for evaluation.
        """
        self.model.train()
        train_what_is_trainable(self.encoder)

    def add(self, name: str) -> None:
        """A fresh adapter, the identity at the start, made active; the first is called `default`."""
        raise self._no_adapters()

    def activate(self, name: str) -> None:
        """Use and train the adapter of that name."""
        raise self._no_adapters()

    def disabled(self) -> AbstractContextManager[None]:
        """Exactly the original encoder inside."""
        raise self._no_adapters()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write only what was trained, the active adapter's where there are several; replaces an older save.

        Safetensors and JSON, the JSON last: a folder without it does not load.
        """

    @abstractmethod
    def load(self, folder: Path, name: str = "default") -> None:
        """Take what `save` wrote, from a tuner of the same encoder; `name` is the adapter's, which becomes active.

        Raises `DiffmixError` if the folder is incomplete, damaged or of another tuner.
        """

    @abstractmethod
    def merged(self) -> tuple[nn.Module, dict[str, Any]] | None:
        """A plain timm model of its own that gives equal features, and what to change in `encoder.args` to build it.

        None where there is no such model.
        """

    def _no_adapters(self) -> UsageError:
        return UsageError(f"{self.spec.text!r} changes the encoder itself: it has no adapters to add or switch off")


def make_tuner(encoder: nn.Module, spec: TunerSpec, config: TunerConfig) -> Tuner:
    """The tuner of `encoder`, which is changed in place; raises `UsageError` where the two do not fit."""
    made = class_of(TUNERS if spec.name in TUNERS else {spec.name: OTHERS}, spec.name)
    tuner: Tuner = made(encoder, spec, config)
    return tuner
