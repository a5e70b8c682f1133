"""What encoders are measured on: never an image of the bank, and classes that mean the same."""

import numpy as np
import pytest
import torch

from manifests.errors import UsageError
from tests.trainer.compare.small import request, write_recipe
from tests.trainer.data.builders import write_pairs
from tests.trainer.finetune.small import write_task
from trainer.compare.evaluation import open_exam
from trainer.compare.settings import resolve
from trainer.data.rows import Rows
from trainer.evaluate.held_out import is_query
from trainer.evaluate.knn import knn_accuracy
from trainer.evaluate.linear import linear_accuracy

CPU = torch.device("cpu")


def exam_of(data, folder, **how):
    return open_exam(resolve(request(data, "", write_recipe(folder), **how)))


def test_a_tenth_by_hash_is_asked_of_the_rest(data, tmp_path):
    exam = exam_of(data, tmp_path)
    bank, queries = (set(part.images.keys(part.indices)) for part in (exam.bank, exam.queries))
    assert bank.isdisjoint(queries)
    assert len(bank | queries) == 60
    assert all(is_query(key) for key in queries)
    assert not any(is_query(key) for key in bank)


def test_with_a_test_set_all_labelled_rows_are_the_bank(data, tmp_path):
    other = write_pairs(tmp_path / "other", 12)
    exam = exam_of(data, tmp_path, test=other)
    assert (len(exam.bank), len(exam.queries)) == (60, 12)
    assert exam.bank.labels.tolist() == Rows.open(data).label.tolist()
    assert exam.queries.labels.tolist() == Rows.open(other).label.tolist()
    assert exam.inputs != exam_of(data, tmp_path).inputs


def test_classes_of_a_test_set_are_matched_by_name(data, tmp_path):
    folder = write_task(tmp_path / "photos", 9, ("red", "green", "blue"))
    for old, new in (("red", "dog"), ("green", "a bird"), ("blue", "cat")):
        (tmp_path / "photos" / old).rename(tmp_path / "photos" / new)
    exam = exam_of(data, tmp_path, test=folder)
    names = [key.partition("/")[0] for key in exam.queries.images.keys(exam.queries.indices)]
    number = {"cat": 0, "dog": 1, "a bird": 2}
    assert exam.queries.labels.tolist() == [number[name] for name in names]
    (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / "horse")
    with pytest.raises(UsageError, match=r"--test .*no class 'horse'"):
        exam_of(data, tmp_path, test=folder)


def test_limits_are_kept_evenly(data, tmp_path):
    other = write_pairs(tmp_path / "other", 12)
    exam = exam_of(data, tmp_path, test=other, evaluation={"bank": 20, "queries": 4})
    assert exam.bank.indices.tolist() == np.linspace(0, 59, 20).round().tolist()
    assert exam.queries.indices.tolist() == [0, 4, 7, 11]


def test_pixels_by_hand(data, tmp_path):
    exam = exam_of(data, tmp_path, evaluation={"k": 3})
    files = Rows.open(data).open_files()
    features = [
        torch.stack([torch.from_numpy(files.pixels(int(index), -1)).permute(2, 0, 1).flatten() for index in part])
        for part in (exam.bank.indices, exam.queries.indices)
    ]
    bank, queries = (part.float() / 255 for part in features)
    labels = exam.bank.labels, exam.queries.labels
    found = exam.of_pixels(12, CPU)
    assert found["knn"] == knn_accuracy(bank, labels[0], queries, labels[1], k=3)
    assert found["linear"] == linear_accuracy(bank, labels[0], queries, labels[1]).accuracy


def test_sets_without_labels_cannot_compare(tmp_path):
    bare = write_pairs(tmp_path / "bare", 30, labelled=False)
    with pytest.raises(UsageError, match="too few labelled real images"):
        exam_of(bare, tmp_path)
    with pytest.raises(UsageError, match="no labels"):
        exam_of(bare, tmp_path, test=write_pairs(tmp_path / "other", 12))
