"""Any other method of PEFT by its name, on the layers of the blocks that it can adapt."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from manifests.errors import UsageError
from trainer.tuners.base import TunerConfig
from trainer.tuners.peft_tuner import PeftTuner
from trainer.tuners.spec import TunerSpec
from trainer.tuners.targets import Targets, layers_of_blocks, norms

# Settings without which a method does not start, or does not start from the encoder as it is.
_SETTINGS: dict[str, Callable[[Targets], dict[str, Any]]] = {
    "dora": lambda targets: {"use_dora": True},
    "fourierft": lambda targets: {"init_weights": True},
    "ia3": lambda targets: {"feedforward_modules": [name for name in targets.names if name.endswith("mlp.fc2")]},
}
# Methods that need more of the training loop than gradients.
_REFUSED = {
    "adalora": "it changes ranks by a schedule of its own while training",
    "poly": "it needs the number of a task with every image",
    "xlora": "it mixes adapters that were trained before",
}
_OF_LANGUAGE = ("adaption-prompt", "trainable-tokens")


class PeftMethod(PeftTuner):
    """PEFT's method of that name; `size` is its rank `r`, where it has one (PEFT's default if not given)."""

    def __init__(self, encoder: nn.Module, spec: TunerSpec, config: TunerConfig) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                super().__init__(encoder, spec, config)
        except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
            raise UsageError(
                f"PEFT's {spec.name!r} cannot adapt {type(encoder).__name__} ({error}); choose another, such as lora"
            ) from error

    def _peft_config(self) -> PeftConfig:
        kind = _config_class(self.spec)
        known = {field.name for field in dataclasses.fields(kind)}
        if self.spec.size is not None and "r" not in known:
            raise UsageError(
                f"--peft {self.spec.text}: {self.spec.name!r} takes no rank; write `--peft {self.spec.name}`"
            )
        if not hasattr(self, "targets"):
            self.targets = (norms if self.spec.name == "ln-tuning" else layers_of_blocks)(self.encoder)
        settings: dict[str, Any] = {"target_modules": self.targets.pattern}
        settings |= {} if self.spec.size is None else {"r": self.spec.size}
        settings |= {"lora_alpha": self.spec.size} if self.spec.name == "dora" else {}
        extra = _SETTINGS.get(self.spec.name, lambda targets: {})
        return kind(**settings | extra(self.targets))


def _config_class(spec: TunerSpec) -> Any:
    if spec.name in _REFUSED:
        raise UsageError(f"--peft {spec.text}: {_REFUSED[spec.name]}, which `trainer finetune` does not do")
    if spec.name == "dora":
        return LoraConfig
    kind: Any = spec.name.replace("-", "_").upper()
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    adapts_layers = "target_modules" in {field.name for field in dataclasses.fields(config)}
    if not adapts_layers or PEFT_TYPE_TO_TUNER_MAPPING.get(kind) is None or spec.name in _OF_LANGUAGE:
        raise UsageError(
            f"--peft {spec.text}: PEFT's {spec.name!r} needs a language model; encoders of images have "
            "no prompt and no vocabulary. Choose lora, block-expansion or another method of layers"
        )
    return config
