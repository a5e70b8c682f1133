"""A ViT that sees all patches is timm's own; patches that it does not see change nothing."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from tests.trainer.methods.small import tiny_vit
from trainer.nn.masked_vit import (
    embed,
    keep,
    masked_vit,
    patchify,
    run_blocks,
    sincos_positions,
    start_positions,
    take,
    unpatchify,
)
from trainer.nn.patch_decoder import PatchDecoder

VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "average": {"global_pool": "avg"},
    "maximum": {"global_pool": "max", "weight_init": "jax"},
    "average, norm before": {"global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "norm before the blocks": {"pre_norm": True, "init_values": 1e-2, "qk_norm": True},
}


def _images(count=3, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _vit(**arguments):
    torch.manual_seed(0)
    return tiny_vit(**arguments).eval()


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_nothing_left_out_is_timms_own_forward(arguments):
    vit = masked_vit(_vit(**arguments))
    tokens = run_blocks(vit, embed(vit, _images()))
    assert torch.equal(tokens, vit.fc_norm(vit.forward_features(_images())))


def test_encoders_of_one_size():
    vit = masked_vit(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=1).eval())
    assert torch.equal(run_blocks(vit, embed(vit, _images())), vit.forward_features(_images()))


def test_images_of_other_sizes():
    vit = masked_vit(_vit())
    assert torch.equal(run_blocks(vit, embed(vit, _images(size=64))), vit.forward_features(_images(size=64)))


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_order_only_orders(arguments):
    vit = masked_vit(_vit(**arguments))
    images = _images()
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    whole = run_blocks(vit, embed(vit, images))
    shuffled = run_blocks(vit, keep(vit, embed(vit, images), order))
    torch.testing.assert_close(shuffled, keep(vit, whole, order), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_patches_that_are_left_out_are_not_seen(arguments):
    vit = masked_vit(_vit(**arguments))
    images, places = _images(), torch.tensor([[0, 5, 10, 15]] * 3)
    pixels = patchify(images, (8, 8))
    hidden = torch.full_like(pixels, 99.0).scatter(1, places[..., None].expand(-1, -1, 192), take(pixels, places))
    changed = unpatchify(hidden, (4, 4), (8, 8))
    assert not torch.equal(changed, images)
    seen = [run_blocks(vit, keep(vit, embed(vit, one), places)) for one in (images, changed)]
    assert torch.equal(*seen)


def test_patches_by_hand():
    image = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6).float()
    pixels = patchify(image, (2, 3))
    assert pixels.shape == (1, 4, 18)
    expected = [image[0, colour, row, column] for row in (2, 3) for column in (0, 1, 2) for colour in range(3)]
    assert torch.equal(pixels[0, 2], torch.stack(expected))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), height=st.integers(1, 3), width=st.integers(1, 3))
def test_patches_and_back(rows, columns, height, width):
    images = torch.randn(2, 3, rows * height, columns * width)
    pixels = patchify(images, (height, width))
    assert pixels.shape == (2, rows * columns, height * width * 3)
    assert torch.equal(unpatchify(pixels, (rows, columns), (height, width)), images)


def test_positions_are_sines_and_cosines_of_row_and_column():
    positions = sincos_positions((3, 5), 16)
    assert positions.shape == (15, 16)
    bands = 10000 ** -(torch.arange(4) / 4)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        found = positions[row * 5 + column].sort().values
        expected = torch.cat([f(place * bands) for place in (row, column) for f in (torch.sin, torch.cos)])
        torch.testing.assert_close(found, expected.sort().values)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_of_a_new_encoder(no_embed_class):
    vit = masked_vit(_vit(no_embed_class=no_embed_class))
    start_positions(vit)
    assert torch.equal(vit.pos_embed[0, -16:], sincos_positions((4, 4), 32))
    assert vit.pos_embed.shape[1] == 16 + (not no_embed_class) and not vit.pos_embed[0, :-16].any()
    assert vit.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("resnet18", {}, "class ResNet"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, "class VisionTransformerDistilled"),
        ("eva02_tiny_patch14_224", {"img_size": 28}, "class Eva"),
        ("vit_tiny_r_s16_p8_224", {"img_size": 32}, "HybridEmbed"),
        ("vit_tiny_patch16_224", {"img_size": 32, "dynamic_img_pad": True}, "dynamic_img_pad"),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("vit_tiny_patch16_224", {"img_size": 32, "global_pool": "map"}, "global_pool is 'map'.*token, avg"),
    ],
)
def test_encoders_that_cannot(name, arguments, says):
    encoder = timm.create_model(name, num_classes=0, **arguments)
    with pytest.raises(UsageError, match=says):
        masked_vit(encoder)


def _decoder():
    torch.manual_seed(0)
    return PatchDecoder(6, 12, (2, 3), dim=8, depth=2, num_heads=2).eval()


def test_decoder_knows_patches_by_their_numbers_alone():
    decoder = _decoder()
    prefix, visible = torch.randn(1, 1, 6), torch.randn(1, 2, 6)
    order = torch.tensor([[4, 0, 1, 2, 3, 5]])
    predicted = decoder(prefix, visible, order)
    assert predicted.shape == (1, 4, 12)
    swapped = decoder(prefix, visible.flip(1), torch.tensor([[0, 4, 5, 3, 2, 1]]))
    torch.testing.assert_close(swapped, predicted.flip(1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(decoder(prefix, visible.flip(1), order), predicted, atol=1e-3)


def test_decoder_is_that_of_the_paper():
    """The authors' way: all patches in their places, mask tokens where one is hidden, positions, blocks, prediction."""
    decoder = _decoder()
    prefix, visible, order = torch.randn(2, 1, 6), torch.randn(2, 2, 6), torch.tensor([[4, 0, 1, 2, 3, 5], [*range(6)]])
    predicted = decoder(prefix, visible, order)
    for image in range(2):
        tokens = [decoder.mask_token] * 6
        for number, place in enumerate(order[image, :2].tolist()):
            tokens[place] = decoder.embed(visible[image, number])
        placed = torch.stack(tokens) + sincos_positions((2, 3), 8)
        whole = decoder.predict(decoder.norm(decoder.blocks(torch.cat([decoder.embed(prefix[image]), placed])[None])))[
            0, 1:
        ]
        torch.testing.assert_close(predicted[image], whole[order[image, 2:]], atol=1e-5, rtol=1e-5)
