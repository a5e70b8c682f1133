"""Stable Diffusion image variations: diffusers' components, our own denoising loop.

The loop is that of `StableDiffusionImageVariationPipeline.__call__`, from the same latents to the same pixels; what is
exact and saves time is described in `folded_attention`. Beyond the pipeline: noise of an image is a function of its
seed alone, latents and scheduler arithmetic are float32 whatever the networks compute in, pixels become uint8 on the
device, images that are not finite are reported, and the safety checker reports too instead of painting images black.

The conditioning image is preprocessed as by the reference implementation of DiffMix (`generating_images/run.py`):
to tensor, bicubic resize to the encoder's square without antialias, squashed, CLIP mean and standard deviation.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import safety_checker as safety_module
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from manifests.errors import UsageError
from pipeline.generators.base import (
    Generator,
    GeneratorConfig,
    Image,
    Variations,
    compute_dtype,
    noise,
    to_variations,
)
from pipeline.generators.checkpoint import SAFETY, Checkpoint, fetch, read_json
from pipeline.generators.folded_attention import denoiser, why_not
from pipeline.generators.schedulers import CHECKPOINT, Stepper, build_scheduler, scheduler_options

PIPELINE = "StableDiffusionImageVariationPipeline"
STEPS, GUIDANCE_SCALE = 50, 3.0  # the reference script's defaults
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DECODED_PIXELS = 8 * 512 * 512  # decoding larger batches at once needs much memory and is no faster


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What the generator is made of."""

    unet: Any  # UNet2DConditionModel
    vae: Any  # AutoencoderKL
    image_encoder: Any  # CLIPVisionModelWithProjection
    scheduler: Any
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    safety_checker: Any = None
    feature_extractor: Any = None  # of the safety checker


