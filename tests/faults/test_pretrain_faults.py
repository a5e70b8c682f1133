"""Training that is killed, stopped, or shared among ranks ends with the weights of training that is left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.training import Training, free_port, srun
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import (
    arguments,
    assert_same_run,
    assert_same_state,
    final,
    metrics,
    results,
)
from trainer.engine import checkpoint

STEPS = 8
DINO = {"method": "dino", "steps": STEPS, "checkpoint__every": 2}  # with dropped paths, a centre and a teacher
SIMCLR = {"method": "simclr", "steps": STEPS, "checkpoint__every": 2, "run__accumulation": 2}
# Ranks drop different paths and have BatchNorm statistics of their own; AdamW makes large differences of small ones.
RANKED = {**DINO, "method__drop_path": 0.0, "method__head_norm": "none", "optim__name": "sgd", "optim__lr": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set", 40)


@pytest.fixture
def start(forks, data, tmp_path, running):
    """Start `trainer pretrain` in a folder: `start(out, environment, **settings)`."""

    def call(out, environment=None, **how):
        given = arguments(data, out, **how)
        running.append(Training(forks, given, environment or {}, tmp_path / f"log-{len(running)}.txt"))
        return running[-1]

    return call


@pytest.fixture(scope="module")
def undisturbed(forks, data, tmp_path_factory):
    """`undisturbed(settings)`: the folder of a run that nobody disturbs, and its seconds; each is made once."""
    made = {}

    def call(how):
        name = json.dumps(how)
        if name not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            if not made:
                # On a new machine the first run compiles the image kernels: its time would be no measure of the others.
                warm_up = Training(forks, arguments(data, folder / "warm-up", **how), {}, folder / "warm-up.txt")
                assert warm_up.wait() == 0, warm_up.log.read_text()
            started = time.monotonic()
            command = Training(forks, arguments(data, folder / "run", **how), {}, folder / "log.txt")
            assert command.wait() == 0, command.log.read_text()
            made[name] = folder / "run", time.monotonic() - started
        return made[name]

    return call


def has_steps(out, steps):
    """Whether so many steps are in the log."""

    def look():
        path = out / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) > steps

    return look


@pytest.mark.parametrize("how", [DINO, SIMCLR], ids=["dino", "simclr-accumulated"])
def test_kill_9_at_any_moment_then_the_same_command(start, undisturbed, tmp_path, how):
    reference, seconds = undisturbed(how)
    draw = random.Random(0)
    out, kills, went_on = tmp_path / "run", 0, 0
    while kills < 3:
        command = start(out, **how)
        command.process.join(draw.uniform(0.4, 0.95) * seconds)
        if command.process.exitcode is None:
            command.kill()
        code = command.wait()
        went_on += "going on in" in command.log.read_text()
        if code == 0:  # start over, so that kills fall everywhere and not only on the last steps
            assert_same_run(out, reference)
            out = tmp_path / f"run-{kills}-{seconds:.3f}"
            seconds *= 0.8  # it was faster than the one that was measured
        else:
            assert code == -signal.SIGKILL, command.log.read_text()
            kills += 1
    assert start(out, **how).wait() == 0
    assert_same_run(out, reference)
    assert results(out)["loss"] == results(reference)["loss"]


def test_kill_9_while_a_checkpoint_is_written(start, undisturbed, tmp_path):
    reference, _ = undisturbed(DINO)
    out = tmp_path / "run"
    command = start(out, **DINO)
    folder = out / "checkpoints"
    assert command.wait_until(lambda: folder.exists() and os.listdir(folder))
    command.kill()
    command.wait()
    assert start(out, **DINO).wait() == 0
    assert_same_run(out, reference)
    assert sorted(os.listdir(folder)) == [checkpoint.name_of(STEPS - 2), checkpoint.name_of(STEPS)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_signals_save_and_exit_75(start, undisturbed, tmp_path, number):
    how = {**DINO, "checkpoint__every": 0}
    reference, _ = undisturbed(DINO)
    out = tmp_path / "run"
    command = start(out, **how)
    assert command.wait_until(has_steps(out, 2))
    command.kill(number)
    assert command.wait() == 75, command.log.read_text()
    saved = final(out)
    assert 2 <= saved.step < STEPS
    assert metrics(out)[-1]["step"] == saved.step
    assert f"stopped at step {saved.step}" in command.log.read_text()
    assert not (out / "results.json").exists()
    again = start(out, **how)
    assert again.wait() == 0
    assert f"from step {saved.step}" in again.log.read_text()
    assert_same_run(out, reference)


def test_a_second_job_in_the_same_folder_is_refused(start, tmp_path):
    how = {**DINO, "steps": 100_000}
    out = tmp_path / "run"
    first = start(out, **how)
    assert first.wait_until(has_steps(out, 1))
    second = start(out, **how)
    assert second.wait() == 1
    assert f"is in use by process {first.process.pid} on " in second.log.read_text()
    first.kill(signal.SIGTERM)
    assert first.wait() == 75, "the second did the first no harm"


def start_ranks(start, out, **how):
    port = free_port()
    return [start(out, srun(rank, port), **how) for rank in range(2)]


def wait_all(commands):
    return [command.wait() for command in commands]


def test_two_tasks_of_srun_then_one_process_then_two(start, undisturbed, tmp_path):
    """A signal to one rank stops all of them at one step; any number of ranks goes on."""
    reference, _ = undisturbed(RANKED)
    out = tmp_path / "run"
    ranks = start_ranks(start, out, **RANKED)
    assert ranks[0].wait_until(has_steps(out, 1))
    ranks[1].kill(signal.SIGTERM)
    assert wait_all(ranks) == [75, 75], ranks[0].log.read_text() + ranks[1].log.read_text()
    assert "stopped at step" not in ranks[1].log.read_text(), "one rank speaks"
    stopped = final(out).step
    alone = start(out, **RANKED)
    assert alone.wait_until(has_steps(out, stopped + 1))
    alone.kill(signal.SIGUSR1)
    assert alone.wait() == 75
    assert stopped < final(out).step < STEPS
    ranks = start_ranks(start, out, **RANKED)
    assert wait_all(ranks) == [0, 0], ranks[0].log.read_text() + ranks[1].log.read_text()
    assert_same_state(final(out), final(reference), rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in metrics(out)] == [line["step"] for line in metrics(reference)]
    for ours, theirs in zip(metrics(out)[1:-1], metrics(reference)[1:-1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), "the log is of all ranks"


def test_a_killed_rank_ends_the_others_and_the_run_can_go_on(start, undisturbed, tmp_path):
    reference, _ = undisturbed(RANKED)
    out = tmp_path / "run"
    ranks = start_ranks(start, out, **RANKED)
    assert ranks[0].wait_until(has_steps(out, 4))
    ranks[1].kill()
    assert ranks[0].wait(60) == 1, "rank 0 does not wait for ever"
    text = ranks[0].log.read_text()
    assert "error: another process of this run has ended" in text
    assert "Traceback" not in text
    assert start(out, **RANKED).wait() == 0
    assert_same_state(final(out), final(reference), rtol=1e-4, atol=1e-5)


def test_divergence_on_ranks_names_the_keys_of_all(start, tmp_path):
    out = tmp_path / "run"
    how = {"method": "simclr", "optim__name": "sgd", "optim__lr": 1e30, "optim__warmup_epochs": 0, "steps": 9}
    ranks = start_ranks(start, out, **how)
    assert wait_all(ranks) == [4, 4], ranks[0].log.read_text() + ranks[1].log.read_text()
    assert results(out)["state"] == "collapsed"
    assert len(set(json.loads((out / "offenders.json").read_text())["keys"])) == 8


def test_torchrun_trains_as_one_process_does(data, undisturbed, tmp_path):
    how = {"method": "simclr", "steps": 3, "method__head_norm": "none", "optim__name": "sgd", "optim__lr": 0.1}
    reference, _ = undisturbed(how)
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "trainer", *arguments(data, out, **how), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "finished", "one rank speaks, and JSON alone is on stdout"
    assert_same_state(final(out), final(reference), rtol=1e-4, atol=1e-5)
    assert json.loads((out / "environment.json").read_text())["world_size"] == 2
