"""MixedAE's mixtures, contrastive loss and whole loss by hand and against loops; its switches; its groups."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, noise_views, part, small_method, tiny_vit
from tests.trainer.methods.test_mae import naive_loss
from trainer.methods.mixed_ae import MixedAE, MixedAEConfig, homologous_contrast, mix, random_mixture
from trainer.nn.masked_vit import patchify, unpatchify

CPU = torch.device("cpu")
PLAIN = {"homologous_attention": False, "contrastive_weight": 0.0, "segment_embedding": "none"}


def _mixed(**settings_):
    return small_method("mixed-ae", **settings_)


def naive_contrast(patches, source, temperature):
    """The supervised contrastive loss of one mixture, patch after patch."""
    values = [patch / patch.square().sum().sqrt() for patch in patches]
    losses = []
    for j, mine in enumerate(source):
        exponentials = {q: torch.exp(values[j] @ values[q] / temperature) for q in range(len(values)) if q != j}
        positives = [p for p in exponentials if source[p] == mine]
        logs = [torch.log(exponentials[p] / sum(exponentials.values())) for p in positives]
        losses.append(-sum(logs) / len(positives))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.05, 0.25, 2.0])
def test_contrast_and_its_gradient_are_the_papers(temperature):
    ours = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    loss = homologous_contrast(ours, 4, temperature)
    expected = sum(naive_contrast(one, [0, 0, 1, 1, 2, 2, 3, 3], temperature) for one in theirs) / 3
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)


def test_contrast_by_hand():
    # Two images of two equal patches each, at right angles: of the three others, one is the same and two are not.
    patches = torch.tensor([[[2.0, 0], [1, 0], [0, 1], [0, 3]]])
    assert homologous_contrast(patches, 2, 0.5).item() == pytest.approx(math.log(math.e**2 + 2) - 2, abs=1e-6)
    # All patches equal: nothing is told apart.
    assert homologous_contrast(torch.ones(1, 4, 2), 2, 0.5).item() == pytest.approx(math.log(3), abs=1e-6)


def test_autocast_does_not_reach_the_contrast():
    patches = torch.randn(2, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(homologous_contrast(patches, 2, 0.1), homologous_contrast(patches, 2, 0.1).float())


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 4), size=st.integers(1, 5), share=st.integers(1, 6), seed=st.integers(0, 2**62))
def test_every_image_gives_equally_many_patches(groups, size, share, seed):
    order, source = random_mixture(groups, size, size * share, seed, CPU)
    for group in range(groups):
        assert torch.bincount(source[group], minlength=size).tolist() == [share] * size
        assert source[group, order[group]].tolist() == [number for number in range(size) for _ in range(share)]
        assert order[group].sort().values.tolist() == list(range(size * share))


def test_mixing_by_hand():
    pixels = torch.arange(4 * 3).view(4, 3, 1)  # two groups of two images of three patches
    mixed = mix(pixels, torch.tensor([[0, 1, 0], [1, 1, 0]]))
    assert mixed.squeeze(-1).tolist() == [[0, 4, 2], [9, 10, 8]]


def _inside(method, views, seed=0):
    """What the method encodes: mixtures, prefix and patches (image after image), what each image's decoder gets."""
    count = views.crops.shape[1] // method.config.group_size
    mixture = random_mixture(count, method.config.group_size, method.num_patches, seed, CPU)
    prefix, patches, _ = method._encode_mixed(views.crops[0], mixture)
    return mixture, prefix, patches, method._by_image(prefix, patches, mixture.order)


