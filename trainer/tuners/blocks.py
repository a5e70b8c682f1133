"""The blocks of a timm encoder in order, by timm's own grouping of parameters (which layer-wise learning rates use)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from manifests.errors import UsageError


def parameters_by_block(encoder: nn.Module) -> list[list[str]]:
    """Names of the parameters of every block from first to last; stem, final norm and head belong to none.

    Blocks are what the architecture repeats: transformer blocks, or a convnet's residual blocks over all stages.
    Raises `UsageError` if timm does not say how this encoder is grouped.
    """
    patterns = _patterns(encoder)
    found: dict[tuple[int, ...], list[str]] = {}
    for name, _ in encoder.named_parameters():
        match = next(filter(None, (re.match(pattern, name) for pattern in patterns)), None)
        if match and match.groups():
            found.setdefault(tuple(int(group) for group in match.groups()), []).append(name)
    if not found:
        raise UsageError(f"timm names no blocks of {type(encoder).__name__}, so that none can be the last")
    return [names for _, names in sorted(found.items())]


def is_stem(encoder: nn.Module, name: str) -> bool:
    """Whether a module or parameter lies before the first block: patch embedding, a convnet's first convolutions."""
    matcher: Any = getattr(encoder, "group_matcher", None)
    stem = matcher(coarse=False).get("stem", ()) if matcher else ()
    return any(re.match(pattern, name) for pattern in ([stem] if isinstance(stem, str) else stem))


def _patterns(encoder: Any) -> list[str]:
    """Regular expressions of a block's parameters; timm's others, with a fixed place, are norms and downsampling."""
    matcher = getattr(encoder, "group_matcher", None)
    blocks = matcher(coarse=False)["blocks"] if matcher else ()
    if isinstance(blocks, str):
        return [blocks]
    return [
        entry if isinstance(entry, str) else entry[0] for entry in blocks if isinstance(entry, str) or entry[1] is None
    ]
