import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from tests.trainer.data.task_builders import write_folder
from trainer.data.tasks import open_task, parse
from trainer.evaluate.held_out import pixels
from trainer.evaluate.retention import Part, Retention


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return open_task(parse(str(write_folder(tmp_path_factory.mktemp("task"), 120))))


def whole(images):
    return Part(images=images, indices=np.arange(len(images)))


def make(task, k=1):
    source = {"bank": whole(task.train), "queries": whole(task.test)}
    return Retention(**source, size=12, device=torch.device("cpu"), k=k, temperature=0.07)


def by_hand(task, features):
    """Features and labels of bank and queries."""
    from trainer.data.plain_images import PlainImages

    found = []
    for part in (task.train, task.test):
        images = torch.cat([batch for batch, _ in PlainImages(part, np.arange(len(part)), size=12)])
        found += [features(images), np.asarray(part.label)]
    return found


def squeezed(images):
    """Other features: as after fine-tuning."""
    return pixels(images)[:, ::7].square()


def test_knn_is_of_bank_and_queries_as_the_encoder_sees_them_now(task):
    retention = make(task)
    retention.measure(pixels)
    for features in (pixels, squeezed):
        bank, labels, queries, wanted = by_hand(task, features)
        if features is squeezed:
            retention = make(task)
        found = retention.measure(features)["source_accuracy"]
        reference = KNeighborsClassifier(1, metric="cosine").fit(bank, labels).score(queries, wanted)
        assert found == pytest.approx(reference)


def test_the_probe_is_fitted_once_and_then_only_applied(task):
    """Features that are turned about lose the probe, and kNN does not notice."""
    retention = make(task, k=5)
    before = retention.measure(pixels)
    after = retention.measure(lambda images: -pixels(images))
    assert after["source_accuracy"] == before["source_accuracy"]
    bank, labels, queries, wanted = by_hand(task, pixels)
    probe = retention._probe
    reference = LogisticRegression(C=1 / (probe.l2 * len(bank)), max_iter=5000, tol=1e-8)
    mean, std = bank.numpy().mean(0), bank.numpy().std(0)
    reference.fit((bank.numpy() - mean) / std, labels)
    for sign, found in ((1, before), (-1, after)):
        expected = reference.score((sign * queries.numpy() - mean) / std, wanted)
        assert found["source_linear_accuracy"] == pytest.approx(expected, abs=1.5 / len(queries))


def test_parts_know_their_labels(task):
    part = Part(images=task.train, indices=np.array([3, 1]))
    assert part.labels.tolist() == [int(task.train.label[3]), int(task.train.label[1])]
    assert len(part) == 2
