"""A rank that cannot read, write or go on ends all ranks at once, with one message; mended, the command goes on."""

import contextlib
import resource
import signal
from pathlib import Path

import pytest

from manifests import layout
from tests.faults.training import Training, free_port, srun
from tests.trainer.compare import small as comparisons
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import arguments, assert_same_run, final, metrics
from tests.trainer.finetune import small
from trainer.data.order import EpochOrder, micro_batch
from trainer.data.rows import REAL, Rows
from trainer.engine import checkpoint
from trainer.evaluate.held_out import split

ROWS, BATCH, STEPS = 40, 8, 8
HOW = {"mix__policy": "real", "steps": STEPS, "batch": BATCH, "checkpoint__every": 2}
ENDLESS = {**HOW, "steps": 1_000_000, "checkpoint__every": 0, "method__head_norm": "none"}
SECONDS = 30  # far below the time-out of a collective, and enough for a busy machine


@pytest.fixture
def data(tmp_path):
    """Without labels nothing but training reads images."""
    return write_pairs(tmp_path / "pairs", ROWS, labelled=False)


@pytest.fixture
def start(forks, tmp_path, running):
    """Start two ranks of `trainer` with these arguments; `prepare` is called in each before."""

    def call(given, prepare=None):
        port, number = free_port(), len(running)
        for rank in range(2):
            log = tmp_path / f"log-{number}-{rank}.txt"
            running.append(Training(forks, given, srun(rank, port), log, prepare))
        return running[number:]

    return call


def read_at(rows, step, rank, accumulation=1):
    """A row that a rank reads in its last micro-batch of a step, and at no other step of the first epoch."""
    order = EpochOrder(0, 0, len(rows))
    return int(micro_batch(order, step, BATCH, rank, 2, accumulation - 1, accumulation)[0])


@contextlib.contextmanager
def damaged(data, row):
    """The bytes of a row's image are zeros inside."""
    shard, offset, size = Rows.open(data).places.of(row, REAL)
    with open(f"{data}/{layout.tar_name(shard)}", "r+b") as file:
        file.seek(offset)
        kept = file.read(size)
        for bytes_now in (bytes(size), kept):
            file.seek(offset)
            file.write(bytes_now)
            file.flush()
            if bytes_now is not kept:
                yield


def ended(ranks, seconds=SECONDS):
    """Their exit codes; none takes longer than that after the first one."""
    first = ranks[0].wait()
    return [first, ranks[1].wait(seconds)]


def logs(ranks):
    return [rank.log.read_text() for rank in ranks]


def assert_told_once(ranks, *words):
    """Rank 0 says it in one line, rank 1 nothing."""
    texts = logs(ranks)
    told = [line for text in texts for line in text.splitlines() if line.startswith("error:")]
    assert len(told) == 1, texts
    assert told[0] in texts[0]
    assert all(word in told[0] for word in words), told[0]
    assert not any("Traceback" in text for text in texts), texts


LATER = [pytest.param(2, 3, id="accumulated", marks=pytest.mark.slow), pytest.param(1, 0, id="first-step")]


@pytest.mark.parametrize(("accumulation", "step"), [pytest.param(1, 3, id="amid"), *LATER])
def test_an_image_that_one_rank_cannot_read(start, data, tmp_path, accumulation, step):
    how = {**HOW, "run__accumulation": accumulation}
    out, row = tmp_path / "run", read_at(Rows.open(data), step, 1, accumulation)
    with damaged(data, row):
        ranks = start(arguments(data, out, **how))
        assert ended(ranks) == [3, 3], logs(ranks)
    assert_told_once(ranks, "rank 1: ", f"of {Rows.open(data).keys([row])[0]} in ", "`pipeline repair ")
    assert all(line["step"] <= step for line in metrics(out)), "nothing of the step that failed"
    if step:
        assert final(out).step == 2
    again, undisturbed = start(arguments(data, out, **how)), start(arguments(data, tmp_path / "whole", **how))
    assert [ended(again), ended(undisturbed)] == [[0, 0], [0, 0]], logs(again)
    assert_same_run(out, tmp_path / "whole")


def no_more_room(command, file, more=100):
    """No file of the process can become longer than this one and `more` bytes are now."""
    size = file.stat().st_size + more
    resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def outgrows(file, other, margin=500):
    """Whether a file is so much longer than another one, which then still has room."""
    return lambda: file.exists() and file.stat().st_size > other.stat().st_size + margin


