"""What DINO does around its loss: teacher, centre, schedules, freeze, multi-crop."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from manifests.errors import UsageError
from tests.trainer.methods.small import MIDWAY, START, noise_views, part, small_method, tiny_vit
from tests.trainer.methods.test_dino_loss import naive_dino_loss
from trainer.methods.base import Progress
from trainer.methods.dino import DINO, DINOConfig


def _dino(**settings):
    return small_method("dino", **{"local_crops": 2, "drop_path": 0.0} | settings)


def _parameters(*networks):
    return [parameter.detach().clone() for network in networks for parameter in network.parameters()]


def _disturb(*networks):
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("local_crops", [0, 3])
def test_method_is_encoders_heads_and_loss(local_crops):
    method = _dino(local_crops=local_crops)
    _disturb(method.student, method.student_head)
    method.center.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    views = noise_views(method)
    assert (views.local_crops is None) == (local_crops == 0)
    crops = [*views.crops, *([] if views.local_crops is None else views.local_crops)]
    student = torch.stack([method.student_head(method.student(crop)) for crop in crops])
    teacher = torch.stack([method.teacher_head(method.teacher(crop)) for crop in views.crops])
    expected = naive_dino_loss(student.double(), teacher.double(), method.center.double(), 0.1, 0.04)
    output = method(views, MIDWAY)
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-4, rtol=1e-5)
    cross_entropy = output.logs["teacher_entropy"] + output.logs["kl_divergence"]
    torch.testing.assert_close(cross_entropy, output.loss.detach())


def test_teacher_starts_as_the_student_and_never_trains():
    method = _dino()
    for ours, theirs in ((method.teacher, method.student), (method.teacher_head, method.student_head)):
        assert all(torch.equal(a, b) for a, b in zip(_parameters(ours), _parameters(theirs), strict=True))
        assert not any(parameter.requires_grad for parameter in ours.parameters())
    method(noise_views(method), MIDWAY).loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_only_the_student_drops_paths():
    rates = []

    def make_encoder(**arguments):
        rates.append(arguments["drop_path_rate"])
        return tiny_vit(**arguments)

    DINO(make_encoder, DINOConfig(out_dim=8, hidden_dim=8, bottleneck_dim=4, drop_path=0.3))
    assert rates == [0.3, 0.0]


def test_teacher_follows_by_its_momentum():
    method = _dino(momentum=0.9, final_momentum=1.0)
    _disturb(method.student, method.student_head)
    teacher = _parameters(method.teacher, method.teacher_head)
    student = _parameters(method.student, method.student_head)
    logs = method.after_step(MIDWAY)  # half-way along the cosine from .9 to 1
    assert logs["teacher_momentum"].item() == pytest.approx(0.95)
    for new, old, target in zip(_parameters(method.teacher, method.teacher_head), teacher, student, strict=True):
        torch.testing.assert_close(new, 0.95 * old + 0.05 * target, atol=1e-6, rtol=1e-5)


def test_accumulation_advances_centre_and_teacher_once():
    method = _dino(momentum=0.5, final_momentum=0.5)
    views = noise_views(method, images=6)
    logits = method.teacher_head(method.teacher(views.crops.flatten(0, 1)))
    _disturb(method.student)
    expected = [(a + b) / 2 for a, b in zip(_parameters(method.teacher), _parameters(method.student), strict=True)]
    for start in (0, 3):
        method(part(views, start, start + 3), MIDWAY)
        assert not method.center.any()
    method.after_step(MIDWAY)
    torch.testing.assert_close(method.center, 0.1 * logits.mean(0), atol=1e-6, rtol=1e-5)
    for new, value in zip(_parameters(method.teacher), expected, strict=True):
        torch.testing.assert_close(new, value, atol=1e-6, rtol=1e-5)


def test_next_step_starts_a_new_sum():
    method = _dino(center_momentum=0.0, momentum=1.0)
    first, second = noise_views(method, seed=1), noise_views(method, seed=2)
    method(first, MIDWAY)
    method.after_step(MIDWAY)
    method(second, MIDWAY)
    method.after_step(MIDWAY)
    logits = method.teacher_head(method.teacher(second.crops.flatten(0, 1)))
    torch.testing.assert_close(method.center, logits.mean(0), atol=1e-6, rtol=1e-5)


def test_evaluating_the_loss_leaves_no_trace_in_the_centre():
    method = _dino().eval()
    method(noise_views(method), MIDWAY)
    method.after_step(MIDWAY)
    assert not method.center.any()


def test_prototypes_do_not_move_in_the_first_epoch():
    method = _dino(freeze_epochs=1)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 0.1, weight_decay=0.5)
    last_layer = method.student_head.last_layer
    moved = []
    for step in (0, 4, 5):
        before = last_layer.directions.detach().clone()
        progress = dataclasses.replace(START, step=step)
        method(noise_views(method), progress).loss.backward()
        method.before_update(progress)
        optimiser.step()
        optimiser.zero_grad()
        moved.append(not torch.equal(before, last_layer.directions))
    assert moved == [False, False, True]


def test_freeze_takes_at_most_a_tenth_of_the_run():
    method = _dino(freeze_epochs=3)
    for step, frozen in ((9, True), (10, False)):
        progress = dataclasses.replace(START, step=step)
        method(noise_views(method), progress).loss.backward()
        method.before_update(progress)
        assert (method.student_head.last_layer.directions.grad is None) == frozen
        assert method.student_head.mlp[0].weight.grad is not None


@pytest.mark.parametrize(
    ("step", "total", "expected"),
    [(0, 1000, 0.04), (25, 1000, 0.055), (50, 1000, 0.07), (999, 1000, 0.07), (0, 100, 0.04), (5, 100, 0.055)],
)
def test_teacher_temperature_warms_up(step, total, expected):
    # 10 epochs of 5 steps; in a run of 100 steps a tenth, 10 steps.
    method = _dino(teacher_temperature=0.04, final_teacher_temperature=0.07, teacher_temperature_epochs=10)
    progress = Progress(step=step, total_steps=total, steps_per_epoch=5)
    assert method.teacher_temperature(progress) == pytest.approx(expected)


def test_state_holds_centre_and_teacher():
    state = _dino().state_dict()
    assert "center" in state
    assert {key.split(".")[0] for key in state} == {"student", "teacher", "student_head", "teacher_head", "center"}


def test_teachers_batch_norm_has_statistics_of_its_own():
    def make_encoder(drop_path_rate):
        encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5))
        encoder.num_features = 5
        return encoder

    method = DINO(make_encoder, DINOConfig(out_dim=8, hidden_dim=8, bottleneck_dim=4, local_crops=2))
    views = noise_views(method, size=2, local_size=2)
    method(views, MIDWAY)
    method.after_step(MIDWAY)
    pixels = views.crops.flatten(0, 1).flatten(1)
    torch.testing.assert_close(method.teacher[1].running_mean, 0.1 * pixels.mean(0))
    assert not torch.equal(method.teacher[1].running_mean, method.student[1].running_mean)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out_dim", 0),
        ("local_crops", -1),
        ("student_temperature", 0.0),
        ("momentum", 1.5),
        ("drop_path", 1.0),
        ("head_norm", 7),
    ],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(UsageError, match=rf"method\.{name} is {value}; it must be"):
        DINOConfig(**{name: value})


def test_phases_that_a_short_run_shortens_are_said():
    asked = {"freeze_epochs": 3, "teacher_temperature_epochs": 30}
    short = Progress(step=0, total_steps=100, steps_per_epoch=5)
    assert _dino(**asked).notes(short) == [
        "freeze of the prototypes of 3 epochs shortened to a tenth of the run, 10 steps"
    ]
    warming = _dino(**asked, final_teacher_temperature=0.07)
    assert warming.notes(short)[1:] == [
        "warm-up of the teacher's temperature of 30 epochs shortened to a tenth of the run, 10 steps"
    ]
    assert warming.notes(Progress(step=0, total_steps=1500, steps_per_epoch=5)) == []


@pytest.mark.parametrize(
    ("entropy", "kl", "step", "told"),
    [
        (math.log(32), 0.0, 20, True),
        (1e-4, 1e-4, 20, True),
        (math.log(32), 0.0, 19, False),  # of 100: a run that has just begun
        (math.log(32) - 0.5, 0.0, 50, False),
        (math.log(32), 0.5, 50, False),
    ],
)
def test_collapse_is_a_teacher_that_says_nothing_and_a_student_that_agrees(entropy, kl, step, told):
    method = _dino(out_dim=32)
    logs = {"teacher_entropy": entropy, "kl_divergence": kl, "feature_std": 0.5}
    reason = method.collapse(logs, Progress(step=step, total_steps=100, steps_per_epoch=10))
    assert (reason is not None) == told
