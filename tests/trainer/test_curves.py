"""Values over steps, from metrics.jsonl as runs leave it."""

import json

import pytest
from PIL import Image

from manifests.errors import UsageError
from trainer import curves


@pytest.fixture
def run(tmp_path):
    lines = [{"step": 0, "knn": 0.1}]
    lines += [{"step": step, "loss": 1 / step, "keys": 0.2 + step / 1000} for step in range(10, 101, 10)]
    lines.append({"step": 110, "loss": None})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 120, "lo'
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text(text)
    return tmp_path / "mine"


def test_points(run):
    assert curves.points(run, "knn") == [(0, 0.1)]
    assert curves.points(str(run), "loss") == [(step, 1 / step) for step in range(10, 101, 10)]


def test_table(run):
    assert curves.table([run], ["loss", "keys"], rows=4).splitlines() == [
        "| step | mine loss | mine keys |",
        "|---|---|---|",
        "| 10 | 0.1 | 0.21 |",
        "| 40 | 0.025 | 0.24 |",
        "| 70 | 0.01429 | 0.27 |",
        "| 100 | 0.01 | 0.3 |",
    ]
    assert curves.table([run], ["knn"], rows=1).splitlines()[2:] == ["| 0 | 0.1 |"]


def test_picture(run, tmp_path):
    curves.picture(tmp_path / "keys.png", [run], ["keys", "loss"])
    assert Image.open(tmp_path / "keys.png").size == (1120, 640)


def test_values_that_were_not_logged(run, tmp_path):
    with pytest.raises(UsageError, match=r"no 'key'; it has keys, knn, loss, step"):
        curves.points(run, "key")
    with pytest.raises(UsageError, match="no metrics yet"):
        curves.points(tmp_path / "none", "loss")