def test_a_log_that_the_main_rank_cannot_write(start, data, tmp_path):
    out = tmp_path / "run"
    file, ranks = out / "metrics.jsonl", start(arguments(data, out, **ENDLESS))
    assert ranks[0].wait_until(outgrows(file, ranks[0].log))
    no_more_room(ranks[0], file)
    assert ended(ranks) == [1, 1], logs(ranks)
    assert_told_once(ranks, "rank 0: cannot write ", "no space left")
    assert not (out / "results.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment_then_the_same_command(start, data, tmp_path):
    """Whichever write fails first, of a log or of a checkpoint."""
    out, how = tmp_path / "run", {**HOW, "steps": 60}
    for lines in (5, 21, 40):
        ranks = start(arguments(data, out, **how))
        file = out / "metrics.jsonl"
        assert ranks[0].wait_until(lambda lines=lines, file=file: file.exists() and len(metrics(out)) > lines)
        no_more_room(ranks[0], ranks[0].log, 400)
        assert ended(ranks) == [1, 1], logs(ranks)
        assert_told_once(ranks, "rank 0: cannot write ", "no space left")
        assert final(out).step >= lines - 2
    again, undisturbed = start(arguments(data, out, **how)), start(arguments(data, tmp_path / "whole", **how))
    assert [ended(again), ended(undisturbed)] == [[0, 0], [0, 0]], logs(again)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "diffmix"])
def test_what_is_in_the_way_of_a_file_of_the_main_rank(start, data, tmp_path, name):
    """A folder where a file should be; a file where trackers have their folder, of the project's name."""
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("") if name == "diffmix" else (out / name).mkdir()
    ranks = start(arguments(data, out, **{**HOW, "steps": 2}))
    assert ended(ranks) == [1, 1], logs(ranks)
    assert_told_once(ranks, "rank 0: ", name)


def _looks_late():
    """As on a GPU, where flags are read a step later."""
    from trainer.engine import watch

    begin = watch.Watch.__init__

    def late(self, device):
        begin(self, device)
        self._lag = 1

    watch.Watch.__init__ = late


@pytest.mark.parametrize("step", [1, 2])
def test_flags_that_are_read_late(start, data, tmp_path, step):
    """The step of the failure is a checkpoint's, or the one before: nothing of it is saved or logged."""
    out, row = tmp_path / "run", read_at(Rows.open(data), step, 1)
    how = {**HOW, "run__log_every": 2}
    with damaged(data, row):
        ranks = start(arguments(data, out, **how), _looks_late)
        assert ended(ranks) == [3, 3], logs(ranks)
    assert_told_once(ranks, "rank 1: ", f"of {Rows.open(data).keys([row])[0]} in ")
    assert [line["step"] for line in metrics(out)] == [1, 2][:step]
    assert [path.name for path in (out / "checkpoints").glob("*")] == [checkpoint.name_of(2)][: step - 1]


def _breaks():
    """As a bug would, on rank 1."""
    from trainer.engine.stepper import Stepper

    update = Stepper.update

    def broken(self, step):
        return update(self, step) if step < 3 or self.accelerator.process_index == 0 else {}["a bug"]

    Stepper.update = broken


def test_a_bug_on_one_rank(start, data, tmp_path):
    out = tmp_path / "run"
    ranks = start(arguments(data, out, **HOW), _breaks)
    assert ended(ranks) == [1, 1], logs(ranks)
    first, second = logs(ranks)
    assert "KeyError: 'a bug'" in second, "with a traceback, for those who mend it"
    assert "error: another process of this run has ended" in first
    assert "Traceback" not in first
    assert final(out).step == 2


def test_an_image_that_one_rank_cannot_read_in_an_evaluation(start, tmp_path):
    data = write_pairs(tmp_path / "labelled", ROWS)
    rows = Rows.open(data)
    last = split(rows, bank=ROWS, queries=ROWS).bank[-1]  # ranks evaluate a half each
    with damaged(data, int(last)):
        ranks = start(arguments(data, tmp_path / "run", **HOW))
        assert ended(ranks) == [3, 3], logs(ranks)
    assert_told_once(ranks, "rank 1: ", f"of {rows.keys([last])[0]} in ")


