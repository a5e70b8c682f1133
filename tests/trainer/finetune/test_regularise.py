"""Mixed images and targets by hand, and draws that are a function of torch's seed alone."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from manifests.errors import UsageError
from trainer.data.batch import Views
from trainer.finetune.classifier import Classifier
from trainer.finetune.config import ImageConfig
from trainer.finetune.regularise import regulariser
from trainer.methods.base import Progress
from trainer.nn.encoders import EncoderConfig, make_encoder
from trainer.tuners.base import TunerConfig, make_tuner
from trainer.tuners.spec import parse

CLASSES = 5
LABELS = torch.tensor([0, 1, 2, 3])
ONE_HOT = torch.eye(CLASSES)
ALL = {"random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}


def batch(count=4, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def regularised(images, labels=LABELS, seed=0, **settings):
    made = regulariser(ImageConfig(**settings), CLASSES)
    torch.manual_seed(seed)
    return made(images, labels)


def share_of_the_first(targets):
    """Lambda, read from the first target without smoothing."""
    return targets[0, 0].item()


@pytest.mark.parametrize("seed", range(3))
def test_mixup_is_a_weighted_mean_of_a_batch_and_its_reverse(seed):
    images = batch()
    mixed, targets = regularised(images, seed=seed, mixup=0.8)
    share = share_of_the_first(targets)
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(targets, share * ONE_HOT[[0, 1, 2, 3]] + (1 - share) * ONE_HOT[[3, 2, 1, 0]])


@pytest.mark.parametrize("seed", range(3))
def test_cutmix_pastes_a_box_whose_area_is_its_share_of_the_target(seed):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    mixed, targets = regularised(images, seed=seed, cutmix=1.0)
    pasted = mixed[0, 0] == 3
    assert torch.all(pasted | (mixed[0, 0] == 0))
    assert pasted.float().mean().item() == pytest.approx(1 - share_of_the_first(targets), abs=1e-6)
    rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
    assert pasted.sum() == rows * columns, "a box"
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_smoothing_by_hand():
    images = batch()
    same, targets = regularised(images, label_smoothing=0.1)
    assert torch.equal(same, images)
    torch.testing.assert_close(targets[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))


def test_smoothed_mixtures_by_hand():
    _, targets = regularised(batch(), mixup=0.8, label_smoothing=0.1)
    share = (targets[0, 0].item() - 0.02) / 0.9
    expected = torch.tensor([0.02 + 0.9 * share, 0.02, 0.02, 0.02 + 0.9 * (1 - share), 0.02])
    torch.testing.assert_close(targets[0], expected)


def test_some_images_get_a_rectangle_of_noise():
    images = torch.zeros(200, 3, 16, 16)
    erased, targets = regularised(images, torch.zeros(200, dtype=torch.int64), random_erasing=0.25)
    touched = (erased != 0).all(1)  # noise is never 0
    share = touched.flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.08)
    areas = touched.flatten(1).float().mean(1)
    assert areas[areas > 0].min() >= 0.01
    assert areas.max() <= 0.4
    assert torch.equal(targets, ONE_HOT[[0] * 200])


def test_the_last_of_an_odd_batch_is_not_mixed():
    images, labels = batch(5), torch.tensor([0, 1, 2, 3, 4])
    mixed, targets = regularised(images, labels, mixup=0.8)
    assert torch.equal(mixed[4], images[4])
    assert torch.equal(targets[4], ONE_HOT[4])
    assert not torch.equal(mixed[0], images[0])


def test_draws_follow_torchs_seed_and_leave_other_generators_alone():
    images = batch(32)
    labels = torch.arange(32) % CLASSES
    first = regularised(images, labels, seed=3, **ALL)
    random.seed(11)
    np.random.seed(12)
    states = random.getstate(), np.random.get_state()[1].tolist()
    again = regularised(images, labels, seed=3, **ALL)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    other = regularised(images, labels, seed=4, **ALL)
    assert not torch.equal(first[1], other[1])


def test_a_batch_stays_as_it_is():
    images = batch(32)
    kept = images.clone()
    regularised(images, torch.arange(32) % CLASSES, **ALL)
    assert torch.equal(images, kept)


def test_nothing_is_made_where_nothing_is_asked():
    assert regulariser(ImageConfig(), CLASSES) is None
    assert regulariser(ImageConfig(mixup=0.0, label_smoothing=0.0), CLASSES) is None


@pytest.mark.parametrize(
    ("name", "value"), [("mixup", -1.0), ("cutmix", float("inf")), ("random_erasing", 1.1), ("label_smoothing", 1.0)]
)
def test_settings_that_cannot_be_are_named(name, value):
    with pytest.raises(UsageError, match=rf"images\.{name} is "):
        ImageConfig(**{name: value})


def test_the_loss_is_cross_entropy_with_soft_targets():
    args = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = make_encoder(EncoderConfig(name="vit_tiny_patch16_224", args=args), 16)
    head = nn.Linear(16, CLASSES)
    tuner = make_tuner(encoder, parse("full"), TunerConfig())
    made = regulariser(ImageConfig(mixup=0.8, label_smoothing=0.1), CLASSES)
    method = Classifier(tuner, head, made)
    views = Views(crops=batch()[None], labels=LABELS)
    torch.manual_seed(5)
    output = method(views, Progress(step=0, total_steps=1, steps_per_epoch=1))
    torch.manual_seed(5)
    images, targets = made(views.crops[0], LABELS)
    logits = head(encoder(images))
    expected = -(targets * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    torch.testing.assert_close(output.loss, expected)
    larger = LABELS if targets[0, 0] > targets[0, 3] else LABELS.flip(0)
    assert output.logs["train_accuracy"] == (logits.argmax(1) == larger).float().mean()
