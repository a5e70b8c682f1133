"""The architectures of the benchmark are what they say."""

from __future__ import annotations

import pytest
import torch

from pipeline.generators.folded_attention import why_not
from pipeline.generators.random_weights import TINY, random_sd_variations, tiny_variations


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_real_architecture_without_its_weights():
    pipeline = random_sd_variations(torch.device("meta"), torch.bfloat16)
    assert parameters(pipeline.unet) == 859_520_964  # Stable Diffusion 1.x
    assert parameters(pipeline.vae) == 83_653_863
    assert parameters(pipeline.image_encoder) == 303_966_208  # CLIP ViT-L/14's vision tower and projection
    assert pipeline.unet.dtype == torch.bfloat16
    assert pipeline.scheduler.betas.device.type == "cpu"
    assert why_not(pipeline.unet) is None


@pytest.mark.parametrize("kind", TINY)
def test_tiny_pipelines_are_a_function_of_the_seed(kind):
    one, same, other = tiny_variations(kind), tiny_variations(kind), tiny_variations(kind, seed=1)
    first = [pipeline.unet.conv_in.weight for pipeline in (one, same, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert one.unet.config.sample_size * one.vae_scale_factor == int(kind.removesuffix("px"))