def test_settings_that_cannot_be_are_told_once(start, data, tmp_path):
    ranks = start(arguments(data, tmp_path / "run", **{**HOW, "mix__policy": "imaginary"}))
    assert ended(ranks) == [2, 2], logs(ranks)
    assert_told_once(ranks, "error: unknown policy 'imaginary'")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"run__accumulation": 8}, "a global batch of 8"),
        ({"init": "nowhere/at-all"}, "nowhere/at-all"),
        ({"run__precision": "fp16"}, "fp16"),
    ],
)
def test_what_cannot_be_made_is_told_once(start, data, tmp_path, more, told):
    """Batches, weights and numbers that are looked at when networks are made."""
    ranks = start(arguments(data, tmp_path / "run", **{**HOW, **more}))
    assert len(set(ended(ranks))) == 1, logs(ranks)
    assert_told_once(ranks, told)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_comparison_that_cannot_be_is_told_once(start, tmp_path):
    data, recipe = write_pairs(tmp_path / "pairs", ROWS), comparisons.write_recipe(tmp_path)
    given = comparisons.arguments(data, tmp_path / "out", recipe)
    for more in (["mix.replicas=2"], ["run.accumulation=8"]):
        ranks = start([*given, "--set", *more])
        assert ended(ranks) == [2, 2], logs(ranks)
        assert_told_once(ranks, "error: ")
    ranks = start([*given, "--out", "s3://bucket/out"])
    assert ended(ranks) == [2, 2], logs(ranks)
    assert_told_once(ranks, "--out s3://bucket/out: runs are written to a folder")


def test_an_image_that_one_rank_cannot_read_while_steps_are_timed(start, tmp_path):
    data, recipe = write_pairs(tmp_path / "pairs", ROWS), comparisons.write_recipe(tmp_path, ["real"])
    row, given = read_at(Rows.open(data), 2, 1), comparisons.arguments(data, tmp_path / "out", recipe)
    with damaged(data, row):
        ranks = start(given)
        assert ended(ranks) == [3, 3], logs(ranks)
    assert_told_once(ranks, "arm real: rank 1: ", f"of {Rows.open(data).keys([row])[0]} in ")
    again = start(given)
    assert ended(again) == [0, 0], logs(again)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An encoder and a task of three colours."""
    folder = tmp_path_factory.mktemp("tuned")
    init = small.pretrained(write_pairs(folder / "pairs", 60), folder / "run")
    return init, Path(small.write_task(folder / "colours", 90))


def test_fine_tuning_goes_on_after_an_image_that_one_rank_could_not_read(start, tuned, tmp_path):
    init, task = tuned
    out = tmp_path / "out"
    settings = ("data.cache=0", "checkpoint.every=5")
    given = small.arguments(init, out, [str(task)], ["full"], steps=1_000_000, at="0", settings=settings)
    ranks = start(given)
    log = out / "full-lr0.02-seed0" / "01-colours" / "metrics.jsonl"
    assert ranks[0].wait_until(lambda: log.exists() and log.read_text().count("\n") > 8)
    kept = {path: path.read_bytes() for path in task.glob("red/*.png")}
    for path, data in kept.items():
        path.write_bytes(bytes(len(data)))
    assert ended(ranks) == [3, 3], logs(ranks)
    assert_told_once(ranks, ".png", str(task))
    for path, data in kept.items():
        path.write_bytes(data)
    again = start(given)
    assert again[0].wait_until(lambda: again[0].log.exists() and "going on from step" in again[0].log.read_text())
    again[1].kill(signal.SIGTERM)
    assert ended(again) == [75, 75], logs(again)


def test_fine_tuning_ends_where_its_log_cannot_be_written(start, tuned, tmp_path):
    init, task = tuned
    out = tmp_path / "out"
    ranks = start(small.arguments(init, out, [str(task)], ["linear"], steps=1_000_000, at="0"))
    log = out / "linear-lr0.2-seed0" / "01-colours" / "metrics.jsonl"
    assert ranks[0].wait_until(outgrows(log, ranks[0].log))
    no_more_room(ranks[0], log)
    assert ended(ranks) == [1, 1], logs(ranks)
    assert_told_once(ranks, "rank 0: cannot write ", "no space left")
