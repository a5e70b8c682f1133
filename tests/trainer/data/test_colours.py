"""The drawn parameters have the distributions that torchvision's transforms have."""

from dataclasses import fields

import numpy as np
import pytest
from scipy import stats

from trainer.data import hashing
from trainer.data.augmentations import AUGMENTATIONS, PLAIN, Augmentation
from trainer.data.colours import DRAWS, OFF, Colours, draw

COUNT = 6000
VIEW = Augmentation(
    jitter=0.8, brightness=0.4, contrast=0.8, saturation=0.2, hue=0.1, grayscale=0.2, blur=0.5, solarize=0.1
)


def uniforms(count: int = COUNT, seed: int = 3) -> np.ndarray:
    return hashing.uniforms(seed, np.arange(count), count=DRAWS)


@pytest.fixture(scope="module")
def drawn() -> Colours:
    return draw(uniforms(), VIEW, 224)


def test_factors_are_uniform(drawn: Colours):
    for name, low, high in [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.2, 1.8),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ]:
        assert stats.kstest(getattr(drawn, name), stats.uniform(low, high - low).cdf).pvalue > 0.001, name


def test_strengths_above_one_stop_at_zero():
    assert draw(uniforms(), Augmentation(brightness=1.5), 8).brightness.min() >= 0


def test_orders_are_uniform_over_all_24(drawn: Colours):
    assert (np.sort(drawn.order, -1) == np.arange(4)).all()
    _, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 0.001


def test_probabilities(drawn: Colours):
    for happened, probability in [
        (drawn.jitter, 0.8),
        (drawn.gray, 0.2),
        (drawn.sigma > 0, 0.5),
        (drawn.threshold == 128, 0.1),
    ]:
        assert stats.binomtest(int(happened.sum()), COUNT, probability).pvalue > 0.001
    assert set(drawn.threshold.tolist()) == {128, OFF}


def test_sigma_is_uniform_where_blurred(drawn: Colours):
    sigma = drawn.sigma[drawn.sigma > 0]
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 0.001


def test_decisions_are_independent(drawn: Colours):
    table = np.stack([drawn.jitter, drawn.gray, drawn.sigma, drawn.threshold, drawn.brightness, drawn.hue])
    correlation = np.corrcoef(table.astype(float)) - np.eye(len(table))
    assert np.abs(correlation).max() < 0.05


@pytest.mark.parametrize(("size", "side"), [(224, 23), (96, 9), (64, 7), (32, 3), (8, 1), (1, 1)])
def test_kernel_is_a_tenth_and_odd(size: int, side: int):
    assert (draw(uniforms(2), VIEW, size).kernel == side).all()


def test_kernel_of_the_diffmix_reference():
    view = AUGMENTATIONS["diffmix"].views[0]
    assert draw(uniforms(1), view, 224).kernel.tolist() == [[5, 9]]
    assert draw(uniforms(1), view, 3).kernel.tolist() == [[5, 5]]  # what can still be reflected


def test_plain_changes_nothing():
    drawn = draw(uniforms(100), PLAIN, 32)
    assert not drawn.jitter.any()
    assert not drawn.gray.any()
    assert not drawn.sigma.any()
    assert (drawn.threshold == OFF).all()


def same(a: Colours, b: Colours) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Colours))


def test_joining_and_taking_apart():
    a, b = draw(uniforms(6), VIEW, 32), draw(uniforms(6, seed=4), PLAIN, 32)
    joined = Colours.concatenate([a, b])
    assert joined.shape == (12,)
    assert same(joined[:6], a)
    assert same(joined[6:], b)
    assert len(a[2:5]) == 3


def test_where_chooses_whole_images():
    a, b = draw(uniforms(6), VIEW, 32), draw(uniforms(6, seed=4), PLAIN, 32)
    mask = np.array([True, False, True, True, False, False])
    chosen = Colours.where(mask, a, b)
    assert same(chosen[mask], a[mask])
    assert same(chosen[~mask], b[~mask])
    assert all(getattr(chosen, field.name).dtype == getattr(a, field.name).dtype for field in fields(Colours))


def test_leading_dimensions():
    u = uniforms(12)
    rows = draw(u.reshape(3, 4, -1), VIEW, 32)
    assert rows.shape == (3, 4)
    assert same(Colours.concatenate([rows[0], rows[1], rows[2]]), draw(u, VIEW, 32))
