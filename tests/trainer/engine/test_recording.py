"""metrics.jsonl and trackers are opened once and closed once, however a run ends, and their errors are for users."""

import json
import os
import signal
import threading

import pytest
import torch
from accelerate.tracking import GeneralTracker

from manifests.errors import CorruptSetError, DiffmixError
from tests.trainer.data.builders import write_pairs
from tests.trainer.engine.small_runs import metrics, train
from trainer.engine.launch import make_accelerator
from trainer.engine.loop import CollapsedError
from trainer.engine.recording import recording, track
from trainer.engine.run_folder import RunFolder
from trainer.nn import precision

CPU = precision.choose(torch.device("cpu"), "vit", "fp32")


class Diary(GeneralTracker):
    """Keeps what it is told, and fails where it is asked to."""

    name = "diary"
    requires_logging_directory = False
    tracker = None

    def __init__(self, failing=""):
        super().__init__()
        self.failing, self.lines = failing, []

    def _note(self, what):
        if what.startswith(self.failing or "nothing"):
            raise ValueError(f"no {self.failing} today")
        self.lines.append(what)

    def start(self):
        self._note("start")

    def store_init_configuration(self, values):
        self._note("settings")

    def log(self, values, step=None, **more):
        self._note(f"log {step} {values['loss']}")

    def finish(self):
        self._note("finish")


def use(tmp_path, diary, act, said):
    folder = RunFolder(tmp_path)
    accelerator = make_accelerator(CPU, [diary], tmp_path)
    with recording(folder, accelerator, after_step=3, say=said.append) as writer:
        writer.write({"step": 4, "loss": 0.5})
        track(accelerator, {"loss": 0.5}, 4)
        act()


def _raise():
    raise KeyError("bug")


@pytest.mark.parametrize(("act", "error"), [(lambda: None, None), (_raise, KeyError)], ids=["end", "error"])
def test_all_is_told_and_closed_once(tmp_path, act, error):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4, "loss": 9}\n')
    diary, said = Diary(), []
    if error is None:
        use(tmp_path, diary, act, said)
    else:
        with pytest.raises(error):
            use(tmp_path, diary, act, said)
    assert diary.lines == ["start", "log 4 0.5", "finish"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3}, {"step": 4, "loss": 0.5}], "what will be done again is dropped"
    assert said == []


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("start", r"cannot start the trackers \(.*\) in .*/diffmix: no start today"),
        ("log", "cannot write to .*: no log"),
    ],
)
def test_a_tracker_that_fails(tmp_path, failing, message):
    with pytest.raises(DiffmixError, match=message):
        use(tmp_path, Diary(failing), lambda: None, [])
    assert not writing_threads()


def test_a_tracker_that_cannot_be_closed_is_no_error(tmp_path):
    said = []
    use(tmp_path, Diary("finish"), lambda: None, said)
    assert said == ["the tracker diary could not be closed: no finish today"]


def writing_threads():
    """Of TensorBoard: each lives until its tracker is closed."""
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "_AsyncWriterThread"]


def test_the_threads_are_tensorboards(tmp_path):
    seen = []
    use(tmp_path, Diary(), lambda: seen.extend(writing_threads()), [])
    assert len(seen) == 1
    assert not writing_threads()


def stop(data, out):
    threading.Timer(0.0, _once_it_is_training, [out]).start()
    assert train(data, out, steps=1_000_000, checkpoint__every=0).state == "stopped"


def _once_it_is_training(out):
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        assert threading.main_thread().is_alive()
    os.kill(os.getpid(), signal.SIGTERM)


def collapse(data, out):
    with pytest.raises(CollapsedError):
        train(data, out, optim__name="sgd", optim__lr=1e30, optim__warmup_epochs=0, steps=9)


def fail(data, out):
    for shard in range(2):
        with open(f"{data}/pairs-{shard:06d}.tar", "r+b") as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
    with pytest.raises(CorruptSetError, match=r"^the real image of .* cannot be read"):
        train(data, out, mix__policy="real")
    assert metrics(out) == []


@pytest.mark.parametrize("end", [stop, collapse, fail])
def test_a_run_that_ends_early_closes_its_trackers(tmp_path, end):
    data = write_pairs(tmp_path / "pairs", 20, labelled=False)
    end(data, tmp_path / "run")
    assert list((tmp_path / "run" / "diffmix").glob("events.*"))
    assert not writing_threads()
