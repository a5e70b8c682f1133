"""Tuners that train a part of the encoder itself: all of it, nothing (the head alone), or its last blocks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from manifests.errors import DiffmixError, UsageError
from trainer.tuners import files
from trainer.tuners.base import Tuner, TunerConfig
from trainer.tuners.blocks import parameters_by_block
from trainer.tuners.spec import TunerSpec

WEIGHTS, DESCRIPTION = "tuner.safetensors", "tuner.json"


class Full(Tuner):
    """All parameters."""

    def __init__(self, encoder: nn.Module, spec: TunerSpec, config: TunerConfig) -> None:
        self.encoder = self.model = encoder
        self.spec = spec
        trained = self._trained()
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name in trained)

    def save(self, folder: Path) -> None:
        with files.writing(folder, WEIGHTS, DESCRIPTION) as temporary:
            files.write_weights(temporary / WEIGHTS, self._state())
            description = {"tuner": self.spec.name, "size": self.spec.size}
            (temporary / DESCRIPTION).write_text(json.dumps(description) + "\n")

    def load(self, folder: Path, name: str = "default") -> None:
        state, description = files.read(folder, WEIGHTS, DESCRIPTION)
        own = {key: value.shape for key, value in self._state().items()}
        if {key: value.shape for key, value in state.items()} != own:
            raise DiffmixError(
                f"{folder} holds {description.get('tuner')!r} of size {description.get('size')}, which does not fit "
                f"{self.spec.text!r} of this encoder; load it into the tuner and encoder that it was saved from"
            )
        self.encoder.load_state_dict(state, strict=False)

    def merged(self) -> tuple[nn.Module, dict[str, Any]]:
        return copy.deepcopy(self.encoder).requires_grad_(True).eval(), {}

    def _trained(self) -> set[str]:
        return {name for name, _ in self.encoder.named_parameters()}

    def _state(self) -> dict[str, Tensor]:
        """Trained parameters, and the buffers (BatchNorm's statistics) of the modules that hold them."""
        state = self.encoder.state_dict()
        names = {name for name, value in self.encoder.named_parameters() if value.requires_grad}
        holders = {name.rpartition(".")[0] for name in names}
        frozen = {name for name, value in self.encoder.named_parameters() if not value.requires_grad}
        return {
            key: value
            for key, value in state.items()
            if key in names or (key not in frozen and key.rpartition(".")[0] in holders)
        }


class Linear(Full):
    """Nothing: the head alone is trained, on frozen features."""

    def _trained(self) -> set[str]:
        return set()


class LastBlocks(Full):
    """The last `size` blocks (Top-3 in the Block Expansion paper); the final norm stays frozen."""

    def __init__(self, encoder: nn.Module, spec: TunerSpec, config: TunerConfig) -> None:
        super().__init__(encoder, replace(spec, size=spec.size or 3), config)

    def _trained(self) -> set[str]:
        blocks = parameters_by_block(self.encoder)
        assert self.spec.size is not None
        if self.spec.size > len(blocks):
            raise UsageError(
                f"--peft {self.spec.text}: the encoder has {len(blocks)} blocks; choose 1 to {len(blocks)}, or `full`"
            )
        return {name for names in blocks[-self.spec.size :] for name in names}
