"""Encoders are timm models by name, without a classifier: float [N, 3, S, S] to features [N, D].

A model pools as timm does for its name: the class token for `vit_*` (`global_pool="token"`, what DINO uses), the
average over positions for convnets; `args` may name another `global_pool`. Importing this module registers
`resnet18_cifar` and `resnet50_cifar` with timm: a 3x3 stride-1 stem without max-pooling (SimCLR, arXiv:2002.05709,
appendix B.9), for images of 32 to 64 px.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, model_entrypoint, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from manifests.errors import UsageError
from trainer.choices import nearest

__all__ = ["CifarResNet", "EncoderConfig"]  # timm adds its models here
__all__ += ["check_name", "check_size", "make_encoder", "resolved_args"]

_FIXED = ("pretrained", "pretrained_cfg", "num_classes", "in_chans", "features_only", "checkpoint_path", "device")
_LEAST_GRID = 4  # patches along a side: with fewer, a ViT sees a handful of tokens and learns little


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A timm model: `args` are keywords of `timm.create_model` (patch_size, embed_dim, depth, drop_path_rate ...)."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


def make_encoder(config: EncoderConfig, image_size: int, **overrides: Any) -> nn.Module:
    """The encoder with random weights, float [N, 3, S, S] to [N, `num_features`]; S is `image_size` in pixels.

    ViTs also take other sizes that their patches divide, such as small crops. `overrides` win over the config's
    `args`. Raises `UsageError` for a name, a keyword or a size that timm does not take, and for a ViT that would see
    fewer than 4x4 patches without `patch_size` having been chosen.
    """
    args = resolved_args(config, image_size, **overrides)
    try:
        encoder: Any = timm.create_model(config.name, pretrained=False, **args)
        features = _features_of_one(encoder, image_size)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(_why_not(config.name, args, image_size, error)) from error
    _check_grid(config.name, encoder, image_size, args)
    if features.ndim != 2:
        raise UsageError(
            f"encoder {config.name!r} gives {features.ndim - 1}-dimensional features {tuple(features.shape[1:])}; "
            "one vector an image is needed: set encoder.args.global_pool to avg or token"
        )
    encoder.num_features = features.shape[1]  # timm means the width before the head's own layers, where it has some
    return encoder


def resolved_args(config: EncoderConfig, image_size: int, **overrides: Any) -> dict[str, Any]:
    """All keywords that `timm.create_model` needs to build the very architecture of `make_encoder`, JSON values."""
    check_name(config.name)
    args = {**config.args, **overrides}
    for name in _FIXED:
        if name in args:
            raise UsageError(f"encoder.args.{name} cannot be set: encoders have 3 channels, no classifier and no file")
    return {"num_classes": 0, **_size_args(config.name, image_size), **args}


def check_size(encoder: nn.Module, name: str, image_size: int) -> None:
    """Raises `UsageError` unless an encoder that was made takes images of `image_size` pixels too: small crops."""
    try:
        _features_of_one(encoder, image_size)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(
            f"encoder {name!r} takes no small crops of {image_size} px (views.local_size): {error}. Choose another "
            "size, an encoder that takes any, or method.local_crops=0"
        ) from error


def check_name(name: str) -> None:
    """Raises `UsageError` with the nearest names unless timm has the model."""
    if "/" not in name and ":" not in name and timm.is_model(name):
        return
    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    raise UsageError(f"timm {timm.__version__} has no model {name!r}{meant} (`timm.list_models()` lists all)")


def _size_args(name: str, image_size: int) -> dict[str, Any]:
    """`img_size` for models that are built for one size, `dynamic_img_size` for those that can then take others."""
    keywords = _keywords(name)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    args: dict[str, Any] = {}
    if "img_size" in keywords and cfg is not None and cfg.fixed_input_size:
        args["img_size"] = image_size
    if "dynamic_img_size" in keywords:
        args["dynamic_img_size"] = True
    return args


def _keywords(name: str) -> list[str]:
    """Keywords of the class that timm's function of this name says it returns; none if it does not say."""
    made = typing.get_type_hints(model_entrypoint(name)).get("return")
    model = (typing.get_args(made) or (made,))[0]
    return list(inspect.signature(model).parameters) if isinstance(model, type) else []


def _features_of_one(encoder: nn.Module, image_size: int) -> torch.Tensor:
    """What one black image becomes: the cheapest proof that the model takes this size."""
    encoder.eval()
    with torch.inference_mode():
        features = encoder(torch.zeros(1, 3, image_size, image_size))
    encoder.train()
    return features


def _check_grid(name: str, encoder: nn.Module, image_size: int, args: Mapping[str, Any]) -> None:
    grid = getattr(getattr(encoder, "patch_embed", None), "grid_size", None)
    if "patch_size" in args or not grid or min(grid) >= _LEAST_GRID:
        return
    patch = max(1, image_size // 8)
    raise UsageError(
        f"encoder {name!r} cuts {image_size} px images into {grid[0]}x{grid[1]} patches, and at least "
        f"{_LEAST_GRID}x{_LEAST_GRID} make sense; add `--set encoder.args.patch_size={patch}`, "
        "or take `--encoder resnet18_cifar`"
    )


def _why_not(name: str, args: Mapping[str, Any], image_size: int, error: Exception) -> str:
    known = _keywords(name)
    unknown = [key for key in args if known and key not in known and f"'{key}'" in str(error)]
    if not unknown:
        return f"timm cannot make {name!r} for {image_size} px images with {dict(args)}: {error}"
    near = nearest(unknown[0], known)
    meant = f"; did you mean {near!r}" if near else ""
    return f"encoder {name!r} takes no argument {unknown[0]!r}{meant}. It takes {', '.join(known)}"


class CifarResNet(ResNet):
    """timm's ResNet whose stem keeps the resolution: a 3x3 stride-1 convolution and no max-pooling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _shrink_stem(self)


def _shrink_stem(model: Any) -> None:
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does for all others
    model.maxpool = nn.Identity()
    for stage in model.feature_info:
        stage["reduction"] = max(1, stage["reduction"] // 4)


_CIFAR_CFG = {
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "first_conv": "conv1",
    "classifier": "fc",
}

default_cfgs = generate_default_cfgs({"resnet18_cifar": _CIFAR_CFG, "resnet50_cifar": _CIFAR_CFG})


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 with a stem for small images."""
    args = {"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs}
    return build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **args)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 with a stem for small images."""
    args = {"block": Bottleneck, "layers": (3, 4, 6, 3), **kwargs}
    return build_model_with_cfg(CifarResNet, "resnet50_cifar", pretrained, **args)
