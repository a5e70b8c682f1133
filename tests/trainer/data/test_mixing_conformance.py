"""What holds for every mixing policy, with and without weights, whatever views a method takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.builders import open_pairs, write_pairs
from trainer.data import mixing
from trainer.data.mixing import POLICIES, MixConfig
from trainer.data.rows import REAL

ROWS, K, REPLICAS, GENERATED = 23, 3, 2, 7
FIRST_EPOCHS = 2
VIEWS = [(1, 0), (2, 0), (2, 8)]  # global and local crops: of MAE, of SimCLR, of DINO
ITEMS = {"union": ROWS * (1 + K), "inflate": REPLICAS * ROWS + ROWS * K, "inflate+set": REPLICAS * ROWS + GENERATED * 2}

every_policy = pytest.mark.parametrize("name", [*POLICIES, "inflate+set"])
every_method = pytest.mark.parametrize("views", VIEWS, ids=lambda views: "{}+{}".format(*views))
every_weight = pytest.mark.parametrize("weight", [None, "similarity", "real.width"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A pair set, and where one of only generated images lies."""
    folder = tmp_path_factory.mktemp("sets")
    generated = write_pairs(folder / "generated", GENERATED, variations=2, real=False, labelled=False)
    return open_pairs(folder / "pairs", ROWS, variations=K, uneven=True), generated


def made(sets, name, weight=None):
    policy, _, other = name.partition("+")
    rows, generated = sets
    if other and weight == "real.width":
        pytest.skip("the generated images have no real ones beside them")
    config = MixConfig(
        policy=policy,
        synthetic_view="random",
        probability=0.7,
        same_variation=False,
        replicas=REPLICAS,
        first_epochs=FIRST_EPOCHS,
        generated=generated if other else None,
        weight=weight,
    )
    return mixing.make(config, rows)


@every_policy
@every_weight
def test_the_number_of_items(sets, name, weight):
    assert made(sets, name, weight).num_items == ITEMS.get(name, ROWS)


@every_policy
@every_method
@every_weight
def test_what_is_assigned_is_there(sets, name, views, weight):
    policy = made(sets, name, weight)
    policy.check_views(*views)
    items = np.arange(policy.num_items)
    for epoch in range(FIRST_EPOCHS + 2):
        found = policy.assign(items, epoch, 3, *views)
        assert found.rows.shape == found.set.shape == items.shape
        assert found.images.shape == found.plain.shape == (sum(views), len(items))
        assert (found.images.dtype, found.plain.dtype) == (np.int16, np.bool_)
        for number, of_set in enumerate(policy.sets):
            rows, images = found.rows[found.set == number], found.images[:, found.set == number]
            assert rows.min() >= 0 and rows.max() < len(of_set)
            assert images.min() >= (REAL if of_set.has_real else 0) and images.max() < of_set.num_variations


@every_policy
@every_method
@every_weight
@settings(max_examples=8, deadline=None)
@given(data=st.data(), epoch=st.integers(0, 5), seed=st.integers(0, 2**31 - 1))
def test_what_an_item_shows_depends_on_seed_epoch_and_item_alone(sets, name, views, weight, data, epoch, seed):
    policy, again = made(sets, name, weight), made(sets, name, weight)
    items = np.arange(policy.num_items)
    whole = policy.assign(items, epoch, seed, *views)
    some = np.array(data.draw(st.lists(st.integers(0, policy.num_items - 1), min_size=1, max_size=9)))
    again.assign(items[:3], epoch + 1, seed, *views)  # who drew what before leaves no trace
    for one, other in zip(again.assign(some, epoch, seed, *views), whole.of(some), strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(policy.locate(some, epoch, seed), whole.of(some)[:2], strict=True):
        assert np.array_equal(one, other)


@every_policy
def test_an_epoch_without_weights_shows_each_row_as_often_as_any_other(sets, name):
    policy = made(sets, name)
    rows, where = policy.locate(np.arange(policy.num_items), 1, 0)
    for number in range(len(policy.sets)):
        assert len(set(np.bincount(rows[where == number]))) == 1


@every_policy
def test_equal_weights_are_none(sets, name):
    rows, generated = sets
    policy = made(sets, name)
    equal = mixing.make(
        MixConfig(
            **{field: getattr(policy.config, field) for field in policy.config.__slots__}
            | {"weight": "similarity", "weight_power": 0.0}
        ),
        rows,
    )
    items = np.arange(policy.num_items)
    for one, other in zip(policy.assign(items, 1, 5, 2, 8), equal.assign(items, 1, 5, 2, 8), strict=True):
        assert np.array_equal(one, other)
