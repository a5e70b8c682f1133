"""What goes on in a folder that holds something already: exactly as before, or not at all."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from manifests.errors import DiffmixError, UsageError
from tests.trainer.finetune.small import results, run, write_task
from trainer.engine.run_folder import RunFolder
from trainer.finetune.command import _check_reach

TASKS = ("colours", "two")
LORA = "lora-2-lr0.02-seed0"


def weights(folder):
    return {file.name: load_file(file) for file in sorted(folder.rglob("*.safetensors"))}


def unfinished(out, leg):
    """As if the run had been killed before the end of its last task."""
    for file in (out / "results.json", out / leg / "results.json"):
        file.unlink()
    shutil.rmtree(out / leg / "02-two")


@pytest.fixture(scope="module")
def sequence(init, colours, more_colours, tmp_path_factory):
    """A sequence with an adapter for each task; a copy of it is made for each test."""
    out = tmp_path_factory.mktemp("sequence") / "out"
    run(init, out, [colours, more_colours], ("lora:2",), steps=3, adapters="per-task")
    return out


@pytest.fixture
def again(sequence, init, colours, more_colours, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(sequence, out)
    return out, lambda: run(init, out, [colours, more_colours], ("lora:2",), steps=3, adapters="per-task")


def test_a_later_adapter_begins_as_in_an_undisturbed_run(sequence, again):
    out, go_on = again
    unfinished(out, LORA)
    torch.manual_seed(123)
    go_on()
    mine, theirs = (weights(folder / LORA / "02-two") for folder in (out, sequence))
    assert mine.keys() == theirs.keys() == {"adapter_model.safetensors", "head.safetensors"}
    for file, tensors in theirs.items():
        assert all(torch.equal(mine[file][name], tensor) for name, tensor in tensors.items()), file
    assert results(out)["tuners"][0]["accuracy_matrix"] == results(sequence)["tuners"][0]["accuracy_matrix"]


def test_a_damaged_head_is_named(again):
    out, go_on = again
    unfinished(out, LORA)
    head = out / LORA / "01-colours" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:50])
    with pytest.raises(DiffmixError, match=r"head\.safetensors is damaged .* run the same command again"):
        go_on()


def test_other_images_than_at_the_start_are_refused(init, tmp_path):
    task, out = write_task(tmp_path / "task", 60), tmp_path / "out"
    run(init, out, [task], steps=2)
    (out / "results.json").unlink()
    added = np.zeros((16, 16, 3), np.uint8)
    Image.fromarray(added).save(tmp_path / "task" / "red" / "added.png")
    with pytest.raises(UsageError, match="begun with another task task than"):
        run(init, out, [task], steps=2)
    (tmp_path / "task" / "red" / "added.png").unlink()
    assert run(init, out, [task], steps=2).state == "finished"


def test_another_encoder_at_the_same_place_is_refused(init, colours, tmp_path):
    other, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(init, other)
    run(str(other), out, [colours], steps=2)
    file = other / "encoder" / "model.safetensors"
    state = load_file(file)
    save_file({name: value + name.endswith("norm.bias") for name, value in state.items()}, file)
    with pytest.raises(UsageError, match="begun with another encoder than"):
        run(str(other), out, [colours], steps=2)


def test_a_diverged_leg_leaves_no_restart_points(init, colours, tmp_path):
    wild = ["optim.name=sgd", "rates.learning_rates.full=[3e4]", "checkpoint.every=1"]
    out = tmp_path / "out"
    assert run(init, out, [colours], ("full",), steps=40, settings=wild).state == "diverged"
    [metrics] = out.glob("*/*/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) > 2, "it went on for some steps, each of them saved"
    assert not list(out.rglob("*.pt"))


def test_a_folder_that_another_process_does_not_see_is_refused(tmp_path):
    with pytest.raises(UsageError, match="choose an --out that they share"):
        _check_reach(RunFolder(tmp_path / "elsewhere"))


def test_an_encoder_that_gives_nothing_finite_is_refused(init, colours, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(init, broken)
    file = broken / "encoder" / "model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="features are not finite"):
        run(str(broken), tmp_path / "out", [colours])


def test_the_state_of_a_diverged_comparison_is_told_as_json(init, colours, tmp_path, capsys):
    from tests.trainer.finetune.small import arguments
    from trainer import cli

    wild = ["optim.name=sgd", "rates.learning_rates.full=[1e30]"]
    assert cli.run([*arguments(init, tmp_path / "out", [colours], ("full",), settings=wild), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["state"] == "diverged"
