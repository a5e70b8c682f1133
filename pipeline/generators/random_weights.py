"""Pipelines with random weights, built from configs written out here: for benchmarks and tests, never for pictures.

Speed does not depend on what the weights hold, so that `pipeline bench` measures the real architecture without a
download, and every test gets a genuine diffusers pipeline that `save_pretrained` can write.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionImageVariationPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

# scheduler/scheduler_config.json of Stable Diffusion 1.x
SD_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

# unet/config.json of Stable Diffusion 1.x: 860 million parameters
SD_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

# vae/config.json of Stable Diffusion 1.x
SD_VAE: dict[str, Any] = {
    "sample_size": 512,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}

# CLIP ViT-L/14, vision tower with projection
CLIP_L: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}

# About a million parameters and 8 x 8 latents, as the checkpoint that ships with the package: 32 px out
TINY_32: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
    },
    "vae": {
        "sample_size": 32,
        "latent_channels": 4,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 16,
    },
    "clip": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 64,
    },
}

# The block types of Stable Diffusion 1.x at a fraction of its width, 16 x 16 latents: 64 px out
TINY_64: dict[str, dict[str, Any]] = {
    "unet": {
        **SD_UNET,
        "sample_size": 16,
        "block_out_channels": (64, 128, 128),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
    },
    "vae": {**TINY_32["vae"], "sample_size": 64},
    "clip": {**TINY_32["clip"], "image_size": 64, "patch_size": 16},
}

TINY: dict[str, dict[str, dict[str, Any]]] = {"32px": TINY_32, "64px": TINY_64}


def tiny_variations(kind: str = "64px", *, seed: int = 0) -> Any:
    """A tiny float32 image-variation pipeline on the CPU; the weights are a function of `seed`.

    `kind` is a name of `TINY`: `32px` (1 M parameters, like the embedded checkpoint) or `64px`.
    """
    return _build(TINY[kind]["unet"], TINY[kind]["vae"], TINY[kind]["clip"], seed, torch.device("cpu"))


def random_sd_variations(device: torch.device, dtype: torch.dtype) -> Any:
    """Stable Diffusion 1.x image variations (860 M UNet, its VAE, CLIP ViT-L/14) with random weights, no download.

    The architecture is that of `lambdalabs/sd-image-variations-diffusers`. The weights are drawn on `device`: they
    differ between devices, the time they take does not.
    """
    pipeline = _build(SD_UNET, SD_VAE, CLIP_L, seed=0, device=device)
    return pipeline.to(device=device, dtype=dtype)


def _build(unet: dict[str, Any], vae: dict[str, Any], clip: dict[str, Any], seed: int, device: torch.device) -> Any:
    side = clip["image_size"]
    with torch.random.fork_rng(), torch.device(device):  # drawn on the device: seconds instead of minutes on a GPU
        torch.manual_seed(seed)
        networks = {
            "vae": AutoencoderKL(**vae).eval(),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**clip)).eval(),
            "unet": UNet2DConditionModel(**unet).eval(),
        }
    pipeline: Any = StableDiffusionImageVariationPipeline(
        **networks,
        scheduler=PNDMScheduler(**SD_SCHEDULER),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
