"""Whole runs in this process: what ends up in the folder, and how runs that cannot go well end."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from manifests.errors import DiffmixError, UsageError
from tests.trainer.data.builders import picture, write_pairs
from tests.trainer.engine.small_runs import (
    arguments,
    assert_same_run,
    assert_same_state,
    final,
    metrics,
    request,
    results,
    train,
)
from trainer.cli import run
from trainer.engine import checkpoint
from trainer.engine.loop import CollapsedError
from trainer.pretrain import describe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 pairs, of which a batch of 8 makes 5 steps."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set", 40)


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """An undisturbed run of DINO over more than an epoch."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train(data, out, "dino", steps=7)
    return out


def test_the_folder_tells_all_of_the_run(data, reference):
    found = results(reference)
    assert (found["state"], found["method"], found["steps"], found["epochs"]) == ("finished", "dino", 7, 7 / 5)
    assert found["encoder"] == "vit_tiny_patch16_224"
    lines = metrics(reference)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert lines[0].keys() == lines[-1].keys() >= {"step", "epoch", "knn", "feature_rank"}
    assert [line["epoch"] for line in lines[1:-1]] == [0, 0, 0, 0, 1, 1, 1]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and line["center_norm"] > 0 for line in lines[1:-1])
    assert found["loss"] == lines[-2]["loss"]
    assert found["knn"] == lines[-1]["knn"]
    assert found["knn_before"] == lines[0]["knn"]
    assert final(reference).cursor == (1, 16)
    assert yaml.safe_load((reference / "config.yaml").read_text())["data"]["url"] == data
    assert json.loads((reference / "environment.json").read_text())["world_size"] == 1
    assert list(reference.rglob("events.out.tfevents.*")), "TensorBoard always"


def test_the_exported_encoder_is_the_teacher(reference):
    from safetensors.torch import load_file

    exported = load_file(reference / "encoder" / "model.safetensors")
    teacher = {
        name.removeprefix("teacher."): value
        for name, value in final(reference).method.items()
        if name.startswith("teacher.")
    }
    assert exported.keys() == teacher.keys()
    torch.testing.assert_close(exported, teacher, rtol=0, atol=0)