class SDVariations(Generator):
    """`StableDiffusionImageVariationPipeline` as a generator; see the module's docstring."""

    def __init__(
        self, components: Components, checkpoint: Checkpoint, config: GeneratorConfig, device: torch.device
    ) -> None:
        self.device = device
        self.dtype = compute_dtype(config, device)
        self.unet, self.vae, self.image_encoder = components.unet, components.vae, components.image_encoder
        self.safety_checker, self.feature_extractor = components.safety_checker, components.feature_extractor
        self.side: int = self.image_encoder.config.image_size
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (components.mean, components.std))
        self.conditioning = config.conditioning
        self.vae_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size = self._checked_size(config.size)
        self.steps = int(checkpoint.setting(config.steps, "steps", STEPS))
        self.guidance_scale = float(checkpoint.setting(config.guidance_scale, "guidance_scale", GUIDANCE_SCALE))
        scheduler_name = checkpoint.setting(config.scheduler, "scheduler", CHECKPOINT)
        self.scheduler = build_scheduler(components.scheduler, scheduler_name)
        Stepper.check(self.scheduler, self.steps)
        self._place(self.dtype)
        self.spec = {
            "generator": "sd-variations",
            "pipeline": PIPELINE,
            **checkpoint.identity,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": type(self.scheduler).__name__,
            "scheduler_options": scheduler_options(scheduler_name),
            "size": self.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "conditioning": self.conditioning,
            "safety": config.safety,
            "unet": "stock" if why_not(self.unet) else "folded",
        }

    @classmethod
    def load(cls, config: GeneratorConfig, device: torch.device) -> SDVariations:
        """Load the components; raises `UsageError` for another pipeline's checkpoint or a setting that cannot work."""
        checkpoint = fetch(config)
        if checkpoint.pipeline != PIPELINE:
            raise UsageError(f"{config.model} is a {checkpoint.pipeline}; this generator runs a {PIPELINE}")
        # Named explicitly: left open, transformers keeps half-precision files as they are while diffusers widens them.
        dtype = compute_dtype(config, device)
        mean, std = _normalisation(checkpoint.folder / "feature_extractor" / "preprocessor_config.json")
        components = Components(
            unet=checkpoint.component("unet", UNet2DConditionModel, torch_dtype=dtype),
            vae=checkpoint.component("vae", AutoencoderKL, torch_dtype=dtype),
            image_encoder=checkpoint.component("image_encoder", CLIPVisionModelWithProjection, dtype=dtype),
            scheduler=checkpoint.component("scheduler"),
            mean=mean,
            std=std,
            **_safety_checker(checkpoint, config, dtype),
        )
        return cls(components, checkpoint, config, device)

    @classmethod
    def from_pipeline(cls, pipeline: Any, config: GeneratorConfig, device: torch.device) -> SDVariations:
        """A generator of a `StableDiffusionImageVariationPipeline` in memory; for benchmarks and tests.

        It keeps its own copy of the networks: the pipeline stays as it was.
        """
        parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("unet", "vae", "image_encoder", "scheduler")}
        if config.safety != "off":
            parts |= {name: copy.deepcopy(getattr(pipeline, name)) for name in (SAFETY, "feature_extractor")}
        checkpoint = Checkpoint(folder=Path(), index={"_class_name": PIPELINE}, identity={"model": config.model})
        return cls(Components(**parts), checkpoint, config, device)

    def _checked_size(self, size: int | None) -> int:
        native = self.unet.config.sample_size * self.vae_factor
        multiple = max(8, self.vae_factor)  # as `StableDiffusionImageVariationPipeline.check_inputs`
        if size is not None and (size <= 0 or size % multiple):
            raise UsageError(f"size {size} is not a positive multiple of {multiple}; the model's own size is {native}")
        return int(size or native)

    def _place(self, dtype: torch.dtype) -> None:
        for network in (self.unet, self.vae, self.image_encoder, self.safety_checker):
            if network is not None:
                network.eval().requires_grad_(requires_grad=False)
                # diffusers' own `to` warns of layers to be kept in float32, of which these networks have none
                torch.nn.Module.to(network, device=self.device, dtype=dtype)
        for network in (self.unet, self.vae):
            network.to(memory_format=torch.channels_last)
        self.dtype = dtype
        self.denoiser = denoiser(self.unet)

    def prepare(self, image: Image) -> torch.Tensor:
        """A uint8 image [H, W, 3] as the image encoder's input, float32 [3, side, side]."""
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
        return clip_input(pixels[None], self.side, self.conditioning, self.mean, self.std)[0]

    @torch.inference_mode()
    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """CLIP `image_embeds` [B, D] of prepared images [B, 3, side, side]."""
        embeds: torch.Tensor = self.image_encoder(inputs.to(self.device, self.dtype)).image_embeds
        return embeds

    @torch.inference_mode()
    def vary(self, condition: torch.Tensor, seeds: Sequence[int]) -> Variations:
        """One variation per row of the condition [B, D]; see `Generator.vary`."""
        edge = self.size // self.vae_factor
        stepper = Stepper(self.scheduler, self.steps, seeds)
        start = noise(seeds, (self.unet.config.in_channels, edge, edge))
        latents = self._denoise(stepper, stepper.scaled_noise(start.to(self.device)), condition)
        images = self._decode(latents)
        return to_variations(images.float() / 2 + 0.5)

    def _denoise(self, stepper: Stepper, latents: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        guided = self.guidance_scale > 1
        self.denoiser.begin(condition.to(self.device, self.dtype), stepper.timesteps, guided=guided)
        for step in range(len(stepper.timesteps)):
            prediction = self.denoiser.predict(stepper.model_input(latents, step).to(self.dtype), step).float()
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + self.guidance_scale * (conditional - unconditional)
            latents = stepper.advance(prediction, step, latents)
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, 4, h, w] to images [B, 3, H, W] between -1 and 1."""
        latents = (latents / self.vae.config.scaling_factor).to(self.dtype)
        rows = max(1, DECODED_PIXELS // self.size**2)
        return torch.cat([self.vae.decode(part, return_dict=False)[0] for part in latents.split(rows)])

    @torch.inference_mode()
    def similarity(self, condition: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Cosine [B], float32, between the condition and the embeddings of uint8 images [B, H, W, 3]."""
        pixels = images.to(self.device).permute(0, 3, 1, 2)
        inputs = clip_input(pixels, self.side, self.conditioning, self.mean, self.std)
        return F.cosine_similarity(condition.to(self.device).float(), self.embed(inputs).float())

    @torch.inference_mode()
    def flagged(self, images: torch.Tensor) -> torch.Tensor | None:
        """What `StableDiffusionSafetyChecker` says of uint8 images [B, H, W, 3]: bool [B]; None when safety is off."""
        if self.safety_checker is None:
            return None
        views = self.feature_extractor(images=list(images.cpu().numpy()), return_tensors="pt").pixel_values
        # The checker blackens what it is given as `images` and looks only at `clip_input`: it gets stand-ins to paint.
        stand_ins = np.zeros((len(images), 1))
        _, flags = self.safety_checker(clip_input=views.to(self.device, self.dtype), images=stand_ins)
        return torch.tensor(flags, device=images.device)

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Float32 networks while it lasts; widening and narrowing again gives back the very same weights."""
        dtype = self.dtype
        if dtype == torch.float32:
            yield
            return
        self._place(torch.float32)
        try:
            yield
        finally:
            self._place(dtype)


def clip_input(
    pixels: torch.Tensor, side: int, conditioning: Literal["squash", "crop"], mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """uint8 images [B, 3, H, W] as float32 [B, 3, side, side] with the given mean and standard deviation [3, 1, 1].

    `squash` resizes both sides to `side` without antialias, as the reference does and as the base model was trained;
    `crop` keeps the aspect: short side to `side` with antialias, centre cropped.
    """
    x = pixels.float() / 255
    if conditioning == "squash":
        x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
    else:
        short = min(x.shape[-2:])
        x = _centre(x, 4 * short, 4 * short)  # else a picture of 1 x 60,000 pixels would take 36 GB
        height, width = x.shape[-2:]
        target = (side * height // short, side * width // short)
        x = F.interpolate(x, size=target, mode="bicubic", align_corners=False, antialias=True)
        x = _centre(x, side, side)
    return (x - mean.to(x.device)) / std.to(x.device)


def _centre(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of images [..., H, W], of at most the given size."""
    top, left = max(0, x.shape[-2] - height) // 2, max(0, x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def _normalisation(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation from the checkpoint's preprocessor, CLIP's where it names none."""
    settings = read_json(path) if path.is_file() else {}
    return settings.get("image_mean") or CLIP_MEAN, settings.get("image_std") or CLIP_STD


def _safety_checker(checkpoint: Checkpoint, config: GeneratorConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The safety checker and its preprocessor; nothing is loaded when it is off."""
    if config.safety == "off":
        return {}
    if not checkpoint.has(SAFETY):
        raise UsageError(f"{config.model} ships no safety checker: --safety {config.safety} cannot work; use off")
    # It warns that images are returned black, which here they never are.
    logging.getLogger(safety_module.__name__).setLevel(logging.ERROR)
    return {
        SAFETY: checkpoint.component(SAFETY, safety_module.StableDiffusionSafetyChecker, dtype=dtype),
        "feature_extractor": checkpoint.component("feature_extractor", CLIPImageProcessor),
    }
