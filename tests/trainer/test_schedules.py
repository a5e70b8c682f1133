"""Schedules at hand-computed steps, and what holds of all of them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.schedules import cosine, linear_warmup, shortened


def test_cosine_by_hand():
    assert [cosine(step, 4, 1.0, 0.0) for step in range(5)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    )
    assert cosine(1, 3, 0.996, 1.0) == pytest.approx(0.997)


def test_cosine_with_warmup_by_hand():
    values = [cosine(step, 6, 2.0, 1.0, warmup=2, warmup_start=0.5) for step in range(7)]
    half = math.sqrt(0.5) / 2
    assert values == pytest.approx([0.5, 1.25, 2.0, 1.5 + half, 1.5, 1.5 - half, 1.0])


def test_linear_warmup_by_hand():
    assert [linear_warmup(step, 4, 0.04, 0.08) for step in (0, 1, 4, 9)] == pytest.approx([0.04, 0.05, 0.08, 0.08])
    assert linear_warmup(0, 0, 0.04, 0.07) == 0.07


@pytest.mark.parametrize(("asked", "total", "given_"), [(30, 300, 30), (50, 400, 40), (5, 9, 0), (0, 100, 0)])
def test_warmups_take_at_most_a_tenth(asked, total, given_):
    assert shortened(asked, total) == given_


@given(total=st.integers(0, 10**7))
def test_a_tenth_is_rounded_down(total):
    assert shortened(total, total) == total // 10


@pytest.mark.parametrize(("asked", "epochs", "share"), [(40, 300, 40 / 300), (30, 200, 0.15), (40, 300, 0.1334)])
@pytest.mark.parametrize("steps", [1, 97, 312, 1251])
def test_a_larger_share_leaves_the_published_warmups_whole(asked, epochs, share, steps):
    assert shortened(asked * steps, epochs * steps, share) == asked * steps


@given(
    total=st.integers(1, 1000),
    warmup=st.integers(0, 200),
    start=st.floats(0, 10),
    end=st.floats(0, 10),
    step=st.integers(0, 2000),
)
def test_cosine_stays_between_its_ends(total, warmup, start, end, step):
    value = cosine(step, total, start, end, warmup=warmup)
    assert -1e-9 <= value <= max(start, end) + 1e-9
    if step >= max(total, warmup + 1):
        assert value == pytest.approx(end)


@given(total=st.integers(2, 300), start=st.floats(0, 1), end=st.floats(0, 1))
def test_cosine_is_monotone(total, start, end):
    values = [cosine(step, total, start, end) for step in range(total + 1)]
    assert values in (sorted(values), sorted(values, reverse=True)) or max(values) - min(values) < 1e-12
