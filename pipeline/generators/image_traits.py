"""Where classes of image pipelines depart from the names and habits that most of diffusers' share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTraits:
    """What the adapter has to know of a class; the defaults are the usual names."""

    networks: tuple[str, ...] = ("unet", "transformer")  # the first that is there tells the size trained for
    steps: str = "num_inference_steps"
    guidance_scale: str = "guidance_scale"
    scheduler: str = "scheduler"
    feature_extractor: str = "feature_extractor"
    fixed_size: bool = False  # the network's own size in pixels is the only one it can draw
    float32_on_cpu: bool = False  # its call resizes with antialias, which torch does in half precision on GPUs alone
    # Of squashed conditioning images. Off is how the reference implementation of DiffMix (`generating_images/run.py`)
    # feeds the class: to tensor, bicubic resize without antialias, truncated to uint8. Where the cubic overshoots, the
    # reference's values wrap from black to white and back; here they are clamped.
    antialias: bool = True


USUAL = ImageTraits()
TRAITS: dict[str, ImageTraits] = {
    "VersatileDiffusionImageVariationPipeline": ImageTraits(
        networks=("image_unet",), feature_extractor="image_feature_extractor", antialias=False
    ),
    "UnCLIPImageVariationPipeline": ImageTraits(
        networks=("super_res_first",),
        steps="decoder_num_inference_steps",
        guidance_scale="decoder_guidance_scale",
        scheduler="decoder_scheduler",
        fixed_size=True,
        float32_on_cpu=True,
    ),
}
