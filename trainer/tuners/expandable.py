"""Transformer blocks of which a copy can be the identity: x + f(norm(x)), whose f ends in a linear layer.

With that layer at zero the block adds zero. LayerScale, dropped paths, gates and norms in front of it change nothing
about that. A norm after it would, through its bias, so that only classes which were read are listed.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from manifests.errors import UsageError

_TIMM = ("vision_transformer.Block", "eva.EvaBlock", "beit.Block")
_TRANSFORMERS = (
    "vit.modeling_vit.ViTLayer",
    "dinov2.modeling_dinov2.Dinov2Layer",
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer",
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer",
)
_EXPANDABLE = {*(f"timm.models.{name}" for name in _TIMM), *(f"transformers.models.{name}" for name in _TRANSFORMERS)}

# The last linear layer of the attention and of the MLP; the later names are transformers' (5, then 4).
_ATTENTION_OUTPUTS = ("attn.proj", "attention.o_proj", "attention.output.dense")
_MLP_OUTPUTS = ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense")


def expandable_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks of the one sequence of them in `model`, by name and in order; those that are wrapped already included.

    Raises `UsageError`, naming the classes that are there, if no sequence or several have blocks that can be copied.
    """
    found = [name for name, module in model.named_modules() if _is_sequence(module) and not _wrapped(model, name)]
    if len(found) == 1:
        return {f"{found[0]}.{key}": block for key, block in model.get_submodule(found[0]).named_children()}
    if found:
        raise UsageError(f"block expansion of one encoder is possible, and here are several: {', '.join(found)}")
    kinds = sorted({type(block).__name__ for block in _repeated(model)})
    raise UsageError(
        f"block expansion needs blocks whose copy can be the identity ({', '.join(sorted(map(_short, _EXPANDABLE)))}); "
        f"{type(model).__name__} has {', '.join(kinds) or 'none'}. Choose another tuner, such as lora"
    )


def silence(block: nn.Module) -> None:
    """Make the block the identity: weight and bias of its two output layers become zero."""
    for names in (_ATTENTION_OUTPUTS, _MLP_OUTPUTS):
        layer = _first(block, names)
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _first(block: nn.Module, names: tuple[str, ...]) -> Any:
    for name in names:
        try:
            return block.get_submodule(name)
        except AttributeError:
            continue
    raise UsageError(f"{type(block).__name__} has no output layer of a known name ({', '.join(names)})")


def _is_sequence(module: nn.Module) -> bool:
    blocks = list(module.children())
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and bool(blocks) and all(map(_is_expandable, blocks))


def _is_expandable(block: nn.Module) -> bool:
    kind = type(block.get_submodule("base_layer") if isinstance(block, BaseTunerLayer) else block)
    return f"{kind.__module__}.{kind.__qualname__}" in _EXPANDABLE


def _wrapped(model: nn.Module, name: str) -> bool:
    """Whether the module lies inside a tuner's layer."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    return any(isinstance(model.get_submodule(parent), BaseTunerLayer) for parent in above)


def _repeated(model: nn.Module) -> list[nn.Module]:
    """What the model repeats, to name it."""
    sequences = [module for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    return [block for sequence in sequences for block in sequence.children() if list(block.children())]


def _short(name: str) -> str:
    parts = name.split(".")
    return f"{parts[0]}'s {parts[-1]}" if parts[-1] != "Block" else f"{parts[0]}'s {parts[-2]}.Block"
