"""Where a run goes on, and every way in which it must not."""

from dataclasses import replace

import pytest
import yaml

from manifests.errors import DiffmixError, UsageError
from tests.trainer.engine.test_checkpoint import SAVED
from trainer.config import resolve
from trainer.engine import checkpoint
from trainer.engine.run_folder import RunFolder
from trainer.resume import start_of

CONFIG = resolve({"method": {"name": "simclr"}, "encoder": {"name": "resnet18"}})
OTHER = replace(CONFIG, optim=replace(CONFIG.optim, lr=0.5), run=replace(CONFIG.run, seed=3))


def begun(path, *steps, config=CONFIG):
    """A run folder with checkpoints of those steps."""
    folder = RunFolder(path)
    folder.create()
    folder.write_text("config.yaml", config.to_yaml())
    for step in steps:
        checkpoint.save(folder.checkpoints, replace(SAVED, step=step), keep=9)
    return folder


def start(folder, resume="auto", *, config=CONFIG, fingerprint=SAVED.data, anyway=False):
    return start_of(folder, config, str(resume), fingerprint=fingerprint, anyway=anyway)


def test_a_new_folder(tmp_path):
    for resume in ("auto", "never"):
        found = start(RunFolder(tmp_path / "new"), resume)
        assert (found.saved, found.finished, found.note) == (None, None, "")
    assert not (tmp_path / "new").exists(), "looking makes nothing"


def test_the_newest_checkpoint(tmp_path):
    found = start(begun(tmp_path, 2, 4))
    assert found.saved.step == 4
    assert found.note == f"going on in {tmp_path} from step 4"


def test_a_folder_without_a_checkpoint_starts_anew(tmp_path):
    found = start(begun(tmp_path))
    assert found.saved is None
    assert "no checkpoint yet: starting anew" in found.note


def test_a_damaged_one_is_passed_over_and_named(tmp_path):
    folder = begun(tmp_path, 2, 4)
    damaged = folder.checkpoints / checkpoint.name_of(4)
    damaged.write_bytes(damaged.read_bytes()[:100])
    found = start(folder)
    assert found.saved.step == 2
    assert f"{damaged} is damaged and is passed over" in found.note


def test_damaged_ones_alone_never_mean_starting_anew(tmp_path):
    folder = begun(tmp_path, 2)
    (folder.checkpoints / checkpoint.name_of(2)).write_bytes(b"")
    with pytest.raises(DiffmixError, match=r"no whole checkpoint is left: remove .*checkpoints to start anew"):
        start(folder)


def test_never_refuses_an_existing_run(tmp_path):
    with pytest.raises(UsageError, match="holds a run already; --resume never needs another --out"):
        start(begun(tmp_path, 2), "never")


@pytest.mark.parametrize("resume", ["auto", "."])
def test_a_finished_run_says_so(tmp_path, resume):
    folder = begun(tmp_path, 2)
    folder.write_json("results.json", {"state": "finished", "knn": 0.5})
    found = start(folder, tmp_path if resume == "." else resume)
    assert found.finished == {"state": "finished", "knn": 0.5}
    assert found.note.endswith("is finished: nothing to do")


def test_a_collapsed_run_is_not_done_again(tmp_path):
    folder = begun(tmp_path, 2)
    folder.write_json("results.json", {"state": "collapsed", "reason": "NaN"})
    with pytest.raises(UsageError, match=r"holds a run that collapsed \(NaN\); .*another --out"):
        start(folder)


def test_broken_results_are_none(tmp_path):
    folder = begun(tmp_path, 2)
    folder.write_text("results.json", '{"state"')
    assert start(folder).saved.step == 2


@pytest.mark.parametrize("resume", ["auto", "folder", "file"])
def test_other_settings_are_refused_by_name(tmp_path, resume):
    folder = begun(tmp_path, 2)
    where = {"auto": "auto", "folder": tmp_path, "file": folder.checkpoints / checkpoint.name_of(2)}[resume]
    with pytest.raises(UsageError, match=r"optim.lr: 0.0005 there, 0.5 now; run.seed: 0 there, 3 now"):
        start(folder, where, config=OTHER)


