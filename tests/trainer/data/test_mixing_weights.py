"""Weights: how often rows and generated images come, and what is said of columns that cannot weigh."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import UsageError
from tests.trainer.data.builders import open_pairs
from trainer.data import mixing
from trainer.data.image_set import Subset
from trainer.data.mixing import POLICIES, MixConfig
from trainer.data.mixing.sampling import Sampler, choose
from trainer.data.mixing.weights import WEIGHTS, weights_of

ROWS, K = 8, 3

weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Similarity (n + index) / 100: 0 of one image only."""
    return open_pairs(tmp_path_factory.mktemp("pairs") / "set", ROWS, variations=K, uneven=True)


SIMILARITY = (np.arange(ROWS)[:, None] + np.arange(K)) / 100


def shown(policy, epochs, views=1):
    """Times that each (row, image) was the last view in so many epochs, [ROWS, 1 + K]."""
    times = np.zeros((ROWS, 1 + K))
    items = np.arange(policy.num_items)
    for epoch in range(epochs):
        found = policy.assign(items, epoch, 0, views, 0)
        np.add.at(times, (found.rows, found.images[-1] + 1), 1)
    return times


@given(weights=st.lists(weight, min_size=1, max_size=50).filter(any), epoch=st.integers(0, 9), seed=st.integers(0, 9))
def test_a_place_comes_as_often_as_its_weight_says_but_for_less_than_one(weights, epoch, seed):
    weights = np.array(weights)
    places = Sampler(weights).places(np.arange(len(weights)), epoch, seed)
    times = np.bincount(places, minlength=len(weights))
    assert len(times) == len(weights)
    assert np.abs(times - weights / weights.sum() * len(weights)).max() < 1 + 1e-6
    assert not times[weights == 0].any()
    assert (np.diff(places) >= 0).all()


def test_a_place_comes_as_often_as_its_weight_says_on_average():
    weights = np.array([0.0, 0.3, 1, 2, 0.7, 4, 0.001])
    sampler, items = Sampler(weights), np.arange(7)
    times = sum(np.bincount(sampler.places(items, epoch, 3), minlength=7) for epoch in range(5000)) / 5000
    assert np.abs(times - weights / weights.sum() * 7).max() < 4 * 0.5 / np.sqrt(
        5000
    )  # of 0 or 1 more, at most 0.5 an epoch


@pytest.mark.parametrize("value", [0.1, 1.0, 3e-9, 7e8])
def test_places_of_equal_weight_come_once_in_their_order(value):
    sampler = Sampler(np.full(100_003, value))
    for epoch in range(5):
        assert np.array_equal(sampler.places(np.arange(100_003), epoch, 0), np.arange(100_003))


def test_a_place_of_double_weight_comes_twice():
    times = np.bincount(Sampler(np.array([1.0, 1, 2, 1, 1, 0])).places(np.arange(6), 4, 2))
    assert times.tolist() == [1, 1, 2, 1, 1]


@given(weights=st.lists(weight, min_size=1, max_size=6).filter(any), draw=st.floats(0, 1, exclude_max=True))
def test_one_of_several_is_drawn_in_proportion(weights, draw):
    chosen = int(choose(np.array([weights]), np.array([[draw]]))[0, 0])
    assert weights[chosen] > 0
    total = sum(weights)
    assert sum(weights[:chosen]) <= draw * total * (1 + 1e-12)
    assert sum(weights[: chosen + 1]) * (1 + 1e-12) > draw * total


def test_pairs_come_in_proportion_to_their_weight(rows):
    for power in (1.0, 2.0):
        policy = mixing.make(MixConfig(weight="similarity", weight_power=power), rows)
        times = shown(policy, 1500, views=2)
        expected = SIMILARITY**power / (SIMILARITY**power).sum() * ROWS
        assert not times[:, 0].any()
        assert np.abs(times[:, 1:] / 1500 - expected).max() < 0.06  # 4 standard deviations
        assert times[0, 1] == 0


def test_real_images_are_weighed_by_their_variations(rows):
    times = shown(mixing.make(MixConfig(policy="real", weight="similarity"), rows), 400)
    assert np.abs(times[:, 0] / 400 - SIMILARITY.mean(1) / SIMILARITY.mean()).max() < 0.1


def test_a_fixed_variation_is_weighed_by_its_own_value(rows):
    times = shown(mixing.make(MixConfig(weight="similarity", variation=0), rows), 400, views=2)
    assert np.abs(times[:, 1] / 400 - SIMILARITY[:, 0] / SIMILARITY[:, 0].mean()).max() < 0.1
    assert times[0].sum() == 0 and not times[:, 2:].any()


def test_sequential_weighs_both_sides(rows):
    policy = mixing.make(MixConfig(policy="sequential", first_epochs=200, weight="similarity"), rows)
    times = shown(policy, 400)
    assert times[:, 0].sum() == times[:, 1:].sum() == 200 * ROWS
    for side in (times[:, 0], times[:, 1:].sum(1)):
        assert np.abs(side / 200 - SIMILARITY.mean(1) / SIMILARITY.mean()).max() < 0.14


