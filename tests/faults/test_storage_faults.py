"""Targets that fail: full, read-only, unwritable. Clear words, no half files, and the same command again goes on."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import rows_of
from tests.faults.test_kills import assert_same_set


@pytest.fixture
def mounted(tmp_path):
    """Mount a small file system: `mounted(options)`; skips where that is not allowed."""
    folders = []

    def call(options):
        folder = tmp_path / f"mount-{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        folders.append(folder)
        return folder

    yield call
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_space(start, undisturbed, mounted):
    reference, _ = undisturbed
    disk = mounted("size=150k")
    command = start(disk / "set")
    assert command.wait() == 1
    log = command.log.read_text()
    assert "no space left" in log
    assert "Traceback" not in log
    assert not [name for name in os.listdir(disk / "set") if name.startswith(".")]
    subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
    assert start(disk / "set").wait() == 0
    assert_same_set(disk / "set", reference)


def test_a_read_only_target_is_named(start, mounted):
    disk = mounted("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    command = start(disk / "set")
    assert command.wait() == 1
    log = command.log.read_text()
    assert "Read-only file system" in log
    assert "--out" in log
    assert "Traceback" not in log


def test_an_unwritable_part_leaves_its_shard_uncommitted(start, undisturbed, tmp_path):
    """A folder where a part should go: the tar is written, the commit fails, nothing else is harmed."""
    reference, _ = undisturbed
    folder = tmp_path / "set"
    command = start(folder)
    assert command.wait_until(lambda: (folder / "plan.json").exists())
    (folder / "pairs-000005.parquet.blocked").mkdir()
    blocked = folder / "pairs-000005.parquet"
    (folder / "pairs-000005.parquet.blocked").rename(blocked)
    (blocked / "in the way").touch()
    code = command.wait()
    assert code == 1, command.log.read_text()
    assert "Traceback" not in command.log.read_text()
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    shutil.rmtree(blocked)
    assert start(folder).wait() == 0
    assert_same_set(folder, reference)


def test_a_target_that_is_a_file_is_named(start, tmp_path):
    (tmp_path / "set").write_text("a file")
    command = start(tmp_path / "set")
    assert command.wait() in (1, 2)
    log = command.log.read_text()
    assert str(tmp_path / "set") in log
    assert "Traceback" not in log


def test_temporaries_of_another_host_are_left_alone_until_the_set_is_complete(start, undisturbed, tmp_path):
    reference, _ = undisturbed
    folder = tmp_path / "set"
    folder.mkdir()
    foreign = folder / ".pairs-000001.tar@another-host.123.0abc.tmp"
    foreign.write_bytes(b"half a shard")
    command = start(folder)
    assert command.wait_until(lambda: (folder / "pairs-000000.parquet").exists())
    assert foreign.exists()
    assert command.wait() == 0
    assert not foreign.exists()
    assert_same_set(folder, reference)
    assert len(rows_of(folder)) == 23
