"""Tuners that PEFT carries out: adapters by name beside a frozen encoder, in PEFT's own files."""

from __future__ import annotations

import copy
import re
import warnings
from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from manifests.errors import DiffmixError, UsageError
from trainer.tuners import files
from trainer.tuners.base import Tuner, TunerConfig
from trainer.tuners.spec import TunerSpec

FIRST = "default"
# What says where and how an adapter is used, not what it is.
_CIRCUMSTANCES = {"inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type"}


class PeftTuner(Tuner):
    """A frozen encoder with PEFT adapters of one kind; subclasses say which config."""

    has_adapters = True
    model: PeftModel

    def __init__(self, encoder: nn.Module, spec: TunerSpec, config: TunerConfig) -> None:
        self.encoder = encoder
        self.spec = self._resolve(spec)
        self.config = config
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has no `config`")
            self.model = cast(PeftModel, get_peft_model(cast(Any, encoder), self._peft_config(), FIRST))

    def _resolve(self, spec: TunerSpec) -> TunerSpec:
        """The spec with its size, before the encoder is changed."""
        return spec

    @abstractmethod
    def _peft_config(self) -> PeftConfig:
        """A config for one more adapter of this encoder."""

    def add(self, name: str) -> None:
        if name in self.model.peft_config:
            raise UsageError(f"there is an adapter {name!r} already; it has {', '.join(self.model.peft_config)}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UsageError(f"an adapter cannot be called {name!r}: use letters, digits, _ and -")
        self.model.add_adapter(name, self._peft_config())
        self.model.set_adapter(name)

    def activate(self, name: str) -> None:
        if name not in self.model.peft_config:
            raise UsageError(f"there is no adapter {name!r}; there are {', '.join(self.model.peft_config)}")
        self.model.set_adapter(name)

    def disabled(self) -> AbstractContextManager[None]:
        return self.model.disable_adapter()

    def save(self, folder: Path) -> None:
        name = self.model.active_adapter
        state = self._to_disk(get_peft_model_state_dict(self.model, adapter_name=name))
        with files.writing(folder, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME) as temporary:
            files.write_weights(temporary / SAFETENSORS_WEIGHTS_NAME, state)
            self._config_to_disk(self.model.peft_config[name]).save_pretrained(str(temporary))

    def load(self, folder: Path, name: str = FIRST) -> None:
        state, description = files.read(folder, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)
        self._check_same(folder, description)
        if name in self.model.peft_config:
            self.activate(name)
        else:
            self.add(name)
        own = get_peft_model_state_dict(self.model, adapter_name=name)
        state = self._from_disk(state)
        if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in own.items()}:
            raise DiffmixError(f"{folder} was saved from another encoder than this {type(self.encoder).__name__}")
        set_peft_model_state_dict(self.model, state, adapter_name=name)

    def merged(self) -> tuple[nn.Module, dict[str, Any]] | None:
        try:
            plain = copy.deepcopy(self.model).merge_and_unload()
        except (NotImplementedError, AttributeError):  # PEFT's way to say that a method's layers cannot be merged
            return None
        return cast(nn.Module, plain).requires_grad_(True).eval(), {}

    def _to_disk(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors in memory as PEFT's files hold them."""
        return state

    def _from_disk(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The opposite of `_to_disk`; raises `DiffmixError` for what it cannot have written."""
        return state

    def _config_to_disk(self, config: PeftConfig) -> PeftConfig:
        """A copy that describes what `_to_disk` gives."""
        config = copy.deepcopy(config)
        config.inference_mode = True  # as PEFT saves it: who loads it says when it is to be trained
        return config

    def _check_same(self, folder: Path, description: dict[str, Any]) -> None:
        own = _plain(self._config_to_disk(self.model.peft_config[self.model.active_adapter]).to_dict())
        found = _plain(description)
        names = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))
        if names:
            told = ", ".join(f"{key}: {found.get(key)!r} instead of {own.get(key)!r}" for key in names[:3])
            raise DiffmixError(f"{folder} holds another adapter than {self.spec.text!r} of this encoder ({told})")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A config as JSON has it, without circumstances."""
    return {
        key: sorted(value) if isinstance(value, (set, list, tuple)) else getattr(value, "value", value)
        for key, value in config.items()
        if key not in _CIRCUMSTANCES
    }
