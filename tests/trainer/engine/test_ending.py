"""What users are told of errors of torch, by whom, and how a process of several ends."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from manifests.errors import DiffmixError
from trainer.engine.ending import explanation, is_told


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def _of_all():
    error = DiffmixError("")
    error.of_all = True
    return error


def test_one_process_prints_what_all_raise(second_of_two, monkeypatch):
    assert is_told(_of_all())
    assert not is_told(DiffmixError(""))
    assert not is_told(OSError())
    monkeypatch.setenv("RANK", "0")
    assert not is_told(_of_all())


def test_a_single_process_prints_all_of_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # of something else
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_told(_of_all())


def test_too_little_memory_is_no_bug():
    text = explanation(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"))
    assert text is not None
    assert text.startswith("CUDA out of memory. Tried to allocate 9 GiB. A larger run.accumulation")


@pytest.mark.parametrize(
    "error", [RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:1"), dist.DistBackendError("NCCL")]
)
def test_another_process_that_ended(second_of_two, monkeypatch, error):
    assert "another process" in (explanation(error) or "")
    assert explanation(RuntimeError("shapes differ")) is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert explanation(error) is None


CODE = """
import atexit, os, sys
from trainer.engine.ending import leave
atexit.register(print, "destructors")
print("told", end=" ")
leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("size", "code", "said"), [("2", 3, "told"), ("2", 0, "told destructors"), ("1", 3, "told destructors")]
)
def test_a_process_of_several_that_failed_waits_for_nothing(monkeypatch, size, code, said):
    monkeypatch.setenv("WORLD_SIZE", size)
    done = subprocess.run([sys.executable, "-c", CODE, str(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (code, said)
