"""The step benchmark measures steps that compute the same; times themselves are nobody's business here."""

import copy
import sys

import pytest
import torch

from trainer.bench import steps
from trainer.bench.steps import StepTask, make_steps, measure

_SIZES = {"images": 2, "size": 64, "local_crops": 2, "local_size": 32, "out_dim": 64}
DINO = StepTask(name="dino", method="dino", encoder="test_vit", **_SIZES)
SIMCLR = StepTask(name="simclr", method="simclr", encoder="test_resnet", images=3, size=32, out_dim=16)


@pytest.fixture
def no_lightly(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    for name in [name for name in sys.modules if name.startswith("lightly.")]:  # of a test that found it
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "trainer.bench.lightly_steps", raising=False)


@pytest.mark.parametrize("task", [DINO, SIMCLR], ids=lambda task: task.name)
def test_minimal_step_learns_exactly_what_ours_does(task, no_lightly):
    made, _ = make_steps(task)
    for _ in range(3):
        ours, minimal = made["ours"](), made["minimal"]()
        torch.testing.assert_close(ours, minimal, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("task", [DINO, SIMCLR], ids=lambda task: task.name)
def test_steps_change_their_own_weights_only(task, no_lightly):
    method = steps._make_method(task)
    other = copy.deepcopy(method)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    steps.our_step(method, task.views())()
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_without_lightly_its_figure_is_skipped_with_the_reason(no_lightly):
    said = []
    times = measure(SIMCLR, rounds=2, say=said.append)
    assert set(times.milliseconds) == {"ours", "minimal"}
    assert "pip install lightly" in times.skipped["lightly"]
    low, high = times.speedup_range["minimal"]
    assert 0 < low <= times.speedup["minimal"] <= high
    assert len(said) == 2


def test_lightly_starts_from_the_same_loss():
    pytest.importorskip("lightly")
    made, skipped = make_steps(DINO)
    assert not skipped
    torch.testing.assert_close(made["lightly"](), made["ours"](), atol=1e-3, rtol=1e-3)


def test_views_are_the_same_every_time():
    assert torch.equal(DINO.views().crops, DINO.views().crops)
    assert DINO.views().local_crops.shape == (2, 2, 3, 32, 32)
    assert SIMCLR.views().local_crops is None
