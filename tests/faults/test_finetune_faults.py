"""Comparisons that are killed, stopped, or shared among ranks end as those that are left alone."""

import json
import random
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.training import Training, free_port, srun
from tests.trainer.data.builders import write_pairs
from tests.trainer.finetune.small import arguments, pretrained, results, write_task

PEFT = ("lora:2", "block-expansion:1")
# All that draws random numbers in a step.
DRAWING = ("tuner.lora_dropout=0.2", "encoder.args.drop_path_rate=0.2", "images.mixup=0.8", "images.cutmix=1")
DRAWING += ("images.random_erasing=0.25", "images.label_smoothing=0.1", "optim.layer_decay=0.7")
HOW = {"steps": 8, "settings": ("checkpoint.every=3", *DRAWING)}
TIMING = ("seconds",)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder and two tasks."""
    folder = tmp_path_factory.mktemp("made")
    tasks = [write_task(folder / "colours", 90), write_task(folder / "two", 60, ("blue", "red"), seed=1)]
    return pretrained(write_pairs(folder / "pairs", 60), folder / "run"), tasks


@pytest.fixture
def start(forks, made, tmp_path, running):
    """Start `trainer finetune` in a folder."""

    def call(out, environment=None, peft=PEFT, **how):
        init, tasks = made
        given = arguments(init, out, tasks, peft, **{**HOW, **how})
        running.append(Training(forks, given, environment or {}, tmp_path / f"log-{len(running)}.txt"))
        return running[-1]

    return call


@pytest.fixture(scope="module")
def undisturbed(forks, made, tmp_path_factory):
    """`undisturbed(**how)`: the folder of a comparison that nobody disturbs; each is made once."""
    kept = {}

    def call(peft=PEFT, **how):
        name = json.dumps([peft, how])
        if name not in kept:
            folder = tmp_path_factory.mktemp("undisturbed")
            init, tasks = made
            given = arguments(init, folder / "out", tasks, peft, **{**HOW, **how})
            command = Training(forks, given, {}, folder / "log.txt")
            assert command.wait() == 0, command.log.read_text()
            kept[name] = folder / "out"
        return kept[name]

    return call


def rows(out):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in results(out)["tuners"]]


def weights(out):
    """Everything that was saved of the adapters and heads, by its file's place."""
    files = sorted(file for file in out.glob("*/0*/**/*.safetensors"))
    return {str(file.relative_to(out)): load_file(file) for file in files}


def assert_same(out, reference, **tolerance):
    mine, theirs = weights(out), weights(reference)
    assert mine.keys() == theirs.keys()
    assert len(mine) == 2 * 2 * 2, "an adapter and a head for two tuners and two tasks"
    for file, tensors in mine.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, theirs[file][name], **({"rtol": 0, "atol": 0} | tolerance))


def steps_of(out):
    return sum(len(file.read_text().splitlines()) for file in out.glob("*/*/metrics.jsonl"))


def test_kill_9_at_any_moment_then_the_same_command(start, undisturbed, tmp_path):
    reference = undisturbed()
    lines = steps_of(reference)
    draw = random.Random(1)
    out = tmp_path / "out"
    for share in (0.2, 0.4, 0.6, 0.8):
        wanted = (share + draw.uniform(-0.08, 0.08)) * lines
        command = start(out)
        assert command.wait_until(lambda wanted=wanted: steps_of(out) >= wanted)
        command.kill()
        assert command.wait() == -signal.SIGKILL
        assert not (out / "results.json").exists()
    assert start(out).wait() == 0
    assert rows(out) == rows(reference)
    assert_same(out, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_signals_save_and_exit_75(start, undisturbed, tmp_path, number):
    reference = undisturbed()
    out = tmp_path / "out"
    command = start(out)
    assert command.wait_until(lambda: steps_of(out) > 14)
    command.kill(number)
    assert command.wait() == 75, command.log.read_text()
    assert "go on with the same command" in command.log.read_text()
    again = start(out)
    assert again.wait() == 0
    assert "going on from step" in again.log.read_text()
    assert rows(out) == rows(reference)
    assert_same(out, reference)


def test_what_one_rank_cannot_write_ends_both(start, tmp_path):
    out, port = tmp_path / "out", free_port()
    (out / "linear-lr0.2-seed0" / "results.json").mkdir(parents=True)
    ranks = [start(out, srun(rank, port), peft=("linear", "lora:2"), steps=2) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "cannot write" in ranks[0].log.read_text()


def test_two_ranks_regularise_each_its_own_part_and_go_on(start, tmp_path):
    how = {"peft": ("full",), "settings": ("encoder.args.global_pool=token", "checkpoint.every=2", *DRAWING)}

    def ranks(out):
        port = free_port()
        return [start(out, srun(rank, port), **how) for rank in range(2)]

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert [rank.wait() for rank in ranks(whole)] == [0, 0]
    pair = ranks(out)
    assert pair[0].wait_until(lambda: steps_of(out) > 6)
    pair[0].kill(signal.SIGTERM)
    assert [rank.wait() for rank in pair] == [75, 75], pair[0].log.read_text()
    assert [rank.wait() for rank in ranks(out)] == [0, 0]
    mine, theirs = weights(out), weights(whole)
    assert all(torch.equal(mine[file][name], value) for file in theirs for name, value in theirs[file].items())


def test_two_ranks_do_what_one_does(start, undisturbed, tmp_path):
    how = {"settings": ("optim.name=sgd", "rates.learning_rates.default=[0.05]"), "at": "0,2"}
    reference = undisturbed(**how)
    out, port = tmp_path / "out", free_port()
    ranks = [start(out, srun(rank, port), **how) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].log.read_text() + ranks[1].log.read_text()
    assert "new task" not in ranks[1].log.read_text(), "one rank speaks"
    assert_same(out, reference, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(rows(out), rows(reference), strict=True):
        assert mine["trainable_parameters"] == theirs["trainable_parameters"]
        assert mine["new_accuracy"] == pytest.approx(theirs["new_accuracy"], abs=0.11), "at most an image on the edge"
