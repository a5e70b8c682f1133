"""Layer-wise learning rate decay (ELECTRA, arXiv 2003.10555; BEiT; MAE): the nearer to the images, the lower the rate.

Layer l of L is trained at `decay ** (L - l)` of the rate. Layer 0 is the stem (patches, positions, class token), block
i is layer i + 1, and final norm, head and whatever else a method has are layer L. Blocks are timm's own grouping.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from manifests.errors import UsageError

_AFTER_ALL = "head.weight"  # timm's groupings name no head: its layer is L


def by_layer(groups: Iterable[dict[str, Any]], encoder: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The optimiser's groups, each split into one for each rate; `scale` is the share of the rate that it gets."""
    scales = {
        id(value): scale
        for value, scale in zip(encoder.parameters(), layer_scales(encoder, decay).values(), strict=True)
    }
    split = []
    for group in groups:
        of_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            of_scale.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
        split += [{**group, "params": params, "scale": scale} for scale, params in sorted(of_scale.items())]
    return split


def layer_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Shares of the rate in 0..1 of all parameters by name; raises `UsageError` if timm does not group the encoder.

    timm counts a final `norm` to the last block, and here it trains at the full rate as in MAE's code, where it stands
    before the pooling as well as after it (`fc_norm`).
    """
    matcher: Any = getattr(encoder, "group_matcher", None)
    if matcher is None:
        raise UsageError(
            f"optim.layer_decay is {decay}, and timm does not say which layers {type(encoder).__name__} has; leave it "
            "out, or take an encoder with a `group_matcher`, such as vit_small_patch16_224"
        )
    names = [name for name, _ in encoder.named_parameters()]
    named = ((name, None) for name in (*names, _AFTER_ALL))
    layers = group_with_matcher(named, matcher(coarse=False), reverse=True)
    last = layers[_AFTER_ALL]
    return {name: 1.0 if name.startswith("norm.") else decay ** (last - layers[name]) for name in names}
