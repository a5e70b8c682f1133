"""Mixing policies: which image feeds which view, for every policy, and what chance does."""

from __future__ import annotations

import numpy as np
import pytest

from manifests.errors import UsageError
from tests.trainer.data.builders import open_pairs
from trainer.data import mixing
from trainer.data.mixing import POLICIES, MixConfig

ROWS, K = 40, 3


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("pairs") / "set", ROWS, variations=K)


@pytest.fixture(scope="module")
def real_only(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("real") / "set", 8, variations=0)


@pytest.fixture(scope="module")
def synthetic_only(tmp_path_factory):
    return open_pairs(tmp_path_factory.mktemp("synthetic") / "set", 5, variations=2, real=False)


def assigned(rows, items=None, *, crops=2, local=0, epoch=0, seed=0, **config):
    policy = mixing.make(MixConfig(**config), rows)
    items = np.arange(policy.num_items) if items is None else np.asarray(items)
    return policy.assign(items, epoch, seed, crops, local)


def many(items=20_000):
    """Item numbers beyond the set's: what is drawn for them does not ask whether they exist."""
    return np.arange(items)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_assignment_has_a_row_and_images_for_every_item(rows, policy):
    made = mixing.make(MixConfig(policy=policy, first_epochs=2), rows)
    found = made.assign(np.arange(made.num_items), 3, 1, 2, 6)
    assert found.rows.shape == found.set.shape == (made.num_items,)
    assert found.images.shape == found.plain.shape == (8, made.num_items)
    assert found.images.dtype == np.int16
    assert found.images.min() >= -1 and found.images.max() < K
    assert not found.plain.any()
    for mine, again in zip(made.locate(np.arange(made.num_items), 3, 1), found[:2], strict=True):
        assert np.array_equal(mine, again)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_item_shows_the_same_in_any_company(rows, policy):
    made = mixing.make(MixConfig(policy=policy, synthetic_view="random", probability=0.5, first_epochs=2), rows)
    items = np.arange(made.num_items)
    together = made.assign(items, 2, 9, 2, 6)
    backwards = made.assign(items[::-1], 2, 9, 2, 6)
    alone = [made.assign(items[n : n + 1], 2, 9, 2, 6) for n in range(0, len(items), 7)]
    assert np.array_equal(together.images, backwards.images[:, ::-1])
    assert np.array_equal(together.images[:, ::7], np.concatenate([one.images for one in alone], 1))


BEFORE_WEIGHTS = [  # what items 0, 7, 19, 33, 38 and the last one of epoch 3, seed 1 show: rows, then images of 4 views
    ({"policy": "synthetic"}, [0, 7, 19, 33, 38, 39], [[0, 2, 1, 2, 0, 1]] * 4),
    ({"policy": "diffmix"}, [0, 7, 19, 33, 38, 39], [[-1] * 6, *[[1, 2, 1, 1, 1, 2]] * 3]),
    (
        {"synthetic_view": "random", "probability": 0.5, "same_variation": False},
        [0, 7, 19, 33, 38, 39],
        [[1, -1, 1, -1, 1, -1], [-1, -1, -1, -1, -1, 0], [0, -1, 0, -1, 2, 2], [1, -1, 2, -1, 1, 0]],
    ),
    ({"policy": "union"}, [0, 1, 4, 8, 9, 39], [[-1, 2, 2, 0, 1, 2]] * 4),
    ({"policy": "inflate", "replicas": 2}, [0, 7, 19, 33, 38, 39], [[-1, -1, -1, -1, -1, 2]] * 4),
]


@pytest.mark.parametrize(("config", "of_rows", "images"), BEFORE_WEIGHTS)
def test_without_weights_items_show_what_they_ever_did(rows, config, of_rows, images):
    """The values are those that the code gave before there were weights: the same run shows the same images."""
    last = mixing.make(MixConfig(**config), rows).num_items - 1
    found = assigned(rows, [0, 7, 19, 33, 38, last], local=2, epoch=3, seed=1, **config)
    assert found.rows.tolist() == of_rows
    assert found.images.tolist() == images


