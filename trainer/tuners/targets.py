"""Which layers of an encoder PEFT's adapters go to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from manifests.errors import UsageError
from trainer.tuners.blocks import is_stem

# Attentions whose layer `qkv` gives all queries, then all keys, then all values.
_FUSED = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.diff_attention.DiffAttention",
    "timm.models.vision_transformer.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.beit.Attention",
    "timm.models.swin_transformer.WindowAttention",
)
_QUERIES, _VALUES = ("q_proj", "query", "to_q"), ("v_proj", "value", "to_v")


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Names of the layers; `fused` if each gives query, key and value at once."""

    names: tuple[str, ...]
    fused: bool = False

    @property
    def pattern(self) -> str:
        """For PEFT, which takes names of a list for their ends too: `norm` would also be `blocks.0.attn.norm`."""
        return "|".join(map(re.escape, self.names))


def query_and_value(encoder: nn.Module) -> Targets:
    """Layers of the queries and values; raises `UsageError` where the encoder's attention has none that are known."""
    fused, apart = [], []
    for name, module in encoder.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if kind in _FUSED and _gives_three(module):
            fused.append(f"{name}.qkv")
        else:
            children = [child for child, layer in module.named_children() if isinstance(layer, nn.Linear)]
            apart += [f"{name}.{child}" for child in children if child in _QUERIES + _VALUES]
    if fused and not apart:
        return Targets(names=tuple(fused), fused=True)
    if apart and not fused:
        return Targets(names=tuple(apart))
    raise UsageError(
        f"LoRA of query and value needs attention whose layers are known, and {type(encoder).__name__} has "
        f"{_attentions(encoder)}. Adapt all layers instead (--set tuner.lora_targets=all), or choose another tuner"
    )


def layers_of_blocks(encoder: nn.Module) -> Targets:
    """Linear layers and ungrouped convolutions after the stem.

    Raises `UsageError` if there are none, or one is used by its weight alone, so that an adapter would do nothing.
    """
    names = tuple(
        name for name, module in encoder.named_modules() if _is_dense(module) and not is_stem(encoder, name + ".weight")
    )
    if not names:
        raise UsageError(
            f"{type(encoder).__name__} has no linear layer or convolution after its stem; its parts: "
            f"{', '.join(name for name, _ in encoder.named_children())}"
        )
    bypassed = [name for name in names if _is_bypassed(encoder, name)]
    if bypassed:
        raise UsageError(
            f"{type(encoder).__name__} multiplies by the weight of {bypassed[0]} without calling the layer, so that "
            "adapters of all layers would leave it out; adapt query and value (lora:R with --set tuner.lora_targets=qv)"
        )
    return Targets(names=names)


def norms(encoder: nn.Module) -> Targets:
    """Normalisation layers with weights of their own."""
    named = encoder.named_modules()
    return Targets(names=tuple(name for name, module in named if _is_norm(module)))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and bool(list(module.parameters(recurse=False)))


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _gives_three(attention: Any) -> bool:
    layer, output = getattr(attention, "qkv", None), getattr(attention, "proj", None)
    return isinstance(layer, nn.Linear) and layer.out_features == 3 * getattr(output, "in_features", 0)


def _is_bypassed(encoder: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    attention: Any = encoder.get_submodule(parent)
    biased = getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", False)
    return child == "qkv" and biased


def _attentions(encoder: nn.Module) -> str:
    kinds = {type(module).__name__ for module in encoder.modules() if "attention" in type(module).__name__.lower()}
    return ", ".join(sorted(kinds)) or "no attention"
