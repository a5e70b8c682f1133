"""What holds of every student and teacher: who trains, who follows, what BatchNorm sees."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.trainer.methods.small import MIDWAY, noise_views, small_method, tiny_vit
from trainer.choices import class_of
from trainer.methods import METHODS

PREDICTING = ("byol", "moco-v3")
HEADS = {"hidden_dim": 8, "out_dim": 4}


def _parameters(*networks):
    return [parameter.detach().clone() for network in networks for parameter in network.parameters()]


def _shift(*networks):
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter += 0.1


@pytest.mark.parametrize("name", PREDICTING)
def test_teacher_starts_as_the_student_and_never_trains(name):
    method = small_method(name)
    for ours, theirs in ((method.teacher, method.student), (method.teacher_head, method.student_head)):
        assert all(torch.equal(a, b) for a, b in zip(_parameters(ours), _parameters(theirs), strict=True))
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    method(noise_views(method), MIDWAY).loss.backward()
    for network in (method.student_head, method.predictor):
        assert all(parameter.grad is not None for parameter in network.parameters())
    assert method.encoder is method.teacher
    assert method.trained_encoder is method.student


@pytest.mark.parametrize("name", PREDICTING)
def test_teacher_follows_once_a_step_along_a_cosine(name):
    method = small_method(name, momentum=0.9, final_momentum=1.0)
    _shift(method.student, method.student_head)
    teacher = _parameters(method.teacher, method.teacher_head)
    student = _parameters(method.student, method.student_head)
    for _ in range(2):  # two micro-batches
        method(noise_views(method), MIDWAY)
    logs = method.after_step(MIDWAY)
    assert logs["teacher_momentum"].item() == pytest.approx(0.95)
    for new, old, target in zip(_parameters(method.teacher, method.teacher_head), teacher, student, strict=True):
        torch.testing.assert_close(new, 0.95 * old + 0.05 * target, atol=1e-6, rtol=1e-5)
    last = method.after_step(dataclasses.replace(MIDWAY, step=100))
    assert last["teacher_momentum"].item() == 1.0


@pytest.mark.parametrize("name", PREDICTING)
def test_state_is_of_four_networks_and_a_predictor(name):
    parts = {key.split(".")[0] for key in small_method(name).state_dict()}
    assert parts == {"student", "teacher", "student_head", "teacher_head", "predictor"}


@pytest.mark.parametrize("name", PREDICTING)
def test_the_teacher_drops_no_paths(name):
    made = []

    def make_encoder(**arguments):
        made.append(arguments)
        return tiny_vit(**arguments)

    method = class_of(METHODS, name)
    method(make_encoder, method.Config(**HEADS))
    assert made == [{}, {"drop_path_rate": 0.0}]


@pytest.mark.parametrize("joint_batch", [False, True])
@pytest.mark.parametrize("name", PREDICTING)
def test_teachers_batch_norm_has_statistics_of_its_own(name, joint_batch):
    def make_encoder(**arguments):
        encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5))
        encoder.num_features = 5
        return encoder

    cls = class_of(METHODS, name)
    method = cls(make_encoder, cls.Config(**HEADS, joint_batch=joint_batch))
    views = noise_views(method, size=2)
    method.student[1].running_mean.fill_(7.0)
    method(views, MIDWAY)
    method.after_step(MIDWAY)
    expected = torch.zeros(12)
    for batch in [views.crops.flatten(0, 1)] if joint_batch else list(views.crops):
        expected = 0.9 * expected + 0.1 * batch.flatten(1).mean(0)
    torch.testing.assert_close(method.teacher[1].running_mean, expected)
    assert not torch.equal(method.teacher[1].running_mean, method.student[1].running_mean)