def test_real_shows_each_real_image_once(rows):
    found = assigned(rows, policy="real", local=2)
    assert np.array_equal(found.rows, np.arange(ROWS))
    assert (found.images == -1).all()


def test_synthetic_shows_one_variation_in_all_views(rows):
    found = assigned(rows, many(), policy="synthetic", crops=3)
    assert (found.images == found.images[0]).all()
    assert np.bincount(found.images[0], minlength=K).min() > 20_000 / K * 0.96


def test_diffmix_replaces_the_second_of_two_views(rows):
    found = assigned(rows)
    assert (found.images[0] == -1).all() and (found.images[1] >= 0).all()
    first = assigned(rows, synthetic_view="first")
    assert (first.images[0] >= 0).all() and (first.images[1] == -1).all()


def test_diffmix_of_dino_is_one_of_two_global_and_two_of_eight_local_crops(rows):
    found = assigned(rows, local=8)
    synthetic = (found.images >= 0).all(1)
    assert np.array_equal(synthetic, (found.images >= 0).any(1))
    assert synthetic.tolist() == [False, True, *[False] * 6, True, True]
    assert (found.images[1] == found.images[8]).all() and (found.images[1] == found.images[9]).all()


def test_local_crops_fewer_than_the_synthetic_ones_are_all_synthetic(rows):
    assert (assigned(rows, local=1).images[2] >= 0).all()


def test_random_views_are_each_as_likely_and_always_as_many(rows):
    synthetic = assigned(rows, many(), synthetic_view="random", local=8).images >= 0
    assert (synthetic[:2].sum(0) == 1).all() and (synthetic[2:].sum(0) == 2).all()
    assert np.abs(synthetic[:2].mean(1) - 0.5).max() < 0.015  # 4 standard deviations
    assert np.abs(synthetic[2:].mean(1) - 0.25).max() < 0.0125


@pytest.mark.parametrize("crops", [1, 2])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probability_is_that_of_an_image_to_have_synthetic_views(rows, crops, probability):
    found = assigned(rows, many(), probability=probability, crops=crops, local=4)
    mixed = (found.images >= 0).any(0)
    assert abs(mixed.mean() - probability) < 0.013
    assert np.array_equal((found.images[crops - 1] >= 0), mixed)  # global and local crops together
    assert np.array_equal((found.images[-1] >= 0), mixed)


def test_replacement_and_variation_are_drawn_anew_each_epoch_and_seed(rows):
    one, two, other = (
        assigned(rows, many(), probability=0.5, epoch=epoch, seed=seed).images[1]
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    )
    for again in (two, other):
        assert abs(np.mean((one >= 0) == (again >= 0)) - 0.5) < 0.015
        both = (one >= 0) & (again >= 0)
        assert abs(np.mean(one[both] == again[both]) - 1 / K) < 0.03
    counts = np.bincount(one[one >= 0], minlength=K)
    assert np.abs(counts / counts.sum() - 1 / K).max() < 0.02


def test_a_variation_may_be_fixed(rows):
    assert (assigned(rows, variation=2).images[1] == 2).all()
    with pytest.raises(UsageError, match=r"mix.variation is 3, but .* has 3 variations an image: 0 to 2"):
        assigned(rows, variation=3)


def test_synthetic_views_may_show_variations_of_their_own(rows):
    found = assigned(rows, many(), local=4, same_variation=False).images
    assert abs(np.mean(found[1] == found[-1]) - 1 / K) < 0.015
    assert abs(np.mean(found[-2] == found[-1]) - 1 / K) < 0.015


def test_synthetic_views_may_go_without_augmentation(rows):
    found = assigned(rows, local=8, augment_synthetic=False, probability=0.5)
    assert np.array_equal(found.plain, found.images >= 0)
    assert found.plain.any()


def test_more_synthetic_crops_than_crops_are_refused(rows):
    policy = mixing.make(MixConfig(synthetic_crops=3), rows)
    with pytest.raises(UsageError, match=r"mix.synthetic_crops is 3, but the method takes 2"):
        policy.check_views(2, 0)


def test_union_has_every_image_once(rows):
    found = assigned(rows, policy="union", local=1)
    assert (found.images == found.images[0]).all()
    pairs = set(zip(found.rows.tolist(), found.images[0].tolist(), strict=True))
    assert pairs == {(row, image) for row in range(ROWS) for image in (-1, 0, 1, 2)}
    assert len(found.rows) == ROWS * (1 + K)