def test_settings_of_how_it_runs_may_change(tmp_path):
    config = replace(CONFIG, data=replace(CONFIG.data, workers=7), checkpoint=replace(CONFIG.checkpoint, keep=5))
    assert start(begun(tmp_path, 2), config=config).saved.step == 2


def test_settings_that_an_earlier_version_did_not_know_have_their_defaults(tmp_path):
    saved = CONFIG.to_dict()
    del saved["mix"]["weight"], saved["optim"]["clip"], saved["checkpoint"], saved["method"]["temperature"]
    folder = begun(tmp_path, 2)
    folder.write_text("config.yaml", yaml.safe_dump(saved))
    assert start(folder).saved.step == 2
    with pytest.raises(UsageError, match=r"\(mix.weight: None there, 'similarity' now\)"):
        start(folder, config=replace(CONFIG, mix=replace(CONFIG.mix, weight="similarity")))


@pytest.mark.parametrize("content", ["{", "- 1\n"])
def test_a_broken_configuration_is_an_error(tmp_path, content):
    folder = begun(tmp_path, 2)
    folder.write_text("config.yaml", content)
    with pytest.raises(DiffmixError, match=r"config.yaml|holds a run of other settings"):
        start(folder)


@pytest.mark.parametrize("resume", ["auto", "folder", "file"])
def test_a_changed_set_is_refused_unless_told(tmp_path, resume):
    folder = begun(tmp_path / "a", 2)
    where = {"auto": "auto", "folder": folder.path, "file": folder.checkpoints / checkpoint.name_of(2)}[resume]
    with pytest.raises(UsageError, match=r"--set data\.allow_changed=true"):
        start(folder, where, fingerprint="other")
    assert start(folder, where, fingerprint="other", anyway=True).saved.step == 2


def test_from_another_runs_folder_or_file(tmp_path):
    old = begun(tmp_path / "old", 2, 4)
    new = RunFolder(tmp_path / "new")
    assert start(new, old.path).saved.step == 4
    assert start(new, old.checkpoints / checkpoint.name_of(2)).saved.step == 2


def test_the_same_command_again_goes_on_in_the_new_folder(tmp_path):
    old = begun(tmp_path / "old", 2, 4)
    assert start(begun(tmp_path / "new"), old.path).saved.step == 4, "killed before the first checkpoint"
    new = begun(tmp_path / "new", 6)
    assert start(new, old.path).saved.step == 6
    new.write_json("results.json", {"state": "finished"})
    assert start(new, old.path).finished is not None


def test_an_older_checkpoint_of_the_run_itself(tmp_path):
    folder = begun(tmp_path, 2, 4)
    assert start(folder, folder.checkpoints / checkpoint.name_of(2)).saved.step == 2


def test_a_folder_of_another_run_is_refused(tmp_path):
    old, new = begun(tmp_path / "old", 2), begun(tmp_path / "new", 3, config=OTHER)
    with pytest.raises(UsageError, match="holds a run of other settings"):
        start(new, old.path)


def test_paths_that_hold_nothing(tmp_path):
    new = RunFolder(tmp_path / "new")
    with pytest.raises(UsageError, match="no such file; give auto, never, a run folder or a checkpoint file"):
        start(new, tmp_path / "none.pt")
    with pytest.raises(UsageError, match="no checkpoint there"):
        start(new, tmp_path)
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(DiffmixError, match="is damaged or no checkpoint of diffmix"):
        start(new, tmp_path / "x.pt")


def test_relative_paths_and_the_home_folder(tmp_path, monkeypatch):
    begun(tmp_path / "old", 2)
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (".", "~/old", "checkpoints/step-000000002.pt"):
        assert start(RunFolder(tmp_path / "new"), path).saved.step == 2
        with pytest.raises(UsageError, match="other settings"):
            start(RunFolder(tmp_path / "new"), path, config=OTHER)


def test_the_saved_configuration_is_plain_yaml(tmp_path):
    folder = begun(tmp_path)
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["optim"]["betas"] == [0.9, 0.999]
