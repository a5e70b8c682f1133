"""The rule for number formats, as a table, and that preparing a network changes no values."""

import pytest
import timm
import torch

from manifests.errors import UsageError
from trainer.nn.precision import choose, full_precision, has_fast_bf16, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "kind", "asked", "fast", "expected"),
    [
        (CPU, "vit", "auto", False, (torch.float32, False, True)),
        (CPU, "vit", "auto", True, (torch.float32, False, True)),
        (CPU, "convnet", "auto", True, (torch.float32, True, True)),
        (CPU, "vit", "bf16", True, (torch.bfloat16, False, False)),
        (CPU, "convnet", "bf16", True, (torch.bfloat16, True, False)),
        (CPU, "vit", "bf16", False, (torch.bfloat16, False, False)),
        (GPU, "vit", "auto", True, (torch.bfloat16, False, True)),
        (GPU, "convnet", "auto", True, (torch.bfloat16, True, True)),
        (GPU, "vit", "auto", False, (torch.float32, False, True)),
        (GPU, "vit", "fp16", False, (torch.float16, False, True)),
        (GPU, "vit", "fp32", True, (torch.float32, False, True)),
    ],
)
def test_choices(device, kind, asked, fast, expected):
    precision = choose(device, kind, asked, fast_bf16=fast)
    assert (precision.dtype, precision.channels_last, precision.fused_attention) == expected


def test_slow_bf16_is_given_with_a_warning():
    assert "no AMX" in choose(CPU, "vit", "bf16", fast_bf16=False).reason
    assert "slower" not in choose(CPU, "vit", "bf16", fast_bf16=True).reason
    assert "fp16" in choose(GPU, "vit", fast_bf16=False).reason


@pytest.mark.parametrize("asked", ["fp16", "fp8"])
def test_what_cannot_be_is_refused_with_what_can(asked):
    with pytest.raises(UsageError, match="fp32") as refusal:
        choose(CPU, "vit", asked)
    assert asked in str(refusal.value)


def test_looking_at_this_cpu_answers_or_gives_up(monkeypatch):
    assert has_fast_bf16(CPU) in (True, False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert has_fast_bf16(CPU) is False
    assert choose(CPU, "vit").dtype == torch.float32


def test_prepared_vit_spells_out_attention_with_the_same_outputs():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = vit(images)
    prepare(vit, choose(CPU, "vit", "bf16", fast_bf16=True))
    assert not vit.blocks[0].attn.fused_attn
    torch.testing.assert_close(vit(images), before, atol=1e-5, rtol=1e-5)


def test_prepared_convnet_is_channels_last():
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    weights = convolution[0].weight.detach().clone()
    prepare(convolution, choose(CPU, "convnet", fast_bf16=False))
    assert convolution[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolution[0].weight, weights)


def test_full_precision_switches_autocast_off():
    values = torch.full((2, 2), 1.001)
    with torch.autocast("cpu", torch.bfloat16):
        assert (values @ values).dtype == torch.bfloat16
        with full_precision(values):
            assert (values @ values).dtype == torch.float32