@pytest.mark.parametrize("first", ["synthetic", "real"])
def test_sequential_shows_one_side_first_and_the_other_ever_after(rows, first):
    for epoch in range(5):
        found = assigned(rows, policy="sequential", first=first, first_epochs=2, epoch=epoch, local=2)
        assert np.array_equal(found.rows, np.arange(ROWS))
        side = first if epoch < 2 else {"synthetic": "real", "real": "synthetic"}[first]
        expected = assigned(rows, policy=side, epoch=epoch, local=2)
        assert np.array_equal(found.images, expected.images)
        assert (found.images >= 0).all() == (side == "synthetic")


def test_sequential_asks_how_long(rows):
    with pytest.raises(UsageError, match=r"needs the number of epochs .* --set mix.first_epochs=N"):
        assigned(rows, policy="sequential")
    policy = mixing.make(MixConfig(policy="sequential", first_epochs=5), rows)
    policy.check_epochs(5.5)
    with pytest.raises(UsageError, match=r"first_epochs is 5 and the run has 5 epochs, .* synthetic images only"):
        policy.check_epochs(5)
    mixing.make(MixConfig(first_epochs=5), rows).check_epochs(1)  # of no other policy


def test_inflate_has_copies_of_the_real_images_and_every_generated_one_once(rows):
    found = assigned(rows, policy="inflate", replicas=10)
    assert (found.images == found.images[0]).all() and (found.set == 0).all()
    real = found.images[0] == -1
    assert np.array_equal(np.bincount(found.rows[real]), np.full(ROWS, 10))
    generated = set(zip(found.rows[~real].tolist(), found.images[0, ~real].tolist(), strict=True))
    assert len(generated) == (~real).sum() == ROWS * K


def test_inflate_takes_generated_images_from_another_set(real_only, synthetic_only):
    found = assigned(real_only, policy="inflate", replicas=2, generated=synthetic_only.url)
    real = found.set == 0
    assert np.array_equal(np.bincount(found.rows[real]), np.full(8, 2))
    assert (found.images[:, real] == -1).all()
    generated = set(zip(found.rows[~real].tolist(), found.images[0, ~real].tolist(), strict=True))
    assert generated == {(row, image) for row in range(5) for image in range(2)}


@pytest.mark.parametrize("policy", ["synthetic", "diffmix", "sequential", "union", "inflate"])
def test_real_sets_say_what_they_can_be_used_for(real_only, policy):
    with pytest.raises(UsageError, match=f"{policy} needs .* no synthetic ones; .* can be real, inflate with"):
        assigned(real_only, policy=policy)


@pytest.mark.parametrize("policy", ["real", "diffmix", "sequential", "union", "inflate"])
def test_synthetic_sets_say_what_they_can_be_used_for(synthetic_only, policy):
    with pytest.raises(UsageError, match=f"{policy} needs .* no real ones; .* can be synthetic$"):
        assigned(synthetic_only, policy=policy)


def test_generated_images_must_be_there(real_only):
    with pytest.raises(UsageError, match="has no synthetic images"):
        assigned(real_only, policy="inflate", generated=real_only.url)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"policy": "difmix"}, "did you mean 'diffmix'"),
        ({"synthetic_view": "last"}, "second, first, random"),
        ({"probability": 1.5}, "between 0 and 1"),
        ({"variation": -1}, "number from 0"),
        ({"variation": "all"}, "number from 0"),
        ({"replicas": 0}, "at least 1"),
        ({"first": "both"}, "unknown mix.first 'both'.*synthetic, real"),
        ({"first_epochs": 0}, "at least 1"),
        ({"weight": "similarty"}, "did you mean 'similarity'"),
        ({"weight": "class_name"}, "Known: similarity, real.width"),
        ({"weight": "flagged"}, "unknown mix.weight"),
        ({"weight_power": -1.0}, "0 or more"),
        ({"weight_power": float("inf")}, "0 or more"),
        ({"synthetic_crops": -1}, "at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        MixConfig(**setting)
