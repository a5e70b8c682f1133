"""DINO's loss by hand, against loops over pairs, and under what may not change it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.methods.dino_loss import dino_loss, teacher_probabilities


def naive_dino_loss(student, teacher, center, student_temperature, teacher_temperature):
    """The pseudo-code of the paper, pair by pair and image by image."""

    def softmax(row):
        return torch.exp(row - row.max()) / torch.exp(row - row.max()).sum()

    losses = []
    for i, wanted in enumerate(teacher):
        for v, given_ in enumerate(student):
            if v == i:
                continue
            for t, s in zip(wanted, given_, strict=True):
                p, q = softmax((t - center) / teacher_temperature), softmax(s / student_temperature)
                losses.append(-sum(a * torch.log(b) for a, b in zip(p, q, strict=True)))
    return sum(losses) / len(losses)


def _logits(views=4, images=3, prototypes=5, seed=0, teachers=2):
    draw = torch.Generator().manual_seed(seed)
    student = torch.rand(views, images, prototypes, generator=draw) * 2 - 1
    teacher = torch.rand(teachers, images, prototypes, generator=draw) * 2 - 1
    return student, teacher, torch.randn(prototypes, generator=draw) * 0.1


def test_by_hand():
    # The teacher is sure of prototype 0 in view 0 and halves the second view; the student says 3:1 and 1:1.
    targets = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    student = torch.tensor([[[math.log(3), 0.0]], [[0.0, 0.0]]])
    expected = (math.log(2) + (math.log(4 / 3) + math.log(4)) / 2) / 2
    assert dino_loss(student, targets, 1.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (4, 2), (10, 2), (5, 3)])
def test_loss_and_gradient_are_the_papers(views, teachers):
    student, teacher, center = _logits(views, teachers=teachers)
    ours, theirs = student.requires_grad_(), student.detach().double().requires_grad_()
    targets, _ = teacher_probabilities(teacher, center, 0.04)
    loss = dino_loss(ours, targets, 0.1)
    expected = naive_dino_loss(theirs, teacher.double(), center.double(), 0.1, 0.04)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2e-6, rtol=1e-4)


def test_gradient_can_be_asked_for_twice():
    student, teacher, center = _logits()
    loss = dino_loss(student.requires_grad_(), teacher_probabilities(teacher, center, 0.04)[0], 0.1)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])


def test_teacher_probabilities_and_entropy_by_hand():
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.5, 0.5]]]) * 0.5 + torch.tensor([1.0, 2.0])
    probabilities, entropy = teacher_probabilities(logits, torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close(probabilities, torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]))
    unequal = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert entropy.item() == pytest.approx((unequal + math.log(2)) / 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), views=st.integers(2, 6), shift=st.floats(-5, 5))
def test_loss_is_above_the_entropy_and_blind_to_shifts(seed, views, shift):
    student, teacher, center = _logits(views, seed=seed)
    targets, entropy = teacher_probabilities(teacher, center, 0.1)
    loss = dino_loss(student, targets, 0.1)
    assert loss >= entropy - 1e-5
    torch.testing.assert_close(dino_loss(student + shift, targets, 0.1), loss, atol=1e-4, rtol=1e-4)


def test_a_student_that_agrees_has_the_teachers_entropy():
    _, teacher, center = _logits()
    teacher = teacher[:1].expand(2, -1, -1)
    targets, entropy = teacher_probabilities(teacher, center, 0.1)
    torch.testing.assert_close(dino_loss(teacher - center, targets, 0.1), entropy)


def test_autocast_does_not_reach_the_loss():
    student, teacher, center = _logits()
    targets, _ = teacher_probabilities(teacher, center, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = dino_loss(student, targets, 0.1)
    assert torch.equal(inside, dino_loss(student, targets, 0.1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    student, teacher, center = _logits()
    targets, _ = teacher_probabilities(teacher, center, 0.1)
    student[3, 1, 2] = bad
    assert not torch.isfinite(dino_loss(student, targets, 0.1))
    teacher[0, 0, 0] = bad
    student[3, 1, 2] = 0.0
    assert not torch.isfinite(dino_loss(student, teacher_probabilities(teacher, center, 0.1)[0], 0.1))
