"""From a model's name to the generator that runs it."""

from __future__ import annotations

import importlib

import torch

from manifests.errors import UsageError
from pipeline.generators import GENERATORS
from pipeline.generators.base import Generator, GeneratorConfig
from pipeline.generators.checkpoint import read_index
from pipeline.generators.image_pipelines import image_class

# diffusers pipeline class -> generator; any other class is an image pipeline if its call takes an image
PIPELINES: dict[str, str] = {
    "StableDiffusionImageVariationPipeline": "sd-variations",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
}


def load_generator(config: GeneratorConfig, device: torch.device, name: str = "auto") -> Generator:
    """The generator for `config.model`: the one called `name`, or by the class its `model_index.json` names.

    Raises `UsageError` for a model that cannot be found or run, and for settings that cannot work with it.
    """
    if name == "auto":
        name = generator_name(config)
    if name not in GENERATORS:
        raise UsageError(f"unknown generator {name!r}; known: auto, {', '.join(GENERATORS)}")
    module, class_name = GENERATORS[name].split(":")
    generator_class: type[Generator] = getattr(importlib.import_module(module), class_name)
    return generator_class.load(config, device)


def generator_name(config: GeneratorConfig) -> str:
    """The key of `GENERATORS` that runs the model's pipeline class; raises `UsageError` if none does."""
    index, path = read_index(config)
    pipeline = index.get("_class_name")
    if pipeline is None:
        raise UsageError(f"{path} names no pipeline class (_class_name)")
    if pipeline not in PIPELINES:
        image_class(pipeline)
    return PIPELINES.get(pipeline, "image-pipeline")
