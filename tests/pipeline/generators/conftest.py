"""Tiny pipelines of real diffusers classes, with random weights, saved where a generator can load them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from pipeline.generators import deprecated
from pipeline.generators.random_weights import SD_SCHEDULER, TINY_32, tiny_variations

TEXT = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "max_position_embeddings": 8,
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def variation_pipeline():
    pipeline = tiny_variations("32px", seed=1)
    with torch.no_grad():  # as initialised, every bias is zero and the unconditional half would not be tested
        for parameter in pipeline.unet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.03)
    return pipeline


@pytest.fixture(scope="session")
def variation_folder(variation_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("variations")
    variation_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checked_folder(variation_pipeline, tmp_path_factory) -> Path:
    """The same with a safety checker."""
    folder = tmp_path_factory.mktemp("checked")
    torch.manual_seed(3)
    vision = {k: v for k, v in TINY_32["clip"].items() if k != "projection_dim"}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
        checker.concept_embeds_weights.fill_(0.4)
        checker.special_care_embeds_weights.fill_(0.9)
    pipeline = type(variation_pipeline)(**{**variation_pipeline.components, "safety_checker": checker})
    pipeline.save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", model_max_length=8
    )


def text_parts(width: int = 16) -> dict:
    torch.manual_seed(4)
    unet = {**TINY_32["unet"], "cross_attention_dim": width}
    return {
        "vae": AutoencoderKL(**TINY_32["vae"]).eval(),
        "unet": UNet2DConditionModel(**unet).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)).eval(),
        "tokenizer": tokenizer(),
    }


def image_parts() -> dict:
    side = TINY_32["clip"]["image_size"]
    return {
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY_32["clip"])).eval(),
        "feature_extractor": CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    }


@pytest.fixture(scope="session")
def text_pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        **text_parts(),
        scheduler=PNDMScheduler(**SD_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def text_folder(text_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def img2img_folder(text_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("img2img")
    StableDiffusionImg2ImgPipeline(**text_pipeline.components, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unclip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unclip")
    parts = text_parts()
    torch.manual_seed(5)
    width = TINY_32["clip"]["projection_dim"]
    unet = {
        **TINY_32["unet"],
        "cross_attention_dim": 16,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2 * width,
    }
    parts["unet"] = UNet2DConditionModel(**unet).eval()
    StableUnCLIPImg2ImgPipeline(
        **parts,
        **image_parts(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=width),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=DDIMScheduler.from_config(SD_SCHEDULER),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def versatile_folder(tmp_path_factory) -> Path:
    """All of Versatile Diffusion, as `shi-labs/versatile-diffusion` holds it."""
    deprecated.find("VersatileDiffusionPipeline")
    module = diffusers.pipelines.versatile_diffusion
    folder = tmp_path_factory.mktemp("versatile")
    torch.manual_seed(7)
    width = TINY_32["clip"]["projection_dim"]
    flat = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockFlat", "DownBlockFlat"),
        "up_block_types": ("UpBlockFlat", "CrossAttnUpBlockFlat"),
        "cross_attention_dim": width,
    }
    parts = image_parts()
    module.VersatileDiffusionPipeline(
        tokenizer=tokenizer(),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=width)).eval(),
        image_feature_extractor=parts["feature_extractor"],
        image_encoder=parts["image_encoder"],
        image_unet=UNet2DConditionModel(**{**TINY_32["unet"], "cross_attention_dim": width}).eval(),
        text_unet=module.modeling_text_unet.UNetFlatConditionModel(**flat).eval(),
        vae=AutoencoderKL(**TINY_32["vae"]).eval(),
        scheduler=DDIMScheduler.from_config(SD_SCHEDULER),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def karlo_folder(tmp_path_factory) -> Path:
    """unCLIP image variations, as `kakaobrain/karlo-v1-alpha-image-variations` holds them: 16 pixels made 32."""
    pipeline_class = deprecated.find("UnCLIPImageVariationPipeline")
    folder = tmp_path_factory.mktemp("karlo")
    torch.manual_seed(8)
    width = TINY_32["clip"]["projection_dim"]
    text = CLIPTextConfig(**{**TEXT, "hidden_size": width}, projection_dim=width)
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1}
    resnets = {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    }
    crossed = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "identity",
        "attention_head_dim": 4,
        "cross_attention_dim": 20,
    }
    pipeline_class(
        decoder=UNet2DConditionModel(sample_size=16, in_channels=3, out_channels=6, **blocks, **crossed).eval(),
        text_encoder=CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer(),
        text_proj=diffusers.pipelines.unclip.text_proj.UnCLIPTextProjModel(
            clip_embeddings_dim=width, time_embed_dim=128, cross_attention_dim=20
        ).eval(),
        **image_parts(),
        super_res_first=UNet2DModel(sample_size=32, in_channels=6, **blocks, **resnets).eval(),
        super_res_last=UNet2DModel(sample_size=32, in_channels=6, **blocks, **resnets).eval(),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log"),
    ).save_pretrained(folder)
    return folder


def pixel_unet() -> UNet2DModel:
    torch.manual_seed(6)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture(scope="session", params=["DDPMPipeline", "DDIMPipeline"])
def unconditional_folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    cls = {"DDPMPipeline": DDPMPipeline, "DDIMPipeline": DDIMPipeline}[request.param]
    cls(unet=pixel_unet(), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder
