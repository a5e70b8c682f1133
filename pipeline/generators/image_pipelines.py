"""Any diffusers pipeline whose call takes an `image`: image-to-image, StableUnCLIP, Versatile Diffusion and their kin.

The pipeline runs as diffusers wrote it. This adapter only fixes what a pair set needs: inputs of one shape, an empty
prompt, noise that is a function of each image's seed, uint8 pixels, and no safety checker that paints images black. A
text-to-image checkpoint becomes its image-to-image pipeline where `AutoPipelineForImage2Image` knows one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoPipelineForImage2Image

from manifests.errors import UsageError
from pipeline.generators import deprecated
from pipeline.generators.base import (
    Generator,
    GeneratorConfig,
    Image,
    Variations,
    compute_dtype,
    step_generators,
    to_variations,
)
from pipeline.generators.checkpoint import SAFETY, Checkpoint, fetch, loading
from pipeline.generators.image_traits import TRAITS, USUAL
from pipeline.generators.schedulers import CHECKPOINT, Stepper, build_scheduler, scheduler_options

SUPPLIED = {"self", "image", "prompt", "generator"}  # arguments the adapter has a value for
# defaults that change pixels
RECORDED = ("strength", "eta", "noise_level", "image_guidance_scale", "super_res_num_inference_steps")


class ImagePipeline(Generator):
    """A diffusers pipeline with an `image` argument; the condition is the resized image itself."""

    def __init__(self, pipeline: Any, checkpoint: Checkpoint, config: GeneratorConfig, device: torch.device) -> None:
        self.device = device
        self.dtype = compute_dtype(config, device)
        self.pipeline = pipeline.to(device=device, dtype=self.dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self.arguments = inspect.signature(type(pipeline).__call__).parameters
        self.traits = TRAITS.get(type(pipeline).__name__, USUAL)
        if self.traits.float32_on_cpu and device.type == "cpu" and self.dtype != torch.float32:
            raise UsageError(f"{type(pipeline).__name__} runs on a CPU in float32 only, not in {config.dtype}")
        self.conditioning = config.conditioning
        self.size = self._checked_size(config.size)
        self.calls = self._settings(checkpoint, config)
        scheduler_name = checkpoint.setting(config.scheduler, "scheduler", CHECKPOINT)
        self._set_scheduler(scheduler_name)
        self.spec = {
            "generator": "image-pipeline",
            "pipeline": type(pipeline).__name__,
            **checkpoint.identity,
            "steps": self._default(self.traits.steps),
            "guidance_scale": self._default(self.traits.guidance_scale),
            **{name: self._default(name) for name in RECORDED if name in self.arguments},
            "scheduler": type(getattr(pipeline, self.traits.scheduler, None)).__name__,
            "scheduler_options": scheduler_options(scheduler_name),
            "size": self.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "conditioning": self.conditioning,
            "safety": config.safety,
        }

    @classmethod
    def load(cls, config: GeneratorConfig, device: torch.device) -> ImagePipeline:
        """Load the pipeline; raises `UsageError` where it takes no image or needs more than an image."""
        if config.safety != "off":
            raise UsageError(
                f"--safety {config.safety} works with StableDiffusionImageVariationPipeline checkpoints only"
            )
        checkpoint = fetch(config)
        pipeline_class = image_class(checkpoint.pipeline)
        without = {SAFETY: None} if SAFETY in checkpoint.index else {}
        with loading(checkpoint.folder):
            pipeline = pipeline_class.from_pretrained(
                checkpoint.folder, torch_dtype=compute_dtype(config, device), **without
            )
        arguments = inspect.signature(type(pipeline).__call__).parameters
        missing = {
            n for n, p in arguments.items() if p.default is p.empty and n not in SUPPLIED and p.kind < p.VAR_POSITIONAL
        }
        missing |= arguments.keys() & {"mask_image", "control_image"}
        if missing:
            raise UsageError(f"{type(pipeline).__name__} needs {', '.join(sorted(missing))} beside an image")
        return cls(pipeline, checkpoint, config, device)

    def _default(self, name: str) -> Any:
        """The value the pipeline will be called with, its own default where we pass none."""
        parameter = self.arguments.get(name)
        return self.calls.get(name, None if parameter is None else parameter.default)

    def _settings(self, checkpoint: Checkpoint, config: GeneratorConfig) -> dict[str, Any]:
        """The arguments that stay the same from batch to batch."""
        asked = {
            self.traits.steps: checkpoint.setting(config.steps, "steps", None),
            self.traits.guidance_scale: checkpoint.setting(config.guidance_scale, "guidance_scale", None),
        }
        for name, value in asked.items():
            if value is not None and name not in self.arguments:
                raise UsageError(f"{type(self.pipeline).__name__} has no {name}; leave it out")
        settings = {name: value for name, value in asked.items() if value is not None}
        settings |= {name: self.size for name in ("height", "width") if name in self.arguments}
        # Pipelines with an image processor hand out tensors; the others know numpy arrays at least.
        return {**settings, "output_type": "pt" if hasattr(self.pipeline, "image_processor") else "np"}

    def _checked_size(self, size: int | None) -> int:
        name = type(self.pipeline).__name__
        factor = 1 if self.traits.fixed_size else int(getattr(self.pipeline, "vae_scale_factor", 8))
        networks = (getattr(self.pipeline, network, None) for network in self.traits.networks)
        network = next((network for network in networks if network is not None), None)
        native = getattr(getattr(network, "config", None), "sample_size", None)
        if size is None:
            if not isinstance(native, int):
                raise UsageError(f"{name} does not say which size it was trained for; give --size")
            return native * factor
        if self.traits.fixed_size and size != native:
            raise UsageError(f"{name} draws images of {native} pixels, its last network's size, and no others")
        multiple = max(8, factor)
        if not self.traits.fixed_size and (size <= 0 or size % multiple):
            raise UsageError(f"size {size} is not a positive multiple of {multiple}")
        return size

    def _set_scheduler(self, name: str) -> None:
        """Exchange the scheduler for the one called `name`, where the pipeline has one that can be exchanged."""
        shipped = getattr(self.pipeline, self.traits.scheduler, None)
        if name not in (CHECKPOINT, type(shipped).__name__):
            if not hasattr(self.pipeline, "scheduler"):
                raise UsageError(
                    f"{type(self.pipeline).__name__} runs with the schedulers of its checkpoint only; "
                    f"leave --scheduler {name} out"
                )
            self.pipeline.scheduler = build_scheduler(shipped, name)
        if self.traits is not USUAL:
            Stepper.check(getattr(self.pipeline, self.traits.scheduler), int(self._default(self.traits.steps)))

    def prepare(self, image: Image) -> torch.Tensor:
        """A uint8 image [H, W, 3] as uint8 [size, size, 3]: squashed, or cropped to a square first."""
        if self.conditioning == "squash" and not self.traits.antialias:
            return _squashed_without_antialias(image, self.size)
        picture = PIL.Image.fromarray(image)
        if self.conditioning == "crop":
            short = min(picture.size)
            left, top = (picture.width - short) // 2, (picture.height - short) // 2
            picture = picture.crop((left, top, left + short, top + short))
        picture = picture.resize((self.size, self.size), PIL.Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture))

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """The prepared images [B, size, size, 3] themselves, on the device: the pipeline embeds them as it runs."""
        return inputs.to(self.device)

    @torch.inference_mode()
    def vary(self, condition: torch.Tensor, seeds: Sequence[int]) -> Variations:
        """One call of the pipeline for the batch; see `Generator.vary`."""
        inputs: dict[str, Any] = {"image": _pictures(condition), "generator": step_generators(seeds)}
        if "prompt" in self.arguments:
            inputs["prompt"] = [""] * len(seeds)
        images = self.pipeline(**inputs, **self.calls).images
        if not isinstance(images, torch.Tensor):
            images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
        return to_variations(images)

    @torch.inference_mode()
    def similarity(self, condition: torch.Tensor, images: torch.Tensor) -> torch.Tensor | None:
        """Cosine [B], float32, of the pipeline's own image embeddings; None where it has no image encoder."""
        names = ("image_encoder", self.traits.feature_extractor)
        encoder, extractor = (getattr(self.pipeline, name, None) for name in names)
        if encoder is None or extractor is None:
            return None
        pictures = _pictures(condition) + _pictures(images)
        views = extractor(images=pictures, return_tensors="pt").pixel_values.to(self.device, self.dtype)
        output = encoder(views)
        embeds = output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output
        real, synthetic = embeds.float().flatten(1).chunk(2)
        return F.cosine_similarity(real, synthetic)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """The pipeline in float32 while it lasts."""
        dtype = self.dtype
        if dtype == torch.float32:
            yield
            return
        self.dtype = torch.float32
        self.pipeline.to(torch.float32)
        try:
            yield
        finally:
            self.dtype = dtype
            self.pipeline.to(dtype)


