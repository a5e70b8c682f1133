"""The parts of the embedded pipeline before training: Stable Diffusion's image variations, small enough to ship."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionImageVariationPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from pipeline.embedded.digits import SIZE
from pipeline.embedded.views import CLIP_MEAN, CLIP_STD

LATENT = SIZE // 4
EMBEDDING = 64


def autoencoder() -> AutoencoderKL:
    """Images [N, 3, 32, 32] to latents [N, 4, 8, 8] and back."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(8, 24, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        force_upcast=False,
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    """Images [N, 3, 32, 32] to one embedding [N, 64] each."""
    config = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=EMBEDDING,
        intermediate_size=2 * EMBEDDING,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=EMBEDDING,
        hidden_act="gelu",
    )
    encoder = CLIPVisionModelWithProjection(config)
    # CLIP's own 0.02 drowns in the patches, most of which are the same black: a tenth of the training would go into
    # finding out where a stroke is.
    nn.init.normal_(encoder.vision_model.embeddings.position_embedding.weight, std=0.3)
    return encoder


def unet() -> UNet2DConditionModel:
    """Noise prediction for latents [N, 4, 8, 8] under a condition [N, 1, 64]."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 64),
        # Attention at 8x8 doubles the cost of a step and was not needed for digits.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=EMBEDDING,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on Stable Diffusion's noise levels."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
    )


def feature_extractor() -> CLIPImageProcessor:
    """The encoder's preprocessing: squash to 32x32, bicubic, CLIP's mean and standard deviation."""
    return CLIPImageProcessor(
        do_resize=True,
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )


def assemble(
    vae: AutoencoderKL, encoder: CLIPVisionModelWithProjection, denoiser: UNet2DConditionModel
) -> StableDiffusionImageVariationPipeline:
    """The pipeline around trained parts; digits need no safety checker."""
    return StableDiffusionImageVariationPipeline(
        vae=vae,
        image_encoder=encoder,
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=feature_extractor(),
        requires_safety_checker=False,
    )