@pytest.mark.parametrize(("policy", "copies"), [("union", 1), ("inflate", 4)])
def test_generated_images_are_weighed_among_themselves(rows, policy, copies):
    made = mixing.make(MixConfig(policy=policy, replicas=4, weight="similarity"), rows)
    assert (shown(made, 1)[:, 0] == copies).all()
    times = shown(made, 400)
    assert (times[:, 0] == 400 * copies).all()
    assert np.abs(times[:, 1:] / 400 - SIMILARITY / SIMILARITY.mean()).max() < 0.1
    assert times[0, 1] == 0


def test_generated_images_of_another_set_are_weighed_by_that_set(rows, tmp_path):
    generated = open_pairs(tmp_path / "set", 5, variations=1, real=False, similarity=lambda number, _: number)
    made = mixing.make(MixConfig(policy="inflate", generated=generated.url, weight="similarity"), rows)
    found = made.assign(np.arange(made.num_items), 0, 0, 2, 0)
    assert np.array_equal(np.bincount(found.rows[found.set == 0]), np.ones(ROWS))
    times = np.bincount(found.rows[found.set == 1], minlength=5)
    assert times[0] == 0 and np.abs(times - np.arange(5) / 2).max() < 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_column_of_numbers_weighs_every_policy(rows, policy, name):
    made = mixing.make(MixConfig(policy=policy, weight=name, first_epochs=1), rows)
    values = weights_of(name, 1.0, rows)
    assert values.shape in ((ROWS,), (ROWS, K)) and values.max() == 1
    found = made.assign(np.arange(made.num_items), 0, 0, 2, 0)
    shown_values = values[found.rows, found.images[1]] if values.ndim == 2 else values[found.rows]
    assert (shown_values[found.images[1] >= 0] > 0).all()


def test_weights_are_powers_of_the_column_relative_to_its_largest_value(rows):
    found = weights_of("similarity", 3.0, rows)
    np.testing.assert_allclose(found, (SIMILARITY / SIMILARITY.max()) ** 3, rtol=1e-5)
    assert (weights_of("real.width", 1.0, rows) * 14).tolist() == pytest.approx([12 + n % 3 for n in range(ROWS)])


def test_other_rows_of_a_set_have_other_weights(tmp_path):
    rows = open_pairs(tmp_path / "set", 12, similarity=lambda number, _: number - 3.0)
    with pytest.raises(UsageError, match=r"3 of 12 rows have a value below 0, down to -3.*--filter 'similarity >= 0'"):
        mixing.make(MixConfig(weight="similarity"), rows)
    chosen = type(rows).open(rows.url, ["similarity >= 0"])
    found = mixing.make(MixConfig(weight="similarity"), chosen).locate(np.arange(9), 0, 0)[0]
    assert np.abs(np.bincount(found, minlength=9) - np.arange(9) / 4).max() < 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"recorded": False}, "similarity reads .*set, where 6 of 6 rows have no value"),
        ({"similarity": lambda number, _: float("nan") if number == 2 else 0.5}, "1 of 6 rows have no value"),
        ({"similarity": lambda number, _: float("inf") if number == 2 else 0.5}, "1 of 6 rows have no finite value"),
        ({"similarity": lambda *_: 0.0}, "all values are 0"),
        ({"variations": 2, "similarity": lambda _, index: index - 1.0}, "6 of 6 rows have a value below 0, down to -1"),
        ({"variations": 0}, "which has no synthetic images"),
    ],
)
def test_columns_that_cannot_weigh(tmp_path, how, message):
    with pytest.raises(UsageError, match=message):
        mixing.make(MixConfig(policy="real", weight="similarity"), open_pairs(tmp_path / "set", 6, **how))


def test_values_of_other_variations_than_the_fixed_one_do_not_matter(tmp_path):
    rows = open_pairs(tmp_path / "set", 6, variations=3, similarity=lambda number, index: (-1.0, number, 0.0)[index])
    locate = mixing.make(MixConfig(weight="similarity", variation=1), rows).locate
    assert np.abs(np.bincount(locate(np.arange(6), 0, 0)[0], minlength=6) - np.arange(6) / 2.5).max() < 1
    for variation, message in ((0, "below 0"), (2, "all values are 0")):
        with pytest.raises(UsageError, match=message):
            mixing.make(MixConfig(weight="similarity", variation=variation), rows)


def test_rows_without_the_value_are_counted(tmp_path):
    rows = open_pairs(tmp_path / "set", 6, similarity=lambda number, index: None if number < 2 else 0.5)
    with pytest.raises(UsageError, match=r"similarity reads .* where 2 of 6 rows have no value"):
        mixing.make(MixConfig(weight="similarity"), rows)


@pytest.mark.parametrize("name", ["label", "shard", "key"])
def test_names_are_no_weights(name):
    with pytest.raises(UsageError, match=f"unknown mix.weight '{name}'"):
        MixConfig(weight=name)


def test_columns_of_images_that_the_set_lacks(tmp_path):
    with pytest.raises(UsageError, match="which has no real images"):
        config = MixConfig(policy="synthetic", weight="real.width")
        mixing.make(config, open_pairs(tmp_path / "synthetic", 6, real=False))


def test_only_pair_sets_have_columns(rows):
    with pytest.raises(UsageError, match="no pair set"):
        mixing.make(MixConfig(weight="similarity"), Subset(rows, np.arange(3)))