def image_class(name: str) -> Any:
    """What to load a checkpoint of pipeline class `name` with: that class if its call takes an image.

    Else `AutoPipelineForImage2Image`, where that knows the image-to-image sibling; else raises `UsageError`.
    """
    if name in deprecated.DEPRECATED:
        return deprecated.find(name)
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None:
        raise UsageError(f"this diffusers ({diffusers.__version__}) has no pipeline class {name!r}")
    if "image" in inspect.signature(pipeline_class.__call__).parameters:
        return pipeline_class
    siblings = diffusers.pipelines.auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    models = [model for model, sibling in siblings.items() if sibling.__name__ == name]
    if any(model in diffusers.pipelines.auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING for model in models):
        return AutoPipelineForImage2Image
    raise UsageError(
        f"{name} takes no image. Supported: StableDiffusionImageVariationPipeline, any diffusers pipeline with an "
        "`image` argument, text-to-image pipelines with an image-to-image sibling, DDPMPipeline and DDIMPipeline"
    )


def _squashed_without_antialias(image: Image, side: int) -> torch.Tensor:
    """A uint8 image [H, W, 3] as uint8 [side, side, 3], in the steps that `ImageTraits.antialias` describes."""
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False)
    return pixels[0].clamp(0, 1).mul(255).to(torch.uint8).permute(1, 2, 0).contiguous()


def _pictures(images: torch.Tensor) -> list[PIL.Image.Image]:
    """uint8 [B, H, W, 3] as PIL images, which every pipeline and feature extractor takes."""
    return [PIL.Image.fromarray(image) for image in images.cpu().numpy()]
