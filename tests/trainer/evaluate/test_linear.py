"""The linear probe against scikit-learn's LogisticRegression, on features that are hard and easy."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from trainer.evaluate import linear
from trainer.evaluate.linear import fit, linear_accuracy, predict


def clusters(count, seed, classes=4, dims=10, spread=1.5):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, count)
    centres = np.random.default_rng(7).normal(size=(classes, dims))
    scales = np.logspace(-2, 3, dims)  # what standardising is for
    return torch.tensor((centres[labels] + spread * draw.normal(size=(count, dims))) * scales), torch.tensor(labels)


def reference(features, labels, l2):
    model = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=10_000)
    return model.fit(features.numpy(), labels.numpy())


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_weights_are_scikit_learns(l2):
    features, labels = clusters(200, seed=0)
    features = torch.tensor(StandardScaler().fit_transform(features.numpy()))
    weight = fit(features, labels, 4, l2)
    wanted = reference(features, labels, l2)
    torch.testing.assert_close(weight[:-1].T, torch.tensor(wanted.coef_), rtol=1e-2, atol=1e-3)
    ours, theirs = (
        (features @ weight[:-1] + weight[-1]).softmax(1),
        torch.tensor(wanted.predict_proba(features.numpy())),
    )
    assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize(("dims", "spread"), [(10, 3), (400, 12)], ids=["narrow", "wider than long"])
def test_accuracy_is_scikit_learns_on_standardised_features(dims, spread):
    train, train_labels = clusters(240, seed=1, dims=dims, spread=spread)
    test, test_labels = clusters(200, seed=2, dims=dims, spread=spread)
    result = linear_accuracy(train, train_labels, test, test_labels, l2_grid=[0.01])
    scaler = StandardScaler().fit(train.numpy())
    wanted = reference(torch.tensor(scaler.transform(train.numpy())), train_labels, 0.01)
    accuracy = wanted.score(scaler.transform(test.numpy()), test_labels.numpy())
    assert result.accuracy == pytest.approx(accuracy, abs=0.006)  # one image of 200 on the border
    assert 0.4 < accuracy < 1


def test_l2_is_chosen_by_scikit_learns_validation_too():
    train, train_labels = clusters(400, seed=3, dims=60, spread=6)
    test, test_labels = clusters(100, seed=4, dims=60, spread=6)
    grid = [100.0, 1.0, 0.1, 0.01]
    result = linear_accuracy(train, train_labels, test, test_labels, l2_grid=grid, dtype=torch.float64)
    scaled = torch.tensor(StandardScaler().fit_transform(train.numpy()))
    fitting, held_out = linear._split(train_labels, 0.2, 0)
    scores = {
        l2: reference(scaled[fitting], train_labels[fitting], l2).score(
            scaled[held_out].numpy(), train_labels[held_out].numpy()
        )
        for l2 in grid
    }
    assert len(set(scores.values())) == 4
    assert result.l2 == max(scores, key=lambda l2: (scores[l2], l2))
    assert result.validation_accuracy == pytest.approx(scores[result.l2])


def test_the_test_part_chooses_nothing():
    train, train_labels = clusters(100, seed=5)
    test, test_labels = clusters(50, seed=6)
    right = linear_accuracy(train, train_labels, test, test_labels)
    wrong = linear_accuracy(train, train_labels, test, (test_labels + 1) % 4)
    assert (right.l2, right.validation_accuracy) == (wrong.l2, wrong.validation_accuracy)
    assert right.accuracy > 0.6 > 0.4 > wrong.accuracy


def test_the_same_every_time_and_for_float64():
    train, train_labels = clusters(150, seed=8)
    test, test_labels = clusters(80, seed=9)
    first = linear_accuracy(train, train_labels, test, test_labels)
    assert linear_accuracy(train, train_labels, test, test_labels) == first
    exact = linear_accuracy(train, train_labels, test, test_labels, dtype=torch.float64)
    assert exact.accuracy == pytest.approx(first.accuracy, abs=0.013)


def test_labels_may_be_any_integers_and_constants_do_no_harm():
    train, train_labels = clusters(150, seed=10)
    test, test_labels = clusters(80, seed=11)
    plain = linear_accuracy(train, train_labels, test, test_labels)
    constant = torch.full((150, 1), 5.0), torch.full((80, 1), 5.0)
    names = torch.tensor([40, -2, 7, 1000])
    odd = linear_accuracy(
        torch.cat([train, constant[0]], 1), names[train_labels], torch.cat([test, constant[1]], 1), names[test_labels]
    )
    assert odd.accuracy == pytest.approx(plain.accuracy, abs=0.013)


def test_features_without_any_variance_are_chance():
    labels = torch.arange(40) % 2
    result = linear_accuracy(torch.ones(40, 3), labels, torch.ones(10, 3), torch.arange(10) % 2)
    assert result.accuracy == 0.5


def test_the_split_keeps_shares_of_classes():
    labels = torch.tensor([0] * 50 + [1] * 100 + [2] * 25)
    fitting, held_out = linear._split(labels, 0.2, seed=3)
    assert sorted(torch.cat([fitting, held_out]).tolist()) == list(range(175))
    assert labels[held_out].bincount().tolist() == [10, 20, 5]
    assert not torch.equal(held_out, linear._split(labels, 0.2, seed=4)[1])


def test_a_handful_of_images_still_leaves_one_to_validate_on():
    fitting, held_out = linear._split(torch.tensor([0, 1, 0]), 0.2, 0)
    assert (len(fitting), len(held_out)) == (2, 1)


@pytest.mark.parametrize(
    ("train", "labels", "test", "match"),
    [
        (torch.ones(4, 2), torch.zeros(4), torch.ones(1, 2), "two classes"),
        (torch.ones(4, 2), torch.arange(3), torch.ones(1, 2), "differ"),
        (torch.ones(4, 2), torch.arange(4), torch.ones(1, 3), "differ"),
        (torch.full((4, 2), math.nan), torch.arange(4), torch.ones(1, 2), "diverged"),
    ],
)
def test_refuses_what_makes_no_sense(train, labels, test, match):
    with pytest.raises(ValueError, match=match):
        linear_accuracy(train, labels, test, torch.zeros(1))


def test_predict_is_the_largest_logit():
    weight = torch.tensor([[1.0, -1.0], [0.0, 0.5]])  # one dimension, then the bias
    assert predict(weight, torch.tensor([[1.0], [0.2], [0.3]])).tolist() == [0, 1, 0]
