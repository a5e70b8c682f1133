from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import layout


@given(st.integers(0, 10**9))
def test_shard_names_are_read_back(shard: int):
    assert layout.shard_of(layout.tar_name(shard), "tar") == shard
    assert layout.shard_of(layout.part_name(shard), "parquet") == shard
    assert layout.shard_of(layout.tar_name(shard), "parquet") is None
    assert layout.looks_like_shard(layout.tar_name(shard))


@pytest.mark.parametrize(
    "name", ["pairs-1.tar", "pairs-0000001.tar", "pairs-00000١.tar", "pairs-000001.tar\n", "x.tar"]
)
def test_other_names_are_no_shards(name: str):
    assert layout.shard_of(name, "tar") is None


@given(st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=40))
def test_temporaries_are_read_back(target: str):
    name = layout.temporary_name(target)
    assert name.startswith(".") and not name.endswith((".tar", ".parquet")) and "/" not in name
    assert not layout.looks_like_shard(name)
    if "\n" in target:
        return
    found = layout.parse_temporary(name)
    assert found is not None
    assert (found.target, found.host, found.pid) == (target, layout.host(), os.getpid())
    assert found.is_own() and not found.is_dead()


def test_two_temporaries_of_one_file_differ():
    assert layout.temporary_name("x") != layout.temporary_name("x")


@pytest.mark.parametrize("name", [".bashrc", ".x@host.12.tmp", "x@host.12.ab.tmp", ".x@host.1٢.ab.tmp", ".~lock.tmp"])
def test_other_dot_files_are_not_ours(name: str):
    assert layout.parse_temporary(name) is None


def test_only_processes_of_this_host_can_be_called_dead():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = layout.Temporary("x", layout.host(), child.pid)
    other = layout.Temporary("x", layout.host() + "x", child.pid)
    try:
        assert not mine.is_dead()
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie until `wait`
    assert Path("/proc").is_dir() <= mine.is_dead()
    child.wait()
    assert mine.is_dead() and not other.is_dead()


def test_host_fits_a_temporary(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.gethostname", lambda: "knöten.example.org/7")
    assert layout.KEY_PATTERN.fullmatch(layout.host())
    assert layout.parse_temporary(layout.temporary_name("a@b.1.tmp")).target == "a@b.1.tmp"


def test_equal_host_names_in_other_containers_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    here = layout.host()
    monkeypatch.setattr(Path, "readlink", lambda self: Path("pid:[7]"))
    assert layout.host() != here and layout.host().endswith("-7")
