"""Pipelines of diffusers' deprecated tree: the one place that knows where they are, and says so once they are gone.

Versatile Diffusion (arXiv 2211.08332) and unCLIP (arXiv 2204.06125, Karlo's weights) make variations of an image. Their
checkpoints name the diffusers folder that components of their own come from, as in `["unclip", "UnCLIPTextProjModel"]`.
diffusers moved those folders but looks for them where they were: until they are put back, no such checkpoint loads.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import diffusers

from manifests.errors import UsageError

VERSIONS, REQUIREMENT = "0.36 to 0.42", "diffusers>=0.36,<0.43"  # of diffusers, that have every class below


@dataclass(frozen=True, slots=True, kw_only=True)
class Deprecated:
    """A pipeline class that a checkpoint may name."""

    runs: str  # the class that makes variations with such a checkpoint
    folder: str  # the folder of diffusers' pipelines that holds it
    unused: frozenset[str] = frozenset()  # components that variations have no use for: neither fetched nor hashed


_VERSATILE = Deprecated(
    runs="VersatileDiffusionImageVariationPipeline",
    folder="versatile_diffusion",
    unused=frozenset({"text_unet", "text_encoder", "tokenizer"}),
)

DEPRECATED: dict[str, Deprecated] = {
    "VersatileDiffusionPipeline": _VERSATILE,  # what `shi-labs/versatile-diffusion` names: all its tasks in one
    "VersatileDiffusionImageVariationPipeline": _VERSATILE,
    "UnCLIPImageVariationPipeline": Deprecated(runs="UnCLIPImageVariationPipeline", folder="unclip"),
}


def find(name: str) -> Any:
    """The class that runs checkpoints of class `name`, a key of `DEPRECATED`; diffusers finds their components then.

    Raises `UsageError` where this diffusers has it no more.
    """
    entry = DEPRECATED[name]
    try:
        module = _module(entry.folder)
        pipeline_class = getattr(module, entry.runs)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"this diffusers ({diffusers.__version__}) has no {entry.runs}, which runs {name} checkpoints ({error}). "
            f"diffusers {VERSIONS} have it: pip install '{REQUIREMENT}'"
        ) from error
    if not hasattr(diffusers.pipelines, entry.folder):
        setattr(diffusers.pipelines, entry.folder, module)
    return pipeline_class


def unused(name: str) -> frozenset[str]:
    """The components of a checkpoint of class `name` that variations have no use for; none for classes not listed."""
    return DEPRECATED[name].unused if name in DEPRECATED else frozenset()


def _module(folder: str) -> Any:
    try:
        return importlib.import_module(f"diffusers.pipelines.{folder}")
    except ModuleNotFoundError:
        return importlib.import_module(f"diffusers.pipelines.deprecated.{folder}")
