"""metrics.jsonl on a full disk, and errors that are not its own."""

import os

import pytest

from manifests.errors import StorageError
from trainer.engine.run_folder import Metrics, RunFolder


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_explained():
    file = open("/dev/full", "w")  # noqa: SIM115  # closing it fails too
    with pytest.raises(StorageError, match="no space left"):
        Metrics(file).write({"step": 1})
    with pytest.raises(OSError, match="No space left"):
        file.close()


def test_other_errors_are_not_blamed_on_the_file(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(MemoryError), folder.metrics(after_step=-1) as metrics:
        metrics.write({"step": 1})
        raise MemoryError
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
