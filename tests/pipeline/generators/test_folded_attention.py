"""The folded UNet computes what `UNet2DConditionModel.forward` computes, or declines."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from pipeline.generators.folded_attention import FoldedUNet, StockUNet, denoiser, why_not
from pipeline.generators.random_weights import TINY_32, TINY_64

BASE = {**TINY_32["unet"], "cross_attention_dim": 24}
THREE = {**TINY_64["unet"], "block_out_channels": (32, 32, 64), "sample_size": 8, "cross_attention_dim": 24}

FOLDED = {
    "embedded-like": BASE,
    "sd1-like": THREE,
    "two-layers": {**BASE, "layers_per_block": 2},
    "sd2-like": {**THREE, "attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    "deep-transformers": {**BASE, "transformer_layers_per_block": 2},
    "no-middle": {**BASE, "mid_block_type": None},
    "scaled-middle": {**BASE, "mid_block_scale_factor": 2.0},
    "odd-size": {**THREE, "sample_size": 7},
    "flipped-sinusoids": {**BASE, "flip_sin_to_cos": False, "freq_shift": 1},
}
DECLINED = {
    "only-cross-attention": {**BASE, "only_cross_attention": True},
    "scale-shift": {**BASE, "resnet_time_scale_shift": "scale_shift"},
    "centred-input": {**BASE, "center_input_sample": True},
    "time-activation": {**BASE, "time_embedding_act_fn": "silu"},
    "gelu": {**BASE, "act_fn": "gelu"},
}


def unet(config: dict) -> UNet2DConditionModel:
    torch.manual_seed(0)
    made = UNet2DConditionModel(**config).eval().requires_grad_(False)
    for parameter in made.parameters():  # biases start at zero: give them something to be wrong about
        parameter.add_(torch.randn_like(parameter) * 0.03)
    return made


def outputs(runner, config: dict, guided: bool) -> list[torch.Tensor]:
    torch.manual_seed(1)
    side = config["sample_size"]
    condition, latents = torch.randn(3, config["cross_attention_dim"]), torch.randn(3, 4, side, side)
    timesteps = torch.tensor([981, 501, 1])
    with torch.inference_mode():
        runner.begin(condition, timesteps, guided=guided)
        return [runner.predict(latents, step) for step in (0, 2)]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", FOLDED)
def test_folded_equals_stock(name, guided):
    config = FOLDED[name]
    network = unet(config)
    assert why_not(network) is None
    stock = outputs(StockUNet(network), config, guided)
    folded = outputs(FoldedUNet(network), config, guided)
    channels_last = outputs(FoldedUNet(network.to(memory_format=torch.channels_last)), config, guided)
    for expected, got, laid_out in zip(stock, folded, channels_last, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(laid_out, expected, atol=1e-5, rtol=0)


def test_a_new_batch_forgets_the_last_condition_and_keeps_the_time_embedding():
    network = unet(BASE)
    folded, stock = FoldedUNet(network), StockUNet(network)
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([500])
    for _ in range(2):
        condition = torch.randn(2, 24)
        biases = getattr(folded, "biases", None)
        with torch.inference_mode():
            for runner in (folded, stock):
                runner.begin(condition, timesteps, guided=True)
            torch.testing.assert_close(folded.predict(latents, 0), stock.predict(latents, 0), atol=1e-5, rtol=0)
    assert folded.biases is biases


@pytest.mark.parametrize("name", DECLINED)
def test_structures_that_are_not_recognised_run_as_they_are(name):
    network = unet(DECLINED[name])
    assert why_not(network)
    runner = denoiser(network)
    assert isinstance(runner, StockUNet)
    assert outputs(runner, DECLINED[name], guided=True)[0].shape == (6, 4, 8, 8)


def test_other_attention_processors_and_subclasses_are_declined():
    class Mine(UNet2DConditionModel):
        pass

    assert "Mine" in why_not(Mine(**BASE))
    network = unet(BASE)
    network.fuse_qkv_projections()
    assert why_not(network)
    assert why_not(UNet2DConditionModel(**BASE, dual_cross_attention=True))
    freed = unet(BASE)
    freed.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert why_not(freed)
