import subprocess
import sys

import pytest

from manifests.errors import UsageError
from pipeline.sources import SOURCES
from pipeline.sources.open import find_kind, open_source


@pytest.fixture
def put(tmp_path):
    def call(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(tmp_path)

    return call


@pytest.mark.parametrize(
    ("names", "location", "kind"),
    [
        ([], "digits", "digits"),
        (["a/1.jpg", "b/2.jpg"], "", "folder"),
        (["1.jpg", "notes.txt"], "", "folder"),
        (["a/1.jpg", "data/2.jpg", "left.tar.gz"], "", "folder"),
        (["nothing.txt"], "", "folder"),
        (["t-0.tar", "t-1.tar", "sizes.json"], "", "tars"),
        (["t-0.tar"], "t-0.tar", "tars"),
        (["t-0.tar"], "t-{0..1}.tar", "tars"),
        (["t-0.tar"], "*.tar", "tars"),
        (["t.tar.gz"], "t.tar.gz", "tars"),
        (["t.parquet"], "", "tables"),
        (["data/t.parquet", "README.md"], "", "tables"),
        (["t.parquet"], "t.parquet::photo", "tables"),
        (["state.json", "dataset_info.json", "data-0.arrow"], "", "tables"),
        (["dataset_dict.json", "train/state.json"], "", "tables"),
        (["plan.json", "pairs-000000.tar", "pairs-000000.parquet", "manifest.parquet"], "", "pairs"),
    ],
)
def test_the_kind_is_what_lies_there(put, names, location, kind):
    folder = put(*names)
    assert find_kind(location if location == "digits" else f"{folder}/{location}") == kind


@pytest.mark.parametrize("names", [["a/1.jpg", "t.tar"], ["1.jpg", "t.parquet"], ["t.tar", "t.parquet"]])
def test_what_is_not_clear_must_be_said(put, names):
    folder = put(*names)
    with pytest.raises(UsageError, match="several kinds"):
        open_source(folder)
    assert open_source(f"tars:{folder}").kind == "tars"
    assert open_source(f"folder:{folder}").location == folder


@pytest.mark.parametrize("location", ["", "nowhere", "file.txt", "folder:", "digit"])
def test_errors_say_what_is_allowed(put, location, monkeypatch):
    monkeypatch.chdir(put("file.txt"))
    with pytest.raises(UsageError, match=r"--source takes an image folder.*digits.*folder:PATH, tars:PATH"):
        open_source(location)


def test_every_source_can_be_opened_by_its_name(tmp_path):
    for kind in SOURCES:
        source = open_source("digits" if kind == "digits" else f"{kind}:{tmp_path}")
        assert source.kind == kind


def test_names_alone_import_nothing_heavy():
    code = "import sys, pipeline.sources; print(any(m in sys.modules for m in ('numpy', 'pyarrow', 'PIL')))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
