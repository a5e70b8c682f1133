"""kill -9, signals and rivals at any moment: nothing lost, nothing twice, the same set in the end."""

import os
import random
import signal
import time

import psutil
import pytest

from tests.conftest import file_bytes, rows_of


def committed(folder):
    """Identity of every file of every committed shard."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    shards = [name[:-8] for name in names if name.startswith("pairs-") and name.endswith(".parquet")]
    found = {}
    for shard in shards:
        for suffix in (".parquet", ".tar"):
            facts = os.stat(os.path.join(folder, shard + suffix))
            found[shard + suffix] = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
    return found


def assert_same_set(folder, reference):
    """Equal rows and tars, and nothing else in the folder."""
    assert rows_of(folder) == rows_of(reference)
    ours, theirs = file_bytes(folder), file_bytes(reference)
    assert ours.keys() == theirs.keys(), "a finished set holds the listed files and no temporaries"
    assert all(ours[name] == theirs[name] for name in ours if name.endswith(".tar"))


def test_kill_9_at_any_moment_then_the_same_command(start, undisturbed, tmp_path):
    reference, seconds = undisturbed
    draw = random.Random(0)
    folder = tmp_path / "set"
    kills = 0
    before = {}
    while kills < 14:
        command = start(folder)
        command.process.join(draw.uniform(0.25, 0.95) * seconds)
        if command.process.exitcode is None:
            command.kill()
        code = command.wait()
        after = committed(folder)
        assert before.items() <= after.items(), "finished shards are untouched"
        before = after
        if code == 0:
            # Finished: start over, so that kills fall everywhere and not only on the last shards.
            assert_same_set(folder, reference)
            folder, before = tmp_path / f"set-{kills}", {}
        else:
            assert code == -signal.SIGKILL
            kills += 1
    assert start(folder).wait() == 0
    assert_same_set(folder, reference)


def test_kill_9_right_after_each_file_appears(start, undisturbed, tmp_path):
    reference, _ = undisturbed
    for number, name in enumerate(["plan.json", "pairs-000000.tar", "pairs-000000.parquet", "pairs-000005.parquet"]):
        folder = tmp_path / f"set-{number}"
        command = start(folder)
        command.wait_until(lambda path=folder / name: path.exists())
        command.kill()
        command.wait()
        assert start(folder).wait() == 0
        assert_same_set(folder, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_signals_drop_the_shard_in_progress_and_exit_75(start, undisturbed, tmp_path, number):
    reference, _ = undisturbed
    folder = tmp_path / "set"
    command = start(folder)
    assert command.wait_until(lambda: (folder / "pairs-000001.parquet").exists())
    command.kill(number)
    assert command.wait() == 75
    assert "run the same command again" in command.log.read_text()
    assert not [name for name in os.listdir(folder) if name.startswith(".")], "no temporary is left"
    assert not (folder / "manifest.parquet").exists()
    assert start(folder).wait() == 0
    assert_same_set(folder, reference)


def test_two_runs_at_the_same_time_do_no_harm(start, undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / "set"
    commands = [start(folder), start(folder)]
    assert [command.wait() for command in commands] == [0, 0], commands[0].log.read_text() + commands[1].log.read_text()
    assert_same_set(folder, reference)


def test_ranks_that_start_at_different_times_or_never(start, undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / "set"
    first = start(folder, "--engine", "ranks", RANK="0", WORLD_SIZE="3")
    time.sleep(0.7)
    late = start(folder, "--engine", "ranks", RANK="2", WORLD_SIZE="3")
    assert [first.wait(), late.wait()] == [0, 0], first.log.read_text() + late.log.read_text()
    assert_same_set(folder, reference)


def test_a_killed_rank_is_made_up_for_by_the_others(start, undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / "set"
    ranks = [start(folder, "--engine", "ranks", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    ranks[0].wait_until(lambda: folder.exists() and any(name.endswith(".tmp") for name in os.listdir(folder)))
    ranks[0].kill()
    assert ranks[1].wait() == 0
    assert_same_set(folder, reference)


def test_a_killed_worker_is_replaced(start, undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / "set"
    command = start(folder, "--workers", "2")
    assert command.wait_until(lambda: folder.exists() and any("pairs-" in name for name in os.listdir(folder)))
    victim = next(
        child
        for child in psutil.Process(command.process.pid).children()
        if "resource_tracker" not in " ".join(child.cmdline())
    )
    victim.kill()
    assert command.wait() == 0, command.log.read_text()
    assert_same_set(folder, reference)


def test_workers_end_with_their_killed_parent(start, undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / "set"
    command = start(folder, "--workers", "2")
    assert command.wait_until(lambda: folder.exists() and any("pairs-" in name for name in os.listdir(folder)))
    children = psutil.Process(command.process.pid).children(recursive=True)
    command.kill()
    command.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert start(folder).wait() == 0
    assert_same_set(folder, reference)


def test_a_stopped_crew_leaves_nothing_behind(start, tmp_path):
    folder = tmp_path / "set"
    command = start(folder, "--workers", "2")
    assert command.wait_until(lambda: folder.exists() and any("pairs-" in name for name in os.listdir(folder)))
    command.kill(signal.SIGTERM)
    assert command.wait() == 75
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
