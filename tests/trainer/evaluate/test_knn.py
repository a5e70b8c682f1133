"""Weighted kNN against scikit-learn's classifier with the same weights, and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from trainer.evaluate import knn
from trainer.evaluate.knn import knn_accuracy, knn_predict


def clusters(count, seed, classes=5, dims=16, spread=1.0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, dims))
    return torch.tensor(centres[labels] + spread * draw.normal(size=(count, dims))).float(), torch.tensor(labels)


def reference(bank, bank_labels, queries, k, temperature):
    """Cosine distance is 1 - s, so DINO's weight exp(s / T) is exp((1 - distance) / T)."""
    model = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    return model.fit(bank.double().numpy(), bank_labels.numpy()).predict(queries.double().numpy())


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0), (200, 0.2)])
def test_equals_scikit_learn(k, temperature):
    bank, bank_labels = clusters(300, seed=1)
    queries, query_labels = clusters(150, seed=2)
    wanted = reference(bank, bank_labels, queries, k, temperature)
    assert (knn_predict(bank, bank_labels, queries, k, temperature).numpy() == wanted).all()
    accuracy = knn_accuracy(bank, bank_labels, queries, query_labels, k, temperature)
    assert accuracy == pytest.approx((wanted == query_labels.numpy()).mean())
    assert 0.3 < accuracy < 1  # neither trivial nor hopeless, or the comparison would say little


def test_one_near_neighbour_outweighs_two_far_ones_by_hand():
    angles = torch.tensor([0.1, 0.6, 0.6])
    bank = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([7, -3, -3])
    query = torch.tensor([[5.0, 0.0]])  # its length does not matter
    near, far = math.exp(math.cos(0.1) / 0.07), 2 * math.exp(math.cos(0.6) / 0.07)
    assert near > far
    assert knn_predict(bank, labels, query, k=3, temperature=0.07).item() == 7
    near, far = math.exp(math.cos(0.1) / 1.0), 2 * math.exp(math.cos(0.6) / 1.0)
    assert near < far
    assert knn_predict(bank, labels, query, k=3, temperature=1.0).item() == -3


def test_k_beyond_the_bank_takes_all():
    bank, labels = clusters(12, seed=3)
    queries, _ = clusters(8, seed=4)
    assert torch.equal(knn_predict(bank, labels, queries, k=500), knn_predict(bank, labels, queries, k=12))


def test_chunks_change_nothing(monkeypatch):
    bank, labels = clusters(100, seed=5)
    queries, _ = clusters(37, seed=6)
    whole = knn_predict(bank, labels, queries)
    monkeypatch.setattr(knn, "_CELLS", 700)  # seven queries at once
    assert torch.equal(knn_predict(bank, labels, queries), whole)


def test_a_label_that_the_bank_lacks_counts_as_wrong():
    bank = torch.eye(3)
    assert knn_accuracy(bank, torch.tensor([0, 1, 2]), bank, torch.tensor([0, 1, 9]), k=1) == pytest.approx(2 / 3)


def test_tiny_temperatures_do_not_overflow():
    bank, labels = clusters(50, seed=7)
    queries, _ = clusters(20, seed=8)
    nearest = knn_predict(bank, labels, queries, k=1)
    assert torch.equal(knn_predict(bank, labels, queries, k=10, temperature=1e-4), nearest)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_neither_order_nor_length_of_the_features_matters(seed, length):
    bank, labels = clusters(40, seed=seed)
    queries, _ = clusters(10, seed=seed + 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(knn_predict(bank[order] * length, labels[order], queries), knn_predict(bank, labels, queries))


@pytest.mark.parametrize(
    ("bank", "labels", "queries", "k", "match"),
    [
        (torch.ones(3, 2), torch.ones(2), torch.ones(1, 2), 1, "are needed"),
        (torch.ones(3, 2), torch.ones(3), torch.ones(1, 4), 1, "are needed"),
        (torch.ones(0, 2), torch.ones(0), torch.ones(1, 2), 1, "at least 1"),
        (torch.ones(3, 2), torch.ones(3), torch.ones(1, 2), 0, "at least 1"),
        (torch.full((3, 2), math.nan), torch.ones(3), torch.ones(1, 2), 1, "diverged"),
    ],
)
def test_refuses_what_makes_no_sense(bank, labels, queries, k, match):
    with pytest.raises(ValueError, match=match):
        knn_predict(bank, labels, queries, k)


def test_refuses_labels_of_other_queries():
    with pytest.raises(ValueError, match="2 queries came with 3 labels"):
        knn_accuracy(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(3))
