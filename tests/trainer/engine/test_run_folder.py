"""The run folder: one job at a time, lines of metrics that a restart takes up, files that are whole."""

import json
import math
import multiprocessing
import os
import sys

import pytest
import torch

from manifests.errors import DiffmixError, UsageError
from trainer.engine.run_folder import InUseError, RunFolder, environment


def hold(path, ready, done):
    with RunFolder(path).locked():
        ready.set()
        done.wait(60)


def test_a_second_job_is_refused_and_told_by_whom(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, done))
    holder.start()
    assert ready.wait(60)
    try:
        with pytest.raises(DiffmixError, match=rf"is in use by process {holder.pid} on .*--out"):
            RunFolder(tmp_path).locked().__enter__()
    finally:
        done.set()
        holder.join()
    with RunFolder(tmp_path).locked():
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_the_lock_goes_with_a_killed_job(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, done))
    holder.start()
    assert ready.wait(60)
    holder.kill()
    holder.join()
    with RunFolder(tmp_path).locked():
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"loss": 1.0}', "[1]", "\x00\x00", "null"])
def test_metrics_go_on_after_the_checkpoint(tmp_path, torn):
    folder = RunFolder(tmp_path)
    with folder.metrics(after_step=-1) as metrics:
        for step in (0, 1, 2, 3):
            metrics.write({"step": step, "loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with folder.metrics(after_step=1) as metrics:
        metrics.write({"step": 2, "loss": 7.0})
    assert [json.loads(line) for line in lines(tmp_path)] == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 7.0},
    ]


def test_metrics_that_are_no_text_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n')
    with RunFolder(tmp_path).metrics(after_step=1):
        pass
    assert lines(tmp_path) == ['{"step": 1}']


def test_every_line_can_be_read_at_once(tmp_path):
    with RunFolder(tmp_path).metrics(after_step=-1) as metrics:
        metrics.write({"step": 1})
        assert lines(tmp_path) == ['{"step": 1}']


def test_files_are_json_that_any_reader_takes(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("results.json", {"loss": math.nan, "final": {"knn": -math.inf, "k": [1, math.inf]}})
    with folder.metrics(after_step=-1) as metrics:
        metrics.write({"step": 1, "loss": math.nan})

    def refuse(name):
        raise AssertionError(name)

    read = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert read == {"loss": None, "final": {"knn": None, "k": [1, None]}}
    assert json.loads(lines(tmp_path)[0], parse_constant=refuse) == {"step": 1, "loss": None}


def test_who_is_refused_leaves_the_lock_of_who_holds_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():  # and has written nothing yet
        for _ in range(2):
            with pytest.raises(InUseError, match="in use by process"), RunFolder(tmp_path / "run").locked():
                pass
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_results_of_a_run_that_has_none_or_broken_ones(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.results() is None
    (tmp_path / "results.json").write_text('{"state": "fini')
    assert folder.results() is None
    assert not folder.exists()
    folder.write_text("config.yaml", "run: {}\n")
    assert folder.exists()


def test_a_folder_that_cannot_be_made_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffmixError, match="file"), RunFolder(tmp_path / "file" / "run").locked():
        pass


def test_environment_names_versions_and_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = environment(["trainer", "pretrain"])
    assert found["command"] == ["trainer", "pretrain"]
    assert found["world_size"] == 3
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert torch.__version__.startswith(found["libraries"]["torch"])
    json.dumps(found)


def test_runs_are_not_written_to_urls():
    with pytest.raises(UsageError, match="local or mounted path"):
        RunFolder("s3://bucket/runs/a")
