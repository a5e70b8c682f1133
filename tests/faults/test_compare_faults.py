"""Comparisons that are killed, stopped, or shared among jobs or ranks end as those that are left alone."""

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.training import Training, free_port, srun
from tests.trainer.compare.small import ARMS, arguments, rows, write_recipe
from tests.trainer.data.builders import write_pairs

STEPS, SEEDS, NAMES = 6, 2, ("real", "pairs", "barlow")
FOLDERS = [f"{name}-{seed}" for seed in range(SEEDS) for name in NAMES]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pair set and a recipe."""
    folder = tmp_path_factory.mktemp("made")
    return write_pairs(folder / "pairs", 60), write_recipe(folder, NAMES)


@pytest.fixture
def start(forks, made, tmp_path, running):
    """Start `trainer compare` in a folder."""

    def call(out, environment=None, recipe=None, settings=("checkpoint.every=2",)):
        data, own = made
        given = arguments(data, out, recipe or own, steps=STEPS, seeds=SEEDS, settings=settings)
        running.append(Training(forks, given, environment or {}, tmp_path / f"log-{len(running)}.txt"))
        return running[-1]

    return call


@pytest.fixture(scope="module")
def undisturbed(forks, made, tmp_path_factory):
    """Folder of the comparison that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    given = arguments(made[0], folder / "out", made[1], steps=STEPS, seeds=SEEDS)
    command = Training(forks, given, {}, folder / "log.txt")
    assert command.wait() == 0, command.log.read_text()
    return folder / "out"


def weights(out):
    return {name: load_file(out / name / "encoder" / "model.safetensors") for name in FOLDERS}


def assert_same(out, reference):
    assert rows(out) == rows(reference)
    mine = weights(out)
    for name, tensors in weights(reference).items():
        assert all(torch.equal(mine[name][key], tensor) for key, tensor in tensors.items()), name


def lines(out):
    return sum(len(file.read_text().splitlines()) for file in out.glob("*/metrics.jsonl"))


def begun(commands):
    """The runs that were trained from their first step on, by any of the commands."""
    return [name for command in commands for name in re.findall(r"run folder .*/(\S+)\n", command.log.read_text())]


def test_kill_9_at_any_moment_then_the_same_command(start, undisturbed, tmp_path):
    out, whole = tmp_path / "out", lines(undisturbed)
    for share in (0.05, 0.3, 0.55, 0.85):
        command = start(out)
        assert command.wait_until(lambda share=share: lines(out) >= share * whole)
        command.kill()
        assert command.wait() == -signal.SIGKILL
    last = start(out)
    assert last.wait() == 0
    assert "going on in" in last.log.read_text() or len(begun([last])) < len(FOLDERS)
    assert_same(out, undisturbed)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGUSR1, signal.SIGINT))],
    ids=lambda number: number.name,
)
def test_signals_save_and_exit_75(start, undisturbed, tmp_path, number):
    out = tmp_path / "out"
    command = start(out)
    assert command.wait_until(lambda: lines(out) > 12)
    command.kill(number)
    assert command.wait() == 75, command.log.read_text()
    assert "go on with the same command" in command.log.read_text()
    again = start(out)
    assert again.wait() == 0
    assert_same(out, undisturbed)


def test_a_signal_while_steps_are_timed(start, tmp_path):
    out = tmp_path / "out"
    command = start(out)
    assert command.wait_until(lambda: command.log.exists() and "ms a step" in command.log.read_text())
    command.kill(signal.SIGTERM)
    assert command.wait() == 75, command.log.read_text()


def test_two_jobs_share_the_runs(start, undisturbed, tmp_path):
    out = tmp_path / "out"
    jobs = [start(out), start(out)]
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].log.read_text() + jobs[1].log.read_text()
    assert sorted(begun(jobs)) == sorted(FOLDERS), "each was trained once"
    assert json.loads((out / "results.json").read_text())["state"] == "finished", "by whoever came last"
    assert_same(out, undisturbed)
    assert len({job.log.read_text().count("ms a step") for job in jobs} & {0, len(NAMES)}) == 2, "one has timed"


def test_two_ranks_do_what_one_does(start, made, tmp_path):
    """Several runs in one process group, one rank that speaks."""
    plain = {"head_norm": "none", "hidden_dim": 32, "out_dim": 16}  # BatchNorm's statistics are each rank's own on CPUs
    optim = {"name": "sgd", "lr": 0.1}  # AdamW makes large differences of small ones
    recipe = write_recipe(
        tmp_path, {name: {**ARMS[name], "method": plain, "optim": optim} for name in ("real", "pairs")}
    )
    alone = start(tmp_path / "alone", recipe=recipe)
    assert alone.wait() == 0, alone.log.read_text()
    port = free_port()
    ranks = [start(tmp_path / "ranks", srun(rank, port), recipe=recipe) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].log.read_text() + ranks[1].log.read_text()
    assert ranks[1].log.read_text().count("Budget of every run") == 0, "one rank speaks"
    for mine, theirs in zip(rows(tmp_path / "ranks"), rows(tmp_path / "alone"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["knn_before"] == theirs["knn_before"]
        assert mine["feature_rank"] == pytest.approx(theirs["feature_rank"], rel=1e-3)