def test_mixture_is_encoded_as_the_image_that_it_is():
    method = _mixed(**PLAIN)
    views = noise_views(method, 8)
    mixture, prefix, patches, _ = _inside(method, views)
    mixed = torch.zeros(2, 3, 32, 32)
    for group, place in ((group, place) for group in range(2) for place in range(16)):
        top, left = place // 4 * 8, place % 4 * 8
        image = views.crops[0, 4 * group + mixture.source[group, place]]
        mixed[group, :, top : top + 8, left : left + 8] = image[:, top : top + 8, left : left + 8]
    expected = method.encoder.forward_features(mixed)
    torch.testing.assert_close(prefix, expected[:, :1])
    for group in range(2):
        torch.testing.assert_close(patches[group], expected[group, 1:][mixture.order[group]])


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_loss_is_that_of_the_papers_parts(weight):
    method = _mixed(contrastive_weight=weight)
    views = noise_views(method)
    mixture, _, patches, encoded = _inside(method, views)
    predicted = method.decoder(*encoded).double()
    losses = []
    for number, image in enumerate(views.crops[0].double()):
        visible = (mixture.source[0] == number).nonzero().flatten().tolist()
        assert sorted(encoded.order[number, :4].tolist()) == visible
        hidden = encoded.order[number, 4:].tolist()
        assert sorted(hidden) == [place for place in range(16) if place not in visible]
        losses.append(naive_loss(predicted[number], image, 8, hidden))
    owners = [number for number in range(4) for _ in range(4)]
    contrast = naive_contrast(patches[0].double(), owners, 0.25)
    output = method(views, MIDWAY)
    torch.testing.assert_close(output.logs["reconstruction"].double(), torch.tensor(sum(losses) / 4).double())
    expected = sum(losses) / 4 + weight * contrast.detach()
    torch.testing.assert_close(output.loss.detach().double(), expected, atol=1e-5, rtol=1e-5)
    assert ("contrast" in output.logs) == (weight > 0)


@pytest.mark.parametrize("place", ["input", "output"])
def test_segment_embeddings_are_those_of_the_images(place):
    method = _mixed(segment_embedding=place, homologous_attention=False)
    plain = _mixed(segment_embedding="none", homologous_attention=False)
    plain.load_state_dict(method.state_dict(), strict=False)
    views = noise_views(method)
    before = _inside(plain, views)
    after = _inside(method, views)
    assert not torch.allclose(before[3].visible, after[3].visible, atol=1e-3)
    assert torch.equal(before[2], after[2]) == (place == "output"), "the contrastive loss sees none of it there"
    if place == "output":
        torch.testing.assert_close(after[3].visible - before[3].visible, method.segments[:, None].expand(4, 4, 32))
    with torch.no_grad():
        method.segments.zero_()
    torch.testing.assert_close(_inside(method, views)[3].visible, before[3].visible)


def test_segment_embeddings_are_added_where_their_patches_stand():
    method = _mixed(segment_embedding="input", homologous_attention=False)
    views = noise_views(method)
    source = _inside(method, views)[0].source[0]
    seen = []
    hook = method.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        _inside(method, views)
        method.segments[2] += 1
        _inside(method, views)
    hook.remove()
    changed = (seen[1] - seen[0]).abs().amax(-1)[0]
    assert changed[0] == 0 and torch.equal(changed[1:] > 0.5, source == 2)


def test_without_mixing_it_is_mae():
    method, mae = _mixed(mixing=False), small_method("mae")
    assert method.state_dict().keys() == mae.state_dict().keys()
    views = noise_views(mae)
    assert torch.equal(method(views, MIDWAY).loss, mae(views, MIDWAY).loss)
    assert method.notes(MIDWAY) and not _mixed().notes(MIDWAY)


def test_groups_of_one_are_a_plain_autoencoder():
    method = _mixed(group_size=1, **PLAIN)
    views = noise_views(method)
    tokens = method.encoder.forward_features(views.crops[0])
    predicted = method.decoder(tokens[:, :1], tokens[:, 1:], torch.arange(16).expand(4, -1)).double()
    losses = [naive_loss(predicted[n], image, 8, range(16)) for n, image in enumerate(views.crops[0].double())]
    loss = method(views, MIDWAY).loss
    torch.testing.assert_close(loss.double(), torch.tensor(sum(losses) / 4).double(), atol=1e-5, rtol=1e-5)
    attended = _mixed(group_size=1, **PLAIN | {"homologous_attention": True})
    attended.load_state_dict(method.state_dict())
    torch.testing.assert_close(attended(views, MIDWAY).loss, loss)


