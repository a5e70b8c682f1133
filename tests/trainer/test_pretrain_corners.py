"""Runs at the edges of what is allowed: they end well, or are refused before anything is made."""

import shutil

import pytest
from accelerate.state import AcceleratorState

from manifests.errors import DiffmixError, UsageError
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import metrics, results, train
from trainer import resume
from trainer.engine import checkpoint
from trainer.engine.loop import CollapsedError
from trainer.evaluate.held_out import HeldOut


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set", 60)


@pytest.fixture
def own_precision():
    """Accelerate keeps one precision a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("own_precision")
def test_a_single_class_and_bf16_end_with_an_encoder(tmp_path):
    asked = {"steps": 1, "data__filter": ["label == 1"], "run__precision": "bf16", "evaluation__final": True}
    out = tmp_path / "run"
    train(write_pairs(tmp_path / "set", 240), out, **asked)
    final = results(out)["final"]
    assert final["knn"] == 1
    assert "linear" not in final
    assert (out / "encoder" / "model.safetensors").exists()


def test_features_that_overflow_in_the_final_evaluation_are_a_divergence(data, tmp_path, monkeypatch):
    def overflow(self, encoder):
        raise FloatingPointError("the encoder's features are not finite")

    monkeypatch.setattr(HeldOut, "final", overflow)
    with pytest.raises(CollapsedError, match="not finite in the final evaluation"):
        train(data, tmp_path / "run", steps=1, evaluation__final=True)
    assert results(tmp_path / "run")["state"] == "collapsed"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"run__accumulation": 3}, "cannot be cut equally"), ({"resume": "nowhere.pt"}, "there is no such file")],
)
def test_a_refused_run_leaves_no_run(data, tmp_path, change, said):
    with pytest.raises(UsageError, match=said):
        train(data, tmp_path / "run", **change)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_small_crops_that_the_encoder_cannot_take_are_refused(data, tmp_path):
    with pytest.raises(UsageError, match="no small crops of 18 px"):
        train(data, tmp_path / "run", "dino", views__local_size=18)


def test_going_on_does_not_need_the_initial_weights_again(data, tmp_path):
    train(data, tmp_path / "first", steps=1)
    out, init = tmp_path / "run", str(tmp_path / "first")
    train(data, out, steps=2, init=init, checkpoint__every=1)
    (out / "results.json").unlink()
    (out / "checkpoints" / checkpoint.name_of(2)).unlink()
    shutil.rmtree(tmp_path / "first")
    assert train(data, out, steps=2, init=init).state == "finished"


def test_evaluations_more_often_than_steps_are_at_every_step(data, tmp_path):
    train(data, tmp_path / "run", steps=3, batch=60, evaluation__every=0.01)
    probed = [line["step"] for line in metrics(tmp_path / "run") if "knn" in line]
    assert probed == [0, 1, 2, 3]


def test_processes_that_see_different_checkpoints_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "gather_objects", lambda value: [value, 7])
    with pytest.raises(DiffmixError, match=r"different checkpoints in .*, of steps 0, 7: choose an --out"):
        train(data, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
