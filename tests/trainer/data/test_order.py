"""The order of an epoch: a permutation by the seed alone, cut into the same batches for any ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from trainer.data.order import Cursor, EpochOrder, batches, micro_batch, micro_batch_size, start_of

_WORD = 2**64 - 1


def _mix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _reference(seed, epoch, num_items, place):
    """The item at a place, in Python's own integers: 24 rounds of a Feistel network, again while it is none."""
    golden, words = 0x9E3779B97F4A7C15, []
    for number in range(24):
        state = 0
        for name in (seed, epoch, number):
            word = _mix((name + golden) & _WORD)
            state = _mix(((state ^ word) * golden + golden) & _WORD)
        words.append(lambda n, state=state: _mix((state + (n + 1) * golden) & _WORD))
    height = next(side for side in range(1, num_items + 1) if side * side >= num_items)
    width = next(side for side in range(2, num_items + 2, 2) if side * height >= num_items)
    while True:
        row, column = divmod(place, width)
        for number in range(0, 24, 2):
            column = (column + words[number](row)) % width
            row = (row + words[number + 1](column)) % height
        place = row * width + column
        if place < num_items:
            return place


@pytest.mark.parametrize(
    ("seed", "epoch", "num_items"), [(0, 0, 1), (0, 0, 2), (0, 0, 3), (7, 3, 107), (2**40, 5, 10**7)]
)
def test_the_order_is_that_of_a_reference_in_plain_python(seed, epoch, num_items):
    places = np.unique(np.linspace(0, num_items - 1, 300, dtype=np.int64))
    expected = [_reference(seed, epoch, num_items, place) for place in places.tolist()]
    assert EpochOrder(seed, epoch, num_items).items(places).tolist() == expected


def whole(seed, epoch, num_items):
    return EpochOrder(seed, epoch, num_items).items(np.arange(num_items))


@settings(deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 10_000), st.integers(1, 3000))
def test_every_item_comes_once(seed, epoch, num_items):
    order = whole(seed, epoch, num_items)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_items))


@settings(deadline=None)
@given(st.integers(1, 5000), st.data())
def test_any_part_is_that_of_the_whole(num_items, data):
    order = EpochOrder(4, 2, num_items)
    start = data.draw(st.integers(0, len(order) - 1))
    stop = data.draw(st.integers(start, len(order)))
    assert np.array_equal(order.items(np.arange(start, stop)), order.items(np.arange(len(order)))[start:stop])


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [whole(seed, epoch, 1000) for seed in range(5) for epoch in range(5)]
    same = [np.mean(one == other) for number, one in enumerate(orders) for other in orders[:number]]
    assert max(same) < 0.02  # by chance one item in a thousand keeps its place


def assert_uniform(counts):
    """Chi-square within four standard deviations of what it is by chance, in cells that are equally likely."""
    expected = counts.mean()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - counts.size) < 4 * (2 * counts.size) ** 0.5


def test_all_orders_of_five_items_come_equally_often():
    orders = np.array([whole(1, epoch, 5) for epoch in range(3600)])
    assert_uniform(np.unique(orders @ 5 ** np.arange(5), return_counts=True)[1])
    assert len(np.unique(orders, axis=0)) == 120


def _cells(one, other, num_items, by):
    """How often each pair of classes occurs, [32, 32]: classes of neighbouring items, or of equal remainder."""
    one, other = ((items * 32 // num_items if by == "range" else items % 32) for items in (one, other))
    return np.bincount(one * 32 + other, minlength=1024)


@pytest.mark.parametrize("by", ["range", "remainder"])
@pytest.mark.parametrize("num_items", [2**16, 2**16 + 2**7])
def test_places_neighbours_and_epochs_say_nothing_of_an_item(num_items, by):
    order, following = whole(5, 0, num_items), whole(5, 1, num_items)
    assert_uniform(_cells(np.arange(num_items), order, num_items, by))
    for distance in (1, 2, 64, 256, 257):
        assert_uniform(_cells(order[:-distance], order[distance:], num_items, by))
    assert_uniform(_cells(order, following, num_items, by))
    assert_uniform(_cells(np.argsort(order), np.argsort(following), num_items, by))


def test_batches_are_as_mixed_as_by_chance():
    shares = whole(2, 0, 2**18).reshape(-1, 64) // 2**12  # of 64 equal ones, each batch's items
    pairs = np.array([np.square(np.bincount(batch, minlength=64)).sum() for batch in shares])
    by_chance = 64 + 64 * 63 * (2**12 - 1) / (2**18 - 1)
    assert abs(pairs.mean() - by_chance) < 4 * pairs.std() / len(pairs) ** 0.5


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 50))
def test_ranks_and_micro_batches_together_see_the_global_batches(size, world_size, accumulation, steps, extra):
    batch_size = size * world_size * accumulation
    order = EpochOrder(3, 1, batch_size * steps + extra)
    expected = whole(3, 1, len(order))
    for step in range(batches(len(order), batch_size)):
        seen = [
            micro_batch(order, step, batch_size, rank, world_size, micro, accumulation)
            for micro in range(accumulation)
            for rank in range(world_size)
        ]
        assert {len(items) for items in seen} == {size}
        assert np.array_equal(np.concatenate(seen), expected[step * batch_size : (step + 1) * batch_size])


def test_the_last_partial_batch_is_dropped():
    assert [batches(items, 4) for items in (4, 7, 8)] == [1, 1, 2]


def test_fewer_items_than_a_batch_names_both_numbers():
    with pytest.raises(UsageError, match=r"batch of 64 .* 10 usable"):
        batches(10, 64)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation", "nearest"),
    [(10, 4, 1, "8 or 12"), (3, 2, 2, "is 4"), (100, 3, 2, "96 or 102"), (0, 1, 1, "is 1")],
)
def test_a_batch_that_cannot_be_cut_names_the_nearest(batch_size, world_size, accumulation, nearest):
    with pytest.raises(UsageError, match=nearest):
        micro_batch_size(batch_size, world_size, accumulation)


def test_a_cursor_is_a_place_between_batches():
    assert start_of(Cursor(), 10, 4) == (0, 0)
    assert start_of(Cursor(2, 4), 10, 4) == (2, 1)
    assert start_of(Cursor(2, 8), 10, 4) == (3, 0)
    assert start_of(Cursor(2, 4), 10, 2) == (2, 2)  # another batch size that fits
    with pytest.raises(UsageError, match="4 samples into epoch 2"):
        start_of(Cursor(2, 4), 10, 3)