@pytest.mark.parametrize("on", [True, False])
def test_attention_is_homologous_in_training_only(on):
    method = _mixed(homologous_attention=on)
    views = noise_views(method)
    trained = method(views, MIDWAY)
    assert ("homologous_keys" in trained.logs) == on
    for name in ("homologous_keys", "homologous_keys_first", "homologous_keys_last") if on else ():
        assert 0 < trained.logs[name] < 1
    method.eval()
    evaluated = method(views, MIDWAY)
    assert "homologous_keys" not in evaluated.logs
    assert torch.allclose(evaluated.loss, trained.loss, atol=1e-6) != on
    plain = tiny_vit().eval()
    plain.load_state_dict(method.encoder.state_dict())
    assert type(method.encoder) is type(plain)
    assert torch.equal(method.encoder(views.crops[0]), plain(views.crops[0]))


def test_groups_are_neighbours_whatever_the_micro_batch():
    """The images of a group depend on nobody else, so that ranks may cut a batch between any two groups."""
    method = _mixed()
    views = noise_views(method, 8)
    mixture = random_mixture(2, 4, 16, 0, CPU)
    whole = method._encode_mixed(views.crops[0], mixture)[1]
    halves = [
        method._encode_mixed(
            part(views, 4 * n, 4 * n + 4).crops[0], type(mixture)(*(one[n : n + 1] for one in mixture))
        )[1]
        for n in range(2)
    ]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=1e-5)


def test_mixtures_change_with_the_seed_alone():
    method = _mixed()
    views = noise_views(method)
    first = method(views, MIDWAY).loss
    torch.manual_seed(99)
    assert torch.equal(method(views, MIDWAY).loss, first)
    assert not torch.equal(method(views, replace(MIDWAY, seed=1)).loss, first)


def test_pixels_outside_the_mixture_do_not_reach_the_encoder():
    method = _mixed()
    views = noise_views(method)
    mixture, prefix, patches, _ = _inside(method, views)
    pixels = patchify(views.crops[0], (8, 8))
    seen = torch.stack([mixture.source[0] == number for number in range(4)])
    other = unpatchify(torch.where(seen[..., None], pixels, pixels + 7), (4, 4), (8, 8))
    again = method._encode_mixed(other, mixture)
    assert torch.equal(again[0], prefix) and torch.equal(again[1], patches)


def _vit(size, patch, **arguments):
    fixed = {"img_size": size, "patch_size": patch, "dynamic_img_size": False}
    return tiny_vit(**fixed, **arguments)


def test_as_many_patches_are_seen_without_mixing_however_the_share_rounds():
    config = MixedAEConfig(group_size=5, decoder_dim=32, decoder_depth=1, decoder_heads=2, mixing=False)
    assert MixedAE(lambda: _vit(40, 8), config).num_visible == 5  # of 25; 25 * (1 - 0.8) is less than 5
    assert _mixed(group_size=1, mixing=False).num_visible == 15


def test_images_that_are_no_whole_patches_cannot_be_mixed():
    config = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    with pytest.raises(UsageError, match="images of 36 x 36 px are no whole patches of 8 x 8 px"):
        MixedAE(lambda: _vit(36, 8), MixedAEConfig(**config))
    method = MixedAE(lambda: _vit(36, 8), MixedAEConfig(**config, mixing=False))
    assert method(noise_views(method, size=36), MIDWAY).loss.isfinite()


@pytest.mark.parametrize("images", [1, 3, 6])
def test_micro_batches_that_are_no_groups(images):
    with pytest.raises(UsageError, match=f"{images} images.*groups of 4"):
        _mixed().check_batch(images)
    _mixed(mixing=False).check_batch(images)
    _mixed().check_batch(8)


@pytest.mark.parametrize("size", [3, 5, 32])
def test_groups_that_do_not_divide_the_patches(size):
    with pytest.raises(UsageError, match=r"method.group_size.*divides the 16 patches"):
        _mixed(group_size=size)


def test_groups_with_one_patch_an_image_have_no_contrast():
    with pytest.raises(UsageError, match=r"method.group_size is 16.*at most 8"):
        _mixed(group_size=16)
    _mixed(group_size=16, contrastive_weight=0.0).check_batch(16)


@pytest.mark.parametrize(
    "settings_",
    [
        {"group_size": 0},
        {"contrastive_weight": -1},
        {"contrastive_temperature": 0},
        {"segment_embedding": "both"},
        {"decoder_dim": 100},
    ],
)
def test_impossible_settings_are_refused(settings_):
    with pytest.raises(UsageError, match=f"method.{next(iter(settings_))}"):
        MixedAEConfig(**settings_)
