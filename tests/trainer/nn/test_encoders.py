"""Encoders by name: sizes, keywords, pooling, the stems for small images, and errors."""

import pytest
import timm
import torch
from torch import nn

from manifests.errors import UsageError
from trainer.nn.encoders import EncoderConfig, check_size, make_encoder, resolved_args

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_vit(size=32, **args):
    return make_encoder(EncoderConfig(name="vit_tiny_patch16_224", args={**TINY, **args}), size)


@pytest.mark.parametrize("size", [32, 96])
def test_a_vit_is_made_for_its_size_and_takes_small_crops(size):
    encoder = tiny_vit(size)
    assert encoder.patch_embed.grid_size == (size // 8, size // 8) and encoder.num_features == 32
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 32)
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 32)


def test_a_vit_gives_its_class_token():
    encoder = tiny_vit().eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), encoder.forward_features(images)[:, 0])


def test_another_pooling_by_argument():
    encoder = tiny_vit(global_pool="avg").eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = encoder.forward_features(images)[:, 1:].mean(1)
        torch.testing.assert_close(encoder(images), encoder.fc_norm(tokens))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "eva02_tiny_patch14_224"])
def test_num_features_is_the_width_of_the_features(name):
    size = 56 if "patch14" in name else 64
    encoder = make_encoder(EncoderConfig(name=name), size)
    assert encoder.training
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, encoder.num_features)


def test_two_calls_give_different_weights_and_overrides_win():
    config = EncoderConfig(name="vit_tiny_patch16_224", args={**TINY, "drop_path_rate": 0.0})
    first, second = make_encoder(config, 32), make_encoder(config, 32, drop_path_rate=0.5)
    assert not torch.equal(first.patch_embed.proj.weight, second.patch_embed.proj.weight)
    assert isinstance(first.blocks[1].drop_path1, nn.Identity)
    assert second.blocks[1].drop_path1.drop_prob == 0.5


@pytest.mark.parametrize(("name", "depths"), [("resnet18_cifar", (2, 2, 2, 2)), ("resnet50_cifar", (3, 4, 6, 3))])
def test_stems_for_small_images_keep_the_resolution(name, depths):
    encoder = make_encoder(EncoderConfig(name=name), 32)
    assert encoder.conv1.weight.shape == (64, 3, 3, 3) and encoder.conv1.stride == (1, 1)
    assert isinstance(encoder.maxpool, nn.Identity)
    assert tuple(len(getattr(encoder, f"layer{stage}")) for stage in (1, 2, 3, 4)) == depths
    assert encoder.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (4, 4)
    assert [stage["reduction"] for stage in encoder.feature_info] == [1, 1, 2, 4, 8]
    plain = timm.create_model(name.removesuffix("_cifar"), num_classes=0)
    differing = {key for key, value in plain.state_dict().items() if encoder.state_dict()[key].shape != value.shape}
    assert differing == {"conv1.weight"} and plain.state_dict().keys() == encoder.state_dict().keys()
    assert encoder.pretrained_cfg["input_size"] == (3, 32, 32) and encoder.pretrained_cfg["first_conv"] == "conv1"


def test_intermediate_features_of_the_small_stem():
    model = timm.create_model("resnet18_cifar", features_only=True)
    assert [tuple(stage.shape[2:]) for stage in model(torch.zeros(1, 3, 32, 32))] == [
        (32, 32), (32, 32), (16, 16), (8, 8), (4, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18_cifar", "swin_tiny_patch4_window7_224"])
def test_resolved_arguments_build_the_same_network_in_plain_timm(name):
    config = EncoderConfig(name=name, args=TINY if name.startswith("vit") else {})
    encoder = make_encoder(config, 32 if "swin" not in name else 64)
    again = timm.create_model(name, **resolved_args(config, 32 if "swin" not in name else 64))
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (encoder, again)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "args", "size", "match"),
    [
        ("vit_tiny_pach16_224", {}, 224, "did you mean vit_tiny_patch16_224"),
        ("hf-hub:someone/model", {}, 224, "has no model 'hf-hub:someone/model'"),
        ("vit_tiny_patch16_224", {}, 32, r"2x2 patches.*--set encoder\.args\.patch_size=4"),
        ("vit_tiny_patch16_224", {"patch_sise": 4}, 32, "no argument 'patch_sise'; did you mean 'patch_size'"),
        ("resnet18", {"depth": 3}, 32, "no argument 'depth'"),
        ("vit_tiny_patch16_224", {"embed_dim": 65}, 224, "divisible by num_heads"),
        ("vit_tiny_patch16_224", {"patch_size": 5}, 32, "divisible by patch size"),
        ("vit_tiny_patch16_224", {**TINY, "global_pool": ""}, 32, "global_pool to avg or token"),
        ("resnet18", {"num_classes": 10}, 32, "num_classes cannot be set"),
        ("resnet18", {"in_chans": 1}, 32, "in_chans cannot be set"),
        ("resnet18", {"pretrained": True}, 32, "pretrained cannot be set"),
    ],
)
def test_errors_say_what_to_do(name, args, size, match):
    with pytest.raises(UsageError, match=match):
        make_encoder(EncoderConfig(name=name, args=args), size)


def test_few_patches_are_allowed_when_asked_for():
    assert tiny_vit(16).patch_embed.grid_size == (2, 2)


def test_small_crops_that_patches_do_not_divide_are_refused():
    encoder = make_encoder(EncoderConfig(name="vit_tiny_patch16_224", args={"patch_size": 8, "depth": 1}), 32)
    check_size(encoder, "vit_tiny_patch16_224", 16)
    with pytest.raises(UsageError, match=r"no small crops of 18 px \(views.local_size\)"):
        check_size(encoder, "vit_tiny_patch16_224", 18)
