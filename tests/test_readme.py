"""The README and the data card are run: their commands parse, their snippets load a real set."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import click
import pytest

from pipeline.cli import cli, run

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^(?: {4}|exec |`)?(?:torchrun .*? -m )?(pipeline (?:[a-z]+) .*?)(?:\s{2,}#.*)?$", README, re.MULTILINE
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder in which `data/pairs` is a set of real digits, made by the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        assert run(["generate", "--limit", "12", "--shards", "2", "--steps", "2", "--batch-size", "6"]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    words = [word for word in shlex.split(command) if word != "pipeline"]
    found = cli.commands[words[0]]
    with contextlib.suppress(click.exceptions.Exit):
        found.make_context(words[0], words[1:])


def test_there_are_commands_and_snippets():
    assert len(COMMANDS) >= 8
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["webdataset", "datasets", "duckdb"])
def test_every_snippet_loads_the_set(snippet, pairs, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(pairs / "cache"))
    out = io.StringIO()
    with contextlib.chdir(pairs), contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    text = out.getvalue()
    assert "(32, 32)" in text or "JpegImageFile" in text or "similarity" in text


def test_datasets_sees_each_sample_once_with_all_members(pairs, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(pairs / "data/pairs"), split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == 12
    assert {"real.jpg", "syn0.jpg", "json", "cls"} <= set(loaded.column_names)
    assert len({row["key"] for row in loaded["json"]}) == 12


def test_webdataset_reads_every_sample(pairs):
    import webdataset

    urls = [str(path) for path in sorted((pairs / "data/pairs").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 12
    assert all({"real.jpg", "syn0.jpg", "json", "cls"} <= set(sample) for sample in samples)


def test_the_card_holds_counts_generator_and_a_picture(pairs):
    card = (pairs / "data/pairs/README.md").read_text()
    assert card.startswith("---\nconfigs:\n- config_name: pairs\n  default: true\n  data_files: pairs-*.tar\n")
    assert "12 ok, 0 failed" in card
    assert "data:image/jpeg;base64," in card
    assert '"steps": 2' in card