def test_the_same_again_is_the_same_bit_for_bit(data, reference, tmp_path):
    train(data, tmp_path / "run", "dino", steps=7, checkpoint__every=2, data__workers=2, run__log_every=1)
    assert_same_run(tmp_path / "run", reference)
    kept = [path.name for path in checkpoint.steps_in(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-000000006.pt", "step-000000007.pt"]


def test_another_seed_is_another_run(data, reference, tmp_path):
    train(data, tmp_path / "run", "dino", steps=2, run__seed=1)
    assert metrics(tmp_path / "run")[1]["loss"] != metrics(reference)[1]["loss"]


def rewind(out, step):
    """The folder as a kill right after that step's checkpoint would leave it."""
    for path in checkpoint.steps_in(out / "checkpoints"):
        if path.name > checkpoint.name_of(step):
            path.unlink()
    (out / "results.json").unlink()


@pytest.mark.parametrize("step", [2, 5, 7])
def test_going_on_from_any_checkpoint_is_exact(data, reference, tmp_path, step):
    out = tmp_path / "run"
    train(data, out, "dino", steps=7, checkpoint__every=1, checkpoint__keep=9)
    rewind(out, step)
    train(data, out, "dino", steps=7)
    assert_same_run(out, reference)
    found, expected = results(out), results(reference)
    assert [found[name] for name in ("loss", "knn", "knn_before", "feature_rank")] == [
        expected[name] for name in ("loss", "knn", "knn_before", "feature_rank")
    ]


def test_a_damaged_newest_checkpoint_costs_a_few_steps_only(data, reference, tmp_path, capsys):
    out = tmp_path / "run"
    train(data, out, "dino", steps=7, checkpoint__every=3)
    (out / "results.json").unlink()
    newest = out / "checkpoints" / checkpoint.name_of(7)
    newest.write_bytes(newest.read_bytes()[:-200])
    train(data, out, "dino", steps=7)
    assert f"{newest} is damaged and is passed over" in capsys.readouterr().err
    assert_same_run(out, reference)


def test_from_another_folders_checkpoint(data, reference, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    train(data, old, "dino", steps=7, checkpoint__every=4)
    path = old / "checkpoints" / checkpoint.name_of(4)
    train(data, new, "dino", steps=7, resume=str(path))
    assert_same_state(final(new), final(reference))
    assert metrics(new) == metrics(reference)[5:]
    assert train(data, new, "dino", steps=7, resume=str(path)).state == "already finished"


def test_a_finished_run_says_so(data, reference, capsys):
    before = (reference / "results.json").read_bytes()
    assert run(arguments(data, reference, "dino", steps=7)) == 0
    captured = capsys.readouterr()
    assert "is finished: nothing to do" in captured.err
    assert captured.out.startswith("already finished")
    assert (reference / "results.json").read_bytes() == before


def test_other_settings_are_refused_by_name(data, reference, capsys):
    assert run(arguments(data, reference, "dino", steps=8)) == 2
    assert "run.max_steps: 7 there, 8 now" in capsys.readouterr().err
    assert run([*arguments(data, reference, "dino", steps=7), "--resume", "never"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_changed_set_is_refused_unless_told(tmp_path):
    write_pairs(tmp_path / "set", 40)
    out = tmp_path / "run"
    train(tmp_path / "set", out, steps=4, checkpoint__every=2)
    rewind(out, 2)
    other = write_pairs(tmp_path / "other", 44)
    with pytest.raises(UsageError, match=r"data\.allow_changed=true"):
        train(other, out, steps=4)
    assert train(other, out, steps=4, data__allow_changed=True).state == "finished"
    assert final(out).step == 4


def test_the_settings_are_said_and_printed_as_json(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run([*arguments(data, out, steps=1), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["state"], found["folder"], found["steps"]) == ("finished", str(out), 1)
    assert (out / "config.yaml").read_text().rstrip() in captured.err


def test_a_dry_run_makes_nothing(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run([*arguments(data, out), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["steps_per_epoch"], found["steps"]) == (40, 5, 4)
    assert found["config"]["encoder"]["args"]["depth"] == 2
    assert run([*arguments(data, out), "--dry-run"]) == 0
    assert "40 samples, 5 steps an epoch, 4 steps of 8 images" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1, 5), (2.5, 12), (0.01, 1)])
def test_epochs_may_be_fractions(data, epochs, steps):
    asked = request(data, None)
    flags = {**asked.flags, "run": {"epochs": epochs, "batch_size": 8}}
    assert describe(replace(asked, flags=flags))["steps"] == steps


def test_steps_win_over_epochs(data):
    asked = request(data, None, steps=123)
    flags = {**asked.flags, "run": {**asked.flags["run"], "epochs": 1}}
    assert describe(replace(asked, flags=flags))["steps"] == 123


def test_a_batch_that_is_too_large(data, tmp_path, capsys):
    train(data, tmp_path / "run", steps=1, batch=None)
    assert "batch size 128 of the recipe lowered to 40: the set has 40 usable samples" in capsys.readouterr().err
    assert run(arguments(data, tmp_path / "other", batch=48)) == 2
    assert "--batch-size 48 is more than the 40 usable samples" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_accumulation_changes_nothing_that_is_learnt(data, tmp_path):
    """DINO's loss is a mean over images, so that micro-batches add up; its centre and teacher move once a step.

    BatchNorm, which the recipe has in the head, would see each micro-batch alone.
    """
    for parts in (1, 2, 4):
        how = {"run__accumulation": parts, "optim__name": "sgd", "optim__lr": 0.1}
        how |= {"method__drop_path": 0.0, "method__head_norm": "none"}
        train(data, tmp_path / str(parts), "dino", steps=3, **how)
    for parts in (2, 4):
        ours, theirs = final(tmp_path / str(parts)), final(tmp_path / "1")
        torch.testing.assert_close(ours.method, theirs.method, rtol=1e-4, atol=1e-6)
        for line, expected in zip(metrics(tmp_path / str(parts))[1:-1], metrics(tmp_path / "1")[1:-1], strict=True):
            line.pop("feature_std")  # of the images of one micro-batch
            assert line == pytest.approx({name: expected[name] for name in line}, rel=1e-4)


@pytest.mark.parametrize("method", ["simclr", "barlow-twins", "byol", "moco-v3", "mae", "mixed-ae"])
def test_the_other_methods_go_on_exactly_with_accumulation(data, tmp_path, method):
    how = {"steps": 4, "run__accumulation": 2, "checkpoint__every": 2}
    train(data, tmp_path / "a", method, **how)
    train(data, tmp_path / "b", method, **how)
    rewind(tmp_path / "b", 2)
    train(data, tmp_path / "b", method, **how)
    assert_same_run(tmp_path / "b", tmp_path / "a")


def keys_of_step(data, step, batch=8):
    """What the step of a run of seed 0 trains on, from the order alone."""
    from trainer.data.order import EpochOrder
    from trainer.data.rows import Rows

    epoch, inside = divmod(step, 40 // batch)
    items = EpochOrder(0, epoch, 40).items(np.arange(inside * batch, (inside + 1) * batch))
    return Rows.open(data).keys(items)


ABSURD = {"optim__name": "sgd", "optim__lr": 1e30, "optim__clip": None, "optim__warmup_epochs": 0}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_divergence_ends_the_run_and_says_on_what(data, tmp_path, capsys, accumulation):
    out = tmp_path / "run"
    how = {"steps": 50, "checkpoint__every": 1, "run__accumulation": accumulation, **ABSURD}
    assert run(arguments(data, out, **how)) == 4
    message = capsys.readouterr().err
    found, offenders = results(out), json.loads((out / "offenders.json").read_text())
    assert found["state"] == "collapsed"
    assert offenders["reason"] in found["reason"]
    assert "not finite" in offenders["reason"]
    assert f"{offenders['step']}" in offenders["reason"]
    assert sorted(offenders["keys"]) == sorted(keys_of_step(data, offenders["step"] - 1))
    assert str(out / "offenders.json") in message
    assert "lower optim.lr" in message
    saved = checkpoint.newest(out / "checkpoints")[0]
    assert saved is None or all(value.isfinite().all() for value in saved.method.values())
    assert run(arguments(data, out, **how)) == 2, "the same would happen again"
    assert "another --out" in capsys.readouterr().err


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(data, tmp_path):
    """A weight decay of 1e30 * 1e30 overflows the weights in the very step whose loss is still finite."""
    out = tmp_path / "run"
    with pytest.raises(CollapsedError, match="the weights are not finite after step 1"):
        train(data, out, steps=1, optim__weight_decay=1e30, **ABSURD)
    assert checkpoint.steps_in(out / "checkpoints") == []
    offenders = json.loads((out / "offenders.json").read_text())
    assert sorted(offenders["keys"]) == sorted(keys_of_step(data, 0))


def same_everywhere(data, out, **how):
    """A run whose encoder is told to learn nothing but one and the same features: decay takes its weights to 0."""
    decay = {"optim__name": "sgd", "optim__lr": 1e-9, "optim__weight_decay": 1e9, "optim__momentum": 0}
    return train(data, out, optim__warmup_epochs=0, optim__reference_batch=None, **decay, **how)


def test_a_collapse_ends_the_run(data, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(CollapsedError, match="the same features") as caught:
        same_everywhere(data, out, steps=30)
    assert caught.value.exit_code == 4
    found = results(out)
    assert (found["state"], found["steps"]) == ("collapsed", json.loads((out / "offenders.json").read_text())["step"])
    assert metrics(out)[-1]["feature_std"] < 1e-3
    assert found["steps"] >= 6, "not at the first suspicion"


def test_suspicions_survive_a_restart(data, tmp_path):
    steps = []
    for name in ("a", "b"):
        out = tmp_path / name
        with pytest.raises(CollapsedError):
            same_everywhere(data, out, steps=30, checkpoint__every=1, checkpoint__keep=30)
        if name == "b":
            rewind(out, results(out)["steps"] - 2)
            assert final(out).suspicions > 0
            with pytest.raises(CollapsedError):
                same_everywhere(data, out, steps=30)
        steps.append(results(out)["steps"])
    assert steps[0] == steps[1]


def test_an_image_that_cannot_be_read_ends_the_run_with_its_key(tmp_path, capsys):
    data = write_pairs(tmp_path / "set", 16, real_data=b"no image at all")
    assert run(arguments(data, tmp_path / "run", evaluation__queries=2)) not in (0, 75)
    message = capsys.readouterr().err
    assert re.search(r"\bk[0-9]+\b", message.splitlines()[-1]), message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [
        ({"encoder__name": "resnet9"}, "has no model 'resnet9'", 2),
        ({"encoder__args__dept": 3}, "did you mean 'depth'", 2),
        ({"views__size": 36}, "36", 2),
        ({"method__temprature": 3}, "did you mean 'method.temperature'?", 2),
        ({"run__accumulation": 3}, "cannot be cut equally", 2),
        ({"init": "nowhere.pt"}, "nowhere.pt", 2),
    ],
)
def test_mistakes_are_errors_without_a_traceback(data, tmp_path, capsys, change, said, code):
    given = arguments(data, tmp_path / "run", **change)
    if "encoder__name" in change:
        given[given.index("--encoder") + 1] = change["encoder__name"]
    assert run(given) == code
    message = capsys.readouterr().err
    assert said in message
    assert message.splitlines()[-1].startswith("error: ")


def test_no_set_at_all(tmp_path, capsys):
    assert run(arguments(tmp_path / "nowhere", tmp_path / "run")) != 0
    assert "nowhere" in capsys.readouterr().err


def test_a_set_without_labels_trains_without_knn(tmp_path):
    data = write_pairs(tmp_path / "set", 16, labelled=False)
    train(data, tmp_path / "run", steps=2)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    assert results(tmp_path / "run")["knn"] is None


def test_a_folder_in_use_is_refused(data, tmp_path):
    from trainer.engine.run_folder import RunFolder

    with RunFolder(tmp_path / "run").locked(), pytest.raises(DiffmixError, match="is in use by process"):
        train(data, tmp_path / "run")


def test_a_checkpoint_of_another_network_is_refused(data, tmp_path):
    train(data, tmp_path / "run", "barlow-twins", steps=1)
    path = tmp_path / "copied.pt"
    path.write_bytes((tmp_path / "run" / "checkpoints" / checkpoint.name_of(1)).read_bytes())
    with pytest.raises(DiffmixError, match="is of another method, encoder or optimiser"):
        train(data, tmp_path / "new", "simclr", steps=3, resume=str(path))


def test_pictures_differ():
    assert (picture(1, -1) != picture(2, -1)).any(), "or nothing above means anything"


def test_batches_that_a_method_cannot_take_are_refused_before_anything_is_made(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(arguments(data, out, "mixed-ae", batch=6)) == 2
    assert "6 images, the micro-batch of a process, cannot be cut into groups of 4" in capsys.readouterr().err
    assert not out.exists()
