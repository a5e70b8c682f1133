"""LoRA (Hu et al., arXiv:2106.09685) by PEFT: low-rank changes of query and value, or of every layer of the blocks.

timm computes query, key and value by one linear layer. PEFT's adapter of that layer would change the key too and share
one projection of the input among the three; `QVLinear` is two adapters, as if query and value had layers of their own.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners import lora
from torch import Tensor, nn

from manifests.errors import DiffmixError
from trainer.tuners.peft_tuner import PeftTuner
from trainer.tuners.spec import TunerSpec
from trainer.tuners.targets import Targets, layers_of_blocks, query_and_value


class QVLinear(lora.Linear):
    """Two adapters of rank r on a layer [3D, D'] that gives query, key and value: A [2r, D'], B [2D, r].

    Rows of A and B are the query's, then the value's; the key is never changed.
    """

    base_layer: nn.Linear

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        width, inputs = self.base_layer.out_features // 3, self.base_layer.in_features
        self.lora_A[adapter_name] = nn.Linear(inputs, 2 * r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, 2 * width, bias=False)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def weight(self) -> Tensor:
        """With the adapters: EVA and BEiT multiply by the layer's weight instead of calling it."""
        weight: Tensor = self.base_layer.weight
        for name in self._in_use():
            weight = weight + self.get_delta_weight(name).to(weight.dtype)
        return weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the layer's weight, [3D, D'], zero for the key."""
        down, up = self._down(adapter).weight, self._up(adapter)
        query, value = up.float().unflatten(0, (2, -1)) @ down.float().unflatten(0, (2, -1))
        return (torch.cat([query, torch.zeros_like(query), value]) * self.scaling[adapter]).to(up.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Inputs [..., D'] to query, key and value [..., 3D]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in self._in_use():
            query, key, value = result.chunk(3, -1)
            more_query, more_value = self._changes(name, x)
            result = torch.cat([query + more_query, key, value + more_value], -1).to(result.dtype)
        return result

    def _changes(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to query and value, [..., D] each."""
        down, up = self._down(name), self._up(name)
        low = down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype)))
        (low_query, low_value), (up_query, up_value) = (low * self.scaling[name]).chunk(2, -1), up.chunk(2)
        return nn.functional.linear(low_query, up_query), nn.functional.linear(low_value, up_value)

    def _in_use(self) -> list[str]:
        off = self.disable_adapters or self.merged
        return [] if off else [name for name in self.active_adapters if name in self.lora_A]

    def _down(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.lora_A[name])

    def _up(self, name: str) -> Tensor:
        return cast(nn.Linear, self.lora_B[name]).weight


class LoRA(PeftTuner):
    """Rank `size` (8), on query and value or on all linear layers and ungrouped convolutions after the stem.

    On disk an adapter of fused query and value is an ordinary one of twice the rank, whose B is zero in the key's rows
    and across, so that PEFT without this module loads it and computes the same.
    """

    targets: Targets

    def _resolve(self, spec: TunerSpec) -> TunerSpec:
        return replace(spec, size=spec.size or 8)

    def _peft_config(self) -> PeftConfig:
        assert self.spec.size is not None
        if not hasattr(self, "targets"):
            all_layers = self.config.lora_targets == "all"
            self.targets = layers_of_blocks(self.encoder) if all_layers else query_and_value(self.encoder)
        alpha: Any = self.spec.size if self.config.lora_alpha is None else self.config.lora_alpha
        dropout = self.config.lora_dropout
        config = LoraConfig(
            r=self.spec.size, lora_alpha=alpha, lora_dropout=dropout, target_modules=self.targets.pattern
        )
        if self.targets.fused:
            config._register_custom_module({nn.Linear: QVLinear})
        return config

    def _config_to_disk(self, config: Any) -> PeftConfig:
        config = copy.deepcopy(super()._config_to_disk(config))
        if self.targets.fused:
            config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        return config

    def _to_disk(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: _spread(value) if self._is_fused_up(key) else value for key, value in state.items()}

    def _from_disk(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: _gathered(value) if self._is_fused_up(key) else value for key, value in state.items()}

    def _is_fused_up(self, key: str) -> bool:
        return self.targets.fused and ".lora_B." in key


def _spread(up: Tensor) -> Tensor:
    """B [2D, r] of query and value as one [3D, 2r] of a layer that gives query, key and value."""
    (query, value), rank = up.chunk(2), up.shape[1]
    dense = up.new_zeros(3 * len(query), 2 * rank)
    dense[: len(query), :rank], dense[-len(value) :, rank:] = query, value
    return dense


def _gathered(dense: Tensor) -> Tensor:
    """The opposite of `_spread`."""
    width, rank = dense.shape[0] // 3, dense.shape[1] // 2
    up = torch.cat([dense[:width, :rank], dense[-width:, rank:]])
    if not torch.equal(_spread(up), dense):
        raise DiffmixError("the adapter changes the key too, or shares directions of query and value: it is another's")
    return up
