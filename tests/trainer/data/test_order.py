"""The order of an epoch: a permutation by the seed alone, cut into the same batches for any ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from trainer.data.order import Cursor, batches, epoch_order, micro_batch, micro_batch_size, start_of

_WORD = 2**64 - 1


def _mix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def _reference(seed, epoch, num_items):
    """The documented order, in Python's own integers: items sorted by the high bits of SplitMix64 words."""
    golden, keyed = 0x9E3779B97F4A7C15, []
    for item in range(num_items):
        state = 0
        for name in (seed, epoch, item // 65536):
            word = _mix((name + golden) & _WORD)
            state = _mix(((state ^ word) * golden + golden) & _WORD)
        bits = max(1, (num_items - 1).bit_length())
        keyed.append((_mix((state + (item % 65536 + 1) * golden) & _WORD) >> bits, item))
    return [item for _, item in sorted(keyed)]


@pytest.mark.parametrize(("seed", "epoch", "num_items"), [(0, 0, 1), (0, 0, 2), (7, 3, 100), (2**40, 5, 70_000)])
def test_the_order_is_that_of_a_reference_in_plain_python(seed, epoch, num_items):
    assert epoch_order(seed, epoch, num_items).tolist() == _reference(seed, epoch, num_items)


@given(st.integers(0, 2**62), st.integers(0, 10_000), st.integers(1, 3000))
def test_every_item_comes_once(seed, epoch, num_items):
    order = epoch_order(seed, epoch, num_items)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_items))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_order(seed, epoch, 1000) for seed in range(5) for epoch in range(5)]
    same = [np.mean(one == other) for number, one in enumerate(orders) for other in orders[:number]]
    assert max(same) < 0.02  # by chance one item in a thousand keeps its place


def test_any_item_comes_at_any_place_equally_often():
    counts = np.zeros((6, 6))
    for epoch in range(6000):
        counts[np.arange(6), epoch_order(1, epoch, 6)] += 1
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 52.6  # 25 degrees of freedom: passed with probability 0.999


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 50))
def test_ranks_and_micro_batches_together_see_the_global_batches(size, world_size, accumulation, steps, extra):
    batch_size = size * world_size * accumulation
    order = epoch_order(3, 1, batch_size * steps + extra)
    for step in range(batches(len(order), batch_size)):
        seen = [
            micro_batch(order, step, batch_size, rank, world_size, micro, accumulation)
            for micro in range(accumulation)
            for rank in range(world_size)
        ]
        assert {len(items) for items in seen} == {size}
        assert np.array_equal(np.concatenate(seen), order[step * batch_size : (step + 1) * batch_size])


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
