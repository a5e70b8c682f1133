"""MAE's masks, targets and loss by hand, against loops, and on any number of ranks."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, noise_views, small_method
from trainer.methods.mae import MAE, MAEConfig, normalized, random_orders, reconstruction_loss

CPU = torch.device("cpu")


def naive_patches(image, patch):
    """Pixels of each patch of an image [3, S, S], row by row, colours last."""
    side = image.shape[-1]
    boxes = [image[:, y : y + patch, x : x + patch] for y in range(0, side, patch) for x in range(0, side, patch)]
    return [[c.item() for y in range(patch) for x in range(patch) for c in box[:, y, x]] for box in boxes]


def naive_loss(predicted, image, patch, hidden, normalize=True):
    """Section 3 of the paper: the squared error of the hidden patches' pixels, each patch normalised by its own."""
    errors, patches = [], naive_patches(image, patch)
    for number, place in enumerate(hidden):
        target = patches[place]
        if normalize:
            mean = sum(target) / len(target)
            variance = sum((value - mean) ** 2 for value in target) / (len(target) - 1)
            target = [(value - mean) / (variance + 1e-6) ** 0.5 for value in target]
        errors += [(ours - theirs) ** 2 for ours, theirs in zip(predicted[number].tolist(), target, strict=True)]
    return sum(errors) / len(errors)


def test_targets_by_hand():
    patch = torch.tensor([1.0, 1, 3, 3])
    # Of mean 2 and variance 4 / 3.
    torch.testing.assert_close(normalized(patch), torch.tensor([-1.0, -1, 1, 1]) * 0.75**0.5)
    assert reconstruction_loss(torch.zeros(1, 1, 4), patch.view(1, 1, 4), normalize=True).item() == pytest.approx(0.75)
    assert reconstruction_loss(torch.zeros(1, 1, 4), patch.view(1, 1, 4), normalize=False).item() == pytest.approx(5)


def test_a_patch_of_one_colour_has_finite_targets():
    assert not normalized(torch.full((2, 3), 5.0)).any()


@pytest.mark.parametrize("normalize", [True, False])
def test_method_is_encoder_decoder_and_loss(normalize):
    method = small_method("mae", normalize_targets=normalize)
    views = noise_views(method)
    encoded = method.encode(views.crops[0], MIDWAY.seed)
    predicted = method.decoder(*encoded).double()
    assert encoded.visible.shape == (4, 4, 32) and predicted.shape == (4, 12, 192)
    losses = [
        naive_loss(predicted[number], image, 8, encoded.order[number, 4:].tolist(), normalize)
        for number, image in enumerate(views.crops[0].double())
    ]
    loss = method(views, MIDWAY).loss
    torch.testing.assert_close(loss.double(), torch.tensor(sum(losses) / 4).double(), atol=1e-5, rtol=1e-5)


def test_masks_change_with_the_seed_alone():
    method = small_method("mae")
    views = noise_views(method)
    first = method(views, MIDWAY).loss
    torch.manual_seed(99)
    assert torch.equal(method(views, MIDWAY).loss, first)
    assert not torch.equal(method(views, dataclasses.replace(MIDWAY, seed=1)).loss, first)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 8), length=st.integers(1, 70), seed=st.integers(0, 2**62))
def test_orders_are_permutations(count, length, seed):
    orders = random_orders(count, length, seed, CPU)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(length).expand(count, length))


def test_every_patch_is_hidden_as_often():
    orders = random_orders(4000, 16, 0, CPU)
    visible = torch.bincount(orders[:, :4].flatten(), minlength=16) / 4000
    assert visible.sub(0.25).abs().max() < 0.035  # five deviations


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.74, 4), (0.01, 15), (0.99, 1), (0.5, 8)])
def test_number_of_visible_patches(ratio, visible):
    assert small_method("mae", mask_ratio=ratio).num_visible == visible


def test_defaults_are_the_papers():
    config = MAEConfig()
    assert (config.mask_ratio, config.decoder_dim, config.decoder_depth, config.decoder_heads) == (0.75, 512, 8, 16)
    assert config.normalize_targets and MAE.num_crops == 1


@pytest.mark.parametrize(
    "settings_",
    [
        {"mask_ratio": 0},
        {"mask_ratio": 1.0},
        {"decoder_depth": 0},
        {"decoder_heads": 0},
        {"decoder_dim": 0},
        {"decoder_dim": 100},
        {"decoder_dim": 6, "decoder_heads": 3},
    ],
)
def test_impossible_settings_are_refused(settings_):
    with pytest.raises(UsageError, match=f"method.{next(iter(settings_))}"):
        MAEConfig(**settings_)
