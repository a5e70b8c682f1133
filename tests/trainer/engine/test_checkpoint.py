"""Checkpoints: whole or not at all, the newest few, nothing in them is executed."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manifests import layout
from manifests.errors import DiffmixError
from trainer.engine import checkpoint
from trainer.engine.checkpoint import Checkpoint, DamagedError, cursor_at

SAVED = Checkpoint(
    step=7,
    cursor=(1, 24),
    method={"weight": torch.arange(6.0).view(2, 3), "seen": torch.tensor(3)},
    optimiser={"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    scaler={"scale": 65536.0},
    data="abc",
    seconds=1.5,
    first={"knn": 0.25},
    latest={"loss": 2.0, "step": 7},
    suspicions=2,
)


def at(step):
    return replace(SAVED, step=step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    path = checkpoint.save(tmp_path, SAVED, keep=2)
    assert path.name == "step-000000007.pt"
    found = checkpoint.load(path)
    for name in ("method", "optimiser"):
        torch.testing.assert_close(getattr(found, name), getattr(SAVED, name), rtol=0, atol=0)
    others = [name for name in Checkpoint.__slots__ if name not in ("method", "optimiser")]
    assert [getattr(found, name) for name in others] == [getattr(SAVED, name) for name in others]


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 100, 1000):
        checkpoint.save(tmp_path, at(step), keep=2)
    assert names(tmp_path) == ["step-000000100.pt", "step-000001000.pt"]


def test_damaged_later_files_do_not_push_out_whole_ones(tmp_path):
    checkpoint.save(tmp_path, at(5), keep=1)
    (tmp_path / checkpoint.name_of(9)).write_bytes(b"torn")
    found, skipped = checkpoint.newest(tmp_path)
    assert (found.step, [path.name for path in skipped]) == (5, ["step-000000009.pt"])
    checkpoint.save(tmp_path, at(6), keep=1)
    assert names(tmp_path) == ["step-000000006.pt"]


def test_steps_of_ten_digits_are_in_order(tmp_path):
    for step in (999_999_999, 1_000_000_000):
        checkpoint.save(tmp_path, at(step), keep=5)
    assert checkpoint.newest(tmp_path)[0].step == 1_000_000_000


def test_temporaries_of_dead_processes_are_swept(tmp_path):
    child = os.fork()
    if child == 0:
        (tmp_path / layout.temporary_name(checkpoint.name_of(3))).write_bytes(b"half")
        os._exit(0)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    assert checkpoint.newest(tmp_path) == (None, []), "a temporary is no checkpoint"
    checkpoint.save(tmp_path, SAVED, keep=2)
    assert names(tmp_path) == ["step-000000007.pt"]


def test_a_failed_save_leaves_the_older_ones_and_nothing_else(tmp_path):
    checkpoint.save(tmp_path, at(1), keep=1)
    with pytest.raises((DiffmixError, pickle.PicklingError, AttributeError)):
        checkpoint.save(tmp_path, replace(at(2), latest={"x": lambda: 0}), keep=1)
    assert names(tmp_path) == ["step-000000001.pt"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("whole"), SAVED, keep=1).read_bytes()


@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_damaged_wherever_it_ends(whole, tmp_path_factory, share):
    path = tmp_path_factory.getbasetemp() / "torn.pt"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DamagedError, match="is damaged or no checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"version": 2}), pickle.dumps([1])])
def test_other_files_are_no_checkpoints(tmp_path, content):
    checkpoint.save(tmp_path, at(1), keep=5)
    path = tmp_path / checkpoint.name_of(2)
    path.write_bytes(content)
    found, skipped = checkpoint.newest(tmp_path)
    assert (found.step, skipped) == (1, [path])


@pytest.mark.parametrize("values", [[1, 2], {"version": 2, "step": 3}, {"version": 2, "cursor": [0, 0], "odd": 1}])
def test_torch_files_of_something_else_are_no_checkpoints(tmp_path, values):
    torch.save(values, tmp_path / "x.pt")
    with pytest.raises(DamagedError):
        checkpoint.load(tmp_path / "x.pt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_executed(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"version": 2, "cursor": [0, 0], "step": Malicious(trap)}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Malicious(trap)))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(DamagedError):
            checkpoint.load(tmp_path / name)
    assert not trap.exists()


def test_another_version_is_refused_and_never_passed_over(tmp_path):
    checkpoint.save(tmp_path, at(1), keep=5)
    checkpoint.save(tmp_path, replace(at(2), version=99), keep=5)
    with pytest.raises(DiffmixError, match="has checkpoint version 99; this diffmix reads 2"):
        checkpoint.newest(tmp_path)


def test_a_file_that_cannot_be_read_is_never_passed_over(tmp_path):
    checkpoint.save(tmp_path, at(1), keep=5)
    (tmp_path / checkpoint.name_of(2)).mkdir()  # reading it is an OSError, as on a disk that is away
    with pytest.raises(DiffmixError, match="cannot read"):
        checkpoint.newest(tmp_path)


def test_no_folder_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "none") == (None, [])


@given(step=st.integers(0, 10**6), per_epoch=st.integers(1, 1000), batch=st.integers(1, 4096))
def test_the_cursor_counts_all_samples(step, per_epoch, batch):
    epoch, samples = cursor_at(step, per_epoch, batch)
    assert epoch * per_epoch * batch + samples == step * batch
    assert 0 <= samples < per_epoch * batch
