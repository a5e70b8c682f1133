"""A timm encoder in torchvision's names: which architectures exist there, and how their tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from manifests.errors import UsageError

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# timm's name to torchvision's.
TORCHVISION: dict[str, str] = {
    **{name: name for name in _RESNETS},
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
}


def call_of(description: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Torchvision's name of the architecture and the keywords it needs; raises `UsageError` if it has none."""
    architecture = description["architecture"]
    if architecture not in TORCHVISION:
        raise UsageError(
            f"torchvision has no {architecture!r}; it has {', '.join(TORCHVISION)}. "
            "Export with `--to timm`, which has all"
        )
    name = TORCHVISION[architecture]
    size = description["pretrained_cfg"]["input_size"][-1]
    return name, {"image_size": size} if name.startswith("vit") else {}


def load(name: str, keywords: Mapping[str, Any], file: Path, description: Mapping[str, Any]) -> nn.Module:
    """Torchvision's network with the weights of `file` and no classifier, in evaluation mode."""
    import torchvision

    model = torchvision.models.get_model(name, **keywords)
    setattr(model, head(name), nn.Identity())
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise UsageError(
            f"this {description['architecture']} was made with {description['model_args']}, and torchvision's {name} "
            "is the plain one; export with `--to timm`"
        ) from error
    return model.eval()


def head(name: str) -> str:
    """Attribute of torchvision's network that is its classifier."""
    return "heads" if name.startswith("vit") else "fc"


# Beginnings, then parts, of names in timm's ViT and torchvision's.
_VIT_STARTS = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj": "conv_proj",
    "norm.": "encoder.ln.",
    "blocks.": "encoder.layers.encoder_layer_",
}
_VIT_PARTS = {
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".self_attention.in_proj_",
    ".attn.proj.": ".self_attention.out_proj.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
}


def vit_name(name: str) -> str:
    """Torchvision's name of a tensor of timm's VisionTransformer."""
    for start, other in _VIT_STARTS.items():
        if name.startswith(start):
            name = other + name.removeprefix(start)
            break
    for part, other in _VIT_PARTS.items():
        name = name.replace(part, other)
    return name


def usage(file: Path, name: str, keywords: Mapping[str, Any]) -> str:
    """How a person loads the file."""
    arguments = ", ".join([f'"{name}"', *(f"{key}={value}" for key, value in keywords.items())])
    return "\n".join(
        [
            "import torch, torchvision",
            "from safetensors.torch import load_file",
            f"encoder = torchvision.models.get_model({arguments})",
            f"encoder.{head(name)} = torch.nn.Identity()",
            f'encoder.load_state_dict(load_file("{file}"))',
            "encoder.eval()",
        ]
    )
